"""The figures of the experiments, from the rows of their tables."""

from collections.abc import Collection
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from leap_align import METHODS
from toy.laboratory.tables import Row, groups

COLORS = ("#D55E00", "#56B4E9", "#009E73", "#0072B2", "#000000", "#E69F00", "#CC79A7", "#999999")
"""Okabe and Ito's colors, which colour-blind readers can tell apart; one for each method, in the table's order."""
MARKERS = "o^Ds*vPX"
LINES = {"leap_align 1": "-", "leap_align 0.3": "--", "leap_align 0": ":"}  # values of alpha, in figures of gradients
KIND_STYLES = {
    "stop": {"linestyle": ":", "lw": 1}, "hinge": {"linestyle": "none", "fillstyle": "none", "ms": 9},
    "leash": {"linestyle": "-"}, "both": {"linestyle": "--", "fillstyle": "none"},
}  # fmt: skip
"""What restrains a run, in the figure of the leash; the line of early stopping ends where training does."""
LABELS = {"T": "T", "iterations": "iterations of LeapAlign"}
LABELS |= {"cosine": "cosine to the true gradient", "variance": "variance of a draw / mean²"}
Shown = dict[str, tuple[str, ...]]  # the metrics in a figure, for each task


def style(name: str) -> dict[str, Any]:
    """Color, marker and line of a method, by its place in the table, or of LeapAlign with some alpha."""
    method = "leap_align" if name in LINES else name
    index = list(dict.fromkeys([*METHODS, method])).index(method) % len(COLORS)
    return {"color": COLORS[index], "marker": MARKERS[index], "linestyle": LINES.get(name, "-"), "ms": 4}


def panels(width: float, height: float, cases: Collection, columns: int) -> tuple[Figure, list[tuple[Any, np.ndarray]]]:
    """A figure with a row of panels for each case, `height` of it a row; each case with its panels."""
    figure = Figure(figsize=(width, height * len(cases)), layout="constrained")
    grid = figure.subplots(len(cases), columns, squeeze=False)
    for axis in grid.flat:
        axis.grid(alpha=0.3)
    return figure, list(zip(cases, grid))


def add_legend(figure: Figure, columns: int) -> Figure:
    """The figure with a legend of its first panel's lines above it."""
    handles = figure.axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=columns, frameon=False)
    return figure


def columns_of(rows: list[Row], *names: str) -> list[np.ndarray]:
    """The values of each column."""
    return [np.array([row[name] for row in rows]) for name in names]


def compare(rows: list[Row], curves: list[Row], shown: Shown) -> Figure:
    """A row for each task and hinge: rewards at the ends, and held-out evaluators along the large budget's runs."""
    figure, cases = panels(12, 3.1, groups(curves, "task", "hinge").items(), 3)
    for ((task, hinge), case), axes in cases:
        ends_panel(axes[0], groups(rows, "task", "hinge")[task, hinge])
        axes[0].set_title(f"{task}, {hinge}")
        for (method,), line in groups([row for row in case if row["budget"] == "large"], "method").items():
            reward, error = columns_of(line, "reward", "reward_error")
            for axis, name in zip(axes[1:], shown[task]):
                axis.errorbar(reward, *columns_of(line, name, f"{name}_error"), error, lw=1, **style(method))
                axis.set(xlabel="reward (trained on)", ylabel=f"{name} (held out)")
    return add_legend(figure, 6)


def ends_panel(axis: Axes, rows: list[Row]) -> None:
    """Draws each method's reward after each budget of LeapAlign, in as many iterations and in as many evaluations."""
    stages, names = groups(rows, "budget", "equal"), []
    for n, ((_, equal), (_, *stage)) in enumerate(stages.items()):  # the first row is the pre-trained model
        iterations = stage[0]["iterations"]  # of LeapAlign
        names.append(f"{iterations}\niterations" if equal == "samples" else "equal\ncompute")
        for offset, row in zip(np.linspace(-0.3, 0.3, len(stage)), stage):
            look = style(row["method"]) | {"label": row["method"] if n == 0 else None, "linestyle": "none"}
            axis.errorbar(n + offset, row["reward"], row["reward_error"], **look)
    axis.set_xticks(range(len(names)), names)
    axis.set_ylabel("reward (trained on)")


def ablations(rows: list[Row], references: dict[str, str]) -> Figure:
    """A panel for each ablation and task: each option's reward, and its standard error, minus that of the reference."""
    names, tasks = groups(rows, "ablation"), groups(rows, "task")
    figure, _ = panels(12, 2.3, range(0, len(names), 2), 2 * len(tasks))
    cases = [(name, task) for (name,) in names for (task,) in tasks]
    for (name, task), axis in zip(cases, figure.axes):
        options_panel(axis, groups(rows, "ablation", "task")[name, task], references[name])
        axis.set_title(f"{name}: {task}", fontsize=10)
    for axis in figure.axes[len(cases) :]:
        axis.axis("off")
    figure.supylabel("reward minus that of the paper's choice")
    return add_legend(figure, 3)


def options_panel(axis: Axes, rows: list[Row], reference: str) -> None:
    """Draws a point for each option and number of iterations."""
    options = [option for (option,) in groups(rows, "option")]
    at = options.index(reference)
    axis.axhline(0, color="0.6", lw=0.8)
    axis.axvspan(at - 0.4, at + 0.4, color="0.88", lw=0, label="the paper's choice")
    for n, ((stage,), stage_rows) in enumerate(groups(rows, "iterations").items()):
        (rewards, errors), label = columns_of(stage_rows, "reward", "reward_error"), f"after {stage} iterations"
        look = {"fmt": "o^"[n % 2], "color": COLORS[(3, 0)[n % 2]], "ms": 5, "capsize": 3, "label": label}
        axis.errorbar(np.arange(len(rewards)) + 0.24 * n - 0.12, rewards - rewards[at], errors, **look)
    axis.set_xticks(range(len(options)), options)
    axis.set_xlim(-0.5, len(options) - 0.5)


def fidelity(rows: list[Row], weights: list[Row], T: int) -> Figure:
    """A row for each task: the cosine to the true gradient over T and over training, the variance of a draw over T.

    Below, the weight of each timestep for each method, scaled to the sum 1, which is the sum of the true weights.
    """
    tasks = groups(rows, "task")
    figure = Figure(figsize=(12, 3 * len(tasks) + 3.2), layout="constrained")
    grid = figure.add_gridspec(len(tasks) + 1, 3)
    for n, ((task,), own) in enumerate(tasks.items()):
        pretrained, at_T = [row for row in own if row["iterations"] == 0], [row for row in own if row["T"] == T]
        cases = ((pretrained, "T", "cosine"), (at_T, "iterations", "cosine"), (pretrained, "T", "variance"))
        for column, (case, x, y) in enumerate(cases):
            axis, lines = figure.add_subplot(grid[n, column]), groups(case, "method")
            for name in (*LINES, *(name for (name,) in lines if not name.startswith("leap_align "))):
                axis.plot(*columns_of(lines[name,], x, y), label=name, **style(name))
            axis.set(xlabel=LABELS[x], ylabel=LABELS[y], title=task, xscale="log" if x == "T" else "linear")
            axis.grid(alpha=0.3)
    axis, similarity_lines = figure.add_subplot(grid[-1, :]), iter(("--", ":"))
    for name in list(weights[0])[1:]:
        (index, values), (method, *with_similarity) = columns_of(weights, "i", name), name.split(" x ")
        look = style(method) | {"ms": 3} | ({"linestyle": next(similarity_lines)} if with_similarity else {})
        axis.plot(index, values / values.sum(), label=name, **look)
    axis.set(xlabel="timestep i (1 is the last step, next to the image)", ylabel="share of dv(x_i)/dθ")
    axis.set(title="effective weight of each timestep, as a share; full_backprop is the true one")
    axis.set_yscale("symlog", linthresh=0.01)
    axis.legend(fontsize=8, ncols=2)
    axis.grid(alpha=0.3)
    return add_legend(figure, 6)


def pairs(rows: list[Row], redrawn: tuple[str, ...]) -> Figure:
    """A row for each task: the variance of the gradient, and the reward at equal compute."""
    colors, (figure, tasks) = (COLORS[0], COLORS[3]), panels(10, 2.8, groups(rows, "task").items(), 2)
    for ((task,), task_rows), (left, right) in tasks:
        for n, ((kind,), own) in enumerate(groups(task_rows, "pairs").items()):
            variances, look = [own[0][f"variance, {inputs}"] for inputs in redrawn], {"color": colors[n]}
            left.bar(np.arange(len(redrawn)) + 0.4 * n - 0.2, variances, 0.38, **look)
            look |= {"fmt": "o^"[n], "capsize": 3, "label": f"a pair a {kind}"}
            right.errorbar(np.arange(len(own)) + 0.1 * n - 0.05, *columns_of(own, "reward", "reward_error"), **look)
        left.set_xticks(range(len(redrawn)), [f"over {inputs}" for inputs in redrawn])
        left.set(title=f"{task}: variance of a step's gradient / mean²")
        right.set_xticks(range(len(own)), [f"{row['budget']} budget" for row in own])
        right.set(title=f"{task}: reward at equal compute", xlim=(-0.5, len(own) - 0.5))
        right.legend()
    return figure


def leash(rows: list[Row], shown: Shown) -> Figure:
    """A row for each task: the shown columns against the reward, a line for each method and kind of restraint."""
    figure, tasks = panels(15, 3.6, groups(rows, "task").items(), 4)
    for ((task,), task_rows), axes in tasks:
        for axis, name in zip(axes, shown[task]):
            for (method,), own in groups(task_rows, "method").items():
                for kind, look in KIND_STYLES.items():
                    if line := [row for row in own if row["kind"] == kind or (kind, row["kind"]) == ("stop", "none")]:
                        look = style(method) | look | {"label": f"{method}, {kind}"}
                        axis.plot(*columns_of(line, "reward", name), **look)
            axis.set(xlabel="reward (trained on)", ylabel=name, title=task)
    return add_legend(figure, 5)


def beyond(rows: list[Row], shown: Shown) -> Figure:
    """Held-out evaluators against evaluations, a line for each method at its best setting; standard errors.

    Each task has a row for the paper's methods and one for the others, both with the published setting, thick.
    """
    cases, by_task = [], groups([row for row in rows if row["evaluations"] > 0], "task")
    for (task,), own in by_task.items():
        published, *others = groups(own, "method", "option", "T", "solver").items()
        for kind, is_paper in (("the paper's methods", True), ("later methods", False)):
            lines = [published, *(line for line in others if (line[0][0] in METHODS) == is_paper)]
            cases.append((task, f"{task}, {kind}", lines))
    methods, (figure, grid) = [method for (method,) in groups(rows, "method")], panels(15, 3.9, cases, 3)
    for (task, title, lines), axes in grid:
        for axis, name in zip(axes, shown[task]):
            for setting, points in lines:
                alike = [method for method in methods if (method in METHODS) == (setting[0] in METHODS)]
                setting_line(axis, alike.index(setting[0]), setting, points, name, setting == lines[0][0])
            axis.set(xlabel="velocity evaluations a sample", ylabel=name, title=title)
            # Limits of the runs' second half: how they start would flatten all that they reach.
            half = max(row["evaluations"] for row in by_task[task,]) / 2
            (late,) = columns_of([row for row in by_task[task,] if row["evaluations"] > half], name)
            low, high = late.min(), late.max()
            axis.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
        axes[-1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5), fontsize=9, frameon=False)
    return figure


def setting_line(axis: Axes, n: int, setting: tuple, rows: list[Row], name: str, is_published: bool) -> None:
    """Draws one setting, of the n-th method; the published one thick and black."""
    method, option, T, solver = setting
    label = ", ".join(filter(None, [method, option, f"T = {T}", solver]))
    colors = [color for color in COLORS if color != "#000000"]  # black is the published setting
    look = {"color": colors[n % len(colors)], "marker": MARKERS[n % len(colors)], "lw": 1.2, "ms": 4, "label": label}
    if is_published:
        look |= {"color": "#000000", "lw": 3.5, "ms": 7, "zorder": 3, "label": "published: " + label}
    x, y, error = columns_of(rows, "evaluations", name, f"{name}_error")
    axis.plot(x, y, **look)
    axis.fill_between(x, y - error, y + error, color=look["color"], alpha=0.2, lw=0)


def memory(rows: list[Row]) -> Figure:
    """A row for each task: bytes saved for backward, and the gradient's norm over its value at the smallest T."""
    figure, tasks = panels(10, 3, groups(rows, "task").items(), 2)
    for ((task,), own), (left, right) in tasks:
        (T,) = columns_of(own, "T")
        for column in list(own[0])[2:]:
            (values,), (kind, name) = columns_of(own, column), column.split(", ")
            axis, values = (left, values / 2**20) if kind == "bytes" else (right, values / values[0])
            axis.plot(T, values, label=name, **style(name))
        left.set(title=f"{task}: MiB kept for backward", xlabel="T", ylim=(0, None))
        right.set(title=f"{task}: gradient's norm over that at T = {T[0]}", xlabel="T", ylim=(0, None))
        left.legend(fontsize=8)
        right.legend(fontsize=8)
    return figure


def shapes(rows: list[Row], kinds: tuple[str, ...]) -> Figure:
    """A row for each restraint: the share of right images of each kind of prompts after equal iterations."""
    own = [row for row in rows if row["equal"] == "iterations"]
    figure, cases = panels(12, 3.6, groups(own, "restraint").items(), 1)
    for ((restraint,), case), (axis,) in cases:
        places = np.arange(len(kinds))
        axis.hlines([case[0][kind] for kind in kinds], places - 0.4, places + 0.4, "0.6", label="pretrained")
        for n, row in enumerate(case[1:]):
            shares, errors = ([row[f"{kind}{suffix}"] for kind in kinds] for suffix in ("", "_error"))
            label = f"{row['method']} {row['option']}" + (f", T = {row['T']}" if row["T"] > 8 else "")
            look = {"color": f"C{n % 10}", "marker": "osD^vP*Xp<>h"[n], "linestyle": "none", "ms": 5}
            axis.errorbar(places + 0.07 * (n - len(case) / 2), shares, errors, label=label, **look)
        axis.set_xticks(places, kinds)
        axis.set(title=restraint, ylabel="share judged right", ylim=(0, 1.03))
    return add_legend(figure, 4)
