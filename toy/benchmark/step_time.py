"""Time of the trainer's step compared with the bare step, and the share of each of its phases."""

import json
import random
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from tqdm import tqdm

import train_leap_align
from leap_align import Velocity
from runtime.task import Task
from toy.benchmark.bare_step import bare_step
from toy.benchmark.stopwatch import Stopwatch, seconds_of
from toy.benchmark.tasks import Row, draw_batch, name_in_tables, start_trainer
from train_leap_align import Trainer

SHARES = ("data", "text", "rollout", "leaps", "decode", "reward", "backward", "optimizer", "EMA", "other")
"""Phases of a step: those that the trainer marks, and the velocity's calls without and with gradient."""


# ---------------------------------------------------------------------------------------------------------------------
# The step compared with the bare step
# ---------------------------------------------------------------------------------------------------------------------


def steps_to_compare(trainer: Trainer) -> dict[str, Callable[[], object]]:
    """The trainer's step; the bare step; where FSDP2 wraps the model, also the bare step on the same model without."""
    task = trainer.task
    condition, x_T = draw_batch(trainer)
    steps: dict[str, Callable[[], object]] = {"step": trainer.step, "bare": lambda: bare_step(task, condition, x_T)}
    if isinstance(task.model, FSDPModule):
        model = transformer_without_fsdp(task)

        def unwrapped() -> None:
            with patch.object(task, "model", model):
                bare_step(task, condition, x_T)
            model.zero_grad()

        steps["unwrapped"] = unwrapped
    return steps


def transformer_without_fsdp(task: Any) -> nn.Module:
    """The transformer of a task's pipeline as diffusers loads it, with the task's precision and checkpointing."""
    import diffusers

    folder = Path(task.options.model) / "transformer"
    model_class = getattr(diffusers, json.loads((folder / "config.json").read_text())["_class_name"])
    dtype = getattr(torch, task.options.precision)
    model = model_class.from_pretrained(folder, torch_dtype=dtype, local_files_only=True, use_safetensors=True)
    if task.options.gradient_checkpointing == "on":
        model.enable_gradient_checkpointing()
    return model.to(task.device)


def time_in_turns(trainer: Trainer, name: str, seconds: float) -> dict[str, list[float]]:
    """Seconds of every call of each step, taken in turns, so that a slow minute of the machine slows all of them.

    Each round has a random order: a step would otherwise always find its weights in the cache, or never.
    """
    steps, times, order = steps_to_compare(trainer), defaultdict(list), random.Random(0)
    trainer.step()  # the first step also does what a run does once
    bar = tqdm(total=seconds, desc=f"{name}: time", bar_format="{desc} {bar} {elapsed}", leave=False, mininterval=1)
    with bar:
        while len(times["step"]) < 3 or bar.n < seconds:
            for step in order.sample(list(steps), len(steps)):
                trainer.optimizer.zero_grad()
                times[step].append(seconds_of(steps[step]))
            bar.update(min(sum(values[-1] for values in times.values()), seconds - bar.n))
    return times


def median_ratio(steps: list[float], bares: list[float]) -> tuple[float, float, str]:
    """The median of step / bare over neighbouring calls, its standard error for normal values, and the quartiles."""
    low, median, high = statistics.quantiles([step / bare for step, bare in zip(steps, bares)])
    error = 1.2533 * (high - low) / 1.349 / len(steps) ** 0.5
    return median, error, f"{low:.3f}-{high:.3f}"


# ---------------------------------------------------------------------------------------------------------------------
# The shares of a step
# ---------------------------------------------------------------------------------------------------------------------


@contextmanager
def velocity_calls_marked(task: Task) -> Iterator[None]:
    """Marks the task's velocity calls as the trainer marks its phases: "leaps" with gradient, "rollout" without."""
    task_velocity = task.velocity

    def marked_velocity(condition: Any) -> Velocity:
        velocity = task_velocity(condition)

        def marked_call(x: Tensor, t: Tensor) -> Tensor:
            with train_leap_align.record_function("leaps" if torch.is_grad_enabled() else "rollout"):
                return velocity(x, t)

        return marked_call

    with patch.object(task, "velocity", marked_velocity):
        yield


def step_shares(trainer: Trainer, steps: int) -> dict[str, float]:
    """The share of each phase in the time of some steps; the shares add up to 1.

    The trainer marks its phases with torch.profiler.record_function, which a stopwatch replaces here.  The profiler
    records every operation, which makes a step 12 % longer on `toy` and 5 % on `digits`, and on a GPU its CPU times
    are those of kernel launches.  The stopwatch changes a step by less than the noise of 1 %.
    """
    stopwatch = Stopwatch()
    with patch.object(train_leap_align, "record_function", stopwatch.phase), velocity_calls_marked(trainer.task):
        total = sum(seconds_of(trainer.step) for _ in range(steps))
    stopwatch.seconds["other"] = total - sum(stopwatch.seconds.values())
    return {phase: stopwatch.seconds[phase] / total for phase in SHARES}


# ---------------------------------------------------------------------------------------------------------------------
# The rows of both tables
# ---------------------------------------------------------------------------------------------------------------------


def measure_step_time(name: str, folder: Path, seconds: float) -> tuple[Row, Row]:
    """A row of time.csv, from `seconds` of steps and bare steps, and a row of shares.csv, from further steps."""
    trainer = start_trainer(name, folder)
    times = time_in_turns(trainer, name, seconds)
    shares = step_shares(trainer, max(3, len(times["step"]) // 4))
    milliseconds = {step: 1e3 * statistics.median(values) for step, values in times.items()}
    ratio, error, quartiles = median_ratio(times["step"], times["bare"])
    row = {"task": name_in_tables(name), "step ms": milliseconds["step"], "bare ms": milliseconds["bare"]}
    row |= {"ratio": ratio, "ratio_error": error, "quartiles": quartiles, "steps": len(times["step"])}
    row["of it update"] = ratio * (shares["optimizer"] + shares["EMA"])
    if "unwrapped" in times:
        row["unwrapped ms"] = milliseconds["unwrapped"]
        row["over unwrapped"], row["over unwrapped_error"], _ = median_ratio(times["step"], times["unwrapped"])
    return row, {"task": name_in_tables(name), **shares}
