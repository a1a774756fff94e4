"""Forward values of every function, against hand calculations and closed forms."""

import math
from itertools import combinations, product

import pytest
import torch
from torch.func import grad, vmap

from leap_align import (
    COSINE,
    METHODS,
    RECTIFIED,
    BatchGenerator,
    Hyper,
    LeapTrajectory,
    Path,
    connect,
    discount,
    distances,
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
from tests.problems import SHIFTS, Net, Recorder, bumpy, euler, grid, randn, run, seeded

pytestmark = pytest.mark.usefixtures("float64")

T, B = 6, 3
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
all_shifts = pytest.mark.parametrize("shift", SHIFTS)
all_pairs = pytest.mark.parametrize("pair", [(6, 5), (6, 1), (4, 2), (2, 1)], ids=str)
all_methods = pytest.mark.parametrize("name", METHODS)
all_shapes = pytest.mark.parametrize("shape", [(), (3,), (2, 4, 4)], ids=str)
both_paths = pytest.mark.parametrize("path", [RECTIFIED, COSINE], ids=["rectified", "cosine"])

SQUARE = Path(a_t=lambda t: 1 - t**2, b_t=lambda t: t, da_t=lambda t: -2 * t, db_t=lambda t: torch.ones_like(t))
"""A path that leap_align does not define."""


def problem(shape=(3,), shift=2.2243):
    net, x_T, times = Net(shape), randn(B, *shape, seed=1), grid(T, shift)
    return net, x_T, times, euler(net.velocity(net.theta), x_T, times)


# Time


@pytest.mark.parametrize("n", [1, 2, 7, 25, 50])
def test_uniform_times_is_i_over_T(n):
    times = uniform_times(n)
    assert times.shape == (n + 1,) and times[0] == 0 and times[n] == 1
    assert torch.allclose(times, torch.tensor([i / n for i in range(n + 1)]), rtol=0, atol=1e-15)


@pytest.mark.parametrize("shift", [0.5, 1, 2.2243, 3, 3.158, 7.1])
@pytest.mark.parametrize("n", [1, 2, 7, 25, 50])
def test_shifted_times_is_the_printed_formula(n, shift):
    times = shifted_times(n, shift)
    printed = [shift * (i / n) / (1 + (shift - 1) * (i / n)) for i in range(n + 1)]
    assert torch.allclose(times, torch.tensor(printed), rtol=0, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_shifted_times_ascends_from_exactly_0_to_exactly_1(dtype):
    """The printed formula rounds: for some shifts its last value is not exactly 1."""
    torch.set_default_dtype(dtype)
    for shift in [0.5, 2.2243, 3, 3.158, *torch.linspace(0.1, 20, 200).tolist()]:
        times = shifted_times(25, shift)
        assert times.dtype == dtype and times[0] == 0 and times[25] == 1 and (times.diff() > 0).all()


# Leaps


def test_leap_against_a_hand_calculation():
    x, v = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[10.0, 20.0], [-10.0, 0.0]])
    assert torch.equal(leap(x, v, 0.75, 0.25), torch.tensor([[-4.0, -8.0], [8.0, 4.0]]))
    t, s = torch.tensor([0.75, 1.0]), torch.tensor([0.25, 0.0])
    assert torch.equal(leap(x, v, t, s), torch.tensor([[-4.0, -8.0], [13.0, 4.0]]))


@all_shifts
def test_rollout_is_euler_and_a_leap_over_one_interval_its_step(shift):
    net, x_T, times, expected = problem(shift=shift)
    states = rollout(net.velocity(net.theta), x_T, times)
    assert len(states) == T + 1 and torch.equal(states[T], x_T)
    assert torch.allclose(torch.stack(states), torch.stack(expected), rtol=0, atol=1e-14)
    for i in range(1, T + 1):
        v = net(net.theta, states[i], times[i])
        assert torch.equal(leap(states[i], v, times[i], times[i - 1]), states[i - 1])


@pytest.mark.parametrize("i_end", range(T + 1))
def test_rollout_stops_at_i_end(i_end):
    net, x_T, times, expected = problem()
    states = rollout(net.velocity(net.theta), x_T, times, i_end)
    assert len(states) == T - i_end + 1
    assert torch.allclose(torch.stack(states), torch.stack(expected[i_end:]), rtol=0, atol=1e-14)


def test_leap_is_exact_for_a_constant_velocity():
    c, x_T, times = torch.tensor([1.0, -2.0, 0.5]), randn(B, 3), grid(T, 2.2243)
    states = rollout(lambda x, t: c.expand_as(x), x_T, times)
    for i_j, i_k in combinations(range(T + 1), 2):
        found = leap(states[i_k], c.expand_as(x_T), times[i_k], times[i_j])
        assert torch.allclose(found, x_T - (1 - times[i_j]) * c, rtol=0, atol=1e-14)


@all_dtypes
@pytest.mark.parametrize("times_dtype", [torch.float64, torch.float32], ids=str)
def test_states_keep_their_dtype_through_a_leap_trajectory(dtype, times_dtype):
    x_T, times = randn(B, 3, dtype=dtype), grid(T, 2.2243, times_dtype)
    trajectory = leap_rollout(lambda x, t: torch.sin(x), x_T, times, 4, 2, 0.3)
    assert all(x.dtype == dtype for x in trajectory)


# General paths


@both_paths
def test_path_runs_from_image_to_noise(path):
    x_0, x_1 = randn(B, 3), randn(B, 3, seed=1)
    assert torch.allclose(interpolate(x_0, x_1, 0, path), x_0, rtol=0, atol=1e-15)
    assert torch.allclose(interpolate(x_0, x_1, 1, path), x_1, rtol=0, atol=1e-15)


def test_interpolate_against_a_hand_calculation():
    x_0, x_1 = torch.tensor([[1.0], [1.0]]), torch.tensor([[3.0], [3.0]])
    assert torch.equal(interpolate(x_0, x_1, 0.25), torch.tensor([[1.5], [1.5]]))
    assert torch.equal(interpolate(x_0, x_1, torch.tensor([0.25, 0.5])), torch.tensor([[1.5], [2.0]]))
    half = interpolate(x_0, x_1, 0.5, COSINE)
    assert torch.allclose(half, torch.full((2, 1), 4 / math.sqrt(2)), rtol=0, atol=1e-15)


@both_paths
def test_path_derivatives_equal_autograd(path):
    t = torch.linspace(0, 1, 11)
    assert torch.allclose(path.da_t(t), vmap(grad(path.a_t))(t), rtol=0, atol=1e-14)
    assert torch.allclose(path.db_t(t), vmap(grad(path.b_t))(t), rtol=0, atol=1e-14)


# Leaps in both directions, between the ends, of zero length, and with one time for each sample
LEAPS = list(product([0, 0.3, 1, [0, 0.4, 1]], [0, 0.2, 1, [1, 0.1, 0]]))
all_leaps = pytest.mark.parametrize("t, s", LEAPS)


@all_leaps
def test_leap_general_is_leap_on_the_rectified_path(t, s):
    t, s = (torch.tensor(u, dtype=torch.float64) for u in (t, s))
    x, v = randn(B, 3), randn(B, 3, seed=1)
    assert torch.allclose(leap_general(x, v, t, s, RECTIFIED), leap(x, v, t, s), rtol=0, atol=1e-14)


@all_leaps
def test_leap_along_the_cosine_path_is_exact(t, s):
    x_0, x_1, quarter = randn(B, 3), randn(B, 3, seed=1), math.pi / 2
    t, s = (torch.tensor(u, dtype=torch.float64) for u in (t, s))
    angle_t, angle_s = (u.reshape(-1, 1) * quarter for u in (t, s))
    x = angle_t.cos() * x_0 + angle_t.sin() * x_1
    v = quarter * (angle_t.cos() * x_1 - angle_t.sin() * x_0)
    expected = angle_s.cos() * x_0 + angle_s.sin() * x_1
    assert torch.allclose(leap_general(x, v, t, s, COSINE), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("path", [RECTIFIED, COSINE, SQUARE], ids=["rectified", "cosine", "square"])
def test_leap_general_is_eq_s7_between_the_ends(path):
    """Eq. S7 holds for any x and v; its printed fractions are defined only inside (0, 1)."""
    x, v = randn(B, 3), randn(B, 3, seed=1)
    for t, s in [(0.9, 0.1), (0.5, 0.4), (0.2, 0.7)]:
        (a, b, da, db), (a_s, b_s, _, _) = ([f(torch.tensor(u)) for f in path] for u in (t, s))
        x_hat_1 = (v - da * x / a) / (db - da * b / a)  # S5
        x_hat_0 = (v - db * x / b) / (da - db * a / b)  # S6
        expected = a_s * x_hat_0 + b_s * x_hat_1
        assert torch.allclose(leap_general(x, v, t, s, path), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("t", [0.0, 0.25, 0.6, 1.0])
@pytest.mark.parametrize("curve", ["rectified", "cosine"])
def test_leap_with_the_true_velocity_is_the_posterior_mean(t, curve):
    """x_0 ~ N(mean, scale^2), x_1 ~ N(0, 1): E[x_0 | x_t], E[x_1 | x_t] and so v(x_t) are regressions on x_t."""
    mean, scale, x = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.3, 1.0, 2.0]), randn(B, 3)
    if curve == "cosine":
        path, u = COSINE, t * math.pi / 2
        a, b, da, db = math.cos(u), math.sin(u), -math.pi / 2 * math.sin(u), math.pi / 2 * math.cos(u)
    else:
        path, a, b, da, db = RECTIFIED, 1 - t, t, -1, 1
    surprise = (x - a * mean) / (a**2 * scale**2 + b**2)
    image, noise = mean + a * scale**2 * surprise, b * surprise
    v = da * image + db * noise
    assert torch.allclose(leap_general(x, v, t, 0.0, path), image, rtol=0, atol=1e-13)
    assert torch.allclose(leap_general(x, v, t, 1.0, path), noise, rtol=0, atol=1e-13)
    if curve == "rectified":
        assert torch.allclose(leap(x, v, t, 0), image, rtol=0, atol=1e-13)


# Connector and discount


@all_dtypes
def test_connector_value_and_gradient(dtype):
    x_hat = (10 * randn(1000, dtype=dtype)).requires_grad_()
    x = randn(1000, seed=1, dtype=dtype).requires_grad_()
    joined = connect(x_hat, x)
    joined.backward(torch.arange(1000).to(dtype))
    assert torch.equal(joined, x)
    assert torch.equal(x_hat.grad, torch.arange(1000).to(dtype)) and x.grad is None
    assert not torch.equal(x_hat + (x - x_hat), x), "the printed form must round, or connect could be simpler"


@all_dtypes
@pytest.mark.parametrize("alpha", [0, 0.1, 0.3, 1])
def test_discount_value_and_gradient(dtype, alpha):
    x = randn(1000, dtype=dtype).requires_grad_()
    out = discount(x, alpha)
    out.backward(torch.ones_like(x))
    assert torch.equal(out, x)
    assert torch.equal(x.grad, torch.full_like(x, alpha))


# The leap trajectory


@all_pairs
@all_shifts
def test_leap_trajectory_takes_its_values_from_the_rollout(pair, shift):
    net, _, times, states = problem(shift=shift)
    (i_k, i_j), velocity = pair, net.velocity(net.theta)
    trajectory = leap_trajectory(velocity, states, times, i_k, i_j, 0.3)
    assert torch.equal(trajectory.x_0, states[0]) and torch.equal(trajectory.x_j, states[i_j])
    x_hat_j = states[i_k] + (times[i_j] - times[i_k]) * velocity(states[i_k], times[i_k])
    x_hat_0 = states[i_j] - times[i_j] * velocity(states[i_j], times[i_j])
    assert torch.allclose(trajectory.x_hat_j, x_hat_j, rtol=0, atol=1e-14)
    assert torch.allclose(trajectory.x_hat_0, x_hat_0, rtol=0, atol=1e-14)


@all_pairs
@all_shifts
@pytest.mark.parametrize("alpha", [0, 0.3, 1])
def test_leap_rollout_equals_rollout_then_leap_trajectory(pair, shift, alpha):
    net, x_T, times, _ = problem(shift=shift)
    one, two = net.leaf(), net.leaf()
    states = rollout(net.velocity(two), x_T, times)
    one_pass = leap_rollout(net.velocity(one), x_T, times, *pair, alpha)
    two_pass = leap_trajectory(net.velocity(two), states, times, *pair, alpha)
    for a, b in zip(one_pass, two_pass):
        assert torch.equal(a, b)
    bumpy(one_pass.x_0).sum().backward()
    bumpy(two_pass.x_0).sum().backward()
    assert torch.equal(one.grad, two.grad)


@all_shapes
def test_a_pair_a_sample_equals_each_sample_alone(shape):
    net, _, times, states = problem(shape)
    i_k, i_j = torch.tensor([6, 4, 2]), torch.tensor([1, 3, 1])
    batch = leap_trajectory(net.velocity(net.theta), states, times, i_k, i_j, 0.3)
    for b in range(B):
        one = [x[b : b + 1] for x in states]
        alone = leap_trajectory(net.velocity(net.theta), one, times, int(i_k[b]), int(i_j[b]), 0.3)
        for x, y in zip(batch, alone):
            assert x.shape == (B, *shape) and torch.allclose(x[b : b + 1], y, rtol=0, atol=1e-14)
        for d, e in zip(distances(batch), distances(alone)):
            assert d.shape == (B,) and torch.allclose(d[b], e[0], rtol=0, atol=1e-14)


@all_methods
@all_shapes
@pytest.mark.parametrize("pairs", ["batch", "sample"])
def test_every_method_takes_any_sample_shape(name, shape, pairs):
    net, x_T, times, _ = problem(shape)
    endpoints, _ = run(name, net.velocity(net.leaf()), x_T, times, Hyper(m=4, pairs=pairs), seeded())
    for x_0, weight in endpoints:
        assert x_0.shape == (B, *shape) and weight.shape == (B,) and x_0.requires_grad and not weight.requires_grad


@all_methods
@pytest.mark.parametrize("pairs", ["batch", "sample"])
def test_no_gradient_reaches_the_noise(name, pairs):
    """With two steps, x_k, or the state at an early stop, is x_T itself in some draws."""
    net, x_T, times = Net(), randn(B, 3).requires_grad_(), grid(2, 2.2243)
    assert not any(x.requires_grad for x in rollout(net.velocity(net.leaf()), x_T, times))
    for seed in range(5):
        endpoints, _ = run(name, net.velocity(net.leaf()), x_T, times, Hyper(m=2, K=2, pairs=pairs), seeded(seed))
        for x_0, _ in endpoints:
            x_0.sum().backward()
    assert x_T.grad is None


# Evaluations of the network


def evaluations(name, hyper, seed=0):
    net, x_T, times, _ = problem()
    recorder = Recorder(net.velocity(net.leaf()))
    _, drawn = run(name, recorder, x_T, times, hyper, seeded(seed))
    on_grid = times.tolist()
    return [on_grid.index(t) for t in recorder.times if t.ndim == 0], recorder, drawn, on_grid


@pytest.mark.parametrize("seed", range(5))
def test_leap_align_evaluates_T_times_two_of_them_with_gradient(seed):
    visited, recorder, drawn, on_grid = evaluations("leap_align", Hyper(), seed)
    assert visited == list(range(T, 0, -1))
    assert recorder.graph_times() == [on_grid[drawn["i_k"]], on_grid[drawn["i_j"]]]


def test_leap_align_with_a_pair_a_sample_evaluates_twice_more():
    visited, recorder, drawn, _ = evaluations("leap_align", Hyper(pairs="sample"))
    assert visited == list(range(T, 0, -1)) and recorder.has_graph == [False] * T + [True] * 2
    times = grid(T, 2.2243)
    assert torch.equal(recorder.times[T], times[drawn["i_k"]])
    assert torch.equal(recorder.times[T + 1], times[drawn["i_j"]])


@pytest.mark.parametrize("seed", range(5))
def test_refl_evaluates_down_to_its_stop_only_there_with_gradient(seed):
    visited, recorder, drawn, _ = evaluations("refl", Hyper(m=4), seed)
    assert visited == list(range(T, drawn["i_min"] - 1, -1))
    assert recorder.has_graph == [False] * (T - drawn["i_min"]) + [True]


@pytest.mark.parametrize("n", [0, 2])
def test_draft_lv_evaluates_the_last_step_n_more_times(n):
    visited, recorder, _, _ = evaluations("draft_lv", Hyper(n=n))
    assert visited == [*range(T, 0, -1), *[1] * n]
    assert recorder.has_graph == [False] * (T - 1) + [True] * (1 + n)


@pytest.mark.parametrize("seed", range(5))
def test_drtune_evaluates_down_to_its_stop_its_trained_timesteps_with_gradient(seed):
    visited, recorder, drawn, on_grid = evaluations("drtune", Hyper(K=3, m=5), seed)
    train = [i for i in range(T, drawn["i_min"] - 1, -1) if i in (drawn["s"], drawn["s"] + 2, drawn["s"] + 4)]
    assert visited == list(range(T, drawn["i_min"] - 1, -1))
    assert recorder.graph_times() == [on_grid[i] for i in train]


def test_full_backprop_evaluates_T_times_all_with_gradient():
    visited, recorder, _, _ = evaluations("full_backprop", Hyper())
    assert visited == list(range(T, 0, -1)) and recorder.has_graph == [True] * T


@all_methods
def test_first_endpoint_is_the_euler_image_or_the_prediction_at_the_early_stop(name):
    net, x_T, times, states = problem()
    endpoints, drawn = run(name, net.velocity(net.theta), x_T, times, Hyper(m=4), seeded())
    i = drawn.get("i_min", 1)
    expected = states[i] - times[i] * net(net.theta, states[i], times[i])
    assert torch.allclose(endpoints[0][0], expected, rtol=0, atol=1e-14)


# The objective


def hand_made():
    """Two samples: d_j = 0.5 and 0, d_0 = 0.25 and 2."""
    return LeapTrajectory(
        x_0=torch.tensor([[1.0, 1.0], [0.0, 0.0]], requires_grad=True),
        x_hat_0=torch.tensor([[1.25, 0.75], [1.0, -3.0]], requires_grad=True),
        x_j=torch.tensor([[2.0, 3.0], [5.0, 5.0]], requires_grad=True),
        x_hat_j=torch.tensor([[3.0, 3.0], [5.0, 5.0]], requires_grad=True),
    )


def test_distances_against_a_hand_calculation():
    d_j, d_0 = distances(hand_made())
    assert torch.equal(d_j, torch.tensor([0.5, 0.0])) and torch.equal(d_0, torch.tensor([0.25, 2.0]))
    assert not d_j.requires_grad and not d_0.requires_grad


@pytest.mark.parametrize(
    "tau, expected",
    [(1e-12, [1 / 0.75, 0.5]), (0.1, [1 / 0.75, 1 / 2.1]), (0.3, [1 / 0.8, 1 / 2.3]), (4.0, [1 / 8, 1 / 8])],
)
def test_similarity_weight_against_a_hand_calculation(tau, expected):
    weight = similarity_weight(hand_made(), tau)
    assert torch.allclose(weight, torch.tensor(expected), rtol=0, atol=1e-10) and not weight.requires_grad


def test_hinge_against_a_hand_calculation():
    reward = torch.tensor([-1.0, 0.25, 0.75], requires_grad=True)
    loss = hinge(reward, 0.5)
    loss.sum().backward()
    assert torch.equal(loss, torch.tensor([1.5, 0.25, 0.0]))
    assert torch.equal(reward.grad, torch.tensor([-1.0, -1.0, 0.0]))


def test_without_lambda_the_hinge_is_minus_the_reward():
    reward = torch.tensor([-1.0, 0.25, 0.75])
    assert torch.equal(hinge(reward, None), torch.tensor([1.0, -0.25, -0.75]))


def test_objective_against_a_hand_calculation():
    reward = torch.tensor([-1.0, 0.25, 0.75], requires_grad=True)
    weight = torch.tensor([2.0, 4.0, 8.0], requires_grad=True)
    loss = objective(reward, weight, 0.5)
    loss.backward()
    assert loss.shape == () and loss.item() == (2 * 1.5 + 4 * 0.25 + 8 * 0) / 3
    assert torch.allclose(reward.grad, torch.tensor([-2 / 3, -4 / 3, 0]), rtol=0, atol=1e-15)
    assert weight.grad is None


# Random draws


def counts(draws):
    found = {}
    for pair in draws:
        found[pair] = found.get(pair, 0) + 1
    return found


def drawn_pairs(form, n, **window):
    generator = seeded()
    if form == "ints":
        return [sample_pair(T, generator, **window) for _ in range(n)]
    return list(zip(*(i.tolist() for i in sample_pair(T, generator, size=n, **window))))


@pytest.mark.parametrize("form", ["ints", "tensors"])
@pytest.mark.parametrize("low, high", [(1, None), (2, 5)])
def test_sample_pair_is_uniform_over_all_pairs_of_its_window(form, low, high):
    pairs = {(i_k, i_j) for i_j, i_k in combinations(range(low, (high or T) + 1), 2)}
    n = 400 * len(pairs)
    found = counts(drawn_pairs(form, n, low=low, high=high))
    assert set(found) == pairs
    # Chi-square has len - 1 degrees of freedom: its mean, plus five standard deviations
    chi_square = sum((count - 400) ** 2 / 400 for count in found.values())
    assert chi_square < len(pairs) - 1 + 5 * math.sqrt(2 * (len(pairs) - 1))


def test_sample_pair_returns_ints_for_a_batch_and_integer_tensors_for_samples():
    i_k, i_j = sample_pair(T, seeded())
    assert type(i_k) is int and type(i_j) is int
    i_k, i_j = sample_pair(T, seeded(), size=5)
    assert i_k.shape == i_j.shape == (5,) and i_k.dtype == i_j.dtype == torch.int64


def test_early_stop_and_drtunes_s_cover_their_ranges():
    net, x_T, times = Net(hidden=1), randn(1, 3), grid(7)
    velocity, hyper = net.velocity(net.theta), Hyper(m=4, K=2)
    refl = {run("refl", velocity, x_T, times, hyper, seeded(i))[1]["i_min"] for i in range(60)}
    drtune = [run("drtune", velocity, x_T, times, hyper, seeded(i))[1] for i in range(60)]
    assert refl == {1, 2, 3, 4} == {d["i_min"] for d in drtune}
    assert {d["s"] for d in drtune} == {1, 2, 3, 4}  # 7 - (2 - 1) * floor(7 / 2)


@all_methods
@pytest.mark.parametrize("pairs", ["batch", "sample"])
def test_methods_draw_only_from_their_generator(name, pairs):
    net, x_T, times, _ = problem()
    before = torch.get_rng_state()
    hyper = Hyper(m=4, pairs=pairs)
    one, other, third = (run(name, net.velocity(net.theta), x_T, times, hyper, seeded(i)) for i in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(one[0], other[0]))
    if name != "full_backprop":
        assert str(one) != str(third)


@all_methods
@pytest.mark.parametrize("pairs", ["batch", "sample"])
def test_two_half_batches_draw_the_same_as_the_full_batch(name, pairs):
    size = 6
    net, x_T, times, hyper = Net(), randn(size, 3, seed=1), grid(T, 2.2243), Hyper(m=4, pairs=pairs)
    full, drawn = run(name, net.velocity(net.theta), x_T, times, hyper, seeded(5))
    halves = []
    for rows in (slice(0, 3), slice(3, 6)):
        generator = BatchGenerator(size, rows)
        generator.manual_seed(5)
        halves.append(run(name, net.velocity(net.theta), x_T[rows], times, hyper, generator))
    for (x_0, weight), *half_endpoints in zip(full, *(endpoints for endpoints, _ in halves)):
        assert torch.allclose(torch.cat([x for x, _ in half_endpoints]), x_0, rtol=0, atol=1e-13)
        assert torch.allclose(torch.cat([w for _, w in half_endpoints]), weight, rtol=1e-12)
    for key, value in drawn.items():
        half_values = [log[key] for _, log in halves]
        if torch.is_tensor(value):
            assert torch.allclose(torch.cat(half_values), value, rtol=0, atol=1e-13)
        else:
            assert half_values == [value, value]


@all_methods
def test_the_log_is_complete_after_the_last_endpoint(name):
    net, x_T, times, _ = problem()
    endpoints = METHODS[name](net.velocity(net.theta), x_T, times, Hyper(m=4), seeded())
    next(endpoints)
    assert endpoints.log == {}
    list(endpoints)
    log = endpoints.log
    expected = {"leap_align": {"i_k", "i_j", "d_j", "d_0"}, "refl": {"i_min"}, "drtune": {"i_min", "s"}}
    assert log.keys() == expected.get(name, set())
    with pytest.raises(StopIteration):
        next(endpoints)
    assert endpoints.log == log


def test_the_papers_hyperparameters_are_the_defaults():
    """HPSv2.1 on FLUX (supplement A5); tau is the official code's."""
    hyper = Hyper()
    assert (hyper.alpha, hyper.lam, hyper.tau) == (0.3, 0.55, 0.1)
    assert (hyper.m, hyper.K, hyper.n) == (11, 2, 2)
    assert (hyper.low, hyper.high, hyper.pairs) == (1, None, "batch")


def test_the_table_of_methods_is_algorithm_1_and_full_backprop():
    assert set(METHODS) == {"leap_align", "refl", "draft_lv", "drtune", "full_backprop"}
