"""Process group and ranks, and signals.

Every function also works in a single process without a process group: that is rank 0 of 1.
"""

import itertools
import math
import os
import re
import signal
import socket
import sys
import threading
import time
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from leap_align import BadInput, require


# ------------------------------------------------------- Ranks -------------------------------------------------------
def rank() -> int:
    """This process's rank."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


GROUP = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""The environment variables that describe a process group; torchrun sets them."""
GROUP_MINUTES = 30.0  # longer than a slow first iteration, or a checkpoint on a slow disk
COUNTS = ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
"""In which launchers say how many processes they start."""


def is_in_group() -> bool:
    """Whether the environment describes a process group."""
    return all(name in os.environ for name in GROUP)


def is_first_of_node() -> bool:
    """Whether no other process of this node has a lower rank."""
    return not is_in_group() or int(os.environ["LOCAL_RANK"]) == 0


def is_under_torchrun() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def init_process_group(backend: str | None = None, minutes: float = GROUP_MINUTES) -> None:
    """Joins the process group that the environment describes, if it does.

    minutes: how long a process waits for another one before it ends.
    Raises BadInput if a launcher started several processes, but does not say how they find each other.
    """
    if is_in_group():
        for name in (name for name in GROUP if name != "MASTER_ADDR"):
            require(os.environ[name].isdecimal(), f"{name}={os.environ[name]!r} in the environment is no number")
        _, size, _, on_node, _, port = (os.environ[name] for name in GROUP)
        is_whole = 0 < int(on_node) and int(size) % int(on_node) == 0
        require(is_whole, f"WORLD_SIZE={size} must be a multiple of LOCAL_WORLD_SIZE={on_node}: start all processes")
        require(int(port) < 65536, f"MASTER_PORT={port} must be less than 65536")
        require(0 < minutes < 1e6, f"process_group_timeout={minutes} must be positive and finite")
        dist.init_process_group(backend, timeout=timedelta(minutes=minutes))
        _watch_next_rank()
        return
    missing = ", ".join(name for name in GROUP if name not in os.environ)
    for name in COUNTS:
        is_alone = os.environ.get(name, "1").strip() in ("", "0", "1")
        remedy = "start one torchrun on each node, or set them as full_scale/cluster/ does"
        require(is_alone, f"{name}={os.environ.get(name)}, but {missing} are not set: {remedy}")


BEAT_SECONDS, SILENT_SECONDS = 5, 60


def _watch_next_rank() -> None:
    """Starts `report_silence` in the background, with a connection of its own to the process group's store."""
    address, other = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), (rank() + 1) % world_size()
    store = dist.TCPStore(*address, is_master=False)
    store.set_timeout(timedelta(seconds=BEAT_SECONDS))
    store.set(_beat_of(rank()), "0")
    host = all_gather(socket.gethostname())[other]  # from here on every rank's beat is there
    names = f"rank {other} on {host}", "{} (port {}), where the processes meet,".format(*address)
    threading.Thread(target=report_silence, args=(store, rank(), other, *names), daemon=True).start()


def _beat_of(rank: int) -> str:
    return f"leap_align/beat/{rank}"


def report_silence(store: dist.Store, own: int, other: int, name: str, store_name: str) -> None:
    """Shows in the store that rank `own` lives, and prints when rank `other` no longer does the same.

    So a node that is frozen is named, minutes before a collective call times out, which knows no names.
    """
    last, since = None, time.monotonic()
    for number in itertools.count(1):
        try:
            store.set(_beat_of(own), str(number))
            beat, silent = store.get(_beat_of(other)), name
        except RuntimeError:  # of torch.distributed
            beat, silent = last, store_name
        if beat != last:
            last, since = beat, time.monotonic()
        elif time.monotonic() - since > SILENT_SECONDS:
            tqdm.write(f"warning: {silent} has not answered for {SILENT_SECONDS} s", file=sys.stderr)
            since = math.inf  # until it answers again
        time.sleep(BEAT_SECONDS)


def device_mesh(device_type: str, minutes: float = GROUP_MINUTES) -> DeviceMesh | None:
    """A mesh of all ranks, or None without a process group; `minutes` as in init_process_group."""
    if not dist.is_initialized():
        return None
    ranks_per_node = int(os.environ["LOCAL_WORLD_SIZE"])
    if world_size() == ranks_per_node:
        return init_device_mesh(device_type, (ranks_per_node,))
    # HSDP: sharded within a node, replicated across the slow links between nodes.
    shape = (world_size() // ranks_per_node, ranks_per_node)
    mesh = init_device_mesh(device_type, shape, mesh_dim_names=("replicate", "shard"))
    for group in mesh.get_all_groups():
        dist.set_timeout(timedelta(minutes=minutes), group)
    return mesh


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


def mean(rows: list[dict[str, float]]) -> dict[str, float]:
    """The mean of each entry over rows with the same entries in the same order."""
    columns = zip(*[row.values() for row in rows])
    return dict(zip(rows[0], [sum(column) / len(rows) for column in columns]))


def mean_over_ranks(metrics: dict[str, float], device: torch.device) -> dict[str, float]:
    """The mean of each metric over all ranks."""
    if world_size() == 1:
        return metrics
    values = torch.tensor(list(metrics.values()), dtype=torch.float64, device=device)
    dist.all_reduce(values)
    return dict(zip(metrics, (values / world_size()).tolist()))


def reshard(model: nn.Module) -> None:
    """Reshards FSDP2: a no-grad forward leaves bf16 copies unsharded, which go stale after an update."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def set_all_reduce(model: nn.Module, enabled: bool) -> None:
    """Whether the next backwards of FSDP2 add up gradients between nodes; until then each node keeps its own sum."""
    if isinstance(model, FSDPModule):
        model.set_requires_all_reduce(enabled)


def full_value(tensor: Tensor) -> Tensor:
    """The full tensor of a sharded one; any other tensor unchanged."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def free_host_memory() -> float:
    """Bytes of main memory that this process can still allocate; the processes of a node share it."""
    import psutil  # the toy runs without it

    return psutil.virtual_memory().available / int(os.environ.get("LOCAL_WORLD_SIZE", 1))


# ------------------------------------------- Errors that concern every rank ------------------------------------------
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
    except (BadInput, OSError) as error:
        if out_of_memory_reason(error):
            raise
        message = str(error) if isinstance(error, BadInput) else f"{error.filename or 'a file'}: {one_line(error)}"
    if messages := [text for text in all_gather(message) if text is not None]:
        raise RaisedOnAllRanks(messages[0])
    return result


def run_on_rank0(action: Callable[[], Any]) -> None:
    """Runs action() on rank 0; if it raises, every rank raises the same message."""
    run_on_all_ranks(action if rank() == 0 else lambda: None)


def only_warn(action: Callable[[], Any]) -> None:
    """Runs action() on every rank; if it raises BadInput or OSError on one, rank 0 prints that, and all continue."""
    try:
        run_on_all_ranks(action)
    except RaisedOnAllRanks as error:
        if rank() == 0:
            text = printable(error).removesuffix(", then continue with --resume")
            tqdm.write(f"warning: {text}; the run continues without it", file=sys.stderr)


def check_same(values: dict[str, Any]) -> None:
    """Refuses ranks whose values differ from rank 0's; every rank calls it.  Names that a rank lacks do not count.

    Otherwise the other ranks would train something else, or wait for ever for a call that rank 0 never makes.
    """
    own = {name: str(value) for name, value in values.items()}
    (_, first), *others = all_gather((socket.gethostname(), own))
    for other, (host, theirs) in enumerate(others, 1):
        names = sorted(name for name, value in first.items() if theirs.get(name, value) != value)
        differences = "; ".join(f"{name} is {theirs[name]}, there {first[name]}" for name in names[:8])
        if names:
            remedy = "start every process with the same flags, files, code and packages"
            raise RaisedOnAllRanks(f"rank {other} on {host} differs from rank 0: {differences}: {remedy}")


class UserCodeError(Exception):
    """Raised from an error of code that the user supplied; UserCodeError("your reward my_module:factory")."""


OUT_OF_MEMORY = re.compile(
    "out of memory|ALLOC_FAILED|ALLOCATION_FAILED|DefaultCPUAllocator|could not create a (memory object|primitive)|"
    "Cannot allocate memory|failed to map",
    re.IGNORECASE,
)
"""How CUDA's libraries, NCCL, torch's allocator, oneDNN, the system and its loader say that memory ran out."""


def out_of_memory_reason(error: BaseException | None) -> str | None:
    """What says that memory ran out: the error or, unless it is None, one that it was raised from."""
    while error is not None:
        is_of_library = not isinstance(error, BadInput | UserCodeError) and OUT_OF_MEMORY.search(str(error))
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or is_of_library:
            return one_line(error) or "host memory"
        error = error.__cause__ or error.__context__
    return None


def one_line(error: BaseException) -> str:
    """An error's message on one line of at most 200 characters, without C++'s places and stack."""
    text = (getattr(error, "strerror", None) or str(error)).split("Exception raised from")[0]
    text = re.sub(r"^\[[^]]*\.cc:\d+\] ", "", text.rpartition("Last error:")[2].strip() or text)  # gloo's, NCCL's
    return printable(f"{' '.join(text.split()):.200}")


def printable(text: object) -> str:
    """A text, such as a file's name, on one line: control characters, which steer a terminal, are escaped."""
    shown = lambda c: c.isprintable() or unicodedata.category(c) == "Zs"  # noqa: E731  (spaces of any width)
    return "".join(c if shown(c) else c.encode("unicode_escape").decode() for c in str(text))


# ------------------------------------------------------ Signals ------------------------------------------------------
# Ctrl-C, a cluster's preemption, a closed terminal, Slurm's warning.
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]


@dataclass(eq=False)
class StoppedBySignal(BaseException):
    """A signal asked the process to stop.  Like KeyboardInterrupt, it passes through `except Exception`."""

    signal: int
    is_saved: bool  # whether the run has saved all that it did


@dataclass
class StopRequest:
    """Which signal asks this process to stop, and what it does then."""

    signal: int = 0  # 0 for none
    is_deferred: bool = False  # the caller calls `check` when it can save; else StoppedBySignal is raised at once
    parent: int = field(default_factory=os.getppid)  # torchrun, if that started this process

    def check(self, *_: Any) -> None:
        """Raises StoppedBySignal on every rank if one of them is to stop; all ranks call it equally often.

        Without its torchrun a process stops as by SIGHUP.  Takes and ignores the arguments of a module's hook.
        """
        if not self.signal and is_under_torchrun() and os.getppid() != self.parent:
            self.signal = signal.SIGHUP
        number = torch.tensor(self.signal)
        if world_size() > 1:
            dist.all_reduce(number, dist.ReduceOp.MAX)
        if number:
            raise StoppedBySignal(int(number), is_saved=False)


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Yields a StopRequest that a stop signal fills.  The same signal a second time ends the process at once.

    Under torchrun it is ignored: a scheduler may have sent it to every process, before torchrun passes it on.
    """
    request = StopRequest()

    def handle(number: int, frame: Any) -> None:
        request.signal = number
        signal.signal(number, signal.SIG_IGN if is_under_torchrun() else signal.SIG_DFL)
        if not request.is_deferred:
            raise StoppedBySignal(number, is_saved=False)

    # A signal that is ignored, as SIGHUP is under nohup, stays ignored.
    numbers = [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    previous = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
