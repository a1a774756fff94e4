"""Tiny random reward models, test images and refusals, for the tests of rewards."""

import functools
import json
import tempfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from full_scale.rewards import REWARDS, tiny
from leap_align import BadInput

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


def use_tiny_vit(monkeypatch):
    """Makes open_clip's ViT-H-14 the tiny model's architecture, because the official file holds no architecture."""
    config = json.loads((tiny_folder("hpsv2.1") / "open_clip_config.json").read_text())["model_cfg"]
    monkeypatch.setattr("open_clip.get_model_config", {"ViT-H-14": config}.get)


def random_images(n=2, height=40, width=56, seed=0):
    """Smooth blobs plus noise, in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = F.interpolate(torch.rand(n, 3, 5, 5, generator=generator), (height, width), mode="bilinear")
    return (0.6 * coarse + 0.4 * torch.rand(n, 3, height, width, generator=generator)).clamp(0, 1)


def refusal(function, *arguments, error=BadInput):
    """The one line with which a call is refused."""
    with pytest.raises(error) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)
