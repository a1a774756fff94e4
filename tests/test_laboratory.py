"""The laboratory: the cache of results, training runs, tables, and every experiment once at a small scale."""

import json
import math
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import replace
from functools import cache, partial
from io import StringIO
from itertools import product

import numpy as np
import pytest

import train_leap_align as trainer
from leap_align import METHODS, BadInput, leap, rollout
from runtime.files import read_csv, write_text
from tests.toy_runs import ROOT
from toy.laboratory import __main__ as laboratory
from toy.laboratory import ablations, compare, result_cache
from toy.laboratory.laboratory import SMOKE, Laboratory, Scale
from toy.laboratory.result_cache import ResultCache
from toy.laboratory.tables import EVALUATORS, direction, directions_table, groups
from toy.laboratory.train_run import SMOKE_OPTIONS, step_means, train_run
from toy.laboratory.variants import VARIANTS


def double(value, log):
    with open(log, "a") as file:
        file.write(f"{value}\n")
    if value < 0:
        raise ValueError("negative")
    return {"value": 2 * value}


def test_results_are_computed_once_and_kept_after_a_failure(tmp_path):
    log, cache = tmp_path / "log", ResultCache(tmp_path / "cache", 1)
    settings = {value: {"value": value, "log": str(log)} for value in (1, 2, -1, 3)}
    with pytest.raises(ValueError, match="negative"):
        cache.results(double, {value: settings[value] for value in (1, 2, -1)}, "before")
    del settings[-1]
    for _ in range(2):
        assert cache.results(double, settings, "after") == {value: {"value": 2 * value} for value in (1, 2, 3)}
    assert log.read_text().split() == ["1", "2", "-1", "3"]
    assert not [path for path in (tmp_path / "cache").iterdir() if path.suffix != ".json"]


@pytest.mark.slow
def test_two_workers_compute_the_same_results_as_one(tmp_path):
    settings = {value: {"value": value} for value in range(5)}
    one, two = (ResultCache(tmp_path / str(n), n).results(dict, settings, "results") for n in (1, 2))
    names_1, names_2 = (sorted(path.name for path in (tmp_path / str(n)).iterdir()) for n in (1, 2))
    assert one == two == settings and names_1 == names_2 and len(names_1) == 5


@pytest.mark.parametrize("content", ["", '{"function": "dict", "resu', "[]", "{}"])
def test_a_damaged_result_is_named_and_computed_again(content, tmp_path, capsys):
    cache, settings = ResultCache(tmp_path, 1), {1: {"value": 1}, 2: {"value": 2}}
    before, damaged = cache.results(dict, settings, "results"), result_cache.cache_path(tmp_path, dict, settings[1])
    damaged.write_text(content)
    for message in (f"{damaged} is damaged: it is removed, and its result is computed again\n", ""):
        assert cache.results(dict, settings, "results") == before
        assert capsys.readouterr().out == message
    damaged.write_text(content)
    assert result_cache.stored_result(damaged) is None and not damaged.exists()


def test_smoke_and_real_results_have_a_folder_each(monkeypatch, tmp_path):
    smoke, full = (tmp_path / name for name in ("smoke", "full"))
    monkeypatch.setitem(laboratory.EXPERIMENTS, "pairs", lambda lab: write_text(lab.out / "pairs.md", repr(lab.scale)))
    for workers in (1, 2):
        laboratory.main("pairs", smoke, workers, smoke=True)
    laboratory.main("pairs", full)
    with pytest.raises(SystemExit, match=r"was smoke, is full; .* another folder$"):
        laboratory.main("pairs", smoke)
    assert [(out / "pairs.md").read_text() for out in (smoke, full)] == [repr(SMOKE), repr(Scale())]


def test_train_run_equals_the_trainers_command(tmp_path):
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in SMOKE_OPTIONS.items()]
    out, own = tmp_path / "run", "--iterations=3 --batch-size=64 --lr=1e-3 --seed=7 --method=drtune".split()
    trainer.main([*flags, *own, f"--out={out}"])
    expected = json.loads((out / "result.json").read_text())
    first, last = train_run("toy", "drtune", 1e-3, 7, {}, [0, 3], smoke=True)["metrics"]
    for metrics, when in ((first, "before"), (last, "after")):
        assert {name: metrics[name] for name in expected[when]} == pytest.approx(expected[when], abs=1e-6)
    norms = [float(row["grad_norm"]) for row in read_csv(out / "metrics.csv")]
    assert last["grad_norm"] == pytest.approx(sum(norms) / 3) and (first["iterations"], last["iterations"]) == (0, 3)


def test_a_broken_run_keeps_what_it_has_reports_its_error_and_does_not_affect_the_next(monkeypatch, capsys):
    run = partial(train_run, "toy", "leap_align", seed=0, evaluate_at=[0, 12], hyper={}, smoke=True)
    before = run(lr=1e-3)
    broken = run(lr=1e30)
    assert len(broken["metrics"]) == 1 and "updates in a row skipped" in broken["error"]
    assert before == run(lr=1e-3) and len(before["metrics"]) == 2 and not before["error"]
    monkeypatch.setattr("toy.modes.Modes.evaluate", lambda *_: dict.fromkeys(EVALUATORS["toy"], math.nan))
    without_numbers = run(lr=1e-3)
    assert without_numbers["metrics"] == [] and "not finite" in without_numbers["error"]
    assert not capsys.readouterr().out


def test_a_skipped_step_does_not_enter_the_mean_norm():
    assert step_means([{"grad_norm": norm} for norm in (3.0, math.nan, 5.0)]) == {"grad_norm": 4.0}


def fake_laboratory(monkeypatch, result: Callable, **scale) -> Laboratory:
    """A laboratory at a small scale in which result(settings) is made up."""
    fake = lambda self, function, settings, title: {key: result(s) for key, s in settings.items()}  # noqa: E731
    monkeypatch.setattr(ResultCache, "results", fake)
    return Laboratory(None, ResultCache(None, 8), replace(SMOKE, **scale))


def test_metrics_of_runs_are_listed_by_key_and_seed_and_a_broken_run_is_refused(monkeypatch):
    def result(s):
        return {"metrics": [{"reward": 10 * s["lr"] + s["seed"]}], "error": "" if s["lr"] < 3 else "too many\nsteps"}

    settings = {lr: {"task": "toy", "method": "refl", "lr": lr, "evaluate_at": [7]} for lr in (1, 2, 3)}
    lab = fake_laboratory(monkeypatch, result)
    with pytest.raises(BadInput, match=r"^toy, refl, lr 3, seed 0 broke: too many steps$"):
        lab.run_metrics(settings, "")
    metrics = lab.run_metrics({lr: settings[lr] for lr in (1, 2)}, "")
    assert metrics == {lr: [{7: {"reward": 10 * lr}}, {7: {"reward": 10 * lr + 1}}] for lr in (1, 2)}


def test_seconds_are_always_measured_on_one_process(monkeypatch):
    workers, lab = [], fake_laboratory(monkeypatch, None)
    record = lambda self, function, settings, title: workers.append(self.workers) or {}  # noqa: E731
    monkeypatch.setattr(ResultCache, "results", record)
    assert lab.cache.workers > 1 and not lab.seconds_per_iteration([("toy", "refl")], 3) and workers == [1]


def test_learning_rates_are_chosen_by_the_reward_and_a_broken_run_is_worst(monkeypatch):
    rewards = {1e-4: (-3e6, -5e6), 1e-3: (-4e6, -2e6)}  # after the small and the large budget

    def result(s):
        assert s["seed"] == 9 and s["evaluate_at"] == [1, 2]
        broken = s["task"] == "digits" and s["lr"] == 1e-3
        metrics = [{"reward": reward} for reward in rewards[s["lr"]]]
        return {"metrics": [] if broken else metrics, "error": "broke" if broken else ""}

    scale = {"tasks": ("toy", "digits"), "tuning_seeds": (9,), "learning_rates": (1e-4, 1e-3)}
    scale["budgets"] = {"small": 1, "large": 2}
    rates = fake_laboratory(monkeypatch, result, **scale).learning_rates(("refl",), {"hinge": 0.0})
    expected = {("toy", "small"): 1e-4, ("toy", "large"): 1e-3, ("digits", "small"): 1e-4, ("digits", "large"): 1e-4}
    assert rates == {(task, "hinge", "refl", budget): lr for (task, budget), lr in expected.items()}


def test_directions_against_a_hand_calculation():
    """Differences 1, 2, 3: mean 2, error 1/sqrt(3) = 0.577; Student's t at 2 degrees of freedom is 4.303."""
    compared = partial(direction, "a > b", "Fig. 0", "toy", "reward", "late")
    row, agreeing = compared([2.0, 4.0, 6.0], [1.0, 2.0, 3.0]), compared([3.0, 5.0, 7.0], [1.0, 2.0, 3.0])
    assert (row["difference"], row["error"], row["n"]) == (2.0, pytest.approx(3**-0.5), 3)
    assert (row["toy"], agreeing["toy"]) == ("within error", "agrees")  # 2 < 4.303 * 0.577 < 3
    assert compared([1.0, 2.0, 3.0], [3.0, 5.0, 7.0])["toy"] == "disagrees"
    assert compared([2.0], [1.0])["toy"] == "within error"
    title, _, *table = directions_table([row, agreeing | {"task": "digits"}]).splitlines()
    assert title == "### The paper's directions (n = 3; 2 comparisons: 1 agrees, 0 disagrees, 1 within error)"
    cells = "| a > b | Fig. 0 | reward | within error, +2.000 ± 0.577 | agrees, +3.000 ± 0.577 |"
    assert table == ["| claim | source | figure | toy, late | digits, late |", "|---|---|---|---|---|", cells]


def test_a_leash_starts_from_the_pretrained_model_whatever_was_trained_before():
    run = partial(train_run, "toy", "leap_align", 1e-2, 0, evaluate_at=[1, 4], smoke=True)
    for _ in range(2):
        first, last = run(hyper={"lam": None, "beta": 1e-9})["metrics"]
        assert first["v_norm"] == 1 < last["v_norm"]  # the first step is taken at the reference
    assert "v_norm" not in run(hyper={"lam": None})["metrics"][0]


SLOW = {"ablations", "leash", "beyond", "cost", "shapes"}
EXPERIMENTS = [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in laboratory.ALL]


def half_way(velocity, x_T, times, hyper, generator, step=leap):
    """It leaps to the image from the middle of the sampling run, and logs a stop that ReFL would never draw."""
    i = len(times) // 2
    x = rollout(velocity, x_T, times, i_end=i)[0]
    x_0 = leap(x, velocity(x, times[i]), times[i], 0)
    yield x_0, x_0.new_ones(len(x_0)), {"i_min": i}


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    """experiment(name): its rows, and what it printed; all share one output folder, and so a cache."""
    folder = tmp_path_factory.mktemp("laboratory")
    mine = ablations.Ablation({"two": ("leap_align", {}), "one": ("one_leap_again", {})}, expected=(), source="")

    @cache
    def experiment(name):
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as printed:
            for table in (METHODS, trainer.METHODS):
                patch.setitem(table, "half_way", half_way)
            patch.setitem(VARIANTS, "one_leap_again", VARIANTS["one_leap"])
            patch.setitem(ablations.ABLATIONS, "mine", mine)
            laboratory.main(name, folder, workers=1, smoke=True)
        return read_csv(folder / f"{name}.csv"), printed.getvalue()

    experiment.folder = folder
    return experiment


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_at_a_small_scale(name, experiment):
    if name == "shapes":
        pytest.importorskip("diffusers")
    folder, (rows, printed) = experiment.folder, experiment(name)
    assert len(rows) >= 2 and all(row["task"] == ("shapes" if name == "shapes" else "toy") for row in rows)
    assert name == "guidance" or (folder / f"{name}.png").stat().st_size > 10_000
    assert (folder / f"{name}.md").read_text().strip() in printed
    assert (folder / f"{name}-directions.csv").exists() == (name in ("compare", "ablations"))


def test_a_finished_experiment_computes_nothing(experiment, monkeypatch):
    rows, _ = experiment("pairs")
    monkeypatch.setattr(result_cache, "compute", None)
    laboratory.main("pairs", experiment.folder, workers=1, smoke=True)
    assert read_csv(experiment.folder / "pairs.csv") == rows


@pytest.mark.parametrize("name", ["compare", "pairs"])
def test_equal_compute_is_equal(name, experiment):
    rows = [row for row in experiment(name)[0] if row.get("equal") != "samples" and row["iterations"]]
    for budget, iterations in SMOKE.budgets.items():
        costs = [(int(row["evaluations"]), int(row["iterations"])) for row in rows if row["budget"] == budget]
        assert len(costs) >= 2
        # LeapAlign needs 29 evaluations an iteration; another method differs by at most half of its own iteration.
        assert all(abs(total - 29 * iterations) <= total / max(1, n) / 2 + 1 or n == 0 for total, n in costs)


def test_tables_have_every_method_and_the_users_own(experiment):
    assert "half_way" in {row["method"] for row in experiment("fidelity")[0]}
    tables = [[row["method"] for row in table] for table in groups(experiment("compare")[0], *compare.BY).values()]
    assert tables == [["pretrained", *METHODS, "half_way"]] * 8  # of two hinges, two budgets, samples or compute


@pytest.mark.slow
def test_tables_of_slow_experiments_have_every_option_of_every_method_and_the_users_own(experiment):
    """In the leash's table, of each kind: whether it has a hinge and a leash, and whether it trained to the end."""
    assert {row["option"] for row in experiment("ablations")[0] if row["ablation"] == "mine"} == {"two", "one"}
    rows, _ = experiment("leash")
    kinds_of_all = set(product([*METHODS, "half_way"], ["stop", "none", "leash"]))
    kinds_of_all |= {("leap_align", "hinge"), ("leap_align", "both")}
    assert {(row["method"], row["kind"]) for row in rows} == kinds_of_all
    kinds = {"stop": (False, False, False), "none": (False, False, True), "leash": (False, True, True)}
    kinds |= {"hinge": (True, False, True), "both": (True, True, True)}
    for row in rows:
        assert kinds[row["kind"]] == (row["lambda"] != "none", row["beta"] != "0.0", row["iterations"] == "4")
        assert float(row["v_norm"]) > 0


def results(name, *numbers):
    """The rows of a committed table, with numbers in some columns."""
    rows = read_csv(ROOT / "toy" / "laboratory" / "results" / name)
    return [row | {column: float(row[column]) for column in numbers} for row in rows]


def test_no_panel_of_the_comparison_is_a_diagonal():
    """A held-out evaluator that is a line over the reward shows nothing that the reward does not."""
    rows = [row for row in results("compare-curves.csv", "reward") if row["budget"] == "large"]
    curves = groups(rows, "task")
    assert {task for (task,) in curves} == set(compare.SHOWN)
    for task, name in [("toy", "utility"), *((task, name) for task, names in compare.SHOWN.items() for name in names)]:
        reward, value = zip(*((row["reward"], float(row[name])) for row in curves[task,]))
        correlation = abs(np.corrcoef(reward, value)[0, 1])
        assert correlation > 0.99 if (task, name) == ("toy", "utility") else correlation < 0.98


def test_the_curves_end_where_the_tables_of_the_comparison_say():
    key = ("task", "hinge", "budget", "method")
    curves = {(*(row[k] for k in key), row["iteration"]): row for row in results("compare-curves.csv")}
    rows = [row for row in results("compare.csv") if row["method"] != "pretrained"]
    assert len(rows) == 80
    for row in rows:
        curve = curves[*(row[k] for k in key), row["iterations"]]
        assert all(row[name] == curve[name] for name in EVALUATORS[row["task"]])


@pytest.mark.parametrize("scale", [Scale(), SMOKE])
def test_no_table_uses_a_seed_that_chose_learning_rates(scale):
    assert not set(scale.seeds) & {*scale.tuning_seeds, *scale.more_tuning_seeds}


def test_directions_have_the_papers_sign():
    """LeapAlign 3, DRTune 2, DRaFT-LV 1, ReFL 0, as on FLUX (Table 2); 1 for the paper's choices, 0 for others."""
    scale = Scale(tasks=("toy",), seeds=(0, 1), budgets={"small": 1}, ablation_iterations=(1, 2))
    values = {"leap_align": 3.0, "drtune": 2.0, "draft_lv": 1.0, "refl": 0.0, "full_backprop": 0.0}
    runs = {("toy", "hinge", name, "small"): [{1: {"reward": v, "utility": -v}}] * 2 for name, v in values.items()}
    rows = compare.directions(runs, scale)
    assert len({(row["claim"], row["figure"]) for row in rows}) == len(rows) == 12
    assert {(row["figure"], row["toy"]) for row in rows} == {("reward", "agrees"), ("utility", "disagrees")}
    best = {("alpha", "0.3"), ("leaps", "2"), ("reward of", "x_0"), ("weight", "both"), ("timesteps", "[0, 1]")}
    best, runs = best | {("k - j", "random"), ("lambda", "0")}, {}
    for choice in ((name, option) for name, ablation in ablations.ABLATIONS.items() for option in ablation.options):
        metrics = dict.fromkeys(("reward", "utility"), float(choice in best)) | {"grad_norm": 0.0}
        runs["toy", *choice] = [{1: metrics, 2: metrics}] * 2
    rows = ablations.directions(runs, scale)
    assert {row["toy"] for row in rows if not row["claim"].startswith("nested")} == {"agrees"}
