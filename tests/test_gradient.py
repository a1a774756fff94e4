"""The proof of the gradient, in four parts, and of its backward cut at the model's outputs.

1. The autograd Jacobian of the leap trajectory equals Eq. S16 and S18, assembled from Jacobians of the velocity.
2. The frozen leap, in which every sg(.) is a number, passes gradcheck and has the leap trajectory's gradient.
3. Every method has the gradient g of the literal Algorithm 1.
4. The leap trajectory itself fails gradcheck by design.
"""

import pytest
import torch
from torch.autograd import gradcheck
from torch.autograd.functional import jacobian
from torch.func import jacrev

from leap_align import METHODS, CutVelocity, Hyper, cut, leap_rollout, leap_trajectory, objective
from tests.algorithm1 import algorithm1
from tests.problems import SHIFTS, Net, Recorder, bumpy, euler, grid, randn, run, seeded
from toy.laboratory.variants import nested_trajectory

pytestmark = pytest.mark.usefixtures("float64")

TOLERANCE = 1e-12
T, B = 6, 3
PAIRS = [(6, 5), (6, 1), (4, 2), (2, 1)]
PAIR_A_SAMPLE = (torch.tensor([6, 4, 2]), torch.tensor([1, 3, 1]))
ALPHAS = [0, 0.3, 1]
all_alphas = pytest.mark.parametrize("alpha", ALPHAS)
all_shifts = pytest.mark.parametrize("shift", SHIFTS)
all_pairs = pytest.mark.parametrize("pair", PAIRS, ids=str)
all_shapes = pytest.mark.parametrize("shape", [(3,), (2, 2, 2)], ids=str)


def problem(shape, shift, seed=0):
    """A network, noise, a grid and the states of an Euler run, made without the code under test."""
    net, x_T, times = Net(shape), randn(B, *shape, seed=seed + 1), grid(T, shift)
    return net, x_T, times, euler(net.velocity(net.theta), x_T, times)


def eq_s18(net, states, times, i_k, i_j, alpha):
    """dx_0/dtheta (D, P) of one sample by Eq. S18; with alpha = 1 it is Eq. S16."""
    x_k, x_j, k, j = states[i_k], states[i_j], times[i_k], times[i_j]
    D = x_k.numel()
    dv_k = jacrev(net, argnums=0)(net.theta, x_k, k).reshape(D, -1)
    dv_j = jacrev(net, argnums=0)(net.theta, x_j, j).reshape(D, -1)
    dv_dx = jacrev(net, argnums=1)(net.theta, x_j, j).reshape(D, D)
    return -j * dv_j - (k - j) * dv_k + alpha * j * (k - j) * dv_dx @ dv_k


def eq_s15(net, states, times, i_k, i_j):
    """dx_j/dtheta (D, P) of one sample."""
    dv_k = jacrev(net, argnums=0)(net.theta, states[i_k], times[i_k])
    return -(times[i_k] - times[i_j]) * dv_k.reshape(states[i_k].numel(), -1)


def sample_of(states, b):
    return [x[b : b + 1] for x in states]


def error(found, expected):
    return (found - expected).abs().max().item()


def relative_error(found, expected):
    """For gradients scaled by the weight, which is large where the leaps fit well."""
    return error(found, expected) / expected.abs().max().clamp(min=1).item()


# Part 1: the Jacobian


@all_shapes
@all_shifts
@all_pairs
@all_alphas
def test_jacobian_is_eq_s18_and_s16_at_alpha_1(shape, shift, pair, alpha):
    net, x_T, times, states = problem(shape, shift)
    expected = torch.stack([eq_s18(net, sample_of(states, b), times, *pair, alpha) for b in range(B)])
    two_pass = jacobian(lambda p: leap_trajectory(net.velocity(p), states, times, *pair, alpha).x_0, net.theta)
    one_pass = jacobian(lambda p: leap_rollout(net.velocity(p), x_T, times, *pair, alpha).x_0, net.theta)
    assert expected.abs().max() > 0.1
    assert error(two_pass.reshape(expected.shape), expected) < TOLERANCE
    assert error(one_pass.reshape(expected.shape), expected) < TOLERANCE


@all_shapes
@all_shifts
@all_alphas
def test_jacobian_is_eq_s18_with_a_pair_a_sample(shape, shift, alpha):
    net, _, times, states = problem(shape, shift)
    i_k, i_j = PAIR_A_SAMPLE
    expected = torch.stack(
        [eq_s18(net, sample_of(states, b), times, int(i_k[b]), int(i_j[b]), alpha) for b in range(B)]
    )
    found = jacobian(lambda p: leap_trajectory(net.velocity(p), states, times, i_k, i_j, alpha).x_0, net.theta)
    assert error(found.reshape(expected.shape), expected) < TOLERANCE


@all_shifts
@all_pairs
def test_jacobian_of_the_connected_x_j_is_eq_s15(shift, pair):
    net, x_T, times, states = problem((3,), shift)
    expected = torch.stack([eq_s15(net, sample_of(states, b), times, *pair) for b in range(B)])
    two_pass = jacobian(lambda p: leap_trajectory(net.velocity(p), states, times, *pair, 0.3).x_j, net.theta)
    one_pass = jacobian(lambda p: leap_rollout(net.velocity(p), x_T, times, *pair, 0.3).x_j, net.theta)
    assert error(two_pass, expected) < TOLERANCE
    assert error(one_pass, expected) < TOLERANCE


@all_shapes
@all_shifts
@all_pairs
@all_alphas
def test_jacobian_of_the_nested_only_variant_is_the_supplements_eq_1(shape, shift, pair, alpha):
    net, _, times, states = problem(shape, shift)
    without_the_first_leap = torch.stack(
        [
            eq_s18(net, sample_of(states, b), times, *pair, alpha) - eq_s15(net, sample_of(states, b), times, *pair)
            for b in range(B)
        ]
    )
    found = jacobian(lambda p: nested_trajectory(net.velocity(p), states, times, *pair, alpha).x_0, net.theta)
    assert error(found.reshape(without_the_first_leap.shape), without_the_first_leap) < TOLERANCE


# Part 2: the frozen leap


@all_shifts
@all_pairs
@all_alphas
def test_frozen_leap_passes_gradcheck(shift, pair, alpha):
    net, _, times, states = problem((3,), shift)
    (i_k, i_j), x_k, x_j, x_0 = pair, states[pair[0]], states[pair[1]], states[0]
    k, j = times[i_k], times[i_j]
    # The gaps under sg(.), as numbers
    gap_j = x_j - (x_k - (k - j) * net(net.theta, x_k, k))
    gap_0 = x_0 - (x_j - j * net(net.theta, x_j, j))

    def frozen(theta):
        joined_j = x_k - (k - j) * net(theta, x_k, k) + gap_j
        return joined_j - j * net(theta, alpha * joined_j + (1 - alpha) * x_j, j) + gap_0

    assert gradcheck(frozen, net.leaf())
    found = jacobian(lambda p: leap_trajectory(net.velocity(p), states, times, i_k, i_j, alpha).x_0, net.theta)
    assert error(found, jacobian(frozen, net.theta)) < TOLERANCE


# Part 3: Algorithm 1


def gradient(name, net, x_T, times, hyper, seed):
    """A method's gradient of the mean of -w r, summed over its endpoints; and its log."""
    theta = net.leaf()
    endpoints, drawn = run(name, net.velocity(theta), x_T, times, hyper, seeded(seed))
    for x_0, weight in endpoints:
        objective(bumpy(x_0), weight, hyper.lam).backward()
    return theta.grad, drawn


def literal(name, net, x_T, times, **draws):
    """The gradient g of the literal Algorithm 1 for these draws."""
    theta = net.leaf()
    return algorithm1(name, net.velocity(theta), [theta], bumpy, x_T, times, **draws)[0]


# Algorithm 1 has neither hinge nor tau: the hinge is off, and tau is too small to matter.
NO_TAU = 1e-300
HYPER = Hyper(lam=None, m=4, K=2, n=2)
many_seeds = pytest.mark.parametrize("seed", range(8))


@many_seeds
@all_shapes
@all_shifts
def test_refl_is_algorithm_1(seed, shape, shift):
    net, x_T, times, _ = problem(shape, shift, seed)
    found, drawn = gradient("refl", net, x_T, times, HYPER, seed)
    assert error(found, literal("refl", net, x_T, times, t_min=drawn["i_min"])) < TOLERANCE


@many_seeds
@all_shapes
@all_shifts
def test_draft_lv_is_algorithm_1(seed, shape, shift):
    net, x_T, times, _ = problem(shape, shift, seed)
    found, _ = gradient("draft_lv", net, x_T, times, HYPER, seed)
    draws = seeded(seed)
    epsilons = [torch.randn(x_T.shape, generator=draws) for _ in range(HYPER.n)]
    assert error(found, literal("draft_lv", net, x_T, times, epsilons=epsilons)) < TOLERANCE


@many_seeds
@all_shapes
@all_shifts
@pytest.mark.parametrize("K", [1, 2, 3, T])
def test_drtune_is_algorithm_1(seed, shape, shift, K):
    net, x_T, times, _ = problem(shape, shift, seed)
    hyper = Hyper(lam=None, K=K, m=1 + (K - 1) * (T // K))
    found, drawn = gradient("drtune", net, x_T, times, hyper, seed)
    expected = literal("drtune", net, x_T, times, t_min=drawn["i_min"], s=drawn["s"], K=K)
    assert error(found, expected) < TOLERANCE


# low = 2 excludes the pair (2, 1), whose leaps are both Euler steps: Algorithm 1, without tau, divides by zero there.


@many_seeds
@all_shapes
@all_shifts
@all_alphas
def test_leap_align_is_algorithm_1(seed, shape, shift, alpha):
    net, x_T, times, _ = problem(shape, shift, seed)
    hyper = Hyper(lam=None, tau=NO_TAU, alpha=alpha, low=2)
    found, drawn = gradient("leap_align", net, x_T, times, hyper, seed)
    expected = literal("leap_align", net, x_T, times, t_k=drawn["i_k"], t_j=drawn["i_j"], alpha=alpha)
    assert relative_error(found, expected) < TOLERANCE


@all_shifts
@all_alphas
@pytest.mark.parametrize("pair", [(i_k, 1) for i_k in range(3, T + 1)], ids=str)
def test_leap_align_is_algorithm_1_where_the_second_leap_is_the_last_step(shift, alpha, pair, monkeypatch):
    monkeypatch.setattr("leap_align.sample_pair", lambda *_: pair)
    net, x_T, times, _ = problem((3,), shift)
    found, _ = gradient("leap_align", net, x_T, times, Hyper(lam=None, tau=NO_TAU, alpha=alpha), 0)
    expected = literal("leap_align", net, x_T, times, t_k=pair[0], t_j=pair[1], alpha=alpha)
    assert relative_error(found, expected) < TOLERANCE


@many_seeds
@all_shifts
def test_leap_align_with_a_pair_a_sample_is_algorithm_1_on_each_sample_alone(seed, shift):
    net, x_T, times, _ = problem((3,), shift, seed)
    hyper = Hyper(lam=None, tau=NO_TAU, alpha=0.3, low=2, pairs="sample")
    found, drawn = gradient("leap_align", net, x_T, times, hyper, seed)
    alone = [
        literal("leap_align", net, x_T[b : b + 1], times, t_k=int(i_k), t_j=int(i_j), alpha=0.3)
        for b, (i_k, i_j) in enumerate(zip(drawn["i_k"], drawn["i_j"]))
    ]
    assert relative_error(found, sum(alone) / B) < TOLERANCE


@all_shapes
@all_shifts
def test_full_backprop_is_the_gradient_of_the_euler_run(shape, shift):
    net, x_T, times, _ = problem(shape, shift)
    found, _ = gradient("full_backprop", net, x_T, times, HYPER, 0)
    expected = jacrev(lambda theta: -bumpy(euler(net.velocity(theta), x_T, times)[0]).mean())(net.theta)
    assert error(found, expected) < TOLERANCE


# The backward cut at every output of the model


CASES = [(name, "batch") for name in METHODS] + [("leap_align", "sample")]


@pytest.mark.parametrize(("name", "pairs"), CASES, ids=str)
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("lam", [None, 1.0])
def test_the_cut_backward_has_the_gradient_of_the_joint_one(name, pairs, alpha, lam):
    net, x_T, times, _ = problem((3,), 2.2243)
    hyper = Hyper(lam=lam, m=4, alpha=alpha, pairs=pairs)
    expected, _ = gradient(name, net, x_T, times, hyper, 0)
    theta = net.leaf()
    velocity = CutVelocity(net.velocity(theta))
    for x_0, weight in METHODS[name](velocity, x_T, times, hyper, seeded(0)):
        image = cut(x_0)
        objective(bumpy(image), weight, lam).backward()
        velocity.backward(x_0, image.grad)
    assert expected.abs().max() > 1e-3
    assert error(theta.grad, expected) < TOLERANCE


@pytest.mark.parametrize("name", METHODS)
def test_the_cut_backward_of_a_velocity_that_ignores_its_state(name):
    theta, x_T, times = torch.tensor(0.7, requires_grad=True), randn(B, 3, seed=1), grid(T)
    plain = lambda x, t: (theta * (1 + t)).expand(B, 3)  # noqa: E731
    found = []
    for velocity in (plain, CutVelocity(plain)):
        theta.grad = None
        for x_0, _ in METHODS[name](velocity, x_T, times, Hyper(m=4), seeded(0)):
            x_0.sum().backward() if velocity is plain else velocity.backward(x_0, torch.ones_like(x_0))
        found.append(theta.grad.item())
    assert found[0] == pytest.approx(found[1], rel=1e-12) and found[0] != 0


@pytest.mark.parametrize(("name", "pairs"), CASES, ids=str)
def test_the_cut_backward_ends_one_evaluation_before_the_next_begins(name, pairs):
    """A joint backward adds to the weights once, with the gradients of all evaluations held until then."""
    net, x_T, times, _ = problem((3,), 2.2243)
    theta, order = net.leaf(), []
    theta.register_post_accumulate_grad_hook(lambda _: order.append("gradient"))
    recorder = Recorder(net.velocity(theta))
    velocity = CutVelocity(recorder)
    for x_0, _ in METHODS[name](velocity, x_T, times, Hyper(m=4, pairs=pairs), seeded(0)):
        assert x_0.requires_grad
        velocity.backward(x_0, torch.ones_like(x_0), before_last=lambda: order.append("last"))
        assert order[-2:] == ["last", "gradient"]
    assert order.count("gradient") == len(recorder.graph_times())


# Part 4: gradcheck of the leap trajectory


def test_gradcheck_of_the_leap_trajectory_fails_by_design():
    """Its value is the real image for every theta: the numerical Jacobian is zero, the analytical one is Eq. S18."""
    net, _, times, states = problem((3,), 2.2243)

    def x_0(theta):
        return leap_trajectory(net.velocity(theta), states, times, 4, 2, 1).x_0

    assert torch.equal(x_0(net.theta), x_0(net.theta + 0.1))
    assert jacobian(x_0, net.theta).abs().max() > 0.1
    assert not gradcheck(x_0, net.leaf(), raise_exception=False)


# The objective


@all_alphas
def test_objective_scales_each_samples_gradient_by_its_weight_where_the_hinge_is_active(alpha):
    net, _, times, states = problem((3,), 2.2243)
    weight, theta = torch.tensor([0.5, 2.0, 3.0]), net.leaf()
    x_0 = leap_trajectory(net.velocity(theta), states, times, 5, 2, alpha).x_0
    reward = bumpy(x_0)
    lam = reward.detach().sort().values[:2].mean().item()  # one sample below, two above
    objective(reward, weight, lam).backward()

    expected = torch.zeros_like(net.theta)
    for b in range(B):
        if bumpy(states[0])[b] < lam:
            dr = torch.func.grad(lambda x: bumpy(x).sum())(states[0][b : b + 1]).flatten()
            expected -= weight[b] / B * dr @ eq_s18(net, sample_of(states, b), times, 5, 2, alpha)
    assert expected.abs().max() > 0.01
    assert error(theta.grad, expected) < TOLERANCE
