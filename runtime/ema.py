"""The exponential moving average of the trained weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class EMA:
    """average <- decay * average + (1 - decay) * parameters, in the parameters' own precision, which is float32."""

    def __init__(self, parameters: list[nn.Parameter], decay: float) -> None:
        self.parameters = parameters
        self.multi_average = get_ema_multi_avg_fn(decay)
        with torch.no_grad():
            self.average = [p.clone() for p in parameters]

    def update(self) -> None:
        """Moves the average towards the parameters."""
        self.multi_average(self.average, self.parameters, None)

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
