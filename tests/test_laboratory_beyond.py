"""The laboratory's `beyond`: counted evaluations, policy gradient, the choice of settings, the headline."""

import math

import pytest
import torch

from leap_align import rollout, uniform_times
from tests.problems import randn, seeded
from tests.test_laboratory import fake_laboratory
from toy.laboratory import beyond, other_trainers, train_run
from toy.laboratory.beyond import Setting
from toy.laboratory.gradients import INPUT_SEED, GradientSampler, step_fidelity
from toy.laboratory.laboratory import Laboratory, Scale
from toy.laboratory.other_trainers import GROUP, TRAINERS, NoisyStep, advantages, noisy_mean
from toy.laboratory.train_run import count_evaluations, fresh_task, make_trainer
from train_leap_align import METHODS


def trainer_of(method, T=10, **hyper):
    return make_trainer(fresh_task("toy", T, smoke=True), method, 1e-3, {"lam": None} | hyper, seed=0, batch_size=16)


def evaluations_of_a_step(trainer):
    with count_evaluations(trainer, used := {"evaluations": 0.0}):
        trainer.step()
    trainer.evaluate()
    return used["evaluations"]


@pytest.mark.parametrize(
    ("method", "hyper", "expected"),
    [
        ("leap_align", {}, 10 + 2 * 2),
        ("stratified", {"K": 3, "solver": "ab2"}, 10 + 2 + 2 * 3),
        ("leap_align", {"beta": 1.0}, 10 + 2 * 2 + 2 + 1),  # two of the reference, and a backward to x_j
        ("dancegrpo", {}, 10 + 3 * math.ceil(0.6 * 9)),
        ("mixgrpo", {}, 10 + 3 * 2),
    ],
)
def test_evaluations_of_an_iteration_against_a_hand_calculation(method, hyper, expected):
    assert evaluations_of_a_step(trainer_of(method, **hyper)) == expected


def test_a_run_is_evaluated_at_the_iteration_next_to_each_budget():
    run = train_run.train_run("toy", "leap_align", 1e-3, 0, {}, [0, 20, 40, 70], "evaluations", T=10, smoke=True)
    found = [(metrics["evaluations"], metrics["iterations"]) for metrics in run["metrics"]]
    assert found == [(0, 0), (14, 1), (42, 3), (70, 5)] and not run["error"]


@pytest.mark.parametrize(
    ("method", "T", "hyper", "expected"),
    [
        ("leap_align", 25, {}, {"alpha": 0.3, "lam": 0.0, "beta": 0.0, "solver": "euler"}),
        ("leap_align", 25, {"lam": None, "beta": 3.0, "solver": "ab2"}, {"lam": None, "beta": 3.0, "solver": "ab2"}),
        ("sparse", 25, {}, {"lam": 0.0, "K": 3}),
        ("bridge", 8, {"K": 2}, {"alpha": 0.1, "K": 2}),
        ("refl", 25, {}, {"m": 11}),
        ("refl", 5, {}, {"m": 2}),
    ],
)
def test_a_run_trains_with_the_methods_own_hyperparameters_and_a_hinge_at_0(method, T, hyper, expected):
    trainer = make_trainer(fresh_task("toy", T, smoke=True), method, 1e-3, hyper, seed=5, ema_decay=0.5)
    values = vars(trainer.config) | vars(trainer.hyper)
    own = {"lr": 1e-3, "seed": 5, "ema_decay": 0.5, "batch_size": 64}
    assert {name: values[name] for name in expected | own} == expected | own


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
    mean = x + (s - t) * v + 0.3**2 / 2 * (s - t) * (x + (1 - t) * v) / t  # -(x + (1 - t) v) / t is the score
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
    for groups in (drawn.reshape(2, GROUP, -1) for drawn in (seen[0], seen[1])):
        assert (groups == groups[:, :1]).all() and (groups[0] != groups[1]).any() and len(seen) == 2


@pytest.mark.parametrize("trained", [[8], [8, 7, 6]])
def test_a_sampling_run_has_two_updates_each_with_the_mean_over_the_trained_timesteps(monkeypatch, trained):
    """Every timestep of every half of the groups has the gradient 1; so has their mean, however many there are."""
    trainer, gradients = trainer_of("dancegrpo"), []
    weight = trainer.task.model.body[0].weight
    monkeypatch.setattr(trainer, "timesteps", lambda: (trained, trained))
    monkeypatch.setattr(trainer, "loss", lambda *_: weight.sum())
    monkeypatch.setattr(trainer.optimizer, "step", lambda: gradients.append(weight.grad.clone()))
    monkeypatch.setattr(torch.nn.utils, "clip_grads_with_norm_", lambda *_: None)
    trainer.step()
    assert len(gradients) == 2 and all(torch.allclose(g, torch.ones_like(g)) for g in gradients)


def test_the_window_slides_from_the_noise_to_the_image_and_returns():
    assert (TRAINERS["dancegrpo"].eta, TRAINERS["mixgrpo"].eta) == (0.3, 0.7)  # the papers'
    trainer, windows = trainer_of("mixgrpo", T=25), []
    for iteration in range(0, 25 * 23, 25):
        trainer.progress.iteration = iteration
        noisy, trained = trainer.timesteps()
        assert noisy == trained
        windows.append(noisy)
    assert windows[0] == [25, 24, 23, 22] and windows[1] == [24, 23, 22, 21] and windows[20] == [5, 4, 3, 2]
    assert windows[21] == windows[0]


def test_policy_gradient_raises_a_reward_that_has_no_gradient(monkeypatch):
    """The reward is a count: how many coordinates are positive."""
    trainer = trainer_of("dancegrpo", T=8)
    monkeypatch.setattr(trainer.task, "reward", lambda x, prompts: (x > 0).float().sum(1))
    rewards = [trainer.step()["reward"] for _ in range(40)]
    assert sum(rewards[-8:]) / 8 > sum(rewards[:8]) / 8 + 0.3


def test_a_step_of_the_exact_gradient_has_the_cosine_1():
    """K = T strata at alpha = 1 are full backpropagation; w is a constant there, as every leap is exact."""
    found = step_fidelity("toy", "stratified", 4, {"K": 4}, cost=16 * 15, draws=3, batch_size=16, smoke=True)
    assert found["evaluations"] == 4 + 3 * 4 - 1 and found["batch_size"] == 16
    assert found["cosine"] == pytest.approx(1, abs=1e-5)
    # The weight is 1 / (4 tau), and that of full backpropagation 1.
    assert found["ratio"] == pytest.approx(1 / 0.4, rel=1e-4)
    assert 0 < found["step_cosine"] < 1 - 1e-3
    sampler = GradientSampler("toy", 5, 16, smoke=True)
    first, again = (sampler.gradient("stratified", 0) for _ in range(2))
    assert torch.equal(first, again) and first.abs().max() > 0  # a gradient leaves nothing behind


def test_a_step_of_equal_cost_has_new_noise_and_as_many_samples_as_its_cost_allows(monkeypatch):
    drawn, sample_inputs = [], GradientSampler.sample_inputs
    record = lambda self, n, seed: drawn.append((n, seed)) or sample_inputs(self, n, seed)  # noqa: E731
    monkeypatch.setattr(GradientSampler, "sample_inputs", record)
    step_fidelity("toy", "leap_align", 4, {}, cost=80, draws=3, batch_size=8, smoke=True)
    assert drawn == [(8, INPUT_SEED), (16 * 8, INPUT_SEED), (10, 0), (10, 1), (10, 2)]


def runs_with(*utilities):
    """A run for each list of utilities, evaluated after 0, 100, 200, ... evaluations."""
    others = {"reward": 0.0, "alignment": 0.0, "log_density": 0.0, "spread": 0.0, "iterations": 0}
    return [
        {"metrics": [others | {"evaluations": 100.0 * i, "utility": u} for i, u in enumerate(line)], "error": ""}
        for line in utilities
    ]


@pytest.mark.parametrize(
    ("utilities", "published", "share", "error"),
    [
        # The mean rises from -10 to -6, and the target, after 100 evaluations, is -8.  Without the first seed the
        # target is -7, which takes 100 evaluations; without the second it is -9, which takes 20.
        (([-10, -5, -4], [-10, -7, -4]), ([-20, -9], [-20, -7]), 1 / 2, 0.4),
        # The target is that of the published run's end, after 300 evaluations, however good it was before.
        (([-10, -6, -4],) * 2, ([-14, -6, -7, -8],) * 2, 1 / 6, 0),
        # Without one seed it takes 400/7, 50 and 400/9 evaluations.
        (([-10, -5], [-10, -6], [-10, -7]), ([-20, -8],) * 3, 1 / 2, 0.07350499465317359),
        # Both together reach -8, the second alone does not.
        (([-10, -5], [-10, -9]), ([-20, -8],) * 2, 2 / 3, None),
    ],
)
def test_share_of_the_evaluations_to_the_published_utility(utilities, published, share, error):
    expected = {"share": share} | ({} if error is None else {"share_error": error})
    assert beyond.cost_to_reach(runs_with(*utilities), runs_with(*published)) == pytest.approx(expected)
    assert beyond.cost_to_reach(runs_with([-10, -9], [-10, -9]), runs_with(*published)) == {}


def test_a_curve_that_starts_at_the_utility_or_stands_still_reaches_it_where_it_starts():
    curve = [(20.0, -5.0), (40.0, -5.0), (60.0, -4.0)]
    assert [beyond.share(curve, [(100.0, utility)]) for utility in (-5.0, -4.5)] == [0.2, 0.5]


def test_every_setting_is_trained_once_and_the_published_one_is_among_them():
    settings = list(beyond.settings_of("digits", ((25, "euler"), (8, "ab2"))))
    assert len(settings) == len(set(settings)) == 10 * 2 + 2 * 2
    assert {*TRAINERS, "sparse", "bridge", "lagrange", "stratified"} <= {setting.method for setting in settings}
    (published,) = [setting for setting in settings if setting.is_published]
    assert published == Setting("digits", "leap_align", "", 25) and not published.hyper
    expected = {"task": "toy", "method": "stratified", "T": 8, "hyper": {"K": 3, "solver": "ab2"}}
    run = Setting("toy", "stratified", "K 3", 8, "ab2").run(1e-3, [29])
    assert run == expected | {"lr": 1e-3, "evaluate_at": [29], "unit": "evaluations"}
    assert Setting("toy", "leap_align", "alpha 1", 8).hyper == {"alpha": 1.0}


@pytest.fixture
def two_methods(monkeypatch):
    """Rates and best settings of two methods with two solvers; one rate is best for each solver, and AB2 is better."""
    best = {"euler": (1e-2, -2.0), "ab2": (1e-4, -1.0)}

    def result(s):
        assert s["seed"] == 9 and s["unit"] == "evaluations" and s["evaluate_at"] == [29]
        lr, utility = best[s["hyper"]["solver"]]
        return {"metrics": [{"utility": utility - abs(s["lr"] - lr)}], "error": ""}

    scale = {"more_tuning_seeds": (9,), "beyond_iterations": 1, "learning_rates": (1e-4, 1e-3, 1e-2)}
    settings = [Setting("toy", method, "", 8, solver) for method in ("refl", "drtune") for solver in best]
    return settings, *beyond.tune(fake_laboratory(monkeypatch, result, **scale), settings)


def test_learning_rates_and_settings_are_chosen_by_the_utility_of_the_tuning_seeds(two_methods):
    settings, rates, chosen = two_methods
    assert rates == {s: {"euler": 1e-2, "ab2": 1e-4}[s.solver] for s in settings}
    assert chosen == [s for s in settings if s.solver == "ab2"]


def test_policy_gradient_has_lower_rates():
    lab = Laboratory(None, None, Scale())
    rates = {method: beyond.candidate_rates(lab, Setting("digits", method, "", 25)) for method in METHODS | TRAINERS}
    assert all(rates[name] == rates["leap_align"] for name in METHODS)
    assert all(min(rates[name]) < min(rates["leap_align"]) for name in TRAINERS)


def test_rows_of_the_tables_against_a_hand_calculation():
    """A setting with a broken run has no metrics; the published one reaches its utility with all its evaluations."""
    broken, chosen, published = (Setting("toy", *s) for s in (("refl", "", 5), ("refl", "", 8), ("leap_align", "", 25)))
    runs = {
        broken: [*runs_with([-4.0]), {"metrics": [], "error": "broke"}],
        chosen: runs_with([-4, -2], [-4, -2]),
        published: runs_with([-4, -3], [-4, -3]),
    }
    bad, good, own = beyond.table_rows(runs, dict.fromkeys(runs, 1e-3), {"toy": published})
    assert (bad["n"], good["n"], good["utility"], good["share"], own["share"]) == (0, 2, -2, 0.5, 1)
    assert not {"utility", "share"} & {*bad} and good["lr"] == 1e-3
