"""Faults injected into runs: `python -m tests.faults` (minutes; --short for the four faults that the tests run).

After a fault a small toy run is resumed and must end bit for bit like an undisturbed one: log, evaluators, weights.
"""

import argparse
import ctypes
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.context import ForkProcess
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file
from tqdm import tqdm

import train_leap_align as trainer
from runtime import checkpoint
from runtime.run_dir import checkpoint_folders, checkpoints
from tests.toy_runs import ROOT, TORCHRUN, before_every_step, flip_a_bit, limit_disks, metrics, result, without_figures
from toy.modes import Modes

FLAGS = "--pretrain-steps 300 --reward-steps 300 --evaluation-samples 160 --T 12 --batch-size 64".split()
FLAGS += "--iterations 60 --checkpoint-every 5 --evaluate-every 30".split()
DRAW = random.Random(0)
PATCH = SimpleNamespace(setattr=setattr)  # changes code for good, in a process that ends with the run
INTERRUPTED: list[Path] = []  # runs that were killed with half a checkpoint on the disk
tqdm.monitor_interval = 0  # its thread may hold tqdm's lock at a fork, and the child would wait for it for ever


def arguments(out: Path) -> list[str]:
    """Flags that start the run, or continue it: --resume is always given, as by a cluster that starts a job again.

    Checkpoints are asynchronous in every second one, by chance.
    """
    return [*FLAGS, "--out", str(out), "--resume", *DRAW.choice([["--async-checkpoints"], []])]


def train(out: Path, before: Callable) -> None:
    """The run, with the end of its messages in out.log; before() runs first."""
    for number in (signal.SIGINT, signal.SIGHUP):  # both are ignored where this program runs in the background
        signal.signal(number, signal.SIG_DFL)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(out.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    without_figures(PATCH)
    before()
    trainer.main(arguments(out))


def start(out: Path, before=lambda: None) -> ForkProcess:
    """The run in a forked process, which need not import anything again."""
    process = ForkProcess(target=train, args=(out, before))
    process.start()
    return process


def exit_status(process: ForkProcess) -> int:
    process.join()
    return process.exitcode  # a signal that ended the process is negative


def last_line(out: Path) -> str:
    return out.with_suffix(".log").read_text().splitlines()[-1]


def outcome(out: Path) -> tuple:
    """What must be equal: the log without its seconds, the evaluators, the weights."""
    weights = {name: weight.tolist() for name, weight in load_file(out / "model" / "weights.safetensors").items()}
    return metrics(out), [result(out)[when] for when in ("before", "after")], weights


def recovers(out: Path, expected: tuple) -> bool:
    return exit_status(start(out)) == 0 and outcome(out) == expected


def start_and_wait(out: Path, iterations: int, before=lambda: None) -> ForkProcess:
    """Starts the run and waits for so many rows of its log."""
    process, log = start(out, before), out / "metrics.csv"
    while not log.exists() or len(log.read_text().splitlines()) <= iterations:  # its first line names the columns
        time.sleep(0.001)
    return process


def stop_after(out: Path, iterations: int) -> Path:
    """A run that SIGTERM stops after some iterations; returns its newest checkpoint."""
    stop = partial(before_every_step, PATCH, lambda done: done == iterations and os.kill(os.getpid(), signal.SIGTERM))
    assert exit_status(start(out, stop)) == 128 + signal.SIGTERM
    return checkpoints(out)[-1]


# Faults of a run in the folder `out`: each returns True if nothing was lost


def killed(out: Path, expected: tuple, during_checkpoint: bool = False, kills: int = 1) -> bool:
    """SIGKILL, at any moment or while a checkpoint is written."""
    fsync, has_half = checkpoint.fsync, lambda: len(checkpoint_folders(out)) > len(checkpoints(out))
    # A slow fsync keeps a checkpoint half written for longer, so that a kill can hit it.
    slow = partial(setattr, checkpoint, "fsync", lambda *paths: (time.sleep(0.01), fsync(*paths)))
    for _ in range(kills):
        process = start(out, slow if during_checkpoint else lambda: None)
        time.sleep(DRAW.uniform(0, 1))
        while during_checkpoint and not has_half() and process.is_alive():
            time.sleep(0.0005)
        time.sleep(DRAW.uniform(0, 0.02) if during_checkpoint else 0)
        process.kill()
        if exit_status(process) == 0:
            break  # the run finished first
        if during_checkpoint and has_half():
            INTERRUPTED.append(out)
    return ((out / "result.json").exists() and outcome(out) == expected) or recovers(out, expected)


def damaged(out: Path, expected: tuple, damage: Callable) -> bool:
    """A file of the newest checkpoint is cut off, or one bit of it is flipped, at a random position."""
    file = DRAW.choice(sorted(stop_after(out, DRAW.randrange(12, 55)).iterdir()))
    damage(file, DRAW.randrange(file.stat().st_size))
    return recovers(out, expected)


def signalled(out: Path, expected: tuple, number: int) -> bool:
    """A signal from outside: the run saves, exits with the signal's status, and resumes; SIGKILL leaves no lock."""
    process = start_and_wait(out, DRAW.randrange(45))
    os.kill(process.pid, number)
    status = -number if number == signal.SIGKILL else 128 + number
    return exit_status(process) == status and (out / ".lock").exists() and recovers(out, expected)


def second_start(out: Path, expected: tuple, *flags: str) -> bool:
    """The same command again while the run lives: refused, and the run ends as if nothing had happened."""
    process = start_and_wait(out, 7, lambda: before_every_step(PATCH, lambda _: time.sleep(0.2)))  # one checkpoint
    command = [sys.executable, "train_leap_align.py", *FLAGS, "--out", str(out), *flags]
    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    refused = second.returncode == 1 and "is in use by another process" in second.stderr
    return exit_status(process) == 0 and refused and outcome(out) == expected


def stray_files(out: Path, expected: tuple) -> bool:
    """Copies and notes in checkpoint/ of a stopped run: it resumes, and they stay."""
    newest = stop_after(out, DRAW.randrange(12, 55))
    strays = [newest.with_name(f"{newest.name}-mine"), newest.with_name("9notes"), newest.with_name("999999.bak")]
    for stray in strays:
        shutil.copytree(newest, stray)
    return recovers(out, expected) and all(stray.exists() for stray in strays)


def foreign_folder(out: Path, expected: tuple) -> bool:
    """A folder with somebody else's files: refused, and not one byte changes."""
    names = ["config.json", "samples/a.png", "transformer/config.json", "model/a", "checkpoint/000001/a"]
    for name in DRAW.sample(names, 3):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("{}")
    contents = lambda: {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}  # noqa: E731
    before = contents()
    return exit_status(start(out)) == 1 and "did not fill it" in last_line(out) and before == contents()


def filled(out: Path, expected: tuple) -> bool | None:
    """A disk that is full during a checkpoint and has room again later; None if no disk can be mounted."""
    out.mkdir()
    libc, disk = ctypes.CDLL(None), str(out).encode()
    if libc.mount(b"none", disk, b"tmpfs", 0, b"size=9m"):
        return None
    try:
        run, ballast = out / "run", out / "ballast"
        stop_after(run, 12)
        ballast.write_bytes(bytes(max(0, shutil.disk_usage(out).free - DRAW.randrange(400_000))))
        status = exit_status(start(run))
        ballast.unlink()
        return status == 1 and "No space left" in last_line(run) and recovers(run, expected)
    finally:
        libc.umount2(disk, 2)


def poisoned(out: Path, expected: tuple) -> bool:
    """NaN from the reward in some iterations: exactly those steps are skipped, the weights stay finite."""
    good, bad, evaluate = Modes.reward, set(DRAW.sample(range(60), 5)), trainer.Trainer.evaluate

    def poison() -> None:
        rewards = {True: lambda *inputs: good(*inputs) * math.nan, False: good}
        before_every_step(PATCH, lambda done: setattr(Modes, "reward", rewards[done in bad]))
        trainer.Trainer.evaluate = lambda *inputs: (setattr(Modes, "reward", good), evaluate(*inputs))[1]

    if exit_status(start(out, poison)):
        return False
    log, _, weights = outcome(out)
    skipped = {int(row["iteration"]) - 1 for row in log if row["skipped"]}
    return skipped == bad and all(torch.tensor(weight).isfinite().all() for weight in weights.values())


def launch(out: Path, *flags: str, launcher_flags: tuple[str, ...] = ()) -> subprocess.Popen:
    """The run in two processes; their messages go to out.log."""
    command = [*TORCHRUN[:-1], *launcher_flags, TORCHRUN[-1], *arguments(out), *flags]
    with out.with_suffix(".log").open("w") as log:
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)


def launch_and_wait(out: Path, *flags: str, **options) -> tuple[subprocess.Popen, list[int]]:
    """Starts two processes and waits for a random row of their log, then a moment; returns torchrun and them."""
    launched, log, rows = launch(out, *flags, **options), out / "metrics.csv", DRAW.randrange(2, 40)
    while launched.poll() is None and not (log.exists() and len(log.read_text().splitlines()) > rows):
        time.sleep(0.01)
    time.sleep(DRAW.uniform(0, 0.1))
    children = Path(f"/proc/{launched.pid}/task/{launched.pid}/children").read_text()
    return launched, [int(pid) for pid in children.split()]


def recovers_in_two(out: Path, expected: tuple) -> bool:
    return launch(out).wait() == 0 and outcome(out) == expected


def lost_rank(out: Path, expected: tuple) -> bool:
    """SIGKILL for one of two processes; a run of two processes then resumes."""
    launched, workers = launch_and_wait(out)
    os.kill(DRAW.choice(workers), signal.SIGKILL)
    return launched.wait() != 0 and recovers_in_two(out, expected)


def signalled_launcher(out: Path, expected: tuple, number: int, ends: str, to_all: bool = False) -> bool:
    """A signal to torchrun, or to its processes as well: they save, end by the signal `ends`, and leave no lock."""
    flags = ("--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",) if ends == "SIGUSR1" else ()
    launched, workers = launch_and_wait(out, launcher_flags=flags)
    for pid in [*(workers if to_all else []), launched.pid]:
        os.kill(pid, number)
    launched.wait()
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        time.sleep(0.01)
    is_saved = f"stopped by {ends}, progress is saved" in out.with_suffix(".log").read_text()
    return is_saved and recovers_in_two(out, expected)


def frozen(out: Path, expected: tuple) -> bool:
    """SIGSTOP for one of two processes: a warning names its rank, and after the group's timeout the other one ends."""
    launched, workers = launch_and_wait(out, "--process-group-timeout", "1.5")
    worker = DRAW.choice(workers)
    (rank,) = re.findall(r"\0RANK=(\d)", Path(f"/proc/{worker}/environ").read_text())
    os.kill(worker, signal.SIGSTOP)
    launched.wait()  # it ends the frozen one
    text = out.with_suffix(".log").read_text()
    told = f"warning: rank {rank} on " in text and "error: waited too long for another process" in text
    return told and recovers_in_two(out, expected)


def unlike(out: Path, expected: tuple) -> bool:
    """The second process has another flag: both are refused, nothing is written, and the same command then works."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    group |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    flag = DRAW.choice(["--lr=0.1", "--seed=1", "--iterations=70", "--checkpoint-every=7", "--alpha=0.5", "--T=13"])
    command = [sys.executable, "train_leap_align.py", *arguments(out)]
    ranks = [group | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    both = [
        subprocess.Popen([*command, *flags], cwd=ROOT, env=os.environ | own, stderr=subprocess.PIPE, text=True)
        for own, flags in zip(ranks, ([], [flag]))
    ]
    (line, other) = (process.communicate()[1].splitlines() for process in both)
    told = line[-1].startswith("error: rank 1 on ") and "differs from rank 0" in line[-1] and not other
    return told and [process.returncode for process in both] == [1, 1] and not out.exists() and recovers(out, expected)


def limited_disk(out: Path, expected: tuple) -> bool:
    """SIGKILL on a disk without locks, fsync and renames of folders: the run's lock stays, and is broken."""
    limit = partial(limit_disks, PATCH)
    process = start_and_wait(out, DRAW.randrange(45), limit)
    process.kill()
    has_left_lock = exit_status(process) == -signal.SIGKILL and (out / ".lock.soft").exists()
    return has_left_lock and exit_status(start(out, limit)) == 0 and outcome(out) == expected


def copied_to_nodes(out: Path, expected: tuple) -> bool:
    """A stopped run, copied to the own disk of a second node and resumed on both: refused, and nothing is lost."""
    stop_after(out, DRAW.randrange(12, 55))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        group = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        group["MASTER_PORT"] = str(free.getsockname()[1])
    nodes = [out, shutil.copytree(out, out.with_name("copy"))]
    ranks = [start(node, partial(os.environ.update, group, RANK=str(i))) for i, node in enumerate(nodes)]
    refused = [exit_status(process) for process in ranks] == [1, 1] and "is not the same on every node" in last_line(
        out
    )
    return refused and recovers(out, expected)


def linked(out: Path, expected: tuple) -> bool:
    """A part of a stopped run's folder is a link: refused, and nothing changes where it points."""
    stop_after(out, DRAW.randrange(12, 55))
    path, elsewhere = out / DRAW.choice(["checkpoint", "metrics.csv", "config.json"]), out.with_name("elsewhere")
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    changed = lambda: {file: file.stat().st_mtime_ns for file in (elsewhere, *elsewhere.rglob("*"))}  # noqa: E731
    before = changed()
    refused = exit_status(start(out)) == 1 and f"{path} is a link" in last_line(out)
    refused = refused and before == changed()
    path.unlink()
    elsewhere.rename(path)
    return refused and recovers(out, expected)


SIGNALS = ("SIGTERM", "SIGINT (Ctrl-C)", "SIGHUP (closed terminal)", "SIGUSR1 (Slurm)")
FAULTS = {  # each fault, and how often it is injected
    "SIGKILL at any moment": (killed, 15),
    "SIGKILL during a checkpoint": (partial(killed, during_checkpoint=True), 15),
    "SIGKILL five times in one run": (partial(killed, kills=5), 3),
    **{name: (partial(signalled, number=getattr(signal, name.split()[0])), 5) for name in SIGNALS},
    "second start beside a live run": (second_start, 3),
    "--resume beside a live run": (lambda out, expected: second_start(out, expected, "--resume"), 3),
    "lock of a killed run": (partial(signalled, number=signal.SIGKILL), 5),
    "stray folders in checkpoint/": (stray_files, 5),
    "foreign folder as --out": (foreign_folder, 5),
    "checkpoint cut off": (partial(damaged, damage=os.truncate), 10),
    "checkpoint with one bit flipped": (partial(damaged, damage=flip_a_bit), 10),
    "disk full during a checkpoint": (filled, 5),
    "NaN from the reward": (poisoned, 5),
    "one of two processes killed": (lost_rank, 3),
    "SIGKILL, disk without locks": (limited_disk, 5),
    "two nodes, each with a copy": (copied_to_nodes, 3),
    "link in the folder": (linked, 5),
    "one of two processes frozen": (frozen, 1),
    "two processes with other flags": (unlike, 1),
    "SIGTERM to torchrun": (partial(signalled_launcher, number=signal.SIGTERM, ends="SIGTERM"), 1),
    "SIGTERM to torchrun and workers": (partial(signalled_launcher, number=15, ends="SIGTERM", to_all=True), 1),
    "SIGUSR1 to torchrun, handled": (partial(signalled_launcher, number=signal.SIGUSR1, ends="SIGUSR1"), 1),
    "SIGUSR1 to torchrun, not handled": (partial(signalled_launcher, number=signal.SIGUSR1, ends="SIGHUP"), 1),
    "SIGKILL of torchrun": (partial(signalled_launcher, number=signal.SIGKILL, ends="SIGHUP"), 1),
}
IN_TWO = [name for name in FAULTS if "torchrun" in name or name.startswith("one of two")]
SHORT = ("SIGKILL at any moment", "SIGKILL during a checkpoint", "disk full during a checkpoint", "NaN from the reward")


def main() -> None:
    """Injects every fault several times and prints the table; exit status 1 if anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="once, and only the faults without a test of their own")
    faults = {name: (FAULTS[name][0], 1) for name in SHORT} if parser.parse_args().short else FAULTS
    home = Path(tempfile.mkdtemp())
    exit_status(start(home / "undisturbed"))
    expected = dict.fromkeys(faults, outcome(home / "undisturbed"))
    if of_two := [name for name in faults if name in IN_TWO]:
        launch(home / "two").wait()
        expected |= dict.fromkeys(of_two, outcome(home / "two"))
    survived = {name: [] for name in faults}
    for name in tqdm([name for name, (_, times) in faults.items() for _ in range(times)], "faults"):
        fault, out = faults[name][0], Path(tempfile.mkdtemp(dir=home)) / "run"
        survived[name].append(fault(out, expected[name]))
        if survived[name][-1] is False:
            tqdm.write(f"lost: {name}, see {out}")
    print(f"| {'fault':32}| times | survived | lost |\n|{'-' * 33}|-------|----------|------|")
    for name, results in survived.items():
        good, lost = results.count(True), results.count(False)
        print(f"| {name:32}| {good + lost:5} | {good:8} | {lost:4} |")
    print(f"{len(INTERRUPTED)} runs were killed with half a checkpoint on the disk")
    if any(False in results for results in survived.values()):
        sys.exit(1)
    shutil.rmtree(home)


if __name__ == "__main__":
    main()
