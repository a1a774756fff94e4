"""Expected values, made without the code under test: runs, Jacobians, the supplement's equations, frequencies."""

import math

import numpy as np
import pytest
import torch
from torch.func import grad, jacrev

NODES = {1: (0,), 2: (0, 1), 3: (0, 1, 2), 5: (0, 2, 4), 7: (0, 3, 6)}
NODES |= {4: ((0, 2, 3), (0, 1, 3)), 6: ((0, 2, 5), (0, 3, 5))}
"""FlowBP's nodes of a leap over n steps, counted from its start; the first two have gradient.

With two middles it takes that with an even number of steps from the noise: here for a start after an even number, and
after an odd one.
"""


def flowbp_nodes(steps, i_a, i_b):
    """The timesteps of the nodes of the leap from i_a to i_b, of a run of `steps`."""
    offsets = NODES[i_a - i_b]
    return [i_a - n for n in (offsets[(steps - i_a) % 2] if isinstance(offsets[0], tuple) else offsets)]


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


def bumpy(x):
    """A reward (B,) with a gradient that differs everywhere."""
    return (torch.sin(2 * x) - 0.1 * x**2).reshape(len(x), -1).sum(1)


def mean_reward(x_0, weight):
    return -bumpy(x_0).mean()


def weighted_reward(x_0, weight):
    return -(weight * bumpy(x_0)).mean()


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


def reward_gradient(net, states, times, dx_0, weight=None):
    """d(mean of -weight r)/dtheta, given dx_0(b, dv, dv_dx), which is dx_0/dtheta (D, P) of sample b."""
    total, B = torch.zeros_like(net.theta), len(states[0])
    for b in range(B):
        dr = grad(lambda x: bumpy(x).sum())(states[0][b : b + 1]).flatten()
        total -= (1 if weight is None else weight[b]) / B * dr @ dx_0(b, *jacobians(net, states, times, b))
    return total


def assert_frequencies(found, expected):
    """Counts against probabilities: chi-square below its mean plus five standard deviations."""
    n = sum(found.values())
    assert set(found) <= set(expected) and sum(expected.values()) == pytest.approx(1)
    chi_square = sum((found[key] - n * p) ** 2 / (n * p) for key, p in expected.items())
    assert chi_square < len(expected) - 1 + 5 * math.sqrt(2 * (len(expected) - 1))
