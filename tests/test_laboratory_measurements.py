"""The laboratory's instruments against hand calculations: variants of LeapAlign, method measurements, gradients."""

from functools import partial

import pytest
import torch

from leap_align import METHODS, Hyper, leap_trajectory, sample_pair, similarity_weight, uniform_times
from tests.problems import Net, euler, grid, randn, seeded
from toy.laboratory import variants
from toy.laboratory.gradient_experiments import saved_for_backward, weights_by_similarity
from toy.laboratory.gradients import GradientSampler, Moments, compare_gradients
from toy.laboratory.guidance import GuidedNet
from toy.laboratory.method_measurements import distinct_draws, effective_weights, evaluation_count
from toy.laboratory.train_run import fresh_task


def leaps_of_net(i_k, i_j, trajectory=leap_trajectory):
    """The states of a run of a network on 8 uneven steps, one pair's leap trajectory, and its parameters."""
    net, theta, times = Net(), Net().leaf(), grid(8, 2.2243)
    states = euler(net.velocity(net.theta), randn(5, 3), times)
    return states, trajectory(net.velocity(theta), states, times, i_k, i_j, 0.3), theta


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("indices", [[3], [4, 1], [4, 3, 1]])
def test_gradient_of_several_leaps_against_a_hand_calculation(float64, indices, alpha):
    """v = theta x: every leap adds -(t - s) x and passes on 1 - alpha theta (t - s) times the gradient before it."""
    theta, times, expected = torch.tensor(0.7, requires_grad=True), uniform_times(5).double(), 0.0
    states = [torch.tensor([[float(3 + i)]]) for i in range(6)]
    (*_, (_, x_0)) = variants.multi_leap_trajectory(lambda x, t: theta * x, states, times, indices, alpha)
    for t, s in zip(indices, [*indices[1:], 0]):
        expected -= (t - s) / 5 * (3 + t + 0.7 * alpha * expected)
    assert torch.autograd.grad(x_0.sum(), theta)[0].item() == pytest.approx(expected, abs=1e-7)
    assert x_0.item() == 3


def run_on_net(method, seed=0, T=8):
    """The only endpoint of a method on a small network, its weight and log, and the gradient of the endpoint's sum."""
    net, theta = Net(), Net().leaf()
    ((x_0, weight, log),) = method(net.velocity(theta), randn(5, 3), grid(T, 2.2243), Hyper(), seeded(seed))
    return x_0, weight, log, torch.autograd.grad(x_0.sum(), theta)[0]


@pytest.mark.parametrize("seed", range(5))
def test_a_variant_without_a_change_is_leap_align(float64, seed):
    found, expected = (run_on_net(method, seed) for method in (variants.leap_align_variant, METHODS["leap_align"]))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_weights_of_the_variants_against_a_hand_calculation(float64):
    seed = next(seed for seed in range(100) if sample_pair(8, seeded(seed)) == (7, 3))
    states, leaps, _ = leaps_of_net(7, 3)
    pairs = (states[3], leaps.x_hat_j), (states[0], leaps.x_hat_0)
    d_j, d_0 = ((x - x_hat).abs().mean(1).clamp(min=0.1) for x, x_hat in pairs)
    assert (d_j > 0.1).any() and (d_0 > 0.1).any()
    for name, weight in (("no_weight", torch.ones(5)), ("weight_by_d_j", 1 / d_j), ("weight_by_d_0", 1 / d_0)):
        torch.testing.assert_close(run_on_net(variants.VARIANTS[name], seed)[1], weight)


def test_the_variant_with_two_leaps_has_the_gradient_and_the_weight_of_leap_align(float64):
    i_j, i_k = sorted((1 + torch.randperm(8, generator=seeded(3))[:2]).tolist())
    _, weight, _, gradient = run_on_net(partial(variants.leap_align_with_leaps, 2), seed=3)
    _, leaps, theta = leaps_of_net(i_k, i_j)
    torch.testing.assert_close(weight, similarity_weight(leaps, 0.1))
    torch.testing.assert_close(gradient, torch.autograd.grad(leaps.x_0.sum(), theta)[0])


def test_nested_only_has_the_gradient_of_the_nested_trajectory(float64):
    _, _, log, gradient = run_on_net(variants.VARIANTS["nested_only"])
    _, leaps, theta = leaps_of_net(log["i_k"], log["i_j"], variants.nested_trajectory)
    torch.testing.assert_close(gradient, torch.autograd.grad(leaps.x_0.sum(), theta)[0])


def test_a_variant_can_reward_the_leap(float64):
    x_hat_0, _, log, gradient = run_on_net(variants.VARIANTS["reward_on_leap"], seed=1)
    x_0, _, _, expected = run_on_net(variants.leap_align_variant, seed=1)
    torch.testing.assert_close(gradient, expected)  # a connector passes the leap's gradient on
    # From x_1 the leap would be the Euler step, which is exact.
    assert log["i_j"] > 1 and (x_hat_0 - x_0).abs().max() > 1e-3


@pytest.mark.parametrize(("name", "distance"), [("distance_1", 1), ("distance_6", 6)])
def test_pairs_at_a_fixed_distance_reach_every_j(name, distance):
    logs = [run_on_net(variants.VARIANTS[name], seed)[2] for seed in range(60)]
    assert {log["i_k"] - log["i_j"] for log in logs} == {distance}
    assert {log["i_j"] for log in logs} == set(range(1, 8 - distance + 1))


def test_evaluation_counts_against_a_hand_calculation():
    """Each evaluation counts one, two more with gradient: T = 10, m = 4 (11 of 25), K = 2, n = 2."""
    drtune = [10 - i_min + 1 + 2 * sum(i >= i_min for i in (s, s + 5)) for i_min in range(1, 5) for s in range(1, 6)]
    expected = {
        "leap_align": 10 + 4,
        "leap_align_per_sample": 10 + 6,
        "refl": sum(10 - i + 3 for i in range(1, 5)) / 4,
        "drtune": sum(drtune) / len(drtune),
        "stratified": 9 + 3 + 2 * 3,  # leaps but the last are evaluated again
    }
    counts = {method: evaluation_count(method, 10, 50)["evaluations"] for method in expected}
    assert counts == pytest.approx(expected)
    assert evaluation_count("stratified", 10, 50, K=2)["evaluations"] == 9 + 3 + 3


def test_effective_weights_against_a_hand_calculation():
    T, m = 10, 4  # 11 of 25 steps
    pairs = T * (T - 1) / 2
    expected = {
        "full_backprop": [1 / T] * T,
        "refl": [i / T / m if i <= m else 0 for i in range(1, T + 1)],
        "draft_lv": [3 / T] + [0] * (T - 1),
        "leap_align": [(i * (i - 1) / 2 + (T - i) * i) / T / pairs for i in range(1, T + 1)],
    }
    for method, weights in expected.items():
        assert effective_weights(method, T, 50)["weights"] == pytest.approx(weights, abs=1e-6)


def test_weights_by_similarity_against_a_hand_calculation():
    assert weights_by_similarity([[3, 1, 2.0], [2, 1, 6.0]], 4) == pytest.approx([0.25, 0.1875, 0.125, 0])


def test_distinct_draws_are_all_draws():
    assert [len(distinct_draws(name, 10, 50)[0]) for name in ("leap_align", "refl", "drtune")] == [45, 4, 20]
    assert distinct_draws("leap_align", 10, 45)[1] is True
    assert distinct_draws("leap_align", 10, 44) == (list(range(44)), False)
    assert distinct_draws("draft_lv", 10, 50) == (list(range(5)), False)


def test_moments_against_a_hand_calculation():
    moments = Moments(torch.tensor([1.0, 1.0]), [torch.tensor([3.0, 0.0]), torch.tensor([1.0, 3.0])])
    # Mean (2, 1.5), of norm 2.5; squares 9 and 10, mean 9.5; cosines 1/sqrt(2) and 4/sqrt(20) = sqrt(0.8).
    one_draw = {"one_cosine": (0.5**0.5 + 0.8**0.5) / 2, "one_norm": 9.5**0.5, "variance": 9.5 / 6.25 - 1, "draws": 2}
    assert moments.values() == pytest.approx({"cosine": 3.5 / 2.5 / 2**0.5, "ratio": 2.5 / 2**0.5} | one_draw)


def test_two_steps_at_alpha_1_have_the_true_gradient():
    """The only pair of T = 2 joins Euler steps: full backpropagation, times the greatest weight 1 / (2 tau) = 5."""
    comparison = compare_gradients("toy", 2, 0, max_draws=4, batch_size=16, methods=[], smoke=True)
    exact = comparison["methods"]["leap_align 1"]
    assert (exact["cosine"], exact["variance"]) == pytest.approx((1, 0), abs=1e-5)
    assert exact["ratio"] == pytest.approx(5, abs=1e-3)
    assert comparison["methods"]["leap_align 0"]["cosine"] < 1 - 1e-5
    assert comparison["pairs"] == [[2, 1, pytest.approx(5)]]


def test_gradients_of_pairs_are_those_of_the_method():
    sampler = GradientSampler("toy", 5, 16, smoke=True)
    pairs = {(i_k, i_j): g_0 + 0.3 * (g_1 - g_0) for i_k, i_j, _, g_0, g_1 in sampler.pair_gradients()}
    assert len(pairs) == 10
    for seed in range(6):
        _, _, log, _ = run_on_net(METHODS["leap_align"], seed, T=5)  # draws the same pair
        found = sampler.gradient("leap_align", seed)
        torch.testing.assert_close(pairs[log["i_k"], log["i_j"]], found, rtol=1e-4, atol=1e-5)


def test_a_sampler_measures_after_its_iterations_of_training():
    """The same noise and prompts, so another gradient comes from other weights."""
    fresh, again, trained = (GradientSampler("toy", 5, 16, True, n).gradient("full_backprop", 0) for n in (0, 0, 2))
    assert torch.equal(fresh, again) and not torch.allclose(fresh, trained)


def test_saved_bytes_are_flat_for_leap_align_and_linear_for_full_backprop():
    sizes = [saved_for_backward("toy", T, 16, smoke=True) for T in (4, 8, 12)]
    assert len({size["bytes, leap_align"] for size in sizes}) == 1
    few, more, most = (size["bytes, full_backprop"] for size in sizes)
    assert more - few == most - more > 0


@pytest.mark.parametrize("detached", [False, True])
def test_guidance_extrapolates_and_detached_its_gradient_is_that_of_the_prompt_alone(detached):
    model = GuidedNet(fresh_task("toy", smoke=True))
    x, t, prompt = torch.randn(6, 2, requires_grad=True), torch.tensor(0.3), torch.arange(6)
    with_prompt, without = model.net(x, t, prompt), model.net(x, t, torch.full((6,), 8))
    of_prompt, of_none = (torch.autograd.grad(v.sum(), [x, *model.parameters()]) for v in (with_prompt, without))
    model.detached = detached
    found = model(x, t, prompt)
    torch.testing.assert_close(found, 4 * with_prompt - 3 * without)
    for gradient, p, none in zip(torch.autograd.grad(found.sum(), [x, *model.parameters()]), of_prompt, of_none):
        torch.testing.assert_close(gradient, 4 * p - 3 * none * (not detached))
