"""Training runs of the laboratory: the trainer's own steps and evaluations, without a run's folder and figures."""

import math
import statistics
from contextlib import redirect_stdout
from functools import cache
from io import StringIO

from beyond import Hyper
from toy.digits import Digits
from toy.laboratory.variants import VARIANTS
from toy.modes import Modes
from toy.task import ToyOptions, ToyTask
from train_leap_align import METHODS, Config, Trainer

TASKS = {"toy": Modes, "digits": Digits}
SMOKE_OPTIONS = {"pretrain_steps": 60, "reward_steps": 60, "evaluation_samples": 160}
"""Task options that only check that everything runs; the results mean nothing."""
LAST = 20
"""Steps over which a noisy metric of a step is averaged."""


@cache
def _task_and_weights(name: str, T: int, smoke: bool) -> tuple[ToyTask, dict]:
    """A task and its pre-trained weights, built once a process."""
    task = TASKS[name](ToyOptions(**SMOKE_OPTIONS if smoke else {}), T)
    return task, {key: value.clone() for key, value in task.model.state_dict().items()}


def fresh_task(name: str, T: int = 25, smoke: bool = False) -> ToyTask:
    """A task, reset to its pre-trained weights and without gradients."""
    task, weights = _task_and_weights(name, T, smoke)
    task.model.load_state_dict(weights)
    task.model.zero_grad()
    return task


def make_trainer(
    task: ToyTask, method: str, lr: float, batch_size: int, seed: int, ema_decay: float, hyper: Hyper
) -> Trainer:
    """A trainer before its first step, with a method of the paper or a variant of LeapAlign."""
    if hyper.beta:
        task.keep_reference()
    config = Config(task=task.name, batch_size=batch_size, lr=lr, seed=seed, ema_decay=ema_decay)
    return Trainer(config, hyper, task, (METHODS | VARIANTS)[method])


def train_run(
    task: str,
    method: str,
    lr: float,
    seed: int,
    evaluate_at: list[int],
    hyper: dict,
    batch_size: int = 64,
    ema_decay: float = 0.99,
    smoke: bool = False,
) -> dict:
    """Trains, and evaluates the averaged weights after each iteration of `evaluate_at`.

    Returns {"metrics": {iteration: {name: value}}, "error": why the run broke, or ""}.  The metrics are the task's
    evaluators, `grad_norm`, the mean gradient norm so far without skipped steps, and, on a leash, `v_norm`, the mean of
    the last LAST steps.
    """
    trainer = make_trainer(fresh_task(task, smoke=smoke), method, lr, batch_size, seed, ema_decay, Hyper(**hyper))
    norms, v_norms, metrics, error = [], [], {}, ""
    try:
        for iteration in range(max(evaluate_at) + 1):
            if iteration in evaluate_at:
                metrics[str(iteration)] = trainer.evaluate() | {"grad_norm": sum(norms) / max(1, len(norms))}
                if v_norms:
                    metrics[str(iteration)]["v_norm"] = statistics.mean(v_norms[-LAST:])
            if iteration < max(evaluate_at):
                with redirect_stdout(StringIO()):  # a message for each skipped step would break the progress bar
                    row = trainer.step()
                if math.isfinite(row["grad_norm"]):
                    norms.append(row["grad_norm"])
                v_norms += [row["v_norm"]] if "v_norm" in row else []
    except ValueError as broken:  # BadInput, or an evaluator that received infinite samples
        error = str(broken)
    return {"metrics": metrics, "error": error}


def seconds_per_iteration(task: str, method: str, iterations: int, batch_size: int = 64, smoke: bool = False) -> dict:
    """{"seconds": the median over some training iterations}; meaningful only if nothing else runs."""
    trainer = make_trainer(fresh_task(task, smoke=smoke), method, 1e-4, batch_size, 0, 0.99, Hyper(lam=0.0))
    return {"seconds": statistics.median(trainer.step()["seconds"] for _ in range(iterations))}


def train_with_leap_align(task: ToyTask, iterations: int, lr: float) -> None:
    """Trains the task's model by LeapAlign; the model keeps its own weights, not their average."""
    trainer = make_trainer(task, "leap_align", lr, 64, 0, 0.0, Hyper(lam=0.0))
    for _ in range(iterations):
        trainer.step()
