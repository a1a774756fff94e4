"""The figure of toy/benchmark.py."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from toy.pictures import PALETTE

Row = dict[str, Any]
SHARES = ("data", "text", "rollout", "leaps", "decode", "reward", "optimizer", "EMA", "other")
"""Parts of a step."""
JOB = ("import", "build", "pre-training", "training", "evaluations", "checkpoints", "pictures", "other")
"""Parts of the main job."""


def draw_flops(axis: Axes, rows: list[Row]) -> None:
    """A dot a task and method."""
    for i, name in enumerate(dict.fromkeys(row["task"] for row in rows)):
        some = [row for row in rows if row["task"] == name]
        axis.plot([r["network"] for r in some], [r["method"] for r in some], "os^D"[i], label=name, alpha=0.7)
    axis.axvline(1, color="k", lw=0.8)
    axis.set(title="operations over the floor (network)", xscale="log")
    axis.set_xticks([0.7, 1, 1.4, 2, 2.8], [0.7, 1, 1.4, 2, 2.8])
    axis.minorticks_off()
    axis.invert_yaxis()
    axis.legend(frameon=False)


def draw_memory(axis: Axes, rows: list[Row]) -> None:
    """Two lines a task: dashed is full backpropagation."""
    for i, name in enumerate(dict.fromkeys(row["task"] for row in rows)):
        some = [row for row in rows if row["task"] == name]
        T = [row["T"] for row in some]
        axis.loglog(T, [row["leap_align MiB"] for row in some], f"C{i}{'os^D'[i]}-", label=name, alpha=0.7)
        axis.loglog(T, [row["full_backprop MiB"] for row in some], f"C{i}{'os^D'[i]}--", alpha=0.6)
    axis.set(title="saved for backward; dashed: full_backprop", xlabel="T", ylabel="MiB")
    axis.set_xticks(T, T)
    axis.minorticks_off()
    axis.legend(frameon=False)


def draw_time(axis: Axes, rows: list[Row]) -> None:
    """The ratio of each task with its quartiles, and the part of it that is the update of weights and average."""
    for i, row in enumerate(rows):
        low, high = map(float, row["quartiles"].split("-"))
        axis.barh(i, row["ratio"] - 1, color="C0")
        axis.barh(i, row["of it update"], color="C1")
        axis.plot([low - 1, high - 1], [i, i], "k-", lw=2)
    axis.axvline(0.05, color="k", lw=0.8, ls=":")
    axis.set(title="step over bare step, less 1; orange: the update", yticks=range(len(rows)))
    axis.set_yticklabels([row["task"] for row in rows])
    axis.invert_yaxis()


def draw_shares(axis: Axes, rows: list[Row]) -> None:
    """A bar a task."""
    stack(axis, [row["task"] for row in rows], rows, SHARES)
    axis.set(title="share of a step")


def draw_job(axis: Axes, rows: list[Row]) -> None:
    """A bar a task and run."""
    stack(axis, [f"{row['task']}, {row['run']}" for row in rows], rows, JOB)
    axis.set(title="the main job, seconds")


def stack(axis: Axes, names: list[str], rows: list[Row], parts: tuple[str, ...]) -> None:
    """Horizontal bars, each of its parts."""
    left = [0.0] * len(rows)
    for part, color in zip(parts, PALETTE):
        axis.barh(names, [row[part] for row in rows], left=left, color=color, label=part)
        left = [start + row[part] for start, row in zip(left, rows)]
    axis.invert_yaxis()
    axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))


DRAWERS = {"flops": draw_flops, "memory": draw_memory, "time": draw_time, "shares": draw_shares, "job": draw_job}


def draw(tables: dict[str, list[Row]], out: Path) -> None:
    """benchmark.png: a panel for each table that there is."""
    shown = {name: rows for name, rows in tables.items() if rows and name in DRAWERS}
    if not shown:
        return
    figure = Figure(figsize=(13, 3.4 * -(-len(shown) // 2)), layout="constrained")
    axes = figure.subplots(-(-len(shown) // 2), 2, squeeze=False).flat
    for (name, rows), axis in zip(shown.items(), axes):
        DRAWERS[name](axis, rows)
    for axis in axes:  # one is left where their number is odd
        axis.axis("off")
    figure.savefig(out / "benchmark.png", dpi=110)
