"""Variants of LeapAlign that only the laboratory needs; each is a method, like those of leap_align.py."""

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
    method,
    rollout,
    sample_pair,
    similarity_weight,
    stop_gradient,
)

# ---------------------------------------------------------------------------------------------------------------------
# Trajectories in place of leap_trajectory
# ---------------------------------------------------------------------------------------------------------------------


def nested_trajectory(
    velocity: Velocity, states: list[Tensor], times: Tensor, i_k: int, i_j: int, alpha: float
) -> LeapTrajectory:
    """A leap trajectory that trains its first leap only through the nested gradient (supplement's Eq. 1).

    The second leap starts from sg(x_j), which removes the term -(k - j) dv(x_k)/dtheta from Eq. S18.
    """
    x_k, x_j, x_0 = states[i_k], states[i_j], states[0]
    k, j = times[i_k], times[i_j]
    x_hat_j = leap(x_k, velocity(x_k, k), k, j)
    x_j = connect(x_hat_j, x_j)
    x_hat_0 = leap(stop_gradient(x_j), velocity(discount(x_j, alpha), j), j, 0)
    return LeapTrajectory(connect(x_hat_0, x_0), x_hat_0, x_j, x_hat_j)


def multi_leap_trajectory(
    velocity: Velocity, states: list[Tensor], times: Tensor, indices: list[int], alpha: float
) -> list[tuple[Tensor, Tensor]]:
    """Leaps through the states at descending indices and then to x_0; two indices give `leap_trajectory`.

    Returns the pairs (x̂, x) in order, each (B, *S): the end of a leap, and the recorded state with x̂'s gradient.
    """
    x, connections = stop_gradient(states[indices[0]]), []
    for i, i_next in pairwise([*indices, 0]):
        t, s = times[i], times[i_next]
        x_hat = leap(x, velocity(discount(x, alpha), t), t, s)
        x = connect(x_hat, states[i_next])
        connections.append((x_hat, x))
    return connections


# ---------------------------------------------------------------------------------------------------------------------
# Draws (i_k, i_j)
# ---------------------------------------------------------------------------------------------------------------------


def any_pair(T: int, generator: torch.Generator, hyper: Hyper) -> tuple[int, int]:
    """LeapAlign's own draw: every pair is equally likely."""
    return sample_pair(T, generator, hyper.low, hyper.high)


def pair_at_distance(distance: int, T: int, generator: torch.Generator, hyper: Hyper) -> tuple[int, int]:
    """A pair with i_k - i_j = distance; i_j is uniform."""
    i_j = int(torch.randint(1, T - distance + 1, (), generator=generator))
    return i_j + distance, i_j


# ---------------------------------------------------------------------------------------------------------------------
# Weights (B,) in place of similarity_weight
# ---------------------------------------------------------------------------------------------------------------------


def no_weight(trajectory: LeapTrajectory, tau: float) -> Tensor:
    """1 for every sample."""
    return trajectory.x_0.new_ones(len(trajectory.x_0))


def weight_by_d_j(trajectory: LeapTrajectory, tau: float) -> Tensor:
    """1 / max(d_j, tau)."""
    d_j, _ = distances(trajectory)
    return 1 / d_j.clamp(min=tau)


def weight_by_d_0(trajectory: LeapTrajectory, tau: float) -> Tensor:
    """1 / max(d_0, tau)."""
    _, d_0 = distances(trajectory)
    return 1 / d_0.clamp(min=tau)


# ---------------------------------------------------------------------------------------------------------------------
# Methods
# ---------------------------------------------------------------------------------------------------------------------


@method
def leap_align_variant(
    velocity: Velocity,
    x_T: Tensor,
    times: Tensor,
    hyper: Hyper,
    generator: torch.Generator,
    trajectory: Callable[..., LeapTrajectory] = leap_trajectory,
    draw: Callable[..., tuple[int, int]] = any_pair,
    weight: Callable[..., Tensor] = similarity_weight,
    endpoint: str = "x_0",
) -> Endpoints:
    """LeapAlign in two passes, with a part to replace; `endpoint` names the state that the reward scores."""
    i_k, i_j = draw(len(times) - 1, generator, hyper)
    leaps = trajectory(velocity, rollout(velocity, x_T, times, 0, hyper.step()), times, i_k, i_j, hyper.alpha)
    d_j, d_0 = distances(leaps)
    yield getattr(leaps, endpoint), weight(leaps, hyper.tau)
    return {"i_k": i_k, "i_j": i_j, "d_j": d_j, "d_0": d_0}


@method
def leap_align_with_leaps(
    leaps: int, velocity: Velocity, x_T: Tensor, times: Tensor, hyper: Hyper, generator: torch.Generator
) -> Endpoints:
    """LeapAlign with any number of leaps; every choice of timesteps is equally likely."""
    drawn = 1 + torch.randperm(len(times) - 1, generator=generator)[:leaps]
    indices = sorted(drawn.tolist(), reverse=True)
    states = rollout(velocity, x_T, times, 0, hyper.step())
    connections = multi_leap_trajectory(velocity, states, times, indices, hyper.alpha)
    gaps = [stop_gradient(x - x_hat).abs().flatten(1).mean(1).clamp(min=hyper.tau) for x_hat, x in connections]
    yield connections[-1][1], 1 / sum(gaps)
    return {}


nested_only = partial(leap_align_variant, trajectory=nested_trajectory)

VARIANTS: dict[str, Callable[..., Endpoints]] = {
    "one_leap": partial(leap_align_with_leaps, 1),
    "three_leaps": partial(leap_align_with_leaps, 3),
    "reward_on_leap": partial(leap_align_variant, endpoint="x_hat_0"),
    "no_weight": partial(leap_align_variant, weight=no_weight),
    "weight_by_d_j": partial(leap_align_variant, weight=weight_by_d_j),
    "weight_by_d_0": partial(leap_align_variant, weight=weight_by_d_0),
    "distance_1": partial(leap_align_variant, draw=partial(pair_at_distance, 1)),
    "distance_6": partial(leap_align_variant, draw=partial(pair_at_distance, 6)),
    "distance_12": partial(leap_align_variant, draw=partial(pair_at_distance, 12)),
    "distance_18": partial(leap_align_variant, draw=partial(pair_at_distance, 18)),
    "nested_only": nested_only,
}
"""LeapAlign with one part replaced, by name."""
