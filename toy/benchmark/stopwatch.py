"""Seconds of actions and of named phases; on a GPU the clock waits for its work to finish."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


def now() -> float:
    """Seconds on a clock, read after the GPU has finished its queue."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds_of(action: Callable[[], object]) -> float:
    """Seconds of action()."""
    start = now()
    action()
    return now() - start


class Stopwatch:
    """Adds up the seconds of named phases in `seconds`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Times the body of a `with`.  Like every @contextmanager it also decorates: phase("build")(function)."""
        start = now()
        try:
            yield
        finally:
            self.seconds[name] += now() - start
