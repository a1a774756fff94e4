"""From a text such as "hpsv2.1:1,my_module:my_factory:0.5" to a reward."""

import math
import pkgutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from full_scale.rewards.contract import Reward
from full_scale.rewards.hpsv2 import HPSv2
from full_scale.rewards.hpsv3 import HPSv3
from full_scale.rewards.imagereward import ImageReward
from full_scale.rewards.pickscore import PickScore
from leap_align import BadInput
from runtime.processes import one_line

REWARDS: dict[str, type[Reward]] = {
    "hpsv2.1": HPSv2,
    "pickscore": PickScore,
    "hpsv3": HPSv3,
    "imagereward": ImageReward,
}

PRESETS: dict[str, dict[str, float]] = {
    "hpsv2.1": {"alpha": 0.3, "lam": 0.55, "lr": 1e-5},
    "pickscore": {"alpha": 0.1, "lam": 0.4, "lr": 1e-5},
    "hpsv3": {"alpha": 0.1, "lam": 13.5, "lr": 8e-6},
    "imagereward": {},
}
"""The paper's training settings for each reward; the paper uses ImageReward for evaluation only."""


class CustomReward(Reward):
    """A user's reward: any callable (images, prompts) -> (B,); an nn.Module is frozen and set to eval mode."""

    def __init__(self, function: Callable[[Tensor, list[str]], Tensor]) -> None:
        super().__init__(function=function)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """function(images, prompts)."""
        return self.function(images, prompts)


class WeightedSum(Reward):
    """Σᵢ wᵢ rᵢ(images, prompts), (B,)."""

    def __init__(self, rewards: Sequence[Reward], weights: Sequence[float]) -> None:
        super().__init__(rewards=nn.ModuleList(rewards), weights=list(weights))

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Every reward scores the same images."""
        return sum(weight * reward(images, prompts) for weight, reward in zip(self.weights, self.rewards))


def load(spec: str, weights: Sequence[str | Path] = (), device: str | torch.device = "cpu") -> Reward:
    """The reward that a text names: "hpsv2.1", a sum "hpsv2.1:1,pickscore:0.5", or a custom "package.module:factory".

    A number after a term's last colon is its weight in the sum.  factory() returns a callable (images, prompts) ->
    (B,); one that is no nn.Module must compute on the images' device.  weights: empty for the hub's, or one local path
    or hub id for each name in REWARDS, in the order of the text.
    """
    terms = [_split_weight(term.strip()) for term in spec.split(",")]
    built_in = [name for name, _ in terms if name in REWARDS]
    if weights and len(weights) != len(built_in):
        names = ", ".join(built_in) or "none"
        raise BadInput(f"{len(weights)} paths of reward weights: give one for each reward that loads weights ({names})")
    paths = list(weights) or [None] * len(built_in)
    rewards = []
    for name, _ in terms:
        if name in REWARDS:
            rewards.append(REWARDS[name].load(paths.pop(0), device))
        else:
            rewards.append(_load_custom(name).to(device))
    if [weight for _, weight in terms] == [None]:
        return rewards[0]
    return WeightedSum(rewards, [1.0 if weight is None else weight for _, weight in terms])


def _split_weight(term: str) -> tuple[str, float | None]:
    """("name", 0.5) of "name:0.5", ("name", None) of "name"."""
    name, _, number = term.rpartition(":")
    try:
        weight = float(number)
    except ValueError:
        return term, None
    if not name or not math.isfinite(weight):
        raise BadInput(f"{term!r} must be a reward's name, a colon and a finite weight")
    return name, weight


def _load_custom(name: str) -> CustomReward:
    """The reward that a factory "package.module:factory" returns."""
    if ":" not in name:
        choices = f"choose from {', '.join(REWARDS)}, or give your own as package.module:factory"
        raise BadInput(f"unknown reward {name!r}: {choices}")
    try:
        factory = pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        remedy = "give it as package.module:factory"
        raise BadInput(f"cannot import the reward {name!r} ({one_line(error)}): {remedy}") from error
    function = factory() if callable(factory) else None
    if not callable(function):
        raise BadInput(f"{name}() must return a callable (images, prompts) -> (B,), not {function!r:.60}")
    return CustomReward(function)
