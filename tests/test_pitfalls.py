"""Pitfalls of the maths, each seen in another implementation.  A comment names the bug that a test catches.

Those of the methods (draws, evaluations, memory, hinge, weights) are in test_methods.py.
"""

from itertools import combinations

import pytest
import torch

from leap_align import leap_rollout, objective, similarity_weight
from runtime.counters import saved_bytes
from tests.problems import (
    HYPERS,
    METHODS,
    B,
    Net,
    Recorder,
    T,
    all_alphas,
    all_shifts,
    both_forms,
    euler,
    grid,
    problem,
    randn,
    run,
    seeded,
    trajectory,
)

pytestmark = pytest.mark.usefixtures("float64")


# Bug: leap lengths (i_k - i_j) / T, which are right only on an even grid.
@both_forms
@all_shifts
def test_a_leap_of_any_length_is_exact_on_a_straight_flow(form, shift):
    c, x_T, times = torch.tensor([1.0, -2.0, 0.5]), randn(B, 3), grid(T, shift)
    for i_j, i_k in combinations(range(1, T + 1), 2):
        found = trajectory(form, lambda x, t: c.expand_as(x), x_T, times, i_k, i_j, 1)
        assert torch.allclose(found.x_hat_j, x_T - (1 - times[i_j]) * c, rtol=0, atol=1e-14)
        assert torch.allclose(found.x_hat_0, x_T - c, rtol=0, atol=1e-14)


# Bugs: distances after the connector (zero, so every weight is 1 / (2 tau)), over the batch, or clamped as a sum.
@both_forms
def test_distances_are_taken_before_the_connector_for_each_sample(form):
    (net, x_T, times, states), tau = problem(), 0.05
    weight = similarity_weight(trajectory(form, net.velocity(net.leaf()), x_T, times, 5, 2, 0.3), tau)
    x_hat_j = states[5] - (times[5] - times[2]) * net(net.theta, states[5], times[5])
    x_hat_0 = states[2] - times[2] * net(net.theta, states[2], times[2])
    for b in range(B):
        d_j = sum(abs(float(p) - float(q)) for p, q in zip(states[2][b], x_hat_j[b])) / 3
        d_0 = sum(abs(float(p) - float(q)) for p, q in zip(states[0][b], x_hat_0[b])) / 3
        assert d_j > 1e-3 and d_0 > 1e-3
        assert abs(weight[b].item() - 1 / (max(d_j, tau) + max(d_0, tau))) < 1e-10


# Bug: no tau, or one that bounds the sum: the weight of a perfect fit is 1/0, or 1/tau.
def test_the_weight_lies_in_0_to_5_at_tau_0_1():
    net, x_T, times = Net(), randn(1000, 3, seed=1), grid(T, 2.2243)
    weight = similarity_weight(leap_rollout(net.velocity(20 * net.theta), x_T, times, 5, 2, 0.3), 0.1)
    assert (weight > 0).all() and (weight <= 5).all() and weight.min() < 1
    # With the pair (2, 1) both leaps are Euler steps and fit perfectly.
    perfect = similarity_weight(leap_rollout(net.velocity(net.theta), x_T, times, 2, 1, 0.3), 0.1)
    assert torch.allclose(perfect, torch.full((1000,), 5.0), rtol=0, atol=1e-12)


# Bug: alpha also on the skip path x_j, which discounts the first leap; or a nested term that remains at alpha = 0.
@both_forms
@all_alphas
def test_alpha_scales_the_input_of_the_network_but_not_the_skip_path(form, alpha):
    """v = p x with one parameter p for each timestep: only the nested term of p_k contains p_j."""
    x_T, times, i_k, i_j = randn(B, 3), grid(T, 2.2243), 5, 2
    p = torch.linspace(0.5, 2, T + 1).requires_grad_()

    def velocity(x, t):
        return p[times.tolist().index(float(t))] * x

    states = euler(velocity, x_T, times)
    trajectory(form, velocity, x_T, times, i_k, i_j, alpha).x_0.sum().backward()
    k, j = times[i_k], times[i_j]
    skip_path = -(k - j) * states[i_k].sum()
    nested = alpha * j * (k - j) * p[i_j] * states[i_k].sum()
    assert abs(nested) > 0.01 or alpha == 0
    assert torch.allclose(p.grad[i_k], skip_path + nested, rtol=0, atol=1e-13)
    assert torch.allclose(p.grad[i_j], -j * states[i_j].sum(), rtol=0, atol=1e-13)
    assert p.grad.count_nonzero() == 2


# Bug: v_k not detached before the Euler step, so that the states after k carry its graph into later evaluations.
@both_forms
@pytest.mark.parametrize("pair", [(6, 5), (6, 1), (4, 2)], ids=str)
def test_the_graph_of_the_image_contains_two_evaluations(form, pair):
    net, x_T, times, _ = problem()
    theta, passes = net.leaf(), []

    def velocity(x, t):
        v = net(theta, x, t).clone()
        if v.requires_grad:
            v.register_hook(lambda _: passes.append(float(t)))
        return v

    recorder = Recorder(velocity)
    trajectory(form, recorder, x_T, times, *pair, 0.3).x_0.sum().backward()
    assert sorted(passes, reverse=True) == [times[i] for i in pair]
    # The connected x_j is the only input of the network that has a graph, besides the recorded run's.
    assert [t for t, on in zip(recorder.times, recorder.state_has_graph) if on][-1] == times[pair[1]]


def bytes_for_backward(name, steps):
    """Bytes that autograd saves for one training step on a grid with this number of steps."""
    net, x_T, times = Net(), randn(B, 3), grid(steps, 2.2243)
    return saved_bytes(lambda: run(name, net.velocity(net.leaf()), x_T, times, HYPERS[name], seeded()))


# Bug: gradient enabled somewhere in the rollout, so that memory grows with the number of steps.
@pytest.mark.parametrize("name", METHODS)
def test_memory_grows_with_the_number_of_steps_in_full_backprop_alone(name):
    at_10, at_30, at_50 = (bytes_for_backward(name, steps) for steps in (10, 30, 50))
    if name == "full_backprop":
        assert at_50 - at_30 == at_30 - at_10 > at_10
    else:
        grid_bytes = 8 * 40 if name == "stratified" else 0  # torch.utils.checkpoint keeps the grid
        assert 0 < at_10 == at_50 - grid_bytes


# Bug: lambda as a strength.  Above the reward it changes the loss, not the gradient; a squared hinge would fail here.
def test_every_lambda_above_the_reward_gives_the_same_gradient():
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
