"""Tiny random reward models, test images and error messages, for the tests of rewards."""

import functools
import tempfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from full_scale.rewards import REWARDS, tiny

LIBRARY = {"hpsv2.1": "open_clip", "pickscore": "transformers", "hpsv3": "transformers", "imagereward": "transformers"}
PROMPTS = ["a red cube", "Two dogs on a beach, oil painting"]
every_reward = pytest.mark.parametrize("name", LIBRARY)

_temporary_folder = tempfile.TemporaryDirectory(prefix="tiny_rewards_")


@functools.cache
def tiny_folder(name):
    """A folder with a tiny random model of this reward; skips the test if the reward's library is not installed."""
    pytest.importorskip(LIBRARY[name])
    folder = Path(_temporary_folder.name) / name
    tiny(name, folder)
    return folder


def tiny_reward(name, **options):
    return REWARDS[name].load(tiny_folder(name), **options)


def random_images(n=2, height=40, width=56, seed=0):
    """Smooth blobs plus noise, in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = F.interpolate(torch.rand(n, 3, 5, 5, generator=generator), (height, width), mode="bilinear")
    return (0.6 * coarse + 0.4 * torch.rand(n, 3, height, width, generator=generator)).clamp(0, 1)


def random_uint8_images(sizes):
    """One image (1, 3, H, W) for each (H, W)."""
    return [(random_images(1, *size, seed=i) * 255).round().to(torch.uint8) for i, size in enumerate(sizes)]


def as_pil(image):
    """A PIL image of a uint8 tensor (1, 3, H, W)."""
    return pytest.importorskip("PIL.Image").fromarray(image[0].permute(1, 2, 0).numpy())


def message(error):
    """The text of a caught error, which must be one line."""
    assert "\n" not in str(error.value)
    return str(error.value)
