"""Training runs of the laboratory: the trainer's own steps and evaluations, without a run's folder and figures."""

import math
import statistics
from contextlib import redirect_stdout
from functools import cache
from io import StringIO

from torch import Tensor, nn

from beyond import DEFAULTS, Hyper
from toy.digits import Digits
from toy.laboratory.method_measurements import hyper_for
from toy.laboratory.other_trainers import TRAINERS
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
    """A trainer before its first step: with a method, a variant of LeapAlign, or one of the other trainers."""
    if hyper.beta:
        task.keep_reference()
    config = Config(task=task.name, batch_size=batch_size, lr=lr, seed=seed, ema_decay=ema_decay)
    if method in TRAINERS:
        return TRAINERS[method](config, hyper, task)
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


class EvaluationCounter:
    """Counts a trainer's velocity evaluations a sample while it is entered; one with gradient counts as three.

    On a leash, the evaluations of the reference count too, and a second backward to the input as one.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.batch_size, self.count = trainer.config.batch_size, 0.0
        self.has_second_backward = trainer.hyper.beta > 0
        self.models = [trainer.task.model, *([trainer.task.reference] if trainer.hyper.beta else [])]

    def __enter__(self) -> None:
        self.hooks = [model.register_forward_hook(self.add) for model in self.models]

    def __exit__(self, *exception: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def add(self, model: nn.Module, inputs: tuple[Tensor, ...], v: Tensor) -> None:
        """Counts one call."""
        passes = 3 + (self.has_second_backward and inputs[0].requires_grad) if v.requires_grad else 1
        self.count += passes * len(v) / self.batch_size


def budget_run(
    task: str,
    method: str,
    T: int,
    lr: float,
    seed: int,
    budgets: list[int],
    hyper: dict,
    batch_size: int = 64,
    ema_decay: float = 0.99,
    smoke: bool = False,
) -> dict:
    """Trains on sampling runs of T steps, and evaluates (on 25) where each budget of evaluations a sample is used up.

    hyper: in place of the method's own defaults, at lambda = 0.  Returns {"metrics": a list over the budgets, "error":
    why the run broke, or ""}.  The metrics are the task's evaluators, `evaluations` and `iterations`.
    """
    values = {"lam": 0.0, "m": hyper_for(T).m} | DEFAULTS.get(method, {}) | hyper
    trainer = make_trainer(fresh_task(task, T, smoke), method, lr, batch_size, seed, ema_decay, Hyper(**values))
    counter, iterations, metrics, error = EvaluationCounter(trainer), 0, [], ""
    try:
        for budget in budgets:
            # An iteration more would be farther from the budget; all cost the same, but for those that stop early.
            while counter.count + counter.count / max(1, iterations) / 2 < budget:
                with redirect_stdout(StringIO()), counter:
                    trainer.step()
                iterations += 1
            metrics.append(trainer.evaluate() | {"evaluations": counter.count, "iterations": iterations})
    except ValueError as broken:
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
