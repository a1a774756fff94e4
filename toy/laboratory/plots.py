"""The figures of the experiments, NAME.png."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from leap_align import METHODS
from runtime.run_dir import atomic_file

COLORS = ("#D55E00", "#56B4E9", "#009E73", "#0072B2", "#000000", "#E69F00", "#CC79A7", "#999999")
"""Okabe and Ito's colors, which colour-blind readers can tell apart; one for each method, in the table's order."""
MARKERS = "o^Ds*vPX"
LINES = {"leap_align 1": "-", "leap_align 0.3": "--", "leap_align 0": ":"}
"""The values of alpha in figures of gradients."""
Rows = list[dict[str, Any]]


def _style(name: str) -> dict[str, str]:
    """Color, marker and line of a method, by its place in the table, or of LeapAlign with some alpha."""
    method = "leap_align" if name in LINES else name
    index = list(dict.fromkeys([*METHODS, method])).index(method) % len(COLORS)
    return {"color": COLORS[index], "marker": MARKERS[index], "linestyle": LINES.get(name, "-")}


def _save(figure: Figure, path: Path) -> None:
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")


def _unique(rows: Rows, column: str) -> list:
    """The values of a column, each once, in their order."""
    return list(dict.fromkeys(row[column] for row in rows))


# ---------------------------------------------------------------------------------------------------------------------
# compare
# ---------------------------------------------------------------------------------------------------------------------


def compare(path: Path, rows: Rows, shown: dict[str, tuple[str, str]]) -> None:
    """The large budget: the reward over training, and two held-out evaluators of each task against the reward.

    A row for each task and hinge.  Bands and crosses are standard errors.
    """
    panels = list(dict.fromkeys((row["task"], row["hinge"]) for row in rows))
    figure = Figure(figsize=(12, 3.1 * len(panels)), layout="constrained")
    grid = figure.subplots(len(panels), 3, squeeze=False)
    for (task, hinge), axes in zip(panels, grid):
        panel_rows = [row for row in rows if (row["task"], row["hinge"]) == (task, hinge)]
        for method in _unique(panel_rows, "method"):
            _training_curves(axes, method, [row for row in panel_rows if row["method"] == method], shown[task])
        axes[0].set(xlabel="iteration", ylabel="reward (trained on)", title=f"{task}, {hinge}")
        for axis in axes:
            axis.grid(alpha=0.3)
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=6, frameon=False)
    _save(figure, path)


def _training_curves(axes: list[Axes], method: str, rows: Rows, held_out: tuple[str, str]) -> None:
    """Draws one method: the reward over iterations, then each held-out evaluator over the reward."""
    style, iterations = _style(method), [row["iteration"] for row in rows]
    reward, error = (np.array([row[column] for row in rows]) for column in ("reward", "reward_error"))
    axes[0].plot(iterations, reward, label=method, ms=4, **style)
    axes[0].fill_between(iterations, reward - error, reward + error, color=style["color"], alpha=0.25, lw=0)
    for axis, name in zip(axes[1:], held_out):
        values, errors = ([row[column] for row in rows] for column in (name, f"{name}_error"))
        axis.errorbar(reward, values, errors, error, ms=4, lw=1, **style)
        axis.set(xlabel="reward (trained on)", ylabel=f"{name} (held out)")


# ---------------------------------------------------------------------------------------------------------------------
# ablations
# ---------------------------------------------------------------------------------------------------------------------


def ablations(path: Path, rows: Rows, references: dict[str, str]) -> None:
    """The reward of every option minus that of the reference, the paper's choice; a panel for each ablation and task.

    Bars are standard errors of the option's own reward.
    """
    names, tasks = _unique(rows, "ablation"), _unique(rows, "task")
    lines = -(-len(names) // 2)
    figure = Figure(figsize=(12, 2.3 * lines), layout="constrained")
    grid = figure.subplots(lines, 2 * len(tasks), squeeze=False)
    panels = [(name, task) for name in names for task in tasks]
    for (name, task), axis in zip(panels, grid.flat):
        panel_rows = [row for row in rows if (row["ablation"], row["task"]) == (name, task)]
        _option_rewards(axis, panel_rows, references[name])
        axis.set_title(f"{name}: {task}", fontsize=10)
    for axis in grid.flat[len(panels) :]:
        axis.axis("off")
    figure.supylabel("reward minus that of the paper's choice")
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    _save(figure, path)


def _option_rewards(axis: Axes, rows: Rows, reference: str) -> None:
    """Draws a point for each option and number of iterations."""
    options, stages = _unique(rows, "option"), _unique(rows, "iterations")
    axis.axhline(0, color="0.6", lw=0.8)
    axis.axvspan(*(options.index(reference) + np.array([-0.4, 0.4])), color="0.88", lw=0, label="the paper's choice")
    for n, stage in enumerate(stages):
        stage_rows = [row for row in rows if row["iterations"] == stage]
        zero = next(row["reward"] for row in stage_rows if row["option"] == reference)
        x, errors = np.arange(len(stage_rows)) + 0.24 * n - 0.12, [row["reward_error"] for row in stage_rows]
        rewards, label = [row["reward"] - zero for row in stage_rows], f"after {stage} iterations"
        axis.errorbar(x, rewards, errors, fmt="o^"[n % 2], color=COLORS[(3, 0)[n % 2]], ms=5, capsize=3, label=label)
    axis.set_xticks(range(len(options)), options)
    axis.set_xlim(-0.5, len(options) - 0.5)
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
    others = [name for name in _unique(rows, "method") if not name.startswith("leap_align ")]
    for name in (*LINES, *others):
        line = [row for row in rows if row["method"] == name]
        axis.plot([row[x] for row in line], [row[y] for row in line], ms=4, label=name, **_style(name))
    axis.grid(alpha=0.3)


def _timestep_weights(axis: Axes, weights: Rows) -> None:
    """Draws the weight of each timestep for each method, scaled to the sum 1, which is the sum of the true weights."""
    index, lines = [row["i"] for row in weights], iter(("--", ":"))
    for name in (column for column in weights[0] if column != "i"):
        values = np.array([row[name] for row in weights])
        method, *with_similarity = name.split(" x ")
        style = _style(method) | ({"linestyle": next(lines)} if with_similarity else {})
        axis.plot(index, values / values.sum(), ms=3, label=name, **style)
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
    tasks, colors = _unique(rows, "task"), (COLORS[0], COLORS[3])
    figure = Figure(figsize=(10, 2.8 * len(tasks)), layout="constrained")
    for task, (left, right) in zip(tasks, figure.subplots(len(tasks), 2, squeeze=False)):
        task_rows = [row for row in rows if row["task"] == task]
        for n, kind in enumerate(_unique(task_rows, "pairs")):
            kind_rows = [row for row in task_rows if row["pairs"] == kind]
            variances = [kind_rows[0][f"variance, {inputs}"] for inputs in redrawn]
            left.bar(np.arange(len(redrawn)) + 0.4 * n - 0.2, variances, 0.38, color=colors[n])
            x, errors = np.arange(len(kind_rows)) + 0.1 * n - 0.05, [row["reward_error"] for row in kind_rows]
            label, rewards = f"a pair a {kind}", [row["reward"] for row in kind_rows]
            right.errorbar(x, rewards, errors, fmt="o^"[n], color=colors[n], capsize=3, label=label)
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
# leash
# ---------------------------------------------------------------------------------------------------------------------

KIND_STYLES = {
    "stop": {"linestyle": ":", "lw": 1},
    "hinge": {"linestyle": "none", "fillstyle": "none", "ms": 9},
    "leash": {"linestyle": "-"},
    "both": {"linestyle": "--", "fillstyle": "none"},
}
"""What holds a run back, in the figure of the leash; the control's line ends where training does."""


def leash(path: Path, rows: Rows, shown: dict[str, tuple[str, ...]]) -> None:
    """A row for each task: the shown columns against the reward, a line for each method and kind of restraint."""
    tasks = _unique(rows, "task")
    figure = Figure(figsize=(15, 3.6 * len(tasks)), layout="constrained")
    grid = figure.subplots(len(tasks), len(shown[tasks[0]]), squeeze=False)
    for task, axes in zip(tasks, grid):
        task_rows = [row for row in rows if row["task"] == task]
        for axis, name in zip(axes, shown[task]):
            for method in _unique(task_rows, "method"):
                _frontiers(axis, method, [row for row in task_rows if row["method"] == method], name)
            axis.set(xlabel="reward (trained on)", ylabel=name, title=task)
            axis.grid(alpha=0.3)
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=5, frameon=False)
    _save(figure, path)


def _frontiers(axis: Axes, method: str, rows: Rows, name: str) -> None:
    """Draws one method: a line for each kind, with the control's to the end of training without restraint."""
    for kind, look in KIND_STYLES.items():
        kinds = (kind, "none") if kind == "stop" else (kind,)
        line = [row for row in rows if row["kind"] in kinds]
        if line:
            x, y, label = [row["reward"] for row in line], [row[name] for row in line], f"{method}, {kind}"
            axis.plot(x, y, label=label, **{"ms": 4, **_style(method), **look})


# ---------------------------------------------------------------------------------------------------------------------
# beyond
# ---------------------------------------------------------------------------------------------------------------------


PUBLISHED_COLOR = "#000000"


def beyond(path: Path, rows: Rows, shown: dict[str, tuple[str, ...]], small: int) -> None:
    """A row for each task: held-out evaluators against evaluations, a line for each method at its chosen setting.

    Left of `small` evaluations are the runs with the rate for the small budget, right of it those for the large one.
    The published setting is thick, and drawn from its start with both.  Bands are standard errors.
    """
    tasks = _unique(rows, "task")
    figure = Figure(figsize=(15, 4.6 * len(tasks)), layout="constrained")
    grid = figure.subplots(len(tasks), 3, squeeze=False)
    for task, axes in zip(tasks, grid):
        task_rows = [row for row in rows if row["task"] == task and row["evaluations"] > 0]
        for axis, name in zip(axes, shown[task]):
            for number, setting in enumerate(dict.fromkeys(map(_setting, task_rows))):
                _budget_lines(axis, number, [row for row in task_rows if _setting(row) == setting], name)
            axis.axvline(small, color="0.5", lw=0.8, ls=":")
            axis.set(xlabel="velocity evaluations a sample", ylabel=name, title=task, xscale="log")
            axis.set_ylim(*_range([row[name] for row in task_rows], is_cost=name == "nearest_real"))
            axis.grid(alpha=0.3)
        axes[-1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5), fontsize=9, frameon=False)
    _save(figure, path)


def _setting(row: dict[str, Any]) -> tuple:
    """What makes a line of its own in the figure of `beyond`."""
    return row["line"], row["option"], row["T"], row["solver"]


def _budget_lines(axis: Axes, number: int, rows: Rows, name: str) -> None:
    """Draws one setting: a line for each budget.  The first setting of a task is the published one."""
    line, option, T, solver = _setting(rows[0])
    label = ", ".join(text for text in (line, option if option not in line else "", f"T = {T}", solver) if text)
    colors = [color for color in COLORS if color != PUBLISHED_COLOR]
    style, color = divmod(number - 1, len(colors))
    look = {"color": colors[color], "marker": MARKERS[color], "linestyle": ("-", "--")[style % 2], "lw": 1.2, "ms": 4}
    if number == 0:
        look |= {"color": PUBLISHED_COLOR, "linestyle": "-", "lw": 3.5, "ms": 7}
        label = "published: " + label
    for budget in _unique(rows, "budget"):
        points = [row for row in rows if row["budget"] == budget]
        x, y, error = (np.array([row[key] for row in points]) for key in ("evaluations", name, f"{name}_error"))
        axis.plot(x, y, label=label if budget == rows[0]["budget"] else None, **look)
        axis.fill_between(x, y - error, y + error, color=look["color"], alpha=0.2, lw=0)


def _range(values: list[float], is_cost: bool) -> tuple[float, float]:
    """Axis limits that leave out the worst tenth: runs that diverge would flatten all others."""
    low, high = np.quantile(values, (0, 0.9) if is_cost else (0.1, 1))
    return low - 0.05 * (high - low), high + 0.05 * (high - low)


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
            left.plot(T, mebibytes, ms=4, label=name, **_style(name))
        for column in (column for column in task_rows[0] if column.startswith("norm, ")):
            name = column.removeprefix("norm, ")
            growth = [row[column] / task_rows[0][column] for row in task_rows]
            right.plot(T, growth, ms=4, label=name, **_style(name))
        left.set(title=f"{task}: MiB kept for backward", xlabel="T", ylim=(0, None))
        right.set(title=f"{task}: gradient's norm over that at T = {T[0]}", xlabel="T", ylim=(0, None))
        for axis in (left, right):
            axis.legend(fontsize=8)
            axis.grid(alpha=0.3)
    _save(figure, path)
