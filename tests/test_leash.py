"""The leash: its gradient against formulas assembled from the model's own Jacobians, and what it leaves alone."""

from dataclasses import asdict
from itertools import pairwise

import pytest
import torch
from torch.func import jacrev

import beyond
import leap_align
from beyond import Hyper, Leash
from leap_align import BadInput, CutVelocity, cut, objective
from tests.problems import SHIFTS, Net, bumpy, euler, grid, randn, seeded

pytestmark = pytest.mark.usefixtures("float64")

TOLERANCE = 1e-12
METHODS = leap_align.METHODS | beyond.METHODS
T, B, BETA = 6, 3, 0.7
ALPHAS = [0, 0.3, 1]
CASES = [(name, "batch") for name in METHODS] + [("leap_align", "sample")]
every_case = pytest.mark.parametrize(("name", "pairs"), CASES, ids=str)


def problem(shape=(3,), shift=2.2243):
    """A trained network and its reference, noise, a grid, and the states of an Euler run of the trained one."""
    net, reference, x_T, times = Net(shape), Net(shape, seed=5), randn(B, *shape, seed=1), grid(T, shift)
    return net, reference, x_T, times, euler(net.velocity(net.theta), x_T, times)


def leashed(name, net, reference, x_T, times, hyper, beta, seed=0, microbatches=1, velocity=None):
    """The gradient of a method's loss with the leash; the endpoints' weights, the leash's figures, the method's log."""
    theta, weights = net.leaf(), []
    v_ref = reference.velocity(reference.theta) if reference else None
    velocity = velocity or Leash(net.velocity(theta), v_ref, beta, microbatches)
    endpoints = METHODS[name](velocity, x_T, times, hyper, seeded(seed))
    for x_0, weight in endpoints:
        image = cut(x_0)
        (objective(bumpy(image), weight, hyper.lam) / microbatches).backward()
        velocity.weight = weight
        velocity.backward(x_0, image.grad)
        weights.append(weight)
    return theta.grad, weights, velocity.log, endpoints.log


def added(*arguments, **keywords):
    """What the leash adds to the gradient, with weights, figures and log."""
    with_leash, weights, figures, log = leashed(*arguments, beta=BETA, **keywords)
    without, *_ = leashed(*arguments, beta=0.0, **keywords)
    return with_leash - without, weights, figures, log


def evaluation(net, reference, x, t):
    """One sample's gap (D,) and dv/dtheta (D, P)."""
    x = x[None]
    gap = (net(net.theta, x, t) - reference(reference.theta, x, t)).flatten()
    return gap, jacrev(net, argnums=0)(net.theta, x, t).reshape(x.numel(), -1)


def one_evaluation(net, reference, x, t, length, weight):
    """d/dtheta of the mean over a batch of w h |v - v_ref|^2, where x does not depend on theta; and its value."""
    gradient, value = torch.zeros_like(net.theta), 0.0
    for b in range(B):
        gap, dv = evaluation(net, reference, x[b], t)
        gradient += 2 * weight[b] * length / (B * gap.numel()) * gap @ dv
        value += weight[b] * length * gap.square().mean() / B
    return gradient, value


def w_sim(net, x, k, j, tau):
    """Eq. M12 of one sample's states {index: state} at the times k > j."""
    (x_k, x_j, x_0) = x
    x_hat_j = x_k - (k - j) * net(net.theta, x_k[None], k)[0]
    x_hat_0 = x_j - j * net(net.theta, x_j[None], j)[0]
    return 1 / ((x_j - x_hat_j).abs().mean().clamp(min=tau) + (x_0 - x_hat_0).abs().mean().clamp(min=tau))


# The gradient


@pytest.mark.parametrize("shape", [(3,), (2, 2, 2)], ids=str)
@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("pairs", ["batch", "sample"])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_the_leash_of_leap_align_is_the_formula(shape, shift, pairs, alpha):
    net, reference, x_T, times, states = problem(shape, shift)
    hyper = Hyper(lam=None, alpha=alpha, pairs=pairs)
    found, _, figures, log = added("leap_align", net, reference, x_T, times, hyper)
    i_k, i_j = (torch.as_tensor(log[name]).expand(B) for name in ("i_k", "i_j"))
    expected, R = torch.zeros_like(net.theta), 0.0
    for b in range(B):
        k, j, x_k, x_j = times[i_k[b]], times[i_j[b]], states[i_k[b]][b], states[i_j[b]][b]
        w = w_sim(net, (x_k, x_j, states[0][b]), k, j, hyper.tau)
        (gap_k, dv_k), (gap_j, dv_j) = evaluation(net, reference, x_k, k), evaluation(net, reference, x_j, j)
        expected += 2 * w / (B * gap_k.numel()) * ((k - j) * gap_k @ dv_k + j * gap_j @ dv_j)
        R += w / B * ((k - j) * gap_k.square().mean() + j * gap_j.square().mean())
    assert expected.abs().max() > 1e-2
    assert (found - BETA * expected).abs().max() < TOLERANCE
    assert figures["leash"] == pytest.approx(R.item(), rel=1e-12)


def test_the_leash_of_refl_is_the_formula():
    net, reference, x_T, times, states = problem()
    found, _, figures, log = added("refl", net, reference, x_T, times, Hyper(lam=None, m=4))
    t = times[log["i_min"]]
    expected, R = one_evaluation(net, reference, states[log["i_min"]], t, t, torch.ones(B))
    assert (found - BETA * expected).abs().max() < TOLERANCE < expected.abs().max()
    assert figures["leash"] == pytest.approx(R.item(), rel=1e-12)


def test_the_leash_of_draft_lv_is_the_sum_over_its_endpoints():
    net, reference, x_T, times, states = problem()
    found, _, figures, _ = added("draft_lv", net, reference, x_T, times, Hyper(lam=None, n=2))
    draws, t = seeded(0), times[1]
    inputs = [states[1], *((1 - t) * states[0] + t * torch.randn(x_T.shape, generator=draws) for _ in range(2))]
    parts = [one_evaluation(net, reference, x, t, t, torch.ones(B)) for x in inputs]
    assert (found - BETA * sum(gradient for gradient, _ in parts)).abs().max() < TOLERANCE
    assert figures["leash"] == pytest.approx(sum(R for _, R in parts).item(), rel=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_the_leash_of_drtune_is_the_formula(seed):
    net, reference, x_T, times, states = problem()
    found, _, figures, log = added("drtune", net, reference, x_T, times, Hyper(lam=None, m=4), seed=seed)
    i_min, s = log["i_min"], log["s"]
    trained = [i for i in (s, s + T // 2) if i >= i_min]
    ends = {i: times[i - 1] if i > i_min else 0.0 for i in trained}
    parts = [one_evaluation(net, reference, states[i], times[i], times[i] - ends[i], torch.ones(B)) for i in trained]
    assert trained and (found - BETA * sum(gradient for gradient, _ in parts)).abs().max() < TOLERANCE
    assert figures["leash"] == pytest.approx(sum(R for _, R in parts).item(), rel=1e-12)


def test_the_leash_of_full_backpropagation_is_the_formula():
    """R is the integral of the squared gap over the whole run, with the states as constants."""
    net, reference, x_T, times, states = problem()
    found, _, figures, _ = added("full_backprop", net, reference, x_T, times, Hyper(lam=None))
    steps = [(states[i], times[i], times[i] - times[i - 1]) for i in range(1, T + 1)]
    parts = [one_evaluation(net, reference, *step, torch.ones(B)) for step in steps]
    assert (found - BETA * sum(gradient for gradient, _ in parts)).abs().max() < TOLERANCE
    assert figures["leash"] == pytest.approx(sum(R for _, R in parts).item(), rel=1e-12)


@pytest.mark.parametrize("K", [2, 3, T])
def test_the_leash_of_stratified_also_pulls_the_leaps_that_it_evaluates_again(K):
    net, reference, x_T, times, states = problem()
    found, (weight,), figures, log = added("stratified", net, reference, x_T, times, Hyper(lam=None, K=K))
    indices = [*log["timesteps"], 0]
    leaps = [(states[a], times[a], times[a] - times[b]) for a, b in pairwise(indices)]
    parts = [one_evaluation(net, reference, *leap, weight) for leap in leaps]
    expected = sum(gradient for gradient, _ in parts)
    assert (found - BETA * expected).abs().max() < TOLERANCE < expected.abs().max()
    assert figures["leash"] == pytest.approx(sum(R for _, R in parts).item(), rel=1e-12)


def test_the_leash_of_sparse_has_the_compensation_in_its_lengths():
    net, reference, x_T, times, states = problem()
    found, _, figures, log = added("sparse", net, reference, x_T, times, Hyper(lam=None, K=3, rho=0.5))
    h = {i: (times[i] - times[i - 1]).item() for i in range(1, T + 1)}
    gamma = 1 + 0.5 * (sum(h.values()) / sum(h[i] for i in log["timesteps"]) - 1)
    parts = [one_evaluation(net, reference, states[i], times[i], gamma * h[i], torch.ones(B)) for i in log["timesteps"]]
    expected = sum(gradient for gradient, _ in parts)
    assert (found - BETA * expected).abs().max() < TOLERANCE < expected.abs().max()
    assert figures["leash"] == pytest.approx(sum(R for _, R in parts).item(), rel=1e-12)


# What it leaves alone


@every_case
def test_no_leash_changes_no_bit(name, pairs):
    net, reference, x_T, times, _ = problem()
    hyper = Hyper(m=4, pairs=pairs)
    found, _, figures, _ = leashed(name, net, None, x_T, times, hyper, 0.0)
    theta = net.leaf()
    velocity = CutVelocity(net.velocity(theta))
    for x_0, weight in METHODS[name](velocity, x_T, times, hyper, seeded(0)):
        image = cut(x_0)
        objective(bumpy(image), weight, hyper.lam).backward()
        velocity.backward(x_0, image.grad)
    assert torch.equal(found, theta.grad) and figures == {}
    unequal, *_ = leashed(name, net, reference, x_T, times, hyper, 1.0)
    assert not torch.equal(found, unequal)


@every_case
def test_at_the_reference_the_leash_does_not_pull(name, pairs):
    net, _, x_T, times, _ = problem()
    found, _, figures, _ = leashed(name, net, net, x_T, times, Hyper(m=4, pairs=pairs), 1.0)
    without, *_ = leashed(name, net, None, x_T, times, Hyper(m=4, pairs=pairs), 0.0)
    assert torch.equal(found, without)
    assert figures == {"leash": 0.0, "v_norm": 1.0}


@every_case
def test_the_reference_is_evaluated_once_for_each_differentiated_evaluation(name, pairs):
    net, reference, x_T, times, _ = problem()
    theta, trained, asked = net.leaf(), [], []

    def v(x, t):
        result = net(theta, x, t)
        trained.extend([t] * result.requires_grad)
        return result

    def v_ref(x, t):
        assert not torch.is_grad_enabled()
        asked.append(t)
        return reference(reference.theta, x, t)

    leashed(name, net, None, x_T, times, Hyper(m=4, pairs=pairs), 1.0, velocity=Leash(v, v_ref, 1.0))
    assert len(asked) == len(trained) >= 1 and all(torch.equal(a, b) for a, b in zip(asked, trained))


# Its scale


def test_a_batch_in_parts_and_an_image_of_any_size_have_the_same_leash():
    net, reference, x_T, times, _ = problem()
    hyper = Hyper(lam=None, m=1)
    whole, _, figures, _ = added("refl", net, reference, x_T, times, hyper)
    parts = [added("refl", net, reference, x_T[b : b + 1], times, hyper, microbatches=B)[0] for b in range(B)]
    assert (whole - sum(parts)).abs().max() < TOLERANCE

    def tiled(one):
        """A velocity of images twice as large, whose halves are two images."""
        return lambda x, t: torch.cat([one(half, t) for half in x.chunk(2, 1)], 1)

    theta = net.leaf()
    velocity = Leash(tiled(net.velocity(theta)), tiled(reference.velocity(reference.theta)), 1.0)
    ((x_0, weight),) = METHODS["refl"](velocity, torch.cat([x_T, x_T], 1), times, hyper, seeded(0))
    velocity.weight = weight
    velocity.backward(x_0, torch.zeros_like(x_0))
    assert velocity.log["leash"] == pytest.approx(figures["leash"], rel=1e-12)
    assert (BETA * theta.grad - whole).abs().max() < TOLERANCE


def test_v_norm_against_a_hand_calculation():
    """The trained velocity is three times the reference, whose norms are 5 and 13."""
    factor, x_T = torch.tensor(3.0, requires_grad=True), torch.tensor([[3.0, 4.0], [5.0, 12.0]])
    velocity = Leash(lambda x, t: factor * x, lambda x, t: x, 1.0)
    ((x_0, velocity.weight),) = METHODS["refl"](velocity, x_T, grid(1), Hyper(m=1), seeded(0))
    velocity.backward(x_0, torch.zeros_like(x_0))
    assert velocity.log == {"v_norm": pytest.approx(3), "leash": pytest.approx((4 * 25 + 4 * 169) / 4)}


@pytest.mark.parametrize("beta", [-1.0, float("nan"), float("inf")])
def test_a_beta_that_cannot_work_is_refused(beta):
    with pytest.raises(BadInput, match=rf"^beta={beta} must be at least 0 and finite; 0 is no leash$"):
        Hyper(beta=beta)


def test_the_papers_hyperparameters_keep_their_defaults():
    assert asdict(leap_align.Hyper()).items() <= asdict(Hyper()).items() and Hyper().beta == 0
