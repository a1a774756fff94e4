"""The figures of a toy run, drawn from what its evaluations left in folder/samples."""

from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

PALETTE = colormaps["tab10"].colors


def _evaluations(folder: Path) -> dict[int, dict[str, np.ndarray]]:
    """Iteration -> arrays of each evaluation, in order."""
    return {int(file.stem): dict(np.load(file)) for file in sorted((folder / "samples").glob("*.npz"))}


def _plane(axis: Axes, real: np.ndarray, title: str) -> None:
    """A square plot of the plane with the real data in grey."""
    axis.scatter(*real.T, s=2, color="0.85", zorder=0, rasterized=True)
    axis.set(xlim=(-3, 3), ylim=(-3, 3), xticks=[], yticks=[], aspect="equal", title=title)


def scatter(folder: Path, real: np.ndarray, centres: np.ndarray) -> None:
    """samples.png: the first and the last evaluation; a sample has its prompt's colour, a ring marks each mode."""
    evaluations = _evaluations(folder)
    first, last = min(evaluations), max(evaluations)
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    titles = {first: "before", last: f"after {last} iterations"}
    for axis, iteration in zip(figure.subplots(1, 2), (first, last)):
        _plane(axis, real, titles[iteration] if last > first else "before")
        samples, prompt = evaluations[iteration]["samples"], evaluations[iteration]["prompt"]
        axis.scatter(*samples.T, s=5, c=[PALETTE[c] for c in prompt])
        axis.scatter(*centres.T, s=900, facecolors="none", edgecolors=PALETTE[: len(centres)], linewidths=2)
    figure.suptitle("a dot is right when its colour is that of the ring around it")
    figure.savefig(folder / "samples.png", dpi=120)


def trajectories(folder: Path, real: np.ndarray, count: int = 5) -> None:
    """trajectories.png: rollouts from noise to image, with the two leaps and the gaps that the connectors close."""
    evaluations = _evaluations(folder)
    last = evaluations[max(evaluations)]
    i_k, i_j = last["pair"]
    figure = Figure(figsize=(6, 6.4), layout="constrained")
    axis = figure.subplots()
    _plane(axis, real, f"rollouts, and one leap trajectory over each (k = {i_k}, j = {i_j})")
    for n in range(count):
        x, x_hat_j, x_hat_0 = last["states"][:, n], last["x_hat_j"][n], last["x_hat_0"][n]
        color = PALETTE[last["prompt"][n]]
        axis.plot(*x.T, ".-", color=color, lw=0.8, ms=3, alpha=0.6)
        for start, end in ((x[i_k], x_hat_j), (x[i_j], x_hat_0)):
            axis.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": color, "lw": 1.8})
        for predicted, real_state in ((x_hat_j, x[i_j]), (x_hat_0, x[0])):
            axis.plot(*np.stack([predicted, real_state]).T, ":", color="k", lw=1.8)
        for i, name in ((len(x) - 1, "$x_T$"), (i_k, "$x_k$"), (i_j, "$x_j$"), (0, "$x_0$")):
            axis.annotate(name, x[i], (4, 4), textcoords="offset points", fontsize=9)
    axis.plot([], [], ".-", color="0.4", lw=0.8, ms=3, label="rollout")
    axis.plot([], [], "-", color="0.4", lw=1.8, label=r"leap, $x_k \to \hat{x}_{j|k}$ and $x_j \to \hat{x}_{0|j}$")
    axis.plot([], [], ":", color="k", lw=1.8, label="connector")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(folder / "trajectories.png", dpi=120)


def _mosaic(rows: dict[str, np.ndarray], titles: list[str], path: Path) -> None:
    """Named rows of digits (n, 1, 8, 8), pixels from -1 (white) to 1 (black), drawn as one image for speed."""
    framed = {
        name: np.pad(images[:, 0], ((0, 0), (1, 1), (1, 1)), constant_values=-0.7) for name, images in rows.items()
    }
    columns, size = len(next(iter(framed.values()))), 10
    figure = Figure(figsize=(0.5 * columns + 1, 0.5 * len(rows) + 0.4), layout="constrained")
    axis = figure.subplots()
    axis.imshow(np.vstack([np.hstack(list(images)) for images in framed.values()]), cmap="gray_r", vmin=-1, vmax=1)
    axis.set_yticks(size * np.arange(len(rows)) + size / 2, list(rows))
    axis.set_xticks(size * np.arange(len(titles)) + size / 2, titles)
    axis.tick_params(length=0, top=False, labeltop=True, labelbottom=False)
    axis.spines[:].set_visible(False)
    figure.savefig(path, dpi=120, bbox_inches="tight")


def sheet(folder: Path, columns: int = 20) -> None:
    """samples.png: a row for each evaluation; a column has one noise and the prompt above it."""
    evaluations = _evaluations(folder)
    rows = {f"iteration {iteration}": arrays["samples"][:columns] for iteration, arrays in evaluations.items()}
    prompts = evaluations[min(evaluations)]["prompt"][:columns]
    _mosaic(rows, [f'"{prompt}"' for prompt in prompts], folder / "samples.png")


def leap_sheet(folder: Path, columns: int = 10) -> None:
    """trajectories.png: the states that a leap trajectory joins, and its predictions between them."""
    evaluations = _evaluations(folder)
    last = evaluations[max(evaluations)]
    i_k, i_j = last["pair"]
    states = last["states"]
    rows = {
        "$x_T$": states[-1],
        f"$x_k$, k = {i_k}": states[i_k],
        r"leap: $\hat{x}_{j|k}$": last["x_hat_j"],
        f"$x_j$, j = {i_j}": states[i_j],
        r"leap: $\hat{x}_{0|j}$": last["x_hat_0"],
        "$x_0$": states[0],
    }
    prompts = last["prompt"][:columns]
    rows = {name: images[:columns] for name, images in rows.items()}
    _mosaic(rows, [f'"{prompt}"' for prompt in prompts], folder / "trajectories.png")
