"""beyond.py: each method's gradient against its formula, assembled from the model's own Jacobians; the solver; draws.

FlowBP's formulas are sums over evaluations, so a problem's expected value is made of dv_i/dtheta and dv_j/dx_j of each
sample alone, of an Euler run made here, and of weights computed here.
"""

import math
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
import torch
from torch.func import jacrev

import beyond
import leap_align
from beyond import (
    AdamsBashforth2,
    Hyper,
    lagrange_piece,
    lagrange_weights,
    late_draw,
    sample_strata,
    sample_thirds,
    sum_piece,
    surrogate,
)
from leap_align import BadInput, BatchGenerator, CutVelocity, cut, objective, rollout, uniform_times
from runtime.counters import saved_bytes
from tests.problems import SHIFTS, Net, Recorder, bumpy, euler, grid, randn, seeded

pytestmark = pytest.mark.usefixtures("float64")

TOLERANCE = 1e-12
T, B = 8, 3
HYPERS = {name: Hyper(lam=None, **values) for name, values in beyond.DEFAULTS.items()}
all_methods = pytest.mark.parametrize("name", beyond.METHODS)
all_shifts = pytest.mark.parametrize("shift", SHIFTS)
all_alphas = pytest.mark.parametrize("alpha", [0, 0.3, 1])
all_shapes = pytest.mark.parametrize("shape", [(3,), (2, 2, 2)], ids=str)
many_seeds = pytest.mark.parametrize("seed", range(6))


def problem(shape=(3,), shift=2.2243, seed=0, steps=T):
    """A network, noise, a grid and the states of an Euler run, made without the code under test."""
    net, x_T, times = Net(shape), randn(B, *shape, seed=seed + 1), grid(steps, shift)
    return net, x_T, times, euler(net.velocity(net.theta), x_T, times)


def finished(name, velocity, x_T, times, hyper, seed=0, loss=lambda x_0, weight: x_0.sum()):
    """A method's endpoints and log after one backward of each endpoint, as its contract asks."""
    endpoints, pairs = beyond.METHODS[name](velocity, x_T, times, hyper, seeded(seed)), []
    for x_0, weight in endpoints:
        loss(x_0, weight).backward()
        pairs.append((x_0, weight))
    return pairs, endpoints.log


def gradient(name, net, x_T, times, hyper, seed=0):
    """A method's gradient of the mean of -r; and its log.  The weight is left out: its own test is below."""
    theta = net.leaf()
    _, log = finished(name, net.velocity(theta), x_T, times, hyper, seed, lambda x_0, _: -bumpy(x_0).mean())
    return theta.grad, log


def jacobians(net, states, times, b):
    """dv_i/dtheta (D, P) and dv_i/dx_i (D, D) of sample b, functions of i."""
    D = states[0][0].numel()

    def dv(i):
        return jacrev(net, argnums=0)(net.theta, states[i][b : b + 1], times[i]).reshape(D, -1)

    def dv_dx(i):
        return jacrev(net, argnums=1)(net.theta, states[i][b : b + 1], times[i]).reshape(D, D)

    return dv, dv_dx


def expected_gradient(net, states, times, dx_0):
    """d(mean -r)/dtheta from dx_0(dv, dv_dx), which gives dx_0/dtheta (D, P) of a sample."""
    total = torch.zeros_like(net.theta)
    for b in range(B):
        dr = torch.func.grad(lambda x: bumpy(x).sum())(states[0][b : b + 1]).flatten()
        total -= dr @ dx_0(*jacobians(net, states, times, b)) / B
    return total


def close(found, expected):
    return expected.abs().max() > 1e-2 and (found - expected).abs().max() < TOLERANCE


# The gradients


@many_seeds
@all_shapes
@all_shifts
@pytest.mark.parametrize("K, rho", [(1, 0), (3, 1), (3, 0.4), (T, 1)])
def test_the_gradient_of_sparse_is_flowbps_formula(seed, shape, shift, K, rho):
    net, x_T, times, states = problem(shape, shift, seed)
    found, log = gradient("sparse", net, x_T, times, Hyper(K=K, rho=rho), seed)
    h, active = times.diff(), log["timesteps"]  # h[i - 1] is the length of step i
    gamma = 1 + rho * (1 / sum(h[i - 1] for i in active) - 1)  # all steps together have length 1
    expected = expected_gradient(
        net, states, times, lambda dv, _: -gamma * sum(h[i - 1] * dv(i) for i in active)
    )
    assert len(active) == len(set(active)) == K and close(found, expected)


@many_seeds
@all_shapes
@all_shifts
@all_alphas
@pytest.mark.parametrize("K, rho", [(2, 0), (5, 1), (5, 0.4)])
def test_the_gradient_of_bridge_is_flowbps_formula(seed, shape, shift, alpha, K, rho):
    net, x_T, times, states = problem(shape, shift, seed)
    found, log = gradient("bridge", net, x_T, times, Hyper(K=K, rho=rho, alpha=alpha), seed)
    h, j, active = times.diff(), log["i_j"], log["timesteps"]
    before, after = [i for i in active if i > j], [i for i in active if i <= j]
    gamma_j = 1 + rho * ((1 - times[j]) / sum(h[i - 1] for i in before) - 1)
    gamma_0 = 1 + rho * (times[j] / sum(h[i - 1] for i in after) - 1)

    def dx_0(dv, dv_dx):
        s_j, s_0 = (sum(h[i - 1] * dv(i) for i in part) for part in (before, after))
        return -gamma_j * s_j - gamma_0 * s_0 + alpha * gamma_j * gamma_0 * h[j - 1] * dv_dx(j) @ s_j

    assert j in after and before and close(found, expected_gradient(net, states, times, dx_0))


def interpolation_weights(times, nodes, i_a, i_b):
    """The integrals over a leap of numpy's interpolating polynomials: w_i of each node."""
    t, weights = times.numpy(), {}
    for node in nodes:
        polynomial = np.poly1d([1.0])
        for other in nodes:
            if other != node:
                polynomial *= np.poly1d([1, -t[other]]) / (t[node] - t[other])
        weights[node] = polynomial.integ()(t[i_a]) - polynomial.integ()(t[i_b])
    return weights


NODES = {1: (0,), 2: (0, 1), 3: (0, 1, 2), 4: (0, 2, 3), 5: (0, 2, 4), 6: (0, 3, 5), 7: (0, 3, 6)}
"""Nodes of a leap over n steps, counted from its start."""


@many_seeds
@all_shapes
@all_shifts
@all_alphas
@pytest.mark.parametrize("rho, beta", [(0, 0.25), (0.5, 0.25), (1, 0), (0.5, 1)])
def test_the_gradient_of_lagrange_is_flowbps_formula(seed, shape, shift, alpha, rho, beta):
    net, x_T, times, states = problem(shape, shift, seed)
    hyper = Hyper(rho=rho, node_discount=beta, alpha=alpha)
    found, log = gradient("lagrange", net, x_T, times, hyper, seed)
    k, j = log["i_k"], log["i_j"]
    leaps = []
    for i_a, i_b in ((k, j), (j, 0)):
        nodes = [i_a - n for n in NODES[i_a - i_b]]
        w = interpolation_weights(times, nodes, i_a, i_b)
        gamma = 1 + rho * (sum(map(abs, w.values())) / sum(abs(w[i]) for i in nodes[:2]) - 1)
        leaps.append((gamma, w, nodes))

    def dx_0(dv, dv_dx):
        g_j, g_0 = (
            -gamma * (w[nodes[0]] * dv(nodes[0]) + sum(beta * w[m] * dv(m) for m in nodes[1:2]))
            for gamma, w, nodes in leaps
        )
        gamma_0, w_0, _ = leaps[1]
        return g_j + g_0 - alpha * gamma_0 * w_0[j] * dv_dx(j) @ g_j

    assert close(found, expected_gradient(net, states, times, dx_0))


@many_seeds
@all_shapes
@all_shifts
@all_alphas
@pytest.mark.parametrize("K", [1, 2, 3, 4, T])
def test_the_gradient_of_stratified_is_a_product_over_its_leaps(seed, shape, shift, alpha, K):
    """dx_{n+1} = (1 - alpha length dv_n/dx) dx_n - length dv_n/dtheta, from dx = 0 at the first leap."""
    net, x_T, times, states = problem(shape, shift, seed)
    found, log = gradient("stratified", net, x_T, times, Hyper(K=K, alpha=alpha), seed)
    indices = [*log["timesteps"], 0]

    def dx_0(dv, dv_dx):
        dx = 0
        for i, i_next in zip(indices, indices[1:]):
            length = times[i] - times[i_next]
            dx = dx - alpha * length * dv_dx(i) @ dx - length * dv(i) if i != indices[0] else -length * dv(i)
        return dx

    assert close(found, expected_gradient(net, states, times, dx_0))


@all_shapes
@all_shifts
def test_stratified_with_a_leap_a_step_is_the_exact_gradient(shape, shift):
    net, x_T, times, _ = problem(shape, shift)
    found, _ = gradient("stratified", net, x_T, times, Hyper(K=T, alpha=1))
    expected = jacrev(lambda theta: -bumpy(euler(net.velocity(theta), x_T, times)[0]).mean())(net.theta)
    assert close(found, expected)


@all_shifts
@all_alphas
def test_stratified_with_two_leaps_is_leap_align_at_the_same_pair(shift, alpha):
    net, x_T, times, states = problem((3,), shift)
    theta = net.leaf()
    hyper = Hyper(K=2, alpha=alpha)
    [(x_0, weight)], log = finished("stratified", net.velocity(theta), x_T, times, hyper, 3)
    pair, other = log["timesteps"], net.leaf()
    leaps = leap_align.leap_trajectory(net.velocity(other), states, times, *pair, alpha)
    leaps.x_0.sum().backward()
    assert torch.allclose(theta.grad, other.grad, rtol=0, atol=TOLERANCE)
    assert torch.allclose(weight, leap_align.similarity_weight(leaps, hyper.tau), rtol=TOLERANCE)
    assert torch.allclose(x_0, leaps.x_0, rtol=0, atol=TOLERANCE)


# The trainer's backward


@all_methods
@all_alphas
@pytest.mark.parametrize("solver", beyond.SOLVERS)
def test_the_cut_backward_has_the_gradient_of_the_joint_one(name, alpha, solver):
    net, x_T, times, _ = problem()
    hyper = Hyper(K=4, alpha=alpha, solver=solver)
    expected, _ = gradient(name, net, x_T, times, hyper)
    theta = net.leaf()
    velocity = CutVelocity(net.velocity(theta))
    for x_0, _ in beyond.METHODS[name](velocity, x_T, times, hyper, seeded()):
        image = cut(x_0)
        (-bumpy(image).mean()).backward()
        velocity.backward(x_0, image.grad)
    assert close(theta.grad, expected)


@pytest.mark.parametrize("wrap", [lambda velocity: velocity, CutVelocity], ids=["joint", "cut"])
def test_stratified_saves_one_evaluation_for_any_number_of_leaps(wrap):
    """saved_bytes keeps what was saved alive, so each leap is measured on its own, from pause to pause."""

    def most_bytes(K):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(3, 64), torch.nn.Tanh(), torch.nn.Linear(64, 3))
        saved = []

        def velocity(x, t):
            out = []
            saved.append(saved_bytes(lambda: out.append(net(x)), net))
            return out[0]

        velocity = wrap(velocity)
        for x_0, _ in beyond.stratified(velocity, randn(5, 3), grid(16), Hyper(K=K), seeded()):
            image = cut(x_0)
            image.sum().backward()
            velocity.backward(x_0, image.grad) if isinstance(velocity, CutVelocity) else x_0.backward(image.grad)
        return saved

    assert most_bytes(2)


# Values


@all_methods
@all_shapes
@pytest.mark.parametrize("solver", beyond.SOLVERS)
def test_the_endpoint_is_the_solvers_image(name, shape, solver):
    net, x_T, times, _ = problem(shape)
    hyper = Hyper(K=4, solver=solver)
    [(x_0, weight)], _ = finished(name, net.velocity(net.leaf()), x_T, times, hyper)
    expected = rollout(net.velocity(net.theta), x_T, times, 0, hyper.step())[0]
    assert torch.equal(x_0, expected) and x_0.requires_grad
    assert weight.shape == (B,) and not weight.requires_grad
