"""Task `toy`: eight modes on a ring in the plane; a prompt names a mode."""

import math
from pathlib import Path
from typing import ClassVar

import torch
from sklearn.datasets import make_blobs
from torch import Tensor

from toy import pictures
from toy.task import ToyTask

RADIUS, SPREAD, MODES = 2.0, 0.25, 8
ANGLE = torch.arange(MODES) * (2 * math.pi / MODES)
CENTRES = RADIUS * torch.stack([ANGLE.cos(), ANGLE.sin()], 1)


class Modes(ToyTask):
    """Two dimensions show what a method does to a whole distribution."""

    name = "toy"
    shape = (2,)
    classes = MODES
    network: ClassVar[dict] = {"width": 128, "depth": 3}
    held_out: ClassVar[dict] = {"utility": 0.2, "alignment": 0.05, "log_density": 0.2, "spread": 0.05}
    next_commands: ClassVar[tuple] = (
        "python train_leap_align.py --task digits  # toy/tour.ipynb draws what this run did",
    )

    def load_data(self, seed: int) -> None:
        """Points from scikit-learn's make_blobs, and the mode of each."""
        x, y = make_blobs(n_samples=10_000, centers=CENTRES.numpy(), cluster_std=SPREAD, random_state=seed)
        self.data, self.truth = torch.tensor(x, dtype=torch.float32), torch.tensor(y)

    def utility(self, samples: Tensor) -> Tensor:
        """People want to be near the centre that they asked for."""
        return -4 * torch.cdist(samples, CENTRES)

    def evaluate_held_out(self, samples: Tensor, prompts: Tensor) -> dict[str, float]:
        """The share nearest to the prompt's mode, the data's log density at the samples, their spread within a mode."""
        square = torch.cdist(samples, CENTRES).square()
        nearest = square.argmin(1)
        log_density = torch.logsumexp(-square / (2 * SPREAD**2), 1) - math.log(MODES * 2 * math.pi * SPREAD**2)
        spread = [x.var(0).mean().sqrt() for c in range(MODES) if len(x := samples[nearest == c]) > 1]
        return {
            "alignment": (nearest == prompts).float().mean().item(),
            "log_density": log_density.mean().item(),
            "spread": torch.stack(spread).mean().item(),
        }

    def draw_figures(self, folder: Path) -> None:
        """samples.png, before and after; trajectories.png, rollouts with a leap trajectory over each."""
        real = self.data[:2000].numpy()
        pictures.scatter(folder, real, CENTRES.numpy())
        pictures.trajectories(folder, real)
