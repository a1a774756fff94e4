"""Changes to LeapAlign that only the laboratory needs; each is a method, like those of leap_align.py."""

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
    rollout,
    sample_pair,
    similarity_weight,
    stop_gradient,
)


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


def nested_only(velocity: Velocity, x_T: Tensor, times: Tensor, hyper: Hyper, generator: torch.Generator) -> Endpoints:
    """LeapAlign by `nested_trajectory`: what the nested gradient teaches the first leap when left to itself."""
    i_k, i_j = sample_pair(len(times) - 1, generator, hyper.low, hyper.high)
    states = rollout(velocity, x_T, times)
    trajectory = nested_trajectory(velocity, states, times, i_k, i_j, hyper.alpha)
    d_j, d_0 = distances(trajectory)
    yield trajectory.x_0, similarity_weight(trajectory, hyper.tau)
    return {"i_k": i_k, "i_j": i_j, "d_j": d_j, "d_0": d_0}
