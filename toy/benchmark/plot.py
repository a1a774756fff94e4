"""The benchmark's figure."""

from pathlib import Path

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from toy.benchmark.main_job import PHASES
from toy.benchmark.step_time import SHARES
from toy.benchmark.tasks import Row

MARKERS = "os^D"


def plot_flops(axis: Axes, rows: list[Row]) -> None:
    """A marker for each task and method."""
    for marker, (task, task_rows) in zip(MARKERS, by_task(rows).items()):
        ratios, methods = ([row[column] for row in task_rows] for column in ("network", "method"))
        axis.plot(ratios, methods, marker, label=task, alpha=0.7)
    axis.axvline(1, color="k", lw=0.8)
    axis.set(title="operations over the floor (network)", xscale="log")
    ticks = [0.7, 1, 1.4, 2, 2.8]
    axis.set_xticks(ticks, ticks)
    axis.minorticks_off()
    axis.invert_yaxis()
    axis.legend(frameon=False)


def plot_memory(axis: Axes, rows: list[Row]) -> None:
    """Two lines for each task: solid for LeapAlign, dashed for full backpropagation."""
    for i, (task, task_rows) in enumerate(by_task(rows).items()):
        T, leap_align, full_backprop = (
            [row[column] for row in task_rows] for column in ("T", "leap_align MiB", "full_backprop MiB")
        )
        axis.loglog(T, leap_align, f"C{i}{MARKERS[i]}-", label=task, alpha=0.7)
        axis.loglog(T, full_backprop, f"C{i}{MARKERS[i]}--", alpha=0.6)
    axis.set(title="saved for backward; dashed: full_backprop", xlabel="T", ylabel="MiB")
    axis.set_xticks(T, T)
    axis.minorticks_off()
    axis.legend(frameon=False)


def plot_time(axis: Axes, rows: list[Row]) -> None:
    """The ratio of each task with its quartiles; the part of it that optimizer and EMA take."""
    for i, row in enumerate(rows):
        low, high = map(float, row["quartiles"].split("-"))
        axis.barh(i, row["ratio"] - 1, color="C0")
        axis.barh(i, row["of it update"], color="C1")
        axis.plot([low - 1, high - 1], [i, i], "k-", lw=2)
    axis.axvline(0.05, color="k", lw=0.8, ls=":")
    axis.set(title="step / bare step - 1; orange: optimizer and EMA", yticks=range(len(rows)))
    axis.set_yticklabels([row["task"] for row in rows])
    axis.invert_yaxis()


def plot_shares(axis: Axes, rows: list[Row]) -> None:
    """A bar for each task."""
    stacked_bars(axis, [row["task"] for row in rows], rows, SHARES)
    axis.set(title="share of a step")


def plot_job(axis: Axes, rows: list[Row]) -> None:
    """A bar for each task and run."""
    stacked_bars(axis, [f"{row['task']}, {row['run']}" for row in rows], rows, PHASES)
    axis.set(title="the main job, seconds")


def by_task(rows: list[Row]) -> dict[str, list[Row]]:
    """The rows of each task."""
    return {task: [row for row in rows if row["task"] == task] for task in dict.fromkeys(row["task"] for row in rows)}


def stacked_bars(axis: Axes, names: list[str], rows: list[Row], columns: tuple[str, ...]) -> None:
    """A horizontal bar for each row, made of its columns."""
    left = [0.0] * len(rows)
    for column, color in zip(columns, colormaps["tab10"].colors):
        axis.barh(names, [row[column] for row in rows], left=left, color=color, label=column)
        left = [end + row[column] for end, row in zip(left, rows)]
    axis.invert_yaxis()
    axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))


PANELS = {"flops": plot_flops, "memory": plot_memory, "time": plot_time, "shares": plot_shares, "job": plot_job}


def plot(tables: dict[str, list[Row]], out: Path) -> None:
    """Writes benchmark.png, with a panel for each table that has rows."""
    shown = {name: rows for name, rows in tables.items() if rows}
    if not shown:
        return
    lines = -(-len(shown) // 2)
    figure = Figure(figsize=(13, 3.4 * lines), layout="constrained")
    axes = figure.subplots(lines, 2, squeeze=False).flat
    for (name, rows), axis in zip(shown.items(), axes):
        PANELS[name](axis, rows)
    for axis in axes:  # an odd number of panels leaves one empty
        axis.axis("off")
    figure.savefig(out / "benchmark.png", dpi=110)
