"""Checkpoints: weights, optimizer, average, progress and logs of a run as safetensors and JSON, never a pickle.

checkpoint/ITERATION is finished when it has state.json, which is written last, after all else is on the disk: so no
folder is renamed, which some disks cannot do.  state.json holds a digest of every file, so that a damaged checkpoint is
recognised; loading then uses the one before it.  Every rank calls these functions: each writes its own shards, file by
file, and any number of ranks can read them.
"""

import json
import math
import shutil
import warnings
from collections import ChainMap
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from leap_align import BadInput, require
from runtime.ema import EMA
from runtime.files import atomic_file, digest, disk_remedy, fsync, parse_json, write_text
from runtime.processes import (
    RaisedOnAllRanks,
    all_gather,
    one_line,
    printable,
    rank,
    run_on_all_ranks,
    run_on_rank0,
    world_size,
)
from runtime.run_dir import check_not_removed, checkpoint_folders, checkpoints

warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # a single process saves as well
LOGS = ("metrics.csv", "evaluations.csv")
FILE_BYTES = 2**29  # the most that a rank writes into one file, unless a single tensor is larger
HOST_BYTES = 3 * FILE_BYTES  # host memory of a rank: a file's tensors, and the file twice while safetensors makes it


@dataclass
class Progress:
    """How far a run has come."""

    iteration: int = 0
    updates: int = 0  # of the weights: iterations that were not skipped
    seconds: float = 0.0  # of training, without evaluations
    evaluations: list[dict[str, float]] = field(default_factory=list)
    warnings: dict[str, str] = field(default_factory=dict)  # those of reward hacking that hold now, by evaluator
    consecutive_skips: int = 0  # iterations skipped in a row, up to now
    changes: list[dict[str, Any]] = field(default_factory=list)  # of settings on --resume


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
    path = folder / "checkpoint" / f"{progress.iteration:06d}"
    run_on_rank0(lambda: check_not_removed(folder / "config.json"))
    try:
        run_on_rank0(lambda: _make_room(folder, path))
        tensors = training_tensors(state.model, state.optimizer, state.ema)
        writer = HuggingFaceStorageWriter(str(path), _file_numbers(tensors, FILE_BYTES), save_distributed=True)
        writer.sync_files = False  # `fsync` below also serves disks that cannot
        dcp.save(tensors, storage_writer=writer)
        files = sorted(path.glob(f"shard-{rank() + 1:05d}-*.safetensors"))  # what this rank has written
        run_on_all_ranks(lambda: fsync(*files))
        digests = ChainMap(*all_gather(run_on_all_ranks(lambda: {file.name: digest(file) for file in files})))
        content = asdict(progress) | {"generator": state.generator.get_state().tolist(), "digests": dict(digests)}
        run_on_rank0(lambda: _check_complete(path, digests, tensors))
        run_on_rank0(lambda: _publish(folder, path, content, limit))
    except (OSError, dcp.CheckpointException, RaisedOnAllRanks) as error:
        shutil.rmtree(path, ignore_errors=True)
        reason = _reason(error)
        raise BadInput(f"cannot write {path} ({reason}): {disk_remedy(reason)}, then continue with --resume") from error


def _make_room(folder: Path, path: Path) -> None:
    """Removes what runs that were killed left of checkpoints, and a damaged one in place of the new one."""
    finished = checkpoints(folder)
    for old in checkpoint_folders(folder):
        if old == path or old not in finished:
            shutil.rmtree(old, ignore_errors=True)


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


def _publish(folder: Path, path: Path, content: dict[str, Any], limit: int) -> None:
    """Finishes a checkpoint by its state.json, then removes the oldest ones."""
    text = json.dumps(content | {name: (folder / name).read_bytes().decode() for name in ("config.json", *LOGS)})
    fsync(path)
    with atomic_file(path / "state.json") as temporary:
        temporary.write_text(f"{digest(text.encode())}\n{text}")
        fsync(temporary)
    fsync(path, path.parent)
    # A higher number is a damaged checkpoint, before which the run resumed: it does not count towards the limit.
    for old in [old for old in checkpoints(folder) if int(old.name) <= content["iteration"]][:-limit]:
        shutil.rmtree(old, ignore_errors=True)


# -------------------------------------------------------- Load -------------------------------------------------------
def load_checkpoint(folder: Path, state: TrainingState, iterations: int) -> tuple[Progress, dict[str, Any]]:
    """Loads the newest undamaged checkpoint into `state`, restores the logs; returns progress and settings (JSON).

    Refuses a checkpoint with more than `iterations` behind it, before anything changes.
    """
    tensors = training_tensors(state.model, state.optimizer, state.ema)
    path, content = _newest_undamaged(folder, tensors)
    if (done := content["iteration"]) > iterations:
        raise RaisedOnAllRanks(f"iterations={iterations}, but the run has already done {done}: give more")
    _load(path, content, tensors)
    state.generator.set_state(torch.tensor(content["generator"], dtype=torch.uint8))
    for name in LOGS:
        run_on_rank0(lambda name=name: write_text(folder / name, content[name]))
    progress = Progress(**{name: content[name] for name in Progress.__dataclass_fields__})
    return progress, parse_json(content["config.json"])


def load_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Loads some of the `training_tensors` in one checkpoint by their names; refuses a damaged one."""
    try:
        state = _verified_state(path, tensors)
    except RaisedOnAllRanks as error:
        raise RaisedOnAllRanks(f"{path} is damaged ({error}): choose another checkpoint") from error
    _load(path, state, tensors)


def _load(path: Path, content: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    try:
        dcp.load(tensors, storage_reader=_reader(path, content["digests"]))
    except dcp.CheckpointException as error:
        raise RaisedOnAllRanks(f"{path} does not fit this model: {_reason(error)}") from error


def _reader(path: Path, names: Iterable[str]) -> HuggingFaceStorageReader:
    """Reads these files of a checkpoint, and not what else lies there."""
    reader = HuggingFaceStorageReader(str(path))
    reader.fs.ls = lambda _: [str(path / name) for name in names]
    return reader


def _newest_undamaged(folder: Path, tensors: dict[str, Tensor]) -> tuple[Path, dict[str, Any]]:
    paths = checkpoint_folders(folder)
    for path in reversed(paths):
        try:
            return path, _verified_state(path, tensors)
        except RaisedOnAllRanks as error:
            if rank() == 0:
                tqdm.write(f"{printable(path)} is damaged ({error}): loading the checkpoint before it")
    remedy = f"delete {folder} and start the run without --resume, or choose another --out"
    raise RaisedOnAllRanks(f"{folder} has no undamaged checkpoint among {len(paths)}: {remedy}")


def _verified_state(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """state.json of a checkpoint; refuses a damaged one.  Each rank checks the digests of its share of the files."""
    state = run_on_all_ranks(lambda: _read_state(path))
    digests = state["digests"]
    for_this_rank = sorted(digests)[rank() :: world_size()]
    changed = run_on_all_ranks(lambda: [name for name in for_this_rank if digest(path / name) != digests[name]])
    run_on_all_ranks(lambda: require(not changed, f"{', '.join(changed)} is not what was written"))
    run_on_rank0(lambda: _check_complete(path, digests, tensors))
    return state


def _has_values(value: Any, kind: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(item, kind) for item in value.values())


def _is_evaluation(row: Any) -> bool:
    return _has_values(row, int | float) and {"iteration", "reward"} <= row.keys()


IS_RIGHT = {
    **dict.fromkeys(("iteration", "updates", "consecutive_skips"), lambda value: isinstance(value, int)),
    **dict.fromkeys(LOGS, lambda value: isinstance(value, str)),
    "seconds": lambda value: isinstance(value, float),
    "evaluations": lambda value: isinstance(value, list) and all(map(_is_evaluation, value)),
    "warnings": lambda value: _has_values(value, str),
    "changes": lambda value: isinstance(value, list) and all(isinstance(row, dict) for row in value),
    "config.json": lambda value: isinstance(parse_json(value), dict),
    "digests": lambda value: _has_values(value, str) and all(Path(name).name == name for name in value),
    "generator": lambda value: [torch.Generator().set_state(torch.tensor(value, dtype=torch.uint8))],
}
"""Checks of what is read from state.json; each returns a false value or raises."""


def _read_state(path: Path) -> dict[str, Any]:
    """The content of state.json; refuses what no run has written, even under a right digest."""
    require((path / "state.json").exists(), "it is not finished")
    try:
        expected, text = (path / "state.json").read_text(encoding="utf-8").split("\n", 1)
        require(digest(text.encode()) == expected, "the digest is another")
        state = parse_json(text)
        wrong = ", ".join(name for name, is_right in IS_RIGHT.items() if not is_right(state[name]))
        require(not wrong, f"{wrong} of a wrong type")
    except (LookupError, TypeError, ValueError, RuntimeError) as error:
        raise BadInput(f"state.json is not what was written: {one_line(error)}") from error
    require(state["iteration"] == int(path.name), f"it is that of iteration {state['iteration']}")
    return state


def _check_complete(path: Path, names: Iterable[str], tensors: dict[str, Tensor]) -> None:
    """Refuses files of a checkpoint that do not hold every value of each tensor once: each rank wrote its shards."""
    try:
        saved = _reader(path, names).read_metadata().state_dict_metadata
    except SafetensorError as error:
        raise BadInput(f"{path} has a file that is not whole: {one_line(error)}") from error
    for name, tensor in tensors.items():
        values = sum(math.prod(chunk.sizes) for chunk in saved[name].chunks) if name in saved else 0
        require(values == tensor.numel(), f"its files hold {values} of the {tensor.numel()} values of {name}")


def _reason(error: Exception) -> str:
    """The message of an error on one line; a CheckpointException holds one error per failed rank, the first counts."""
    if isinstance(error, dcp.CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return one_line(error)
