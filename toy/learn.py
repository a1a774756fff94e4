"""Pre-training of the toy tasks, and the cache that makes it happen once."""

import hashlib
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sklearn
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import trange

from leap_align import interpolate
from toy.nets import RewardNet, VelocityNet

CACHE = Path(__file__).resolve().parent.parent / ".cache"
BATCH, RATE = 512, 2e-3
"""Samples a step and greatest learning rate, of both networks."""


def _descend(model: nn.Module, loss: Callable[[], Tensor], steps: int, title: str) -> None:
    """AdamW on loss(), the learning rate in one cycle up and down."""
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    for _ in trange(steps, desc=title, leave=False):
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()  # here, so that the alignment inherits no gradient
        schedule.step()


def fit_flow(model: VelocityNet, data: Tensor, captions: Tensor, steps: int, generator: torch.Generator) -> None:
    """Flow matching: at a point of the path (Eq. S2) the model learns the path's velocity there (Eq. S3).

    data (N, *S); captions (N,), what the model is told they show, rightly or wrongly.
    """

    def loss() -> Tensor:
        rows = torch.randint(len(data), (BATCH,), generator=generator)
        x_0, t = data[rows], torch.rand(BATCH, generator=generator)
        x_1 = torch.randn(x_0.shape, generator=generator)
        return F.mse_loss(model(interpolate(x_0, x_1, t), t, captions[rows]), x_1 - x_0)

    _descend(model, loss, steps, "pre-training the flow")


def fit_reward(model: RewardNet, choices: Callable[[], tuple[Tensor, Tensor, Tensor]], steps: int) -> None:
    """Bradley-Terry: P(chosen beats other | prompt) = sigmoid(r(chosen) - r(other)), by maximum likelihood.

    choices() simulates people: samples they chose and samples they passed over, both (B, *S), and prompts (B,).
    """

    def loss() -> Tensor:
        chosen, other, prompt = choices()
        return F.softplus(model(other, prompt) - model(chosen, prompt)).mean()

    _descend(model, loss, steps, "learning the reward")


def cached(name: str, made_by: list[Any], settings: object, models: nn.ModuleDict, fit: Callable[[], None]) -> None:
    """Fills `models` from the cache, or by fit() and then stores them.

    The key is what made them: the source of the modules and functions `made_by`, the settings, the libraries'
    versions.  Only the first of several processes fits; the file is renamed into place, never half there.
    """
    key = hashlib.sha256(repr((settings, torch.__version__, sklearn.__version__)).encode())
    for source in made_by:
        key.update(inspect.getsource(source).encode())
    path = CACHE / f"{name}-{key.hexdigest()[:16]}.pt"
    many = dist.is_initialized()
    if not path.exists() and (not many or dist.get_rank() == 0):
        fit()
        write(models.state_dict(), path)
    if many:
        dist.barrier()
    models.load_state_dict(torch.load(path, weights_only=True))


def write(weights: dict, path: Path) -> None:
    """torch.save, renamed into place: a reader finds all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}")
    torch.save(weights, part)
    os.replace(part, path)
