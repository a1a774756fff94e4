"""Variants of LeapAlign that only the laboratory needs; each is a method, like those of leap_align.py."""

from functools import partial
from itertools import pairwise

import torch
from torch import Generator, Tensor

import leap_align
from leap_align import Endpoints, LeapTrajectory, connect, discount, distances, leap, rollout, stop_gradient


def nested_trajectory(velocity, states, times, i_k, i_j, alpha) -> LeapTrajectory:
    """A leap trajectory that trains its first leap only through the nested gradient (supplement's Eq. 1).

    Arguments as of `leap_trajectory`.  The second leap starts from sg(x_j), which removes the term
    -(k - j) dv(x_k)/dtheta from Eq. S18.
    """
    x_k, k, j = states[i_k], times[i_k], times[i_j]
    x_hat_j = leap(x_k, velocity(x_k, k), k, j)
    x_j = connect(x_hat_j, states[i_j])
    x_hat_0 = leap(stop_gradient(x_j), velocity(discount(x_j, alpha), j), j, 0)
    return LeapTrajectory(connect(x_hat_0, states[0]), x_hat_0, x_j, x_hat_j)


def multi_leap_trajectory(velocity, states, times, indices, alpha) -> list[tuple[Tensor, Tensor]]:
    """Leaps through the states at descending indices and then to x_0; two indices give `leap_trajectory`.

    Returns (x̂, x) of every connector in order, each (B, *S): a leap's end, and the recorded state with its gradient.
    """
    x, connections = stop_gradient(states[indices[0]]), []
    for i, i_next in pairwise([*indices, 0]):
        x_hat = leap(x, velocity(discount(x, alpha), times[i]), times[i], times[i_next])
        x = connect(x_hat, states[i_next])
        connections.append((x_hat, x))
    return connections


def pair_at_distance(distance: int, T: int, generator: Generator) -> tuple[int, int]:
    """A pair with i_k - i_j = distance; i_j is uniform."""
    i_j = int(torch.randint(1, T - distance + 1, (), generator=generator))
    return i_j + distance, i_j


def leap_align_variant(
    velocity, x_T, times, hyper, generator, step=leap,
    trajectory=leap_align.leap_trajectory, distance=None, weighted=("d_j", "d_0"), endpoint="x_0",
) -> Endpoints:  # fmt: skip
    """LeapAlign in two passes, with a part to replace: its trajectory, the pair's distance, the weight, the endpoint.

    weighted: the distances d in the weight 1 / sum max(d, tau), which is 1 without any.  endpoint: what is rewarded.
    """
    T = len(times) - 1
    drawn = pair_at_distance(distance, T, generator) if distance else ()
    i_k, i_j = drawn or leap_align.sample_pair(T, generator, hyper.low, hyper.high)
    leaps = trajectory(velocity, rollout(velocity, x_T, times, 0, step), times, i_k, i_j, hyper.alpha)
    d = dict(zip(("d_j", "d_0"), distances(leaps)))
    gaps = sum(d[name].clamp(min=hyper.tau) for name in weighted)
    yield getattr(leaps, endpoint), 1 / gaps if weighted else x_T.new_ones(len(x_T)), {"i_k": i_k, "i_j": i_j, **d}


def leap_align_with_leaps(leaps, velocity, x_T, times, hyper, generator, step=leap) -> Endpoints:
    """LeapAlign with any number of leaps; every choice of timesteps is equally likely."""
    drawn = 1 + torch.randperm(len(times) - 1, generator=generator)[:leaps]
    states, indices = rollout(velocity, x_T, times, 0, step), sorted(drawn.tolist(), reverse=True)
    connections = multi_leap_trajectory(velocity, states, times, indices, hyper.alpha)
    gaps = [stop_gradient(x - x_hat).abs().flatten(1).mean(1).clamp(min=hyper.tau) for x_hat, x in connections]
    yield connections[-1][1], 1 / sum(gaps), {}


nested_only = partial(leap_align_variant, trajectory=nested_trajectory)
VARIANTS = {
    "one_leap": partial(leap_align_with_leaps, 1),
    "three_leaps": partial(leap_align_with_leaps, 3),
    "reward_on_leap": partial(leap_align_variant, endpoint="x_hat_0"),
    "no_weight": partial(leap_align_variant, weighted=()),
    "weight_by_d_j": partial(leap_align_variant, weighted=("d_j",)),
    "weight_by_d_0": partial(leap_align_variant, weighted=("d_0",)),
    **{f"distance_{d}": partial(leap_align_variant, distance=d) for d in (1, 6, 12, 18)},
    "nested_only": nested_only,
}
"""LeapAlign with one part replaced, by name."""
