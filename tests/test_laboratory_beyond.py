"""The laboratory's `beyond`: counted evaluations, policy gradient and replay, the choice of settings, the headline."""

import math
from itertools import pairwise

import pytest
import torch

from beyond import DEFAULTS, Hyper
from leap_align import rollout, uniform_times
from tests.problems import randn, seeded
from toy.laboratory import beyond, other_trainers, plots, train_run
from toy.laboratory.beyond import Setting
from toy.laboratory.gradients import INPUT_SEED, GradientSampler, step_fidelity
from toy.laboratory.laboratory import SMOKE, Laboratory, Scale
from toy.laboratory.other_trainers import GROUP, TRAINERS, NoisyStep, advantages, noisy_mean
from toy.laboratory.result_cache import ResultCache
from toy.laboratory.train_run import EvaluationCounter, budget_run, fresh_task, make_trainer
from train_leap_align import METHODS

# Counted evaluations


def trainer_of(method, T=10, **hyper):
    values = {"lam": None, "m": 4} | DEFAULTS.get(method, {}) | hyper
    return make_trainer(fresh_task("toy", T, smoke=True), method, 1e-3, 16, 0, 0.99, Hyper(**values))


@pytest.mark.parametrize(
    ("method", "hyper", "expected"),
    [
        ("leap_align", {}, 10 + 2 * 2),
        ("draft_lv", {}, 10 + 2 + 2 * 3),
        ("full_backprop", {}, 3 * 10),
        ("sparse", {"K": 4}, 10 + 2 * 4),
        ("bridge", {"K": 5}, 10 + 2 * 5),
        ("stratified", {"K": 3}, 10 + 2 + 2 * 3),
        ("stratified", {"K": 3, "solver": "ab2"}, 10 + 2 + 2 * 3),
        ("leap_align", {"beta": 1.0}, 10 + 2 * 2 + 2 + 1),  # two of the reference, and a backward to x_j
        ("dancegrpo", {}, 10 + 3 * math.ceil(0.6 * 9)),
        ("mixgrpo", {}, 10 + 3 * 2),
    ],
)
def test_evaluations_of_an_iteration_against_a_hand_calculation(method, hyper, expected):
    trainer = trainer_of(method, **hyper)
    counter = EvaluationCounter(trainer)
    with counter:
        trainer.step()
    trainer.evaluate()
    assert counter.count == expected


def test_a_sampling_run_is_replayed_for_four_updates():
    trainer = trainer_of("replay")
    counts, counter, weights = [], EvaluationCounter(trainer), []
    for _ in range(8):
        before = counter.count
        with counter:
            trainer.step()
        counts.append(counter.count - before)
        weights.append(trainer.task.model.body[0].weight.clone())
    assert counts == [16, 6, 6, 6] * 2
    assert all((a != b).any() for a, b in pairwise(weights))


def test_a_run_is_evaluated_at_the_iteration_next_to_each_budget():
    run = budget_run("toy", "leap_align", 10, 1e-3, 0, [0, 20, 40, 70], {}, smoke=True)
    assert not run["error"]
    assert [metrics["evaluations"] for metrics in run["metrics"]] == [0, 14, 42, 70]
    assert [metrics["iterations"] for metrics in run["metrics"]] == [0, 1, 3, 5]


@pytest.mark.parametrize(
    ("method", "T", "hyper", "expected"),
    [
        ("leap_align", 25, {}, {"alpha": 0.3, "lam": 0.0, "beta": 0.0}),
        ("leap_align", 25, {"lam": None, "beta": 3.0}, {"lam": None, "beta": 3.0}),
        ("sparse", 25, {}, {"lam": 0.0, "K": 3}),
        ("bridge", 8, {"K": 2}, {"alpha": 0.1, "K": 2}),
        ("refl", 25, {}, {"m": 11}),
        ("refl", 5, {}, {"m": 2}),
    ],
)
def test_a_run_trains_with_the_methods_own_hyperparameters_and_a_hinge_at_0(monkeypatch, method, T, hyper, expected):
    class Built(Exception):
        pass

    def make_trainer(task, method, lr, batch_size, seed, ema_decay, hyper):
        assert {name: getattr(hyper, name) for name in expected} == expected
        raise Built

    monkeypatch.setattr(train_run, "make_trainer", make_trainer)
    with pytest.raises(Built):
        budget_run("toy", method, T, 1e-3, 0, [10], hyper, smoke=True)


def test_a_run_that_breaks_keeps_what_it_has_and_its_error():
    run = budget_run("toy", "leap_align", 10, 1e30, 0, [0, 700], {}, smoke=True)
    assert len(run["metrics"]) == 1 and "steps in a row skipped" in run["error"]


# Policy gradient


def test_noise_does_not_change_the_marginals():
    """Data N(m, s^2) has the exact velocity below; the walk ends there whatever eta is, up to its steps' error."""
    m, s, n, T = 1.5, 0.5, 20_000, 400
    times, x_T = uniform_times(T).double(), randn(n, 1)

    def velocity(x, t):
        variance = (1 - t) ** 2 * s**2 + t**2
        return -m + (t - (1 - t) * s**2) / variance * (x - (1 - t) * m)

    for eta in (0.0, 0.7, 1.4):
        step = NoisyStep(T, list(range(T, 1, -1)), eta, seeded(1))
        x = rollout(velocity, x_T, times, 0, step)[0]
        assert abs(x.mean().item() - m) < 0.02 and abs(x.std().item() - s) < 0.02
        assert len(step.taken) == T - 1


def test_advantages_against_a_hand_calculation():
    reward = torch.tensor([1.0, 3.0] * (GROUP // 2) + [5.0] * GROUP)
    assert advantages(reward).tolist() == pytest.approx([-1, 1] * (GROUP // 2) + [0] * GROUP)
    assert advantages(torch.eye(GROUP)[0]).tolist() == pytest.approx([7**0.5] + [-(7**-0.5)] * (GROUP - 1))


def noisy_problem(trainer):
    """A step of the walk from timestep 6 to 5 of 16 samples, taken with the trainer's own weights."""
    task, i = trainer.task, 6
    prompts, x = torch.arange(16) % 8, randn(16, 2, dtype=torch.float32)
    t, s = task.times[i], task.times[i - 1]
    mu = noisy_mean(x, task.velocity(prompts)(x, t), t, s, trainer.eta).detach()
    x_s = mu + trainer.eta * (t - s).sqrt() * randn(16, 2, seed=1, dtype=torch.float32)
    return i, prompts, (x, mu, x_s)


def test_the_first_update_has_the_policy_gradient():
    """At q = 1 the gradient is that of -mean A log p, with the Gaussian's log density from torch.distributions."""
    trainer = trainer_of("dancegrpo")
    i, prompts, (x, mu, x_s) = noisy_problem(trainer)
    advantage, weights = randn(16, seed=2, dtype=torch.float32), list(trainer.task.model.parameters())
    loss = trainer.loss(i, [x, mu, x_s], prompts, advantage)
    found = torch.autograd.grad(loss, weights)
    t, s = trainer.task.times[i], trainer.task.times[i - 1]
    v = trainer.task.model(x, t, prompts)
    score = -(x + (1 - t) * v) / t
    mean = x + (s - t) * v - 0.3**2 / 2 * (s - t) * score
    walk = torch.distributions.Normal(mean, 0.3 * (t - s).sqrt())
    expected = torch.autograd.grad(-(advantage * walk.log_prob(x_s).sum(1)).mean(), weights)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    assert loss.item() == pytest.approx(-advantage.mean().item(), abs=1e-5)


@pytest.mark.parametrize(("old", "advantage"), [(2.0, 1), (2.0, -1), (0.1, 1), (0.1, -1)])
def test_a_step_whose_probability_has_changed_enough_has_no_gradient(old, advantage):
    """old: how far mu_old is from x_s, over the new mu's distance; above 1 the step has become more probable."""
    trainer = trainer_of("dancegrpo")
    i, prompts, (x, mu, _) = noisy_problem(trainer)
    x_s = mu + 0.15  # 1.6 standard deviations in each of two dimensions: q is 1e3 or 0.08
    loss = trainer.loss(i, [x, x_s - 0.15 * old, x_s], prompts, torch.full((16,), float(advantage)))
    (gradient,) = torch.autograd.grad(loss, trainer.task.model.body[0].weight)
    assert (gradient.abs().max() > 1e-4) == ((old > 1) == (advantage < 0))


def test_a_group_has_one_prompt_and_one_noise(monkeypatch):
    seen, trainer = [], trainer_of("mixgrpo")
    monkeypatch.setattr(trainer.task, "reward", lambda x, prompts: seen.append(prompts) or x.sum(1))
    monkeypatch.setattr(other_trainers, "rollout", lambda v, x_T, *rest: seen.append(x_T) or rollout(v, x_T, *rest))
    trainer.step()
    assert len(seen) == 2
    for drawn in seen:
        groups = drawn.reshape(2, GROUP, -1)
        assert (groups == groups[:, :1]).all() and (groups[0] != groups[1]).any()


@pytest.mark.parametrize("trained", [[8], [8, 7, 6]])
def test_a_sampling_run_has_two_updates_each_with_the_mean_over_the_trained_timesteps(monkeypatch, trained):
    """Every timestep of every half of the groups has the gradient 1; so has their mean, however many there are."""
    trainer, gradients = trainer_of("dancegrpo"), []
    weight = trainer.task.model.body[0].weight
    monkeypatch.setattr(trainer, "timesteps", lambda: (trained, trained))
    monkeypatch.setattr(trainer, "loss", lambda *_: weight.sum())

    def optimizer_step(loss):
        gradients.append(weight.grad.clone())
        weight.grad = None
        return 0.0

    monkeypatch.setattr(trainer, "optimizer_step", optimizer_step)
    trainer.step()
    assert len(gradients) == 2
    for gradient in gradients:
        torch.testing.assert_close(gradient, torch.ones_like(gradient))


def test_the_noise_of_the_walks_is_that_of_the_papers():
    assert (TRAINERS["dancegrpo"].eta, TRAINERS["mixgrpo"].eta) == (0.3, 0.7)


def test_the_window_slides_from_the_noise_to_the_image_and_returns():
    trainer = trainer_of("mixgrpo", T=25)
    windows = []
    for iteration in range(0, 25 * 23, 25):
        trainer.progress.iteration = iteration
        windows.append(trainer.timesteps()[0])
    assert windows[0] == [25, 24, 23, 22] and windows[1] == [24, 23, 22, 21] and windows[20] == [5, 4, 3, 2]
    assert windows[21] == windows[0]
    assert all(trainer.timesteps()[0] == trainer.timesteps()[1] for _ in range(3))


def test_policy_gradient_raises_a_reward_that_has_no_gradient(monkeypatch):
    """The reward is a count: how many coordinates are positive."""
    trainer = trainer_of("dancegrpo", T=8)
    monkeypatch.setattr(trainer.task, "reward", lambda x, prompts: (x > 0).float().sum(1))
    rewards = [trainer.step()["reward"] for _ in range(40)]
    assert sum(rewards[-8:]) / 8 > sum(rewards[:8]) / 8 + 0.3


# Gradients


def test_a_step_of_the_exact_gradient_has_the_cosine_1():
    """K = T strata at alpha = 1 are full backpropagation; w is a constant there, as every leap is exact."""
    found = step_fidelity("toy", "stratified", 4, {"K": 4}, cost=16 * 15, draws=3, batch_size=16, smoke=True)
    assert found["evaluations"] == 4 + 3 * 4 - 1 and found["batch_size"] == 16
    assert found["cosine"] == pytest.approx(1, abs=1e-5)
    # The weight is 1 / (4 tau), and that of full backpropagation 1.
    assert found["ratio"] == pytest.approx(1 / 0.4, rel=1e-4)
    assert 0 < found["step_cosine"] < 1 - 1e-3


def test_a_step_of_equal_cost_has_new_noise_and_as_many_samples_as_its_cost_allows(monkeypatch):
    drawn, sample_inputs = [], GradientSampler.sample_inputs
    record = lambda self, n, seed: drawn.append((n, seed)) or sample_inputs(self, n, seed)  # noqa: E731
    monkeypatch.setattr(GradientSampler, "sample_inputs", record)
    step_fidelity("toy", "leap_align", 4, {}, cost=80, draws=3, batch_size=8, smoke=True)
    assert drawn == [(8, INPUT_SEED), (16 * 8, INPUT_SEED), (10, 0), (10, 1), (10, 2)]


def test_a_gradient_leaves_nothing_behind():
    sampler = GradientSampler("toy", 5, 0, 0.0, batch_size=16, smoke=True)
    first, again = (sampler.gradient("stratified", 0) for _ in range(2))
    assert torch.equal(first, again) and first.abs().max() > 0


# Choices and tables


def runs_with(*utilities):
    """A run for each list of utilities, evaluated after 0, 100, 200, ... evaluations."""
    return [
        {"metrics": [{"evaluations": 100.0 * i, "utility": u} for i, u in enumerate(line)], "error": ""}
        for line in utilities
    ]


def test_cost_to_reach_the_published_utility_against_a_hand_calculation():
    """The mean rises from -10 to -6, and the target is -8."""
    runs, published = runs_with([-10, -5, -4], [-10, -7, -4]), runs_with([-20, -9], [-20, -7])
    found = beyond.cost_to_reach(runs, published)
    assert found["needed"] == pytest.approx(50) and found["share"] == pytest.approx(0.5)
    # Without the first seed the target is -7, which the second run reaches after 100; without the second -9, after 20.
    assert found["needed_error"] == pytest.approx(math.sqrt(0.5 * (40**2 + 40**2)))
    assert found["share_error"] == pytest.approx(found["needed_error"] / 100)
    for name in ("share_alike", "share_of_best"):
        assert (found[name], found[f"{name}_error"]) == (found["share"], found["share_error"])


def test_a_published_run_that_loses_utility_again_is_also_compared_at_its_best():
    """It has -8 after 75 evaluations, is best after 100, with -6, and ends after 300, with -8 again."""
    runs, published = runs_with([-10, -6, -4], [-10, -6, -4]), runs_with([-14, -6, -7, -8], [-14, -6, -7, -8])
    found = beyond.cost_to_reach(runs, published)
    assert (found["needed"], found["share"], found["share_of_best"]) == (50, pytest.approx(50 / 300), 1)
    assert found["share_alike"] == pytest.approx(50 / 75)


def test_a_curve_that_starts_at_the_utility_or_stands_still_reaches_it_where_it_starts():
    assert beyond.evaluations_to(-5.0, [(20.0, -5.0), (40.0, -5.0), (60.0, -4.0)]) == 20
    assert beyond.evaluations_to(-4.5, [(20.0, -5.0), (40.0, -5.0), (60.0, -4.0)]) == 50


def test_a_mean_that_does_not_reach_the_published_utility_has_no_cost():
    assert beyond.cost_to_reach(runs_with([-10, -9], [-10, -9]), runs_with([-20, -8], [-20, -8])) == {}
    # Both together reach -8, the second alone does not.
    found = beyond.cost_to_reach(runs_with([-10, -5], [-10, -9]), runs_with([-20, -8], [-20, -8]))
    assert found == {"needed": pytest.approx(200 / 3)} | dict.fromkeys(
        ("share", "share_alike", "share_of_best"), pytest.approx(2 / 3)
    )


def test_every_setting_is_trained_once_and_the_published_one_is_among_them():
    settings = list(beyond.settings_of("digits", (5, 6, 8, 12, 25)))
    assert len(settings) == len(set(settings)) == 12 * 5 * 2 + 4 * 2
    (published,) = [setting for setting in settings if setting.is_published]
    assert published.hyper == {"solver": "euler"} and (published.T, published.method) == (25, "leap_align")
    assert Setting("toy", "stratified", "K 4", 8, "ab2").hyper == {"solver": "ab2", "K": 4}
    assert Setting("toy", "leap_align", "alpha 1", 8).hyper == {"solver": "euler", "alpha": 1.0}
    leash = Setting("digits", "stratified", "leash", 8)
    assert leash.hyper == {"K": 3, "lam": None, "beta": 3.0, "solver": "euler"} and leash.line == "stratified, leash"


def laboratory(tmp_path, monkeypatch, utility):
    """A laboratory in which a run's utility is utility(setting, lr, seed, budget)."""

    def result(s):
        metrics = [{"utility": utility(s, budget), "evaluations": budget} for budget in s["budgets"]]
        return {"metrics": metrics, "error": ""}

    def results(self, function, settings, title):
        return list(map(result, settings))

    monkeypatch.setattr(ResultCache, "results", results)
    scale = Scale(tasks=("toy",), tuning_seeds=(9,), budgets={"small": 1, "large": 2}, smoke=True)
    return Laboratory(tmp_path, ResultCache(tmp_path, 1), scale)


def test_learning_rates_are_chosen_by_the_utility_of_the_tuning_seeds_for_each_budget(tmp_path, monkeypatch):
    def utility(s, budget):
        assert s["seed"] == 9 and s["hyper"]["solver"] == "euler"
        return -abs(s["lr"] - (1e-2 if budget == 29 else 1e-4))

    lab = laboratory(tmp_path, monkeypatch, utility)
    settings = [Setting("toy", "refl", "", 8), Setting("toy", "refl", "", 8, "ab2")]
    rates = beyond.learning_rates(lab, settings)
    assert rates == {(s, budget): lr for s in settings for budget, lr in (("small", 1e-2), ("large", 1e-4))}


def test_policy_gradient_has_lower_rates_and_the_small_budget_more_seeds():
    lab = Laboratory(None, None, Scale())
    rates = {method: beyond.candidate_rates(lab, Setting("digits", method, "", 25)) for method in METHODS | TRAINERS}
    assert all(rates[name] == rates["leap_align"] for name in METHODS)
    assert all(min(rates[name]) < min(rates["leap_align"]) for name in TRAINERS)
    assert beyond.tuning_seeds(lab, "small") == (100, 101, 102, 103, 104, 105)
    assert beyond.tuning_seeds(lab, "large") == (100, 101)


def test_a_broken_run_is_worse_than_any_other():
    good, broken = runs_with([-1e6])[0], {"metrics": [], "error": "broke"}
    assert beyond.mean_utility([good, broken]) < beyond.mean_utility([good, good])


def test_the_setting_of_a_method_is_chosen_on_the_tuning_seeds(tmp_path, monkeypatch):
    def utility(s, budget):
        assert s["seed"] == 9 and budget == 29
        return {5: -3.0, 8: -1.0, 25: -2.0}[s["T"]]

    lab = laboratory(tmp_path, monkeypatch, utility)
    settings = [Setting("toy", method, "", T) for method in ("refl", "drtune") for T in (5, 8, 25)]
    rates = {(setting, "small"): 1e-3 for setting in settings}
    assert beyond.chosen_settings(lab, settings, rates) == [settings[1], settings[4]]


def test_a_setting_with_a_broken_run_has_no_metrics():
    setting, published = Setting("toy", "refl", "", 8), Setting("toy", "leap_align", "", 25)
    good, broken = runs_with([-4.0, -2.0], [-4.0, -2.0]), [*runs_with([-4.0]), {"metrics": [], "error": "broke"}]
    runs = {(setting, "small"): broken, (published, "small"): good, (published, "large"): good}
    bad, small, large = beyond.table_rows(runs, dict.fromkeys(runs, 1e-3), {"toy": published})
    assert bad["n"] == 0 and "utility" not in bad and "needed" not in bad
    assert small["n"] == 2 and small["utility"] == -2 and small["needed"] == 100
    assert "needed" not in large


def test_headline_against_a_hand_calculation():
    setting, published = Setting("toy", "refl", "", 8), Setting("toy", "leap_align", "", 25)
    runs = {(setting, "small"): runs_with([-4, -2], [-4, -2]), (published, "large"): runs_with([-4, -3], [-4, -3])}
    (row,) = beyond.headline_rows(runs, {(setting, "small"): 1e-3}, [setting], {"toy": published})
    assert (row["needed"], row["share"], row["lr"], row["method"]) == (50, 0.5, 1e-3, "refl")


# The figure


def test_the_figure_has_a_line_for_each_setting_and_budget_and_a_thick_published_one(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: saved.append(figure))
    rows = []
    for line, T in (("leap_align", 25), ("refl", 8)):
        for budget, evaluations in (("small", 0.0), ("small", 10.0), ("small", 20.0), ("large", 40.0), ("large", 80.0)):
            row = {"task": "toy", "line": line, "option": "", "T": T, "solver": "euler", "budget": budget}
            for name in beyond.SHOWN["toy"]:
                row |= {name: evaluations / 10, f"{name}_error": 0.1}
            rows.append(row | {"evaluations": evaluations})
    plots.beyond(tmp_path / "beyond.png", rows, beyond.SHOWN, 20)
    (figure,) = saved
    axis = figure.axes[0]
    assert [line.get_linewidth() for line in axis.lines[:4]] == [3.5, 3.5, 1.2, 1.2]
    assert [list(line.get_xdata()) for line in axis.lines[:2]] == [[10, 20], [40, 80]]
    assert axis.get_xscale() == "log"


# Completeness


def test_no_tuning_seed_is_in_a_table():
    assert not set(Scale().seeds) & set(beyond.MORE_TUNING_SEEDS)
    assert not set(Scale().seeds) & set(Scale().tuning_seeds) and not set(SMOKE.seeds) & set(SMOKE.tuning_seeds)


def test_policy_gradient_is_among_the_settings():
    methods = {setting.method for setting in beyond.settings_of("toy", (8,))}
    assert set(TRAINERS) | {"sparse", "bridge", "lagrange", "stratified", "leap_align"} <= methods
