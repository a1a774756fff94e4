"""Invalid arguments raise BadInput: one line that names the argument and its value, before torch fails on it."""

from contextlib import contextmanager

import pytest
import torch

from leap_align import (
    COSINE,
    METHODS,
    BadInput,
    Hyper,
    checked,
    connect,
    differentiable,
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
def raises_one_line(*expected):
    """Expects a ValueError of one line that contains all of these words."""
    with pytest.raises(BadInput) as caught:
        yield
    message = str(caught.value)
    assert isinstance(caught.value, ValueError) and "\n" not in message
    for words in expected:
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
def test_pair_out_of_order_or_off_the_grid(form, i_k, i_j):
    with raises_one_line(f"i_k={i_k}", f"i_j={i_j}", f"1 <= i_j < i_k <= T={T}"):
        form(i_k, i_j)


@pytest.mark.parametrize("i_k, i_j", [(2, 2), (2, 4), (3, 0), (7, 2), (3, -1)])
def test_one_invalid_pair_among_valid_ones(i_k, i_j):
    with raises_one_line(f"i_k={i_k}", f"i_j={i_j}"):
        two_passes(torch.tensor([3, i_k, 5]), torch.tensor([1, i_j, 2]))


@pytest.mark.parametrize("i_k, i_j", [([3, 4], [1, 2]), ([3, 4, 5, 6], [1, 2, 3, 4]), ([3, 4, 5], [1, 2])])
def test_number_of_pairs_that_differs_from_the_batch_size(i_k, i_j):
    with raises_one_line(f"i_k={i_k}", f"i_j={i_j}", f"({B},)"):
        two_passes(torch.tensor(i_k), torch.tensor(i_j))


@pytest.mark.parametrize(
    "i_k, i_j", [(4.5, 2), (4.0, 2.0), (torch.tensor([3.0, 4.0, 5.0]), torch.tensor([1.0, 2.0, 2.0]))]
)
def test_indices_that_are_not_integers(i_k, i_j):
    with raises_one_line("i_k=", "i_j=", "ints"):
        two_passes(i_k, i_j)
    with raises_one_line("i_k=", "i_j=", "ints"):
        one_pass(i_k, i_j)


def test_two_dimensional_indices():
    with raises_one_line("i_k=[[3], [4], [5]]", f"({B},)"):
        two_passes(torch.tensor([[3], [4], [5]]), torch.tensor([[1], [2], [2]]))


@pytest.mark.parametrize("i_end", [-1, T + 1])
def test_i_end_off_the_grid(i_end):
    with raises_one_line(f"i_end={i_end}", f"T={T}"):
        rollout(velocity, randn(B, 2), grid(T), i_end=i_end)


def test_int_index_mixed_with_a_tensor_index():
    with raises_one_line("i_k=[3, 4, 5]", "i_j=2"):
        two_passes(torch.tensor([3, 4, 5]), 2)


def test_a_pair_a_sample_in_leap_rollout():
    pair = torch.tensor([3, 4, 5]), torch.tensor([1, 2, 3])
    with raises_one_line("i_k=[3, 4, 5]", "i_j=[1, 2, 3]", "ints"):
        one_pass(*pair)


@pytest.mark.parametrize("alpha", [-0.1, 1.1, NAN, INF])
@pytest.mark.parametrize(
    "call",
    [
        lambda alpha: discount(randn(2), alpha),
        lambda alpha: Hyper(alpha=alpha),
        lambda alpha: two_passes(4, 2, alpha),
        lambda alpha: one_pass(4, 2, alpha),
    ],
    ids=["discount", "Hyper", "two_passes", "one_pass"],
)
def test_alpha_outside_0_to_1(alpha, call):
    with raises_one_line(f"alpha={alpha}", "[0, 1]"):
        call(alpha)


@pytest.mark.parametrize("tau", [0, -0.1, NAN, INF])
def test_tau_that_is_not_positive_and_finite(tau):
    with raises_one_line(f"tau={tau}", "positive"):
        similarity_weight(two_passes(4, 2), tau)
    with raises_one_line(f"tau={tau}", "positive"):
        Hyper(tau=tau)


@pytest.mark.parametrize("lam", [NAN, INF])
def test_lambda_that_is_not_finite(lam):
    with raises_one_line(f"lam={lam}"):
        Hyper(lam=lam)


BAD_GRIDS = {
    "descends": [1.0, 0.5, 0.0],
    "does not start at 0": [0.1, 0.5, 1.0],
    "does not end at 1": [0.0, 0.5, 0.9],
    "is not in [0, 1]": [0.0, 500.0, 1000.0],
    "repeats": [0.0, 0.5, 0.5, 1.0],
    "is not monotonic": [0.0, 0.7, 0.3, 1.0],
    "is not a number": [0.0, NAN, 1.0],
    "has one entry": [0.0],
    "is empty": [],
    "is two-dimensional": [[0.0, 0.5, 1.0], [0.0, 0.5, 1.0]],
}


@pytest.mark.parametrize("times", [pytest.param(times, id=name) for name, times in BAD_GRIDS.items()])
@pytest.mark.parametrize(
    "call",
    [
        lambda times: rollout(velocity, randn(B, 2), times),
        lambda times: two_passes(2, 1, times=times),
        lambda times: one_pass(2, 1, times=times),
        *(lambda times, name=name: method(name, Hyper(m=1, K=1), times) for name in METHODS),
    ],
    ids=["rollout", "two_passes", "one_pass", *METHODS],
)
def test_grids_that_do_not_ascend_from_0_to_1(times, call):
    times = torch.tensor(times)
    shown = ", ".join(f"{t:g}" for t in times.flatten()[:3].tolist())
    with raises_one_line(f"times=[{shown}", str(tuple(times.shape)), "ascend"):
        call(times)


def test_number_of_states_that_differs_from_the_times():
    with raises_one_line(f"{T} states", f"{T + 1} times"):
        two_passes(4, 2, states=[randn(B, 2)] * T)


@pytest.mark.parametrize("call", [leap, lambda *a: leap_general(*a, COSINE)], ids=["leap", "leap_general"])
def test_velocity_shape_that_differs_from_the_state(call):
    # (3, 1) and (2,) would silently broadcast to the state's shape
    for shape in ((3, 1), (2,), (2, 3), (3, 2, 1)):
        with raises_one_line(str(shape), "(3, 2)", "velocity"):
            call(randn(3, 2), randn(*shape), 1, 0)


@pytest.mark.parametrize("name", METHODS)
def test_network_output_of_the_wrong_shape(name):
    def bad(x, t):
        return x.sum(1, keepdim=True)

    with raises_one_line("velocity", "(3, 1)", "(3, 2)"):
        run(name, bad, randn(B, 2), grid(T), Hyper(m=2), seeded())


def test_time_of_the_wrong_shape():
    for shape in ((2,), (3, 1), (1,)):
        with raises_one_line("time", str(shape), "(3,)"):
            leap(randn(3, 2), randn(3, 2), torch.ones(shape), 0)


def test_time_dtype_that_would_promote_the_state():
    x = randn(3, 2, dtype=torch.float32)
    with raises_one_line("float64", "float32"):
        leap(x, x, torch.ones(3, dtype=torch.float64), 0)


@pytest.mark.parametrize("call", [connect, interpolate], ids=["connect", "interpolate"])
def test_two_states_of_different_shapes(call):
    arguments = (randn(3, 1), randn(3, 2)) + ((0.5,) if call is interpolate else ())
    with raises_one_line("x", "(3, 1)", "(3, 2)"):
        call(*arguments)


def test_reward_or_weight_of_the_wrong_shape():
    # A reward (B, 1) against a weight (B,) would silently broadcast to (B, B)
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


@pytest.mark.parametrize("call", [checked, differentiable])
def test_a_reward_that_is_no_tensor_or_an_x_0_without_gradient(call):
    x_0 = randn(3, 2).requires_grad_()
    for reward in ([0.1, 0.2, 0.3], None, 0.5, randn(3, 1).numpy()):
        with raises_one_line(f"reward of type {type(reward).__name__}", "tensor (B,) = (3,)"):
            call(reward, x_0)
    with raises_one_line("x_0 does not require grad", "velocity"):
        call(x_0.sum(1), x_0.detach())
    assert torch.equal(call(x_0.sum(1), x_0), x_0.sum(1))


def test_early_stop_beyond_the_range_of_the_method():
    with raises_one_line("m=7", "T=6"):
        method("refl", Hyper(m=7))
    with raises_one_line("m=5", "= 4"):
        method("drtune", Hyper(m=5, K=2))


def test_more_trained_timesteps_than_T():
    with raises_one_line("K=7", "T=6"):
        method("drtune", Hyper(m=1, K=7))


@pytest.mark.parametrize("low, high", [(0, None), (-1, 3), (3, 3), (4, 2), (1, 7), (6, None)])
def test_window_without_a_pair(low, high):
    shown = T if high is None else high
    with raises_one_line(f"low={low}", f"high={shown}", f"T={T}"):
        sample_pair(T, seeded(), low, high)
    with raises_one_line(f"low={low}", f"high={shown}", f"T={T}"):
        method("leap_align", Hyper(low=low, high=high))


@pytest.mark.parametrize("name, value", [("m", 0), ("K", 0), ("n", -1)])
def test_counts_below_their_minimum(name, value):
    with raises_one_line(f"{name}={value}", "at least"):
        Hyper(**{name: value})


def test_unknown_value_of_pairs():
    with raises_one_line("pairs='image'", "'batch'", "'sample'"):
        Hyper(pairs="image")


def test_draws_without_a_generator():
    with raises_one_line("generator=None"):
        sample_pair(T, None)
    for name in ("leap_align", "refl", "drtune", "draft_lv"):
        with raises_one_line("generator=None"):
            run(name, velocity, randn(B, 2), grid(T), Hyper(m=2), None)


def test_T_or_shift_out_of_range():
    with raises_one_line("T=0"):
        uniform_times(0)
    with raises_one_line("T=0"):
        shifted_times(0, 3)
    with raises_one_line("T=1"):
        sample_pair(1, seeded())
    for shift in (0, -1, NAN, INF):
        with raises_one_line(f"shift={shift}"):
            shifted_times(5, shift)
