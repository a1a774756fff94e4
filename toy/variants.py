"""Changes to LeapAlign that only the laboratory needs; each is a method, like those of leap_align.py."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from leap_align import (
    Endpoints,
    Hyper,
    LeapTrajectory,
    Velocity,
    connect,
    discount,
    distances,
    leap,
    leap_trajectory,
    rollout,
    sample_pair,
    similarity_weight,
    stop_gradient,
)

# Trajectories


def nested_trajectory(
    velocity: Velocity, states: list[Tensor], times: Tensor, i_k: int, i_j: int, alpha: float
) -> LeapTrajectory:
    """A leap trajectory whose first leap is trained through the nested gradient alone (supplement's Eq. 1).

    The skip path of the second leap is stopped, so that of Eq. S18 the term -(k - j) dv(x_k)/dtheta is gone.
    """
    x_k, x_j, x_0 = states[i_k], states[i_j], states[0]
    k, j = times[i_k], times[i_j]
    x_hat_j = leap(x_k, velocity(x_k, k), k, j)
    x_j = connect(x_hat_j, x_j)
    x_hat_0 = leap(stop_gradient(x_j), velocity(discount(x_j, alpha), j), j, 0)
    return LeapTrajectory(connect(x_hat_0, x_0), x_hat_0, x_j, x_hat_j)


def leap_chain(
    velocity: Velocity, states: list[Tensor], times: Tensor, indices: list[int], alpha: float
) -> list[tuple[Tensor, Tensor]]:
    """Leaps through the states at descending indices and on to x_0; with two indices this is `leap_trajectory`.

    Returns the connections (x̂, x) in order, each (B, *S): the leap and the real state that has its gradient.
    """
    x, connections = stop_gradient(states[indices[0]]), []
    for i, i_next in pairwise([*indices, 0]):
        t, s = times[i], times[i_next]
        x_hat = leap(x, velocity(discount(x, alpha), t), t, s)
        x = connect(x_hat, states[i_next])
        connections.append((x_hat, x))
    return connections


# Draws, beside sample_pair


def any_pair(T: int, generator: torch.Generator, hyper: Hyper) -> tuple[int, int]:
    """LeapAlign's own: every pair equally likely."""
    return sample_pair(T, generator, hyper.low, hyper.high)


def pair_apart(distance: int, T: int, generator: torch.Generator, hyper: Hyper) -> tuple[int, int]:
    """A pair whose indices differ by `distance`, j uniform."""
    i_j = int(torch.randint(1, T - distance + 1, (), generator=generator))
    return i_j + distance, i_j


# Weights (B,), beside similarity_weight


def no_weight(trajectory: LeapTrajectory, tau: float) -> Tensor:
    """Every sample counts alike."""
    return trajectory.x_0.new_ones(len(trajectory.x_0))


def weight_by(which: int, trajectory: LeapTrajectory, tau: float) -> Tensor:
    """1 / max(d, tau) with d_j (which = 0) or d_0 (which = 1) alone."""
    return 1 / distances(trajectory)[which].clamp(min=tau)


# Methods


def changed(
    velocity: Velocity,
    x_T: Tensor,
    times: Tensor,
    hyper: Hyper,
    generator: torch.Generator,
    trajectory: Callable[..., LeapTrajectory] = leap_trajectory,
    draw: Callable[..., tuple[int, int]] = any_pair,
    weight: Callable[..., Tensor] = similarity_weight,
    judged: str = "x_0",
) -> Endpoints:
    """LeapAlign with one of its parts exchanged; `judged` names the state of the trajectory that the reward sees."""
    i_k, i_j = draw(len(times) - 1, generator, hyper)
    leaps = trajectory(velocity, rollout(velocity, x_T, times), times, i_k, i_j, hyper.alpha)
    d_j, d_0 = distances(leaps)
    yield getattr(leaps, judged), weight(leaps, hyper.tau)
    return {"i_k": i_k, "i_j": i_j, "d_j": d_j, "d_0": d_0}


def chained(
    number: int, velocity: Velocity, x_T: Tensor, times: Tensor, hyper: Hyper, generator: torch.Generator
) -> Endpoints:
    """LeapAlign with that many leaps, between timesteps of which every choice is equally likely."""
    drawn = 1 + torch.randperm(len(times) - 1, generator=generator)[:number]
    indices = sorted(drawn.tolist(), reverse=True)
    connections = leap_chain(velocity, rollout(velocity, x_T, times), times, indices, hyper.alpha)
    apart = [stop_gradient(x - x_hat).abs().flatten(1).mean(1).clamp(min=hyper.tau) for x_hat, x in connections]
    yield connections[-1][1], 1 / sum(apart)
    return {}


nested_only = partial(changed, trajectory=nested_trajectory)

VARIANTS: dict[str, Callable[..., Endpoints]] = {
    "one_leap": partial(chained, 1),
    "three_leaps": partial(chained, 3),
    "reward_on_leap": partial(changed, judged="x_hat_0"),
    "weight_none": partial(changed, weight=no_weight),
    "weight_d_j": partial(changed, weight=partial(weight_by, 0)),
    "weight_d_0": partial(changed, weight=partial(weight_by, 1)),
    "apart_1": partial(changed, draw=partial(pair_apart, 1)),
    "apart_6": partial(changed, draw=partial(pair_apart, 6)),
    "apart_12": partial(changed, draw=partial(pair_apart, 12)),
    "apart_18": partial(changed, draw=partial(pair_apart, 18)),
    "nested_only": nested_only,
}
"""LeapAlign but for one thing, by name."""
