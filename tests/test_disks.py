"""Disks that cannot do what a local one does, nodes that do not share one, links, and files that no run has written."""

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from unittest.mock import Mock

import pytest

import train_leap_align as trainer
from leap_align import BadInput
from runtime import checkpoint, files, processes, run_dir
from tests.toy_runs import SMALL, checkpoints, error_line, failing, is_folder, limit_disks, metrics, result, run

pytestmark = pytest.mark.usefixtures("no_figures")
EACH = ["--checkpoint-every", "1"]


# Disks
@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EINVAL, errno.ENOTSUP])
def test_a_disk_without_locks_fsync_and_renames_of_folders_serves_a_run(reference, tmp_path, monkeypatch, number):
    limit_disks(monkeypatch, number)
    run(tmp_path, *EACH, "--iterations", "3")
    shutil.rmtree(tmp_path / "checkpoint" / "000003")
    assert run(tmp_path, "--resume") == metrics(reference)
    assert result(tmp_path)["after"] == result(reference)["after"]
    assert checkpoints(tmp_path) == ["000002", "000004"]
    assert not list(tmp_path.glob(".lock.*"))


@pytest.mark.parametrize("name", ["replace", "open"])
@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EPERM, errno.EOPNOTSUPP])
def test_a_disk_that_a_run_cannot_use_is_refused_before_training(tmp_path, monkeypatch, number, name):
    """As mountpoint-s3, which renames nothing and reads no file that is being written."""
    is_probe = lambda path: ".part" in str(path) and not is_folder(path)  # noqa: E731
    monkeypatch.setattr(os, name, failing(getattr(os, name), number, is_probe))
    monkeypatch.setattr(trainer, "build_task", Mock(side_effect=AssertionError))
    line = error_line("--out", str(tmp_path))
    assert line.startswith(f"error: the disk of {tmp_path} cannot write, read back and rename a file (")
    assert os.strerror(number) in line and line.endswith("choose an --out on another disk")


@pytest.mark.parametrize("number, remedy", [
    (errno.ENOSPC, "free some space"), (errno.EDQUOT, "free some space"), (errno.EROFS, "repair the disk"),
    (errno.EIO, "repair the disk"), (errno.EACCES, "repair the disk"),
])  # fmt: skip
def test_only_a_full_disk_asks_for_space(reference, tmp_path, monkeypatch, number, remedy):
    """While a checkpoint is written, and with the settings; a log that cannot be written is named."""
    error = OSError(number, os.strerror(number))
    run(tmp_path, "--iterations", "2")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "fsync", Mock(side_effect=error))
        line = error_line("--out", str(tmp_path), "--resume")
        assert f"{os.strerror(number)}): {remedy}, then continue with --resume" in line
        patch.setattr(run_dir, "write_text", Mock(side_effect=error))
        with pytest.raises(BadInput, match=rf"config\.json .*: {remedy}, or choose another --out$"):
            run_dir.write_settings(tmp_path / "config.json", {})
    log = run_dir.CsvLog(tmp_path / "log.csv", ("reward",), 0)
    log.file = Mock(flush=Mock(side_effect=error))
    with pytest.raises(OSError, match=r"log\.csv"):
        log.add({"iteration": 1})


def test_a_folder_on_a_disk_that_renames_files_only_is_still_replaced(tmp_path, monkeypatch):
    limit_disks(monkeypatch, errno.EMFILE)
    for name in ("old", "new"):
        with files.atomic_folder(tmp_path / "lora") as temporary:
            (temporary / name).write_text(name)
    assert [path.name for path in tmp_path.rglob("*")] == ["lora", "new"]


# Nodes
def test_nodes_with_folders_of_their_own_are_refused(tmp_path, monkeypatch):
    """Also where each has a copy of the same run's folder: here as the second node sees it."""
    for name in (".lock", ".lock.0123456789abcdef", "config.json"):
        (tmp_path / name).write_text('{"tool": "train"}')
    monkeypatch.setattr(processes, "rank", lambda: 1)
    monkeypatch.setattr(run_dir, "all_gather", lambda own: ["00112233aabbccdd", own])
    with pytest.raises(BadInput, match="is not the same on every node: give an --out on a disk that all nodes share"):
        with run_dir.locked_folder(tmp_path, "config.json", "train"):
            raise AssertionError
    (tmp_path / ".lock.00112233aabbccdd").write_text("00112233aabbccdd")
    with run_dir.locked_folder(tmp_path, "config.json", "train"):
        pass


LOSSES = {
    "gone": lambda file: file.unlink(),
    "cut": lambda file: os.truncate(file, file.stat().st_size - 1),
    "empty": lambda file: file.write_bytes(b""),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_a_checkpoint_with_a_missing_shard_is_not_published(reference, tmp_path, monkeypatch, loss):
    """As if another node had written it on a disk of its own; the checkpoints before it stay."""
    monkeypatch.setattr(checkpoint, "FILE_BYTES", 1027)
    run(tmp_path, "--iterations", "2", *EACH)
    write = checkpoint._write

    def write_and_lose(path, files):
        digests = write(path, files)
        LOSSES[loss](sorted(path.glob("*.safetensors"))[1])
        return digests

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_write", write_and_lose)
        line = error_line("--out", str(tmp_path), "--resume", *EACH)
    assert "cannot write" in line and ("No such file" in line) == (loss == "gone")
    assert checkpoints(tmp_path) == ["000001", "000002"]
    assert run(tmp_path, "--resume") == metrics(reference)


# What stands in state.json
@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run with two checkpoints of many files."""
    out = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "FILE_BYTES", 1027)
        run(out, "--iterations", "2", *EACH)
    return out


@pytest.fixture(scope="module")
def live():
    """A trainer into which a checkpoint of that run can be loaded."""
    flags = trainer.parse(SMALL)
    return trainer.Trainer(flags.run, flags.method, trainer.build_task(flags))


@pytest.fixture
def out(stopped, tmp_path):
    """A copy of the run to change."""
    return shutil.copytree(stopped, tmp_path / "run")


NAMES = ["iteration", "updates", "consecutive_skips", "seconds", "evaluations", "warnings", "digests", "generator"]
NAMES += ["metrics.csv", "evaluations.csv", "checkpoint_seconds"]
WRONG = [(name, value) for name in NAMES for value in (None, "x\ud800", [None], {"a": None}, ...)]
WRONG += [("evaluations", [{"iteration": 1}]), ("generator", [300] * 5056), ("digests", {"a/b": "c"})]
DIGESTS = {
    "none": lambda digests: {},
    "one missing": lambda digests: dict(list(digests.items())[1:]),
    "outside": lambda digests: {f"../000002/{name}": value for name, value in digests.items()},
}
CHANGES = {
    **{f"{name} {value!s:.30}": {name: lambda _, value=value: value} for name, value in WRONG},
    **{f"digests {kind}": {"digests": change} for kind, change in DIGESTS.items()},
}


@pytest.mark.parametrize("kind", CHANGES)
def test_a_checkpoint_whose_state_no_run_has_written_is_damaged(live, out, capsys, kind):
    """Wrong types, or digests that do not cover the tensors, under a right digest; ... for no entry."""
    path = out / "checkpoint" / "000002" / "state.json"
    state = json.loads(path.read_text().split("\n", 1)[1])
    state |= {name: change(state[name]) for name, change in CHANGES[kind].items()}
    text = json.dumps({name: value for name, value in state.items() if value is not ...})
    path.write_text(f"{hashlib.blake2b(text.encode()).hexdigest()}\n{text}")
    assert checkpoint.load_checkpoint(out, live.state, 4)[0].iteration == 1
    assert "000002 is damaged (" in capsys.readouterr().out


TEXTS = ["[]", "3", "{", "[" * 10_000, '{"a":' * 10_000, '"\\ud800"', "\0"]


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: text[:10])
def test_a_state_that_is_no_state_is_damaged(live, out, text):
    for content in (text, f"{hashlib.blake2b(text.encode()).hexdigest()}\n{text}"):
        (out / "checkpoint" / "000002" / "state.json").write_text(content)
        assert checkpoint.load_checkpoint(out, live.state, 4)[0].iteration == 1


@pytest.mark.parametrize("contents", [[], "x", 3, None, ...])
def test_contents_of_wrong_types_are_refused(tmp_path, contents):
    (tmp_path / "config.json").write_text(json.dumps({} if contents is ... else {"contents": contents}))
    with pytest.raises(BadInput, match=r"config\.json is damaged"):
        run_dir.check_contents(tmp_path, {"prompts": "a"})


# Links
LINKS = ["checkpoint", "checkpoint/000002", "checkpoint/000002/state.json", "model", "model/weights.safetensors"]
LINKS += ["metrics.csv", "evaluations.csv", "result.json", "config.json", ".lock", "samples", "samples.png", "notes"]


@pytest.mark.parametrize("flags", [[], ["--resume"]])
@pytest.mark.parametrize("name", LINKS)
def test_a_link_in_a_runs_folder_is_refused(out, tmp_path, name, flags):
    elsewhere = tmp_path / "elsewhere"
    (out / name).rename(elsewhere) if (out / name).exists() else elsewhere.mkdir()
    (out / name).symlink_to(elsewhere)
    files = lambda: {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}  # noqa: E731
    before = files()
    line = error_line("--out", str(out), *flags)
    assert f"{out / name} is a link" in line or f"cannot write to {out / name}" in line
    assert files() == before


def test_a_pipe_in_a_runs_folder_is_refused(out):
    (out / "metrics.csv").unlink()
    os.mkfifo(out / "metrics.csv")
    assert "metrics.csv is a link or a device: move it out of" in error_line("--out", str(out), "--resume")


def test_links_to_the_folder_and_of_wandb_serve_and_a_hard_link_keeps_its_content(reference, stopped, tmp_path):
    out = shutil.copytree(stopped, tmp_path / "scratch" / "run", copy_function=os.link)
    (out / "wandb").mkdir()
    (out / "wandb" / "latest-run").symlink_to(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "scratch")
    before = (stopped / "metrics.csv").read_bytes()
    assert run(tmp_path / "link" / "run", "--resume") == metrics(reference)
    assert (stopped / "metrics.csv").read_bytes() == before


# Disks without locks
HOLDER = """
from filelock import SoftFileLock
import sys, time
lock = SoftFileLock(sys.argv[1])
lock.acquire()
print(flush=True)
time.sleep(100)
"""


def test_the_lock_of_a_disk_without_locks_is_taken_over_when_its_process_has_ended(tmp_path, monkeypatch):
    limit_disks(monkeypatch, errno.ENOSYS)
    path = tmp_path / ".lock.soft"
    with subprocess.Popen([sys.executable, "-c", HOLDER, path], stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        words = rf"in use by another process: .*; if process {holder.pid} has ended on its host, delete {path}$"
        with pytest.raises(BadInput, match=words), run_dir.locked_folder(tmp_path, "config.json", "train"):
            raise AssertionError
        holder.kill()
    with run_dir.locked_folder(tmp_path, "config.json", "train"):
        assert path.exists()
    assert not path.exists()
