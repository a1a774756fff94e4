"""What a run prints before and after training, result.json, curves.png, warnings of reward hacking, its tracker."""

import math
import os
import pkgutil
import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import nn
from tqdm import tqdm

from leap_align import BadInput
from runtime.checkpoint import Progress
from runtime.files import atomic_file, check_no_pipe, parse_json, read_csv, write_csv, write_json
from runtime.processes import RaisedOnAllRanks, full_value, one_line, printable, rank, reshard, world_size
from runtime.run_dir import checkpoints, differences
from runtime.task import Task

Evaluation = dict[str, float]  # `iteration` and the value of every evaluator


def reward_hacking_warnings(evaluations: list[Evaluation], held_out: dict[str, float]) -> dict[str, str]:
    """Held-out evaluators that are worse than at their best although the reward rose since: name -> message.

    held_out: how large a change of each counts, positive where higher is better, negative where lower is.
    """
    now, warnings = evaluations[-1], {}
    for name, change in held_out.items():
        direction = math.copysign(1, change)
        values = [direction * row[name] for row in evaluations]
        best = evaluations[values.index(max(values))]
        if now["reward"] > best["reward"] and direction * (best[name] - now[name]) > abs(change):
            warnings[name] = (
                f"warning: perhaps reward hacking, iteration {best['iteration']} -> {now['iteration']}: "
                f"reward {best['reward']:.3g} -> {now['reward']:.3g}, but {name} {best[name]:.3g} -> {now[name]:.3g}"
            )
    return warnings


def add_evaluation(
    progress: Progress, values: dict[str, float], held_out: dict[str, float], folder: Path | None
) -> None:
    """Adds an evaluation to the progress, with its warnings; with a folder, writes evaluations.csv and prints them."""
    progress.evaluations.append({"iteration": progress.iteration, **values})
    warnings = reward_hacking_warnings(progress.evaluations, held_out)
    if folder is not None:
        write_csv(folder / "evaluations.csv", progress.evaluations)
        for name in warnings.keys() - progress.warnings.keys():
            tqdm.write(warnings[name])
    progress.warnings = warnings


def announce(flags: Any, task: type[Task], method: Callable[..., Any], folder: Path) -> str:
    """Prints in four lines what the run with these flags will do, and in one its plan, which it returns.

    `weight` and `leash` are columns of metrics.csv.
    """
    config, hyper, plan = flags.run, flags.method, read_plan(flags)
    loss = "-weight * reward" if hyper.lam is None else f"weight * max(0, {hyper.lam:g} - reward)"
    leash = f" + {config.beta:g} * leash" if config.beta else ""
    sizes = f"{config.iterations} iterations of {config.batch_size} samples, {config.T} steps each"
    # On resume, the newest checkpoint.  If it is damaged, loading it says so.
    done = [f", from iteration {int(path.name)} of {config.iterations}" for path in checkpoints(folder)[-1:]]
    if config.resume and not done:
        done = [", from the start, because there is no checkpoint"]
    print(f"{config.task} is trained to lower {loss}{leash}: {sizes}, lr {config.lr:g}{''.join(done)}.")
    print((method.__doc__ or config.method).strip().splitlines()[0])
    evaluators = ", ".join(task.evaluators(flags.task)) or "none"
    print(f"Training never sees these evaluators: {evaluators}. The folder is {printable(folder)}.")
    precision = asdict(flags.task).get("precision", "float32")
    print(f"Processes: {world_size()}; device: {task.choose_device()}; precision: {precision}.", flush=True)
    if plan:
        print(f"Planned: {plan}.", flush=True)
    return plan


def read_plan(flags: Any) -> str:
    """What the file of --plan says of the whole run, and which of its settings are not this run's; "" without one."""
    if (path := getattr(flags.task, "plan", None)) is None:
        return ""
    settings = asdict(flags.run) | asdict(flags.method) | asdict(flags.task) | {"processes": world_size()}
    settings["processes a node"] = os.environ.get("LOCAL_WORLD_SIZE", "1")
    try:
        plan = parse_json(check_no_pipe(path).read_text(encoding="utf-8"))
        others = differences(plan["settings"], settings, settings.keys() - plan["settings"].keys())
        return printable(plan["summary"]) + (f", with other settings: {others}" if others else "")
    except (OSError, LookupError, TypeError, ValueError, AttributeError) as error:
        remedy = "give the file that `python -m full_scale plan --json FILE` wrote"
        raise BadInput(f"plan={path} is no plan ({one_line(error)}): {remedy}") from error


def print_measured(seconds: list[float], iteration: int, iterations: int, plan: str) -> None:
    """Prints on rank 0, at the tenth iteration of this process, what one takes, with a plan or on a GPU.

    seconds: of each iteration of this process.  The first does not count: it compiles and allocates.
    """
    gib, cached = torch.cuda.max_memory_allocated() / 2**30, torch.cuda.max_memory_reserved() / 2**30  # 0 on a CPU
    if len(seconds) == 10 and rank() == 0 and (gib or plan):
        step, left = statistics.fmean(seconds[1:]), iterations - iteration
        memory = f"{gib:.1f} GiB on a GPU ({cached:.1f} with torch's cache), " if gib else ""
        measured = f"{step:.2f} s an iteration, {memory}{left * step / 3600:.2f} hours for {left} more"
        tqdm.write(f"Measured: {measured}{plan and f'; planned: {plan}'}.")


def postfix(row: dict[str, float], evaluation: dict[str, float], task: Task) -> dict[str, str]:
    """What the progress bar shows: the step's reward and gradient, and the last values of two evaluators."""
    held_out = {name: f"{evaluation[name]:.3f}" for name in list(task.held_out)[:2]}
    return {"reward": f"{row['reward']:.3f}", "grad": f"{row['grad_norm']:.2g}", **held_out}


def not_finite_gradients(model: nn.Module) -> str:
    """Names the first parameters whose gradient is not finite, for a message; every rank calls it."""
    reshard(model)  # the gradients are those of the shards
    norms = {n: torch.linalg.vector_norm(p.grad) for n, p in model.named_parameters() if p.grad is not None}
    broken = [name for name, norm in norms.items() if not full_value(norm).isfinite()]
    return f"not finite in {', '.join(broken[:3]) or 'no parameter'} ({len(broken)})"


def skipped_step(model: nn.Module, loss: float, norm: float, progress: Progress, most: int) -> None:
    """Prints an update whose loss or gradient is not finite; raises on every rank after `most` of them in a row."""
    message = f"loss {loss:.3g}, gradient norm {norm:.3g}, {not_finite_gradients(model)}"
    if rank() == 0:
        tqdm.write(f"iteration {progress.iteration + 1}: {message}: this update is skipped")
    if (skips := progress.consecutive_skips) >= most:
        remedy = "start again in another --out with a lower --lr, or check the reward"
        raise RaisedOnAllRanks(f"{skips} updates in a row skipped, now with {message}: {remedy}")


def warn_of_zero_gradient(iteration: int) -> None:
    """Prints, on rank 0, that nothing is trained."""
    if rank() == 0:
        reason = "the reward does not depend on the image, or the image not on the trained parameters"
        tqdm.write(f"iteration {iteration}: the gradient is exactly zero: {reason}")


def next_command(task: Task, lam: float | None, beta: float) -> str:
    """What to try after a run of this task with this hinge and leash."""
    return task.next_commands[min(2 if beta else int(lam is None), len(task.next_commands) - 1)]


def write_report(folder: Path, task: Task, progress: Progress, tracker: Any, flags: Any) -> None:
    """Draws and tracks the figures, writes result.json, prints the evaluators before and after, and what to try."""
    evaluations, seconds, waiting = progress.evaluations, progress.seconds, progress.checkpoint_seconds
    task.draw_figures(folder)
    result = {"before": _evaluators(evaluations[0]), "after": _evaluators(evaluations[-1]), "seconds": seconds}
    result |= {"checkpoint_seconds": waiting, "warnings": list(progress.warnings.values())}  # those that still hold
    write_json(folder / "result.json", result)
    draw_curves(folder, evaluations, read_csv(folder / "metrics.csv"))
    print_summary(evaluations, progress.warnings)
    print(f"{seconds:.1f} s of training, {waiting:.2f} of waiting for checkpoints; files are in {printable(folder)}")
    tracker.add_figures(progress.iteration)
    pictures = [*sorted(folder.glob("*.png")), *sorted(folder.glob("samples/*.png"))[-1:]]
    print(f"look at {', '.join(map(printable, pictures))}")
    print(f"next: {next_command(task, flags.method.lam, flags.run.beta)}")


def draw_curves(folder: Path, evaluations: list[Evaluation], metrics: list[dict[str, str]]) -> None:
    """curves.png: the reward of every batch in grey, each evaluator of the averaged weights as dots."""
    names = list(_evaluators(evaluations[0]))
    figure = Figure(figsize=(2.8 * len(names), 2.9), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names):
        if name == "reward":
            iterations, rewards = ([float(row[column]) for row in metrics] for column in ("iteration", "reward"))
            axis.plot(iterations, rewards, color="0.5", lw=0.7, label="batch, live weights")
        values, label = [row[name] for row in evaluations], "evaluation, averaged weights"
        axis.plot([row["iteration"] for row in evaluations], values, "o-", color="#0072B2", ms=3, label=label)
        axis.set(title=name + (" (trained on)" if name == "reward" else " (held out)"), xlabel="iteration")
        axis.grid(alpha=0.3)
    lines = {line.get_label(): line for axis in figure.axes for line in axis.lines}
    figure.legend(lines.values(), lines, loc="outside lower center", ncols=2, frameon=False)
    with atomic_file(folder / "curves.png") as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def print_summary(evaluations: list[Evaluation], warnings: dict[str, str]) -> None:
    """Prints the evaluators before and after training, and the warnings of reward hacking."""
    before, after = evaluations[0], evaluations[-1]
    print(f"{'':14}{'before':>10}{'after':>10}")
    for name in _evaluators(before):
        print(f"{name:14}{before[name]:10.3f}{after[name]:10.3f}")
    for warning in warnings.values():
        print(warning)


def _evaluators(row: Evaluation) -> dict[str, float]:
    return {name: value for name, value in row.items() if name != "iteration"}


class NoTracker(nullcontext):
    """Shows nothing."""

    def __init__(self, *_: Any) -> None:
        super().__init__(self)

    def ignore(self, *_: Any) -> None: ...

    replay = add = add_figures = ignore


def tracker_class(name: str | None) -> Callable[..., AbstractContextManager]:
    """The class of a tracker, imported now; without a name, and on all ranks but the first, NoTracker.

    Its objects are Tracker(folder, settings), for a `with` statement.  Raises BadInput if its library is not installed.
    """
    if name is None or rank() > 0:
        return NoTracker
    return pkgutil.resolve_name("runtime.tracker:installed_tracker")(name)
