"""From a text such as "hpsv2.1:1,my_module:my_factory:0.5" to a reward."""

import importlib
import math
from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from full_scale.rewards.contract import CustomReward, Reward, describe, random_images, try_out
from full_scale.rewards.hpsv2 import HPSv2
from full_scale.rewards.hpsv3 import HPSv3
from full_scale.rewards.imagereward import ImageReward
from full_scale.rewards.pickscore import PickScore
from leap_align import BadInput, require
from runtime.exit import user_code
from runtime.processes import UserCodeError, one_line

REWARDS = {"hpsv2.1": HPSv2, "pickscore": PickScore, "hpsv3": HPSv3, "imagereward": ImageReward}
PRESETS: dict[str, dict[str, float]] = {
    "hpsv2.1": {"alpha": 0.3, "lam": 0.55, "lr": 1e-5},
    "pickscore": {"alpha": 0.1, "lam": 0.4, "lr": 1e-5},
    "hpsv3": {"alpha": 0.1, "lam": 13.5, "lr": 8e-6},
    "imagereward": {},
}
"""The paper's training settings for each reward; the paper uses ImageReward for evaluation only."""
DROPS = {"hpsv2.1": 0.005, "pickscore": 0.005, "hpsv3": 0.3, "imagereward": 0.1, "shapes": 0.05}
"""How far each must fall in a run's evaluations to bring a warning of reward hacking; others: at all."""
FACTORIES = {"shapes": "full_scale.shapes.judge:Judge"}  # evaluators without weights, and without gradient


class WeightedSum(Reward):
    """Σᵢ wᵢ rᵢ(images, prompts), (B,)."""

    def __init__(self, terms: Sequence[str], rewards: Sequence[Reward], weights: Sequence[float]) -> None:
        name = f"the sum of {' and '.join(reward.name for reward in rewards)}"
        super().__init__(rewards=nn.ModuleList(rewards), weights=list(weights), terms=list(terms), name=name)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Every reward scores the same images."""
        return self.with_terms(images, prompts)[0]

    def with_terms(self, images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum, and each reward's own scores, without its weight."""
        scores = [reward(images, prompts) for reward in self.rewards]
        return sum(w * r for w, r in zip(self.weights, scores)), dict(zip(self.terms, scores))


def load(
    spec: str,
    weights: Sequence[str | Path] = (),
    device: str | torch.device = "cpu",
    image_size: tuple[int, int] | None = None,
) -> Reward:
    """The reward that a text names: "hpsv2.1", a sum "hpsv2.1:1,pickscore:0.5", or a custom "package.module:factory".

    A number after a term's last colon is its weight in the sum.  factory() returns a callable (images, prompts) ->
    (B,); one that is no nn.Module must compute on the images' device.  weights: empty for the hub's, or one local path
    or hub id for each name in REWARDS, in the order of the text.  image_size: (H, W) at which to try a custom reward.
    """
    terms, rewards = split_terms(spec), load_each(spec, weights, device)
    for (name, _), reward in zip(terms, rewards):
        if name not in REWARDS and image_size is not None:
            try_out(reward, random_images(2, (3, *image_size), device))
    if [weight for _, weight in terms] == [None]:
        return rewards[0]
    return WeightedSum([name for name, _ in terms], rewards, [1.0 if w is None else w for _, w in terms])


def load_each(spec: str, weights: Sequence[str | Path], device: str | torch.device) -> list[Reward]:
    """The reward of each term of a text, as `load` reads it."""
    names = [name for name, _ in split_terms(spec)]
    built_in = [name for name in names if name in REWARDS]
    known = ", ".join(built_in) or "none"
    message = f"{len(weights)} paths of reward weights: give one for each reward that loads weights ({known})"
    require(len(weights) in (0, len(built_in)), message)
    paths = iter(weights or [None] * len(built_in))
    load_one = {name: reward.load for name, reward in REWARDS.items()}
    return [
        load_one[name](next(paths), device) if name in load_one else _load_custom(name).to(device) for name in names
    ]


def split_terms(spec: str) -> list[tuple[str, float | None]]:
    """("name", 0.5) of each term "name:0.5", ("name", None) of "name"."""
    return [_split_term(term.strip()) for term in spec.split(",")]


def _split_term(term: str) -> tuple[str, float | None]:
    name, _, number = term.rpartition(":")
    try:
        weight = float(number)
    except ValueError:
        return term, None
    require(name and math.isfinite(weight), f"{term!r} must be a reward's name, a colon and a finite weight")
    return name, weight


def _load_custom(name: str) -> Reward:
    """The reward that a factory "package.module:factory" returns."""
    choices = f"choose from {', '.join([*REWARDS, *FACTORIES])}, or give your own as package.module:factory"
    name = FACTORIES.get(name, name)
    require(all(name.partition(":")), f"unknown reward {name!r}: {choices}")
    factory, expected = _import(name), "a callable that takes no arguments and returns the reward"
    require(callable(factory), f"{name} is {describe(factory)}, not {expected}")
    with user_code(f"your factory {name}, called without arguments,"):
        function = factory()
    require(callable(function), f"{name}() must return a callable (images, prompts) -> (B,), not {describe(function)}")
    return function if isinstance(function, Reward) else CustomReward(function, f"your reward {name}")


def _import(name: str) -> Any:
    """What "package.module:attribute" names."""
    module_name, _, attribute = name.partition(":")
    try:
        with user_code(f"your module {module_name}"):
            module = importlib.import_module(module_name)
        return attrgetter(attribute)(module)
    except (UserCodeError, AttributeError) as error:
        reason = error.__cause__ or error
        is_missing = isinstance(reason, ModuleNotFoundError) and f"{module_name}.".startswith(f"{reason.name}.")
        if isinstance(error, UserCodeError) and not is_missing:  # the module exists, and its own code fails
            raise
        remedy = "give package.module:factory, with the module beside train_leap_align.py or its folder in PYTHONPATH"
        raise BadInput(f"cannot import the reward {name!r} ({one_line(reason)}): {remedy}") from reason
