"""What a training step costs, beside what it must cost: operations, memory, time, and where the main job's time goes.

    python -m toy.benchmark                                     everything, about ten minutes on two cores
    python -m toy.benchmark --tasks digits --parts flops time   some of it

The floor.  A LeapAlign step needs T evaluations of the velocity network and the backward of two of them: of the one at
k to the weights alone, for x_k is a constant, of the one at j to its input x_j as well.  With F the operations of a
forward and B, B+x those of the two backwards, floor = T F + B + B+x: about (T + 4) F, as a backward is two forwards
less the first layer's gradient to its input.  It is counted on single calls, without a method and without checkpoints.

The bare step.  A loop written by hand that calls the models as often and in the same shapes, and does nothing else:
prompts encoded, T velocities, two of them differentiated, decode, reward, one backward.  No noise is drawn, no weight
is changed.  The trainer holds FLUX and SD3.5 under FSDP2; the bare step is timed on that and on the plain model.

    flops.csv    operations by torch's FlopCounterMode, which counts matrix products and convolutions (attention as its
                 products), exactly: of the network over the floor, and of everything over the bare step
    memory.csv   bytes saved for backward against T: exact, each storage once, no weights
    time.csv     milliseconds of the trainer's step and of the bare step, in turns, on one thread; median of the ratios
    shares.csv   where the seconds of a step go
    job.csv      where the seconds of `python train_leap_align.py` go, at first and with the networks in the cache
    gpu.csv      FLUX.1-dev's architecture with random weights at 720 px: only where CUDA is found

A table that is measured again is written anew: give another --out to keep both.
"""

import io
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import tyro
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import train_leap_align as trainer
from leap_align import (
    METHODS,
    BadInput,
    Endpoints,
    Hyper,
    Velocity,
)
from toy import learn
from toy.cost_chart import JOB, SHARES, Row, draw
from toy.probe import finish, seeded
from toy.report import markdown, write_csv
from toy.variants import changed

TINY = {"flux": (), "sd3": ("--sd3",)}
TASKS = ("toy", "digits", *TINY)
GRIDS = (10, 25, 50, 100)
PROMPTS = "a red cube\ntwo dogs on a beach\n"


@dataclass(frozen=True)
class Options:
    """What to measure, and where to write it."""

    out: Path = Path("runs/benchmark")
    """Folder for the tables (CSV) and the figure."""
    tasks: tuple[str, ...] = TASKS
    """Some of toy, digits, flux and sd3; the last two are tiny random pipelines and need diffusers."""
    parts: tuple[str, ...] = ("flops", "memory", "time", "job", "gpu")
    """Some of flops, memory, time (with shares), job and gpu."""
    seconds: float = 60.0
    """How long each task's step is timed against its bare step."""


# ---------------------------------------------------------------------------------------------------------------------
# What is measured
# ---------------------------------------------------------------------------------------------------------------------


def start(name: str, folder: Path, *flags: str) -> trainer.Run:
    """A run of the trainer as from the command line, ready to step; the tiny pipelines lie in the folder."""
    if dist.is_initialized():
        dist.destroy_process_group()
    arguments = ["--task", name]
    if name in TINY:
        model = folder / name
        arguments += ["--model", str(model), "--reward-weights", str(model / "reward")]
        arguments += ["--prompts", str(folder / "prompts.txt")]
        arguments += ["--height", "64", "--width", "64", "--batch-size", "4"]
    run = trainer.build(*trainer.parse([*arguments, *flags]))
    run.generator.rows = run.parts()[0]
    torch.set_num_threads(1)
    return run


def label(name: str) -> str:
    """A task's name in tables and figure: nobody shall take a tiny pipeline's figures for FLUX's."""
    return f"tiny {name}" if name in TINY else name


def make_tiny(names: list[str], folder: Path) -> None:
    """The tiny pipelines that the tasks need, as `flux_adapter.py tiny` writes them."""
    (folder / "prompts.txt").write_text(PROMPTS)
    for name in names:
        import diffusers

        import flux_adapter

        diffusers.utils.logging.disable_progress_bar()
        with redirect_stdout(io.StringIO()):
            flux_adapter.tiny(folder / name, *map(bool, TINY[name]))


def batch(run: trainer.Run) -> tuple[Any, Tensor]:
    """Prompts and noise of a step, as the trainer draws them."""
    n, task = run.config.batch_size, run.task
    return task.conditions(n, run.generator), task.noise(n, run.generator).to(task.times.device)


def bare_step(task: trainer.Task, condition: Any, x: Tensor) -> None:
    """The calls of a LeapAlign step by hand, at the middle pair; the values are only about those of a rollout."""
    velocity, T = task.velocity(condition), len(task.times) - 1
    graph, first = 0.0, max(2, round(0.8 * T))
    second = max(1, first // 2)
    for i, length in zip(range(T, 0, -1), task.times.diff().flip(0).tolist()):
        with torch.set_grad_enabled(i in (first, second)):
            v = velocity(x + graph if i == second else x, task.times[i])
        if i in (first, second):
            graph = graph + 1e-3 * v
        with torch.no_grad():
            x = x - length * v
    task.reward(task.decode(x + graph), condition).mean().backward()


TWO_PASSES = changed
"""LeapAlign as its published pseudo-code has it, a rollout first, then both leaps' velocities once more: what the
ablations change a part of, here with none changed."""


# ---------------------------------------------------------------------------------------------------------------------
# Operations
# ---------------------------------------------------------------------------------------------------------------------


def flops(action: Callable[[], object]) -> int:
    """Floating-point operations of action(): matrix products and convolutions, a multiply-add being two."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # fused attention is not counted
        action()
    return counter.get_total_flops()


def floor(velocity: Velocity, x: Tensor, times: Tensor) -> int:
    """T forwards, a backward to the weights, and one to weights and input, each counted on a single call."""
    t = times[1]

    def backward(x: Tensor) -> int:
        return flops(lambda: velocity(x, t).sum().backward()) - forward

    forward = flops(lambda: velocity(x, t))
    return (len(times) - 1) * forward + backward(x) + backward(x.clone().requires_grad_())


def network_flops(
    method: Callable[..., Endpoints], velocity: Velocity, x: Tensor, times: Tensor, hyper: Hyper, seed: int
) -> int:
    """A method's operations in the velocity network alone: the reward is a sum."""

    def step() -> None:
        for x_0, _ in method(velocity, x, times, hyper, seeded(seed)):
            x_0.sum().backward()

    return flops(step)


def typical(method: Callable[..., Endpoints], times: Tensor, hyper: Hyper) -> list[int]:
    """Seeds of draws whose operations have the mean of all draws'.

    Operations are linear in the early stop i_min, uniform over 1..m, so that its middle stands for all (m odd);
    every start s of DRTune is taken, for it decides how many of the trained timesteps are run.
    """
    found, middle = {}, (1 + hyper.m) // 2
    for seed in range(2000):
        _, drawn = finish(method(lambda x, t: 0 * x, torch.zeros(1, 1), times, hyper, seeded(seed)))
        if "i_min" not in drawn:  # every draw costs the same
            return [seed]
        if drawn["i_min"] == middle:
            found.setdefault(drawn.get("s"), seed)
    return list(found.values())


def count(name: str, folder: Path) -> list[Row]:
    """Operations of each method over the floor: of the network alone, and of everything over the bare step."""
    small = ("--batch-size", "1") if name in TINY else ()
    variants = {"": ("--no-gradient-checkpointing",), ", checkpoints": ()} if name in TINY else {"": ()}
    rows, least = [], None
    for suffix, flags in variants.items():
        run = start(name, folder, *small, *flags)
        condition, x = batch(run)
        run.backward(condition, x)  # what is computed once a run is left out, as the encoding of SD3.5's empty prompt
        velocity = run.task.velocity(condition)
        least = least or (floor(velocity, x, run.task.times), flops(partial(bare_step, run.task, condition, x)))
        methods = {"leap_align": METHODS["leap_align"]} if suffix else {**METHODS, "two passes": TWO_PASSES}
        for method, run.method in tqdm(methods.items(), f"{name}: operations", leave=False):
            network, whole = [], []
            for seed in typical(run.method, run.task.times, run.hyper):
                network.append(network_flops(run.method, velocity, x, run.task.times, run.hyper, seed))
                run.generator.manual_seed(seed)
                whole.append(flops(partial(run.backward, condition, x)))
            ratios = [statistics.mean(v) / m for v, m in zip((network, whole), least)]
            counted = {"GFLOP": statistics.mean(whole) / len(x) / 1e9}
            about = {"task": label(name), "method": method + suffix}
            rows.append(about | {"network": ratios[0], "all": ratios[1], **counted})
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------------------------------


def saved_bytes(action: Callable[[], object], model: nn.Module | None = None) -> int:
    """Bytes that autograd saves for backward during action(), each storage once.

    Weights do not count: leaves that require gradient, views of such, and all parameters and buffers of the model.
    """
    weights = [*model.parameters(), *model.buffers()] if model else []
    weights = [weight.to_local() if isinstance(weight, DTensor) else weight for weight in weights]
    known = {weight.untyped_storage().data_ptr() for weight in weights}
    kept = {}  # the storages themselves, so that none is freed and another one laid in its place

    def pack(tensor: Tensor) -> Tensor:
        owner, storage = tensor if tensor._base is None else tensor._base, tensor.untyped_storage()
        if not (owner.is_leaf and owner.requires_grad) and storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        action()
    return sum(storage.nbytes() for storage in kept.values())


def memory(name: str, folder: Path) -> list[Row]:
    """MiB that a step's graph through the velocity network keeps, a batch, with T steps and without checkpoints."""
    rows = []
    for T in tqdm(GRIDS, f"{name}: memory", leave=False):
        flags = ("--no-gradient-checkpointing", "--batch-size", "1") if name in TINY else ()
        run = start(name, folder, "--T", str(T), *flags)
        condition, x = batch(run)
        row: Row = {"task": label(name), "T": T}
        for method in ("leap_align", "full_backprop"):
            endpoints = METHODS[method](run.task.velocity(condition), x, run.task.times, run.hyper, run.generator)
            row[f"{method} MiB"] = saved_bytes(partial(next, endpoints), run.task.model) / 2**20
        rows.append(row)
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Time
# ---------------------------------------------------------------------------------------------------------------------


def now() -> float:
    """Seconds, once the accelerator has done what it was told."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(seconds: dict[str, float], name: str, action: Callable) -> Callable:
    """action, its seconds added under the name."""

    def wrapped(*arguments: Any, **more: Any) -> Any:
        begin = now()
        try:
            return action(*arguments, **more)
        finally:
            seconds[name] += now() - begin

    return wrapped


@contextmanager
def watched(run: trainer.Run, seconds: dict[str, float]):
    """Has a run's steps add up where their seconds go; the backward is told apart by where its gradient has come."""
    task, marks = run.task, {}
    decode, velocity = timed(seconds, "decode", task.decode), timed(seconds, "text", task.velocity)

    def watched_decode(x_0: Tensor) -> Tensor:
        sample = decode(x_0)
        if x_0.requires_grad:
            sample.register_hook(lambda grad: marks.update(reward=now()))
            x_0.register_hook(lambda grad: marks.update(decode=now()))
        return sample

    def watched_velocity(condition: Any) -> Velocity:
        v = velocity(condition)
        parts = [timed(seconds, name, v) for name in ("rollout", "leaps")]
        return lambda x, t: parts[torch.is_grad_enabled()](x, t)

    def backward(loss: Tensor, plain: Callable = Tensor.backward) -> None:
        begin = now()
        plain(loss)
        for name, end in (*sorted(marks.items(), key=lambda mark: mark[1]), ("leaps", now())):
            seconds[name] += end - begin
            begin = end

    replaced = {"velocity": watched_velocity, "decode": watched_decode, "reward": timed(seconds, "reward", task.reward)}
    replaced |= {name: timed(seconds, "data", getattr(task, name)) for name in ("conditions", "noise")}
    update = timed(seconds, "optimizer", run.descend)
    with ExitStack() as stack:
        for name, action in replaced.items():
            stack.enter_context(patch.object(task, name, action))
        stack.enter_context(patch.object(run, "descend", update))
        stack.enter_context(patch.object(run.ema, "update", timed(seconds, "EMA", run.ema.update)))
        stack.enter_context(patch.object(Tensor, "backward", backward))
        yield
    seconds["optimizer"] -= seconds["EMA"]  # a part of the update


def clock(action: Callable[[], object]) -> float:
    """Seconds of action()."""
    begin = now()
    action()
    return now() - begin


def contenders(run: trainer.Run) -> dict[str, Callable[[], object]]:
    """The trainer's step, the bare one, and where FSDP2 holds the model, the bare one on the model without it."""
    task = run.task
    bare = partial(bare_step, task, *batch(run))
    if not isinstance(task.model, FSDPModule):
        return {"step": run.step, "bare": bare}
    import diffusers

    kind, folder = getattr(diffusers, task.transformer_name), task.folder / "transformer"
    plain = kind.from_pretrained(folder, torch_dtype=task.dtype, local_files_only=True, use_safetensors=True)
    plain.to(task.device)
    if task.options.gradient_checkpointing:
        plain.enable_gradient_checkpointing()

    def unwrapped() -> None:
        with patch.object(task, "model", plain):
            bare()
        plain.zero_grad()

    return {"step": run.step, "bare": bare, "unwrapped": unwrapped}


def race(run: trainer.Run, name: str, seconds: float) -> dict[str, list[float]]:
    """Seconds of each contender, in turns, so that a machine that is slow for a while is so for all.

    The order is drawn anew in every round: whoever follows the same one finds its weights in the cache, or does not.
    """
    actions, laps, order = contenders(run), defaultdict(list), random.Random(0)
    run.step()  # what only the first one has to do is left out
    bar = tqdm(total=seconds, desc=f"{name}: time", bar_format="{desc} {bar} {elapsed}", leave=False)
    with bar:
        while len(laps["step"]) < 3 or bar.n < seconds:
            for contender in order.sample([*actions], len(actions)):
                run.optimizer.zero_grad()
                laps[contender].append(clock(actions[contender]))
            bar.update(min(sum(lap[-1] for lap in laps.values()), seconds - bar.n))
    return laps


def overhead(steps: list[float], bares: list[float]) -> tuple[float, float, str]:
    """Median of the ratios of neighbours, its standard error were they normal, and the quartiles."""
    low, median, high = statistics.quantiles([step / bare for step, bare in zip(steps, bares)])
    error = 1.2533 * (high - low) / 1.349 / len(steps) ** 0.5
    return median, error, f"{low:.3f}-{high:.3f}"


def step_times(name: str, folder: Path, seconds: float) -> tuple[Row, Row]:
    """The step beside the bare one; and, in further steps, where the step's seconds go."""
    run = start(name, folder)
    laps = race(run, name, seconds)
    with watched(run, spent := defaultdict(float)):
        total = sum(clock(run.step) for _ in range(max(3, len(laps["step"]) // 4)))
    spent["other"] = total - sum(spent.values())
    ratio, error, quartiles = overhead(laps["step"], laps["bare"])
    row = {"task": label(name)} | {f"{part} ms": 1e3 * statistics.median(laps[part]) for part in ("step", "bare")}
    row |= {"ratio": ratio, "ratio_error": error, "quartiles": quartiles, "steps": len(laps["step"])}
    row["of it update"] = ratio * (spent["optimizer"] + spent["EMA"]) / total
    if "unwrapped" in laps:
        row["unwrapped ms"] = 1e3 * statistics.median(laps["unwrapped"])
        row["over unwrapped"], row["over unwrapped_error"], _ = overhead(laps["step"], laps["unwrapped"])
    return row, {"task": label(name), **{share: spent[share] / total for share in SHARES}}


# ---------------------------------------------------------------------------------------------------------------------
# The main job
# ---------------------------------------------------------------------------------------------------------------------


def job(name: str, out: str, cache: str, began: float) -> None:
    """In a process of its own: `python train_leap_align.py --task NAME`, and its parts' seconds as JSON."""
    seconds = defaultdict(float, {"import": time.time() - began})
    task_class = timed(seconds, "import", trainer.pkgutil.resolve_name)(trainer.TASKS[name])
    learn.CACHE = Path(cache)
    parts = [(trainer, "build", "build"), (trainer, "curves", "pictures"), (task_class, "draw", "pictures")]
    parts += [(task_class, "pretrain", "pre-training"), (trainer.Run, "step", "training")]
    parts += [(trainer.Run, "evaluate", "evaluations"), (trainer.Run, "save", "checkpoints")]
    with ExitStack() as stack:
        for owner, method, part in parts:
            stack.enter_context(patch.object(owner, method, timed(seconds, part, getattr(owner, method))))
        with redirect_stdout(io.StringIO()):
            trainer.main(["--task", name, "--out", out])
    seconds["build"] -= seconds["pre-training"]
    seconds["other"] = time.time() - began - sum(seconds.values())
    print(json.dumps(seconds))


def main_job(name: str, folder: Path) -> list[Row]:
    """Seconds of the main job and its parts, from nothing and with the networks in the cache."""
    rows = []
    for when in tqdm(("first", "second"), f"{name}: main job", leave=False):
        code = (
            f"from toy.benchmark import job; job({name!r}, '{folder}/{name}-{when}', '{folder}/cache', {time.time()})"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        if done.returncode:
            raise BadInput(f"the main job failed: {done.stderr.strip().splitlines()[-1]}")
        seconds = json.loads(done.stdout)
        parts = {part: seconds.get(part, 0.0) for part in JOB}
        rows.append({"task": name, "run": when, "seconds": sum(seconds.values()), **parts})
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# The main program
# ---------------------------------------------------------------------------------------------------------------------


def measure(options: Options, names: list[str], folder: Path) -> dict[str, list[Row]]:
    """Each part for each task; what is done is on the disk, should the rest be interrupted."""
    tables = defaultdict(list)
    for name in tqdm(names, "tasks"):
        if "flops" in options.parts:
            tables["flops"] += count(name, folder)
        if "memory" in options.parts:
            tables["memory"] += memory(name, folder)
        if "time" in options.parts:
            for part, row in zip(("time", "shares"), step_times(name, folder, options.seconds)):
                tables[part].append(row)
        if "job" in options.parts and name not in TINY:
            tables["job"] += main_job(name, folder)
        for part, rows in tables.items():
            write_csv(options.out / f"{part}.csv", rows)
    return tables


def check(options: Options) -> list[str]:
    """The tasks to measure: those asked for, without what cannot run here."""
    for flag, known in (("tasks", TASKS), ("parts", Options.parts)):
        if unknown := sorted(set(getattr(options, flag)) - set(known)):
            raise BadInput(f"unknown {flag} {', '.join(unknown)}: choose from {', '.join(known)}")
    if not 0 < options.seconds < float("inf"):
        raise BadInput(f"seconds={options.seconds} must be positive")
    names = [name for name in options.tasks if name not in TINY or find_spec("diffusers")]
    if left_out := [name for name in options.tasks if name not in names]:
        print(f"{', '.join(left_out)}: left out, for diffusers is not installed")
    return names


def main(options: Options) -> None:
    """Measures, prints the tables, writes them and the figure."""
    names = check(options)
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        make_tiny([name for name in names if name in TINY], Path(folder))
        tables = measure(options, names, Path(folder))
        if "gpu" in options.parts and torch.cuda.is_available() and find_spec("diffusers"):
            from toy.full_size import survey

            for row in survey(Path(folder)):
                tables["gpu"].append(row)
                write_csv(options.out / "gpu.csv", tables["gpu"])
        elif "gpu" in options.parts:
            print("gpu: FLUX.1-dev's size was not measured, for there is no CUDA device (or no diffusers) here")
    for name, rows in tables.items():
        columns = dict.fromkeys(column for row in rows for column in row if not column.endswith("_error"))
        print(f"\n{name}\n\n{markdown(rows, [*columns])}")
    if tables:
        draw(tables, options.out)
        print(f"\ntables and figure are in {options.out}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except (BadInput, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted: the tables of what is finished are kept")
