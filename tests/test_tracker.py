"""Trackers: what TensorBoard's own reader finds, and the calls that wandb gets, against the files of the run."""

import io
import json
import shutil
import sys
from types import ModuleType, SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image

import train_leap_align as trainer
from runtime import report
from runtime.files import read_csv
from tests.toy_runs import before_every_step, error_line, metrics, result, run, without_figures

EVERY_2 = ["--checkpoint-every", "2", "--evaluate-every", "2"]
TENSORBOARD, WANDB = ["--tracker", "tensorboard"], ["--tracker", "wandb"]
FIGURES = {f"figures/{name}": f"{name}.png" for name in ("curves", "samples", "trajectories")}


def logged(out):
    """What a tracker must show of a run's folder: (name, iteration) -> value."""
    expected = {}
    for kind, file in (("train", "metrics.csv"), ("evaluation", "evaluations.csv")):
        for row in read_csv(out / file):
            iteration = int(row.pop("iteration"))
            expected |= {(f"{kind}/{name}", iteration): float(value) for name, value in row.items() if value}
    return expected


def cut_off(out):
    """As if killed after iteration 4, when the newest checkpoint was that of iteration 2."""
    shutil.rmtree(out / "checkpoint" / "000004")


def forget(out):
    """The folder of a run that was killed before its first checkpoint: it is started again, not resumed."""
    shutil.rmtree(out / "checkpoint")
    (out / "result.json").unlink()


def assert_tensorboard_shows(out):
    """Its own reader finds every value of metrics.csv and evaluations.csv once, in float32, and each figure once."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(out / "tensorboard"), size_guidance={"scalars": 0, "images": 0}).Reload()
    found = [(name, event.step, event.value) for name in read.Tags()["scalars"] for event in read.Scalars(name)]
    assert sorted(found) == sorted((*key, float(np.float32(value))) for key, value in logged(out).items())
    assert set(read.Tags()["images"]) == set(FIGURES)
    for name, file in FIGURES.items():
        (image,) = read.Images(name)
        found, expected = (Image.open(x) for x in (io.BytesIO(image.encoded_image_string), out / file))
        assert np.array_equal(found, expected.convert("RGB"))
        assert image.step == len(read_csv(out / "metrics.csv"))


@pytest.mark.parametrize("first", [TENSORBOARD, []], ids=["from the start", "from --resume on"])
def test_tensorboard_shows_the_runs_files_without_gaps_or_double_points(reference, first, tmp_path):
    """Also after it was resumed, with nothing left to do but the report, or restarted; it changes nothing."""
    pytest.importorskip("torch.utils.tensorboard")
    assert run(tmp_path, *EVERY_2, *first) == metrics(reference)
    assert result(tmp_path)["after"] == result(reference)["after"]
    if first:
        assert_tensorboard_shows(tmp_path)
    cut_off(tmp_path)
    for iterations in ("4", "4", "6"):
        run(tmp_path, *EVERY_2, "--resume", *TENSORBOARD, "--iterations", iterations)
        assert_tensorboard_shows(tmp_path)
    assert metrics(tmp_path)[:4] == metrics(reference)
    assert json.loads((tmp_path / "config.json").read_text())["tracker"] == "tensorboard"
    forget(tmp_path)
    run(tmp_path, *EVERY_2, *TENSORBOARD, "--seed", "1", "--iterations", "2")
    assert_tensorboard_shows(tmp_path)


class WandbRun:
    def __init__(self, starting_step):
        self.id, self.starting_step, self.logs, self.exit_code = "abc123", starting_step, {}, None

    def log(self, values, step):
        assert step >= max(self.logs, default=0), "wandb drops an earlier step"
        kept = self.logs.setdefault(step, {})
        assert not kept.keys() & values.keys(), "a double point"
        kept.update(values)

    def finish(self, exit_code):
        self.exit_code = exit_code


@pytest.fixture
def wandb(monkeypatch):
    """A stub of wandb's module, with the arguments and runs of all its init calls; `step` is where the service is."""
    stub = ModuleType("wandb")
    stub.runs, stub.inits, stub.step = [], [], 0
    stub.Error, stub.Image = type("Error", (Exception,), {}), lambda path: SimpleNamespace(path=path)
    stub.init = lambda **it: (stub.inits.append(it), stub.runs.append(WandbRun(stub.step)), stub.runs[-1])[-1]
    monkeypatch.setitem(sys.modules, "wandb", stub)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return stub


def assert_wandb_has(logs, out, first=0):
    """The values of the run's files from an iteration on, each at its own, and at the end the figures."""
    found = {(name, step): value for step, values in logs.items() for name, value in values.items()}
    images = {name: found.pop((name, max(logs))).path for name in FIGURES}
    assert found == {key: value for key, value in logged(out).items() if key[1] >= first}
    assert images == {name: str(out / file) for name, file in FIGURES.items()}


def test_wandb_gets_the_runs_files_and_settings_and_nothing_twice(reference, tmp_path, wandb):
    """On --resume the service has iterations 0 to 3, or none: it was not chosen before, or the run was offline."""
    out = tmp_path / "my-run"
    assert run(out, *EVERY_2, *WANDB) == metrics(reference)
    (log,), (arguments,) = wandb.runs, wandb.inits
    assert_wandb_has(log.logs, out)
    assert log.exit_code == 0
    expected = {"name": "my-run", "project": "train_leap_align", "id": None, "dir": out}
    assert {key: arguments[key] for key in expected} == expected
    assert arguments["config"]["T"] == 21 and arguments["config"]["method"] == "leap_align"
    for wandb.step, known_id in ((4, "abc123"), (0, None)):
        cut_off(out)
        run(out, *EVERY_2, *WANDB, "--resume")
        assert wandb.inits[-1]["id"] == known_id and wandb.inits[-1]["resume"] == "allow"
        assert_wandb_has(wandb.runs[-1].logs, out, first=wandb.step)
        (out / "wandb_id.txt").unlink()


def test_a_restarted_run_is_a_new_one_at_wandb_and_an_unknown_entry_is_not_shown(tmp_path, wandb, monkeypatch):
    """What is no column of metrics.csv could not be shown again on --resume."""
    step = trainer.Trainer.step
    monkeypatch.setattr(trainer.Trainer, "step", lambda self: step(self) | {"unknown": 1.0})
    run(tmp_path, *WANDB)
    assert_wandb_has(wandb.runs[0].logs, tmp_path)
    forget(tmp_path)
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    without_figures(monkeypatch)
    run(tmp_path, *WANDB)
    assert wandb.inits[1]["id"] is None and wandb.inits[1]["project"] == "mine"


@pytest.mark.parametrize("error", [trainer.processes.StoppedBySignal(15, False), OSError(28, "No space left")])
def test_a_crash_or_a_signal_closes_the_tracker(error, tmp_path, wandb, monkeypatch):
    before_every_step(monkeypatch, Mock(side_effect=[None, None, error]))
    with pytest.raises(SystemExit):
        run(tmp_path, *WANDB)
    assert max(wandb.runs[0].logs) == 2 and wandb.runs[0].exit_code == 1


def test_the_sheet_of_an_evaluation_is_shown(tmp_path, wandb):
    (tmp_path / "samples").mkdir()
    Image.new("RGB", (4, 2)).save(tmp_path / "samples" / "000020.png")
    with report.tracker_class("wandb")(tmp_path, {"tool": "train_leap_align", "resume": False}) as tracker:
        for kind, iteration, reward in (("evaluation", 10, 1.0), ("train", 20, 2.0), ("evaluation", 20, 3.0)):
            tracker.add(kind, iteration, {"reward": reward})
    assert wandb.runs[0].logs[20].pop("samples").path == str(tmp_path / "samples" / "000020.png")
    assert wandb.runs[0].logs == {10: {"evaluation/reward": 1.0}, 20: {"train/reward": 2.0, "evaluation/reward": 3.0}}


def test_wandb_that_does_not_start_is_one_line(tmp_path, wandb):
    wandb.init = Mock(side_effect=wandb.Error("No API key\nconfigured"))
    line = error_line(*WANDB, "--out", str(tmp_path))
    assert "No API key configured" in line and "`wandb login`" in line and "WANDB_MODE=offline" in line


@pytest.mark.parametrize(("name", "module"), [("tensorboard", None), ("wandb", None), ("wandb", ModuleType("wandb"))])
def test_a_missing_library_is_one_line_before_anything_is_written(name, module, tmp_path, monkeypatch):
    """None makes `import name` fail; a folder named wandb imports as an empty module."""
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    assert error_line("--tracker", name, "--out", str(tmp_path / "run")).endswith(f"pip install {name}")
    assert not (tmp_path / "run").exists()


def test_only_rank_0_has_a_tracker(tmp_path, wandb, monkeypatch):
    monkeypatch.setattr(report, "rank", lambda: 1)
    with report.tracker_class("wandb")(tmp_path, {}) as tracker:
        assert isinstance(tracker, report.NoTracker)
    assert not wandb.inits
