"""What the tour (tour.ipynb) measures and draws on the toys."""

from collections.abc import Sequence

import torch
from matplotlib.axes import Axes
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from leap_align import rollout
from toy import pictures
from toy.modes import CENTRES
from toy.task import ToyTask

TRUE, FIRST, SECOND, NESTED = "black", pictures.COLORS[4], pictures.COLORS[2], pictures.COLORS[3]
"""Colors of true gradients, of the gradients of the first and the second leap, and of the nested one."""
METHODS = (TRUE, *(color for color in pictures.COLORS if color != "#000000"), "#F0E442")
"""Colors of methods, the true gradient's first; on a grey ground the yellow of Okabe and Ito is seen as well."""


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
    with torch.no_grad():
        images = rollout(task.velocity(prompts), x_T, task.times)[0]
        vector_to_parameters(before + length * direction / direction.norm(), weights)
        moved = rollout(task.velocity(prompts), x_T, task.times)[0]
        vector_to_parameters(before, weights)
    return moved - images


# What the notebook draws


def arrows(axis: Axes, start: Tensor, vector: Tensor, color: str, label: str, width: float = 0.008) -> None:
    """Arrows from points (N, 2), or one from (2,), that are as long in the plane as the vectors are.

    width: of a shaft, as a share of the axis; a narrow arrow over a wide one leaves both visible.
    """
    look = {"angles": "xy", "scale_units": "xy", "scale": 1, "width": width, "zorder": 3}
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
    pictures.plane(axis, task.data[:2000].numpy(), f"{title}: {right.mean():.1%} right")
    pictures.points(axis, x.numpy(), right)


def digits(axis: Axes, images: Tensor, columns: int, title: str) -> None:
    """Images (N, 1, 8, 8) side by side, black on white."""
    framed = torch.nn.functional.pad(images[:, 0], (1, 1, 1, 1), value=-0.7)
    rows = [torch.cat(list(row), 1) for row in framed.split(columns)]
    axis.imshow(torch.cat(rows), cmap="gray_r", vmin=-1, vmax=1)
    axis.set(xticks=[], yticks=[], title=title)


def curves(
    axes: Sequence[Axes], runs: dict[str, list[dict[str, float]]], names: Sequence[str], real: dict[str, float]
) -> None:
    """Redraws evaluators over training: an axis for each name, a line for each run, whose rows hold `iteration`.

    real: the values of real data, dotted, for the names where it has one.
    """
    for axis, name in zip(axes, names):
        axis.clear()
        for (run, rows), color, marker in zip(runs.items(), pictures.COLORS[1:], "os^Dv"):
            values = [row[name] for row in rows]
            axis.plot([row["iteration"] for row in rows], values, color=color, marker=marker, ms=4, label=run)
        if name in real:
            axis.axhline(real[name], color="0.3", ls=":", label="real data")
        axis.set(title=name, xlabel="iteration")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=9)
