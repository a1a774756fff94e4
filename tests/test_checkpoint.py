"""Runs that are stopped, damaged and resumed; `python -m tests.faults` does much more of it."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys

import pytest
from safetensors.torch import load_file

import train_leap_align as trainer
from runtime import checkpoint
from runtime.processes import stop_on_signals
from tests.toy_runs import ROOT, TORCHRUN, checkpoints, error_line, metrics, result, run, without_figures
from toy.modes import Modes


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


def test_a_checkpoint_of_many_files(reference, tmp_path, monkeypatch, capsys):
    """No file exceeds the limit, unless it holds one tensor; one damaged file is found; resuming needs no limit."""
    limit = 1027  # of the 512 + 512 + 4 bytes that AdamW keeps of a bias, any two fit
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "FILE_BYTES", limit)
        run(tmp_path, "--iterations", "2", "--checkpoint-every", "1")
    files = sorted((tmp_path / "checkpoint" / "000002").glob("*.safetensors"))
    contents = [load_file(file) for file in files]
    assert all(sum(t.nbytes for t in tensors.values()) <= limit or len(tensors) == 1 for tensors in contents)
    assert max(len(tensors) for tensors in contents) > 1 and len(files) > 3
    (whole,) = (reference / "checkpoint" / "000004").glob("*.safetensors")
    assert sorted(name for tensors in contents for name in tensors) == sorted(load_file(whole))
    files[1].write_bytes(files[1].read_bytes()[:-1] + b"x")
    assert run(tmp_path, "--resume", "--checkpoint-every", "1") == metrics(reference)
    assert "000002 is damaged" in capsys.readouterr().out
    assert result(tmp_path)["after"] == result(reference)["after"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_host_memory_is_that_of_a_file_whatever_the_models_size(tmp_path):
    pytest.importorskip("diffusers")
    limit = 2**26
    command = [*TORCHRUN[:-1], "-m", "tests.host_memory", str(tmp_path), "--blocks", "1", "--file-bytes", str(limit)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    measured = json.loads(done.stdout)
    sizes = [size for name, size in measured["files"].items() if name.startswith("checkpoint")]
    assert max(sizes) < 1.01 * limit < sum(sizes) / 10
    assert sum(sizes) == pytest.approx(measured["checkpoint"], rel=1e-3)
    assert measured["save"] < 3 * limit < sum(sizes) / 10
    assert measured["load"] < 2 * limit
    assert measured["export"] < 3 * limit < measured["weights"] / 2  # a file, and a weight that is gathered
    assert measured["text_encoder_private"] < measured["text_encoder"] / 10  # the rest is mapped from the file


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
    assert checkpoints(tmp_path) == ["000002"]
    assert run(tmp_path, "--resume") == metrics(reference)


def test_a_removed_folder_is_not_created_again(tmp_path, monkeypatch):
    step = trainer.Trainer.step

    def removing(self):
        shutil.rmtree(tmp_path / "run")
        return step(self)

    monkeypatch.setattr(trainer.Trainer, "step", removing)
    assert "is gone" in error_line("--out", str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_training_saves_nothing_and_sets_the_exit_status(
    reference, tmp_path, monkeypatch, capsys, number
):
    def build(flags):
        os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "build_task", build)
        with pytest.raises(SystemExit) as stop:
            run(tmp_path)
    assert stop.value.code == 128 + number and "nothing new was saved" in capsys.readouterr().err
    assert "nothing to resume" in error_line("--out", str(tmp_path), "--resume")
    assert run(tmp_path) == metrics(reference)


def test_an_ignored_hangup_stays_ignored():
    """As under nohup."""
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_on_signals() as request:
            os.kill(os.getpid(), signal.SIGHUP)
        assert request.signal == 0
    finally:
        signal.signal(signal.SIGHUP, previous)


def test_copies_and_notes_beside_the_checkpoints_do_no_harm(reference, tmp_path):
    run(tmp_path, "--iterations", "2", "--checkpoint-every", "1")
    shutil.copytree(tmp_path / "checkpoint" / "000002", tmp_path / "checkpoint" / "000002-mine")
    (tmp_path / "checkpoint" / "9notes").mkdir()
    assert run(tmp_path, "--resume", "--checkpoint-every", "1") == metrics(reference)
    assert checkpoints(tmp_path) == ["000002-mine", "000003", "000004", "9notes"]


def test_no_checkpoint_is_written_inside_a_broken_stretch(tmp_path, monkeypatch):
    """Those before it stay, so that a run can resume from before the divergence."""
    reward = Modes.reward
    with monkeypatch.context() as patch:
        patch.setattr(Modes, "reward", lambda self, x, c: reward(self, x, c) * (math.nan if BROKEN else 1))
        patch.setattr(trainer.Trainer, "step", breaking_step(2))
        assert "start again in another --out" in error_line(
            "--out", str(tmp_path), "--checkpoint-every", "1", "--max-skipped-steps", "2"
        )
    BROKEN.clear()
    assert checkpoints(tmp_path) == ["000001", "000002"]


BROKEN = []


def breaking_step(iteration, step=trainer.Trainer.step):
    """A step whose rewards are NaN from an iteration on."""

    def stepped(self):
        if self.progress.iteration >= iteration:
            BROKEN.append(iteration)
        return step(self)

    return stepped


def test_later_damaged_checkpoints_and_strays_cost_no_good_one(reference, tmp_path):
    """They would otherwise count towards the limit, and the checkpoint just written would be deleted."""
    run(tmp_path, "--checkpoint-every", "1", "--iterations", "3", "--checkpoints-total-limit", "3")
    for name in ("000002", "000003"):
        (tmp_path / "checkpoint" / name / "state.json").write_text("")
    shutil.copytree(tmp_path / "checkpoint" / "000001", tmp_path / "checkpoint" / "20260715")
    (tmp_path / "checkpoint" / "000300").touch()
    run(tmp_path, "--resume", "--checkpoint-every", "1", "--iterations", "2", "--checkpoints-total-limit", "1")
    assert checkpoints(tmp_path) == ["000002", "000003", "000300", "20260715"]
    assert run(tmp_path, "--resume") == metrics(reference)


def test_a_refused_resume_changes_nothing(reference, tmp_path):
    shutil.copytree(reference, tmp_path / "copy")
    before = {path: path.read_bytes() for path in (tmp_path / "copy").rglob("*") if path.is_file()}
    error_line("--out", str(tmp_path / "copy"), "--resume", "--iterations", "3")
    error_line("--out", str(tmp_path / "copy"), "--resume", "--lr", "1")
    after = {path: path.read_bytes() for path in (tmp_path / "copy").rglob("*") if path.is_file()}
    # The paths in config.json and the logs are those of the reference run, so its --out differs.
    assert {path.name for path in after.keys() - before.keys()} <= {".lock"}
    assert all(after[path] == content for path, content in before.items())


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
