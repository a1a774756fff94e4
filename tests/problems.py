"""Small problems and helpers that the tests share.  Expected values are made here, never by the code under test."""

import math

import numpy as np
import pytest
import torch
from torch.func import grad, jacrev

import beyond
import leap_align

METHODS = leap_align.METHODS | beyond.METHODS
HYPERS = {name: beyond.Hyper(m=4, **beyond.DEFAULTS.get(name, {})) for name in METHODS}
TOLERANCE = 1e-12
T, B = 6, 3
SHIFTS = [1.0, 2.2243, 3.0]
"""Grids: even, FLUX's own at 720 px, SD3's."""
NODES = {1: (0,), 2: (0, 1), 3: (0, 1, 2), 4: (0, 2, 3), 5: (0, 2, 4), 6: (0, 3, 5), 7: (0, 3, 6)}
"""Lagrange's nodes of a leap over n steps, counted from its start; the first two have gradient."""


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=seeded(seed), dtype=dtype)


def grid(T, shift=1.0, dtype=torch.float64):
    """The printed formula of a shifted grid, with the last entry set to exactly 1."""
    u = torch.arange(T + 1, dtype=dtype) / T
    times = shift * u / (1 + (shift - 1) * u)
    times[T] = 1
    return times


def euler(velocity, x_T, times):
    """States [x_0, ..., x_T] of an Euler run; it neither stops nor enables gradients."""
    states = {len(times) - 1: x_T}
    for i in range(len(times) - 1, 0, -1):
        states[i - 1] = states[i] + (times[i - 1] - times[i]) * velocity(states[i], times[i])
    return [states[i] for i in range(len(times))]


def adams_bashforth(velocity, x_T, times):
    """The same, with steps that integrate the line through the last two velocities; the first step is Euler's."""
    states, v = {len(times) - 1: x_T}, {}
    for i in range(len(times) - 1, 0, -1):
        v[i] = velocity(states[i], times[i])
        w = interpolation_weights(times, [i, i + 1][: len(v)], i, i - 1)
        states[i - 1] = states[i] - sum(w[n] * v[n] for n in w)
    return [states[i] for i in range(len(times))]


def interpolation_weights(times, nodes, i_a, i_b):
    """The integrals from times[i_b] to times[i_a] of numpy's interpolating polynomials: w_i of each node."""
    t, weights = times.numpy(), {}
    for node in nodes:
        polynomial = np.poly1d([1.0])
        for other in nodes:
            if other != node:
                polynomial *= np.poly1d([1, -t[other]]) / (t[node] - t[other])
        weights[node] = polynomial.integ()(t[i_a]) - polynomial.integ()(t[i_b])
    return weights


RUNS = {"euler": euler, "ab2": adams_bashforth}


class Net:
    """A smooth velocity network of any sample shape.  Its parameters are one flat vector, as torch.func expects."""

    def __init__(self, shape=(3,), hidden=4, seed=0):
        size = math.prod(shape)
        self.shapes = [(size + 1, hidden), (hidden, size), (size,)]
        self.theta = 0.7 * randn(sum(map(math.prod, self.shapes)), seed=seed)

    def __call__(self, theta, x, t):
        flat = theta.split([math.prod(shape) for shape in self.shapes])
        into, out, bias = (p.reshape(shape) for p, shape in zip(flat, self.shapes))
        t = torch.as_tensor(t, dtype=x.dtype).expand(len(x))
        hidden = torch.tanh(torch.cat([x.reshape(len(x), -1), t[:, None]], 1) @ into)
        return (hidden @ out + bias).reshape(x.shape)

    def velocity(self, theta):
        return lambda x, t: self(theta, x, t)

    def leaf(self):
        return self.theta.clone().requires_grad_()


def bumpy(x):
    """A reward (B,) with a gradient that differs everywhere."""
    return (torch.sin(2 * x) - 0.1 * x**2).reshape(len(x), -1).sum(1)


class Recorder:
    """A velocity that records each call: the time, and whether the state and the result carry a graph.

    A call that torch.utils.checkpoint makes again ends early, with an exception; its result would carry a graph.
    """

    def __init__(self, velocity):
        self.velocity, self.times, self.state_has_graph, self.has_graph = velocity, [], [], []

    def __call__(self, x, t):
        self.times.append(t)
        self.state_has_graph.append(x.requires_grad)
        self.has_graph.append(True)
        v = self.velocity(x, t)
        self.has_graph[-1] = v.requires_grad
        return v

    def graph_times(self):
        return [t for t, on in zip(self.times, self.has_graph) if on]


def problem(shape=(3,), shift=2.2243, seed=0, steps=T, solver="euler"):
    """A network, noise, a grid and the states of a run, made without the code under test."""
    net, x_T, times = Net(shape), randn(B, *shape, seed=seed + 1), grid(steps, shift)
    return net, x_T, times, RUNS[solver](net.velocity(net.theta), x_T, times)


def trajectory(form, velocity, x_T, times, i_k, i_j, alpha):
    """The leap trajectory, in one pass or from recorded states."""
    if form == "one pass":
        return leap_align.leap_rollout(velocity, x_T, times, i_k, i_j, alpha)
    states = [x.detach() for x in euler(velocity, x_T, times)]
    return leap_align.leap_trajectory(velocity, states, times, i_k, i_j, alpha)


def mean_reward(x_0, weight):
    return -bumpy(x_0).mean()


def weighted_reward(x_0, weight):
    return -(weight * bumpy(x_0)).mean()


def run(name, velocity, x_T, times, hyper, generator, solver="euler", loss=None):
    """A method's endpoints [(x_0, weight), ...] and last log, after the backward of each endpoint's loss, if any."""
    endpoints = []
    for x_0, weight, log in METHODS[name](velocity, x_T, times, hyper, generator, beyond.SOLVERS[solver]()):
        if loss:
            loss(x_0, weight).backward()
        endpoints.append((x_0, weight, log))
    return [(x_0, weight) for x_0, weight, _ in endpoints], endpoints[-1][2]


def gradient(name, net, x_T, times, hyper, seed=0, loss=weighted_reward, solver="euler"):
    """The gradient of a method's losses, summed over its endpoints; and its log."""
    theta = net.leaf()
    _, log = run(name, net.velocity(theta), x_T, times, hyper, seeded(seed), solver, loss)
    return theta.grad, log


def jacobians(net, states, times, b):
    """dv_i/dtheta (D, P) and dv_i/dx_i (D, D) of sample b, functions of i."""
    D = states[0][0].numel()

    def dv(i):
        return jacrev(net, argnums=0)(net.theta, states[i][b : b + 1], times[i]).reshape(D, -1)

    def dv_dx(i):
        return jacrev(net, argnums=1)(net.theta, states[i][b : b + 1], times[i]).reshape(D, D)

    return dv, dv_dx


def eq_s15(times, i_k, i_j, dv):
    """dx_j/dtheta (D, P) of one sample."""
    return -(times[i_k] - times[i_j]) * dv(i_k)


def eq_s18(times, i_k, i_j, alpha, dv, dv_dx):
    """dx_0/dtheta (D, P) of one sample; with alpha = 1 it is Eq. S16."""
    k, j = times[i_k], times[i_j]
    return -j * dv(i_j) - (k - j) * dv(i_k) + alpha * j * (k - j) * dv_dx(i_j) @ dv(i_k)


def reward_gradient(net, states, times, dx_0, weight=(1.0,) * B):
    """d(mean of -weight r)/dtheta, given dx_0(b, dv, dv_dx), which is dx_0/dtheta (D, P) of sample b."""
    total = torch.zeros_like(net.theta)
    for b in range(B):
        dr = grad(lambda x: bumpy(x).sum())(states[0][b : b + 1]).flatten()
        total -= weight[b] / B * dr @ dx_0(b, *jacobians(net, states, times, b))
    return total


def close(found, expected):
    """Equal up to rounding, relative to values that are large where the leaps fit well; and far from zero."""
    error, size = (found - expected).abs().max(), expected.abs().max()
    return size > 1e-2 and error < TOLERANCE * max(1, size)


def assert_frequencies(found, expected):
    """Counts against probabilities: chi-square below its mean plus five standard deviations."""
    n = sum(found.values())
    assert set(found) <= set(expected) and sum(expected.values()) == pytest.approx(1)
    chi_square = sum((found[key] - n * p) ** 2 / (n * p) for key, p in expected.items())
    assert chi_square < len(expected) - 1 + 5 * math.sqrt(2 * (len(expected) - 1))
