"""What the tour (tour.ipynb) measures and draws on the toys, and the animation at the top of the README.

    python train_leap_align.py && python -m toy.tour runs/toy-leap_align toy/results/tour.gif

draws it.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.animation import PillowWriter
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from leap_align import BadInput, rollout
from toy import pictures
from toy.modes import CENTRES, Modes
from toy.task import ToyOptions, ToyTask

LEAP = TRUE = "black"
FIRST, SECOND, NESTED = pictures.COLORS[4], pictures.COLORS[2], pictures.COLORS[3]
"""Colors of leaps, of true gradients, of the gradients of the first and the second leap, and of the nested one."""


CAPTIONS = (
    "noise: each point has a prompt that names a mode",
    "timestep k: a leap predicts $x_j$ in one step",
    "timestep j: a connector (dotted) leads to the real $x_j$; a second leap predicts $x_0$",
    "image: the reward scores the real $x_0$; its gradient passes through the two leaps alone",
)
"""What the animation says at x_T, x_k, x_j and x_0."""
MARGINS = {"left": 0.01, "right": 0.99, "bottom": 0.07, "top": 0.86, "wspace": 0.02}
"""Of the animation: the same in every frame, or its axes would tremble."""


# What the notebook measures


def jacobian(y: Tensor, model: nn.Module) -> Tensor:
    """dy/dtheta by autograd, (D, P): a row for each of the D numbers of y, a column for each weight of the model."""
    weights = list(model.parameters())
    rows = [torch.autograd.grad(value, weights, retain_graph=True) for value in y.flatten()]
    return torch.stack([parameters_to_vector(row) for row in rows])


def shift_of_images(task: ToyTask, x_T: Tensor, prompts: Tensor, direction: Tensor, length: float) -> Tensor:
    """How far a small step of the weights moves each image, (B, *S): direction (P,), scaled to this length."""
    weights = list(task.model.parameters())
    before = parameters_to_vector(weights)
    images = []
    with torch.no_grad():
        for theta in (before, before + length * direction / direction.norm(), before):
            vector_to_parameters(theta, weights)
            images.append(rollout(task.velocity(prompts), x_T, task.times)[0])
    return images[1] - images[0]


# What the notebook draws


def arrows(axis: Axes, start: Tensor, vector: Tensor, color: str, label: str | None = None) -> None:
    """Arrows from points (N, 2), or one from (2,), that are as long in the plane as the vectors are."""
    look = {"angles": "xy", "scale_units": "xy", "scale": 1, "width": 0.008, "zorder": 3}
    axis.quiver(*start.numpy().T, *vector.numpy().T, color=color, label=label, **look)


def reward_map(axis: Axes, task: ToyTask, prompt: int, centre: Sequence[float] = (0, 0), size: float = 3) -> None:
    """The reward under one prompt in the square of this half width around the centre: the darker, the higher."""
    x, y = (torch.linspace(float(c) - size, float(c) + size, 81) for c in centre)
    x, y = torch.meshgrid(x, y, indexing="xy")
    with torch.no_grad():
        reward = task.reward(torch.stack([x, y], -1).reshape(-1, 2), torch.full((x.numel(),), prompt))
    axis.contourf(x, y, reward.reshape(x.shape), 12, cmap="Greys", alpha=0.6, zorder=0)
    axis.set(xticks=[], yticks=[], aspect="equal", title=f'prompt "{prompt}"')


def samples(axis: Axes, task: ToyTask, x: Tensor, prompts: Tensor, title: str) -> None:
    """Samples (N, 2) over the real data; the title adds how many are nearest to their prompt's mode."""
    right = pictures.is_right(x.numpy(), prompts.numpy(), CENTRES.numpy())
    pictures.plane(axis, task.data[:2000].numpy(), f"{title}: {right.mean():.0%} right")
    pictures.points(axis, x.numpy(), right)


def digits(axis: Axes, images: Tensor, columns: int, title: str) -> None:
    """Images (N, 1, 8, 8) side by side, black on white."""
    framed = torch.nn.functional.pad(images[:, 0], (1, 1, 1, 1), value=-0.7)
    rows = [torch.cat(list(row), 1) for row in framed.split(columns)]
    axis.imshow(torch.cat(rows), cmap="gray_r", vmin=-1, vmax=1)
    axis.set(xticks=[], yticks=[], title=title)


def curves(axes: list[Axes], runs: dict[str, list[dict[str, float]]], names: tuple[str, ...]) -> None:
    """Redraws evaluators over training: an axis for each name, a line for each run, whose rows hold `iteration`."""
    for axis, name in zip(axes, names):
        axis.clear()
        for (run, rows), color, marker in zip(runs.items(), pictures.COLORS[1:], "os^Dv"):
            values = [row[name] for row in rows]
            axis.plot([row["iteration"] for row in rows], values, color=color, marker=marker, ms=4, label=run)
        axis.set(title=name, xlabel="iteration")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=9)


# The animation


def animate(folder: Path, path: Path, real: np.ndarray, fps: int = 10) -> None:
    """A GIF of a `toy` run's first and last evaluation: noise flows to the modes, and two leaps span one rollout.

    real: data (N, 2) for the background.  The film stops where the leaps start and at the image.  The rollout with the
    leaps misses its prompt's mode, the circle, before training and reaches it after.
    """
    evaluations = pictures.read_evaluations(folder)
    if len(evaluations) < 2:
        raise BadInput(f"{folder} holds {len(evaluations)} evaluations: give the folder of a finished run of task toy")
    first, last = evaluations[min(evaluations)], evaluations[max(evaluations)]
    titles = {"before training": first, f"after {max(evaluations)} iterations": last}
    (i_k, i_j), T, n = last["pair"], len(last["states"]) - 1, _clearest_rollout(first, last)
    figure, writer = Figure(figsize=(8, 4.8)), PillowWriter(fps=fps)
    axes = figure.subplots(1, 2, gridspec_kw=MARGINS)
    _legend(figure)
    stops = dict(zip((T, i_k, i_j, 0), CAPTIONS))
    with writer.saving(figure, path, dpi=100):
        for i in range(T, -1, -1):
            for axis, (title, evaluation) in zip(axes, titles.items()):
                axis.clear()
                _frame(axis, evaluation, real, i, n, title)
            figure.suptitle(stops.get(i, f"sampling without gradient: timestep {i} of {T}"), fontsize=13)
            for _ in range(2 * fps if i in stops else 1):
                writer.grab_frame()


def _legend(figure: Figure) -> None:
    """What the marks mean."""
    axis = figure.axes[0]
    marks = {
        "in the prompt's mode": {"marker": "o", "color": pictures.RIGHT, "ms": 4},
        "in another mode": {"marker": "x", "color": pictures.WRONG, "ms": 5},
        "rollout": {"marker": ".", "color": "0.5", "lw": 0.8, "ls": "-"},
        "leap": {"marker": r"$\rightarrow$", "color": LEAP, "ms": 14},
        "connector": {"color": "k", "ls": ":", "lw": 1.8},
        "its prompt's mode": {"marker": "o", "color": "k", "mfc": "none", "ms": 9},
    }
    lines = [axis.plot([], [], label=name, **{"ls": "none"} | mark)[0] for name, mark in marks.items()]
    figure.legend(handles=lines, loc="lower center", ncols=6, frameon=False, fontsize=9, columnspacing=1)


def _clearest_rollout(before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> int:
    """Of the rollouts that training corrects, the one whose states lie farthest apart before and after."""
    drawn = slice(len(before["x_hat_0"]))
    right = [pictures.is_right(e["samples"][drawn], e["prompt"][drawn], CENTRES.numpy()) for e in (before, after)]
    corrected = np.flatnonzero(right[1] & ~right[0])
    return max(corrected, key=lambda n: min(pictures.least_distance(_joined_states(e, n)) for e in (before, after)))


def _joined_states(evaluation: dict[str, np.ndarray], n: int) -> np.ndarray:
    """x_T, x_k, x_j, x_0, x̂_j and x̂_0 of one rollout, (6, 2)."""
    i_k, i_j = evaluation["pair"]
    real = evaluation["states"][[-1, i_k, i_j, 0], n]
    return np.stack([*real, evaluation["x_hat_j"][n], evaluation["x_hat_0"][n]])


def _frame(axis: Axes, evaluation: dict[str, np.ndarray], real: np.ndarray, i: int, n: int, title: str) -> None:
    """The states at timestep i, and what is known by then of the leaps over rollout n."""
    states, prompt, (i_k, i_j) = evaluation["states"], evaluation["prompt"], evaluation["pair"]
    right = pictures.is_right(evaluation["samples"], prompt, CENTRES.numpy())
    pictures.plane(axis, real, f"{title}: {right.mean():.0%} right")
    pictures.points(axis, states[i], right[: states.shape[1]], size=16)
    axis.plot(*CENTRES[prompt[n]], "o", ms=45, mfc="none", mec="k", mew=1)
    axis.plot(*states[i:, n].T, ".-", color="0.5", lw=0.8, ms=4)
    joined = _joined_states(evaluation, n)
    _, x_k, x_j, x_0, x_hat_j, x_hat_0 = joined
    for i_start, i_end, start, predicted, end in ((i_k, i_j, x_k, x_hat_j, x_j), (i_j, 0, x_j, x_hat_0, x_0)):
        if i <= i_start:  # the connector waits for the real state
            pictures.leaps(axis, [(start, predicted, end if i <= i_end else predicted)], LEAP)
    if i == 0:
        pictures.label_states(axis, joined)


def main() -> None:
    """Draws the animation of the run on the command line."""
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    try:
        animate(Path(sys.argv[1]), Path(sys.argv[2]), Modes(ToyOptions(), T=25).data[:2000].numpy())
    except (BadInput, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
