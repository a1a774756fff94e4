"""What a method draws, the weights of its timesteps, and its evaluations, measured by running it without a model."""

from dataclasses import replace

import torch
from torch import Tensor

from beyond import DEFAULTS, Hyper
from leap_align import Velocity, uniform_times
from runtime.backward import SplitVelocity
from train_leap_align import METHODS


def hyper_for(T: int, method: str = "leap_align") -> Hyper:
    """A method's own hyperparameters without hinge; the early stop within the paper's share of the steps, 11 of 25."""
    return Hyper(**{"lam": None, "m": max(1, round(11 * T / 25)), **DEFAULTS.get(method, {})})


def run_method(v: Velocity, method: str, T: int, seed: int, **changes: object) -> list[dict]:
    """The logs of a method's endpoints on one sample, each after a backward of their sum, run as by the trainer."""
    velocity, hyper, logs = SplitVelocity(v), replace(hyper_for(T, method), **changes), []
    arguments = velocity, torch.zeros(1, 1), uniform_times(T), hyper, torch.Generator().manual_seed(seed)
    for x_0, weight, log in METHODS[method](*arguments):
        if x_0.requires_grad:
            velocity.backward(x_0, torch.ones_like(x_0), weight)
        logs.append(log)
    return logs


def timesteps_drawn(method: str, T: int, seed: int) -> tuple[int, ...]:
    """The indices that a method draws with this seed; empty for a method that draws only noise."""
    with torch.no_grad():
        log = run_method(lambda x, t: 0 * x, method, T, seed)[-1]
    indices = (value if isinstance(value, tuple) else (value,) for value in log.values())
    return tuple(value for values in indices for value in values if isinstance(value, int))


def distinct_draws(method: str, T: int, max_draws: int) -> tuple[list[int], bool]:
    """A seed for each distinct draw of a method's timesteps, and whether these are all possible draws.

    If there are more than `max_draws`, the seeds are 0..max_draws - 1; a tenth of them for a method that draws only
    noise, whose gradient varies little.  The search ends after 50 seeds, and ten for each draw, without a new draw.
    """
    if not timesteps_drawn(method, T, seed=0):
        return list(range(max(2, max_draws // 10))), False
    seeds: dict[tuple[int, ...], int] = {}
    seed = newest = 0
    while seed <= newest + 50 + 10 * len(seeds):
        if (draw := timesteps_drawn(method, T, seed)) not in seeds:
            seeds[draw], newest = seed, seed
        if len(seeds) > max_draws:
            return list(range(max_draws)), False
        seed += 1
    return list(seeds.values()), True


def effective_weights(method: str, T: int, max_draws: int) -> dict:
    """{"weights": the mean factor of dv(x_i)/dtheta in the gradient of a method's endpoint, for i = 1..T}.

    The velocity here has one parameter for each timestep, v(x, t_i) = theta_i.  The true factors, those of the
    sampling run, are the lengths of its intervals.
    """
    times, theta = uniform_times(T), torch.zeros(T + 1, requires_grad=True)
    seeds, _ = distinct_draws(method, T, max_draws)
    for seed in seeds:
        run_method(lambda x, t: theta[int(torch.searchsorted(times, t))] * torch.ones_like(x), method, T, seed)
    return {"weights": (-theta.grad / len(seeds))[1:].tolist()}


def evaluation_count(method: str, T: int, max_draws: int, **changes: object) -> dict:
    """{"evaluations": mean count of velocity evaluations an iteration and sample}; one with gradient counts as three.

    changes: of the hyperparameters.
    """
    count, theta = 0, torch.zeros((), requires_grad=True)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        nonlocal count
        count += 3 if torch.is_grad_enabled() else 1
        return theta * x

    seeds, _ = distinct_draws(method, T, max_draws)
    for seed in seeds:
        run_method(velocity, method, T, seed, **changes)
    return {"evaluations": count / len(seeds)}
