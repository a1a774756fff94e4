"""cost: what a training step of each method costs beside its lower bound, in evaluations, operations, bytes and time.

The floor.  A LeapAlign step needs T evaluations of the velocity network and two backward passes: the one at k to the
weights alone, because x_k is a constant, the one at j to the weights and to the input x_j.  With F operations of a
forward, B and B+x of the two backward passes, the floor is T F + B + B+x, about (T + 4) F.  It is counted on single
calls of the network, without a method and without gradient checkpointing.
"""

import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from torch import Tensor

import train_leap_align
from beyond import DEFAULTS
from leap_align import Hyper, Velocity, require
from runtime.backward import SplitVelocity
from runtime.cost_counter import flop_count, saved_bytes
from runtime.task import Task
from toy.laboratory.laboratory import Laboratory
from toy.laboratory.tables import Row
from toy.laboratory.variants import leap_align_variant
from toy.summary import markdown_table
from train_leap_align import METHODS, Trainer

TINY_PIPELINES = {"tiny flux": [], "tiny sd3": ["--sd3"]}
"""Tasks on a tiny random pipeline, with the flags of `python -m full_scale tiny` that make it."""
TWO_PASSES = {"two passes": leap_align_variant}
"""LeapAlign as in the published pseudo-code: a rollout, then two more evaluations for the leaps."""
SHARES = ("data", "text", "rollout", "leaps", "decode", "reward", "backward", "optimizer", "EMA", "other")
"""Phases of a step: those that the trainer marks, and the velocity's calls without and with gradient."""
SMOKE = "--batch-size 8 --pretrain-steps 1 --reward-steps 1 --evaluation-samples 160 --iterations 2".split()


def run(lab: Laboratory) -> None:
    """Measures one task after the other, because times need a quiet machine, and publishes."""
    alone, smoke, names = replace(lab.cache, workers=1), lab.scale.smoke, tasks_to_measure(lab)
    methods = [*METHODS, *TWO_PASSES]
    costs = alone.results(step_costs, {n: {"task": n, "methods": methods, "smoke": smoke} for n in names}, "operations")
    times = list(alone.results(step_times, {n: {"task": n, "smoke": smoke} for n in names}, "times").values())
    rows = [row for result in costs.values() for row in result["rows"]]
    lab.publish("cost", rows, tables(rows, times), figure(rows, times), time=times)


def tasks_to_measure(lab: Laboratory) -> list[str]:
    """The toys; if diffusers is installed, also the tiny random pipelines."""
    if find_spec("diffusers") and not lab.scale.smoke:
        return [*lab.scale.tasks, *TINY_PIPELINES]
    print(f"{', '.join(TINY_PIPELINES)}: left out, because of --smoke, or because diffusers is not installed")
    return list(lab.scale.tasks)


# ---------------------------------------------- The task and its trainer ----------------------------------------------
@cache
def tiny_pipeline(name: str) -> tempfile.TemporaryDirectory:
    """A folder with a tiny random pipeline, its reward, and prompts; it lives as long as this process."""
    folder = tempfile.TemporaryDirectory()
    (Path(folder.name) / "prompts.txt").write_text("a red cube\ntwo dogs on a beach\n")
    command = [sys.executable, "-m", "full_scale", "tiny", f"{folder.name}/model", *TINY_PIPELINES[name]]
    finished = subprocess.run(command, stdout=subprocess.DEVNULL)
    require(finished.returncode == 0, f"`{' '.join(command)}` failed: see the line above")
    return folder


def start_trainer(name: str, *flags: str) -> tuple[Trainer, Any, Tensor]:
    """A trainer on one thread, for a task and more flags of the command line; prompts and noise x_T of a batch."""
    if dist.is_initialized():
        dist.destroy_process_group()  # of the previous trainer
    arguments = ["--task", name.removeprefix("tiny ")]
    if name in TINY_PIPELINES:
        folder = tiny_pipeline(name).name
        arguments += ["--model", f"{folder}/model", "--reward-weights", f"{folder}/model/reward"]
        arguments += ["--prompts", f"{folder}/prompts.txt", "--height", "64", "--width", "64", "--batch-size", "4"]
    parsed = train_leap_align.parse([*arguments, *flags])
    task, batch_size = train_leap_align.build_task(parsed), parsed.run.batch_size
    trainer = Trainer(parsed.run, parsed.method, task)
    torch.set_num_threads(1)
    condition = task.sample_conditions(batch_size, trainer.generator)
    return trainer, condition, task.noise(batch_size, trainer.generator).to(task.device)


# ------------------------------------------- Evaluations, operations, bytes -------------------------------------------
def floor_flop_count(task: Task, condition: Any, x: Tensor) -> int:
    """T forwards, one backward to the weights, one to the weights and the input; each counted on a single call."""
    velocity, t = task.velocity(condition), task.times[1]
    forward = flop_count(lambda: velocity(x, t))

    def backward(x: Tensor) -> int:
        return flop_count(lambda: velocity(x, t).sum().backward()) - forward

    return (len(task.times) - 1) * forward + backward(x) + backward(x.clone().requires_grad_())


def representative_seeds(method: Callable, times: Tensor, hyper: Hyper) -> list[int]:
    """Seeds with draws whose operations have the same mean as those of all draws.

    Operations are linear in the early stop i_min, which is uniform over 1..m, so its middle value stands for all (m
    odd).  DRTune also draws the start s, which decides how many of the trained timesteps are run, so every s is taken.
    """
    seeds, middle = {}, (1 + hyper.m) // 2
    for seed in range(1000):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            _, _, log = next(method(lambda x, t: 0 * x, torch.zeros(1, 1), times, hyper, generator))
        if log.get("i_min", middle) == middle:  # without an early stop practically every draw costs the same
            seeds.setdefault(log.get("s"), seed)
        if seeds and "s" not in log:
            break
    return list(seeds.values()) or [0]  # an early stop that is drawn in another way


def method_cost(method: Callable, task: Task, condition: Any, x_T: Tensor, hyper: Hyper) -> dict[str, float]:
    """A step's evaluations of the velocity and its operations there, as means over draws; the reward is a sum.

    MiB: what the first endpoint saves for backward, without the model's weights; the largest over draws.
    """
    velocity, evaluations, seeds = task.velocity(condition), [], representative_seeds(method, task.times, hyper)

    def counted_velocity(x: Tensor, t: Tensor) -> Tensor:
        evaluations.append(torch.is_grad_enabled())
        return velocity(x, t)

    def endpoints(velocity: Velocity, seed: int) -> Iterator[tuple[Tensor, Tensor, dict]]:
        return method(velocity, x_T, task.times, hyper, torch.Generator().manual_seed(seed))

    def step(seed: int) -> None:
        split_velocity = SplitVelocity(counted_velocity)  # as in the trainer
        for x_0, weight, _ in endpoints(split_velocity, seed):
            split_velocity.backward(x_0, torch.ones_like(x_0), weight)

    operations = sum(flop_count(partial(step, seed)) for seed in seeds)
    totals = {"evaluations": len(evaluations), "with gradient": sum(evaluations), "operations": operations}
    largest = max(saved_bytes(partial(next, endpoints(velocity, seed)), task.model) for seed in seeds)
    return {name: total / len(seeds) for name, total in totals.items()} | {"MiB": largest / 2**20}


def step_costs(task: str, smoke: bool, methods: list[str]) -> dict[str, list[Row]]:
    """Rows of cost.csv: each method, operations over the floor; for a tiny pipeline also gradient checkpointing."""
    flags, no_checkpoints = SMOKE if smoke else (), ()
    if task in TINY_PIPELINES:
        flags, no_checkpoints = ("--batch-size", "1"), ("--gradient-checkpointing", "off")
    trainer, condition, x_T = start_trainer(task, *flags, *no_checkpoints)
    floor = floor_flop_count(trainer.task, condition, x_T)

    def row(trainer: Trainer, name: str, title: str) -> Row:
        method, hyper = {**METHODS, **TWO_PASSES}[name], replace(trainer.hyper, **DEFAULTS.get(name, {}))
        cost = method_cost(method, trainer.task, condition, x_T, hyper)
        return {"task": task, "method": title, **cost, "operations": cost["operations"] / floor}

    rows = [row(trainer, name, name) for name in methods]
    if task in TINY_PIPELINES:
        rows.append(row(start_trainer(task, *flags)[0], "leap_align", "leap_align, checkpoints"))
    return {"rows": rows}


# ------------------------------------------------------- Times --------------------------------------------------------
def bare_step(task: Task, condition: Any, x: Tensor) -> None:
    """The model calls of a LeapAlign step from noise x (B, *S), and nothing else; adds a gradient to every weight.

    It encodes the prompts, evaluates the velocity T times, two of them with gradient, decodes, computes the reward and
    runs one backward.  The states only roughly follow a rollout, and the gradients are not LeapAlign's.
    """
    velocity, T = task.velocity(condition), len(task.times) - 1
    i_k = max(2, round(0.8 * T))
    i_j, with_graph = max(1, i_k // 2), 0
    for i, interval in zip(range(T, 0, -1), task.times.diff().flip(0).tolist()):
        with torch.set_grad_enabled(i in (i_k, i_j)):
            v = velocity(x + with_graph if i == i_j else x, task.times[i])
            if i in (i_k, i_j):
                with_graph = with_graph + 1e-3 * v
        with torch.no_grad():
            x = x - interval * v
    task.reward(task.decode(x + with_graph), condition).mean().backward()


def now() -> float:
    """Seconds on a clock, read after the GPU has finished its queue."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def time_in_turns(trainer: Trainer, condition: Any, x_T: Tensor, seconds: float) -> dict[str, list[float]]:
    """Seconds of steps and bare steps, taken in turns, so that a slow minute of the machine slows both.

    Each round has a random order: a step would otherwise always find its weights in the cache, or never.
    """
    actions = {"step": trainer.step, "bare": lambda: bare_step(trainer.task, condition, x_T)}
    times, order = defaultdict(list), random.Random(0)
    trainer.step()  # the first step also does what a run does once
    while sum(map(sum, times.values())) < seconds or len(times["step"]) < 3:
        for name in order.sample(list(actions), len(actions)):
            trainer.optimizer.zero_grad()
            start = now()
            actions[name]()
            times[name].append(now() - start)
    return times


def median_ratio(steps: list[float], bares: list[float]) -> tuple[float, float]:
    """The median of step / bare over neighbouring calls, and its standard error for normal values."""
    low, median, high = statistics.quantiles([step / bare for step, bare in zip(steps, bares, strict=True)])
    return median, 1.2533 * (high - low) / 1.349 / len(steps) ** 0.5


def step_shares(trainer: Trainer, steps: int) -> dict[str, float]:
    """The share of each phase in the time of some steps; the shares add up to 1.

    A clock replaces torch.profiler.record_function, with which the trainer marks its phases.  The profiler itself makes
    a step up to 12 % longer, and on a GPU its CPU times are those of kernel launches.
    """
    seconds, velocity_of = defaultdict(float), trainer.task.velocity

    @contextmanager
    def phase(name: str) -> Iterator[None]:
        start = now()
        yield
        seconds[name] += now() - start

    def marked(velocity: Velocity, x: Tensor, t: Tensor) -> Tensor:
        with phase("leaps" if torch.is_grad_enabled() else "rollout"):
            return velocity(x, t)

    start = now()
    with (
        patch.object(train_leap_align, "record_function", phase),
        patch.object(trainer.task, "velocity", lambda condition: partial(marked, velocity_of(condition))),
    ):
        for _ in range(steps):
            trainer.step()
    total = now() - start
    seconds["other"] = total - sum(seconds.values())
    return {name: seconds[name] / total for name in SHARES}


def step_times(task: str, smoke: bool) -> Row:
    """A row of cost-time.csv: a minute of steps and bare steps, and the shares of further steps."""
    trainer, condition, x_T = start_trainer(task, *SMOKE if smoke else ())
    times = time_in_turns(trainer, condition, x_T, seconds=0.1 if smoke else 60)
    ratio, error = median_ratio(times["step"], times["bare"])
    row = {"task": task, **{f"{name} ms": 1e3 * statistics.median(times[name]) for name in ("step", "bare")}}
    row |= {"ratio": ratio, "ratio_error": error, "steps": len(times["step"])}
    return row | step_shares(trainer, max(3, len(times["step"]) // 4))


# ------------------------------------------------- Tables and figure --------------------------------------------------
def tables(rows: list[Row], times: list[Row]) -> str:
    """Evaluations, operations over the floor on every task, and bytes over LeapAlign's; times; shares of a step."""
    mib, methods = {}, {}
    for row in rows:
        mib.setdefault(row["task"], row["MiB"])  # LeapAlign's, which comes first
        cells = methods.setdefault(row["method"], {"method": row["method"]})
        cells |= {name: f"{row[name]:.3g}" for name in ("evaluations", "with gradient")}
        cells |= {f"FLOP, {row['task']}": row["operations"], "bytes": row["MiB"] / mib[row["task"]]}
    costs = ["method", "evaluations", "with gradient", *(f"FLOP, {task}" for task in mib), "bytes"]
    seconds = ["task", "step ms", "bare ms", "ratio", "steps"]
    shares = [row | {name: round(row[name], 3) for name in SHARES} for row in times]
    shown = (list(methods.values()), costs), (times, seconds), (shares, ["task", *SHARES])
    return "\n\n".join(markdown_table(table, columns) for table, columns in shown)


def figure(rows: list[Row], times: list[Row]) -> Figure:
    """Operations of each method over the floor, and the shares of a step."""
    drawn = Figure(figsize=(13, 4), layout="constrained")
    operations, shares = drawn.subplots(1, 2)
    for marker, task in zip("os^D", tasks := [row["task"] for row in times]):
        values, methods = zip(*((row["operations"], row["method"]) for row in rows if row["task"] == task))
        operations.plot(values, methods, marker, label=task, alpha=0.7)
    operations.axvline(1, color="k", lw=0.8)
    operations.set(title="operations of the network over the floor")
    left = [0.0] * len(times)
    for i, name in enumerate(SHARES):
        shares.barh(tasks, [row[name] for row in times], left=left, color=f"C{i}", label=name)
        left = [end + row[name] for end, row in zip(left, times)]
    shares.set(title="share of a step")
    for axis in (operations, shares):
        axis.invert_yaxis()
        axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return drawn
