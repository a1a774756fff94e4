"""How a backward is run: one evaluation at a time with the joint gradient; the leash's own; the rows of a rank.

The leash's gradient is compared with formulas assembled from the model's own Jacobians.
"""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from beyond import SOLVERS, Hyper
from leap_align import objective
from runtime.backward import Leash, SplitVelocity, leaf, rows_of_rank
from tests.oracles import bumpy, jacobians
from tests.problems import HYPERS, METHODS, B, Net, Recorder, T, close, gradient, grid, problem, run, seeded

pytestmark = pytest.mark.usefixtures("float64")

BETA = 0.7
OFF = {name: replace(hyper, lam=None) for name, hyper in HYPERS.items()}
"""Hyperparameters without a hinge."""


def backward(name, velocity, x_T, times, hyper, seed=0, solver="euler", microbatches=1, **options):
    """A method's backward, run as the trainer runs it: the figures of each endpoint; the last weight and log."""
    figures = []
    for x_0, weight, log in METHODS[name](velocity, x_T, times, hyper, seeded(seed), SOLVERS[solver]()):
        image = leaf(x_0)
        (objective(bumpy(image), weight, hyper.lam) / microbatches).backward()
        last = weight, log
        figures.append(velocity.backward(x_0, image.grad, weight, **options))
    return figures, *last


def cut(name, net, *arguments, **keywords):
    """The gradient of theta by the cut backward."""
    theta = net.leaf()
    figures, *_ = backward(name, SplitVelocity(net.velocity(theta)), *arguments, **keywords)
    assert figures == [{}] * len(figures)
    return theta.grad


def leashed(name, net, x_T, *arguments, reference=None, beta=BETA, microbatches=1, **keywords):
    """The gradient of theta with a leash to a reference; the figures of each endpoint, the weight, the log."""
    theta, reference = net.leaf(), reference or Net(x_T.shape[1:], seed=5)
    velocity = Leash(net.velocity(theta), reference.velocity(reference.theta), beta, microbatches)
    return theta, *backward(name, velocity, x_T, *arguments, microbatches=microbatches, **keywords)


# One evaluation after the other
def test_the_cut_backward_has_the_gradient_of_the_joint_one(name, alpha, solver):
    net, x_T, times, _ = problem()
    hyper = replace(OFF[name], alpha=alpha)
    expected, _ = gradient(name, net, x_T, times, hyper, solver=solver)
    assert close(cut(name, net, x_T, times, hyper, solver=solver), expected)


def test_the_cut_backward_of_a_velocity_that_ignores_its_state(name):
    theta, (_, x_T, times, _) = torch.tensor(0.7, requires_grad=True), problem()
    plain = lambda x, t: (theta * (1 + t)).reshape(-1, 1).expand(B, 3)  # noqa: E731
    run(name, plain, x_T, times, HYPERS[name], seeded(), loss=lambda x_0, weight: x_0.sum())
    expected, theta.grad, velocity = theta.grad, None, SplitVelocity(plain)
    for x_0, weight, _ in METHODS[name](velocity, x_T, times, HYPERS[name], seeded()):
        velocity.backward(x_0, torch.ones_like(x_0), weight)
    assert close(theta.grad, expected)


@pytest.mark.parametrize("make", [SplitVelocity, lambda v: Leash(v, lambda x, t: x, 1.0)], ids=["cut", "leash"])
@pytest.mark.parametrize("K", [2, T])
def test_the_cut_backward_ends_one_evaluation_before_the_next_begins(name, K, make):
    """A joint backward adds to the weights once.  before_last, for HSDP, runs once an endpoint, before the last."""
    (net, x_T, times, _), order, endpoints = problem(), [], 0
    theta = net.leaf()
    theta.register_post_accumulate_grad_hook(lambda _: order.append("gradient"))
    recorder = Recorder(net.velocity(theta))
    velocity = make(recorder)
    for x_0, weight, _ in METHODS[name](velocity, x_T, times, replace(HYPERS[name], K=K, m=1), seeded()):
        velocity.backward(x_0, torch.ones_like(x_0), weight, lambda: order.append("last"))
        endpoints += 1
        assert order[-2:] == ["last", "gradient"] and order.count("last") == endpoints
    assert order.count("gradient") == len(recorder.graph_times())


@pytest.mark.parametrize(
    ("arguments", "rows"),
    [((8, 2, 0, 2), [(0, 2), (2, 4)]), ((8, 2, 1, 2), [(4, 6), (6, 8)]), ((6, 1, 0, 1), [(0, 6)])],
)
def test_the_rows_of_a_rank(arguments, rows):
    assert rows_of_rank(*arguments) == [slice(*ends) for ends in rows]


# The leash's gradient
def leash_formula(net, states, evaluations, weight):
    """R, and its gradient: the mean over a batch of w sum of l |v - v_ref|^2 over (states, timesteps, lengths) a batch.

    The states x (B, *S) at times t are constants; t and the length l are one number, or one a sample.
    """
    reference, total, R = Net(states[0].shape[1:], seed=5), torch.zeros_like(net.theta), 0.0
    for x, t, length in evaluations:
        t, length = (torch.as_tensor(u).expand(B) for u in (t, length))
        for b in range(B):
            dv, _ = jacobians(net, [x], t[b : b + 1], b)
            gap = (net(net.theta, x[b : b + 1], t[b]) - reference(reference.theta, x[b : b + 1], t[b])).flatten()
            total += 2 * weight[b] * length[b] / (B * gap.numel()) * gap @ dv(0)
            R += weight[b] * length[b] * gap.square().mean() / B
    return total, R.item()


def evaluations(name, log, states, times, hyper):
    """(states, time, length) of each differentiated evaluation of a method: where a leap starts, and how long it is."""
    if name == "draft_lv":
        draws, t = seeded(), times[1]
        noises = [torch.randn(states[0].shape, generator=draws) for _ in range(hyper.n)]
        return [(x, t, t) for x in (states[1], *((1 - t) * states[0] + t * noise for noise in noises))]
    if name == "leap_align_per_sample":
        i_k, i_j = log["i_k"], log["i_j"]
        x_k, x_j = (torch.stack([states[i][b] for b, i in enumerate(indices.tolist())]) for indices in (i_k, i_j))
        return [(x_k, times[i_k], times[i_k] - times[i_j]), (x_j, times[i_j], times[i_j])]
    h = times.diff(prepend=times[:1])  # h[i] is the length of step i
    if name == "sparse":
        gamma = 1 + hyper.rho * (1 / sum(h[i] for i in log["timesteps"]) - 1)
        lengths = {i: gamma * h[i] for i in log["timesteps"]}
    elif name in ("drtune", "refl"):
        i_min = log["i_min"]
        trained = [i_min] if name == "refl" else [i for i in (log["s"], log["s"] + T // 2) if i >= i_min]
        lengths = {i: times[i] if i == i_min else h[i] for i in trained}
    elif name == "full_backprop":
        lengths = {i: h[i] for i in range(1, T + 1)}
    else:
        leaps = pairwise([*(log.get("timesteps") or (log["i_k"], log["i_j"])), 0])
        lengths = {a: times[a] - times[b] for a, b in leaps}
    return [(states[i], times[i], length) for i, length in lengths.items()]


def check_leash(name, hyper, net, x_T, times, states, **options):
    without = cut(name, net, x_T, times, hyper, **options)
    theta, figures, weight, log = leashed(name, net, x_T, times, hyper, **options)
    expected, R = leash_formula(net, states, evaluations(name, log, states, times, hyper), weight)
    assert close(theta.grad - without, BETA * expected)
    assert sum(figure["leash"] for figure in figures) == pytest.approx(R, rel=1e-12)


@pytest.mark.parametrize("name", ["leap_align", "leap_align_per_sample"])
def test_the_leash_of_leap_align_is_the_formula(name, shape, shift, alpha):
    check_leash(name, Hyper(lam=None, alpha=alpha), *problem(shape, shift))


METHODS_AND_K = [("refl", 2), ("draft_lv", 2), ("drtune", 2), ("full_backprop", 2), ("sparse", 3)]
METHODS_AND_K += [("stratified", K) for K in (2, 3, T)]


@pytest.mark.parametrize("name, K", METHODS_AND_K)
def test_the_leash_of_a_method_is_the_formula(name, K, seed):
    """R is over the evaluations with gradient; a surrogate's length has its compensation; endpoints add up."""
    check_leash(name, replace(OFF[name], K=K, rho=0.5), *problem(), seed=0 if name == "draft_lv" else seed)


# What the leash leaves alone
def test_at_beta_0_and_at_the_reference_the_leash_changes_no_bit(name):
    net, x_T, times, _ = problem()
    arguments = name, net, x_T, times, HYPERS[name]
    without = cut(*arguments)
    assert torch.equal(leashed(*arguments, beta=0.0)[0].grad, without)
    assert not torch.equal(leashed(*arguments, beta=1.0)[0].grad, without)
    theta, figures, *_ = leashed(*arguments, reference=net, beta=1.0)
    assert torch.equal(theta.grad, without) and figures == [{"leash": 0.0, "v_norm": 1.0}] * len(figures)


# Its scale
def test_a_batch_in_parts_has_the_same_leash():
    net, x_T, times, _ = problem()
    hyper = Hyper(lam=None, m=1)

    def added(x, **options):
        (theta, figures, *_), (without, *_) = (
            leashed("refl", net, x, times, hyper, beta=beta, **options) for beta in (BETA, 0.0)
        )
        return theta.grad - without.grad, figures[0]["leash"]

    whole, R = added(x_T)
    parts = [added(x_T[b : b + 1], microbatches=B) for b in range(B)]
    assert close(sum(gradient for gradient, _ in parts), whole)
    assert sum(part for _, part in parts) / B == pytest.approx(R, rel=1e-12)


def test_v_norm_against_a_hand_calculation():
    """The trained velocity is three times the reference, whose norms are 5 and 13."""
    factor, x_T = torch.tensor(3.0, requires_grad=True), torch.tensor([[3.0, 4.0], [5.0, 12.0]])
    velocity = Leash(lambda x, t: factor * x, lambda x, t: x, 1.0)
    figures, *_ = backward("refl", velocity, x_T, grid(1), Hyper(m=1))
    assert figures == [{"v_norm": pytest.approx(3), "leash": pytest.approx((4 * 25 + 4 * 169) / 4)}]
