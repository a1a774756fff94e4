"""What cannot be right is refused: one line that names the argument and its value, and no traceback from torch."""

from contextlib import contextmanager

import pytest
import torch

from leap_align import (
    COSINE,
    METHODS,
    BadInput,
    Hyper,
    connect,
    discount,
    hinge,
    interpolate,
    leap,
    leap_general,
    leap_rollout,
    leap_trajectory,
    objective,
    rollout,
    sample_pair,
    shifted_times,
    similarity_weight,
    uniform_times,
)
from tests.problems import grid, randn, run, seeded

pytestmark = pytest.mark.usefixtures("float64")

T, B = 6, 3
NAN, INF = float("nan"), float("inf")


@contextmanager
def raises_one_line(*says):
    """A ValueError of one line in which each of `says` stands."""
    with pytest.raises(BadInput) as caught:
        yield
    message = str(caught.value)
    assert isinstance(caught.value, ValueError) and "\n" not in message
    for words in says:
        assert words in message, message


def velocity(x, t):
    return torch.sin(x)


def two_passes(i_k, i_j, alpha=0.3, times=None, states=None):
    times = grid(T) if times is None else times
    return leap_trajectory(velocity, states or [randn(B, 2)] * len(times), times, i_k, i_j, alpha)


def one_pass(i_k, i_j, alpha=0.3, times=None):
    return leap_rollout(velocity, randn(B, 2), grid(T) if times is None else times, i_k, i_j, alpha)


def method(name, hyper, times=None):
    return run(name, velocity, randn(B, 2), grid(T) if times is None else times, hyper, seeded())


both_forms = pytest.mark.parametrize("form", [two_passes, one_pass])


@both_forms
@pytest.mark.parametrize("i_k, i_j", [(2, 2), (2, 4), (3, 0), (0, 3), (7, 2), (3, -1), (-1, -2)])
def test_pairs_that_are_no_leaps(form, i_k, i_j):
    with raises_one_line(f"i_k={i_k}", f"i_j={i_j}", f"1 <= i_j < i_k <= T={T}"):
        form(i_k, i_j)


@pytest.mark.parametrize("i_k, i_j", [(2, 2), (2, 4), (3, 0), (7, 2), (3, -1)])
def test_one_pair_of_many_that_is_no_leap(i_k, i_j):
    with raises_one_line(f"i_k={i_k}", f"i_j={i_j}"):
        two_passes(torch.tensor([3, i_k, 5]), torch.tensor([1, i_j, 2]))


@pytest.mark.parametrize("i_k, i_j", [([3, 4], [1, 2]), ([3, 4, 5, 6], [1, 2, 3, 4]), ([3, 4, 5], [1, 2])])
def test_pairs_for_another_number_of_samples(i_k, i_j):
    with raises_one_line(f"i_k={i_k}", f"i_j={i_j}", f"({B},)"):
        two_passes(torch.tensor(i_k), torch.tensor(i_j))


@pytest.mark.parametrize(
    "i_k, i_j", [(4.5, 2), (4.0, 2.0), (torch.tensor([3.0, 4.0, 5.0]), torch.tensor([1.0, 2.0, 2.0]))]
)
def test_pairs_that_are_not_whole(i_k, i_j):
    with raises_one_line("i_k=", "i_j=", "ints"):
        two_passes(i_k, i_j)
    with raises_one_line("i_k=", "i_j=", "ints"):
        one_pass(i_k, i_j)


def test_pairs_of_two_dimensions():
    with raises_one_line("i_k=[[3], [4], [5]]", f"({B},)"):
        two_passes(torch.tensor([[3], [4], [5]]), torch.tensor([[1], [2], [2]]))


@pytest.mark.parametrize("i_end", [-1, T + 1])
def test_rollouts_that_end_off_the_grid(i_end):
    with raises_one_line(f"i_end={i_end}", f"T={T}"):
        rollout(velocity, randn(B, 2), grid(T), i_end=i_end)


def test_one_index_a_batch_beside_one_a_sample():
    with raises_one_line("i_k=[3, 4, 5]", "i_j=2"):
        two_passes(torch.tensor([3, 4, 5]), 2)


def test_a_pair_a_sample_in_one_pass():
    pair = torch.tensor([3, 4, 5]), torch.tensor([1, 2, 3])
    with raises_one_line("i_k=[3, 4, 5]", "i_j=[1, 2, 3]", "ints"):
        one_pass(*pair)


@pytest.mark.parametrize("alpha", [-0.1, 1.1, NAN, INF])
@pytest.mark.parametrize(
    "what",
    [
        lambda alpha: discount(randn(2), alpha),
        lambda alpha: Hyper(alpha=alpha),
        lambda alpha: two_passes(4, 2, alpha),
        lambda alpha: one_pass(4, 2, alpha),
    ],
    ids=["discount", "Hyper", "two_passes", "one_pass"],
)
def test_alpha_outside_0_to_1(alpha, what):
    with raises_one_line(f"alpha={alpha}", "[0, 1]"):
        what(alpha)


@pytest.mark.parametrize("tau", [0, -0.1, NAN, INF])
def test_tau_that_bounds_nothing(tau):
    with raises_one_line(f"tau={tau}", "positive"):
        similarity_weight(two_passes(4, 2), tau)
    with raises_one_line(f"tau={tau}", "positive"):
        Hyper(tau=tau)


@pytest.mark.parametrize("lam", [NAN, INF])
def test_lambda_that_is_no_number(lam):
    with raises_one_line(f"lam={lam}"):
        Hyper(lam=lam)


BAD_GRIDS = {
    "descends": [1.0, 0.5, 0.0],
    "does not start at 0": [0.1, 0.5, 1.0],
    "does not end at 1": [0.0, 0.5, 0.9],
    "in thousandths": [0.0, 500.0, 1000.0],
    "repeats": [0.0, 0.5, 0.5, 1.0],
    "turns": [0.0, 0.7, 0.3, 1.0],
    "is not a number": [0.0, NAN, 1.0],
    "one moment": [0.0],
    "empty": [],
    "two-dimensional": [[0.0, 0.5, 1.0], [0.0, 0.5, 1.0]],
}


@pytest.mark.parametrize("times", [pytest.param(times, id=name) for name, times in BAD_GRIDS.items()])
@pytest.mark.parametrize(
    "what",
    [
        lambda times: rollout(velocity, randn(B, 2), times),
        lambda times: two_passes(2, 1, times=times),
        lambda times: one_pass(2, 1, times=times),
        *(lambda times, name=name: method(name, Hyper(m=1, K=1), times) for name in METHODS),
    ],
    ids=["rollout", "two_passes", "one_pass", *METHODS],
)
def test_grids_that_do_not_ascend_from_0_to_1(times, what):
    times = torch.tensor(times)
    shown = ", ".join(f"{t:g}" for t in times.flatten()[:3].tolist())
    with raises_one_line(f"times=[{shown}", str(tuple(times.shape)), "ascend"):
        what(times)


def test_states_that_do_not_fit_the_times():
    with raises_one_line(f"{T} states", f"{T + 1} times"):
        two_passes(4, 2, states=[randn(B, 2)] * T)


@pytest.mark.parametrize("what", [leap, lambda *a: leap_general(*a, COSINE)], ids=["leap", "leap_general"])
def test_velocities_of_another_shape(what):
    # (3, 1) and (2,) would broadcast to the state's shape without a word
    for shape in ((3, 1), (2,), (2, 3), (3, 2, 1)):
        with raises_one_line(str(shape), "(3, 2)", "velocity"):
            what(randn(3, 2), randn(*shape), 1, 0)


@pytest.mark.parametrize("name", METHODS)
def test_a_network_that_gives_another_shape(name):
    def bad(x, t):
        return x.sum(1, keepdim=True)

    with raises_one_line("velocity", "(3, 1)", "(3, 2)"):
        run(name, bad, randn(B, 2), grid(T), Hyper(m=2), seeded())


def test_times_that_fit_no_sample():
    for shape in ((2,), (3, 1), (1,)):
        with raises_one_line("time", str(shape), "(3,)"):
            leap(randn(3, 2), randn(3, 2), torch.ones(shape), 0)


def test_times_that_would_promote_the_states():
    x = randn(3, 2, dtype=torch.float32)
    with raises_one_line("float64", "float32"):
        leap(x, x, torch.ones(3, dtype=torch.float64), 0)


@pytest.mark.parametrize("what", [connect, interpolate], ids=["connect", "interpolate"])
def test_two_states_of_different_shapes(what):
    arguments = (randn(3, 1), randn(3, 2)) + ((0.5,) if what is interpolate else ())
    with raises_one_line("x", "(3, 1)", "(3, 2)"):
        what(*arguments)


def test_rewards_that_are_not_one_number_a_sample():
    # A reward (B, 1) against a weight (B,) would broadcast to (B, B) without a word
    with raises_one_line("reward", "(3, 1)", "(B,)"):
        hinge(randn(3, 1), 0.5)
    with raises_one_line("reward", "()", "(B,)"):
        hinge(torch.tensor(1.0), 0.5)
    with raises_one_line("lam=nan"):
        hinge(randn(3), NAN)
    with raises_one_line("reward", "(3, 1)", "(B,)"):
        objective(randn(3, 1), randn(3, 1), 0.5)
    with raises_one_line("reward", "(3, 1)", "weight", "(3,)"):
        objective(randn(3, 1), randn(3), 0.5)
    with raises_one_line("reward", "(3,)", "weight", "(3, 1)"):
        objective(randn(3), randn(3, 1), 0.5)


def test_early_stops_beyond_what_the_method_can_run():
    with raises_one_line("m=7", "T=6"):
        method("refl", Hyper(m=7))
    with raises_one_line("m=5", "= 4"):
        method("drtune", Hyper(m=5, K=2))


def test_more_trained_timesteps_than_there_are():
    with raises_one_line("K=7", "T=6"):
        method("drtune", Hyper(m=1, K=7))


@pytest.mark.parametrize("low, high", [(0, None), (-1, 3), (3, 3), (4, 2), (1, 7), (6, None)])
def test_windows_that_hold_no_pair(low, high):
    shown = T if high is None else high
    with raises_one_line(f"low={low}", f"high={shown}", f"T={T}"):
        sample_pair(T, seeded(), low, high)
    with raises_one_line(f"low={low}", f"high={shown}", f"T={T}"):
        method("leap_align", Hyper(low=low, high=high))


@pytest.mark.parametrize("name, value", [("m", 0), ("K", 0), ("n", -1)])
def test_counts_that_are_too_small(name, value):
    with raises_one_line(f"{name}={value}", "at least"):
        Hyper(**{name: value})


def test_pairs_that_nobody_knows():
    with raises_one_line("pairs='image'", "'batch'", "'sample'"):
        Hyper(pairs="image")


def test_draws_without_a_generator():
    with raises_one_line("generator=None"):
        sample_pair(T, None)
    for name in ("leap_align", "refl", "drtune", "draft_lv"):
        with raises_one_line("generator=None"):
            run(name, velocity, randn(B, 2), grid(T), Hyper(m=2), None)


def test_grids_without_a_step_or_a_direction():
    with raises_one_line("T=0"):
        uniform_times(0)
    with raises_one_line("T=0"):
        shifted_times(0, 3)
    with raises_one_line("T=1"):
        sample_pair(1, seeded())
    for shift in (0, -1, NAN, INF):
        with raises_one_line(f"shift={shift}"):
            shifted_times(5, shift)
