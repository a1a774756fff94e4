"""beyond.py: each method's gradient against its formula, assembled from the model's own Jacobians; the solver; draws.

FlowBP's formulas are sums over evaluations, so a problem's expected value is made of dv_i/dtheta and dv_j/dx_j of each
sample alone, of an Euler run made here, and of weights computed here.
"""

import math
from collections import Counter
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from torch.func import jacrev

import beyond
import leap_align
from beyond import (
    AdamsBashforth2,
    Hyper,
    lagrange_piece,
    lagrange_weights,
    late_draw,
    sample_strata,
    sample_thirds,
    sum_piece,
    surrogate,
)
from leap_align import BadInput, BatchGenerator, CutVelocity, cut, rollout
from tests.problems import Net, Recorder, bumpy, euler, grid, randn, seeded

pytestmark = pytest.mark.usefixtures("float64")

TOLERANCE = 1e-12
T, B = 8, 3
HYPERS = {name: Hyper(lam=None, **values) for name, values in beyond.DEFAULTS.items()}
all_methods = pytest.mark.parametrize("name", beyond.METHODS)
all_shifts = pytest.mark.parametrize("shift", [1.0, 2.2243])
all_alphas = pytest.mark.parametrize("alpha", [0, 0.3, 1])
all_shapes = pytest.mark.parametrize("shape", [(3,), (2, 2, 2)], ids=str)
many_seeds = pytest.mark.parametrize("seed", range(4))


def problem(shape=(3,), shift=2.2243, seed=0, steps=T):
    """A network, noise, a grid and the states of an Euler run, made without the code under test."""
    net, x_T, times = Net(shape), randn(B, *shape, seed=seed + 1), grid(steps, shift)
    return net, x_T, times, euler(net.velocity(net.theta), x_T, times)


def finished(name, velocity, x_T, times, hyper, seed=0, loss=lambda x_0, weight: x_0.sum()):
    """A method's endpoints and log after one backward of each endpoint, as its contract asks."""
    endpoints, pairs = beyond.METHODS[name](velocity, x_T, times, hyper, seeded(seed)), []
    for x_0, weight in endpoints:
        loss(x_0, weight).backward()
        pairs.append((x_0, weight))
    return pairs, endpoints.log


def gradient(name, net, x_T, times, hyper, seed=0):
    """A method's gradient of the mean of -r; and its log.  The weight is left out: its own test is below."""
    theta = net.leaf()
    _, log = finished(name, net.velocity(theta), x_T, times, hyper, seed, lambda x_0, _: -bumpy(x_0).mean())
    return theta.grad, log


def jacobians(net, states, times, b):
    """dv_i/dtheta (D, P) and dv_i/dx_i (D, D) of sample b, functions of i."""
    D = states[0][0].numel()

    def dv(i):
        return jacrev(net, argnums=0)(net.theta, states[i][b : b + 1], times[i]).reshape(D, -1)

    def dv_dx(i):
        return jacrev(net, argnums=1)(net.theta, states[i][b : b + 1], times[i]).reshape(D, D)

    return dv, dv_dx


def expected_gradient(net, states, times, dx_0):
    """d(mean -r)/dtheta from dx_0(dv, dv_dx), which gives dx_0/dtheta (D, P) of a sample."""
    total = torch.zeros_like(net.theta)
    for b in range(B):
        dr = torch.func.grad(lambda x: bumpy(x).sum())(states[0][b : b + 1]).flatten()
        total -= dr @ dx_0(*jacobians(net, states, times, b)) / B
    return total


def close(found, expected):
    return expected.abs().max() > 1e-2 and (found - expected).abs().max() < TOLERANCE


# The gradients


@many_seeds
@all_shifts
@pytest.mark.parametrize("K, rho", [(1, 0), (3, 1), (3, 0.4), (T, 1)])
def test_the_gradient_of_sparse_is_flowbps_formula(seed, shift, K, rho):
    net, x_T, times, states = problem((3,), shift, seed)
    found, log = gradient("sparse", net, x_T, times, Hyper(K=K, rho=rho), seed)
    h, active = times.diff(), log["timesteps"]  # h[i - 1] is the length of step i
    gamma = 1 + rho * (1 / sum(h[i - 1] for i in active) - 1)  # all steps together have length 1
    expected = expected_gradient(net, states, times, lambda dv, _: -gamma * sum(h[i - 1] * dv(i) for i in active))
    assert len(active) == len(set(active)) == K and close(found, expected)


@many_seeds
@all_shifts
@all_alphas
@pytest.mark.parametrize("K, rho", [(2, 0), (5, 1), (5, 0.4)])
def test_the_gradient_of_bridge_is_flowbps_formula(seed, shift, alpha, K, rho):
    net, x_T, times, states = problem((3,), shift, seed)
    found, log = gradient("bridge", net, x_T, times, Hyper(K=K, rho=rho, alpha=alpha), seed)
    h, j, active = times.diff(), log["i_j"], log["timesteps"]
    before, after = [i for i in active if i > j], [i for i in active if i <= j]
    gamma_j = 1 + rho * ((1 - times[j]) / sum(h[i - 1] for i in before) - 1)
    gamma_0 = 1 + rho * (times[j] / sum(h[i - 1] for i in after) - 1)

    def dx_0(dv, dv_dx):
        s_j, s_0 = (sum(h[i - 1] * dv(i) for i in part) for part in (before, after))
        return -gamma_j * s_j - gamma_0 * s_0 + alpha * gamma_j * gamma_0 * h[j - 1] * dv_dx(j) @ s_j

    assert j in after and before and close(found, expected_gradient(net, states, times, dx_0))


def interpolation_weights(times, nodes, i_a, i_b):
    """The integrals over a leap of numpy's interpolating polynomials: w_i of each node."""
    t, weights = times.numpy(), {}
    for node in nodes:
        polynomial = np.poly1d([1.0])
        for other in nodes:
            if other != node:
                polynomial *= np.poly1d([1, -t[other]]) / (t[node] - t[other])
        weights[node] = polynomial.integ()(t[i_a]) - polynomial.integ()(t[i_b])
    return weights


NODES = {1: (0,), 2: (0, 1), 3: (0, 1, 2), 4: (0, 2, 3), 5: (0, 2, 4), 6: (0, 3, 5), 7: (0, 3, 6)}
"""Nodes of a leap over n steps, counted from its start."""


@many_seeds
@all_shifts
@all_alphas
@pytest.mark.parametrize("rho, beta", [(0, 0.25), (0.5, 0.25), (1, 0), (0.5, 1)])
def test_the_gradient_of_lagrange_is_flowbps_formula(seed, shift, alpha, rho, beta):
    net, x_T, times, states = problem((3,), shift, seed)
    hyper = Hyper(rho=rho, node_discount=beta, alpha=alpha)
    found, log = gradient("lagrange", net, x_T, times, hyper, seed)
    k, j = log["i_k"], log["i_j"]
    leaps = []
    for i_a, i_b in ((k, j), (j, 0)):
        nodes = [i_a - n for n in NODES[i_a - i_b]]
        w = interpolation_weights(times, nodes, i_a, i_b)
        gamma = 1 + rho * (sum(map(abs, w.values())) / sum(abs(w[i]) for i in nodes[:2]) - 1)
        leaps.append((gamma, w, nodes))

    def dx_0(dv, dv_dx):
        g_j, g_0 = (
            -gamma * (w[nodes[0]] * dv(nodes[0]) + sum(beta * w[m] * dv(m) for m in nodes[1:2]))
            for gamma, w, nodes in leaps
        )
        gamma_0, w_0, _ = leaps[1]
        return g_j + g_0 - alpha * gamma_0 * w_0[j] * dv_dx(j) @ g_j

    assert close(found, expected_gradient(net, states, times, dx_0))


@many_seeds
@all_shifts
@all_alphas
@pytest.mark.parametrize("K", [1, 2, 3, 4, T])
def test_the_gradient_of_stratified_is_a_product_over_its_leaps(seed, shift, alpha, K):
    """dx_{n+1} = (1 - alpha length dv_n/dx) dx_n - length dv_n/dtheta, from dx = 0 at the first leap."""
    net, x_T, times, states = problem((3,), shift, seed)
    found, log = gradient("stratified", net, x_T, times, Hyper(K=K, alpha=alpha), seed)
    indices = [*log["timesteps"], 0]

    def dx_0(dv, dv_dx):
        dx = 0
        for i, i_next in pairwise(indices):
            length = times[i] - times[i_next]
            dx = dx - alpha * length * dv_dx(i) @ dx - length * dv(i) if i != indices[0] else -length * dv(i)
        return dx

    assert close(found, expected_gradient(net, states, times, dx_0))


@all_shapes
@all_shifts
def test_stratified_with_a_leap_a_step_is_the_exact_gradient(shape, shift):
    net, x_T, times, _ = problem(shape, shift)
    found, _ = gradient("stratified", net, x_T, times, Hyper(K=T, alpha=1))
    expected = jacrev(lambda theta: -bumpy(euler(net.velocity(theta), x_T, times)[0]).mean())(net.theta)
    assert close(found, expected)


@all_shifts
@all_alphas
def test_stratified_with_two_leaps_is_leap_align_at_the_same_pair(shift, alpha):
    net, x_T, times, states = problem((3,), shift)
    theta = net.leaf()
    hyper = Hyper(K=2, alpha=alpha)
    [(x_0, weight)], log = finished("stratified", net.velocity(theta), x_T, times, hyper, 3)
    pair, other = log["timesteps"], net.leaf()
    leaps = leap_align.leap_trajectory(net.velocity(other), states, times, *pair, alpha)
    leaps.x_0.sum().backward()
    assert torch.allclose(theta.grad, other.grad, rtol=0, atol=TOLERANCE)
    assert torch.allclose(weight, leap_align.similarity_weight(leaps, hyper.tau), rtol=TOLERANCE)
    assert torch.allclose(x_0, leaps.x_0, rtol=0, atol=TOLERANCE)


# The trainer's backward


@all_methods
@all_alphas
@pytest.mark.parametrize("solver", beyond.SOLVERS)
def test_the_cut_backward_has_the_gradient_of_the_joint_one(name, alpha, solver):
    net, x_T, times, _ = problem()
    hyper = Hyper(K=4, alpha=alpha, solver=solver)
    expected, _ = gradient(name, net, x_T, times, hyper)
    theta = net.leaf()
    velocity = CutVelocity(net.velocity(theta))
    for x_0, _ in beyond.METHODS[name](velocity, x_T, times, hyper, seeded()):
        image = cut(x_0)
        (-bumpy(image).mean()).backward()
        velocity.backward(x_0, image.grad)
    assert close(theta.grad, expected)


class Saved:
    """A tensor that autograd saved, counted as long as autograd keeps it."""

    alive = peak = 0

    def __init__(self, tensor):
        self.tensor = tensor
        Saved.alive += tensor.nbytes
        Saved.peak = max(Saved.peak, Saved.alive)

    def __del__(self):
        Saved.alive -= self.tensor.nbytes


def peak_bytes(name, K, wrap):
    """The most that autograd keeps at one time during a step with K trained timesteps on a grid of 16."""
    net, x_T, times = Net(hidden=200), randn(5, 3), grid(16)
    velocity = wrap(net.velocity(net.leaf()))
    Saved.alive = Saved.peak = 0
    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        for x_0, _ in beyond.METHODS[name](velocity, x_T, times, Hyper(K=K), seeded()):
            if wrap is CutVelocity:
                velocity.backward(x_0, torch.ones_like(x_0))
            else:
                x_0.sum().backward()
    return Saved.peak


@pytest.mark.parametrize("wrap", [lambda velocity: velocity, CutVelocity], ids=["joint", "cut"])
def test_the_memory_of_stratified_does_not_grow_with_the_number_of_leaps(wrap):
    one_evaluation = peak_bytes("sparse", 1, wrap)
    peaks = [peak_bytes("stratified", K, wrap) for K in (2, 4, 8, 16)]
    assert max(peaks) < 1.5 * one_evaluation  # a backward to the input also keeps the weights
    assert max(peaks) - min(peaks) < 0.05 * one_evaluation
    assert peak_bytes("sparse", 8, wrap) > 6 * one_evaluation  # where all evaluations are kept, the measure grows


def test_a_step_of_stratified_without_a_backward_is_refused():
    net, x_T, times, _ = problem()
    with pytest.raises(BadInput, match=r"^no gradient has reached the endpoint: run its backward\(\)[^\n]*$"):
        list(beyond.stratified(net.velocity(net.leaf()), x_T, times, Hyper(), seeded()))
    with torch.no_grad():  # nothing to differentiate
        assert len(list(beyond.stratified(net.velocity(net.leaf()), x_T, times, Hyper(), seeded()))) == 1


# Values


@all_methods
@all_shapes
@pytest.mark.parametrize("solver", beyond.SOLVERS)
def test_the_endpoint_is_the_solvers_image(name, shape, solver):
    net, x_T, times, _ = problem(shape)
    hyper = Hyper(K=4, solver=solver)
    [(x_0, weight)], _ = finished(name, net.velocity(net.leaf()), x_T, times, hyper)
    expected = rollout(net.velocity(net.theta), x_T, times, 0, hyper.step())[0]
    assert torch.equal(x_0, expected) and x_0.requires_grad
    assert weight.shape == (B,) and not weight.requires_grad


@all_methods
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_states_keep_their_dtype(name, dtype):
    x_T, theta = randn(B, 3, dtype=dtype), torch.ones((), dtype=dtype, requires_grad=True)
    [(x_0, _)], _ = finished(name, lambda x, t: theta * torch.sin(x), x_T, grid(T), Hyper(K=4, solver="ab2"))
    assert x_0.dtype == dtype and theta.grad.dtype == dtype


@all_shifts
def test_surrogate_of_every_evaluation_is_the_euler_run(shift):
    """With w_i = h_i and every node active, the estimate is the run itself and its gradient needs no compensation."""
    net, x_T, times, states = problem((3,), shift)
    piece = sum_piece(times, T, 2, list(range(3, T + 1)), 1.0)
    assert set(piece.gains.values()) == {1.0}
    x_hat, x = surrogate(net.velocity(net.theta), x_T, times, piece, 1, leap_align.leap)
    assert torch.allclose(x_hat, states[2], rtol=0, atol=1e-14) and torch.allclose(x, states[2], rtol=0, atol=1e-14)


@many_seeds
def test_the_weight_of_lagrange_is_the_similarity_of_its_estimates(seed):
    net, x_T, times, states = problem(seed=seed)
    [(_, weight)], log = finished("lagrange", net.velocity(net.leaf()), x_T, times, HYPERS["lagrange"], seed)
    gaps = []
    for i_a, i_b in ((log["i_k"], log["i_j"]), (log["i_j"], 0)):
        w = interpolation_weights(times, [i_a - n for n in NODES[i_a - i_b]], i_a, i_b)
        x_hat = states[i_a] - sum(w[i] * net(net.theta, states[i], times[i]) for i in w)
        gaps.append((x_hat - states[i_b]).abs().mean(1))
    assert torch.allclose(log["d_j"], gaps[0], rtol=1e-9) and torch.allclose(log["d_0"], gaps[1], rtol=1e-9)
    assert torch.allclose(weight, 1 / sum(gap.clamp(min=0.2) for gap in gaps), rtol=1e-9)


@pytest.mark.parametrize("name, K", [("sparse", 3), ("bridge", 5)])
def test_the_weight_of_the_other_methods_of_flowbp_is_1(name, K):
    net, x_T, times, _ = problem()
    [(_, weight)], _ = finished(name, net.velocity(net.leaf()), x_T, times, Hyper(K=K))
    assert torch.equal(weight, torch.ones(B))


@pytest.mark.parametrize("K", [1, 3, T])
def test_the_weight_of_stratified_is_the_similarity_of_its_leaps(K):
    net, x_T, times, states = problem()
    [(_, weight)], log = finished("stratified", net.velocity(net.leaf()), x_T, times, Hyper(K=K, tau=0.02))
    total, indices = 0, [*log["timesteps"], 0]
    for i, i_next in pairwise(indices):
        x_hat = states[i] - (times[i] - times[i_next]) * net(net.theta, states[i], times[i])
        total = total + (x_hat - states[i_next]).abs().mean(1).clamp(min=0.02)
    assert torch.allclose(weight, 1 / total, rtol=1e-9)


# Evaluations of the network


def evaluations(name, hyper, seed=0):
    net, x_T, times, _ = problem()
    recorder = Recorder(net.velocity(net.leaf()))
    _, log = finished(name, recorder, x_T, times, hyper, seed)
    on_grid = times.tolist()
    return [on_grid.index(t) for t in recorder.times], recorder, log, on_grid


@many_seeds
@pytest.mark.parametrize("name", ["sparse", "bridge", "lagrange"])
def test_flowbps_methods_evaluate_T_times_active_timesteps_with_gradient(name, seed):
    visited, recorder, log, on_grid = evaluations(name, HYPERS[name], seed)
    with_graph = [on_grid.index(t) for t in recorder.graph_times()]
    assert visited == list(range(T, 0, -1))
    if name == "lagrange":
        ends = ((log["i_k"], log["i_j"]), (log["i_j"], 0))
        assert with_graph == [i_a - n for i_a, i_b in ends for n in NODES[i_a - i_b][:2]]
    else:
        assert with_graph == list(log["timesteps"]) and len(with_graph) == HYPERS[name].K
    through = [on_grid.index(t) for t, on in zip(recorder.times, recorder.state_has_graph) if on]
    assert through == ([] if name == "sparse" else [log["i_j"]])


@many_seeds
@pytest.mark.parametrize("K", [1, 2, 4, T])
def test_stratified_evaluates_all_leaps_but_the_last_twice(seed, K):
    visited, recorder, log, on_grid = evaluations("stratified", Hyper(K=K), seed)
    indices = list(log["timesteps"])
    assert visited == [*range(T, 0, -1), *indices[-2::-1]]
    assert [on_grid.index(t) for t in recorder.graph_times()] == indices[::-1]
    through = [on_grid.index(t) for t, on in zip(recorder.times, recorder.state_has_graph) if on]
    assert through == indices[:0:-1]  # the first leap starts from a constant


# Weights of interpolation


@pytest.mark.parametrize("nodes", [[0.9], [0.9, 0.5], [0.9, 0.7, 0.2], [0.8, 0.3, 0.25]], ids=str)
def test_lagranges_weights_integrate_polynomials_exactly(nodes):
    """As many powers of u as there are nodes: the integral of u^n from s to t is (t^(n+1) - s^(n+1)) / (n + 1)."""
    t, s = nodes[0], 0.1
    weights = lagrange_weights(nodes, t, s)
    for n in range(len(nodes)):
        exact = (t ** (n + 1) - s ** (n + 1)) / (n + 1)
        assert sum(w * u**n for w, u in zip(weights, nodes)) == pytest.approx(exact, abs=1e-14)


def test_on_an_even_grid_a_leap_over_two_steps_gives_its_start_the_weight_0():
    piece = lagrange_piece(grid(T), 5, 3, 0.5, 0.25)
    assert piece.weights[5] == pytest.approx(0, abs=1e-16) and piece.weights[4] == pytest.approx(2 / T)


@pytest.mark.parametrize("steps", NODES)
def test_lagranges_nodes_are_even_and_never_the_end_of_the_leap(steps):
    assert list(lagrange_piece(grid(T), T, T - steps, 0, 0).weights) == [T - n for n in NODES[steps]]


# Draws


def assert_frequencies(draws, expected):
    """Counts against probabilities: chi-square below its mean plus five standard deviations."""
    found, n = Counter(draws), len(draws)
    assert set(found) <= set(expected) and sum(expected.values()) == pytest.approx(1)
    chi_square = sum((found[key] - n * p) ** 2 / (n * p) for key, p in expected.items())
    assert chi_square < len(expected) - 1 + 5 * math.sqrt(2 * (len(expected) - 1))


@pytest.mark.parametrize("late_bias", [0, 1, 2.5])
def test_the_late_draw_takes_one_timestep_after_another_by_its_odds(late_bias):
    """Timesteps 7..4, whose odds are 1, 2^b, 3^b, 4^b; a pair is drawn in either order."""
    odds = {i: float(8 - i) ** late_bias for i in range(7, 3, -1)}
    total = sum(odds.values())
    expected = {
        (a, b): odds[a] / total * odds[b] / (total - odds[a]) + odds[b] / total * odds[a] / (total - odds[b])
        for a, b in combinations(odds, 2)
    }
    generator = seeded()
    assert_frequencies([tuple(late_draw(7, 3, 2, late_bias, generator)) for _ in range(3000)], expected)
    assert late_draw(7, 3, 4, late_bias, generator) == [7, 6, 5, 4] and late_draw(3, 3, 0, late_bias, generator) == []


def test_bridge_takes_the_lower_index_of_a_uniform_pair_and_splits_K_by_length():
    net, x_T, times, logs = Net(hidden=1), randn(1, 3), grid(6), []
    for seed in range(900):
        endpoints = beyond.bridge(net.velocity(net.theta), x_T, times, Hyper(K=4), seeded(seed))
        list(endpoints)
        logs.append(endpoints.log)
    assert_frequencies([log["i_j"] for log in logs], {i: (6 - i) / 15 for i in range(1, 6)})
    counts = {log["i_j"]: sum(i > log["i_j"] for i in log["timesteps"]) for log in logs}
    assert counts == {1: 3, 2: 3, 3: 2, 4: 1, 5: 1}  # round(4 (6 - i_j) / 6), between 1 and 6 - i_j
    assert {log["i_j"]: len(log["timesteps"]) for log in logs} == dict.fromkeys(range(1, 6), 4)


def test_lagrange_splits_the_run_by_a_dirichlet_draw():
    """Mean shares 2.5, 6 and 2 of 10.5; variances a (10.5 - a) / (10.5^2 11.5).  T is large, so rounding is small."""
    generator, steps, n = seeded(), 10_000, 4000
    pairs = [sample_thirds(steps, generator) for _ in range(n)]
    share = torch.tensor([(i_j - 1, i_k - i_j, steps + 1 - i_k) for i_k, i_j in pairs], dtype=torch.float64) / steps
    for parameter, values in zip((2.5, 6.0, 2.0), share.T):
        variance = parameter * (10.5 - parameter) / (10.5**2 * 11.5)
        assert values.mean().item() == pytest.approx(parameter / 10.5, abs=5 * (variance / n) ** 0.5)
        assert values.var().item() == pytest.approx(variance, rel=0.15)


@pytest.mark.parametrize("steps", [3, 4, 8])
def test_every_piece_of_the_run_has_a_step(steps):
    generator = seeded()
    pairs = {sample_thirds(steps, generator) for _ in range(400)}
    assert all(2 <= i_j < i_k <= steps for i_k, i_j in pairs)
    assert steps > 3 or pairs == {(3, 2)}


@pytest.mark.parametrize("steps, K", [(6, 2), (7, 3), (8, 8), (25, 4)])
def test_the_strata_are_equal_parts_that_cover_the_run(steps, K):
    generator, drawn = seeded(), [set() for _ in range(K)]
    for _ in range(600):
        for part, i in zip(drawn, sample_strata(steps, K, generator), strict=True):
            part.add(i)
    assert [i for part in drawn for i in sorted(part, reverse=True)] == list(range(steps, 0, -1))
    assert {len(part) for part in drawn} <= {steps // K, -(-steps // K)}


@all_methods
def test_methods_draw_only_from_their_generator(name):
    net, x_T, times, _ = problem()
    before = torch.get_rng_state()
    one, other, *others = (finished(name, net.velocity(net.leaf()), x_T, times, HYPERS[name], i) for i in (0, 0, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert str(one[1]) == str(other[1]) and torch.equal(one[0][0][1], other[0][0][1])
    assert any(str(one[1]) != str(third[1]) for third in others)
    with pytest.raises(BadInput, match="generator=None"):
        list(beyond.METHODS[name](net.velocity(net.theta), x_T, times, HYPERS[name], None))


@all_methods
def test_two_half_batches_have_the_gradient_of_the_batch(name):
    net, x_T, times = Net(), randn(6, 3, seed=1), grid(T, 2.2243)
    whole, halves = net.leaf(), net.leaf()
    _, log = finished(name, net.velocity(whole), x_T, times, HYPERS[name], 5, lambda x_0, w: (w * bumpy(x_0)).sum())
    for rows in (slice(0, 3), slice(3, 6)):
        generator = BatchGenerator(6, rows)
        generator.manual_seed(5)
        endpoints = beyond.METHODS[name](net.velocity(halves), x_T[rows], times, HYPERS[name], generator)
        for x_0, weight in endpoints:
            (weight * bumpy(x_0)).sum().backward()
        assert all(endpoints.log[key] == value for key, value in log.items() if not torch.is_tensor(value))
    assert torch.allclose(halves.grad, whole.grad, rtol=1e-10, atol=1e-12)


@all_methods
def test_no_gradient_reaches_the_noise_and_every_endpoint_trains(name):
    net, times = Net(), grid(3, 2.2243)
    for seed in range(5):
        x_T, theta = randn(B, 3).requires_grad_(), net.leaf()
        finished(name, net.velocity(theta), x_T, times, Hyper(K=3), seed)
        assert x_T.grad is None and theta.grad.abs().max() > 0


# The solver


def adams_bashforth(velocity, x_T, times):
    """States of a run whose steps integrate the line through the last two velocities; the first step is Euler's."""
    steps = len(times) - 1
    states, v = {steps: x_T}, {}
    for i in range(steps, 0, -1):
        v[i] = velocity(states[i], times[i])
        w = interpolation_weights(times, [i, i + 1][: len(v)], i, i - 1)
        states[i - 1] = states[i] - sum(w[n] * v[n] for n in w)
    return [states[i] for i in range(steps + 1)]


@all_shifts
def test_ab2_integrates_the_line_through_two_velocities(shift):
    net, x_T, times, _ = problem((3,), shift)
    expected = adams_bashforth(net.velocity(net.theta), x_T, times)
    found = rollout(net.velocity(net.theta), x_T, times, 0, AdamsBashforth2())
    assert torch.allclose(torch.stack(found), torch.stack(expected), rtol=0, atol=TOLERANCE)


@all_shifts
def test_ab2_is_of_second_order(shift):
    """dx/dt = x cos(6 t), so x_0 = x_1 exp(-sin(6) / 6): the error falls by four when T doubles, Euler's by two."""
    x_T = torch.ones(1, 1)
    exact = math.exp(-math.sin(6) / 6)

    def errors(solver):
        runs = (rollout(lambda x, t: x * torch.cos(6 * t), x_T, grid(n, shift), 0, solver()) for n in (100, 200, 400))
        return [abs(states[0].item() - exact) for states in runs]

    for solver, order in ((beyond.SOLVERS["ab2"], 2), (beyond.SOLVERS["euler"], 1)):
        coarse, middle, fine = errors(solver)
        assert coarse / middle == pytest.approx(2**order, rel=0.08)
        assert middle / fine == pytest.approx(2**order, rel=0.04)


@all_alphas
@pytest.mark.parametrize("pairs", ["batch", "sample"])
def test_leap_align_over_ab2_has_eq_s18s_gradient_at_ab2s_states(alpha, pairs):
    net, x_T, times, _ = problem()
    states = adams_bashforth(net.velocity(net.theta), x_T, times)
    theta, hyper = net.leaf(), Hyper(alpha=alpha, pairs=pairs, solver="ab2")
    endpoints = leap_align.METHODS["leap_align"](net.velocity(theta), x_T, times, hyper, seeded())
    for x_0, _ in endpoints:
        assert torch.allclose(x_0, states[0], rtol=0, atol=TOLERANCE)
        (-bumpy(x_0).mean()).backward()
    i_k, i_j = (torch.as_tensor(endpoints.log[name]).expand(B).tolist() for name in ("i_k", "i_j"))
    expected = torch.zeros_like(net.theta)
    for b in range(B):
        dv, dv_dx = jacobians(net, states, times, b)
        k, j = times[i_k[b]], times[i_j[b]]
        dx = -j * dv(i_j[b]) - (k - j) * dv(i_k[b]) + alpha * j * (k - j) * dv_dx(i_j[b]) @ dv(i_k[b])
        expected -= torch.func.grad(lambda x: bumpy(x).sum())(states[0][b : b + 1]).flatten() @ dx / B
    assert close(theta.grad, expected)


def test_full_backprop_over_ab2_is_the_gradient_of_its_run():
    net, x_T, times, _ = problem()
    theta = net.leaf()
    [(x_0, _)] = leap_align.full_backprop(net.velocity(theta), x_T, times, Hyper(solver="ab2"), seeded())
    (-bumpy(x_0).mean()).backward()
    other = net.leaf()
    (-bumpy(adams_bashforth(net.velocity(other), x_T, times)[0]).mean()).backward()
    expected = other.grad
    assert close(theta.grad, expected)


@pytest.mark.parametrize("name", ["refl", "draft_lv", "drtune"])
def test_the_baselines_take_ab2s_states(name):
    """Until an early stop, where ReFL and DRTune predict the image by a leap."""
    net, x_T, times, _ = problem()
    states = adams_bashforth(net.velocity(net.theta), x_T, times)
    endpoints = leap_align.METHODS[name](net.velocity(net.theta), x_T, times, Hyper(m=4, solver="ab2"), seeded(1))
    x_0, i = next(endpoints)[0], 0
    list(endpoints)
    if i := endpoints.log.get("i_min", 0):
        assert i > 1
        expected = states[i] - times[i] * net(net.theta, states[i], times[i])
    assert torch.allclose(x_0, expected if i else states[0], rtol=0, atol=TOLERANCE)


# Wrong arguments


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rho": 1.1}, "rho=1.1 must lie in"),
        ({"rho": math.nan}, "rho=nan"),
        ({"node_discount": -0.1}, "node_discount=-0.1 must lie in"),
        ({"late_bias": -1.0}, "late_bias=-1.0 must lie in"),
        ({"late_bias": math.inf}, "late_bias=inf"),
        ({"solver": "heun"}, "solver='heun' must be one of euler, ab2"),
        ({"alpha": 2.0}, "alpha=2.0 must lie in"),
    ],
    ids=str,
)
def test_a_hyperparameter_out_of_range_is_refused_in_one_line(changes, words):
    with pytest.raises(BadInput, match=rf"^{words}[^\n]*$"):
        Hyper(**changes)


@pytest.mark.parametrize("name", ["sparse", "bridge", "stratified"])
def test_more_trained_timesteps_than_T_are_refused(name):
    with pytest.raises(BadInput, match=f"^K=9 must be at most T={T}$"):
        next(beyond.METHODS[name](lambda x, t: x, randn(B, 3), grid(T), Hyper(K=9), seeded()))


def test_lagrange_needs_three_steps():
    with pytest.raises(BadInput, match=r"^T=2 must be at least 3"):
        next(beyond.lagrange(lambda x, t: x, randn(B, 3), grid(2), Hyper(), seeded()))


@all_methods
def test_a_bad_grid_and_a_velocity_of_another_shape_are_refused_in_one_line(name):
    for times in ([1.0, 0.5, 0.0], [0.0, 0.5, 0.9], [0.0]):
        with pytest.raises(BadInput, match=r"^times=\[[^\n]*ascend[^\n]*$"):
            next(beyond.METHODS[name](lambda x, t: x, randn(B, 3), torch.tensor(times), Hyper(), seeded()))
    for bad in (lambda x, t: x[:, :1], lambda x, t: x[:, :2]):
        with pytest.raises(BadInput, match=r"^the velocity's shape [^\n]*$"):
            next(beyond.METHODS[name](bad, randn(B, 3), grid(T), Hyper(K=3, solver="ab2"), seeded()))


def test_the_defaults_are_flowbps_for_flux():
    """K, b and rho of Sparse; K, b, rho and alpha of Bridge; alpha, tau, rho and beta of Lagrange."""
    sparse, bridge, lagrange = (HYPERS[name] for name in ("sparse", "bridge", "lagrange"))
    assert (sparse.K, sparse.late_bias, sparse.rho) == (3, 2, 1)
    assert (bridge.K, bridge.late_bias, bridge.rho, bridge.alpha) == (5, 2, 1, 0.1)
    assert (lagrange.alpha, lagrange.tau, lagrange.rho, lagrange.node_discount) == (0.1, 0.2, 0.5, 0.25)
    assert set(beyond.DEFAULTS) == set(beyond.METHODS) == {"sparse", "bridge", "lagrange", "stratified"}
