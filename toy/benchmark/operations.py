"""Floating-point operations of each method, over the floor and over the bare step."""

import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from beyond import DEFAULTS
from leap_align import Endpoints, Hyper, Velocity
from runtime.counters import flop_count
from toy.benchmark.bare_step import bare_step
from toy.benchmark.tasks import TINY_PIPELINES, Row, draw_batch, name_in_tables, start_trainer
from toy.laboratory.variants import leap_align_variant
from train_leap_align import METHODS, Trainer

METHODS_AND_TWO_PASSES: dict[str, Callable[..., Endpoints]] = {**METHODS, "two passes": leap_align_variant}
"""All methods, and LeapAlign as in the published pseudo-code: a rollout, then two more evaluations for the leaps."""


def floor_flop_count(velocity: Velocity, x: Tensor, times: Tensor) -> int:
    """T forwards, one backward to the weights, one to the weights and the input; each counted on a single call."""
    t = times[1]
    forward = flop_count(lambda: velocity(x, t))

    def backward(x: Tensor) -> int:
        return flop_count(lambda: velocity(x, t).sum().backward()) - forward

    return (len(times) - 1) * forward + backward(x) + backward(x.clone().requires_grad_())


def network_flop_count(
    method: Callable[..., Endpoints], velocity: Velocity, x_T: Tensor, times: Tensor, hyper: Hyper, seed: int
) -> int:
    """A method's operations in the velocity network only: the reward is a sum."""

    def step() -> None:
        for x_0, _ in method(velocity, x_T, times, hyper, torch.Generator().manual_seed(seed)):
            x_0.sum().backward()

    return flop_count(step)


def representative_seeds(method: Callable[..., Endpoints], times: Tensor, hyper: Hyper) -> list[int]:
    """Seeds with draws whose operations have the same mean as those of all draws.

    Operations are linear in the early stop i_min, which is uniform over 1..m, so its middle value stands for all (m
    odd).  DRTune also draws the start s, which decides how many of the trained timesteps are run, so every s is taken.
    """
    seeds, middle = {}, (1 + hyper.m) // 2
    for seed in range(2000):
        endpoints = method(lambda x, t: 0 * x, torch.zeros(1, 1), times, hyper, torch.Generator().manual_seed(seed))
        with torch.no_grad():
            list(endpoints)
        if "i_min" not in endpoints.log:  # practically every draw costs the same
            return [seed]
        if endpoints.log["i_min"] == middle:
            seeds.setdefault(endpoints.log.get("s"), seed)
    return list(seeds.values()) or [0]  # an early stop that is drawn in another way


def mean_flop_counts(trainer: Trainer, condition: Any, x_T: Tensor) -> tuple[float, float]:
    """Operations of a step of the trainer's method: in the velocity network, and in everything."""
    method, task, hyper = trainer.method, trainer.task, trainer.hyper
    velocity, network, everything = task.velocity(condition), [], []
    for seed in representative_seeds(method, task.times, hyper):
        network.append(network_flop_count(method, velocity, x_T, task.times, hyper, seed))
        step = partial(trainer.backward, condition, x_T, torch.Generator().manual_seed(seed))
        everything.append(flop_count(step))
    return statistics.mean(network), statistics.mean(everything)


def measure_operations(name: str, folder: Path) -> list[Row]:
    """A row for each method; for the tiny pipelines one more, LeapAlign with gradient checkpointing."""
    flags = ("--batch-size", "1") if name in TINY_PIPELINES else ()
    no_checkpoints = ("--gradient-checkpointing", "off") if name in TINY_PIPELINES else ()
    trainer = start_trainer(name, folder, *flags, *no_checkpoints)
    condition, x_T = draw_batch(trainer)
    # The first step also computes what a run computes once, such as SD3.5's empty prompt: that is not counted.
    trainer.backward(condition, x_T, trainer.generator)
    floor = floor_flop_count(trainer.task.velocity(condition), x_T, trainer.task.times)
    bare = flop_count(lambda: bare_step(trainer.task, condition, x_T))

    def row(trainer: Trainer, method: str) -> Row:
        network, everything = mean_flop_counts(trainer, condition, x_T)
        ratios = {"network": network / floor, "all": everything / bare}
        return {"task": name_in_tables(name), "method": method, **ratios, "GFLOP": everything / len(x_T) / 1e9}

    rows, hyper = [], trainer.hyper
    for method in tqdm(METHODS_AND_TWO_PASSES, f"{name}: operations", leave=False, mininterval=1):
        trainer.method = METHODS_AND_TWO_PASSES[method]
        trainer.hyper = replace(hyper, **DEFAULTS.get(method, {}))
        rows.append(row(trainer, method))
    if name in TINY_PIPELINES:
        trainer = start_trainer(name, folder, *flags)
        trainer.backward(condition, x_T, trainer.generator)
        rows.append(row(trainer, "leap_align, checkpoints"))
    return rows
