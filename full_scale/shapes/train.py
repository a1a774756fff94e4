"""How the small FLUX.1 and its reward learn: VAE, then text encoders and transformer together; the reward.

A step draws everything from generators seeded with its number, so that a run that was interrupted continues to the bit.
"""

from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor, nn
from tqdm import tqdm

from full_scale.shapes.networks import TOKENS
from full_scale.shapes.scenes import KINDS, Caption, captions, draw, place, spoil
from runtime.ema import EMA
from runtime.run_dir import atomic_file

WRONG = 0.35  # the share of captions in pre-training that are wrong in one respect
SAVE_EVERY = 250  # steps
CAPTIONS = list(captions().values())


def fit(model: nn.Module, loss: Callable[[int], Tensor], steps: int, lr: float, state: Path, title: str) -> None:
    """Leaves in the model the average of its weights over AdamW on loss(step); continues from the file `state`."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer, ema = torch.optim.AdamW(parameters, betas=(0.9, 0.99), fused=True), EMA(parameters, 0.998)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    done = load_state(state, optimizer, schedule, ema) if state.exists() else 0
    with tqdm(desc=title, initial=done, total=steps, mininterval=1) as bar:
        for step in range(done, steps):
            loss(step).backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            ema.update()
            bar.update()
            if (step + 1) % SAVE_EVERY == 0:
                save_state(state, optimizer, ema, step + 1)
    with torch.no_grad():
        for parameter, average in zip(parameters, ema.average):
            parameter.copy_(average)


def save_state(path: Path, optimizer: torch.optim.Optimizer, ema: EMA, done: int) -> None:
    """Writes weights, moments and average after `done` steps."""
    parameters = optimizer.param_groups[0]["params"]
    tensors = {f"weight.{i}": p.detach() for i, p in enumerate(parameters)}
    tensors |= {f"average.{i}": average for i, average in enumerate(ema.average)}
    for i, p in enumerate(parameters):
        tensors |= {f"{name}.{i}": value for name, value in optimizer.state[p].items()}
    with atomic_file(path) as temporary:
        save_file(tensors | {"done": torch.tensor(done)}, temporary)


@torch.no_grad()
def load_state(path: Path, optimizer: torch.optim.Optimizer, schedule: Any, ema: EMA) -> int:
    """Reads what save_state wrote; returns the number of steps that were done."""
    tensors, parameters = load_file(path), optimizer.param_groups[0]["params"]
    for i, p in enumerate(parameters):
        p.copy_(tensors[f"weight.{i}"])
        ema.average[i].copy_(tensors[f"average.{i}"])
        optimizer.state[p] = {name: tensors[f"{name}.{i}"] for name in ("step", "exp_avg", "exp_avg_sq")}
    done = int(tensors["done"])
    schedule.last_epoch = done - 1
    schedule.step()
    return done
