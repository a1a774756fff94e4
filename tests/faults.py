"""Faults injected into runs: `python -m tests.faults` (minutes; --short for the four faults that the tests run).

Each fault hits a small toy run, which is then resumed and must end bit for bit like an undisturbed one: the log, the
evaluators and the weights.  The table at the end counts how often the run survived.
"""

import argparse
import csv
import ctypes
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from tqdm import tqdm

import train_leap_align as trainer
from runtime import checkpoint
from toy.modes import Modes

ROOT = Path(__file__).resolve().parent.parent
FLAGS = "--pretrain-steps 300 --reward-steps 300 --evaluation-samples 160 --T 12 --batch-size 64".split()
FLAGS += "--iterations 60 --checkpoint-every 5 --evaluate-every 30".split()
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "train_leap_align.py"]
draw = random.Random(0)
tqdm.monitor_interval = 0  # its thread may hold tqdm's lock at a fork, and the child would wait for it for ever


def arguments(out: Path) -> list[str]:
    """Flags that start the run, or resume it if it has a checkpoint."""
    has_checkpoint = any((out / "checkpoint").glob("[0-9]*"))
    return [*FLAGS, "--out", str(out), *(["--resume"] if has_checkpoint else [])]


def start(out: Path, before=lambda: None) -> int:
    """The run in a forked process, which need not import anything again; before() runs in it first."""
    pid = os.fork()
    if pid:
        return pid
    for number in (signal.SIGINT, signal.SIGHUP):  # both are ignored where this program runs in the background
        signal.signal(number, signal.SIG_DFL)
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(os.open(out.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    status = 0
    Modes.draw_figures = trainer.report.draw_curves = lambda *_: None  # figures would take most of the time
    try:
        before()
        trainer.main(arguments(out))
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
        print(stop.code, file=sys.stderr)
    except BaseException as error:
        status = 70
        print(repr(error), file=sys.stderr)
    sys.stderr.flush()
    os._exit(status)


def exit_status(pid: int) -> int:
    """The exit status of a process; a signal that ended it is negative."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def outcome(out: Path) -> tuple:
    """What must be equal: the log without its seconds, the evaluators, the weights."""
    with (out / "metrics.csv").open(newline="") as file:
        log = [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]
    result = json.loads((out / "result.json").read_text())
    weights = load_file(out / "model" / "weights.safetensors")
    return log, result["before"], result["after"], {name: weight.tolist() for name, weight in weights.items()}


def recovers(out: Path, expected: tuple) -> bool:
    """Whether the run resumes to its end with the outcome of an undisturbed run."""
    return exit_status(start(out)) == 0 and outcome(out) == expected


# Faults: each returns True if nothing was lost


def killed(folder: Path, expected: tuple, during_checkpoint: bool, kills: int = 1) -> bool:
    """SIGKILL, at any moment or while a checkpoint is written."""
    out = folder / "run"
    for _ in range(kills):
        pid = start(out, slow_fsync if during_checkpoint else lambda: None)
        part = out / "checkpoint" / "part"
        time.sleep(draw.uniform(0, 1))
        while during_checkpoint and not part.exists() and os.waitpid(pid, os.WNOHANG) == (0, 0):
            time.sleep(0.0005)
        time.sleep(draw.uniform(0, 0.02) if during_checkpoint else 0)
        try:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        except (ProcessLookupError, ChildProcessError):
            break  # the run finished first
        if during_checkpoint and part.exists():
            INTERRUPTED.append(out)
    return ((out / "result.json").exists() and outcome(out) == expected) or recovers(out, expected)


def slow_fsync() -> None:
    """Keeps a checkpoint half written for longer, so that a kill can hit it."""
    fsync = checkpoint.fsync

    def slow(*paths: Path) -> None:
        time.sleep(0.01)
        fsync(*paths)

    checkpoint.fsync = slow


INTERRUPTED: list[Path] = []
"""Runs that were killed with half a checkpoint on the disk."""


def damaged(folder: Path, expected: tuple, damage: str) -> bool:
    """The newest checkpoint is cut off, or one bit of it is flipped."""
    out = folder / "run"
    stop_after(out, iterations=draw.randrange(12, 55))
    newest = max((out / "checkpoint").glob("[0-9]*"))
    file = draw.choice(sorted(newest.iterdir()))
    content = bytearray(file.read_bytes())
    position = draw.randrange(len(content))
    content[position] ^= 1 << draw.randrange(8)
    file.write_bytes(content if damage == "flipped" else content[:position])
    return recovers(out, expected)


def stop_after(out: Path, iterations: int) -> None:
    """A run that SIGTERM stops after some iterations."""

    def stop() -> None:
        step = trainer.Trainer.step

        def counted(self):
            if self.progress.iteration == iterations:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(self)

        trainer.Trainer.step = counted

    assert exit_status(start(out, stop)) == 128 + signal.SIGTERM


def signalled(folder: Path, expected: tuple, number: int) -> bool:
    """SIGTERM or SIGINT from outside: the run saves, exits with the signal's status, and resumes."""
    out, iterations = folder / "run", draw.randrange(45)
    pid, log = start(out), out / "metrics.csv"
    while not log.exists() or len(log.read_text().splitlines()) <= iterations:  # its first line names the columns
        time.sleep(0.001)
    os.kill(pid, number)
    return exit_status(pid) == 128 + number and recovers(out, expected)


def second_start(folder: Path, expected: tuple, resume: bool) -> bool:
    """The same command again while the run lives: refused, and the run ends as if nothing had happened."""
    out = folder / "run"

    def slow_down() -> None:
        step = trainer.Trainer.step
        trainer.Trainer.step = lambda self: (time.sleep(0.2), step(self))[1]

    pid, log = start(out, slow_down), out / "metrics.csv"
    while not log.exists() or len(log.read_text().splitlines()) <= 7:  # one checkpoint is written
        time.sleep(0.01)
    flags = [*FLAGS, "--out", str(out), *(["--resume"] if resume else [])]
    second = subprocess.run([sys.executable, "train_leap_align.py", *flags], cwd=ROOT, capture_output=True, text=True)
    refused = second.returncode == 1 and "is in use by another process" in second.stderr
    return exit_status(pid) == 0 and refused and outcome(out) == expected


def lock_of_a_killed_run(folder: Path, expected: tuple) -> bool:
    """SIGKILL leaves no lock: the run resumes at once."""
    out = folder / "run"
    pid, log = start(out), out / "metrics.csv"
    while not log.exists() or len(log.read_text().splitlines()) <= draw.randrange(1, 40):
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return (out / ".lock").exists() and recovers(out, expected)


def stray_files(folder: Path, expected: tuple) -> bool:
    """Copies and notes in checkpoint/ of a stopped run: it resumes, and they stay."""
    out = folder / "run"
    stop_after(out, iterations=draw.randrange(12, 55))
    newest = max((out / "checkpoint").glob("[0-9]*"))
    strays = [newest.with_name(f"{newest.name}-mine"), newest.with_name("9notes"), newest.with_name("999999.bak")]
    for stray in strays:
        shutil.copytree(newest, stray)
    return recovers(out, expected) and all(stray.exists() for stray in strays)


def foreign_folder(folder: Path, expected: tuple) -> bool:
    """A folder with somebody else's files: refused, and not one byte changes."""
    out = folder / "run"
    names = ["config.json", "samples/a.png", "transformer/config.json", "model/a", "checkpoint/000001/a"]
    for name in draw.sample(names, 3):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("{}")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    status = exit_status(start(out))
    return status == 1 and before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def filled(folder: Path, expected: tuple) -> bool | None:
    """A disk that is full during a checkpoint and has room again later; None if no disk can be mounted."""
    disk = folder / "disk"
    disk.mkdir()
    mount = ctypes.CDLL(None).mount
    if mount(b"none", str(disk).encode(), b"tmpfs", 0, b"size=9m"):
        return None
    try:
        out = disk / "run"
        stop_after(out, iterations=12)
        ballast = disk / "ballast"
        free = shutil.disk_usage(disk).free
        ballast.write_bytes(bytes(max(0, free - draw.randrange(400_000))))
        status, line = exit_status(start(out)), out.with_suffix(".log").read_text().splitlines()[-1]
        ballast.unlink()
        return status == 1 and "No space left" in line and recovers(out, expected)
    finally:
        ctypes.CDLL(None).umount2(str(disk).encode(), 2)


def poisoned(folder: Path, expected: tuple) -> bool:
    """NaN from the reward in some iterations: exactly those steps are skipped, the weights stay finite."""
    out, good = folder / "run", Modes.reward
    bad = set(draw.sample(range(60), 5))

    def poison() -> None:
        step = trainer.Trainer.step

        def counted(self):
            Modes.reward = (lambda *a: good(*a) * math.nan) if self.progress.iteration in bad else good
            try:
                return step(self)
            finally:
                Modes.reward = good

        trainer.Trainer.step = counted

    if exit_status(start(out, poison)):
        return False
    log, _, _, weights = outcome(out)
    skipped = {int(row["iteration"]) - 1 for row in log if float(row["skipped"])}
    return skipped == bad and all(torch.tensor(weight).isfinite().all() for weight in weights.values())


def lost_rank(folder: Path, expected: tuple) -> bool:
    """SIGKILL for one of two processes; a run of two processes then resumes."""
    out = folder / "run"
    while not (out / "result.json").exists():
        launched = subprocess.Popen(
            [*TORCHRUN, *arguments(out)], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        if not any((out / "checkpoint").glob("[0-9]*")):
            while not any((out / "checkpoint").glob("[0-9]*")):
                time.sleep(0.01)
            time.sleep(draw.uniform(0, 0.5))
            workers = Path(f"/proc/{launched.pid}/task/{launched.pid}/children").read_text().split()
            os.kill(int(draw.choice(workers)), signal.SIGKILL)
            launched.wait()
            if launched.returncode == 0 or not any((out / "checkpoint").glob("[0-9]*")):
                return False
        elif launched.wait():
            return False
    return outcome(out) == expected


# The table

SHORT = ("SIGKILL at any moment", "SIGKILL during a checkpoint", "disk full during a checkpoint", "NaN from the reward")


def two_processes(folder: Path) -> tuple:
    """The outcome of an undisturbed run on two processes."""
    subprocess.run([*TORCHRUN, *arguments(folder / "run")], cwd=ROOT, capture_output=True, check=True)
    return outcome(folder / "run")


def main() -> None:
    """Injects every fault several times and prints the table; exit status 1 if anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="once, and only the faults without a test of their own")
    short = parser.parse_args().short
    home = Path(tempfile.mkdtemp())
    exit_status(start(home / "undisturbed"))
    expected = outcome(home / "undisturbed")
    (home / "two").mkdir()
    two = None if short else two_processes(home / "two")
    faults = {
        "SIGKILL at any moment": (lambda f: killed(f, expected, False), 15),
        "SIGKILL during a checkpoint": (lambda f: killed(f, expected, True), 15),
        "SIGKILL five times in one run": (lambda f: killed(f, expected, False, 5), 3),
        "SIGTERM": (lambda f: signalled(f, expected, signal.SIGTERM), 5),
        "SIGINT (Ctrl-C)": (lambda f: signalled(f, expected, signal.SIGINT), 5),
        "SIGHUP (closed terminal)": (lambda f: signalled(f, expected, signal.SIGHUP), 5),
        "SIGUSR1 (Slurm)": (lambda f: signalled(f, expected, signal.SIGUSR1), 5),
        "second start beside a live run": (lambda f: second_start(f, expected, False), 3),
        "--resume beside a live run": (lambda f: second_start(f, expected, True), 3),
        "lock of a killed run": (lambda f: lock_of_a_killed_run(f, expected), 5),
        "stray folders in checkpoint/": (lambda f: stray_files(f, expected), 5),
        "foreign folder as --out": (lambda f: foreign_folder(f, expected), 5),
        "checkpoint cut off": (lambda f: damaged(f, expected, "cut"), 10),
        "checkpoint with one bit flipped": (lambda f: damaged(f, expected, "flipped"), 10),
        "disk full during a checkpoint": (lambda f: filled(f, expected), 5),
        "NaN from the reward": (lambda f: poisoned(f, expected), 5),
        "one of two processes killed": (lambda f: lost_rank(f, two), 3),
    }
    if short:
        faults = {name: (faults[name][0], 1) for name in SHORT}
    jobs = [(name, fault) for name, (fault, times) in faults.items() for _ in range(times)]
    survived = {name: [] for name, _ in jobs}
    for number, (name, fault) in enumerate(tqdm(jobs, "faults")):
        folder = home / str(number)
        folder.mkdir()
        survived[name].append(fault(folder))
        if survived[name][-1] is False:
            tqdm.write(f"lost: {name}, see {folder}")
    print(f"| {'fault':32}| times | survived | lost |\n|{'-' * 33}|-------|----------|------|")
    for name, results in survived.items():
        times = sum(result is not None for result in results)
        print(f"| {name:32}| {times:5} | {results.count(True):8} | {results.count(False):4} |")
    print(f"{len(INTERRUPTED)} runs were killed with half a checkpoint on the disk")
    if any(False in results for results in survived.values()):
        sys.exit(1)
    shutil.rmtree(home)


if __name__ == "__main__":
    main()
