"""beyond.py: each method's gradient against its formula, assembled from the model's own Jacobians; the solver; draws.

FlowBP's formulas are sums over evaluations, so a problem's expected value is made of dv_i/dtheta and dv_j/dx_j of each
sample alone, of an Euler run made here, and of weights computed here.
"""

from collections import Counter
from functools import partial
from itertools import combinations, pairwise

import pytest
import torch

import beyond
from beyond import Hyper, late_draw, sample_strata, sample_thirds
from leap_align import rollout
from tests.oracles import assert_frequencies, eq_s18, flowbp_nodes, interpolation_weights, mean_reward, reward_gradient
from tests.problems import HYPERS, B, Net, close, gradient, grid, problem, randn, run, seeded

pytestmark = pytest.mark.usefixtures("float64")

T = 8
problem_8 = partial(problem, steps=T)


def check_gradient(name, hyper, shift, seed, formula):
    """A method's gradient of the mean of -r, against formula(log, times, dv, dv_dx), which gives dx_0/dtheta (D, P)."""
    net, x_T, times, states = problem_8(shift=shift, seed=seed)
    found, log = gradient(name, net, x_T, times, hyper, seed + int(10 * shift), mean_reward)
    expected = reward_gradient(net, states, times, lambda b, dv, dv_dx: formula(log, times, dv, dv_dx))
    assert close(found, expected)


# The gradients
@pytest.mark.parametrize("K, rho", [(1, 0), (3, 1), (3, 0.4), (T, 1)])
def test_the_gradient_of_sparse_is_flowbps_formula(seed, shift, K, rho):
    def dx_0(log, times, dv, _):
        h, active = times.diff(), log["timesteps"]  # h[i - 1] is the length of step i
        gamma = 1 + rho * (1 / sum(h[i - 1] for i in active) - 1)  # all steps together have length 1
        return -gamma * sum(h[i - 1] * dv(i) for i in active)

    check_gradient("sparse", Hyper(K=K, rho=rho), shift, seed, dx_0)


@pytest.mark.parametrize("K, rho", [(2, 0), (2, 1), (5, 1), (5, 0.4)])
def test_the_gradient_of_bridge_is_flowbps_formula(seed, shift, alpha, K, rho):
    def dx_0(log, times, dv, dv_dx):
        h, j, active = times.diff(), log["i_j"], log["timesteps"]
        assert j in active and len(active) <= K
        gamma = 1 + rho * (1 / sum(h[i - 1] for i in active) - 1)  # all steps together have length 1
        term = {i: gamma * h[i - 1] * dv(i) for i in active}
        return alpha * gamma * h[j - 1] * dv_dx(j) @ sum(v for i, v in term.items() if i > j) - sum(term.values())

    check_gradient("bridge", Hyper(K=K, rho=rho, alpha=alpha), shift, seed, dx_0)


def lagrange_leaps(log, times):
    """The ends of the two leaps, and the weights of each one's nodes."""
    leaps = ((log["i_k"], log["i_j"]), (log["i_j"], 0))
    return [(a, b, interpolation_weights(times, flowbp_nodes(T, a, b), a, b)) for a, b in leaps]


@pytest.mark.parametrize("rho, delta", [(0, 0.25), (0.5, 0.25), (1, 0), (0.5, 1)])
def test_the_gradient_of_lagrange_is_flowbps_formula(seed, shift, alpha, rho, delta):
    def dx_0(log, times, dv, dv_dx):
        parts = []
        for start, _, w in lagrange_leaps(log, times):
            active = list(w)[:2]
            gamma = 1 + rho * (sum(map(abs, w.values())) / sum(abs(w[i]) for i in active) - 1)
            g = -gamma * (w[start] * dv(start) + sum(delta * w[m] * dv(m) for m in active[1:]))
            parts.append((gamma * w[start], g))
        (_, g_j), (gamma_w_j, g_0) = parts
        return g_j + g_0 - alpha * gamma_w_j * dv_dx(log["i_j"]) @ g_j

    check_gradient("lagrange", Hyper(rho=rho, node_discount=delta, alpha=alpha), shift, seed, dx_0)


@pytest.mark.parametrize(
    ("i_a", "i_b", "nodes"), [(25, 20, [25, 23, 21]), (25, 21, [25, 23, 22]), (24, 20, [24, 23, 21]), (2, 0, [2, 1])]
)
def test_the_middle_node_of_lagrange_is_rounded_in_flowbps_index(i_a, i_b, nodes):
    """FlowBP counts f = 25 - i: the middle of 0 and 3 is 2 (1.5 to even), that of 1 and 4 is 2 (2.5 to even)."""
    assert list(beyond.lagrange_piece(grid(25), i_a, i_b, 1.0, 0.25).weights) == nodes


@pytest.mark.parametrize("K", [1, 2, 3, 4, T])
def test_the_gradient_of_stratified_is_a_product_over_its_leaps(seed, shift, alpha, K):
    """The formula is dx_{n+1} = (1 - alpha length dv_n/dx) dx_n - length dv_n/dtheta, from dx = 0 at the first leap."""

    def dx_0(log, times, dv, dv_dx):
        dx = torch.zeros_like(dv(1))
        for i, i_next in pairwise([*log["timesteps"], 0]):
            length = times[i] - times[i_next]
            dx = dx - alpha * length * dv_dx(i) @ dx - length * dv(i)
        return dx

    check_gradient("stratified", Hyper(K=K, alpha=alpha), shift, seed, dx_0)


# Values
def test_the_weight_of_lagrange_is_the_similarity_of_its_estimates(seed):
    net, x_T, times, states = problem_8(seed=seed)
    [(_, weight)], log = run("lagrange", net.velocity(net.leaf()), x_T, times, HYPERS["lagrange"], seeded(seed))
    gaps = []
    for start, end, w in lagrange_leaps(log, times):
        x_hat = states[start] - sum(w[i] * net(net.theta, states[i], times[i]) for i in w)
        gaps.append((x_hat - states[end]).abs().mean(1))
    assert torch.allclose(log["d_j"], gaps[0], rtol=1e-9) and torch.allclose(log["d_0"], gaps[1], rtol=1e-9)
    assert torch.allclose(weight, 1 / sum(gap.clamp(min=0.2) for gap in gaps), rtol=1e-9)


@pytest.mark.parametrize("name, K", [("stratified", 1), ("stratified", 3), ("stratified", T), ("leap_align", 2)])
def test_the_weight_of_stratified_and_leap_align_is_the_similarity_of_its_leaps(name, K):
    net, x_T, times, states = problem_8()
    [(_, weight)], log = run(name, net.velocity(net.leaf()), x_T, times, Hyper(K=K, tau=0.02), seeded())
    total = 0
    for i, i_next in pairwise([*log.get("timesteps", (log.get("i_k"), log.get("i_j"))), 0]):
        x_hat = states[i] - (times[i] - times[i_next]) * net(net.theta, states[i], times[i])
        total = total + (x_hat - states[i_next]).abs().mean(1).clamp(min=0.02)
    assert torch.allclose(weight, 1 / total, rtol=1e-9)


# Weights of interpolation
# Draws
@pytest.mark.parametrize("late_bias", [0, 1, 2.5])
def test_the_late_draw_takes_one_timestep_after_another_by_its_odds(late_bias):
    """Timesteps 7..4, whose odds are 1, 2^b, 3^b, 4^b; a pair is drawn in either order."""
    odds = {i: float(8 - i) ** late_bias for i in range(7, 3, -1)}
    total = sum(odds.values())
    in_turn = lambda a, b: odds[a] / total * odds[b] / (total - odds[a])  # noqa: E731
    expected = {(a, b): in_turn(a, b) + in_turn(b, a) for a, b in combinations(odds, 2)}
    generator = seeded()
    assert_frequencies(Counter(tuple(late_draw(7, 3, 2, late_bias, generator)) for _ in range(3000)), expected)
    assert late_draw(7, 3, 4, late_bias, generator) == [7, 6, 5, 4] and late_draw(3, 3, 0, late_bias, generator) == []


def test_bridge_draws_the_lower_index_of_a_uniform_pair_and_splits_K_by_length():
    net, x_T, times = Net(hidden=1), randn(1, 3), grid(6)
    logs = [run("bridge", net.velocity(net.theta), x_T, times, Hyper(K=4), seeded(seed))[1] for seed in range(900)]
    assert_frequencies(Counter(log["i_j"] for log in logs), {i: (6 - i) / 15 for i in range(1, 6)})
    counts = {(log["i_j"], len(log["timesteps"]), sum(i > log["i_j"] for i in log["timesteps"])) for log in logs}
    # round(4 (6 - i_j) / 6) before i_j, but between 1 and 6 - i_j; 4 in all
    assert counts == {(1, 4, 3), (2, 4, 3), (3, 4, 2), (4, 4, 1), (5, 4, 1)}


@pytest.mark.parametrize("steps, K", [(25, 5), (25, 2), (5, 5), (4, 1)])
def test_bridge_never_trains_more_than_K_timesteps(steps, K):
    net, x_T, times = Net(hidden=1), randn(1, 3), grid(steps)
    logs = [run("bridge", net.velocity(net.theta), x_T, times, Hyper(K=K), seeded(seed))[1] for seed in range(150)]
    assert {len(set(log["timesteps"])) for log in logs} == {K} and 1 in {log["i_j"] for log in logs}
    assert all(log["i_j"] in log["timesteps"] for log in logs)


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
def test_every_piece_of_the_dirichlet_draw_has_a_step(steps):
    generator = seeded()
    pairs = {sample_thirds(steps, generator) for _ in range(400)}
    assert all(2 <= i_j < i_k <= steps for i_k, i_j in pairs)
    assert steps > 3 or pairs == {(3, 2)}


@pytest.mark.parametrize("steps, K", [(6, 2), (7, 3), (8, 8), (25, 4)])
def test_the_strata_are_equal_parts_that_cover_the_run(steps, K):
    generator = seeded()
    drawn = [set(part) for part in zip(*(sample_strata(steps, K, generator) for _ in range(600)), strict=True)]
    assert [i for part in drawn for i in sorted(part, reverse=True)] == list(range(steps, 0, -1))
    assert {len(part) for part in drawn} <= {steps // K, -(-steps // K)}


# The solver
def test_ab2_integrates_the_line_through_two_velocities(shift):
    net, x_T, times, expected = problem_8(shift=shift, solver="ab2")
    found = rollout(net.velocity(net.theta), x_T, times, 0, beyond.SOLVERS["ab2"]())
    assert close(torch.stack(found), torch.stack(expected))


@pytest.mark.parametrize("name", ["leap_align", "leap_align_per_sample"])
def test_leap_align_over_ab2_has_eq_s18s_gradient_at_ab2s_states(alpha, name):
    net, x_T, times, states = problem_8(solver="ab2")
    found, log = gradient(name, net, x_T, times, Hyper(alpha=alpha), 0, mean_reward, "ab2")
    i_k, i_j = (torch.as_tensor(log[key]).expand(B).tolist() for key in ("i_k", "i_j"))
    assert close(found, reward_gradient(net, states, times, lambda b, *dv: eq_s18(times, i_k[b], i_j[b], alpha, *dv)))


def test_the_defaults_are_flowbps_for_flux():
    """K, b and rho of Sparse; K, b, rho and alpha of Bridge; alpha, tau, rho and beta of Lagrange."""
    assert HYPERS["sparse"] == Hyper(m=4, K=3, late_bias=2, rho=1)
    assert HYPERS["bridge"] == Hyper(m=4, K=5, late_bias=2, rho=1, alpha=0.1)
    assert HYPERS["lagrange"] == Hyper(m=4, alpha=0.1, tau=0.2, rho=0.5, node_discount=0.25)
    assert beyond.DEFAULTS.keys() <= beyond.METHODS.keys()
