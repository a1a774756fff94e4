"""Process group and ranks, signals, and how a process ends.

Every function also works in a single process without a process group: that is rank 0 of 1.
"""

import os
import signal
import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from leap_align import BadInput

# ---------------------------------------------------------------------------------------------------------------------
# Ranks
# ---------------------------------------------------------------------------------------------------------------------


def rank() -> int:
    """This process's rank."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def init_process_group(backend: str | None = None) -> None:
    """Joins torchrun's process group; without torchrun there is none."""
    if dist.is_torchelastic_launched():
        dist.init_process_group(backend)


def device_mesh(device_type: str) -> DeviceMesh | None:
    """A mesh of all ranks, or None without a process group.

    On several nodes the mesh has two dimensions (HSDP): sharded within a node, replicated across the slow links.
    """
    if not dist.is_initialized():
        return None
    ranks_per_node = int(os.environ["LOCAL_WORLD_SIZE"])
    if world_size() == ranks_per_node:
        return init_device_mesh(device_type, (ranks_per_node,))
    shape = (world_size() // ranks_per_node, ranks_per_node)
    return init_device_mesh(device_type, shape, mesh_dim_names=("replicate", "shard"))


def barrier() -> None:
    """Waits for every rank."""
    if dist.is_initialized():
        dist.barrier()


def all_gather(value: Any) -> list[Any]:
    """The values of all ranks, in their order, on every rank; any picklable object."""
    if not dist.is_initialized():
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def mean_over_ranks(metrics: dict[str, float], device: torch.device) -> dict[str, float]:
    """The mean of each metric over all ranks."""
    if world_size() == 1:
        return metrics
    values = torch.tensor(list(metrics.values()), dtype=torch.float64, device=device)
    dist.all_reduce(values)
    return dict(zip(metrics, (values / world_size()).tolist()))


def full_value(tensor: Tensor) -> Tensor:
    """The full tensor of a sharded one; any other tensor unchanged."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


# ---------------------------------------------------------------------------------------------------------------------
# Errors that concern every rank
# ---------------------------------------------------------------------------------------------------------------------


class RaisedOnAllRanks(BadInput):
    """Raised on every rank; only rank 0 prints it."""


def run_on_all_ranks(action: Callable[[], Any]) -> Any:
    """Runs action() on every rank and returns its result.

    If it raises BadInput or OSError on one rank, every rank raises RaisedOnAllRanks with that rank's message.
    Otherwise the other ranks would wait for it in their next collective call.
    """
    result, message = None, None
    try:
        result = action()
    except BadInput as error:
        message = str(error)
    except OSError as error:
        message = f"{error.filename or 'a file'}: {one_line(error)}"
    messages = [text for text in all_gather(message) if text is not None]
    if messages:
        raise RaisedOnAllRanks(messages[0])
    return result


def run_on_rank0(action: Callable[[], Any]) -> None:
    """Runs action() on rank 0; if it raises, every rank raises the same message."""
    run_on_all_ranks(action if rank() == 0 else lambda: None)


def one_line(error: BaseException) -> str:
    """An error's message on one line of at most 200 characters."""
    text = getattr(error, "strerror", None) or str(error)
    return f"{' '.join(text.split()):.200}"


# ---------------------------------------------------------------------------------------------------------------------
# Signals
# ---------------------------------------------------------------------------------------------------------------------


class StoppedBySignal(Exception):
    """The run stopped because a signal asked for it; everything is saved."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = number


@dataclass
class StopRequest:
    """The signal that asks this process to stop; 0 for none."""

    signal: int = 0


@contextmanager
def stop_on_signals():
    """Yields a StopRequest that SIGINT or SIGTERM fills.  The same signal a second time ends the process at once."""
    request = StopRequest()

    def handle(number: int, frame: Any) -> None:
        request.signal = number
        signal.signal(number, signal.SIG_DFL)

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


# ---------------------------------------------------------------------------------------------------------------------
# Exit
# ---------------------------------------------------------------------------------------------------------------------


def exit_process(error: BaseException | None) -> None:
    """Ends the process: one line on stderr if there is an error, and the exit status that fits it.

    Under torchrun a failed process exits at once.  Destroying the process group would wait for ranks that wait for
    this one, and gloo's threads sometimes abort a regular interpreter exit (SIGABRT).
    """
    under_torchrun = dist.is_torchelastic_launched()
    if dist.is_initialized() and not (under_torchrun and error is not None):
        dist.destroy_process_group()
    if under_torchrun:
        _exit_under_torchrun(error)
    if isinstance(error, StoppedBySignal):
        print(_message(error), file=sys.stderr)
        sys.exit(_status(error))
    if error is not None:
        sys.exit(_message(error))


def _exit_under_torchrun(error: BaseException | None) -> None:
    this_rank = int(os.environ["RANK"])
    message = _message(error) if error is not None else ""
    if message and this_rank == 0:
        print(message, file=sys.stderr)
    elif message and not isinstance(error, RaisedOnAllRanks | StoppedBySignal):
        print(f"{message} (process {this_rank})", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(_status(error))


def _status(error: BaseException | None) -> int:
    """The shell's convention: 0, 1 for an error, 128 + n for signal n."""
    if isinstance(error, StoppedBySignal):
        return 128 + error.signal
    return 0 if error is None else 1


def _message(error: BaseException) -> str:
    """The line for an error that a user can act on; any other error is raised again, with its traceback."""
    resume = "the last checkpoint is good, continue with --resume"
    if isinstance(error, StoppedBySignal):
        return f"stopped by {signal.Signals(error.signal).name}: everything is saved, continue with --resume"
    if isinstance(error, BadInput):
        return f"error: {error}"
    if isinstance(error, torch.OutOfMemoryError):
        remedy = "raise --gradient-accumulation-steps, or see full_scale/README.md for what else helps"
        return f"error: out of GPU memory ({one_line(error):.80}): {remedy}"
    if isinstance(error, OSError):
        return f"error: {error.filename or 'a file'}: {one_line(error)}; {resume}"
    if isinstance(error, KeyboardInterrupt):
        return f"error: interrupted; {resume}, or start again if there is none yet"
    if dist.is_initialized() and (isinstance(error, dist.DistError) or "gloo" in str(error)):
        return f"error: lost another process ({one_line(error):.80}); {resume}"
    raise error
