"""The proof of the gradient, in four parts.

1. The autograd Jacobian of the leap trajectory equals Eq. S16 and S18, assembled from Jacobians of the velocity.
2. The frozen leap, in which every sg(.) is a number, passes gradcheck and has the leap trajectory's gradient.
3. Every method of Algorithm 1 has its gradient g of the literal Algorithm 1.
4. The leap trajectory itself fails gradcheck by design.
"""

import pytest
import torch
from torch.autograd import gradcheck
from torch.autograd.functional import jacobian

from leap_align import Hyper, leap_trajectory, objective
from tests.algorithm1 import algorithm1
from tests.oracles import RUNS, bumpy, eq_s15, eq_s18, euler, jacobians, mean_reward, reward_gradient
from tests.problems import B, T, close, gradient, problem, seeded, trajectory

pytestmark = pytest.mark.usefixtures("float64")

PAIRS = [(6, 5), (6, 1), (4, 2), (2, 1)]
NO_TAU = 1e-300
PAIR_A_SAMPLE = (torch.tensor([6, 4, 2]), torch.tensor([1, 3, 1]))
all_pairs = pytest.mark.parametrize("pair", [*PAIRS, PAIR_A_SAMPLE], ids=str)


def of_sample(pair, b):
    return [int(torch.as_tensor(i).expand(B)[b]) for i in pair]


def check_jacobian(field, expected, net, x_T, times, pair, alpha):
    """A field of the leap trajectory, differentiated by autograd, against expected(b, dv, dv_dx) of each sample."""
    states = euler(net.velocity(net.theta), x_T, times)
    rows = torch.stack([expected(b, *jacobians(net, states, times, b)) for b in range(B)])
    for form in ("two passes",) if torch.is_tensor(pair[0]) else ("one pass", "two passes"):
        arguments = x_T, times, *pair, alpha
        found = jacobian(lambda p, f=form, a=arguments: getattr(trajectory(f, net.velocity(p), *a), field), net.theta)
        assert close(found.reshape(rows.shape), rows)


# Part 1: the Jacobian
@all_pairs
def test_jacobian_is_eq_s18_and_s16_at_alpha_1(shape, shift, pair, alpha):
    net, x_T, times, _ = problem(shape, shift)

    def expected(b, dv, dv_dx):
        return eq_s18(times, *of_sample(pair, b), alpha, dv, dv_dx)

    check_jacobian("x_0", expected, net, x_T, times, pair, alpha)


@all_pairs
def test_jacobian_of_the_connected_x_j_is_eq_s15(shift, pair):
    net, x_T, times, _ = problem((3,), shift)
    check_jacobian("x_j", lambda b, dv, _: eq_s15(times, *of_sample(pair, b), dv), net, x_T, times, pair, 0.3)


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_jacobian_of_the_nested_only_variant_is_the_supplements_eq_1(shape, shift, pair, alpha):
    from toy.laboratory.variants import nested_trajectory

    net, _, times, states = problem(shape, shift)
    found = jacobian(lambda p: nested_trajectory(net.velocity(p), states, times, *pair, alpha).x_0, net.theta)
    for b in range(B):
        dv, dv_dx = jacobians(net, states, times, b)
        without_the_first_leap = eq_s18(times, *pair, alpha, dv, dv_dx) - eq_s15(times, *pair, dv)
        assert close(found[b].reshape(without_the_first_leap.shape), without_the_first_leap)


# Part 2: the frozen leap
@pytest.mark.parametrize("pair", PAIRS, ids=str)
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
    assert close(found, jacobian(frozen, net.theta))


# Part 3: Algorithm 1, which has neither hinge nor tau: the hinge is off, and tau is too small to matter
def literal(name, net, x_T, times, **draws):
    """The gradient g of the literal Algorithm 1 for these draws."""
    theta = net.leaf()
    return algorithm1(name, net.velocity(theta), [theta], bumpy, x_T, times, **draws)[0]


def check_algorithm_1(name, shape, shift, seed, hyper, draws_of_the_log):
    """A method's gradient is g, for what its log says that it drew; each shift has seeds of its own."""
    net, x_T, times, _ = problem(shape, shift, seed)
    found, log = gradient(name, net, x_T, times, hyper, seed + int(10 * shift))
    assert close(found, literal(name, net, x_T, times, **draws_of_the_log(log)))


def test_refl_is_algorithm_1(seed, shape, shift):
    check_algorithm_1("refl", shape, shift, seed, Hyper(m=4), lambda log: {"t_min": log["i_min"]})


def test_draft_lv_is_algorithm_1(seed, shape, shift):
    draws = seeded(seed + int(10 * shift))
    epsilons = [torch.randn(B, *shape, generator=draws) for _ in range(2)]
    check_algorithm_1("draft_lv", shape, shift, seed, Hyper(n=2), lambda log: {"epsilons": epsilons})


@pytest.mark.parametrize("K", [1, 2, 3, T])
def test_drtune_is_algorithm_1(seed, shape, shift, K):
    hyper = Hyper(K=K, m=1 + (K - 1) * (T // K))
    check_algorithm_1("drtune", shape, shift, seed, hyper, lambda log: {"t_min": log["i_min"], "s": log["s"], "K": K})


@pytest.mark.parametrize("pair", [(i_k, i_j) for i_k in range(3, T + 1) for i_j in range(1, i_k)], ids=str)
def test_leap_align_is_algorithm_1(shape, shift, alpha, pair, monkeypatch):
    """Not the pair (2, 1), whose leaps are both Euler steps: without tau, g divides by zero there."""
    monkeypatch.setattr("leap_align.sample_pair", lambda *_: pair)
    draws = {"t_k": pair[0], "t_j": pair[1], "alpha": alpha}
    check_algorithm_1("leap_align", shape, shift, sum(pair), Hyper(tau=NO_TAU, alpha=alpha), lambda log: draws)


def test_leap_align_with_a_pair_a_sample_is_algorithm_1_on_each_sample_alone(seed, shift):
    net, x_T, times, _ = problem((3,), shift, seed)
    found, log = gradient("leap_align_per_sample", net, x_T, times, Hyper(tau=NO_TAU, low=2), seed + int(10 * shift))
    alone = [
        literal("leap_align", net, x_T[b : b + 1], times, t_k=int(i_k), t_j=int(i_j), alpha=0.3)
        for b, (i_k, i_j) in enumerate(zip(log["i_k"], log["i_j"]))
    ]
    assert close(found, sum(alone) / B)


@pytest.mark.parametrize(
    "name, solver", [("full_backprop", "euler"), ("full_backprop", "ab2"), ("stratified", "euler")]
)
def test_full_backprop_and_a_leap_a_step_have_the_gradient_of_the_run(name, solver, shape, shift):
    net, x_T, times, _ = problem(shape, shift)
    found, _ = gradient(name, net, x_T, times, Hyper(K=T, alpha=1), loss=mean_reward, solver=solver)
    theta = net.leaf()
    mean_reward(RUNS[solver](net.velocity(theta), x_T, times)[0], None).backward()
    assert close(found, theta.grad)


# Part 4: gradcheck of the leap trajectory
def test_gradcheck_of_the_leap_trajectory_fails_by_design():
    """Its value is the real image for every theta: the numerical Jacobian is zero, the analytical one is Eq. S18."""
    net, _, times, states = problem()

    def x_0(theta):
        return leap_trajectory(net.velocity(theta), states, times, 4, 2, 1).x_0

    assert torch.equal(x_0(net.theta), x_0(net.theta + 0.1))
    assert jacobian(x_0, net.theta).abs().max() > 0.1
    assert not gradcheck(x_0, net.leaf(), raise_exception=False)


# The objective
def test_objective_scales_each_samples_gradient_by_its_weight_where_the_hinge_is_active(alpha):
    net, _, times, states = problem()
    weight, theta = torch.tensor([0.5, 2.0, 3.0]), net.leaf()
    x_0 = leap_trajectory(net.velocity(theta), states, times, 5, 2, alpha).x_0
    reward = bumpy(x_0).detach()
    lam = reward.sort().values[:2].mean().item()  # one sample below, two above
    objective(bumpy(x_0), weight, lam).backward()
    active = weight * (bumpy(states[0]) < lam)
    expected = reward_gradient(net, states, times, lambda b, *dv: eq_s18(times, 5, 2, alpha, *dv), active)
    assert close(theta.grad, expected)
