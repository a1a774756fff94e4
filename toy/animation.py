"""The animation of a run of task `toy`: noise flows to the modes, before and after training.

    python train_leap_align.py && python -m toy.animation runs/toy-leap_align tour.gif

writes it.
"""

import sys
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from leap_align import BadInput, require
from toy import pictures
from toy.modes import CENTRES, Modes
from toy.pictures import joined_states, least_distance
from toy.task import ToyOptions

LEAP = "black"
CAPTIONS = (  # at x_T, x_k, x_j and x_0
    "noise: each point has a prompt that names a mode",
    "time $k$: a leap predicts $x_j$, the state at time $j$, in one step",
    "time $j$: a connector (dotted) leads to the real $x_j$; a second leap predicts $x_0$",
    "image: the reward scores the real $x_0$; its gradient passes through the two leaps alone",
)
# The same margins in every frame, or the axes would tremble.
MARGINS = {"left": 0.01, "right": 0.99, "bottom": 0.07, "top": 0.86, "wspace": 0.02}


def animate(folder: Path, path: Path, real: np.ndarray) -> None:
    """A GIF of a `toy` run's first and last evaluation: noise flows to the modes, and two leaps span one rollout.

    real: data (N, 2) for the background.  The film stops at the noise, where the leaps start and at the image.  The
    rollout with the leaps misses its prompt's mode, the circle, before training and reaches it after.
    """
    evaluations = pictures.read_evaluations(folder)
    if len(evaluations) < 2 or evaluations[0]["samples"].ndim != 2:
        raise BadInput(f"{folder} must be the folder of a finished run of task toy")
    first, last = evaluations[min(evaluations)], evaluations[max(evaluations)]
    titles = {"before training": first, f"after {max(evaluations)} iterations": last}
    (i_k, i_j), T, n = last["pair"], len(last["states"]) - 1, _clearest_rollout(first, last)
    canvas, frames, milliseconds = FigureCanvasAgg(figure := Figure(figsize=(8, 4.8), dpi=100)), [], []
    axes = figure.subplots(1, 2, gridspec_kw=MARGINS)
    _legend(figure)
    stops = dict(zip((T, i_k, i_j, 0), CAPTIONS))
    for i in (0, *range(T, 0, -1)):  # it runs in a loop: a page that shows one frame alone shows the first
        for axis, (title, evaluation) in zip(axes, titles.items()):
            axis.clear()
            _frame(axis, evaluation, real, i, n, title)
        figure.suptitle(stops.get(i, f"sampling without gradient: timestep {i} of {T}"), fontsize=13)
        canvas.draw()
        frames.append(Image.fromarray(np.array(canvas.buffer_rgba())))
        milliseconds.append(2000 if i in stops else 100)
    frames[0].save(path, format="gif", save_all=True, append_images=frames[1:], duration=milliseconds, loop=0)


def _legend(figure: Figure) -> None:
    """What the marks mean."""
    axis = figure.axes[0]
    marks = {
        "ends in its prompt's mode": {"marker": "o", "color": pictures.RIGHT, "ms": 4},
        "ends in another": {"marker": "x", "color": pictures.WRONG, "ms": 5},
        "rollout": {"marker": ".", "color": "0.5", "lw": 0.8, "ls": "-"},
        "leap": {"marker": r"$\rightarrow$", "color": LEAP, "ms": 14},
        "connector": {"color": "k", "ls": ":", "lw": 1.8},
        "the rollout's prompt": {"marker": "o", "color": "k", "mfc": "none", "ms": 9},
    }
    lines = [axis.plot([], [], label=name, **{"ls": "none"} | mark)[0] for name, mark in marks.items()]
    figure.legend(handles=lines, loc="lower center", ncols=6, frameon=False, fontsize=9, columnspacing=0.8)


def _clearest_rollout(before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> int:
    """Of the rollouts that training corrects, the one whose states lie farthest apart before and after."""
    drawn = slice(len(before["x_hat_0"]))
    right = [pictures.is_right(e["samples"][drawn], e["prompt"][drawn], CENTRES.numpy()) for e in (before, after)]
    corrected = np.flatnonzero(right[1] & ~right[0])
    require(len(corrected), "no drawn sample is wrong before training and right after: give a run with more iterations")
    return max(corrected, key=lambda n: min(least_distance(joined_states(e, n)) for e in (before, after)))


def _frame(axis: Axes, evaluation: dict[str, np.ndarray], real: np.ndarray, i: int, n: int, title: str) -> None:
    """The states at timestep i, and what is known by then of the leaps over rollout n."""
    states, prompt, (i_k, i_j) = evaluation["states"], evaluation["prompt"], evaluation["pair"]
    right = pictures.is_right(evaluation["samples"], prompt, CENTRES.numpy())
    pictures.plane(axis, real, f"{title}: {right.mean():.0%} right")
    pictures.points(axis, states[i], right[: states.shape[1]], size=16)
    axis.plot(*CENTRES[prompt[n]], "o", ms=45, mfc="none", mec="k", mew=1)
    axis.plot(*states[i:, n].T, ".-", color="0.5", lw=0.8, ms=4)
    joined = joined_states(evaluation, n)
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
        data = Modes(ToyOptions(pretrain_steps=1, reward_steps=1), T=25).data  # which needs no pre-training
        animate(Path(sys.argv[1]), Path(sys.argv[2]), data[:2000].numpy())
    except (BadInput, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
