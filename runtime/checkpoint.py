"""Checkpoints: weights, optimizer, average, progress and logs of a run as safetensors and JSON, never a pickle.

checkpoint/ITERATION is finished when it has state.json, which is written last, after all else is on the disk: so no
folder is renamed, which some disks cannot do.  state.json holds a digest of every file, so that a damaged checkpoint is
recognised; loading then uses the one before it.  Every rank calls these functions: each writes its own shards, file by
file, and any number of ranks can read them.
"""

import json
import math
import shutil
import time
import warnings
from collections import ChainMap
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from tqdm import tqdm

from leap_align import BadInput, require
from runtime.ema import EMA
from runtime.files import atomic_file, digest, disk_remedy, fsync, parse_json, write_errors_named, write_text
from runtime.processes import (
    RaisedOnAllRanks,
    StoppedBySignal,
    all_gather,
    free_host_memory,
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
FILE_BYTES = 2**29  # the most that a rank writes into one file and copies to the host, unless one tensor is larger


@dataclass
class Progress:
    """How far a run has come."""

    iteration: int = 0
    updates: int = 0  # of the weights: iterations that were not skipped
    seconds: float = 0.0  # of training, without evaluations
    checkpoint_seconds: float = 0.0  # for which training has stood still, without the wait before a restart
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
Parts = dict[str, tuple[Tensor, list[int]]]
"""What a rank writes into a file: by name, its part of a tensor and where that begins in the whole one."""


class Running(NamedTuple):
    """A checkpoint that is being written."""

    path: Path
    content: dict[str, Any]  # of its state.json, as of its iteration; the digests are added
    sizes: dict[str, int]  # values of each tensor, of all ranks together
    digests: Future[dict[str, str]]  # of this rank's files, by name, when they are on the disk


class Checkpoints(AbstractContextManager):
    """Writes checkpoint/ITERATION into a run's folder and keeps the newest `limit`; the context ends when all is done.

    is_async: `save` only copies what this rank writes to host memory, for a thread that writes it during training;
    the checkpoint is not finished before one of the later calls.  Where no memory is free for a copy, `save` waits.
    All ranks call each method equally often, and raise BadInput if one of them cannot write.  Each method returns the
    seconds that it took.
    """

    def __init__(self, folder: Path, state: TrainingState, limit: int, is_async: bool = False) -> None:
        self.folder, self.state, self.limit, self.is_async = folder, state, limit, is_async
        self.running: Running | None = None

    def save(self, progress: Progress) -> float:
        """Finishes the running checkpoint and begins one of the present state."""
        start = time.perf_counter()
        self.finish()
        folder, state, path = self.folder, self.state, self.folder / "checkpoint" / f"{progress.iteration:06d}"
        run_on_rank0(lambda: check_not_removed(folder / "config.json"))
        with _failures_of(path):
            run_on_rank0(lambda: _make_room(folder, path))
            logs = run_on_all_ranks(lambda: _read_logs(folder) if rank() == 0 else {})
            content = asdict(progress) | {"generator": state.generator.get_state().tolist()} | logs
            tensors = training_tensors(state.model, state.optimizer, state.ema)
            files, executor = _own_files(tensors), ThreadPoolExecutor(1)
            if is_async := self.is_async and _fits_in_memory(files):
                files = [{name: (part.to("cpu", copy=True), at) for name, (part, at) in file.items()} for file in files]
            sizes = {name: tensor.numel() for name, tensor in tensors.items()}
            self.running = Running(path, content, sizes, executor.submit(_write, path, files))
            executor.shutdown(wait=False)  # the thread ends when all is written
        if not is_async:
            self.finish()
        return time.perf_counter() - start

    def finish_if_written(self) -> float:
        """Finishes the running checkpoint if no rank has to wait for it."""
        return self.finish() if self.running and all(all_gather(self.running.digests.done())) else 0.0

    def finish(self) -> float:
        """Waits until the running checkpoint, if there is one, is written, and adds its state.json."""
        if self.running is None:
            return 0.0
        start = time.perf_counter()
        (path, content, sizes, written), self.running = self.running, None
        with _failures_of(path):
            digests = dict(ChainMap(*all_gather(run_on_all_ranks(written.result))))
            run_on_rank0(lambda: _check_complete(path, digests, sizes))
            run_on_rank0(lambda: _publish(path, content | {"digests": digests}, self.limit))
        return time.perf_counter() - start

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        # After an error of one rank alone the others do not come here.
        if kind is None or world_size() == 1 or issubclass(kind, RaisedOnAllRanks | StoppedBySignal):
            self.finish()


@contextmanager
def _failures_of(path: Path) -> Iterator[None]:
    """Removes a checkpoint that cannot be written, and says what to do."""
    try:
        yield
    except (OSError, RaisedOnAllRanks) as error:
        shutil.rmtree(path, ignore_errors=True)
        reason = one_line(error)
        raise BadInput(f"cannot write {path} ({reason}): {disk_remedy(reason)}, then continue with --resume") from error


def _make_room(folder: Path, path: Path) -> None:
    """Removes what runs that were killed left of checkpoints, and a damaged one in place of the new one."""
    finished = checkpoints(folder)
    for old in checkpoint_folders(folder):
        if old == path or old not in finished:
            shutil.rmtree(old, ignore_errors=True)


def _read_logs(folder: Path) -> dict[str, str]:
    """The texts of the settings and the logs."""
    return {name: (folder / name).read_bytes().decode() for name in ("config.json", *LOGS)}


def _own_files(tensors: dict[str, Tensor]) -> list[Parts]:
    """What this rank writes, file by file.  torch's planner has one rank write what several hold."""
    planner = dcp.DefaultSavePlanner()
    planner.set_up_planner(tensors, is_coordinator=rank() == 0)
    plans, _ = planner.create_global_plan(all_gather(planner.create_local_plan()))
    files, size = [], 0
    for item in plans[rank()].items:
        part = planner.resolve_data(item)
        if not files or size + part.nbytes > FILE_BYTES:
            files, size = [*files, {}], 0
        files[-1][item.index.fqn] = part, list(item.tensor_data.chunk.offsets)
        size += part.nbytes
    return files


def _fits_in_memory(files: list[Parts]) -> bool:
    """Whether each rank has host memory for a copy of what it writes; without it the system would kill the run."""
    size = sum(part.nbytes for file in files for part, _ in file.values())
    fits = all(all_gather(size < free_host_memory()))
    if not fits and rank() == 0:
        tqdm.write(
            f"too little host memory for a copy ({size / 1e9:.1f} GB a process): training waits for the checkpoint"
        )
    return fits


def _write(path: Path, files: list[Parts]) -> dict[str, str]:
    """Writes and flushes this rank's files; returns their digests by name.  Calls no other rank.

    The headers are those of HuggingFaceStorageWriter, which copies everything twice and needs six times as long.
    """
    path.mkdir(parents=True, exist_ok=True)
    digests = {}
    for number, parts in enumerate(files, 1):
        file = path / f"shard-{rank() + 1:05d}-{number:05d}-of-{len(files):05d}.safetensors"
        header = {"DCP_SHARDING_INFO": json.dumps({name: {"saved_offsets": at} for name, (_, at) in parts.items()})}
        with write_errors_named(file):
            save_file({name: part.cpu().contiguous() for name, (part, _) in parts.items()}, file, header)
        fsync(file)
        digests[file.name] = digest(file)
    return digests


def _publish(path: Path, content: dict[str, Any], limit: int) -> None:
    """Finishes a checkpoint by its state.json, then removes the oldest ones."""
    text = json.dumps(content)
    fsync(path)
    with atomic_file(path / "state.json") as temporary:
        temporary.write_text(f"{digest(text.encode())}\n{text}")
        fsync(temporary)
    fsync(path, path.parent)
    # A higher number is a damaged checkpoint, before which the run resumed: it does not count towards the limit.
    for old in [old for old in checkpoints(path.parent.parent) if int(old.name) <= content["iteration"]][:-limit]:
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
    run_on_rank0(lambda: _check_complete(path, digests, {name: tensor.numel() for name, tensor in tensors.items()}))
    return state


def _has_values(value: Any, kind: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(item, kind) for item in value.values())


def _is_evaluation(row: Any) -> bool:
    return _has_values(row, int | float) and {"iteration", "reward"} <= row.keys()


IS_RIGHT = {
    **dict.fromkeys(("iteration", "updates", "consecutive_skips"), lambda value: isinstance(value, int)),
    **dict.fromkeys(LOGS, lambda value: isinstance(value, str)),
    **dict.fromkeys(("seconds", "checkpoint_seconds"), lambda value: isinstance(value, float)),
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


def _check_complete(path: Path, names: Iterable[str], sizes: dict[str, int]) -> None:
    """Refuses files that do not hold so many values of each tensor: each rank has written its part."""
    try:
        saved = _reader(path, names).read_metadata().state_dict_metadata
    except SafetensorError as error:
        raise BadInput(f"{path} has a file that is not whole: {one_line(error)}") from error
    for name, size in sizes.items():
        values = sum(math.prod(chunk.sizes) for chunk in saved[name].chunks) if name in saved else 0
        require(values == size, f"its files hold {values} of the {size} values of {name}")


def _reason(error: Exception) -> str:
    """The message of an error on one line; a CheckpointException holds one error per failed rank, the first counts."""
    if isinstance(error, dcp.CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return one_line(error)
