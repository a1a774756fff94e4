"""The eight pitfalls of the maths, each seen in another implementation.  A comment names the bug a test catches."""

from itertools import combinations

import pytest
import torch

from leap_align import METHODS, Hyper, leap_rollout, leap_trajectory, objective, rollout, similarity_weight
from runtime.counters import saved_bytes
from tests.problems import SHIFTS, Net, Recorder, bumpy, euler, grid, randn, run, seeded

pytestmark = pytest.mark.usefixtures("float64")

T, B = 6, 3
all_shifts = pytest.mark.parametrize("shift", SHIFTS)
both_forms = pytest.mark.parametrize("form", ["two passes", "one pass"])


def trajectory_of(form, velocity, x_T, times, i_k, i_j, alpha):
    """The leap trajectory, in one pass or in two."""
    if form == "one pass":
        return leap_rollout(velocity, x_T, times, i_k, i_j, alpha)
    return leap_trajectory(velocity, rollout(velocity, x_T, times), times, i_k, i_j, alpha)


def gradient(name, hyper, lam):
    """Gradient of a method's losses for one lambda; every call has the same draws."""
    net = Net()
    theta = net.leaf()
    endpoints, _ = run(name, net.velocity(theta), randn(B, 3, seed=1), grid(T, 2.2243), hyper, seeded())
    for x_0, weight in endpoints:
        objective(bumpy(x_0), weight, lam).backward()
    return theta.grad


# Bug: j drawn from 0..k-1; at j = 0 the second leap has no length and trains nothing.
@pytest.mark.parametrize("pairs", ["batch", "sample"])
def test_pitfall_1_both_leaps_have_positive_length_for_every_drawn_pair(pairs):
    steps, reached = 4, set()
    net, x_T, times = Net(), randn(B, 3, seed=1), grid(steps, 2.2243)
    for seed in range(60):
        recorder = Recorder(net.velocity(net.leaf()))
        _, drawn = run("leap_align", recorder, x_T, times, Hyper(pairs=pairs), seeded(seed))
        k, j = recorder.graph_times()
        assert (k > j).all() and (j > 0).all()
        i_k, i_j = (torch.as_tensor(drawn[i]).ravel().tolist() for i in ("i_k", "i_j"))
        reached |= set(zip(i_k, i_j))
    assert reached == {(i_k, i_j) for i_j, i_k in combinations(range(1, steps + 1), 2)}


# Bug: leap lengths (i_k - i_j) / T, which are right only on an even grid.
@both_forms
@all_shifts
def test_pitfall_2_a_leap_over_one_interval_is_the_euler_step(form, shift):
    net, x_T, times = Net(), randn(B, 3, seed=1), grid(T, shift)
    states = euler(net.velocity(net.theta), x_T, times)
    for i in range(2, T + 1):
        x_hat_j = trajectory_of(form, net.velocity(net.theta), x_T, times, i, i - 1, 1).x_hat_j
        x_hat_0 = trajectory_of(form, net.velocity(net.theta), x_T, times, i, 1, 1).x_hat_0
        assert torch.allclose(x_hat_j, states[i - 1], rtol=0, atol=1e-14)
        assert torch.allclose(x_hat_0, states[0], rtol=0, atol=1e-14)


# Bug: the same leap lengths, over more than one interval.
@both_forms
@all_shifts
def test_pitfall_2_a_leap_of_any_length_is_exact_on_a_straight_flow(form, shift):
    x_T, times = randn(B, 3), grid(T, shift)
    for i_j, i_k in combinations(range(1, T + 1), 2):
        trajectory = trajectory_of(form, lambda x, t: torch.ones_like(x), x_T, times, i_k, i_j, 1)
        assert torch.allclose(trajectory.x_hat_j, x_T - (1 - times[i_j]), rtol=0, atol=1e-14)
        assert torch.allclose(trajectory.x_hat_0, x_T - 1, rtol=0, atol=1e-14)


# Bugs: distances after the connector (zero, so every weight is 1 / (2 tau)), over the batch, clamped as a sum,
# or with a gradient of their own.
@both_forms
def test_pitfall_3_distances_are_taken_before_the_connector_for_each_sample(form):
    net, x_T, times, tau = Net(), randn(B, 3, seed=1), grid(T, 2.2243), 0.05
    theta = net.leaf()
    trajectory = trajectory_of(form, net.velocity(theta), x_T, times, 5, 2, 0.3)
    states = euler(net.velocity(net.theta), x_T, times)
    x_hat_j = states[5] - (times[5] - times[2]) * net(net.theta, states[5], times[5])
    x_hat_0 = states[2] - times[2] * net(net.theta, states[2], times[2])
    for b in range(B):
        d_j = sum(abs(float(p) - float(q)) for p, q in zip(states[2][b], x_hat_j[b])) / 3
        d_0 = sum(abs(float(p) - float(q)) for p, q in zip(states[0][b], x_hat_0[b])) / 3
        assert d_j > 1e-3 and d_0 > 1e-3
        expected = 1 / (max(d_j, tau) + max(d_0, tau))
        assert abs(similarity_weight(trajectory, tau)[b].item() - expected) < 1e-10
    assert not similarity_weight(trajectory, tau).requires_grad


# Bug: no tau, or one that bounds the sum: the weight of a perfect fit is 1/0, or 1/tau.
def test_pitfall_3_the_weight_lies_in_0_to_5_at_tau_0_1():
    net, x_T, times = Net(), randn(1000, 3, seed=1), grid(T, 2.2243)
    weight = similarity_weight(leap_rollout(net.velocity(20 * net.theta), x_T, times, 5, 2, 0.3), 0.1)
    assert (weight > 0).all() and (weight <= 5).all() and weight.min() < 1
    # With the pair (2, 1) both leaps are Euler steps and fit perfectly.
    perfect = similarity_weight(leap_rollout(net.velocity(net.theta), x_T, times, 2, 1, 0.3), 0.1)
    assert torch.allclose(perfect, torch.full((1000,), 5.0), rtol=0, atol=1e-12)


# Bug: alpha also on the skip path x_j, which discounts the first leap; or a nested term that remains at alpha = 0.
@both_forms
@pytest.mark.parametrize("alpha", [0, 0.3, 1])
def test_pitfall_4_alpha_scales_the_input_of_the_network_but_not_the_skip_path(form, alpha):
    """v = p x with one parameter p for each timestep: only the nested term of p_k contains p_j."""
    x_T, times, i_k, i_j = randn(B, 3), grid(T, 2.2243), 5, 2
    p = torch.linspace(0.5, 2, T + 1).requires_grad_()

    def velocity(x, t):
        return p[times.tolist().index(float(t))] * x

    states = euler(velocity, x_T, times)
    trajectory_of(form, velocity, x_T, times, i_k, i_j, alpha).x_0.sum().backward()
    k, j = times[i_k], times[i_j]
    skip_path = -(k - j) * states[i_k].sum()
    nested = alpha * j * (k - j) * p[i_j] * states[i_k].sum()
    assert abs(nested) > 0.01 or alpha == 0
    assert torch.allclose(p.grad[i_k], skip_path + nested, rtol=0, atol=1e-13)
    assert torch.allclose(p.grad[i_j], -j * states[i_j].sum(), rtol=0, atol=1e-13)
    assert p.grad.count_nonzero() == 2


class CountBackward(torch.autograd.Function):
    """The identity; counts the backward passes through it."""

    passes = 0

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        CountBackward.passes += 1
        return g


# Bug: v_k not detached before the Euler step, so that the states after k carry its graph into later evaluations.
@both_forms
@pytest.mark.parametrize("pair", [(6, 5), (6, 1), (4, 2)], ids=str)
def test_pitfall_5_the_graph_of_the_image_contains_two_evaluations(form, pair):
    net, x_T, times = Net(), randn(B, 3), grid(T, 2.2243)
    theta = net.leaf()
    recorder = Recorder(lambda x, t: CountBackward.apply(net(theta, x, t)))
    trajectory = trajectory_of(form, recorder, x_T, times, *pair, 0.3)
    CountBackward.passes = 0
    trajectory.x_0.sum().backward()
    assert CountBackward.passes == 2
    # The connected x_j is the only input of the network that has a graph.
    assert [t for t, on in zip(recorder.times, recorder.state_has_graph) if on] == [times[pair[1]]]


def bytes_for_backward(name, steps):
    """Bytes that autograd saves for one training step on a grid with this number of steps."""
    net, x_T, times = Net(), randn(B, 3), grid(steps, 2.2243)
    velocity = net.velocity(net.leaf())
    return saved_bytes(lambda: run(name, velocity, x_T, times, Hyper(m=1), seeded()))


# Bug: gradient enabled somewhere in the rollout, so that memory grows with the number of steps.
@pytest.mark.parametrize("name", [name for name in METHODS if name != "full_backprop"])
def test_pitfall_5_memory_does_not_grow_with_the_number_of_steps(name):
    assert 0 < bytes_for_backward(name, 10) == bytes_for_backward(name, 50)


# The measurement above detects growth: full backpropagation saves bytes for every step.
def test_pitfall_5_memory_of_full_backprop_grows_with_every_step():
    at_10, at_30, at_50 = (bytes_for_backward("full_backprop", steps) for steps in (10, 30, 50))
    assert at_50 - at_30 == at_30 - at_10 > at_10


# Bug: ReFL predicts from t_min with the time of the last step, times[1], or evaluates the network at that time.
@all_shifts
def test_pitfall_6_refl_predicts_at_the_time_of_its_early_stop(shift):
    net, x_T, times, stops = Net(), randn(B, 3), grid(T, shift), set()
    states = euler(net.velocity(net.theta), x_T, times)
    for seed in range(20):
        recorder = Recorder(net.velocity(net.leaf()))
        [(x_0, _)], drawn = run("refl", recorder, x_T, times, Hyper(m=4), seeded(seed))
        i = drawn["i_min"]
        assert recorder.graph_times() == [times[i]]
        assert torch.allclose(x_0, states[i] - times[i] * net(net.theta, states[i], times[i]), rtol=0, atol=1e-14)
        stops.add(i)
    assert len(stops) > 2


# Bug: an early stop above every trained timestep, so that the step has no gradient.
@pytest.mark.parametrize("steps, K", [(T, K) for T in range(1, 8) for K in range(1, T + 1)])
def test_pitfall_6_drtune_always_runs_a_trained_timestep(steps, K):
    m, drawn, seed = 1 + (K - 1) * (steps // K), None, 0
    net, x_T, times = Net(hidden=1), randn(1, 3), grid(steps, 3)
    while drawn != {"i_min": m, "s": 1}:  # the tightest draw: only the first of the trained timesteps is run
        [(x_0, _)], drawn = run("drtune", net.velocity(net.leaf()), x_T, times, Hyper(m=m, K=K), seeded(seed))
        assert x_0.requires_grad
        seed += 1
        assert seed < 300, "never drawn"
    with pytest.raises(ValueError, match=f"m={m + 1}"):
        run("drtune", net.velocity(net.theta), x_T, times, Hyper(m=m + 1, K=K), seeded())


# Bug: a hinge in some methods only, or one that cannot be switched off although Algorithm 1 has none.
@pytest.mark.parametrize("name", METHODS)
def test_pitfall_7_the_hinge_is_one_switch_for_all_methods(name):
    without = gradient(name, Hyper(m=4), lam=None)
    assert without.abs().max() > 1e-3
    assert torch.equal(gradient(name, Hyper(m=4), lam=100), without)
    assert torch.equal(gradient(name, Hyper(m=4), lam=-100), torch.zeros_like(without))


# Bug: tau in the weights of methods that have no similarity weight, or no tau in LeapAlign's weight.
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("tau", [0.1, 1e9])
def test_pitfall_7_tau_affects_only_leap_align(name, tau):
    net, x_T, times = Net(), randn(B, 3), grid(T)
    endpoints, _ = run(name, net.velocity(net.theta), x_T, times, Hyper(m=4, tau=tau), seeded())
    expected = torch.ones(B) / (2 * tau)
    for _, weight in endpoints:
        if name == "leap_align":
            assert (weight <= expected).all() and (tau == 0.1 or torch.allclose(weight, expected))
        else:
            assert torch.equal(weight, torch.ones(B))


# Bug: lambda as a strength.  Above the reward it changes the loss, not the gradient; a squared hinge would fail here.
def test_pitfall_8_every_lambda_above_the_reward_gives_the_same_gradient():
    reward, weight = torch.tensor([-0.5, 0.1, 0.3]), torch.tensor([0.5, 2.0, 5.0])

    def loss_and_gradient(lam):
        r = reward.clone().requires_grad_()
        loss = objective(r, weight, lam)
        loss.backward()
        return loss.item(), r.grad

    losses, gradients = zip(*(loss_and_gradient(lam) for lam in (0.31, 0.55, 10, 1e6)))
    assert torch.allclose(gradients[0], -weight / 3, rtol=0, atol=1e-15)
    assert all(torch.equal(g, gradients[0]) for g in gradients)
    assert sorted(set(losses)) == list(losses)
