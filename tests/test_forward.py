"""Forward values of every function, against hand calculations and closed forms."""

import math
from collections import Counter
from itertools import combinations, product

import pytest
import torch
from torch.func import grad, vmap

import leap_align as la
from leap_align import RECTIFIED
from tests.oracles import assert_frequencies, bumpy
from tests.problems import B, T, problem, randn, seeded, trajectory

pytestmark = pytest.mark.usefixtures("float64")

all_dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
all_pairs = pytest.mark.parametrize("pair", [(6, 5), (6, 1), (4, 2), (2, 1)], ids=str)
COSINE = la.Path(
    a_t=lambda t: torch.cos(t * math.pi / 2),
    b_t=lambda t: torch.sin(t * math.pi / 2),
    da_t=lambda t: -math.pi / 2 * torch.sin(t * math.pi / 2),
    db_t=lambda t: math.pi / 2 * torch.cos(t * math.pi / 2),
)
SQUARE = la.Path(a_t=lambda t: 1 - t**2, b_t=lambda t: t, da_t=lambda t: -2 * t, db_t=lambda t: torch.ones_like(t))
"""Paths that leap_align does not define."""


def near(found, expected, atol=1e-14):
    return torch.allclose(found, torch.as_tensor(expected), rtol=0, atol=atol)


# Time
@pytest.mark.parametrize("shift", [None, 0.5, 1, 2.2243, 3, 3.158, 7.1])
@pytest.mark.parametrize("n", [1, 2, 7, 25, 50])
def test_the_grids_are_the_printed_formulas(n, shift):
    times = la.shifted_times(n, shift) if shift else la.uniform_times(n)
    printed = [(shift or 1) * (i / n) / (1 + ((shift or 1) - 1) * (i / n)) for i in range(n + 1)]
    assert near(times, printed, 1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_grids_ascend_from_exactly_0_to_exactly_1(dtype):
    """The printed formula rounds: for some shifts its last value is not exactly 1."""
    torch.set_default_dtype(dtype)
    grids = [la.shifted_times(25, shift) for shift in [0.5, 2.2243, 3, 3.158, *torch.linspace(0.1, 20, 200).tolist()]]
    for times in [la.uniform_times(25), *grids]:
        assert times.shape == (26,) and times.dtype == dtype
        assert times[0] == 0 and times[25] == 1 and (times.diff() > 0).all()


# Leaps
def test_leap_against_a_hand_calculation():
    x, v = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[10.0, 20.0], [-10.0, 0.0]])
    assert torch.equal(la.leap(x, v, 0.75, 0.25), torch.tensor([[-4.0, -8.0], [8.0, 4.0]]))
    t, s = torch.tensor([0.75, 1.0]), torch.tensor([0.25, 0.0])
    assert torch.equal(la.leap(x, v, t, s), torch.tensor([[-4.0, -8.0], [13.0, 4.0]]))


@pytest.mark.parametrize("i_end", range(T + 1))
def test_rollout_is_euler_and_a_leap_over_one_interval_its_step(shift, i_end):
    net, x_T, times, expected = problem(shift=shift)
    states = la.rollout(net.velocity(net.leaf()), x_T.requires_grad_(), times, i_end)
    assert not any(x.requires_grad for x in states)
    assert torch.equal(states[-1], x_T) and near(torch.stack(states), torch.stack(expected[i_end:]))
    for x_next, x, s, t in zip(states[:-1], states[1:], times[i_end:-1], times[i_end + 1 :], strict=True):
        assert torch.equal(la.leap(x, net(net.theta, x, t), t, s), x_next)


# General paths
def test_interpolate_against_a_hand_calculation():
    x_0, x_1 = torch.tensor([[1.0], [1.0]]), torch.tensor([[3.0], [3.0]])
    assert torch.equal(la.interpolate(x_0, x_1, 0.25), torch.tensor([[1.5], [1.5]]))
    assert torch.equal(la.interpolate(x_0, x_1, torch.tensor([0.25, 0.5])), torch.tensor([[1.5], [2.0]]))
    assert near(la.interpolate(x_0, x_1, 0.5, COSINE), [[4 / math.sqrt(2)]] * 2, 1e-15)
    for path, t in product((RECTIFIED, COSINE), (0, 1)):  # from the image to the noise
        assert near(la.interpolate(x_0, x_1, t, path), (x_0, x_1)[t], 1e-15)


@pytest.mark.parametrize("path", [RECTIFIED, COSINE], ids=["rectified", "cosine"])
def test_path_derivatives_equal_autograd(path):
    t = torch.linspace(0, 1, 11)
    assert near(path.da_t(t), vmap(grad(path.a_t))(t)) and near(path.db_t(t), vmap(grad(path.b_t))(t))


@pytest.mark.parametrize("t, s", product([0, 0.3, 1, [0, 0.4, 1]], [0, 0.2, 1, [1, 0.1, 0]]))
def test_leap_along_the_cosine_path_is_exact(t, s):
    """In both directions, between the ends, of zero length, and with one time a sample; `leap` is the other path's."""
    x_0, x_1, quarter = randn(B, 3), randn(B, 3, seed=1), math.pi / 2
    t, s = (torch.tensor(u, dtype=torch.float64) for u in (t, s))
    angle_t, angle_s = (u.reshape(-1, 1) * quarter for u in (t, s))
    x = angle_t.cos() * x_0 + angle_t.sin() * x_1
    v = quarter * (angle_t.cos() * x_1 - angle_t.sin() * x_0)
    assert near(la.leap_general(x, v, t, s, COSINE), angle_s.cos() * x_0 + angle_s.sin() * x_1)
    assert near(la.leap_general(x, v, t, s, RECTIFIED), la.leap(x, v, t, s))


@pytest.mark.parametrize("path", [RECTIFIED, COSINE, SQUARE], ids=["rectified", "cosine", "square"])
def test_leap_general_is_eq_s7_between_the_ends(path):
    """Eq. S7 holds for any x and v; its printed fractions are defined only inside (0, 1)."""
    x, v = randn(B, 3), randn(B, 3, seed=1)
    for t, s in [(0.9, 0.1), (0.5, 0.4), (0.2, 0.7)]:
        (a, b, da, db), (a_s, b_s, _, _) = ([f(torch.tensor(u)) for f in path] for u in (t, s))
        x_hat_1 = (v - da * x / a) / (db - da * b / a)  # S5
        x_hat_0 = (v - db * x / b) / (da - db * a / b)  # S6
        assert near(la.leap_general(x, v, t, s, path), a_s * x_hat_0 + b_s * x_hat_1, 1e-13)


@pytest.mark.parametrize("t", [0.0, 0.25, 0.6, 1.0])
@pytest.mark.parametrize("curve", ["rectified", "cosine"])
def test_leap_with_the_true_velocity_is_the_posterior_mean(t, curve):
    """x_0 ~ N(mean, scale^2), x_1 ~ N(0, 1): E[x_0 | x_t], E[x_1 | x_t] and so v(x_t) are regressions on x_t."""
    mean, scale, x = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.3, 1.0, 2.0]), randn(B, 3)
    path, (a, b, da, db) = RECTIFIED, (1 - t, t, -1, 1)
    if curve == "cosine":
        path, u = COSINE, t * math.pi / 2
        a, b, da, db = math.cos(u), math.sin(u), -math.pi / 2 * math.sin(u), math.pi / 2 * math.cos(u)
    surprise = (x - a * mean) / (a**2 * scale**2 + b**2)
    image, noise = mean + a * scale**2 * surprise, b * surprise
    v = da * image + db * noise
    assert near(la.leap_general(x, v, t, 0.0, path), image, 1e-13)
    assert near(la.leap_general(x, v, t, 1.0, path), noise, 1e-13)
    assert curve == "cosine" or near(la.leap(x, v, t, 0), image, 1e-13)


# Connector and discount
@all_dtypes
def test_connector_value_and_gradient(dtype):
    x_hat = (10 * randn(1000, dtype=dtype)).requires_grad_()
    x = randn(1000, seed=1, dtype=dtype).requires_grad_()
    joined = la.connect(x_hat, x)
    joined.backward(torch.arange(1000).to(dtype))
    assert torch.equal(joined, x)
    assert torch.equal(x_hat.grad, torch.arange(1000).to(dtype)) and x.grad is None
    assert not torch.equal(x_hat + (x - x_hat), x), "the printed form must round, or connect could be simpler"


@all_dtypes
@pytest.mark.parametrize("alpha", [0, 0.1, 0.3, 1])
def test_discount_value_and_gradient(dtype, alpha):
    x = randn(1000, dtype=dtype).requires_grad_()
    out = la.discount(x, alpha)
    out.backward(torch.ones_like(x))
    assert torch.equal(out, x) and torch.equal(x.grad, torch.full_like(x, alpha))


# The leap trajectory
@all_pairs
def test_leap_trajectory_takes_its_values_from_the_rollout(pair, shift, form):
    net, x_T, times, states = problem(shift=shift)
    (i_k, i_j), velocity = pair, net.velocity(net.theta)
    found = trajectory(form, velocity, x_T, times, i_k, i_j, 0.3)
    assert near(found.x_0, states[0]) and near(found.x_j, states[i_j])
    assert near(found.x_hat_j, states[i_k] + (times[i_j] - times[i_k]) * velocity(states[i_k], times[i_k]))
    assert near(found.x_hat_0, states[i_j] - times[i_j] * velocity(states[i_j], times[i_j]))


@all_pairs
def test_leap_rollout_equals_rollout_then_leap_trajectory(pair, shift, alpha):
    net, x_T, times, _ = problem(shift=shift)
    one, two = net.leaf(), net.leaf()
    states = la.rollout(net.velocity(two), x_T, times)
    one_pass = la.leap_rollout(net.velocity(one), x_T, times, *pair, alpha)
    two_pass = la.leap_trajectory(net.velocity(two), states, times, *pair, alpha)
    assert all(torch.equal(a, b) for a, b in zip(one_pass, two_pass, strict=True))
    (bumpy(one_pass.x_0).sum() + bumpy(two_pass.x_0).sum()).backward()
    assert torch.equal(one.grad, two.grad)


# The objective
def hand_made():
    """Two samples: d_j = 0.5 and 0, d_0 = 0.25 and 2."""
    return la.LeapTrajectory(
        x_0=torch.tensor([[1.0, 1.0], [0.0, 0.0]], requires_grad=True),
        x_hat_0=torch.tensor([[1.25, 0.75], [1.0, -3.0]], requires_grad=True),
        x_j=torch.tensor([[2.0, 3.0], [5.0, 5.0]], requires_grad=True),
        x_hat_j=torch.tensor([[3.0, 3.0], [5.0, 5.0]], requires_grad=True),
    )


def test_similarity_weight_against_a_hand_calculation():
    found = hand_made()
    d_j, d_0 = la.distances(found)
    assert torch.equal(d_j, torch.tensor([0.5, 0.0])) and torch.equal(d_0, torch.tensor([0.25, 2.0]))
    for tau, sums in {1e-12: [0.75, 2.0], 0.1: [0.75, 2.1], 0.3: [0.8, 2.3], 4.0: [8.0, 8.0]}.items():
        weight = la.similarity_weight(found, tau)
        assert near(weight, 1 / torch.tensor(sums), 1e-10) and not any(x.requires_grad for x in (d_j, d_0, weight))


LOSSES = {0.5: [1.5, 0.25, 0.0], 10.0: [11.0, 9.75, 9.25], None: [1.0, -0.25, -0.75]}  # lambda is no strength


@pytest.mark.parametrize("lam", LOSSES)
def test_hinge_against_a_hand_calculation(lam):
    reward = torch.tensor([-1.0, 0.25, 0.75], requires_grad=True)
    found = la.hinge(reward, lam)
    found.sum().backward()
    slopes = torch.tensor([-1.0, -1.0, 0.0 if lam == 0.5 else -1.0])
    assert torch.equal(found, torch.tensor(LOSSES[lam])) and torch.equal(reward.grad, slopes)


def test_objective_against_a_hand_calculation():
    reward = torch.tensor([-1.0, 0.25, 0.75], requires_grad=True)
    weight = torch.tensor([2.0, 4.0, 8.0], requires_grad=True)
    loss = la.objective(reward, weight, 0.5)
    loss.backward()
    assert loss.shape == () and loss.item() == (2 * 1.5 + 4 * 0.25 + 8 * 0) / 3
    assert near(reward.grad, [-2 / 3, -4 / 3, 0], 1e-15) and weight.grad is None


# Random draws, and the paper's numbers
def drawn_pairs(form, n, low, high):
    generator = seeded()
    if form == "ints":
        return [la.sample_pair(T, generator, low, high) for _ in range(n)]
    i_k, i_j = la.sample_pair(T, generator, low, high, size=n)
    assert i_k.shape == i_j.shape == (n,) and i_k.dtype == i_j.dtype == torch.int64
    return list(zip(i_k.tolist(), i_j.tolist()))


@pytest.mark.parametrize("form", ["ints", "tensors"])
@pytest.mark.parametrize("low, high", [(1, None), (2, 5)])
def test_sample_pair_is_uniform_over_all_pairs_of_its_window(form, low, high):
    pairs = [(i_k, i_j) for i_j, i_k in combinations(range(low, (high or T) + 1), 2)]
    draws = drawn_pairs(form, 400 * len(pairs), low, high)
    assert {type(i) for pair in draws for i in pair} == {int} and set(draws) == set(pairs)
    assert_frequencies(Counter(draws), {pair: 1 / len(pairs) for pair in pairs})


def test_the_papers_hyperparameters_are_the_defaults():
    """HPSv2.1 on FLUX (supplement A5); tau is that of other implementations."""
    hyper = la.Hyper()
    assert (hyper.alpha, hyper.lam, hyper.tau, hyper.low, hyper.high) == (0.3, 0.55, 0.1, 1, None)
    assert (hyper.m, hyper.K, hyper.n) == (11, 2, 2)
