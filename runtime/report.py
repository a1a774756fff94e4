"""A run's report: result.json, curves.png, signs of reward hacking, the table printed at its end, and its tracker."""

import math
import pkgutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from matplotlib.figure import Figure

from runtime.checkpoint import Progress
from runtime.processes import rank
from runtime.run_dir import atomic_file, read_csv, write_json

Evaluation = dict[str, float]
"""`iteration` and the value of every evaluator."""


def reward_hacking_signs(evaluations: list[Evaluation], held_out: dict[str, float]) -> dict[str, str]:
    """Held-out evaluators that are worse than at their best although the reward rose since: name -> message.

    held_out: how large a change of each counts, positive where higher is better, negative where lower is.
    """
    now, signs = evaluations[-1], {}
    for name, change in held_out.items():
        direction = math.copysign(1, change)
        values = [direction * row[name] for row in evaluations]
        best = evaluations[values.index(max(values))]
        if now["reward"] > best["reward"] and direction * (best[name] - now[name]) > abs(change):
            signs[name] = (
                f"a sign of reward hacking, iteration {best['iteration']} -> {now['iteration']}: "
                f"reward {best['reward']:.3g} -> {now['reward']:.3g}, but {name} {best[name]:.3g} -> {now[name]:.3g}"
            )
    return signs


def write_report(folder: Path, progress: Progress) -> None:
    """Writes result.json and curves.png, and prints the evaluators."""
    write_result(folder, progress.evaluations, progress.seconds, progress.signs)
    draw_curves(folder, progress.evaluations, read_csv(folder / "metrics.csv"))
    print_summary(folder, progress.evaluations, progress.seconds, progress.signs)


def write_result(folder: Path, evaluations: list[Evaluation], seconds: float, signs: dict[str, str]) -> None:
    """result.json: all evaluators before and after training, the seconds of training, the signs that still hold."""
    before, after = (_evaluators(row) for row in (evaluations[0], evaluations[-1]))
    result = {"before": before, "after": after, "seconds": seconds, "signs": list(signs.values())}
    write_json(folder / "result.json", result)


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


def print_summary(folder: Path, evaluations: list[Evaluation], seconds: float, signs: dict[str, str]) -> None:
    """Prints the evaluators before and after training, and the signs of reward hacking."""
    before, after = evaluations[0], evaluations[-1]
    print(f"{'':14}{'before':>10}{'after':>10}")
    for name in _evaluators(before):
        print(f"{name:14}{before[name]:10.3f}{after[name]:10.3f}")
    for sign in signs.values():
        print(sign)
    print(f"{seconds:.1f} s of training; figures, metrics and weights are in {folder}")


def _evaluators(row: Evaluation) -> dict[str, float]:
    return {name: value for name, value in row.items() if name != "iteration"}


def tracker_class(name: str | None) -> Callable[..., AbstractContextManager]:
    """The class of a tracker, imported now; without a name, and on all ranks but the first, a context that gives None.

    Its objects are Tracker(folder, settings), for a `with` statement.  Raises BadInput if its library is not installed.
    """
    if name is None or rank() > 0:
        return lambda folder, settings: nullcontext()
    return pkgutil.resolve_name("runtime.tracker:installed_tracker")(name)
