"""Small problems and helpers that the tests share.  Expected values are made here, never by the code under test."""

import math

import torch

import beyond
import leap_align
from tests.oracles import RUNS, euler, weighted_reward

METHODS = leap_align.METHODS | beyond.METHODS
HYPERS = {name: beyond.Hyper(m=4, **beyond.DEFAULTS.get(name, {})) for name in METHODS}
T, B = 6, 3
SHIFTS = [1.0, 2.2243, 3.0]
"""Grids: even, FLUX's own at 720 px, SD3's."""


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


def close(found, expected):
    """Equal up to rounding, relative to values that are large where the leaps fit well; and far from zero."""
    error, size = (found - expected).abs().max(), expected.abs().max()
    return size > 1e-2 and error < 1e-12 * max(1, size)
