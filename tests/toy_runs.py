"""Short toy runs through the trainer's command line, and readers of their files."""

import errno
import fcntl
import gc
import json
import os
import stat
import sys
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

import train_leap_align as trainer
from runtime.files import read_csv
from runtime.processes import StopRequest

TOYS = ["toy", "digits"]
ROOT = Path(__file__).resolve().parent.parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "train_leap_align.py"]
SMALL = "--pretrain-steps 300 --reward-steps 300 --evaluation-samples 160 --T 21 --batch-size 16 --iterations 4".split()


def run(out, *flags):
    """A short run into the folder `out`; returns its metrics."""
    trainer.main([*SMALL, "--out", str(out), *flags])
    return metrics(out)


def in_group(work, *arguments):
    """work(rank, ...) in two forked processes that form a group; returns what each returned, or its error's text."""
    # Without garbage collection: it would destroy objects of other tests, which wait for threads that no fork has.
    with TemporaryDirectory() as folder, get_context("fork").Pool(2, gc.disable) as pool:
        inputs = [(work, rank, f"{folder}/store", *arguments) for rank in range(2)]
        return pool.starmap_async(_join_and_work, inputs, chunksize=1).get(timeout=300)


def _join_and_work(work, rank, path, *arguments):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(path, 2), rank=rank, world_size=2)
    try:
        return work(rank, *arguments)
    finally:
        dist.destroy_process_group()


def train_rank(rank, arguments, nodes=1):
    """For `in_group`: one process of a run, on one node or on two."""
    with patch.dict(os.environ, {"LOCAL_WORLD_SIZE": str(2 // nodes)}):
        trainer.run(trainer.parse(list(map(str, arguments))), StopRequest())


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
