"""Small problems and helpers that the tests share.  Expected values are made here, never by leap_align."""

import math

import torch

from leap_align import METHODS

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


def euler(velocity, x_T, times):
    """States [x_0, ..., x_T] of an Euler run; it neither stops nor enables gradients."""
    states = {len(times) - 1: x_T}
    for i in range(len(times) - 1, 0, -1):
        states[i - 1] = states[i] + (times[i - 1] - times[i]) * velocity(states[i], times[i])
    return [states[i] for i in range(len(times))]


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
    return torch.sin(2 * x).flatten(1).sum(1) - 0.1 * (x**2).flatten(1).sum(1)


class Recorder:
    """A velocity that records each call: the time, and whether the state and the result carry a graph."""

    def __init__(self, velocity):
        self.velocity, self.times, self.state_has_graph, self.has_graph = velocity, [], [], []

    def __call__(self, x, t):
        v = self.velocity(x, t)
        self.times.append(t)
        self.state_has_graph.append(x.requires_grad)
        self.has_graph.append(v.requires_grad)
        return v

    def graph_times(self):
        return [t for t, on in zip(self.times, self.has_graph) if on]


def run(name, *arguments):
    """A method's endpoints [(x_0, weight), ...] and its log."""
    endpoints = METHODS[name](*arguments)
    return list(endpoints), endpoints.log
