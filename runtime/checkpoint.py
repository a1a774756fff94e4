"""Checkpoints: weights, optimizer, average, progress and logs of a run as safetensors and JSON, never a pickle.

checkpoint/ITERATION is written beside the others, synced to the disk and renamed into place.  state.json holds a digest
of every file, so that a damaged checkpoint is recognised; loading then uses the one before it.  Every rank calls these
functions: each writes its own shards, file by file, and any number of ranks can read them.
"""

import json
import math
import os
import shutil
import warnings
from collections import ChainMap
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from leap_align import BadInput, require
from runtime.ema import EMA
from runtime.processes import RaisedOnAllRanks, all_gather, one_line, rank, run_on_all_ranks, run_on_rank0, world_size
from runtime.run_dir import check_not_removed, checkpoints, digest, write_text

warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # a single process saves as well
LOGS = ("metrics.csv", "evaluations.csv")
FILE_BYTES = 2**29  # the most that a rank writes into one file, unless a single tensor is larger
HOST_BYTES = 3 * FILE_BYTES  # host memory of a rank: a file's tensors, and the file twice while safetensors makes it


@dataclass
class Progress:
    """How far a run has come."""

    iteration: int = 0
    seconds: float = 0.0  # of training, without evaluations
    evaluations: list[dict[str, float]] = field(default_factory=list)
    warnings: dict[str, str] = field(default_factory=dict)  # those of reward hacking that hold now, by evaluator
    consecutive_skips: int = 0  # iterations skipped in a row, up to now


class TrainingState(NamedTuple):
    """What a checkpoint saves besides the progress."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    ema: EMA
    generator: torch.Generator


def training_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, ema: EMA) -> dict[str, Tensor]:
    """Trained weights, their average and the optimizer's state by name; the live tensors, to save or to load into."""
    is_new = not optimizer.state
    options = StateDictOptions(flatten_optimizer_state_dict=True, ignore_frozen_params=True)
    weights, state = get_state_dict(model, optimizer, options=options)
    for values in optimizer.state.values() if is_new else ():
        values["step"].zero_()  # torch fills a new optimizer's state by a step with lr = 0, and counts it
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    tensors = {f"model.{name}": weights[name] for name in names}
    tensors |= {f"average.{name}": average for name, average in zip(names, ema.average)}
    return tensors | {f"optimizer.{name}": value for name, value in state.items() if torch.is_tensor(value)}


def checkpoint_bytes(parameters: Iterable[nn.Parameter]) -> int:
    """Bytes of a checkpoint on the disk, all ranks together: each trained weight, two moments and the average."""
    return 4 * sum(p.numel() * p.itemsize for p in parameters if p.requires_grad)


# -------------------------------------------------------- Save -------------------------------------------------------
def save_checkpoint(folder: Path, state: TrainingState, progress: Progress, limit: int) -> None:
    """Writes checkpoint/ITERATION, keeps the newest `limit`; every rank raises BadInput if one of them cannot write."""
    part = folder / "checkpoint" / "part"
    try:
        run_on_rank0(lambda: check_not_removed(folder / "config.json"))
        run_on_rank0(lambda: shutil.rmtree(part, ignore_errors=True))
        tensors = training_tensors(state.model, state.optimizer, state.ema)
        writer = HuggingFaceStorageWriter(str(part), _file_numbers(tensors, FILE_BYTES), save_distributed=True)
        dcp.save(tensors, storage_writer=writer)
        files = sorted(part.glob("*.safetensors"))[rank() :: world_size()]
        run_on_all_ranks(lambda: fsync(*files))
        digests = ChainMap(*all_gather(run_on_all_ranks(lambda: {file.name: digest(file) for file in files})))
        content = asdict(progress) | {"generator": state.generator.get_state().tolist(), "digests": dict(digests)}
        run_on_rank0(lambda: _publish(folder, part, progress.iteration, content, limit))
    except (OSError, dcp.CheckpointException, RaisedOnAllRanks) as error:
        shutil.rmtree(part, ignore_errors=True)
        remedy = "the last checkpoint is good: free some space, then continue with --resume"
        raise BadInput(f"cannot write {part} ({_reason(error)}): {remedy}") from error


def _file_numbers(tensors: dict[str, Tensor], limit: int) -> dict[str, int]:
    """The number of each tensor's file, from 1, so that no rank's part of a file with several exceeds `limit` bytes."""
    numbers, number, size = {}, 1, 0
    for name, tensor in tensors.items():
        shard = _largest_shard(tensor)
        if size and size + shard > limit:
            number, size = number + 1, 0
        numbers[name], size = number, size + shard
    return numbers


def _largest_shard(tensor: Tensor) -> int:
    """Bytes of the largest shard of a tensor on any rank."""
    shape = list(tensor.shape)
    if isinstance(tensor, DTensor):
        for ranks, placement in zip(tensor.device_mesh.shape, tensor.placements):
            if placement.is_shard():
                shape[placement.dim] = -(-shape[placement.dim] // ranks)
    return math.prod(shape) * tensor.itemsize


def _publish(folder: Path, part: Path, iteration: int, content: dict[str, Any], limit: int) -> None:
    """Adds state.json, renames the finished checkpoint into place, removes the oldest ones."""
    text = json.dumps(content | {name: (folder / name).read_bytes().decode() for name in ("config.json", *LOGS)})
    (part / "state.json").write_text(f"{digest(text.encode())}\n{text}")
    fsync(part / "state.json", part)
    path = part.with_name(f"{iteration:06d}")
    shutil.rmtree(path, ignore_errors=True)  # exists only if it was damaged and the run resumed from an earlier one
    os.replace(part, path)
    fsync(part.parent)
    # A higher number is a damaged checkpoint, before which the run resumed: it does not count towards the limit.
    for old in [path for path in checkpoints(folder) if int(path.name) <= iteration][:-limit]:
        shutil.rmtree(old, ignore_errors=True)


def fsync(*paths: Path) -> None:
    """Flushes files and folders to the disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# -------------------------------------------------------- Load -------------------------------------------------------
def load_checkpoint(folder: Path, state: TrainingState, iterations: int) -> Progress:
    """Loads the newest undamaged checkpoint into `state` and restores the logs; returns the progress.

    Refuses a checkpoint with more than `iterations` behind it, before anything changes.
    """
    path, content = _newest_undamaged(folder)
    if (done := content["iteration"]) > iterations:
        raise RaisedOnAllRanks(f"iterations={iterations}, but the run has already done {done}: give more")
    try:
        tensors = training_tensors(state.model, state.optimizer, state.ema)
        reader = HuggingFaceStorageReader(str(path))
        reader.fs.ls = lambda _: [str(path / name) for name in content["digests"]]  # not what else lies there
        dcp.load(tensors, storage_reader=reader)
    except dcp.CheckpointException as error:
        raise RaisedOnAllRanks(f"{path} does not fit this model: {_reason(error)}") from error
    state.generator.set_state(torch.tensor(content["generator"], dtype=torch.uint8))
    for name in LOGS:
        run_on_rank0(lambda name=name: write_text(folder / name, content[name]))
    return Progress(**{name: content[name] for name in Progress.__dataclass_fields__})


def _newest_undamaged(folder: Path) -> tuple[Path, dict[str, Any]]:
    paths = checkpoints(folder)
    for path in reversed(paths):
        content, damages = _verify(path)
        if not damages:
            return path, content
        if rank() == 0:
            tqdm.write(f"{path} is damaged ({damages[0]}): loading the checkpoint before it")
    remedy = f"delete {folder} and start the run without --resume, or choose another --out"
    raise RaisedOnAllRanks(f"{folder} has no undamaged checkpoint among {len(paths)}: {remedy}")


def _verify(path: Path) -> tuple[dict[str, Any], list[str]]:
    """state.json of a checkpoint, and what is damaged in its files; each rank checks the digests of its share."""
    state, damage = {}, None
    try:
        expected, text = (path / "state.json").read_text().split("\n", 1)
        require(digest(text.encode()) == expected, "state.json is not what was written")
        state = json.loads(text)
        require(state["iteration"] == int(path.name), f"it is that of iteration {state['iteration']}")
        for name in sorted(state["digests"])[rank() :: world_size()]:
            require(digest(path / name) == state["digests"][name], f"{name} is not what was written")
    except (OSError, ValueError) as error:
        damage = one_line(error)
    return state, [text for text in all_gather(damage) if text is not None]


def _reason(error: Exception) -> str:
    """The message of an error on one line; a CheckpointException holds one error per failed rank, the first counts."""
    if isinstance(error, dcp.CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return one_line(error)
