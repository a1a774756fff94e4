"""Pre-training of the toy tasks, and the cache that makes it happen once."""

import hashlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import sklearn
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm, trange

from leap_align import interpolate
from runtime.files import atomic_file
from runtime.processes import run_on_rank0
from toy.nets import RewardNet, VelocityNet

CACHE = Path(__file__).resolve().parent.parent / ".cache"
BATCH_SIZE, MAX_LR = 512, 2e-3  # samples a step and peak learning rate, of both networks


def _optimize(model: nn.Module, loss: Callable[[], Tensor], steps: int, title: str) -> None:
    """AdamW on loss(), with a one-cycle learning rate."""
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, MAX_LR, total_steps=steps)
    for _ in trange(steps, desc=title, leave=False, mininterval=1):
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()  # after the step, so that the alignment starts without a gradient
        schedule.step()


def fit_flow(model: VelocityNet, data: Tensor, captions: Tensor, steps: int, generator: torch.Generator) -> None:
    """Flow matching: at a point of the path (Eq. S2) the model learns the path's velocity there (Eq. S3).

    data (N, *S); captions (N,), the class given to the model, right or wrong.
    """

    def loss() -> Tensor:
        rows = torch.randint(len(data), (BATCH_SIZE,), generator=generator)
        x_0, t = data[rows], torch.rand(BATCH_SIZE, generator=generator)
        x_1 = torch.randn(x_0.shape, generator=generator)
        return F.mse_loss(model(interpolate(x_0, x_1, t), t, captions[rows]), x_1 - x_0)

    _optimize(model, loss, steps, "pre-training the flow")


def fit_reward(model: RewardNet, choices: Callable[[], tuple[Tensor, Tensor, Tensor]], steps: int) -> None:
    """Bradley-Terry: P(chosen beats other | prompt) = sigmoid(r(chosen) - r(other)), by maximum likelihood.

    choices() simulates people: the samples they chose and the samples they rejected, both (B, *S), and prompts (B,).
    """

    def loss() -> Tensor:
        chosen, other, prompt = choices()
        return F.softplus(model(other, prompt) - model(chosen, prompt)).mean()

    _optimize(model, loss, steps, "learning the reward")


def fit_or_load(
    name: str, made_by: list[Any], settings: object, models: nn.ModuleDict, fit: Callable[[], None]
) -> None:
    """Fills `models` from the cache; if they are not there yet, or damaged, rank 0 runs fit() and stores them.

    The file's name depends on everything that makes them: the source of the modules and functions `made_by`, the
    settings, the libraries' versions.
    """
    key = hashlib.sha256(repr((settings, torch.__version__, sklearn.__version__)).encode())
    for source in made_by:
        key.update(inspect.getsource(source).encode())
    path = CACHE / f"{name}-{key.hexdigest()[:16]}.pt"

    def fit_if_missing() -> None:
        if not _is_intact(path, models):
            fit()
            with atomic_file(path) as temporary:
                torch.save(models.state_dict(), temporary)

    run_on_rank0(fit_if_missing)
    models.load_state_dict(torch.load(path, weights_only=True))


def _is_intact(path: Path, models: nn.ModuleDict) -> bool:
    """Whether a file holds the weights of `models`; checks every byte, runs no code, removes a damaged file."""
    if not path.exists():
        return False
    try:
        with ZipFile(path) as file:
            broken = file.testzip()  # torch.load compares no checksums
        shapes = {name: value.shape for name, value in torch.load(path, weights_only=True).items()}
        if not broken and shapes == {name: value.shape for name, value in models.state_dict().items()}:
            return True
    except OSError:
        raise
    except Exception:  # a damaged file may raise anything
        pass
    tqdm.write(f"{path} is damaged: it is removed, and the networks are pre-trained again")
    path.unlink()
    return False
