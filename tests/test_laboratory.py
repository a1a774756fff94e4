"""The laboratory: the cache of results, training runs, tables, and every experiment once at a small scale."""

import json
import math
from contextlib import suppress
from functools import partial

import numpy as np
import pytest

import train_leap_align as trainer
from leap_align import METHODS, BadInput, leap, method, rollout
from runtime.run_dir import read_csv
from tests.toy_runs import ROOT
from toy.laboratory import __main__ as laboratory
from toy.laboratory import ablations, compare, leash, plots, result_cache
from toy.laboratory.laboratory import EVALUATORS, SMOKE, Laboratory, Scale
from toy.laboratory.result_cache import ResultCache
from toy.laboratory.tables import Direction, tally, verdicts
from toy.laboratory.train_run import SMOKE_OPTIONS, train_run
from toy.laboratory.variants import VARIANTS

# The cache


def double(value, log):
    with open(log, "a") as file:
        file.write(f"{value}\n")
    if value < 0:
        raise ValueError("negative")
    return {"value": 2 * value}


def test_results_are_computed_once_and_kept_after_a_failure(tmp_path):
    log = tmp_path / "log"
    cache = ResultCache(tmp_path / "cache", 1)
    settings = [{"value": value, "log": str(log)} for value in (1, 2, 3)]
    with pytest.raises(ValueError, match="negative"):
        cache.results(double, [*settings[:2], {"value": -1, "log": str(log)}], "before")
    for _ in range(2):
        assert [result["value"] for result in cache.results(double, settings, "after")] == [2, 4, 6]
    assert log.read_text().split() == ["1", "2", "-1", "3"]
    assert not [path for path in (tmp_path / "cache").iterdir() if path.suffix != ".json"]


def test_two_workers_compute_the_same_results_as_one(tmp_path):
    settings = [{"value": value} for value in range(5)]
    one, two = (ResultCache(tmp_path / str(n), n).results(dict, settings, "results") for n in (1, 2))
    assert one == two == settings
    names_1, names_2 = (sorted(path.name for path in (tmp_path / str(n)).iterdir()) for n in (1, 2))
    assert names_1 == names_2 and len(names_1) == 5


@pytest.mark.parametrize("content", ["", '{"function": "dict", "resu', "[]", "{}"])
def test_a_damaged_result_is_named_and_computed_again(content, tmp_path, capsys):
    cache, settings = ResultCache(tmp_path, 1), [{"value": 1}, {"value": 2}]
    before = cache.results(dict, settings, "results")
    damaged = result_cache.cache_path(tmp_path, dict, settings[0])
    damaged.write_text(content)
    assert cache.results(dict, settings, "results") == before
    assert f"{damaged} is damaged: it is removed, and its result is computed again" in capsys.readouterr().out
    assert cache.results(dict, settings, "results") == before
    assert "damaged" not in capsys.readouterr().out


# The output folder


@pytest.fixture
def no_experiment(monkeypatch):
    """`pairs` writes one file."""

    def write(lab):
        lab.out.mkdir(exist_ok=True)
        (lab.out / "pairs.md").write_text(repr(lab.scale))

    monkeypatch.setitem(laboratory.EXPERIMENTS, "pairs", write)


@pytest.mark.parametrize("first", [True, False])
def test_smoke_and_real_results_have_a_folder_each(first, no_experiment, tmp_path):
    laboratory.main("pairs", tmp_path / "lab", smoke=first)
    before = (tmp_path / "lab" / "pairs.md").read_text()
    names = {True: "smoke", False: "full"}
    with pytest.raises(
        SystemExit, match=rf"lab .* scale was {names[first]}, is {names[not first]}; .* another folder$"
    ):
        laboratory.main("pairs", tmp_path / "lab", smoke=not first)
    assert (tmp_path / "lab" / "pairs.md").read_text() == before
    laboratory.main("pairs", tmp_path / "lab", workers=2, smoke=first)
    laboratory.main("pairs", tmp_path / "other", smoke=not first)


def test_a_folder_that_the_laboratory_did_not_fill_is_refused(no_experiment, tmp_path):
    (tmp_path / "pairs.md").write_text("mine")
    with pytest.raises(SystemExit, match=r"toy.laboratory did not fill it: choose another folder$"):
        laboratory.main("pairs", tmp_path)
    assert (tmp_path / "pairs.md").read_text() == "mine"


# Training runs


def test_train_run_equals_the_trainers_command(tmp_path):
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in SMOKE_OPTIONS.items()]
    out = tmp_path / "run"
    trainer.main(
        [*flags, "--iterations=3", "--batch-size=64", "--lr=1e-3", "--seed=7", "--method=drtune", f"--out={out}"]
    )
    expected = json.loads((out / "result.json").read_text())
    metrics = train_run("toy", "drtune", 1e-3, 7, [0, 3], {"lam": 0.0}, smoke=True)["metrics"]
    for iteration, when in (("0", "before"), ("3", "after")):
        found = {name: metrics[iteration][name] for name in expected[when]}
        assert found == pytest.approx(expected[when], abs=1e-6)
    norms = [float(row["grad_norm"]) for row in read_csv(out / "metrics.csv")]
    assert metrics["3"]["grad_norm"] == pytest.approx(sum(norms) / 3)


def test_a_broken_run_reports_its_error_and_does_not_affect_the_next(capsys):
    run = partial(train_run, "toy", "leap_align", seed=0, evaluate_at=[12], hyper={"lam": 0.0}, smoke=True)
    before = run(lr=1e-3)
    assert "steps in a row skipped" in run(lr=1e30)["error"]
    after = run(lr=1e-3)
    assert before == after
    assert not before["error"]
    assert not capsys.readouterr().out


def test_a_run_with_broken_samples_reports_its_error(monkeypatch):
    monkeypatch.setattr("toy.modes.Modes.evaluate", lambda *_: dict.fromkeys(EVALUATORS["toy"], math.nan))
    run = train_run("toy", "leap_align", 1e-3, 0, [0, 1], {"lam": 0.0}, smoke=True)
    assert run["metrics"] == {} and "not finite" in run["error"]


def test_a_skipped_step_does_not_enter_the_mean_norm(monkeypatch):
    norms = iter([3.0, math.nan, 5.0])
    monkeypatch.setattr(trainer.Trainer, "step", lambda self: {"grad_norm": next(norms)})
    metrics = train_run("toy", "leap_align", 1e-3, 0, [3], {"lam": 0.0}, smoke=True)["metrics"]
    assert metrics["3"]["grad_norm"] == 4.0


def test_a_table_refuses_a_run_that_broke(tmp_path, monkeypatch):
    runs = {1e-3: {"metrics": {}, "error": ""}, 1e-2: {"metrics": {}, "error": "too many\nsteps"}}
    monkeypatch.setattr(ResultCache, "results", lambda self, run, settings, title: [runs[s["lr"]] for s in settings])
    lab = Laboratory(tmp_path, ResultCache(tmp_path, 1), SMOKE)
    settings = {lr: {"task": "toy", "method": "refl", "lr": lr} for lr in runs}
    with pytest.raises(BadInput, match=r"^toy, refl, lr 0.01, seed 0 broke: too many steps$"):
        lab.run_metrics(settings, "")


def test_metrics_of_runs_are_listed_by_key_and_seed(tmp_path, monkeypatch):
    def results(self, function, settings, title):
        return [{"metrics": {"3": {"reward": 10 * s["lr"] + s["seed"]}}, "error": ""} for s in settings]

    monkeypatch.setattr(ResultCache, "results", results)
    lab = Laboratory(tmp_path, ResultCache(tmp_path, 1), SMOKE)
    runs = lab.run_metrics({name: {"task": "toy", "lr": lr} for name, lr in (("a", 1), ("b", 2))}, "")
    assert runs == {
        "a": [{3: {"reward": 10}}, {3: {"reward": 11}}],
        "b": [{3: {"reward": 20}}, {3: {"reward": 21}}],
    }


def test_seconds_are_always_measured_on_one_process(tmp_path, monkeypatch):
    workers = []

    def results(self, function, settings, title):
        workers.append(self.workers)
        return [{"seconds": 0.5} for _ in settings]

    monkeypatch.setattr(ResultCache, "results", results)
    lab = Laboratory(tmp_path, ResultCache(tmp_path, 8), SMOKE)
    assert lab.seconds_per_iteration([("toy", "refl")], 3) == {("toy", "refl"): 0.5} and workers == [1]


def test_learning_rates_are_chosen_by_the_reward_and_a_broken_run_is_worst(tmp_path, monkeypatch):
    rewards = {1e-4: {"1": 0.3, "2": 0.1}, 1e-3: {"1": 0.2, "2": 0.4}}

    def train_runs(self, settings, seeds, title):
        assert seeds == (9,)
        runs = {}
        for key, s in settings.items():
            error = "broke" if s["task"] == "digits" and s["lr"] == 1e-3 else ""
            metrics = {iteration: {"reward": reward} for iteration, reward in rewards[s["lr"]].items()}
            runs[key] = [{"metrics": {} if error else metrics, "error": error}]
        return runs

    monkeypatch.setattr(Laboratory, "train_runs", train_runs)
    budgets = {"small": 1, "large": 2}
    scale = Scale(tasks=("toy", "digits"), tuning_seeds=(9,), learning_rates=(1e-4, 1e-3), budgets=budgets)
    lab = Laboratory(tmp_path, ResultCache(tmp_path, 1), scale)
    assert lab.learning_rates(("refl",), {"hinge": 0.0}) == {
        ("toy", "hinge", "refl", "small"): 1e-4,
        ("toy", "hinge", "refl", "large"): 1e-3,
        ("digits", "hinge", "refl", "small"): 1e-4,
        ("digits", "hinge", "refl", "large"): 1e-4,
    }


# Tables


def test_directions_against_a_hand_calculation():
    """Differences 1, 2, 3: mean 2, error 1/sqrt(3) = 0.577; Student's t at 2 degrees of freedom is 4.303."""
    direction = partial(Direction, "a > b", "Fig. 0", "toy", "reward", "late")
    row = direction([2.0, 4.0, 6.0], [1.0, 2.0, 3.0]).row()
    assert (row["difference"], row["error"], row["n"]) == (2.0, pytest.approx(3**-0.5), 3)
    assert row["toy"] == "within error"  # 2 < 4.303 * 0.577
    assert direction([3.0, 5.0, 7.0], [1.0, 2.0, 3.0]).row()["toy"] == "agrees"  # 3 > 2.484
    assert direction([1.0, 2.0, 3.0], [3.0, 5.0, 7.0]).row()["toy"] == "disagrees"
    assert direction([2.0], [1.0]).row()["toy"] == "within error"
    rows = [row, direction([3.0, 5.0, 7.0], [1.0, 2.0, 3.0]).row() | {"task": "digits"}]
    assert verdicts(rows).splitlines() == [
        "| claim | source | figure | toy, late | digits, late |",
        "|---|---|---|---|---|",
        "| a > b | Fig. 0 | reward | within error, +2.000 ± 0.577 | agrees, +3.000 ± 0.577 |",
    ]
    assert tally(rows) == "2 comparisons: 1 agrees, 0 disagrees, 1 within error"


# The leash


def test_a_leash_starts_from_the_pretrained_model_whatever_was_trained_before():
    run = partial(train_run, "toy", "leap_align", 1e-2, 0, hyper={"lam": None, "beta": 1e-9}, smoke=True)
    for _ in range(2):
        metrics = run(evaluate_at=[1, 4])["metrics"]
        assert metrics["1"]["v_norm"] == 1 < metrics["4"]["v_norm"]  # the first step is taken at the reference
    assert "v_norm" not in train_run("toy", "leap_align", 1e-2, 0, [1], {"lam": None}, smoke=True)["metrics"]["1"]


def test_every_run_of_the_leash_says_what_held_it_back():
    runs = {("toy", "refl", lam, beta): [{3: {"reward": 1.0}}] for lam in (None, 0.0) for beta in (0.0, 2.0)}
    runs["toy", "refl", None, 0.0][0][1] = {"reward": 0.5}
    rows = [(row["kind"], row["lambda"], row["beta"], row["iterations"]) for row in leash.table_rows(runs)]
    assert rows == [
        ("stop", "none", 0.0, 1),
        ("none", "none", 0.0, 3),
        ("leash", "none", 2.0, 3),
        ("hinge", 0.0, 0.0, 3),
        ("both", 0.0, 2.0, 3),
    ]


def test_the_leash_is_tried_by_every_method_and_task(folder):
    rows = run_experiment("leash", folder)
    assert {row["method"] for row in rows} == set(METHODS)
    assert {row["kind"] for row in rows if row["method"] == "leap_align"} == {"stop", "none", "leash", "hinge", "both"}
    assert {row["kind"] for row in rows if row["method"] == "refl"} == {"stop", "none", "leash"}
    assert all(float(row["v_norm"]) > 0 for row in rows)


# The experiments at a small scale


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One output folder, so that all experiments share a cache."""
    return tmp_path_factory.mktemp("laboratory")


def run_experiment(name, folder):
    laboratory.main(name, folder, workers=1, smoke=True)
    return read_csv(folder / f"{name}.csv")


@pytest.mark.parametrize("name", laboratory.EXPERIMENTS)
def test_every_experiment_at_a_small_scale(name, folder, capsys):
    rows = run_experiment(name, folder)
    assert len(rows) >= 2 and all(row["task"] == "toy" for row in rows)
    assert (folder / f"{name}.png").stat().st_size > 10_000
    assert (folder / f"{name}.md").read_text().strip() in capsys.readouterr().out
    assert (folder / f"{name}-directions.csv").exists() == (name in ("compare", "ablations"))


def test_a_finished_experiment_computes_nothing(folder, monkeypatch):
    run_experiment("pairs", folder)
    before = (folder / "pairs.csv").read_text()
    monkeypatch.setattr(result_cache, "compute", None)
    run_experiment("pairs", folder)
    assert (folder / "pairs.csv").read_text() == before


@pytest.mark.parametrize("name", ["compare", "pairs"])
def test_equal_compute_is_equal(name, folder):
    rows = [row for row in run_experiment(name, folder) if row.get("equal") != "samples" and row["iterations"]]
    for budget, iterations in SMOKE.budgets.items():
        costs = [(int(row["evaluations"]), int(row["iterations"])) for row in rows if row["budget"] == budget]
        assert len(costs) >= 2
        # LeapAlign needs 29 evaluations an iteration; another method differs by at most half of its own iteration.
        assert all(abs(total - 29 * iterations) <= total / max(1, n) / 2 + 1 or n == 0 for total, n in costs)


def test_each_table_of_the_comparison_begins_with_the_model_before_training(folder):
    methods = [row["method"] for row in run_experiment("compare", folder)]
    assert methods.count("pretrained") == 2 * 2 * 2  # hinges, budgets, samples or compute
    tables = {}
    for row in read_csv(folder / "compare.csv"):
        tables.setdefault(compare.table_key(row), []).append(row["method"])
    assert [table[0] for table in tables.values()] == ["pretrained"] * 8


@method
def half_way(velocity, x_T, times, hyper, generator):
    """A method of a user's own: it leaps to the image from the middle of the sampling run."""
    i = len(times) // 2
    x = rollout(velocity, x_T, times, i_end=i)[0]
    x_0 = leap(x, velocity(x, times[i]), times[i], 0)
    yield x_0, x_0.new_ones(len(x_0))
    return {"start": i}


@pytest.mark.parametrize("name", laboratory.EXPERIMENTS)
def test_a_method_and_a_variant_of_your_own_pass_through_every_experiment(name, folder, monkeypatch):
    for table in (METHODS, trainer.METHODS):
        monkeypatch.setitem(table, "half_way", half_way)
    monkeypatch.setitem(VARIANTS, "one_leap_again", VARIANTS["one_leap"])
    mine = ablations.Ablation({"two": ("leap_align", {}), "one": ("one_leap_again", {})}, expected=(), source="")
    monkeypatch.setitem(ablations.ABLATIONS, "mine", mine)
    rows = run_experiment(name, folder)
    if name in ("compare", "fidelity"):
        assert "half_way" in {row["method"] for row in rows}
    if name == "ablations":
        assert {row["option"] for row in rows if row["ablation"] == "mine"} == {"two", "one"}


# Figures


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn."""
    saved = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: saved.append(figure))
    return saved


def results(name):
    """The rows of a committed table, numbers as numbers."""
    return [{key: value if key == "option" else number(value) for key, value in row.items()} for row in read(name)]


def read(name):
    return read_csv(ROOT / "toy" / "laboratory" / "results" / name)


def number(text):
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text


def test_no_panel_of_the_comparison_is_a_diagonal():
    """A held-out evaluator that is a line over the reward shows nothing that the reward does not."""
    rows = results("compare-curves.csv")
    assert {row["task"] for row in rows} == set(compare.SHOWN)
    for task, names in compare.SHOWN.items():
        for name in names:
            reward, value = zip(*((row["reward"], row[name]) for row in rows if row["task"] == task))
            assert abs(np.corrcoef(reward, value)[0, 1]) < 0.98
    reward, utility = zip(*((row["reward"], row["utility"]) for row in rows if row["task"] == "toy"))
    assert np.corrcoef(reward, utility)[0, 1] > 0.99


def test_the_curves_end_where_the_tables_of_the_comparison_say():
    curves = {(r["task"], r["hinge"], r["method"], r["iteration"]): r for r in results("compare-curves.csv")}
    rows = [row for row in results("compare.csv") if row["budget"] == "large" and row["method"] != "pretrained"]
    assert len(rows) == 40
    for row in rows:
        curve = curves[row["task"], row["hinge"], row["method"], row["iterations"]]
        assert all(row[name] == curve[name] for name in EVALUATORS[row["task"]])


def test_an_ablation_has_one_scale_for_a_task_and_marks_the_papers_choice(figures, tmp_path):
    rows, references = results("ablations.csv"), {n: a.reference for n, a in ablations.ABLATIONS.items()}
    plots.ablations(tmp_path / "ablations.png", rows, references)
    (figure,) = figures
    assert len(figure.axes) == 2 * len(references)
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["the paper's choice", "after 60 iterations", "after 150 iterations"]
    for axis in figure.axes:
        options = [label.get_text() for label in axis.get_xticklabels()]
        marked = options.index(references[axis.get_title().split(":")[0]])
        (band,) = axis.patches
        assert band.get_x() < marked < band.get_x() + band.get_width()
        for points in axis.containers:
            assert points.lines[0].get_ydata()[marked] == 0


def test_every_method_has_a_color_and_a_marker_of_its_own(monkeypatch):
    monkeypatch.setitem(METHODS, "half_way", half_way)
    styles = [plots._style(name) for name in METHODS]
    assert len({style["color"] for style in styles}) == len({style["marker"] for style in styles}) == len(METHODS)


# What the experiments compare


@pytest.mark.parametrize("scale", [Scale(), SMOKE])
def test_no_table_uses_a_seed_that_chose_learning_rates(scale):
    assert not set(scale.seeds) & set(scale.tuning_seeds)


def test_directions_of_the_comparison_have_the_papers_sign():
    """LeapAlign 3, DRTune 2, DRaFT-LV 1, ReFL 0: the order of the paper's Table 2 on FLUX."""
    scale = Scale(tasks=("toy",), seeds=(0, 1), budgets={"small": 1})
    values = {"leap_align": 3.0, "drtune": 2.0, "draft_lv": 1.0, "refl": 0.0, "full_backprop": 0.0}
    runs = {
        ("toy", "hinge", method, "small"): [{1: {"reward": value, "utility": -value}} for _ in scale.seeds]
        for method, value in values.items()
    }
    rows = [direction.row() for direction in compare.directions(runs, scale)]
    found = {(row["claim"], row["figure"]): row["toy"] for row in rows}
    assert len(found) == 12
    assert {verdict for (_, metric), verdict in found.items() if metric == "reward"} == {"agrees"}
    assert {verdict for (_, metric), verdict in found.items() if metric == "utility"} == {"disagrees"}


def test_directions_of_the_ablations_have_the_papers_sign():
    """The paper's own choices get the value 1, all other options 0."""
    best = {
        "alpha": "0.3",
        "leaps": "2",
        "reward of": "x_0",
        "weight": "both",
        "timesteps": "[0, 1]",
        "k - j": "random",
        "lambda": "0",
    }
    scale = Scale(tasks=("toy",), seeds=(0, 1), ablation_iterations=(1, 2))
    runs = {}
    for name, ablation in ablations.ABLATIONS.items():
        for option in ablation.options:
            value = float(best.get(name) == option)
            metrics = {"reward": value, "utility": value, "grad_norm": 0.0}
            runs["toy", name, option] = [{1: metrics, 2: metrics} for _ in scale.seeds]
    rows = [direction.row() for direction in ablations.directions(runs, scale)]
    assert {row["toy"] for row in rows if not row["claim"].startswith("nested")} == {"agrees"}
