"""A training run as a cell: the trainer's own steps, without its files and pictures."""

import math
import statistics
from contextlib import redirect_stdout
from functools import cache
from io import StringIO

from leap_align import METHODS, Hyper
from toy.digits import Digits
from toy.modes import Modes
from toy.task import ToyOptions, ToyTask
from toy.variants import VARIANTS
from train_leap_align import Config, Run

TASKS = {"toy": Modes, "digits": Digits}
SMOKE_OPTIONS = {"pretrain_steps": 60, "reward_steps": 60, "evaluation_samples": 160}
"""Options of a task for a look at the machinery; what comes out of it means nothing."""


@cache
def _built(name: str, T: int, smoke: bool) -> tuple[ToyTask, dict]:
    """A task and its pre-trained weights, once a process."""
    task = TASKS[name](ToyOptions(**SMOKE_OPTIONS if smoke else {}), T)
    return task, {key: value.clone() for key, value in task.model.state_dict().items()}


def fresh(name: str, T: int = 25, smoke: bool = False) -> ToyTask:
    """A task whose model is as pre-training left it, without the gradient of a run that broke."""
    task, weights = _built(name, T, smoke)
    task.model.load_state_dict(weights)
    task.model.zero_grad()
    return task


def begun(task: ToyTask, method: str, lr: float, batch: int, seed: int, ema: float, hyper: Hyper) -> Run:
    """A run of the trainer before its first step, by a method of the paper or a variant."""
    config = Config(task=task.name, batch_size=batch, lr=lr, seed=seed, ema=ema)
    run = Run(config, hyper, task, None)
    run.method = (METHODS | VARIANTS)[method]
    return run


def trained(
    task: str,
    method: str,
    lr: float,
    seed: int,
    stops: list[int],
    hyper: dict,
    batch: int = 64,
    ema: float = 0.99,
    smoke: bool = False,
) -> dict:
    """Evaluators of the averaged weights at every stop (iterations), with the mean gradient norm so far.

    {"stops": {iteration: figures}}, or {"failed": why} for a run whose gradient, weights or samples broke.
    """
    built = fresh(task, smoke=smoke)
    run = begun(built, method, lr, batch, seed, ema, Hyper(**hyper))
    norms, figures = [0.0], {}
    try:
        for i in range(max(stops) + 1):
            if i in stops:
                with run.ema.swapped():
                    judged = built.evaluate(None, i)
                if not all(map(math.isfinite, judged.values())):
                    return {"failed": f"samples broke by iteration {i}"}
                figures[str(i)] = judged | {"grad_norm": sum(norms) / max(1, len(norms) - 1)}
            if i < max(stops):
                with redirect_stdout(StringIO()):  # it would tell of every step left out, across the progress bar
                    norm = run.step()["grad_norm"]
                norms += [norm] if math.isfinite(norm) else []
    except ValueError as error:  # BadInput, or a judge that was given infinite samples
        return {"failed": str(error)}
    return {"stops": figures}


def pace(task: str, method: str, iterations: int, batch: int = 64, smoke: bool = False) -> dict:
    """{"seconds": of a training iteration, the median}; it means something where nothing else is running."""
    run = begun(fresh(task, smoke=smoke), method, 1e-4, batch, 0, 0.99, Hyper(lam=0.0))
    return {"seconds": statistics.median(run.step()["seconds"] for _ in range(iterations))}


def advance(task: ToyTask, iterations: int, lr: float) -> None:
    """Trains the task's model by that many iterations of LeapAlign; its weights are not averaged."""
    run = begun(task, "leap_align", lr, 64, 0, 0.0, Hyper(lam=0.0))
    for _ in range(iterations):
        run.step()
