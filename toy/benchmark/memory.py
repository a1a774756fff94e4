"""Bytes that a step saves for backward, against the number of sampling steps T."""

from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from leap_align import METHODS
from runtime.counters import saved_bytes
from toy.benchmark.tasks import TINY_PIPELINES, Row, draw_batch, name_in_tables, start_trainer
from train_leap_align import Trainer

T_VALUES = (10, 25, 50, 100)


def network_saved_bytes(trainer: Trainer, method: str, condition: Any, x_T: Tensor) -> int:
    """Bytes that a method's first endpoint saves on its way through the velocity network."""
    velocity = trainer.task.velocity(condition)
    endpoints = METHODS[method](velocity, x_T, trainer.task.times, trainer.hyper, trainer.generator)
    return saved_bytes(lambda: next(endpoints), trainer.task.model)


def measure_memory(name: str, folder: Path) -> list[Row]:
    """A row for each T: MiB of a batch, without gradient checkpointing, for LeapAlign and for full backpropagation."""
    flags = ("--gradient-checkpointing", "off", "--batch-size", "1") if name in TINY_PIPELINES else ()
    rows = []
    for T in tqdm(T_VALUES, f"{name}: memory", leave=False, mininterval=1):
        trainer = start_trainer(name, folder, "--T", str(T), *flags)
        condition, x_T = draw_batch(trainer)
        row: Row = {"task": name_in_tables(name), "T": T}
        for method in ("leap_align", "full_backprop"):
            row[f"{method} MiB"] = network_saved_bytes(trainer, method, condition, x_T) / 2**20
        rows.append(row)
    return rows
