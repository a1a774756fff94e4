"""The figures of the laboratory's experiments."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from toy.report import mean

COLORS = {"leap_align": "C3", "drtune": "C0", "refl": "C1", "draft_lv": "C2", "full_backprop": "k"}
Rows = list[dict[str, Any]]


def _keep(figure: Figure, path: Path) -> None:
    """Writes the picture, renamed into place."""
    part = path.with_suffix(".part")
    figure.savefig(part, dpi=110, format="png")
    part.replace(path)


def _curve(many: list[dict], figure: str) -> tuple[list[int], np.ndarray, np.ndarray]:
    """Stops of several runs, and the mean and its error of a figure at each."""
    stops = sorted(map(int, many[0]))
    values = np.array([mean([run[str(stop)][figure] for run in many]) for stop in stops])
    return stops, values[:, 0], values[:, 1]


def compare(path: Path, runs: dict[tuple, list[dict]], figures: dict[str, tuple[str, ...]]) -> None:
    """compare.png: of the large budget, the reward over training and what is held out against the reward.

    A row for each task and hinge policy; bands and crosses are standard errors.
    """
    places = list(dict.fromkeys(key[:2] for key in runs))
    sheet = Figure(figsize=(12, 3.1 * len(places)), layout="constrained")
    grid = sheet.subplots(len(places), 3, squeeze=False)
    for (task, policy), axes in zip(places, grid):
        for (t, p, method, budget), many in runs.items():
            if (t, p, budget) != (task, policy, "large"):
                continue
            stops, reward, error = _curve(many, "reward")
            axes[0].plot(stops, reward, ".-", color=COLORS[method], label=method, ms=4)
            axes[0].fill_between(stops, reward - error, reward + error, color=COLORS[method], alpha=0.25, lw=0)
            for axis, figure in zip(axes[1:], ("utility", figures[task][-1])):
                _, held, held_error = _curve(many, figure)
                axis.errorbar(reward, held, held_error, error, ".-", color=COLORS[method], ms=4, lw=1)
                axis.set(xlabel="reward (trained on)", ylabel=f"{figure} (held out)")
        axes[0].set(xlabel="iteration", ylabel="reward (trained on)", title=f"{task}, {policy}")
        for axis in axes:
            axis.grid(alpha=0.3)
    sheet.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    _keep(sheet, path)


def ablations(path: Path, rows: Rows, stops: tuple[int, int]) -> None:
    """ablations.png: the reward of every option at both stops; a row for each ablation, a column for each task.

    Bars are standard errors.
    """
    names, tasks = (list(dict.fromkeys(row[key] for row in rows)) for key in ("ablation", "task"))
    sheet = Figure(figsize=(12, 2.2 * len(names)), layout="constrained")
    for name, axes in zip(names, sheet.subplots(len(names), 2 * len(tasks), squeeze=False)):
        for column, axis in enumerate(axes):
            task, stop = tasks[column // 2], stops[column % 2]
            some = [r for r in rows if (r["ablation"], r["task"], r["iterations"]) == (name, task, stop)]
            _options(axis, some)
            axis.set_title(f"{name}: {task}, {stop} iterations", fontsize=8)
    sheet.supylabel("reward")
    _keep(sheet, path)


def _options(axis: Axes, rows: Rows) -> None:
    """One point an option, with its error."""
    at = range(len(rows))
    axis.errorbar(
        at, [r["reward"] for r in rows], [r["reward_error"] for r in rows], fmt="o", color="C3", ms=4, capsize=3
    )
    axis.set_xticks(at, [r["option"] for r in rows], fontsize=8)
    axis.set_xlim(-0.5, len(rows) - 0.5)
    axis.tick_params(axis="y", labelsize=8)
    axis.grid(alpha=0.3)


LINES = {
    "leap_align 1": ("C3", "-"),
    "leap_align 0.3": ("C3", "--"),
    "leap_align 0": ("C3", ":"),
    "drtune": ("C0", "-"),
    "refl": ("C1", "-"),
    "draft_lv": ("C2", "-"),
}


def fidelity(path: Path, rows: Rows, weights: Rows, T: int) -> None:
    """fidelity.png: a row a task: the cosine to the true gradient with T and over training, and a draw's scatter;
    below, how much each timestep weighs."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    sheet = Figure(figsize=(12, 3 * len(tasks) + 3.2), layout="constrained")
    grid = sheet.add_gridspec(len(tasks) + 1, 3)
    for n, task in enumerate(tasks):
        axes = [sheet.add_subplot(grid[n, column]) for column in range(3)]
        some = [row for row in rows if row["task"] == task]
        for name, (color, style) in LINES.items():
            own = [row for row in some if row["method"] == name]
            by_grid, by_stage = [r for r in own if r["iterations"] == 0], [r for r in own if r["T"] == T]
            for axis, x, part, y in (
                (axes[0], "T", by_grid, "cosine"),
                (axes[1], "iterations", by_stage, "cosine"),
                (axes[2], "T", by_grid, "variance"),
            ):
                axis.plot([r[x] for r in part], [r[y] for r in part], style, color=color, marker=".", label=name)
                axis.grid(alpha=0.3)
        for axis, x, y in zip(axes, ("T", "iterations of LeapAlign", "T"), (*["cosine to the true gradient"] * 2,
                                                                           "variance of a draw / mean²")):  # fmt: skip
            axis.set(xlabel=x, ylabel=y, title=task)
        axes[0].set_xscale("log")
        axes[2].set_xscale("log")
    _profile(sheet.add_subplot(grid[-1, :]), weights)
    handles = sheet.axes[0].get_legend_handles_labels()
    sheet.legend(*handles, loc="outside upper center", ncols=6, frameon=False)
    _keep(sheet, path)


def _profile(axis: Axes, weights: Rows) -> None:
    """What each method makes of a timestep, each scaled to the sum 1 as the true weights have."""
    index = [row["i"] for row in weights]
    for name in (column for column in weights[0] if column != "i"):
        values = np.array([row[name] for row in weights])
        method, *likened = name.split(" x ")
        style = "--" if "toy" in name else ":" if likened else "-"
        axis.plot(index, values / values.sum(), style, color=COLORS[method], marker=".", ms=3, label=name)
    axis.set(xlabel="timestep i (1 is the last step, next to the image)", ylabel="share of dv(x_i)/dθ")
    axis.set(title="effective weight of each timestep, as a share; full_backprop is the true one")
    axis.set_yscale("symlog", linthresh=0.01)
    axis.legend(fontsize=8, ncols=2)
    axis.grid(alpha=0.3)


def pairs(path: Path, rows: Rows, scatters: tuple[str, ...]) -> None:
    """pairs.png: for each task the gradient's variance, and the reward at equal compute."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    sheet = Figure(figsize=(10, 2.8 * len(tasks)), layout="constrained")
    for task, (left, right) in zip(tasks, sheet.subplots(len(tasks), 2, squeeze=False)):
        for n, kind in enumerate(("batch", "sample")):
            own = [row for row in rows if (row["task"], row["pairs"]) == (task, kind)]
            at = np.arange(len(scatters)) + 0.4 * n - 0.2
            left.bar(at, [own[0][f"variance, {what}"] for what in scatters], 0.38, color=f"C{n}")
            at = np.arange(len(own)) + 0.1 * n - 0.05
            errors = [row["reward_error"] for row in own]
            right.errorbar(at, [row["reward"] for row in own], errors, fmt="o", color=f"C{n}", capsize=3,
                           label=f"a pair a {kind}")  # fmt: skip
        left.set_xticks(range(len(scatters)), [f"over {what}" for what in scatters])
        left.set(title=f"{task}: variance of a step's gradient / mean²")
        right.set_xticks(range(len(own)), [f"{row['budget']} budget" for row in own])
        right.set(title=f"{task}: reward at equal compute", xlim=(-0.5, len(own) - 0.5))
        right.legend()
        left.grid(alpha=0.3)
        right.grid(alpha=0.3)
    _keep(sheet, path)


def memory(path: Path, rows: Rows) -> None:
    """memory.png: bytes kept for backward, and the gradient's length over that at the smallest T."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    sheet = Figure(figsize=(10, 3 * len(tasks)), layout="constrained")
    for task, (left, right) in zip(tasks, sheet.subplots(len(tasks), 2, squeeze=False)):
        some = [row for row in rows if row["task"] == task]
        steps = [row["T"] for row in some]
        for name in ("leap_align", "full_backprop"):
            left.plot(steps, [row[f"bytes, {name}"] / 2**20 for row in some], ".-", color=COLORS[name], label=name)
        for column in (column for column in some[0] if column.startswith("norm, ")):
            name, (color, style) = column[6:], LINES.get(column[6:], ("k", "-"))
            right.plot(steps, [r[column] / some[0][column] for r in some], style, color=color, marker=".", label=name)
        left.set(title=f"{task}: MiB kept for backward", xlabel="T", ylim=(0, None))
        right.set(title=f"{task}: gradient's norm over that at T = {steps[0]}", xlabel="T", ylim=(0, None))
        for axis in (left, right):
            axis.legend(fontsize=8)
            axis.grid(alpha=0.3)
    _keep(sheet, path)
