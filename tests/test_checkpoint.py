"""Runs that are stopped, damaged and resumed; `python -m tests.faults` does much more of it."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import Mock

import psutil
import pytest
import torch
from safetensors.torch import load_file

import train_leap_align as trainer
from leap_align import BadInput
from runtime import checkpoint, files
from runtime.ema import EMA
from runtime.processes import StoppedBySignal, stop_on_signals
from tests.toy_runs import (
    ROOT,
    TORCHRUN,
    before_every_step,
    checkpoints,
    error_line,
    flip_a_bit,
    in_group,
    metrics,
    result,
    run,
)
from toy.modes import Modes
from toy.nets import VelocityNet

pytestmark = pytest.mark.usefixtures("no_figures")
EACH = ["--checkpoint-every", "1"]


def assert_resumes(out, reference, *flags):
    """The run resumes, and ends like the undisturbed one."""
    assert run(out, "--resume", *flags) == metrics(reference)
    assert result(out)["after"] == result(reference)["after"]


def test_a_resumed_run_equals_an_uninterrupted_one(reference, tmp_path):
    """It drops the rows after its checkpoint."""
    run(tmp_path, *EACH, "--iterations", "3")
    shutil.rmtree(tmp_path / "checkpoint" / "000003")
    assert_resumes(tmp_path, reference)
    assert checkpoints(tmp_path) == ["000002", "000004"]  # the newest two


def test_a_checkpoint_is_written_after_so_many_minutes_or_iterations(tmp_path, monkeypatch):
    """At three minutes an iteration, the default of 100 iterations alone would be five hours."""
    minutes = iter(range(1000))
    monkeypatch.setattr(trainer.time, "monotonic", lambda: 60.0 * next(minutes))
    run(tmp_path, "--iterations", "4", "--checkpoint-minutes", "1.5", "--checkpoints-total-limit", "9")
    assert checkpoints(tmp_path) == ["000002", "000004"]


@pytest.mark.parametrize("flags", [[], ["--async-checkpoints"]])
def test_a_checkpoint_is_on_the_disk_before_its_state_and_that_before_the_oldest_goes(tmp_path, monkeypatch, flags):
    """By inodes, and by this project's own calls; each with whether state.json was there."""
    events, rmtree, newest = [], shutil.rmtree, tmp_path / "checkpoint" / "000002"
    state = newest / "state.json"
    own = {"fsync": lambda descriptor: events.append((os.fstat(descriptor).st_ino, state.exists()))}
    monkeypatch.setattr(files, "os", SimpleNamespace(**vars(os) | own))
    monkeypatch.setattr(shutil, "rmtree", lambda path, **how: events.append(f"remove {path}") or rmtree(path, **how))
    run(tmp_path, "--iterations", "2", *EACH, "--checkpoints-total-limit", "1", *flags)
    assert checkpoints(tmp_path) == ["000002"]
    before_removal = set(events[: events.index(f"remove {newest.with_name('000001')}")])
    first = {(path.stat().st_ino, False) for path in (newest, state, *newest.glob("*.safetensors"))}
    last = {(path.stat().st_ino, True) for path in (newest, newest.parent)}
    assert len(first) == 3 and first | last <= before_removal


@pytest.mark.parametrize("pattern", ["*.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "removed"])
def test_a_damaged_checkpoint_is_reported_and_the_one_before_it_loaded(reference, tmp_path, capsys, pattern, damage):
    run(tmp_path, *EACH, "--iterations", "3")
    (file,) = (tmp_path / "checkpoint" / "000003").glob(pattern)
    middle = file.stat().st_size // 2
    {"cut": os.truncate, "flipped": flip_a_bit, "removed": lambda file, _: file.unlink()}[damage](file, middle)
    (tmp_path / "metrics.csv").unlink()
    assert_resumes(tmp_path, reference, *EACH)
    assert "000003 is damaged" in capsys.readouterr().out


def test_a_checkpoint_of_many_files(reference, tmp_path, monkeypatch, capsys):
    """No file exceeds the limit, unless it holds one tensor; one damaged file is found; resuming needs no limit."""
    limit = 1027  # of the 512 + 512 + 4 bytes that AdamW keeps of a bias, any two fit
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "FILE_BYTES", limit)
        run(tmp_path, "--iterations", "2", *EACH)
    files = sorted((tmp_path / "checkpoint" / "000002").glob("*.safetensors"))
    contents = [load_file(file) for file in files]
    assert all(sum(t.nbytes for t in tensors.values()) <= limit or len(tensors) == 1 for tensors in contents)
    assert max(len(tensors) for tensors in contents) > 1 and len(files) > 3
    (whole,) = (reference / "checkpoint" / "000004").glob("*.safetensors")
    assert sorted(name for tensors in contents for name in tensors) == sorted(load_file(whole))
    files[1].write_bytes(files[1].read_bytes()[:-1] + b"x")
    assert_resumes(tmp_path, reference, *EACH)
    assert "000002 is damaged" in capsys.readouterr().out


@pytest.fixture
def late_writes(monkeypatch):
    """Asynchronous checkpoints are written as late as possible: when something waits for them.

    Returns a list that gets, for each, the iteration after which it was written.
    """
    write, finish, step = checkpoint._write, checkpoint.Checkpoints.finish, trainer.Trainer.step
    waited, now, written_at = threading.Event(), [0], []

    def write_late(path, files):
        assert waited.wait(60) and not (path / "state.json").exists()
        written_at.append(now[0])
        return write(path, files)

    def counted_step(self):
        row = step(self)
        now[0] = self.progress.iteration
        return row

    def finish_late(self):
        waited.set()
        seconds = finish(self)
        waited.clear()
        return seconds

    monkeypatch.setattr(checkpoint, "_write", write_late)
    monkeypatch.setattr(checkpoint.Checkpoints, "finish", finish_late)
    monkeypatch.setattr(trainer.Trainer, "step", counted_step)
    return written_at


def contents(out):
    """What each checkpoint's files hold: tensors and progress, without what differs from run to run."""
    states = {path.parent.name: json.loads(path.read_text().split("\n")[1]) for path in out.rglob("state.json")}
    rows = {name: len(state.pop("metrics.csv").splitlines()) for name, state in states.items()}
    tensors = {path.relative_to(out): path.read_bytes() for path in out.rglob("*/0*/*.safetensors")}
    differ = {"seconds": 0, "checkpoint_seconds": 0, "config.json": ""}
    return tensors, rows, [state | differ for state in states.values()]


def test_an_asynchronous_checkpoint_is_that_of_its_iteration_to_the_bit(tmp_path, late_writes):
    """Although it is written after the next iteration; the end of the run waits for the last one."""
    every = [*EACH, "--checkpoints-total-limit", "9", "--evaluate-every", "2"]
    run(tmp_path / "at-once", *every)
    assert late_writes == [1, 2, 3, 4]
    run(tmp_path / "late", *every, "--async-checkpoints")
    assert late_writes[4:] == [2, 3, 4, 4] and len(checkpoints(tmp_path / "late")) == 4
    assert contents(tmp_path / "late") == contents(tmp_path / "at-once")


ENDS = {  # what stops a run in iteration 2, while the checkpoint of iteration 1 is being written; what it leaves
    "a signal": (lambda: os.kill(os.getpid(), signal.SIGTERM), ["000001"], 128 + signal.SIGTERM),
    "an error": (Mock(side_effect=BadInput("broken")), ["000001"], "error: broken"),
    "a full disk": (None, [], "free some space, then continue with --resume"),
}


@pytest.mark.parametrize("end", ENDS)
def test_what_ends_a_run_waits_for_its_asynchronous_checkpoint(reference, tmp_path, monkeypatch, late_writes, end):
    action, left, status = ENDS[end]
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        before_every_step(patch, lambda done: done == 1 and action and action())
        if action is None:
            patch.setattr(checkpoint, "save_file", Mock(side_effect=OSError(28, "No space left on device")))
        run(tmp_path, *EACH, "--async-checkpoints")
    assert stop.value.code == status or stop.value.code.endswith(status)
    assert checkpoints(tmp_path) == left and len(late_writes) == 1
    assert_resumes(tmp_path, reference, "--async-checkpoints")


@pytest.mark.parametrize("stop, flags, waits", [(4, [], 4), (4, ["--async-checkpoints"], 1), (2, [], 3)])
def test_a_run_says_how_long_training_stood_still_for_checkpoints(tmp_path, monkeypatch, capsys, stop, flags, waits):
    """Each takes 10 s, by a clock that only their writing moves; asynchronous ones are written during an iteration.

    What the last one before a restart took is not known to it.
    """
    is_open, written, write, own_files = threading.Event(), [], checkpoint._write, checkpoint._own_files
    finish = checkpoint.Checkpoints.finish

    def write_when_open(path, files):
        assert is_open.wait(60)
        digests = write(path, files)
        written.append(path)
        return digests

    def write_during_the_iteration(done):
        if flags and done:
            is_open.set()
            while len(written) < done:
                time.sleep(1e-3)

    def finish_open(self):
        is_open.set()
        return finish(self)

    monkeypatch.setattr(checkpoint, "_write", write_when_open)
    monkeypatch.setattr(checkpoint, "_own_files", lambda tensors: is_open.clear() or own_files(tensors))
    monkeypatch.setattr(checkpoint.Checkpoints, "finish", finish_open)
    monkeypatch.setattr(checkpoint, "time", SimpleNamespace(perf_counter=lambda: 10.0 * len(written)))
    before_every_step(monkeypatch, write_during_the_iteration)
    run(tmp_path, *EACH, "--iterations", str(stop), *flags)
    if stop < 4:
        run(tmp_path, *EACH, "--resume")
    assert result(tmp_path)["checkpoint_seconds"] == 10 * waits
    assert f" s of training, {10 * waits}.00 of waiting for checkpoints; files are in" in capsys.readouterr().out


def written_and_signalled(rank, folder):
    """An asynchronous checkpoint that is not waited for while it is written, and one that a signal waits for."""
    model, may_write, write = torch.nn.Linear(2, 2), threading.Event(), checkpoint._write
    parameters, progress = list(model.parameters()), checkpoint.Progress(iteration=1)
    optimizer = torch.optim.AdamW(parameters)
    state = checkpoint.TrainingState(model, optimizer, EMA(parameters, 0.5), torch.Generator())
    with pytest.MonkeyPatch.context() as patch, suppress(StoppedBySignal):
        patch.setattr(checkpoint, "_write", lambda *arguments: may_write.wait(60) and write(*arguments))
        with checkpoint.Checkpoints(folder, state, 2, is_async=True) as saved:
            saved.save(progress)
            is_waited_for = saved.finish_if_written() > 0
            may_write.set()
            saved.running.digests.result()
            saved.finish_if_written()
            is_finished = (folder / "checkpoint" / "000001" / "state.json").exists()
            saved.save(replace(progress, iteration=2))
            raise StoppedBySignal(15, True)
    return is_waited_for, is_finished, checkpoints(folder)


def test_an_asynchronous_checkpoint_is_finished_when_it_is_written_and_before_a_signal_ends_two_processes(tmp_path):
    for name in ("config.json", *checkpoint.LOGS):
        (tmp_path / name).write_text("{}")
    assert in_group(written_and_signalled, tmp_path) == [(False, True, ["000001", "000002"])] * 2
    assert all((path / "state.json").exists() for path in (tmp_path / "checkpoint").iterdir())


@pytest.mark.parametrize("free, waits", [(0, 4), (1e12, 0)])
def test_without_memory_for_a_copy_training_waits_for_an_asynchronous_checkpoint(
    tmp_path, capsys, monkeypatch, free, waits
):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=free))
    run(tmp_path, *EACH, "--async-checkpoints")
    assert capsys.readouterr().out.count("too little host memory for a copy (0.0 GB a process)") == waits


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
    assert measured["save"] < limit < sum(sizes) / 10
    assert measured["load"] < 2 * limit
    assert measured["export"] < 3 * limit < measured["weights"] / 2  # a file, and a weight that is gathered
    assert measured["text_encoder_private"] < measured["text_encoder"] / 10  # the rest is mapped from the file


@pytest.mark.parametrize("owner, name", [(checkpoint, "save_file"), (checkpoint, "fsync")], ids=["written", "synced"])
def test_a_failed_checkpoint_leaves_the_one_before_it(reference, tmp_path, monkeypatch, owner, name):
    run(tmp_path, "--iterations", "2")
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, Mock(side_effect=OSError(28, "No space left on device")))
        assert "No space left on device" in error_line("--out", str(tmp_path), "--resume")
    assert checkpoints(tmp_path) == ["000002"]
    assert_resumes(tmp_path, reference)


def test_a_removed_folder_is_not_created_again(tmp_path, monkeypatch):
    before_every_step(monkeypatch, lambda _: shutil.rmtree(tmp_path / "run"))
    assert "is gone" in error_line("--out", str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_saves_and_sets_the_exit_status(reference, tmp_path, monkeypatch, capsys, number):
    handler = signal.getsignal(number)

    def send(iteration):
        if iteration == 1:
            os.kill(os.getpid(), number)
            assert signal.getsignal(number) == signal.SIG_DFL  # a second one ends the process at once

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        before_every_step(patch, send)
        run(tmp_path)
    assert stop.value.code == 128 + number and "continue with --resume" in capsys.readouterr().err
    assert checkpoints(tmp_path) == ["000001"] and signal.getsignal(number) == handler
    assert_resumes(tmp_path, reference)


PARTS = ["--gradient-accumulation-steps", "2", "--evaluate-every", "2"]
EVALUATION, ITERATION = 25 + 2, 2 * 21  # calls of the model: 25 steps and the two leaps of a figure; two microbatches
MOMENTS = {  # the call of the model during which a signal arrives, and the checkpoint that it leaves
    "the first evaluation": (5, None),
    "the first call of iteration 1": (EVALUATION + 1, "000000"),
    "the second microbatch of iteration 1": (EVALUATION + 21 + 5, "000000"),
    "iteration 2": (EVALUATION + ITERATION + 5, "000001"),
    "the last call of iteration 1": (EVALUATION + ITERATION, "000001"),
    "the evaluation of iteration 2": (EVALUATION + 2 * ITERATION + 5, "000002"),
    "iteration 3": (2 * EVALUATION + 2 * ITERATION + 5, "000002"),
    "the last evaluation": (2 * EVALUATION + 4 * ITERATION + 5, "000004"),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An undisturbed run of two microbatches."""
    out = tmp_path_factory.mktemp("run") / "whole"
    run(out, *PARTS)
    return out


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_signal_saves_the_last_finished_iteration_before_the_models_next_call(whole, tmp_path, monkeypatch, moment):
    """An iteration may take longer than a cluster gives.  Two signals, and the run ends like the undisturbed one."""
    out, (number, newest), calls = tmp_path / "run", MOMENTS[moment], []

    def forward(*inputs, forward=VelocityNet.forward):
        calls.append(inputs)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(*inputs)

    with monkeypatch.context() as patch:
        patch.setattr(VelocityNet, "forward", forward)
        for _ in range(2):  # once more in the first call of the resumed run
            with pytest.raises(SystemExit) as stop:
                run(out, *PARTS, "--resume")
            assert stop.value.code == 128 + signal.SIGTERM and len(calls) == number
            assert newest is None or checkpoints(out)[-1] == newest
            number = len(calls) + 1
    assert newest or not (out / "checkpoint").exists()
    run(out, *PARTS, "--resume")
    assert metrics(out) == metrics(whole) and result(out)["after"] == result(whole)["after"]
    for name in ("evaluations.csv", "model/weights.safetensors"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_training_saves_nothing(reference, tmp_path, monkeypatch, capsys, number):
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(trainer, "build_task", lambda flags: os.kill(os.getpid(), number))
        run(tmp_path)
    assert stop.value.code == 128 + number and "nothing new was saved" in capsys.readouterr().err
    assert run(tmp_path, "--resume") == metrics(reference)


def killed(*_):
    raise KeyboardInterrupt


def killed_before_state(*paths):
    if "state" in paths[0].name:
        shutil.copy(paths[0], paths[0].with_name("state.json.1.part"))  # which a killed process leaves
        raise KeyboardInterrupt


KILLED = {  # what stops the run before its first checkpoint is whole
    "in the first iteration": (trainer.Trainer, "step", killed),
    "in the first iteration, other flags": (trainer.Trainer, "step", killed),
    "in the first iteration, with a torn log": (trainer.Trainer, "step", killed),
    "in the first checkpoint": (checkpoint, "_publish", killed),
    "in the state of the first checkpoint": (checkpoint, "fsync", killed_before_state),
}


@pytest.mark.parametrize("state", ["new", "empty", *KILLED])
def test_resume_starts_a_run_that_has_no_checkpoint(reference, tmp_path, monkeypatch, capsys, state):
    """So that a command with --resume both starts and continues a run, whatever has stopped it before."""
    out = tmp_path / "run"
    if state != "new":
        out.mkdir()
    if state in KILLED:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(*KILLED[state])
            run(out, *(["--lr", "0.1"] if "other flags" in state else []))
    if "torn" in state:
        (out / "metrics.csv").write_bytes(b"iteration,loss\n1,\0\0")
    assert run(out, "--resume") == metrics(reference)
    assert "lr 0.0001, from the start, because there is no checkpoint." in capsys.readouterr().out
    shutil.rmtree(out / "checkpoint")
    line = error_line("--out", str(out), "--resume")
    assert line.endswith("holds a finished run without its checkpoints: choose another --out, or delete it")


def test_an_ignored_hangup_stays_ignored():
    """As under nohup."""
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_on_signals() as request:
            os.kill(os.getpid(), signal.SIGHUP)
        assert request.signal == 0
    finally:
        signal.signal(signal.SIGHUP, previous)


def test_too_many_skipped_steps_stop_a_run_that_can_resume_from_before_them(reference, tmp_path, monkeypatch):
    """No checkpoint is written inside a broken stretch, and those before it stay."""
    broken = lambda self, sample, _: sample.sum(1) * math.nan  # noqa: E731
    with monkeypatch.context() as patch:
        before_every_step(patch, lambda done: done == 2 and patch.setattr(Modes, "reward", broken))
        line = error_line("--out", str(tmp_path), *EACH, "--max-skipped-steps", "2")
    assert "2 updates in a row skipped" in line and "start again in another --out" in line
    assert checkpoints(tmp_path) == ["000001", "000002"]
    assert_resumes(tmp_path, reference)


def test_damaged_checkpoints_copies_and_notes_cost_no_good_checkpoint(reference, tmp_path):
    """They would otherwise count towards the limit, and the checkpoint just written would be deleted."""
    run(tmp_path, *EACH, "--iterations", "3", "--checkpoints-total-limit", "3")
    folder = tmp_path / "checkpoint"
    for name in ("000002", "000003"):
        (folder / name / "state.json").write_text("")
    for name in ("20260715", "000001-mine"):
        shutil.copytree(folder / "000001", folder / name)
    (folder / "9notes").mkdir()
    (folder / "000300").touch()
    run(tmp_path, "--resume", *EACH, "--iterations", "2", "--checkpoints-total-limit", "1")
    assert checkpoints(tmp_path) == ["000001-mine", "000002", "000003", "000300", "20260715", "9notes"]
    assert_resumes(tmp_path, reference)


def test_a_refused_start_says_why_and_changes_nothing(reference, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(reference, copy)
    (copy / ".lock").touch()
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    again = ["--out", str(copy), "--resume"]
    assert "iterations=3, but the run has already done 4" in error_line(*again, "--iterations", "3")
    assert "lr was 0.0001, is 0.5" in error_line(*again, "--lr", "0.5")
    assert "holds another run" in error_line("--out", str(copy))
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before
    for file in (copy / "checkpoint").rglob("state.json"):
        file.write_text("")
    assert "no undamaged checkpoint among 1" in error_line(*again)


@pytest.mark.slow
def test_four_faults_lose_nothing():
    done = subprocess.run([sys.executable, "-m", "tests.faults", "--short"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert done.stdout.count("|    0 |") == 4
