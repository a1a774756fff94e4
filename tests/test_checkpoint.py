"""Runs that are stopped, damaged and resumed; `python -m tests.faults` does much more of it."""

import os
import shutil
import signal
import subprocess
import sys

import pytest

import train_leap_align as trainer
from runtime import checkpoint
from tests.toy_runs import ROOT, checkpoints, error_line, metrics, result, run, without_figures


@pytest.fixture(autouse=True)
def _no_figures(monkeypatch):
    """The reference run, which is made before this, has them."""
    without_figures(monkeypatch)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "reference"
    run(out)
    return out


def test_a_resumed_run_equals_an_uninterrupted_one(reference, tmp_path):
    run(tmp_path, "--iterations", "2")
    resumed = run(tmp_path, "--iterations", "4", "--resume")
    assert resumed == metrics(reference)
    assert result(tmp_path)["after"] == result(reference)["after"]


def test_a_resumed_run_drops_the_rows_after_its_checkpoint(reference, tmp_path):
    flags = ["--checkpoint-every", "2"]
    run(tmp_path, *flags)
    run(tmp_path / "short", *flags, "--iterations", "2")
    shutil.copytree(tmp_path / "short" / "checkpoint", tmp_path / "checkpoint", dirs_exist_ok=True)
    assert run(tmp_path, *flags, "--resume") == metrics(reference)


def test_the_newest_checkpoints_are_kept(tmp_path):
    run(tmp_path, "--checkpoint-every", "1")
    assert checkpoints(tmp_path) == ["000003", "000004"]
    run(tmp_path / "one", "--checkpoint-every", "1", "--checkpoints-total-limit", "1")
    assert checkpoints(tmp_path / "one") == ["000004"]


@pytest.mark.parametrize("pattern", ["*.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "removed"])
def test_a_damaged_checkpoint_is_reported_and_the_one_before_it_loaded(reference, tmp_path, capsys, pattern, damage):
    run(tmp_path, "--checkpoint-every", "1", "--iterations", "3")
    (file,) = (tmp_path / "checkpoint" / "000003").glob(pattern)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content if damage == "flipped" else content[: len(content) // 2])
    if damage == "removed":
        file.unlink()
    (tmp_path / "metrics.csv").unlink()
    assert run(tmp_path, "--checkpoint-every", "1", "--resume") == metrics(reference)
    assert "000003 is damaged" in capsys.readouterr().out
    assert result(tmp_path)["after"] == result(reference)["after"]


def test_a_run_without_an_undamaged_checkpoint_is_refused(tmp_path):
    run(tmp_path, "--iterations", "1")
    for file in (tmp_path / "checkpoint").rglob("state.json"):
        file.write_text("")
    assert "no undamaged checkpoint among 1" in error_line("--out", str(tmp_path), "--resume", "--iterations", "1")


@pytest.mark.parametrize("owner, name", [(checkpoint.dcp, "save"), (checkpoint, "fsync")], ids=["written", "synced"])
def test_a_failed_checkpoint_leaves_the_one_before_it(reference, tmp_path, monkeypatch, owner, name):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    run(tmp_path, "--iterations", "2")
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fail)
        assert "No space left on device" in error_line("--out", str(tmp_path), "--resume")
    assert checkpoints(tmp_path)[0] == "000002"
    assert run(tmp_path, "--resume") == metrics(reference)


def test_a_removed_folder_is_not_created_again(tmp_path, monkeypatch):
    step = trainer.Trainer.step

    def removing(self):
        shutil.rmtree(tmp_path / "run")
        return step(self)

    monkeypatch.setattr(trainer.Trainer, "step", removing)
    assert "is gone" in error_line("--out", str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_iteration_saves_and_sets_the_exit_status(reference, tmp_path, monkeypatch, capsys, number):
    step, handler = trainer.Trainer.step, signal.getsignal(number)

    def signalled(self):
        if self.progress.iteration == 1:
            os.kill(os.getpid(), number)
            assert signal.getsignal(number) == signal.SIG_DFL  # a second one ends the process at once
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "step", signalled)
        with pytest.raises(SystemExit) as stop:
            run(tmp_path)
    assert stop.value.code == 128 + number and "continue with --resume" in capsys.readouterr().err
    assert checkpoints(tmp_path) == ["000002"] and signal.getsignal(number) == handler
    assert run(tmp_path, "--resume") == metrics(reference)


def test_a_run_that_stopped_before_its_first_checkpoint_may_start_again(reference, tmp_path, monkeypatch):
    def interrupted(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "step", interrupted)
        with pytest.raises(SystemExit, match="interrupted; "):
            run(tmp_path)
    assert "start the run without --resume" in error_line("--out", str(tmp_path), "--resume")
    assert run(tmp_path) == metrics(reference)


def test_resuming_refuses_fewer_iterations_than_are_done(reference):
    line = error_line("--out", str(reference), "--resume", "--iterations", "3")
    assert "iterations=3, but the run has already done 4" in line


def test_resuming_refuses_other_settings_and_an_empty_folder(reference, tmp_path):
    line = error_line("--out", str(reference), "--resume", "--lr", "0.5")
    assert "lr was 0.0001, is 0.5" in line
    assert "nothing to resume" in error_line("--out", str(tmp_path), "--resume")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="faults.py forks")
def test_four_faults_lose_nothing():
    done = subprocess.run([sys.executable, "-m", "tests.faults", "--short"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert done.stdout.count("|    0 |") == 4
