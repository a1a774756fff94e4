"""What surrounds the optimizer's step: clipping, and the learning rate over a run by torch's own schedulers."""

import math
import warnings

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LinearLR, SequentialLR

from runtime.processes import full_value

# On --resume, and after an iteration that was skipped, the schedule moves without the optimizer.
warnings.filterwarnings("ignore", r"Detected call of `lr_scheduler\.step\(\)` before", UserWarning)


def clip_gradient(parameters: list[nn.Parameter], max_norm: float) -> float:
    """Scales the gradient down to at most this norm, unless it is not finite; returns the norm before, of all ranks."""
    total = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    norm = full_value(total).item()
    if max_norm < norm < math.inf:  # clipping would multiply every gradient by one otherwise
        nn.utils.clip_grads_with_norm_(parameters, max_norm, total)
    return norm


def lr_schedule(optimizer: Optimizer, name: str, warmup: int, iterations: int) -> SequentialLR:
    """lr times n / warmup in iteration n = 1..warmup, then lr, or its linear or cosine decay to 0 at the run's end.

    The caller calls step() after each iteration: as many steps give the same rate again, which a resumed run needs.
    """
    rest = max(1, iterations - warmup)
    after = {"constant": (ConstantLR, 1), "linear": (LinearLR, 1, 0, rest), "cosine": (CosineAnnealingLR, rest)}
    scheduler, *arguments = after[name]
    rise = LinearLR(optimizer, 1 / max(1, warmup), 1, max(1, warmup - 1))
    return SequentialLR(optimizer, [rise, scheduler(optimizer, *arguments)], [warmup])
