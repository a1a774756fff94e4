"""One trainer for every task and every method.

    python train_leap_align.py                                     the 2-D toy with LeapAlign, from nothing
    python train_leap_align.py --task digits                       the same on 8x8 images of real digits
    python train_leap_align.py --method drtune --out runs/drtune   another method
    torchrun --nproc_per_node=2 train_leap_align.py                on two processes, to the same result
    python train_leap_align.py --task flux --help                  every flag of a task, here FLUX.1-dev

A run's folder holds config.json, metrics.csv (a row an iteration), evaluations.csv, result.json (the evaluators before
and after), the pictures, checkpoint/ and the aligned weights, an average over training (model/, transformer/ or lora/).
"""

import argparse
import csv
import hashlib
import json
import math
import os
import pkgutil
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, make_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Protocol

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import tyro
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm

from leap_align import METHODS, BadInput, BatchGenerator, Hyper, Velocity, differentiable, objective, uniform_times

TASKS = {
    "toy": "toy.modes:Modes",
    "digits": "toy.digits:Digits",
    "flux": "flux_adapter:Flux",
    "sd3": "flux_adapter:SD3",
}
"""Where each task lives; it is imported only when asked for."""


class Task(Protocol):
    """What the trainer asks of a task: a flow model, its prompts, a reward, evaluators.  Nothing of a method."""

    Options: type
    """A dataclass of the task's own flags; Task(options, T) builds the task on a grid of T steps."""
    how: frozenset[str]
    """The task's flags that change by what means it is computed, and not what."""
    held_out: dict[str, float]
    """The evaluators that training never sees, each with the change for the worse that is worth a warning."""
    model: nn.Module
    times: Tensor
    measured: dict[str, float]
    """What the last decoding found worth a column of the log; the names never change."""

    @classmethod
    def defaults(cls, reward: str | None) -> dict[str, Any]:
        """Fields of Config and Hyper that suit this task better than the general ones, given the flag --reward."""

    def place(self, mesh: DeviceMesh | None) -> None:
        """Puts the model where it is trained, sharded over the mesh; without one this process is alone."""

    def noise(self, n: int, generator: torch.Generator) -> Tensor:
        """x_T (n, *S)."""

    def conditions(self, n: int, generator: torch.Generator) -> Any:
        """n prompts, in whatever form; conditions[rows] are those of some samples."""

    def velocity(self, condition: Any) -> Velocity:
        """v_theta under these prompts."""

    def decode(self, x_0: Tensor) -> Tensor:
        """What the reward sees; differentiable."""

    def reward(self, sample: Tensor, condition: Any) -> Tensor:
        """(B,), with gradient to the sample."""

    def evaluate(self, folder: Path | None, iteration: int) -> dict[str, float]:
        """The evaluators, always on the same noise and prompts; `reward` and all of held_out among them.

        Every process calls it, the first with the run's folder, in which it leaves what the pictures need.
        """

    def draw(self, folder: Path) -> None:
        """Draws the pictures of a finished run in its folder; the first process calls it."""

    def save(self, folder: Path) -> None:
        """Writes the model into the run's folder; every process calls it."""

    def load(self, folder: Path) -> None:
        """Reads what `save` wrote."""


@dataclass(frozen=True)
class Config:
    """The run."""

    task: str = "toy"
    """Model and reward: toy, digits, flux (FLUX.1-dev) or sd3 (SD3.5-M)."""
    method: str = "leap_align"
    """How the reward's gradient reaches the model: leap_align, refl, draft_lv, drtune or full_backprop."""
    iterations: int = 300
    """Optimizer steps."""
    batch_size: int = 256
    """Samples an iteration, over all processes (B)."""
    accumulate: int = 1
    """Parts in which each process works through its share of the batch; more need less memory."""
    T: int = 25
    """Steps of a sampling run (T)."""
    lr: float = 1e-4
    """AdamW's learning rate (eta)."""
    weight_decay: float = 1e-4
    """AdamW's weight decay."""
    clip: float = 1.0
    """Greatest norm of the gradient, above which it is scaled down."""
    ema: float = 0.995
    """Decay of the averaged weights, which are what is evaluated and saved."""
    evaluate_every: int = 50
    """Iterations between evaluations."""
    checkpoint_every: int = 100
    """Iterations between checkpoints."""
    keep: int = 2
    """Checkpoints that are kept; an older one is what a damaged one is replaced with."""
    skips: int = 10
    """Steps in a row whose gradient may be broken, and left out, before the run stops."""
    seed: int = 0
    """Seed of noise, prompts and timesteps."""
    out: Path | None = None
    """The run's folder; runs/TASK-METHOD if not given."""
    resume: bool = False
    """Continue the run in this folder from its checkpoint."""


METRICS = ("loss", "reward", "grad_norm", "weight", "d_j", "d_0", "hinge_active", "i_k", "i_j", "seconds", "skipped")


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------


def lookup(kind: str, name: str, table: dict[str, Any]) -> Any:
    """table[name], or one line that lists what there is."""
    if name not in table:
        raise BadInput(f"unknown {kind} {name!r}: choose from {', '.join(table)}")
    return table[name]


def parse(arguments: list[str] | None) -> tuple[Config, Hyper, Any, type]:
    """The command line as configuration of run, method and task, and the task's class.

    The task is read first, for its own flags and defaults.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--task", default=Config.task)
    first.add_argument("--reward")
    known, _ = first.parse_known_args(arguments)
    task_class = pkgutil.resolve_name(lookup("task", known.task, TASKS))
    names = {f: cls for cls in (Config, Hyper) for f in cls.__dataclass_fields__}
    defaults = task_class.defaults(known.reward)
    own = {cls: {f: v for f, v in defaults.items() if names[f] is cls} for cls in (Config, Hyper)}
    groups = {
        "run": replace(Config(task=known.task), **own[Config]),
        "method": replace(Hyper(), **own[Hyper]),
        "task": task_class.Options(),
    }
    everything = make_dataclass("Flags", [(name, type(value), field(default=value)) for name, value in groups.items()])
    flags = tyro.cli(
        Annotated[everything, tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff],
        args=arguments,
        description=__doc__,
    )
    return flags.run, flags.method, flags.task, task_class


def check(config: Config, hyper: Hyper, world: int) -> None:
    """Refuses what cannot work before anything expensive is built."""
    method = lookup("method", config.method, METHODS)
    counts = ("batch_size", "accumulate", "evaluate_every", "checkpoint_every", "keep", "skips")
    for name, least in {**dict.fromkeys(counts, 1), "T": 2, "iterations": 0, "weight_decay": 0, "seed": 0}.items():
        if not least <= getattr(config, name) < 2**63:
            raise BadInput(f"{name}={getattr(config, name)} must be at least {least}")
    if not config.lr > 0 or not config.clip > 0 or not 0 <= config.ema < 1:
        raise BadInput(f"lr={config.lr} and clip={config.clip} must be positive, ema={config.ema} in [0, 1)")
    if config.batch_size % (world * config.accumulate):
        raise BadInput(
            f"batch_size={config.batch_size} must be a multiple of {world} processes x accumulate={config.accumulate}"
        )
    # The method itself says whether its hyperparameters suit T: a rehearsal with a model that costs nothing.
    rehearsal = method(
        lambda x, t: torch.zeros_like(x), torch.zeros(1, 1), uniform_times(config.T), hyper, torch.Generator()
    )
    for _ in rehearsal:
        pass


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


class EMA:
    """Exponential moving average of the parameters, in their own precision, which is float32."""

    def __init__(self, parameters: list[nn.Parameter], decay: float) -> None:
        self.parameters = parameters
        self.average = get_ema_multi_avg_fn(decay)
        with torch.no_grad():
            self.mean = [p.clone() for p in parameters]

    def update(self) -> None:
        """mean <- decay * mean + (1 - decay) * parameters."""
        self.average(self.mean, self.parameters, None)

    @contextmanager
    def swapped(self):
        """The model with the averaged weights, for as long as the context lasts."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for parameter, mean in zip(self.parameters, self.mean):
            kept = parameter.clone()
            parameter.copy_(mean)
            mean.copy_(kept)


class Run:
    """Everything that a run changes as it goes, and the steps that change it."""

    def __init__(self, config: Config, hyper: Hyper, task: Task, folder: Path) -> None:
        self.config, self.hyper, self.task, self.folder = config, hyper, task, folder
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.method = METHODS[config.method]
        self.parameters = [p for p in task.model.parameters() if p.requires_grad]
        if not self.parameters or any(p.dtype.itemsize < 4 for p in self.parameters):
            raise BadInput("what is trained must be there and float32: in bfloat16 a step of 1e-5 and the EMA are lost")
        # Fused: one pass over the weights instead of a dozen, each over a hundred small tensors or a copy of them all.
        decay = config.weight_decay
        self.optimizer = torch.optim.AdamW(self.parameters, lr=config.lr, weight_decay=decay, fused=True)
        self.ema = EMA(self.parameters, config.ema)
        self.generator = BatchGenerator()
        self.generator.manual_seed(config.seed)
        self.generator.size = config.batch_size
        self.iteration, self.evaluations, self.signs, self.seconds, self.skipped = 0, [], {}, 0.0, 0
        self.signal = 0

    def parts(self) -> list[slice]:
        """This process's rows of the batch, cut into `accumulate` parts."""
        n = self.config.batch_size // (self.world * self.config.accumulate)
        first = self.rank * self.config.accumulate
        return [slice(i * n, (i + 1) * n) for i in range(first, first + self.config.accumulate)]

    def step(self) -> dict[str, float]:
        """One iteration: draw the whole batch, work through this process's parts of it, take one optimizer step."""
        start, config, generator = time.perf_counter(), self.config, self.generator
        condition = self.task.conditions(config.batch_size, generator)
        x_T = self.task.noise(config.batch_size, generator)
        drawn, logs = generator.get_state(), []
        for rows in (parts := self.parts()):
            if isinstance(self.task.model, FSDPModule):
                self.task.model.set_requires_all_reduce(rows == parts[-1])  # between nodes once an iteration
            # Every part draws the same timesteps, as if it had gone through the method with all the others.
            generator.set_state(drawn)
            generator.rows = rows
            logs.append(self.backward(condition[rows], x_T[rows].to(self.task.times.device)))
        log = self.gathered(average(logs))
        log["grad_norm"] = self.descend(log["loss"])
        self.iteration += 1
        log |= {"seconds": time.perf_counter() - start, "skipped": float(self.skipped > 0)}
        self.seconds += log["seconds"]
        return log

    def backward(self, condition: Any, x_T: Tensor) -> dict[str, float]:
        """Adds the gradient of one part of the batch; returns what there is to log of it.

        The loss is the sum over the method's endpoints, as in Algorithm 1; the other figures are means over them.
        """
        lam, measured, logs = self.hyper.lam, {"loss": 0.0}, []

        def endpoints():
            velocity = self.task.velocity(condition)
            measured.update((yield from self.method(velocity, x_T, self.task.times, self.hyper, self.generator)))

        for x_0, weight in endpoints():
            reward = differentiable(self.task.reward(self.task.decode(x_0), condition), x_0)
            loss = objective(reward, weight, lam)
            (loss / self.config.accumulate).backward()
            active = 1.0 if lam is None else (reward < lam).float().mean().item()
            logs.append({"reward": reward.mean().item(), "weight": weight.mean().item(), "hinge_active": active})
            logs[-1] |= self.task.measured
            measured["loss"] += loss.item()
        return average(logs) | {name: torch.as_tensor(value).float().mean().item() for name, value in measured.items()}

    def descend(self, loss: float) -> float:
        """Clips the gradient and takes one step, unless loss or gradient is broken; returns its norm unclipped."""
        norm = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        value = whole(norm)
        # Both are those of the whole batch, so that all processes do the same.
        if math.isfinite(loss) and math.isfinite(value):
            if value > self.config.clip:  # else it would multiply every gradient by one
                nn.utils.clip_grads_with_norm_(self.parameters, self.config.clip, norm)
            self.optimizer.step()
            self.ema.update()
            self.skipped = 0
        else:
            self.skip(loss, value)
        self.optimizer.zero_grad()
        return value

    def skip(self, loss: float, norm: float) -> None:
        """Leaves a step out, says where its gradient broke, and gives up after too many in a row."""
        self.skipped += 1
        named = [(name, p.grad) for name, p in self.task.model.named_parameters() if p.grad is not None]
        hit = [name for name, grad in named if not math.isfinite(whole(torch.linalg.vector_norm(grad)))]
        where = f"loss {loss:.3g}, gradient {norm:.3g}, broken in {', '.join(hit[:3]) or 'no parameter'} ({len(hit)})"
        if self.rank == 0:
            tqdm.write(f"iteration {self.iteration + 1}: {where}: this step is left out")
        if self.skipped >= self.config.skips:
            raise BadInput(f"{self.skipped} steps in a row left out, now with {where}: lower lr or mend the reward")

    def gathered(self, log: dict[str, float]) -> dict[str, float]:
        """The mean of a log over all processes."""
        if self.world == 1:
            return log
        values = torch.tensor(list(log.values()), dtype=torch.float64, device=self.task.times.device)
        dist.all_reduce(values)
        return dict(zip(log, (values / self.world).tolist()))

    def evaluate(self) -> dict[str, float]:
        """Evaluates the averaged weights, notes it, and points out what looks like reward hacking."""
        with self.ema.swapped():
            figures = self.task.evaluate(self.folder if self.rank == 0 else None, self.iteration)
        if broken := [name for name, value in figures.items() if not math.isfinite(value)]:
            raise BadInput(f"{', '.join(broken)} not finite at iteration {self.iteration}: lower lr")
        self.evaluations.append({"iteration": self.iteration, **figures})
        if self.rank == 0:
            table = Table(self.folder / "evaluations.csv", tuple(figures), -1)
            for row in self.evaluations:
                table.add(row)
        signs = hacking_signs(self.evaluations, self.task.held_out)
        if self.rank == 0:
            for name, sign in signs.items():
                if name not in self.signs:
                    tqdm.write(sign)
        self.signs = signs
        return figures

    # Checkpoints

    def tensors(self) -> dict[str, Tensor]:
        """Weights, their average and the optimizer's state by name: the live ones, what is frozen left out."""
        options = StateDictOptions(flatten_optimizer_state_dict=True, ignore_frozen_params=True)
        model, optimizer = get_state_dict(self.task.model, self.optimizer, options=options)
        names = [name for name, p in self.task.model.named_parameters() if p.requires_grad]
        state = {f"model.{name}": model[name] for name in names}
        state |= {f"mean.{name}": mean for name, mean in zip(names, self.ema.mean)}
        return state | {f"optimizer.{name}": value for name, value in optimizer.items() if torch.is_tensor(value)}

    def save(self) -> None:
        """Writes checkpoint/ITERATION, whole or not at all; every process calls it, and writes its own shards."""
        part = self.folder / "checkpoint" / "part"
        try:
            agree(lambda: clear(part) if (self.folder / "config.json").exists() else gone(self.folder))
            writer = HuggingFaceStorageWriter(str(part), save_distributed=True)
            dcp.save(self.tensors(), storage_writer=writer)
            files = sorted(part.glob("*.safetensors"))[self.rank :: self.world]
            found = gather(together(lambda: sealed(files)))  # a disk that fails one process must not keep the others
            agree(lambda: self.finish(part, {name: value for part in found for name, value in part.items()}))
        except (OSError, dcp.CheckpointException) as error:
            raise BadInput(
                f"cannot write {part} ({reason(error)}): what was saved before is good, go on with --resume"
            ) from error

    def finish(self, part: Path, digests: dict[str, str]) -> None:
        """Adds state.json, and puts a checkpoint in its place by one rename; the oldest goes."""
        state = {name: getattr(self, name) for name in PROGRESS}
        state |= {"generator": self.generator.get_state().tolist(), "digests": digests}
        state |= {name: (self.folder / name).read_text() for name in ("config.json", *LOGS)}
        text = json.dumps(state)
        (part / "state.json").write_text(f"{hashlib.blake2b(text.encode()).hexdigest()}\n{text}")
        flush(part / "state.json", part)
        folder = part.with_name(f"{self.iteration:06d}")
        clear(folder)  # there only if it was found damaged, and the run went back behind it
        os.replace(part, folder)
        flush(part.parent)
        clear(*checkpoints(self.folder)[: -self.config.keep])

    def restore(self) -> None:
        """Reads the newest checkpoint that is whole, on any number of processes."""
        found = checkpoints(self.folder)
        for folder in reversed(found):
            state = verified(folder, self.rank, self.world)
            if not isinstance(state, str):
                break
            if self.rank == 0:
                tqdm.write(f"{folder} is damaged ({state}): going back to the one before")
        else:
            raise BadInput(f"{self.folder} has no whole checkpoint among {len(found)}: start the run without --resume")
        try:
            reader = HuggingFaceStorageReader(str(folder))
            dcp.load(self.tensors(), storage_reader=reader)
        except dcp.CheckpointException as error:
            raise BadInput(f"{folder} does not fit this model: {reason(error)}") from error
        self.generator.set_state(torch.tensor(state["generator"], dtype=torch.uint8))
        for name in PROGRESS:
            setattr(self, name, state[name])
        agree(lambda: [write(self.folder / name, partial(Path.write_text, data=state[name])) for name in LOGS])
        if self.iteration > self.config.iterations:
            raise BadInput(f"iterations={self.config.iterations}, but the run has {self.iteration} behind it already")


warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # a single process saves as well
PROGRESS = ("iteration", "evaluations", "signs", "seconds", "skipped")
LOGS = ("metrics.csv", "evaluations.csv")


def average(logs: list[dict[str, float]]) -> dict[str, float]:
    """The mean of each entry over several logs with the same entries."""
    return {name: sum(log[name] for log in logs) / len(logs) for name in logs[0]}


def hacking_signs(evaluations: list[dict[str, float]], held_out: dict[str, float]) -> dict[str, str]:
    """Held-out evaluators that got worse than at their best while the reward rose: name -> what happened.

    held_out: the change of each that counts, positive where higher is better.
    """
    now, signs = evaluations[-1], {}
    for name, change in held_out.items():
        sign = math.copysign(1, change)
        best = max(evaluations, key=lambda row: sign * row[name])
        if now["reward"] > best["reward"] and sign * (best[name] - now[name]) > abs(change):
            signs[name] = (
                f"a sign of reward hacking, iteration {best['iteration']} -> {now['iteration']}: "
                f"reward {best['reward']:.3g} -> {now['reward']:.3g}, but {name} {best[name]:.3g} -> {now[name]:.3g}"
            )
    return signs


# ---------------------------------------------------------------------------------------------------------------------
# The run's folder
# ---------------------------------------------------------------------------------------------------------------------


def write(path: Path, fill: Callable[[Path], Any]) -> None:
    """fill(a file beside path), then renames that to path: a reader finds the old or the new, never half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    fill(part)
    os.replace(part, path)


def clear(*folders: Path) -> None:
    """Removes folders, and all that is in them."""
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def gone(folder: Path) -> None:
    """Refuses to make up a folder that somebody has removed."""
    raise BadInput(f"{folder} is gone: somebody removed the run's folder while it ran")


def flush(*paths: Path) -> None:
    """Has files and folders written through to the disk."""
    for path in paths:
        number = os.open(path, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, the newest last."""
    return sorted((folder / "checkpoint").glob("[0-9]*"), key=lambda path: int(path.name))


def sealed(files: list[Path]) -> dict[str, str]:
    """The digest of each file by its name, once it is on the disk."""
    flush(*files)
    return {file.name: digest(file) for file in files}


def digest(file: Path) -> str:
    """What tells a file from a damaged copy of it."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "blake2b").hexdigest()


def verified(folder: Path, rank: int, world: int) -> dict[str, Any] | str:
    """state.json of a checkpoint that is what was written, else what is wrong with it; each process reads its share."""
    fault = None
    try:
        told, text = (folder / "state.json").read_text().split("\n", 1)
        if hashlib.blake2b(text.encode()).hexdigest() != told:
            raise ValueError("state.json is not what was written")
        state = json.loads(text)
        for name in sorted(state["digests"])[rank::world]:
            if digest(folder / name) != state["digests"][name]:
                raise ValueError(f"{name} is not what was written")
    except (OSError, ValueError) as error:
        fault = reason(error)
    return next((fault for fault in gather(fault) if fault), None) or state


def reason(error: Exception) -> str:
    """What an error says, on one line of bearable length; of several processes' errors the first."""
    if isinstance(error, dcp.CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return f"{getattr(error, 'strerror', None) or ' '.join(str(error).split()):.200}"


HOW = {"iterations", "accumulate", "evaluate_every", "checkpoint_every", "keep", "skips", "out", "resume"}
"""Flags that say how far or by what means a run is computed, and not what: these may change when it goes on."""


def shared(folder: Path) -> None:
    """Refuses a folder that the nodes do not share: each would write its part of a checkpoint on a disk of its own."""
    if not (folder / "config.json").exists():
        raise BadInput(f"{folder} is not the same on every node: give an --out on a disk that all of them see")


def claim(folder: Path, settings: dict[str, Any], resume: bool, how: frozenset[str] = frozenset()) -> None:
    """Makes the folder this run's own; refuses one with another run, or to resume under other settings.

    how: the task's flags that may change nevertheless.  What stopped before its first checkpoint may be started over.
    """
    path = folder / "config.json"
    if resume:
        if not path.exists():
            raise BadInput(f"{path} does not exist: nothing to resume; start the run without --resume")
        try:
            old = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise BadInput(f"{path} is damaged ({error}): nothing to compare the settings with") from error
        compared = settings.keys() - HOW - how
        changed = sorted(name for name in compared if old.get(name) != settings[name])
        if changed:
            changes = "; ".join(f"{name} was {old.get(name)}, is {settings[name]}" for name in changed)
            raise BadInput(f"{folder} was run under other settings: {changes}")
    elif checkpoints(folder) or (folder / "result.json").exists():
        raise BadInput(
            f"{folder} holds another run: choose another folder with --out, continue with --resume, or delete it"
        )
    try:
        write(path, lambda part: part.write_text(json.dumps(settings, indent=2) + "\n"))
    except OSError as error:
        raise BadInput(f"cannot write to {folder} ({error.strerror}): choose another folder with --out") from error


class Table:
    """A CSV file, a row a call; a resumed run drops the rows that come after its checkpoint."""

    def __init__(self, path: Path, columns: tuple[str, ...], iteration: int) -> None:
        self.path, rows = path, []
        if path.exists():
            with path.open(newline="") as file:
                rows = [row for row in csv.DictReader(file) if int(row["iteration"]) <= iteration]
        self.file = path.open("w", newline="")
        self.writer = csv.DictWriter(self.file, ("iteration", *columns), restval="")
        self.writer.writeheader()
        self.writer.writerows(rows)

    def add(self, row: dict[str, float]) -> None:
        """Writes one row; columns that a method has no value for stay empty."""
        if not self.path.exists():
            gone(self.path)
        self.writer.writerow({name: row[name] for name in self.writer.fieldnames if name in row})
        self.file.flush()


def curves(folder: Path, rows: list[dict[str, str]], evaluations: list[dict[str, float]]) -> None:
    """curves.png: the reward while training, then each evaluator; dots are evaluations of the averaged weights."""
    names = [name for name in evaluations[0] if name != "iteration"]
    figure = Figure(figsize=(2.8 * len(names), 2.6), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names):
        if name == "reward":
            axis.plot([int(r["iteration"]) for r in rows], [float(r["reward"]) for r in rows], "C7", lw=0.7, alpha=0.7)
        axis.plot([e["iteration"] for e in evaluations], [e[name] for e in evaluations], "C3o-", ms=3)
        axis.set(title=name + (" (trained on)" if name == "reward" else " (held out)"), xlabel="iteration")
        axis.grid(alpha=0.3)
    write(folder / "curves.png", lambda path: figure.savefig(path, dpi=120, format="png"))


def report(run: Run) -> None:
    """result.json and the pictures, and the evaluators before and after on the screen."""
    before, after = run.evaluations[0], run.evaluations[-1]
    figures = [{name: value for name, value in row.items() if name != "iteration"} for row in (before, after)]
    result = {"before": figures[0], "after": figures[1], "seconds": run.seconds, "signs": list(run.signs.values())}
    write(run.folder / "result.json", lambda part: part.write_text(json.dumps(result, indent=2) + "\n"))
    with (run.folder / "metrics.csv").open(newline="") as file:
        curves(run.folder, list(csv.DictReader(file)), run.evaluations)
    run.task.draw(run.folder)
    print(f"{'':14}{'before':>10}{'after':>10}")
    for name in figures[0]:
        print(f"{name:14}{figures[0][name]:10.3f}{figures[1][name]:10.3f}")
    for sign in run.signs.values():
        print(sign)
    print(f"{run.seconds:.1f} s of training; pictures, metrics and weights are in {run.folder}")


# ---------------------------------------------------------------------------------------------------------------------
# The main program
# ---------------------------------------------------------------------------------------------------------------------


def build(config: Config, hyper: Hyper, options: Any, task_class: type) -> Run:
    """Task, model and run; on several processes the model is sharded over them (FSDP2)."""
    task = together(lambda: task_class(options, config.T))
    task.place(device_mesh(task.times.device.type) if dist.is_initialized() else None)
    return Run(config, hyper, task, config.out)


def device_mesh(device: str) -> DeviceMesh:
    """All processes; on several nodes sharded within a node and replicated across (HSDP), where links are slow."""
    world, local = dist.get_world_size(), int(os.environ["LOCAL_WORLD_SIZE"])
    if world == local:
        return init_device_mesh(device, (world,))
    return init_device_mesh(device, (world // local, local), mesh_dim_names=("replicate", "shard"))


class Stopped(Exception):
    """A signal asked the run to stop, and it has: everything is saved."""


@contextmanager
def heeding_signals(run: Run):
    """SIGINT and SIGTERM stop the run after its iteration; the same signal once more ends the process at once."""

    def ask(number: int, frame: Any) -> None:
        run.signal = number
        signal.signal(number, signal.SIG_DFL)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train(run: Run) -> None:
    """Evaluates, then iterates, evaluating and saving as often as the configuration says."""
    config = run.config
    if config.resume:
        run.restore()
    else:
        run.evaluate()
    columns = (*METRICS, *run.task.measured)
    table = Table(run.folder / "metrics.csv", columns, run.iteration) if run.rank == 0 else None
    start = run.iteration
    bar = tqdm(
        range(start, config.iterations), config.method, total=config.iterations, initial=start, disable=run.rank > 0
    )
    for _ in bar:
        row = run.step()
        if table:
            table.add({"iteration": run.iteration, **row})
        last = run.iteration == config.iterations
        if run.iteration % config.evaluate_every == 0 or last:
            run.evaluate()
        stop = max(gather(run.signal))
        if run.iteration % config.checkpoint_every == 0 or last or stop:
            run.save()
        if stop and not last:
            raise Stopped(stop)
        shown = {name: f"{run.evaluations[-1][name]:.3f}" for name in list(run.task.held_out)[:2]}
        bar.set_postfix(reward=f"{row['reward']:.3f}", grad=f"{row['grad_norm']:.2g}", **shown)
    with run.ema.swapped():
        run.task.save(run.folder)


def gather(value: Any) -> list[Any]:
    """The value of every process, on every process."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def whole(norm: Tensor) -> float:
    """A norm as a number, whether or not its tensor is sharded."""
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()


def together(action: Callable[[], Any]) -> Any:
    """action() on every process, and its result; where it refuses on one of them, all refuse with the same line."""
    result, refusal = None, None
    try:
        result = action()
    except BadInput as error:
        refusal = str(error)
    except OSError as error:
        refusal = f"{error.filename or 'a file'}: {reason(error)}"
    if refusal := next((told for told in gather(refusal) if told), None):
        raise Agreed(refusal)
    return result


def agree(action: Callable[[], Any]) -> None:
    """action() on the first process; where that refuses, all do."""
    together(action if not dist.is_initialized() or dist.get_rank() == 0 else lambda: None)


class Agreed(BadInput):
    """What all processes refuse, so that one of them has to say it."""


def leave(error: BaseException | None) -> None:
    """Ends the process with what there is to say, told by the first process or by the only one that knows.

    Under torchrun at once: taking the process group down would wait for processes that wait for this one, and
    gloo's threads abort the interpreter's own way out now and then (SIGABRT).
    """
    alone, rank = not dist.is_torchelastic_launched(), int(os.environ.get("RANK", 0))
    status = 0 if error is None else 1
    if isinstance(error, Stopped):
        (number,) = error.args
        status, line = 128 + number, f"stopped by {signal.Signals(number).name}, all is saved: go on with --resume"
    elif error is not None:
        line = f"error: {explained(error)}"
    if alone:
        if isinstance(error, Stopped):
            print(line, file=sys.stderr)
        return sys.exit(status if status != 1 else line) if status else None
    if status and (rank == 0 or not isinstance(error, Agreed | Stopped)):
        print(line if rank == 0 else f"{line} (process {rank})", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def explained(error: BaseException) -> str:
    """One line for an error that a user can do something about; any other is raised again."""
    good = "what was saved before is good, go on with --resume"
    if isinstance(error, BadInput):
        return str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return f"out of GPU memory ({reason(error):.80}): raise --accumulate, or see the README for what else helps"
    if isinstance(error, OSError):
        return f"{error.filename or 'a file'}: {reason(error)}; {good}"
    if isinstance(error, KeyboardInterrupt):
        return f"interrupted; {good}, or start over if there is nothing yet"
    if dist.is_initialized() and (isinstance(error, dist.DistError) or "gloo" in str(error)):
        return f"lost another process ({reason(error):.80}); {good}"
    raise error


def main(arguments: list[str] | None = None) -> None:
    """Parses, checks, trains, reports; under torchrun on every process."""
    error = None
    try:
        config, hyper, options, task_class = parse(arguments)
        if dist.is_torchelastic_launched():
            dist.init_process_group()
        agree(lambda: check(config, hyper, dist.get_world_size() if dist.is_initialized() else 1))
        config = replace(config, out=config.out or Path("runs") / f"{config.task}-{config.method}")
        settings = {**asdict(config), **asdict(hyper), **asdict(options)}
        settings = json.loads(json.dumps(settings, default=str))  # paths and tuples as config.json will hold them
        agree(lambda: claim(config.out, settings, config.resume, task_class.how))
        together(lambda: shared(config.out))
        run = build(config, hyper, options, task_class)
        with heeding_signals(run):
            train(run)
        # All wait for the first one's report, for torchrun ends every process as soon as one has failed.
        agree(lambda: report(run))
    except (BadInput, Stopped, OSError, RuntimeError, KeyboardInterrupt) as caught:
        error = caught
    if error is not None and dist.is_torchelastic_launched():
        leave(error)
    if dist.is_initialized():
        dist.destroy_process_group()
    leave(error)


if __name__ == "__main__":
    main()
