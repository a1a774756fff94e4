"""Probes: what a method draws, what it costs and how it weighs the timesteps, read off the method itself.

Each runs the method's own code with a velocity made for the question; no model is needed.
"""

from dataclasses import replace

import torch
from torch import Tensor

from leap_align import METHODS, Endpoints, Hyper, uniform_times


def hyper_for(T: int) -> Hyper:
    """The paper's settings without hinge, the early stop within the same share of the run: 11 of 25 steps."""
    return Hyper(lam=None, m=max(1, round(11 * T / 25)))


def finish(method: Endpoints) -> tuple[list[tuple[Tensor, Tensor]], dict]:
    """All endpoints of a method, and what it says that it drew."""
    endpoints = []
    while True:
        try:
            endpoints.append(next(method))
        except StopIteration as end:
            return endpoints, end.value


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draws(name: str, T: int, most: int) -> tuple[list[int], bool]:
    """Seeds, one for each distinct draw of a method's timesteps, and whether those are all draws there are.

    Where more than `most` exist the first `most` seeds as they come; a tenth of them for a method that draws noise
    alone, which scatters little.  A velocity of zeros finds the draws at no cost; ten times as many seeds as there are
    draws, without a new one, end the search.
    """
    found: dict[tuple, int] = {}
    seed = newest = 0
    while seed <= newest + 50 + 10 * len(found):
        method = METHODS[name](lambda x, t: 0 * x, torch.zeros(1, 1), uniform_times(T), hyper_for(T), seeded(seed))
        if not (drawn := tuple(value for value in finish(method)[1].values() if isinstance(value, int))):
            return list(range(max(2, most // 10))), False
        if drawn not in found:
            found[drawn], newest = seed, seed
        if len(found) > most:
            return list(range(most)), False
        seed += 1
    return list(found.values()), True


def effective_weights(name: str, T: int, most: int) -> dict:
    """{"weights": the factors with which a method's endpoint carries dv(x_i)/dtheta, i = 1..T} on average (a cell).

    Measured on the method itself, with a velocity that has a parameter of its own at each timestep, v(x, t_i) =
    theta_i.  The sampling run's own factors are the lengths of its intervals.
    """
    times, theta = uniform_times(T), torch.zeros(T + 1, requires_grad=True)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return theta[int(torch.searchsorted(times, t))].expand_as(x)

    seeds, total = draws(name, T, most)[0], torch.zeros(T + 1)
    for seed in seeds:
        endpoints, _ = finish(METHODS[name](velocity, torch.zeros(1, 1), times, hyper_for(T), seeded(seed)))
        total -= torch.autograd.grad(sum(x_0.sum() for x_0, _ in endpoints), theta)[0]
    return {"weights": (total / len(seeds))[1:].tolist()}


def evaluations(name: str, T: int, most: int, **changes: object) -> dict:
    """{"evaluations": of the velocity, an iteration and sample} on average, differentiated ones as three (a cell)."""
    cost, hyper = 0, replace(hyper_for(T), **changes)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        nonlocal cost
        cost += 3 if torch.is_grad_enabled() else 1
        return 0 * x

    seeds, _ = draws(name, T, most)
    for seed in seeds:
        finish(METHODS[name](velocity, torch.zeros(1, 1), uniform_times(T), hyper, seeded(seed)))
    return {"evaluations": cost / len(seeds)}
