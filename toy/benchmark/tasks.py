"""The tasks that the benchmark measures, each with a trainer as the command line starts it."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import train_leap_align
from leap_align import BadInput
from train_leap_align import Trainer

ROOT = Path(__file__).resolve().parents[2]
TINY_PIPELINES = {"flux": [], "sd3": ["--sd3"]}
"""The tasks that need a pipeline, with the flags of `python -m full_scale tiny` that make a tiny random one."""
TASKS = ("toy", "digits", *TINY_PIPELINES)
PROMPTS = "a red cube\ntwo dogs on a beach\n"

Row = dict[str, Any]
"""A row of a table: column -> value."""


def run_module(*arguments: str) -> None:
    """Runs `python -m ...` in its own process; raises BadInput with the last line of its stderr if it fails."""
    finished = subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True)
    if finished.returncode:
        last_line = (finished.stderr.strip().splitlines() or ["no message"])[-1]
        raise BadInput(f"`python -m {' '.join(arguments)}` failed: {last_line}")


def make_tiny_pipelines(names: list[str], folder: Path) -> None:
    """Writes folder/NAME, a tiny random pipeline with its reward, for each of these tasks; and their prompts."""
    (folder / "prompts.txt").write_text(PROMPTS)
    for name in names:
        run_module("full_scale", "tiny", str((folder / name).resolve()), *TINY_PIPELINES[name])


def start_trainer(name: str, folder: Path, *flags: str) -> Trainer:
    """A trainer for a task and more flags of the command line; `folder` holds the tiny pipelines."""
    if dist.is_initialized():
        dist.destroy_process_group()  # of the previous trainer
    arguments = ["--task", name]
    if name in TINY_PIPELINES:
        model = folder / name
        arguments += ["--model", str(model), "--reward-weights", str(model / "reward")]
        arguments += ["--prompts", str(folder / "prompts.txt")]
        arguments += ["--height", "64", "--width", "64", "--batch-size", "4"]
    parsed = train_leap_align.parse([*arguments, *flags])
    trainer = Trainer(parsed.run, parsed.method, train_leap_align.build_task(parsed))
    torch.set_num_threads(1)
    return trainer


def draw_batch(trainer: Trainer) -> tuple[Any, Tensor]:
    """Prompts and noise x_T of a batch, drawn as the trainer draws them."""
    batch_size, task = trainer.config.batch_size, trainer.task
    condition = task.sample_conditions(batch_size, trainer.generator)
    return condition, task.noise(batch_size, trainer.generator).to(task.device)


def name_in_tables(name: str) -> str:
    """A task's name in tables and figure, which marks a tiny pipeline as such."""
    return f"tiny {name}" if name in TINY_PIPELINES else name
