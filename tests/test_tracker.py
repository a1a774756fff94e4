"""Trackers: what TensorBoard's own reader finds, and the calls that wandb gets, against the files of the run."""

import json
import shutil
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import train_leap_align as trainer
from runtime import report
from runtime.run_dir import read_csv
from tests.toy_runs import ROOT, SMALL, TORCHRUN, error_line, metrics, result, run, without_figures

FLAGS = ["--checkpoint-every", "2", "--evaluate-every", "2"]
FIGURES = {"figures/curves", "figures/samples", "figures/trajectories"}


@pytest.fixture(scope="module")
def untracked(tmp_path_factory):
    """A run without a tracker, with figures."""
    out = tmp_path_factory.mktemp("run") / "untracked"
    run(out, *FLAGS)
    return out


def logged(out):
    """What a tracker must show of a run's folder: name -> iteration -> value."""
    expected = {}
    for kind, file in (("train", "metrics.csv"), ("evaluation", "evaluations.csv")):
        for row in read_csv(out / file):
            iteration = int(row.pop("iteration"))
            for name, value in row.items():
                if value:
                    expected.setdefault(f"{kind}/{name}", {})[iteration] = float(value)
    return expected


def cut_off(out, iteration=2):
    """The folder of a run that was killed after iteration 4, when its newest checkpoint was that of `iteration`."""
    for path in (out / "checkpoint").iterdir():
        if int(path.name) > iteration:
            shutil.rmtree(path)


# TensorBoard


def events(out):
    """TensorBoard's own reader of a run's event files, without a limit on their number."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(out / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    return accumulator.Reload()


def assert_tensorboard_shows(out, images=FIGURES):
    """Every value of metrics.csv and evaluations.csv once, in float32, and each image once, as in its file."""
    read, expected = events(out), logged(out)
    assert set(read.Tags()["scalars"]) == set(expected)
    for name, values in expected.items():
        points = [(event.step, event.value) for event in read.Scalars(name)]
        np.testing.assert_equal(points, [(step, np.float32(value)) for step, value in sorted(values.items())])
    assert set(read.Tags()["images"]) == images
    for name in images:
        (image,) = read.Images(name)
        (out / "read.png").write_bytes(image.encoded_image_string)
        path = out / f"{name.removeprefix('figures/')}.png"
        assert np.array_equal(Image.open(out / "read.png"), Image.open(path).convert("RGB"))
        (out / "read.png").unlink()
        assert image.step == len(read_csv(out / "metrics.csv"))


@pytest.fixture
def tensorboard():
    pytest.importorskip("torch.utils.tensorboard")


def test_tensorboard_shows_the_runs_files_and_changes_none(untracked, tmp_path, tensorboard):
    assert run(tmp_path, *FLAGS, "--tracker", "tensorboard") == metrics(untracked)
    assert result(tmp_path)["after"] == result(untracked)["after"]
    assert_tensorboard_shows(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["tracker"] == "tensorboard"


@pytest.mark.parametrize("first", [["--tracker", "tensorboard"], []], ids=["from the start", "from --resume on"])
def test_tensorboard_shows_a_resumed_run_without_gaps_or_double_points(first, tmp_path, tensorboard):
    whole = run(tmp_path, *FLAGS, *first)
    cut_off(tmp_path)
    for iterations in ("4", "4", "6"):  # the second time there is nothing left to do but the report
        run(tmp_path, *FLAGS, "--resume", "--tracker", "tensorboard", "--iterations", iterations)
        assert_tensorboard_shows(tmp_path)
    assert metrics(tmp_path)[:4] == whole


def test_a_restarted_run_hides_the_rows_of_the_first_start(tmp_path, tensorboard):
    """Without a checkpoint there is nothing to resume: the run starts again, with another seed."""
    run(tmp_path, *FLAGS, "--tracker", "tensorboard")
    shutil.rmtree(tmp_path / "checkpoint")
    (tmp_path / "result.json").unlink()
    run(tmp_path, *FLAGS, "--tracker", "tensorboard", "--seed", "1", "--iterations", "2")
    assert_tensorboard_shows(tmp_path)


def test_two_processes_write_one_event_file(tmp_path, tensorboard):
    flags = [*SMALL, "--tracker", "tensorboard", "--out", tmp_path]
    subprocess.run([*TORCHRUN, *map(str, flags)], cwd=ROOT, check=True, capture_output=True)
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1
    assert_tensorboard_shows(tmp_path)


# wandb, a stub that records its calls


class WandbRun:
    def __init__(self, starting_step):
        self.id, self.starting_step, self.logs, self.images, self.exit_code = "abc123", starting_step, {}, {}, None

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

    def init(**arguments):
        stub.inits.append(arguments)
        stub.runs.append(WandbRun(stub.step))
        return stub.runs[-1]

    stub.init = init
    monkeypatch.setitem(sys.modules, "wandb", stub)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return stub


def assert_wandb_has(logs, out, first=0, last=4):
    """The values of the run's files from one iteration to another, each at its own, and at the end the figures."""
    numbers = {step: {k: v for k, v in values.items() if isinstance(v, float)} for step, values in logs.items()}
    expected = {}
    for name, values in logged(out).items():
        for step, value in values.items():
            if first <= step <= last:
                expected.setdefault(step, {})[name] = value
    assert numbers == expected
    images = {name: value.path for name, value in logs[last].items() if name not in numbers[last]}
    assert images == {name: str(out / f"{name.removeprefix('figures/')}.png") for name in FIGURES}


def test_wandb_gets_the_runs_files_and_settings(untracked, tmp_path, wandb):
    out = tmp_path / "my-run"
    assert run(out, *FLAGS, "--tracker", "wandb") == metrics(untracked)
    (log,), (arguments,) = wandb.runs, wandb.inits
    assert_wandb_has(log.logs, out)
    assert log.exit_code == 0
    assert arguments["name"] == "my-run" and arguments["project"] == "train_leap_align"
    assert arguments["id"] is None and arguments["dir"] == out
    assert arguments["config"]["T"] == 21 and arguments["config"]["method"] == "leap_align"


def test_wandb_resumes_its_run_and_gets_no_iteration_twice(tmp_path, wandb):
    """The service has iterations 0 to 3; the newest checkpoint is that of 2."""
    run(tmp_path, *FLAGS, "--tracker", "wandb")
    cut_off(tmp_path)
    wandb.step = 4
    run(tmp_path, *FLAGS, "--tracker", "wandb", "--resume")
    assert wandb.inits[1]["id"] == "abc123" and wandb.inits[1]["resume"] == "allow"
    assert_wandb_has(wandb.runs[1].logs, tmp_path, first=4)


def test_wandb_gets_what_it_missed(tmp_path, wandb):
    """The service has nothing: it was chosen on --resume only, or the run is offline."""
    run(tmp_path, *FLAGS)
    cut_off(tmp_path)
    run(tmp_path, *FLAGS, "--tracker", "wandb", "--resume")
    assert wandb.inits[0]["id"] is None
    assert_wandb_has(wandb.runs[0].logs, tmp_path)


def test_a_restarted_run_is_a_new_one_at_wandb(tmp_path, wandb, monkeypatch):
    without_figures(monkeypatch)
    run(tmp_path, "--tracker", "wandb")
    shutil.rmtree(tmp_path / "checkpoint")
    (tmp_path / "result.json").unlink()
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    run(tmp_path, "--tracker", "wandb")
    assert wandb.inits[1]["id"] is None and wandb.inits[1]["project"] == "mine"


@pytest.mark.parametrize("signal", [0, 15])
def test_a_crash_or_a_signal_closes_the_tracker(signal, tmp_path, wandb, monkeypatch):
    step = trainer.Trainer.step

    def fail_in_the_third(self):
        if self.progress.iteration == 2:
            raise trainer.processes.StoppedBySignal(signal, False) if signal else OSError(28, "No space left")
        return step(self)

    monkeypatch.setattr(trainer.Trainer, "step", fail_in_the_third)
    with pytest.raises(SystemExit):
        run(tmp_path, "--tracker", "wandb")
    assert max(wandb.runs[0].logs) == 2
    assert wandb.runs[0].exit_code == 1


def test_wandb_that_does_not_start_is_one_line(tmp_path, wandb):
    def init(**_):
        raise wandb.Error("No API key\nconfigured")

    wandb.init = init
    line = error_line("--tracker", "wandb", "--out", str(tmp_path))
    assert "No API key configured" in line and "`wandb login`" in line and "WANDB_MODE=offline" in line


def test_the_sheet_of_an_evaluation_is_shown(tmp_path, wandb):
    (tmp_path / "samples").mkdir()
    Image.new("RGB", (4, 2)).save(tmp_path / "samples" / "000020.png")
    with report.tracker_class("wandb")(tmp_path, {"tool": "train_leap_align", "resume": False}) as tracker:
        tracker.add("evaluation", 10, {"reward": 1.0})
        tracker.add("train", 20, {"reward": 2.0})
        tracker.add("evaluation", 20, {"reward": 3.0})
    sheet = wandb.runs[0].logs[20].pop("samples")
    assert sheet.path == str(tmp_path / "samples" / "000020.png")
    assert wandb.runs[0].logs == {10: {"evaluation/reward": 1.0}, 20: {"train/reward": 2.0, "evaluation/reward": 3.0}}


def test_an_entry_that_is_no_column_of_metrics_csv_is_not_shown(tmp_path, wandb, monkeypatch):
    """On --resume it could not be shown again."""
    step = trainer.Trainer.step
    monkeypatch.setattr(trainer.Trainer, "step", lambda self: step(self) | {"unknown": 1.0})
    run(tmp_path, "--tracker", "wandb")
    assert_wandb_has(wandb.runs[0].logs, tmp_path)


# Without a library, without a tracker


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_library_is_one_line_before_anything_is_written(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)  # makes `import name` fail
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    line = error_line("--tracker", name, "--out", str(tmp_path / "run"))
    assert line.endswith(f"pip install {name}")
    assert not (tmp_path / "run").exists()


def test_a_folder_named_wandb_is_not_the_library(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", ModuleType("wandb"))
    assert error_line("--tracker", "wandb", "--out", str(tmp_path)).endswith("pip install wandb")


def test_only_rank_0_has_a_tracker(tmp_path, wandb, monkeypatch):
    monkeypatch.setattr(report, "rank", lambda: 1)
    with report.tracker_class("wandb")(tmp_path, {}) as tracker:
        assert tracker is None
    assert not wandb.inits


def test_a_run_without_a_tracker_imports_nothing_of_it(tmp_path):
    script = "import sys, train_leap_align; train_leap_align.main(sys.argv[1:]); print(*sys.modules)"
    command = [sys.executable, "-c", script, *SMALL, "--iterations", "1", "--out", str(tmp_path)]
    modules = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert "runtime.report" in modules
    assert not {"runtime.tracker", "torch.utils.tensorboard", "tensorboard", "wandb"} & set(modules)
