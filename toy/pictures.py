"""The figures of a toy run, drawn from what its evaluations left in folder/samples."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from runtime.files import numbered

# Okabe and Ito's colors, which colour-blind readers can tell apart; their yellow is too pale on white.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
RIGHT, WRONG = COLORS[:2]


def read_evaluations(folder: Path) -> dict[int, dict[str, np.ndarray]]:
    """Iteration -> arrays of each evaluation, in order."""
    return {iteration: dict(np.load(file)) for iteration, file in numbered(folder / "samples", ".npz").items()}


def save_samples(folder: Path, iteration: int, **arrays: Any) -> None:
    """Writes samples/ITERATION.npz, and removes those of later iterations that a resumed run will repeat."""
    (folder / "samples").mkdir(exist_ok=True)
    for later, path in numbered(folder / "samples", ".npz").items():
        if later > iteration:
            path.unlink()
    np.savez(folder / "samples" / f"{iteration:06d}.npz", **arrays)


def _when(iteration: int) -> str:
    return f"after {iteration} iterations" if iteration else "before training"


def plane(axis: Axes, real: np.ndarray, title: str) -> None:
    """A square plot of the plane with the real data in grey."""
    axis.scatter(*real.T, s=2, color="0.85", zorder=0, rasterized=True)
    axis.set(xlim=(-3, 3), ylim=(-3, 3), xticks=[], yticks=[], aspect="equal", title=title)


def is_right(samples: np.ndarray, prompt: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Whether the centre nearest to each sample (N, 2) is its prompt's, (N,)."""
    return np.linalg.norm(samples[:, None] - centres, axis=2).argmin(1) == prompt


def points(axis: Axes, samples: np.ndarray, right: np.ndarray, size: float = 6) -> None:
    """Draws samples (N, 2): those in the prompt's mode as dots, the others as larger crosses."""
    axis.scatter(*samples[right].T, s=size, c=RIGHT, label="sample in the prompt's mode")
    axis.scatter(*samples[~right].T, s=7 / 3 * size, c=WRONG, marker="x", lw=1, label="sample in another mode")


def scatter(folder: Path, real: np.ndarray, centres: np.ndarray) -> None:
    """samples.png: the first and the last evaluation; a sample is right if the prompt's mode is the nearest."""
    evaluations = read_evaluations(folder)
    figure = Figure(figsize=(8, 4.4), layout="constrained")
    for axis, iteration in zip(figure.subplots(1, 2), (min(evaluations), max(evaluations))):
        samples, prompt = evaluations[iteration]["samples"], evaluations[iteration]["prompt"]
        right = is_right(samples, prompt, centres)
        plane(axis, real, f"{_when(iteration)}: {right.mean():.1%} right")
        points(axis, samples, right)
        axis.scatter([], [], s=6, color="0.7", label="real data")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(folder / "samples.png", dpi=120)


def leaps(axis: Axes, pairs: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]], color: str) -> None:
    """Draws leaps as arrows and connectors as dotted lines; each of pairs is (start, predicted state, real state)."""
    for start, predicted, real in pairs:
        axis.annotate("", predicted, start, arrowprops={"arrowstyle": "->", "color": color, "lw": 1.8})
        axis.plot(*np.stack([predicted, real]).T, ":", color="k", lw=1.8)


def trajectories(folder: Path, real: np.ndarray, count: int = 5) -> None:
    """trajectories.png: rollouts of the last evaluation from noise to image, with two leaps over each."""
    evaluations = read_evaluations(folder)
    last = evaluations[max(evaluations)]
    i_k, i_j = last["pair"]
    figure = Figure(figsize=(6, 6.4), layout="constrained")
    axis = figure.subplots()
    plane(axis, real, f"{_when(max(evaluations))}, $i_k$ = {i_k}, $i_j$ = {i_j}")
    rollouts = [joined_states(last, n) for n in range(count)]
    for n, (color, (_, x_k, x_j, x_0, x_hat_j, x_hat_0)) in enumerate(zip(COLORS, rollouts)):
        axis.plot(*last["states"][:, n].T, ".-", color=color, lw=0.8, ms=3, alpha=0.6)
        leaps(axis, ((x_k, x_hat_j, x_j), (x_j, x_hat_0, x_0)), color)
    label_states(axis, max(rollouts, key=least_distance))  # the one whose states lie farthest apart
    axis.plot([], [], ".-", color="0.4", lw=0.8, ms=3, label="rollout")
    axis.plot([], [], "-", color="0.4", lw=1.8, label=r"leap, $x_k \to \hat{x}_{j|k}$ and $x_j \to \hat{x}_{0|j}$")
    axis.plot([], [], ":", color="k", lw=1.8, label="connector")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(folder / "trajectories.png", dpi=120)


def joined_states(evaluation: dict[str, np.ndarray], n: int) -> np.ndarray:
    """x_T, x_k, x_j, x_0, x̂_j and x̂_0 of one rollout, (6, 2)."""
    i_k, i_j = evaluation["pair"]
    real = evaluation["states"][[-1, i_k, i_j, 0], n]
    return np.stack([*real, evaluation["x_hat_j"][n], evaluation["x_hat_0"][n]])


def least_distance(points: np.ndarray) -> float:
    """The distance of the two points (N, 2) that are closest."""
    distances = np.linalg.norm(points[:, None] - points, axis=2)
    return distances[~np.eye(len(points), dtype=bool)].min()


def label_states(axis: Axes, states: np.ndarray) -> None:
    """Labels x_T, x_k, x_j, x_0, x̂_j and x̂_0 of one rollout (6, 2), a predicted state opposite to the real one."""
    names = ("$x_T$", "$x_k$", "$x_j$", "$x_0$", r"$\hat{x}_{j|k}$", r"$\hat{x}_{0|j}$")
    along = (states[3] - states[0]) / np.linalg.norm(states[3] - states[0])
    normal = np.array([-along[1], along[0]])
    sides = np.sign((states[4:] - states[2:4]) @ normal)[:, None] * normal
    for name, point, side in zip(names, states, (-0.6 * along, sides[0], *-sides, *sides)):
        offset, line = 26 * side, {"arrowstyle": "-", "color": "0.5", "lw": 0.7, "shrinkA": 1, "shrinkB": 2}
        axis.annotate(name, point, offset, textcoords="offset points", ha="center", va="center", arrowprops=line)


def _mosaic(rows: dict[str, np.ndarray], columns: list[str], title: str, path: Path) -> None:
    """Named rows of digits (n, 1, 8, 8), pixels from -1 (white) to 1 (black), drawn as one image for speed."""
    framed = [np.pad(images[:, 0], ((0, 0), (1, 1), (1, 1)), constant_values=-0.7) for images in rows.values()]
    size = framed[0].shape[1]
    figure = Figure(figsize=(0.62 * len(columns) + 1.6, 0.62 * len(rows) + 0.9), layout="constrained")
    axis = figure.subplots()
    axis.imshow(np.vstack([np.hstack(list(images)) for images in framed]), cmap="gray_r", vmin=-1, vmax=1)
    axis.set_yticks(size * np.arange(len(rows)) + size / 2, list(rows), fontsize=13)
    axis.set_xticks(size * np.arange(len(columns)) + size / 2, columns, fontsize=13)
    axis.tick_params(length=0, top=False, labeltop=True, labelbottom=False)
    axis.spines[:].set_visible(False)
    figure.suptitle(title, fontsize=13)
    figure.savefig(path, dpi=120)


def sheet(folder: Path, prompts: tuple[int, ...] = (3, 7), noises: int = 2, count: int = 4) -> None:
    """samples.png: samples of each prompt, from fixed noise, and the spread of all; a row for each evaluation.

    Of many evaluations it shows some, the first and the last among them.  The spread is six times the standard
    deviation of each pixel, which is white where all samples of the prompt are alike.
    """
    evaluations = read_evaluations(folder)
    iterations = list(evaluations)
    shown = np.linspace(0, len(iterations) - 1, min(count, len(iterations))).round().astype(int)
    rows = {}
    for iteration in (iterations[i] for i in shown):
        samples, prompt = evaluations[iteration]["samples"], evaluations[iteration]["prompt"]
        of_prompt = [samples[prompt == p] for p in prompts]
        images = [[*x[:noises], np.minimum(6 * x.std(0) - 1, 1)] for x in of_prompt]
        rows[f"iteration {iteration}"] = np.concatenate(images)
    columns = [name for p in prompts for name in (*[f'"{p}"'] * noises, "spread")]
    _mosaic(rows, columns, f"{noises} samples of a prompt, and the spread of all", folder / "samples.png")


def leap_sheet(folder: Path, count: int = 10) -> None:
    """trajectories.png: the states that a leap trajectory joins, and its predictions between them."""
    evaluations = read_evaluations(folder)
    last = evaluations[max(evaluations)]
    i_k, i_j = last["pair"]
    states = last["states"]
    rows = {
        "$x_T$": states[-1],
        f"$x_k$, $i_k$ = {i_k}": states[i_k],
        r"leap: $\hat{x}_{j|k}$": last["x_hat_j"],
        f"$x_j$, $i_j$ = {i_j}": states[i_j],
        r"leap: $\hat{x}_{0|j}$": last["x_hat_0"],
        "$x_0$": states[0],
    }
    columns = [f'"{prompt}"' for prompt in last["prompt"][:count]]
    title = f"{_when(max(evaluations))}: a rollout for each prompt, and its leaps"
    _mosaic({name: images[:count] for name, images in rows.items()}, columns, title, folder / "trajectories.png")
