"""The figures of the experiments, NAME.png."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from runtime.run_dir import atomic_file
from toy.summary import mean_and_error

COLORS = {"leap_align": "C3", "drtune": "C0", "refl": "C1", "draft_lv": "C2", "full_backprop": "k"}
GRADIENT_STYLES = {
    "leap_align 1": ("C3", "-"),
    "leap_align 0.3": ("C3", "--"),
    "leap_align 0": ("C3", ":"),
    "drtune": ("C0", "-"),
    "refl": ("C1", "-"),
    "draft_lv": ("C2", "-"),
}
"""Color and line of each method and alpha in figures of gradients."""
Rows = list[dict[str, Any]]


def _save(figure: Figure, path: Path) -> None:
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")


def _unique(rows: Rows, column: str) -> list:
    """The values of a column, each once, in their order."""
    return list(dict.fromkeys(row[column] for row in rows))


# ---------------------------------------------------------------------------------------------------------------------
# compare
# ---------------------------------------------------------------------------------------------------------------------


def compare(path: Path, runs: dict[tuple, list[dict]], evaluators: dict[str, tuple[str, ...]]) -> None:
    """The large budget: the reward over training, and held-out evaluators against the reward.

    A row for each task and hinge.  Bands and crosses are standard errors.
    """
    panels = list(dict.fromkeys((task, hinge) for task, hinge, _, _ in runs))
    figure = Figure(figsize=(12, 3.1 * len(panels)), layout="constrained")
    grid = figure.subplots(len(panels), 3, squeeze=False)
    for (task, hinge), axes in zip(panels, grid):
        for (run_task, run_hinge, method, budget), seed_runs in runs.items():
            if (run_task, run_hinge, budget) == (task, hinge, "large"):
                _training_curves(axes, method, seed_runs, ("utility", evaluators[task][-1]))
        axes[0].set(xlabel="iteration", ylabel="reward (trained on)", title=f"{task}, {hinge}")
        for axis in axes:
            axis.grid(alpha=0.3)
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    _save(figure, path)


def _training_curves(axes: list[Axes], method: str, seed_runs: list[dict], held_out: tuple[str, str]) -> None:
    """Draws one method: the reward over iterations, then each held-out evaluator over the reward."""
    color, iterations = COLORS[method], sorted(seed_runs[0])
    reward, error = _mean_curve(seed_runs, iterations, "reward")
    axes[0].plot(iterations, reward, ".-", color=color, label=method, ms=4)
    axes[0].fill_between(iterations, reward - error, reward + error, color=color, alpha=0.25, lw=0)
    for axis, name in zip(axes[1:], held_out):
        value, value_error = _mean_curve(seed_runs, iterations, name)
        axis.errorbar(reward, value, value_error, error, ".-", color=color, ms=4, lw=1)
        axis.set(xlabel="reward (trained on)", ylabel=f"{name} (held out)")


def _mean_curve(seed_runs: list[dict], iterations: list[int], metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard error of a metric over several runs, at each of the iterations."""
    points = [mean_and_error([run[iteration][metric] for run in seed_runs]) for iteration in iterations]
    means, errors = np.array(points).T
    return means, errors


# ---------------------------------------------------------------------------------------------------------------------
# ablations
# ---------------------------------------------------------------------------------------------------------------------


def ablations(path: Path, rows: Rows, iterations: tuple[int, int]) -> None:
    """The reward of every option, with its standard error; a row for each ablation, two columns for each task."""
    names, tasks = _unique(rows, "ablation"), _unique(rows, "task")
    columns = [(task, iteration) for task in tasks for iteration in iterations]
    figure = Figure(figsize=(12, 2.2 * len(names)), layout="constrained")
    for name, axes in zip(names, figure.subplots(len(names), len(columns), squeeze=False)):
        for (task, iteration), axis in zip(columns, axes):
            options = [r for r in rows if (r["ablation"], r["task"], r["iterations"]) == (name, task, iteration)]
            _option_rewards(axis, options)
            axis.set_title(f"{name}: {task}, {iteration} iterations", fontsize=8)
    figure.supylabel("reward")
    _save(figure, path)


def _option_rewards(axis: Axes, rows: Rows) -> None:
    """Draws a point for each option."""
    x, rewards, errors = range(len(rows)), [r["reward"] for r in rows], [r["reward_error"] for r in rows]
    axis.errorbar(x, rewards, errors, fmt="o", color="C3", ms=4, capsize=3)
    axis.set_xticks(x, [r["option"] for r in rows], fontsize=8)
    axis.set_xlim(-0.5, len(rows) - 0.5)
    axis.tick_params(axis="y", labelsize=8)
    axis.grid(alpha=0.3)


# ---------------------------------------------------------------------------------------------------------------------
# fidelity
# ---------------------------------------------------------------------------------------------------------------------


def fidelity(path: Path, rows: Rows, weights: Rows, T: int) -> None:
    """A row for each task: the cosine to the true gradient over T and over training, the variance of a draw over T.

    Below, the weight of each timestep.
    """
    tasks = _unique(rows, "task")
    figure = Figure(figsize=(12, 3 * len(tasks) + 3.2), layout="constrained")
    grid = figure.add_gridspec(len(tasks) + 1, 3)
    for n, task in enumerate(tasks):
        task_rows = [row for row in rows if row["task"] == task]
        pretrained, at_T = [r for r in task_rows if r["iterations"] == 0], [r for r in task_rows if r["T"] == T]
        cosine_over_T, cosine_over_training, variance_over_T = (figure.add_subplot(grid[n, i]) for i in range(3))
        _gradient_lines(cosine_over_T, pretrained, "T", "cosine")
        _gradient_lines(cosine_over_training, at_T, "iterations", "cosine")
        _gradient_lines(variance_over_T, pretrained, "T", "variance")
        cosine_over_T.set(xlabel="T", ylabel="cosine to the true gradient", title=task, xscale="log")
        cosine_over_training.set(xlabel="iterations of LeapAlign", ylabel="cosine to the true gradient", title=task)
        variance_over_T.set(xlabel="T", ylabel="variance of a draw / mean²", title=task, xscale="log")
    _timestep_weights(figure.add_subplot(grid[-1, :]), weights)
    handles = figure.axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=6, frameon=False)
    _save(figure, path)


def _gradient_lines(axis: Axes, rows: Rows, x: str, y: str) -> None:
    """Draws a line for each method."""
    for name, (color, style) in GRADIENT_STYLES.items():
        line = [row for row in rows if row["method"] == name]
        axis.plot([r[x] for r in line], [r[y] for r in line], style, color=color, marker=".", label=name)
    axis.grid(alpha=0.3)


def _timestep_weights(axis: Axes, weights: Rows) -> None:
    """Draws the weight of each timestep for each method, scaled to the sum 1, which is the sum of the true weights."""
    index = [row["i"] for row in weights]
    for name in (column for column in weights[0] if column != "i"):
        values = np.array([row[name] for row in weights])
        method, *with_similarity = name.split(" x ")
        style = "--" if "toy" in name else ":" if with_similarity else "-"
        axis.plot(index, values / values.sum(), style, color=COLORS[method], marker=".", ms=3, label=name)
    axis.set(xlabel="timestep i (1 is the last step, next to the image)", ylabel="share of dv(x_i)/dθ")
    axis.set(title="effective weight of each timestep, as a share; full_backprop is the true one")
    axis.set_yscale("symlog", linthresh=0.01)
    axis.legend(fontsize=8, ncols=2)
    axis.grid(alpha=0.3)


# ---------------------------------------------------------------------------------------------------------------------
# pairs
# ---------------------------------------------------------------------------------------------------------------------


def pairs(path: Path, rows: Rows, redrawn: tuple[str, ...]) -> None:
    """A row for each task: the variance of the gradient, and the reward at equal compute."""
    tasks = _unique(rows, "task")
    figure = Figure(figsize=(10, 2.8 * len(tasks)), layout="constrained")
    for task, (left, right) in zip(tasks, figure.subplots(len(tasks), 2, squeeze=False)):
        task_rows = [row for row in rows if row["task"] == task]
        for n, kind in enumerate(_unique(task_rows, "pairs")):
            kind_rows = [row for row in task_rows if row["pairs"] == kind]
            variances = [kind_rows[0][f"variance, {inputs}"] for inputs in redrawn]
            left.bar(np.arange(len(redrawn)) + 0.4 * n - 0.2, variances, 0.38, color=f"C{n}")
            x, errors = np.arange(len(kind_rows)) + 0.1 * n - 0.05, [row["reward_error"] for row in kind_rows]
            label, rewards = f"a pair a {kind}", [row["reward"] for row in kind_rows]
            right.errorbar(x, rewards, errors, fmt="o", color=f"C{n}", capsize=3, label=label)
        budgets = _unique(task_rows, "budget")
        left.set_xticks(range(len(redrawn)), [f"over {inputs}" for inputs in redrawn])
        left.set(title=f"{task}: variance of a step's gradient / mean²")
        right.set_xticks(range(len(budgets)), [f"{budget} budget" for budget in budgets])
        right.set(title=f"{task}: reward at equal compute", xlim=(-0.5, len(budgets) - 0.5))
        right.legend()
        left.grid(alpha=0.3)
        right.grid(alpha=0.3)
    _save(figure, path)


# ---------------------------------------------------------------------------------------------------------------------
# memory
# ---------------------------------------------------------------------------------------------------------------------


def memory(path: Path, rows: Rows) -> None:
    """A row for each task: bytes saved for backward, and the gradient's norm over its value at the smallest T."""
    tasks = _unique(rows, "task")
    figure = Figure(figsize=(10, 3 * len(tasks)), layout="constrained")
    for task, (left, right) in zip(tasks, figure.subplots(len(tasks), 2, squeeze=False)):
        task_rows = [row for row in rows if row["task"] == task]
        T = [row["T"] for row in task_rows]
        for name in ("leap_align", "full_backprop"):
            mebibytes = [row[f"bytes, {name}"] / 2**20 for row in task_rows]
            left.plot(T, mebibytes, ".-", color=COLORS[name], label=name)
        for column in (column for column in task_rows[0] if column.startswith("norm, ")):
            name = column.removeprefix("norm, ")
            color, style = GRADIENT_STYLES.get(name, ("k", "-"))
            growth = [row[column] / task_rows[0][column] for row in task_rows]
            right.plot(T, growth, style, color=color, marker=".", label=name)
        left.set(title=f"{task}: MiB kept for backward", xlabel="T", ylim=(0, None))
        right.set(title=f"{task}: gradient's norm over that at T = {T[0]}", xlabel="T", ylim=(0, None))
        for axis in (left, right):
            axis.legend(fontsize=8)
            axis.grid(alpha=0.3)
    _save(figure, path)
