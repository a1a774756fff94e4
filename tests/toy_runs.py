"""Short toy runs through the trainer's command line, and readers of their files."""

import errno
import fcntl
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import train_leap_align as trainer
from runtime.files import read_csv

TOYS = ["toy", "digits"]
ROOT = Path(__file__).resolve().parent.parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "train_leap_align.py"]
SMALL = "--pretrain-steps 300 --reward-steps 300 --evaluation-samples 160 --T 21 --batch-size 16 --iterations 4".split()


def run(out, *flags):
    """A short run into the folder `out`; returns its metrics."""
    trainer.main([*SMALL, "--out", str(out), *flags])
    return metrics(out)


def run_two(out, *flags, status=0):
    """The same on two processes; returns what it wrote to stderr."""
    command = [*TORCHRUN, *SMALL, "--out", str(out), *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == status, done.stderr
    return done.stderr


def metrics(out):
    """metrics.csv without the seconds, which differ from run to run."""
    rows = read_csv(out / "metrics.csv")
    return [{k: float(v) for k, v in row.items() if v and k != "seconds"} for row in rows]


def result(out):
    return json.loads((out / "result.json").read_text())


def flip_a_bit(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 64
    path.write_bytes(content)


def checkpoints(out):
    return sorted(folder.name for folder in (out / "checkpoint").iterdir())


def failing(function, number, fails):
    """An operating system's function that answers with this error where fails(argument)."""

    def call(first, *others, **named):
        if fails(first):
            raise OSError(number, os.strerror(number))
        return function(first, *others, **named)

    return call


def is_folder(path_or_descriptor):
    return stat.S_ISDIR(os.stat(path_or_descriptor).st_mode)


def limit_disks(monkeypatch, number=errno.ENOTSUP):
    """Disks that have no locks, flush nothing and rename files only: gcsfuse, CIFS, some FUSE."""
    monkeypatch.setattr(fcntl, "flock", failing(fcntl.flock, number, lambda _: True))
    monkeypatch.setattr(os, "fsync", failing(os.fsync, number, lambda _: True))
    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, failing(getattr(os, name), number, is_folder))


def error_line(*flags):
    """The one line that a refused command prints."""
    with pytest.raises(SystemExit) as stop:
        trainer.main([*SMALL, *flags])
    line = str(stop.value)
    assert line.startswith("error: ") and "\n" not in line
    return line


def before_every_step(monkeypatch, action):
    """Runs action(iterations done) before every step."""
    step = trainer.Trainer.step
    monkeypatch.setattr(trainer.Trainer, "step", lambda self: (action(self.progress.iteration), step(self))[1])


def without_figures(monkeypatch):
    """Draws no figures: they take most of the time of such a short run."""
    for name in TOYS:
        monkeypatch.setattr(trainer.task_class(name), "draw_figures", lambda self, folder: None)
    monkeypatch.setattr(trainer.report, "draw_curves", lambda *_: None)
