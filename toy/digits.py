"""Task `digits`: scikit-learn's 8x8 images of handwritten digits; a prompt names a digit.

The flow and the reward learn from one half of the images.  The held-out evaluators use the other half, and they belong
to other model families than the reward.
"""

from pathlib import Path
from typing import ClassVar

import torch
from sklearn.datasets import load_digits
from sklearn.ensemble import RandomForestClassifier
from sklearn.model_selection import train_test_split
from sklearn.svm import SVC
from torch import Tensor

from toy import pictures
from toy.task import ToyTask

DIGITS = 10


class Digits(ToyTask):
    """Real images, small enough to see reward hacking within a minute."""

    name = "digits"
    shape = (1, 8, 8)
    classes = DIGITS
    network: ClassVar[dict] = {"width": 256, "depth": 4}
    held_out: ClassVar[dict] = {"utility": 0.5, "svm": 0.05, "forest": 0.05, "nearest_real": -0.3, "diversity": 0.5}
    next_commands: ClassVar[tuple] = (
        "python train_leap_align.py --task digits --lr 3e-4 --lam None --out runs/digits-hacked  # then on a leash",
        "python train_leap_align.py --task digits --lr 3e-4 --lam None --beta 3 --out runs/digits-leashed  # the leash",
        "python -m toy.laboratory leash  # toy/tour.ipynb, part (h), shows the leash",
    )

    def load_data(self, seed: int) -> None:
        """Splits the images, pixels in [-1, 1], and fits the evaluators on the unseen half."""
        images, digits = load_digits(return_X_y=True)
        seen, unseen, truth, unseen_truth = train_test_split(
            images / 8 - 1, digits, test_size=0.5, random_state=seed, stratify=digits
        )
        self.data = torch.tensor(seen, dtype=torch.float32).reshape(-1, *self.shape)
        self.truth = torch.tensor(truth)
        self.unseen = torch.tensor(unseen, dtype=torch.float32)
        self.svm = SVC().fit(self.unseen, unseen_truth)
        self.forest = RandomForestClassifier(200, random_state=seed).fit(self.unseen, unseen_truth)

    def utility(self, samples: Tensor) -> Tensor:
        """People want an image close to a real one of the digit that they asked for."""
        distance = torch.cdist(samples.flatten(1), self.data.flatten(1))
        nearest = distance.new_full((len(samples), DIGITS), torch.inf)
        return -4 * nearest.scatter_reduce(1, self.truth.expand(len(samples), -1), distance, "amin")

    def evaluate_held_out(self, samples: Tensor, prompts: Tensor) -> dict[str, float]:
        """How often two classifiers find the prompt's digit, distance to the nearest unseen image, and diversity."""
        flat = samples.flatten(1)
        distances = [torch.pdist(flat[prompts == c]).mean() for c in range(DIGITS)]
        return {
            "svm": float((self.svm.predict(flat) == prompts.numpy()).mean()),
            "forest": float((self.forest.predict(flat) == prompts.numpy()).mean()),
            "nearest_real": torch.cdist(flat, self.unseen).amin(1).mean().item(),
            "diversity": torch.stack(distances).mean().item(),
        }

    def draw_figures(self, folder: Path) -> None:
        """samples.png, the same noise over the training; trajectories.png, a rollout with its leaps for each digit."""
        pictures.sheet(folder)
        pictures.leap_sheet(folder)
