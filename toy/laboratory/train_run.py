"""Training runs of the laboratory: the trainer's own steps and evaluations, without a run's folder and figures."""

import math
import pkgutil
import statistics
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from functools import cache
from io import StringIO
from typing import Any

import torch
from torch import Tensor, nn

from runtime.task import Task
from toy.digits import Digits
from toy.laboratory.method_measurements import hyper_for
from toy.laboratory.other_trainers import TRAINERS
from toy.laboratory.variants import VARIANTS
from toy.modes import Modes
from toy.task import ToyOptions
from train_leap_align import METHODS, Config, Trainer

T = 25  # steps of a sampling run
TOYS = {"toy": Modes, "digits": Digits}
SMOKE_OPTIONS = {"pretrain_steps": 60, "reward_steps": 60, "evaluation_samples": 160}  # these results mean nothing
LAST = 20  # steps over which `v_norm` is averaged


@cache
def _task_and_weights(name: str, T: int, smoke: bool) -> tuple[Task, dict]:
    """A task and its pre-trained weights, built once a process.  `shapes` needs diffusers, the toys do not."""
    if name in TOYS:
        task = TOYS[name](ToyOptions(**SMOKE_OPTIONS if smoke else {}), T)
    else:
        task = pkgutil.resolve_name("toy.laboratory.shapes_task:build")(T, smoke)
    return task, {key: value.clone() for key, value in task.model.state_dict().items()}


def fresh_task(name: str, T: int = T, smoke: bool = False) -> Task:
    """A task, reset to its pre-trained weights and without gradients."""
    task, weights = _task_and_weights(name, T, smoke)
    task.model.load_state_dict(weights)
    task.model.zero_grad()
    return task


def make_trainer(task: Task, method: str, lr: float, hyper: dict[str, Any], **run: Any) -> Trainer:
    """A trainer before its first step: with a method, a variant of LeapAlign, or one of the other trainers.

    hyper: in place of the method's own, at lambda = 0; those that are fields of Config go there, as does `run`.
    """
    run |= {name: value for name, value in hyper.items() if name in Config.__dataclass_fields__}
    if run.get("beta"):
        task.keep_reference()
    config = Config(**{"task": task.name, "batch_size": 64, "lr": lr} | run)
    own = {"lam": 0.0} | {name: value for name, value in hyper.items() if name not in run}
    values = replace(hyper_for(len(task.times) - 1, method), **own)
    if method in TRAINERS:
        return TRAINERS[method](config, values, task)
    return Trainer(config, values, task, (METHODS | VARIANTS)[method])


@contextmanager
def count_evaluations(trainer: Trainer, used: dict[str, float]) -> Iterator[None]:
    """Adds the trainer's velocity evaluations a sample to used["evaluations"]; one with gradient counts as three.

    On a leash, the evaluations of the reference count too, and a second backward to the input as one.
    """
    has_leash = trainer.config.beta > 0

    def add(model: nn.Module, inputs: tuple[Tensor, ...], outputs: Tensor | tuple[Tensor]) -> None:
        v = outputs if torch.is_tensor(outputs) else outputs[0]
        passes = 3 + (has_leash and inputs[0].requires_grad) if v.requires_grad else 1
        used["evaluations"] += passes * len(v) / trainer.config.batch_size

    models = [trainer.task.model, *([trainer.task.reference] if has_leash else [])]
    hooks = [model.register_forward_hook(add) for model in models]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def train_run(
    task: str, method: str, lr: float, seed: int, hyper: dict, evaluate_at: list[int], unit: str = "iterations",
    T: int = T, ema_decay: float = Config.ema_decay, smoke: bool = False,
) -> dict:  # fmt: skip
    """Trains on sampling runs of T steps, and evaluates the averaged weights at each of `evaluate_at`.

    These ascend, in iterations, or in velocity `evaluations` a sample: then at the iteration next to it.  Returns
    {"metrics": evaluators, both units, and `step_means` at each of them, "error": why the run broke, or ""}.
    """
    trainer = make_trainer(fresh_task(task, T, smoke), method, lr, hyper, seed=seed, ema_decay=ema_decay)
    used, rows, metrics, error = {"iterations": 0, "evaluations": 0.0}, [], [], ""
    try:
        for end in evaluate_at:
            # An iteration more would be farther from the end; all cost the same, except those that stop early.
            while used[unit] + used[unit] / max(1, used["iterations"]) / 2 < end:
                # Without its output: a message for each skipped step would break the progress bar.
                with redirect_stdout(StringIO()), count_evaluations(trainer, used):
                    rows.append(trainer.step())
                used["iterations"] += 1
            metrics.append(trainer.evaluate() | used | step_means(rows))
    except ValueError as broken:  # BadInput, or an evaluator that received infinite samples
        error = str(broken)
    return {"metrics": metrics, "error": error}


def step_means(rows: list[dict[str, float]]) -> dict[str, float]:
    """`grad_norm`, the mean over all steps but skipped ones, and, on a leash, `v_norm`, that of the last LAST steps."""
    norms = [row["grad_norm"] for row in rows if math.isfinite(row["grad_norm"])]
    v_norms = [row["v_norm"] for row in rows[-LAST:] if "v_norm" in row]
    means = {"grad_norm": sum(norms) / max(1, len(norms))}
    return means | ({"v_norm": statistics.mean(v_norms)} if v_norms else {})


def seconds_per_iteration(task: str, method: str, iterations: int, smoke: bool = False) -> dict:
    """{"seconds": the median over some training iterations}; meaningful only if nothing else runs."""
    trainer = make_trainer(fresh_task(task, smoke=smoke), method, 1e-4, {}, seed=0)
    return {"seconds": statistics.median(trainer.step()["seconds"] for _ in range(iterations))}
