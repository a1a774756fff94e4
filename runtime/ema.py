"""The exponential moving average of the trained weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class EMA:
    """average <- d average + (1 - d) parameters, with d = min(decay, (1 + n) / (10 + n)) after n updates before.

    So the start is soon forgotten: with a constant d = 0.995 it would be 78 % of the average after 50 updates.
    Average and parameters have the same precision, which is float32.
    """

    def __init__(self, parameters: list[nn.Parameter], decay: float) -> None:
        self.parameters, self.decay = parameters, decay
        with torch.no_grad():
            self.average = [p.clone() for p in parameters]

    def update(self, n: int) -> None:
        """Moves the average towards the parameters, after n updates before."""
        decay = min(self.decay, (1 + n) / (10 + n))
        get_ema_multi_avg_fn(decay)(self.average, self.parameters, None)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """The model holds the averaged weights inside this context, and its own weights again afterwards."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for parameter, average in zip(self.parameters, self.average):
            own = parameter.clone()
            parameter.copy_(average)
            average.copy_(own)
