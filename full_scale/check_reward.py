"""Check a reward before a run depends on it."""

from typing import Annotated, Literal

import torch
import tyro

from full_scale import rewards
from leap_align import require


def check_reward(
    reward: Annotated[str, tyro.conf.Positional],
    reward_weights: tuple[str, ...] = (),
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu",
) -> None:
    """Check that a reward keeps the contract; one line says so, or which rule it breaks.

    Args:
        reward: A reward's name, NAME:weight,NAME:weight for a sum, or your own package.module:factory.
        reward_weights: Local path of each named reward's weights, in their order; the hub's if not given.
        device: Where to compute; the GPU if there is one.
    """
    is_there = device == "cpu" or torch.cuda.is_available()
    require(is_there, "device=cuda: there is no GPU, or this torch cannot use it; give --device cpu")
    rewards.check_reward(rewards.load(reward, reward_weights, device), device=device)
    print(f"{reward} keeps the contract")
