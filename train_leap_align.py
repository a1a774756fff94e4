"""One trainer for every task and every method.

    python train_leap_align.py                                     the 2-D toy with LeapAlign, from nothing
    python train_leap_align.py --task digits                       the same on 8x8 images of real digits
    python train_leap_align.py --method drtune --out runs/drtune   another method
    python train_leap_align.py --method lagrange --help            every flag, with the defaults of a method
    torchrun --nproc_per_node=2 train_leap_align.py                two processes, with the same result
    python train_leap_align.py --task flux --help                  every flag of a task, here FLUX.1-dev

A run's folder holds config.json, metrics.csv (a row per iteration), evaluations.csv, result.json (the evaluators before
and after training), figures, checkpoint/ and the trained weights' average (model/, transformer/ or lora/).
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # a script's background job ignores it
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends without a traceback

import argparse
import math
import pkgutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar

import torch
import tyro
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.profiler import record_function
from tqdm import tqdm

import beyond
import leap_align
from beyond import Hyper, Leash
from leap_align import BadInput, BatchGenerator, Endpoints, cut, differentiable, objective, uniform_times
from runtime import processes, report
from runtime.checkpoint import Progress, load_checkpoint, save_checkpoint
from runtime.ema import EMA
from runtime.processes import RaisedOnAllRanks, full_value, rank, run_on_all_ranks, run_on_rank0, world_size
from runtime.run_dir import (
    CsvLog,
    check_contents,
    check_run_folder,
    check_shared_folder,
    checkpoints,
    locked_folder,
    write_csv,
    write_settings,
)
from runtime.task import Task, check_evaluation, check_gradient, check_task, check_task_class

TOOL = "train_leap_align"
"""The `tool` of config.json, by which a run's folder is recognised."""
TASKS = {
    "toy": "toy.modes:Modes",
    "digits": "toy.digits:Digits",
    "flux": "flux_adapter:Flux",
    "sd3": "flux_adapter:SD3",
    "klein": "flux_adapter:Klein",
}
"""Where each task's class is; it is imported only when the task is chosen."""
METHODS = {**leap_align.METHODS, **beyond.METHODS}
"""The methods of the paper, and those beyond it."""
METRICS = tuple("loss reward grad_norm weight d_j d_0 hinge_active i_k i_j leash v_norm seconds skipped".split())
"""The columns of metrics.csv, after `iteration` and before those of the task."""
NEXT_COMMANDS = dict(
    toy=("python train_leap_align.py --task digits  # toy/tour.ipynb draws what this run did",),
    digits=(
        "python train_leap_align.py --task digits --lr 3e-4 --lam None --out runs/digits-hacked  # then on a leash",
        "python train_leap_align.py --task digits --lr 3e-4 --lam None --beta 3 --out runs/digits-leashed  # the leash",
        "python -m toy.laboratory leash  # toy/tour.ipynb, part (h), shows the leash",
    ),
    **dict.fromkeys(
        ("flux", "sd3", "klein"), ("python -m full_scale sample --help  # draws images with the weights of this run",)
    ),
)
"""What to try after a run of a task: one command, or one each after a run with hinge, without restraint, on a leash."""
CHANGEABLE_ON_RESUME = frozenset(
    "iterations gradient_accumulation_steps evaluate_every checkpoint_every checkpoints_total_limit max_skipped_steps "
    "tracker out resume".split()
)
"""Fields of Config that may change on --resume: no iteration depends on them."""


@dataclass(frozen=True)
class Config:
    """The run."""

    task: str = "toy"
    """Model and reward: toy, digits, flux (FLUX.1-dev), sd3 (SD3.5-M) or klein (FLUX.2-klein)."""
    method: str = "leap_align"
    """How the reward's gradient reaches the model: leap_align, refl, draft_lv, drtune, full_backprop; beyond the paper
    sparse, bridge, lagrange, stratified, whose own defaults --help shows beside --method."""
    iterations: int = 300
    """Optimizer steps."""
    batch_size: int = 256
    """Samples per iteration, over all processes (B)."""
    gradient_accumulation_steps: int = 1
    """Microbatches per iteration and process; more of them need less memory."""
    T: int = 25
    """Steps of a sampling run (T)."""
    lr: float = 1e-4
    """AdamW's learning rate (eta)."""
    weight_decay: float = 1e-4
    """AdamW's weight decay."""
    max_grad_norm: float = 1.0
    """A gradient with a larger norm is scaled down to this one."""
    ema_decay: float = 0.995
    """Decay of the averaged weights, which are evaluated and saved."""
    evaluate_every: int = 50
    """Iterations between evaluations."""
    checkpoint_every: int = 100
    """Iterations between checkpoints."""
    checkpoints_total_limit: int = 2
    """Checkpoints to keep; an older one replaces a damaged one."""
    max_skipped_steps: int = 10
    """Consecutive steps with a loss or gradient that is not finite before the run stops."""
    seed: int = 0
    """Seed of noise, prompts and timesteps."""
    tracker: Literal["tensorboard", "wandb"] | None = None
    """Where to watch the run: every metric, evaluation and image, besides the files in the run's folder."""
    out: Path | None = None
    """The run's folder; runs/TASK-METHOD if not given."""
    resume: bool = False
    """Continue the run in this folder from its newest checkpoint."""


TaskOptions = TypeVar("TaskOptions")


@dataclass(frozen=True)
class Flags(Generic[TaskOptions]):
    """Everything that the command line sets."""

    run: Config
    method: Hyper
    task: TaskOptions


def choose(kind: str, name: str, table: dict[str, Any]) -> Any:
    """table[name]; an unknown name is refused with the list of known ones."""
    if name not in table:
        raise BadInput(f"unknown {kind} {name!r}: choose from {', '.join(table)}")
    return table[name]


def task_class(name: str) -> type[Task]:
    """The class of a task, imported now."""
    kind = pkgutil.resolve_name(choose("task", name, TASKS))
    check_task_class(name, kind)
    return kind


def parse(
    arguments: list[str] | None,
    flags_class: type[Flags] = Flags,
    description: str | None = __doc__,
    program: str | None = None,
) -> Flags:
    """The command line.  Task, reward and method are read first, because they decide about flags and defaults."""
    first_pass = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first_pass.add_argument("--task", default=Config.task)
    first_pass.add_argument("--reward")
    first_pass.add_argument("--method", default=Config.method)
    chosen, _ = first_pass.parse_known_args(arguments)
    kind = task_class(chosen.task)
    defaults = {**kind.defaults(chosen.reward), **beyond.DEFAULTS.get(chosen.method, {})}
    run = {name: value for name, value in defaults.items() if name in Config.__dataclass_fields__}
    run |= {"task": chosen.task, "method": chosen.method}
    method = {name: value for name, value in defaults.items() if name in Hyper.__dataclass_fields__}
    return tyro.cli(
        Annotated[flags_class[kind.Options], tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff],
        args=arguments,
        default=flags_class(Config(**run), Hyper(**method), kind.Options()),
        description=description,
        prog=program,
    )


def check(config: Config, hyper: Hyper, world_size: int) -> None:
    """Refuses values that cannot work, before anything expensive is built."""
    method = choose("method", config.method, METHODS)
    counts = ("batch_size", "gradient_accumulation_steps", "evaluate_every", "checkpoint_every")
    ranges = {name: (1, 2**20) for name in (*counts, "checkpoints_total_limit", "max_skipped_steps")}
    ranges |= {"T": (2, 10_000), "iterations": (0, 2**31), "seed": (0, 2**63 - 1)}
    ranges |= {"lr": (1e-30, 1e6), "weight_decay": (0, 1e6), "max_grad_norm": (1e-30, math.inf)}
    for name, (least, most) in ranges.items():
        value = getattr(config, name)
        if not least <= value <= most:
            raise BadInput(f"{name}={value} must lie between {least} and {most}")
    if not 0 <= config.ema_decay < 1:
        raise BadInput(f"ema_decay={config.ema_decay} must lie in [0, 1)")
    if config.batch_size % (world_size * config.gradient_accumulation_steps):
        raise BadInput(
            f"batch_size={config.batch_size} must be a multiple of {world_size} processes x "
            f"gradient_accumulation_steps={config.gradient_accumulation_steps}"
        )
    # The method itself checks its hyperparameters against T: run it once with a model that costs nothing.
    with torch.no_grad():
        list(method(lambda x, t: 0 * x, torch.zeros(1, 1), uniform_times(config.T), hyper, torch.Generator()))


class Trainer:
    """A task under training by one method: step, backward, optimizer step, evaluate."""

    def __init__(
        self, config: Config, hyper: Hyper, task: Task, method: Callable[..., Endpoints] | None = None
    ) -> None:
        self.config, self.hyper, self.task = config, hyper, task
        self.method = method or METHODS[config.method]
        self.parameters = [p for p in task.model.parameters() if p.requires_grad]
        if not self.parameters or any(p.dtype.itemsize < 4 for p in self.parameters):
            raise RaisedOnAllRanks("trained parameters must exist and be float32: bfloat16 loses steps of 1e-5")
        if world_size() > 1 and not all(isinstance(p, DTensor) for p in self.parameters):
            remedy = "its parallelize(mesh) must call fully_shard(model, mesh=mesh), or every rank trains its own model"
            raise RaisedOnAllRanks(f"task {config.task} has trained parameters that are not sharded: {remedy}")
        # Fused: one pass over the weights instead of a dozen.
        decay = config.weight_decay
        self.optimizer = torch.optim.AdamW(self.parameters, lr=config.lr, weight_decay=decay, fused=True)
        self.ema = EMA(self.parameters, config.ema_decay)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.progress, self.zero_is_reported = Progress(), False

    def microbatches(self) -> list[slice]:
        """The rows of the batch that this rank works on, one slice per accumulation step."""
        steps = self.config.gradient_accumulation_steps
        size = self.config.batch_size // (world_size() * steps)
        first = rank() * steps
        return [slice(i * size, (i + 1) * size) for i in range(first, first + steps)]

    def step(self) -> dict[str, float]:
        """One iteration: draws the whole batch, runs this rank's microbatches, updates the weights; returns metrics."""
        start, task, batch_size = time.perf_counter(), self.task, self.config.batch_size
        with record_function("data"):
            condition = task.sample_conditions(batch_size, self.generator)
            x_T = task.noise(batch_size, self.generator)
        state, metrics, microbatches = self.generator.get_state(), [], self.microbatches()
        for rows in microbatches:
            # Every microbatch starts from the same state, so that all of them draw the same timesteps.
            generator = BatchGenerator(batch_size, rows)
            generator.set_state(state)
            arguments = condition[rows], x_T[rows].to(task.device), generator
            metrics.append(self.backward(*arguments, is_last=rows == microbatches[-1]))
        self.generator.set_state(generator.get_state())
        row = processes.mean_over_ranks(mean(metrics), task.device)
        row["grad_norm"] = self.optimizer_step(row["loss"])
        self.progress.iteration += 1
        if row["grad_norm"] == 0 and row["hinge_active"] > 0 and rank() == 0 and not self.zero_is_reported:
            self.zero_is_reported = True
            reason = "the reward does not depend on the image, or the image not on the trained parameters"
            tqdm.write(f"iteration {self.progress.iteration}: the gradient is exactly zero: {reason}")
        row |= {"seconds": time.perf_counter() - start, "skipped": float(self.progress.consecutive_skips > 0)}
        self.progress.seconds += row["seconds"]
        return row

    def backward(self, condition: Any, x_T: Tensor, generator: torch.Generator, is_last: bool = True) -> dict:
        """Adds the gradient of one microbatch; returns its metrics.

        Loss and leash are sums over the method's endpoints, as in Algorithm 1; other metrics are means over them.
        is_last: of the microbatches of an iteration; in it, nodes add up their gradients (HSDP).
        """
        with record_function("text"):
            velocity = self.velocity(condition)
        endpoints, metrics = self.method(velocity, x_T, self.task.times, self.hyper, generator), []
        for x_0, weight in endpoints:
            image = cut(check_gradient(self.config.task, "velocity", x_0))
            metrics.append(self.backward_endpoint(image, weight, condition))
            velocity.weight = weight
            self.set_all_reduce(False)
            with record_function("backward"):
                velocity.backward(x_0, image.grad, before_last=lambda: self.set_all_reduce(is_last))
        log = endpoints.log | velocity.log
        log["loss"] = sum(row["loss"] for row in metrics) + self.hyper.beta * log.get("leash", 0)
        return mean(metrics) | {name: torch.as_tensor(value).float().mean().item() for name, value in log.items()}

    def velocity(self, condition: Any) -> Leash:
        """v_theta for the method, on a leash if beta > 0."""
        if not self.hyper.beta:
            return Leash(self.task.velocity(condition))
        velocities, steps = self.task.velocity_and_reference(condition), self.config.gradient_accumulation_steps
        return Leash(*velocities, self.hyper.beta, steps)

    def set_all_reduce(self, enabled: bool) -> None:
        """Whether backwards from now on add up gradients between nodes; until then each node keeps its sum."""
        if isinstance(self.task.model, FSDPModule):
            self.task.model.set_requires_all_reduce(enabled)

    def backward_endpoint(self, x_0: Tensor, weight: Tensor, condition: Any) -> dict[str, float]:
        """Leaves the loss's gradient in x_0.grad, for an endpoint x_0 that is a leaf; returns its metrics."""
        name, lam = self.config.task, self.hyper.lam
        with record_function("decode"):
            sample = check_gradient(name, "decode", self.task.decode(x_0))
        with record_function("reward"):
            reward = differentiable(self.task.reward(sample, condition), x_0)
        loss = objective(reward, weight, lam)
        with record_function("backward"):
            (loss / self.config.gradient_accumulation_steps).backward()
        active = 1.0 if lam is None else (reward < lam).float().mean().item()
        metrics = {"loss": loss.item(), "reward": reward.mean().item(), "weight": weight.mean().item()}
        own = self.task.step_metrics(sample)
        if own.keys() != set(self.task.step_metric_names):
            names = self.task.step_metric_names
            raise BadInput(f"task {name}: step_metrics gave {list(own)}, but step_metric_names are {list(names)}")
        return metrics | {"hinge_active": active} | own

    def optimizer_step(self, loss: float) -> float:
        """Clips the gradient and updates weights and average; returns the norm before clipping.

        A loss or norm that is not finite leaves everything unchanged.  Both are those of the whole batch, so that all
        ranks decide alike.
        """
        with record_function("optimizer"):
            total = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
            norm = full_value(total).item()
        if math.isfinite(loss) and math.isfinite(norm):
            with record_function("optimizer"):
                if norm > self.config.max_grad_norm:  # clipping would multiply every gradient by one otherwise
                    nn.utils.clip_grads_with_norm_(self.parameters, self.config.max_grad_norm, total)
                self.optimizer.step()
            with record_function("EMA"):
                self.ema.update()
            self.progress.consecutive_skips = 0
        else:
            self.skip_step(loss, norm)
        self.optimizer.zero_grad()
        return norm

    def skip_step(self, loss: float, norm: float) -> None:
        """Reports a step whose loss or gradient is not finite, and stops the run after too many in a row."""
        self.progress.consecutive_skips += 1
        gradients = {name: p.grad for name, p in self.task.model.named_parameters() if p.grad is not None}
        norms = {name: full_value(torch.linalg.vector_norm(grad)) for name, grad in gradients.items()}
        broken = [name for name, value in norms.items() if not value.isfinite()]
        where = f"{', '.join(broken[:3]) or 'no parameter'} ({len(broken)})"
        message = f"loss {loss:.3g}, gradient norm {norm:.3g}, not finite in {where}"
        if rank() == 0:
            tqdm.write(f"iteration {self.progress.iteration + 1}: {message}: this step is skipped")
        if (skips := self.progress.consecutive_skips) >= self.config.max_skipped_steps:
            remedy = "start again in another --out with a lower --lr, or check the reward"
            raise RaisedOnAllRanks(f"{skips} steps in a row skipped, now with {message}: {remedy}")

    def evaluate(self, folder: Path | None = None) -> dict[str, float]:
        """Evaluates the averaged weights and reports new signs of reward hacking.

        folder: the run's folder, for evaluations.csv and the task's samples; None writes nothing.
        """
        progress = self.progress
        with self.ema.swapped():
            values = check_evaluation(self.config.task, self.task, self.task.evaluate(folder, progress.iteration))
        if broken := [name for name, value in values.items() if not math.isfinite(value)]:
            remedy = "start again with a lower --lr" if progress.iteration else "check the reward and the task's flags"
            raise RaisedOnAllRanks(f"{', '.join(broken)} not finite at iteration {progress.iteration}: {remedy}")
        progress.evaluations.append({"iteration": progress.iteration, **values})
        signs = report.reward_hacking_signs(progress.evaluations, self.task.held_out)
        if folder is not None:
            write_csv(folder / "evaluations.csv", progress.evaluations)
            for name in signs.keys() - progress.signs.keys():
                tqdm.write(signs[name])
        progress.signs = signs
        return values

    def save(self, folder: Path) -> None:
        """Writes a checkpoint."""
        limit = self.config.checkpoints_total_limit
        save_checkpoint(folder, self.task.model, self.optimizer, self.ema, self.generator, self.progress, limit)

    def restore(self, folder: Path) -> None:
        """Continues from the newest checkpoint that is not damaged."""
        state = self.task.model, self.optimizer, self.ema, self.generator
        self.progress = load_checkpoint(folder, *state, self.config.iterations)


def mean(rows: list[dict[str, float]]) -> dict[str, float]:
    """The mean of each entry over rows with the same entries."""
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


def build_task(flags: Flags) -> Task:
    """The task, with its model on its device and sharded over all processes."""
    config, kind = flags.run, task_class(flags.run.task)
    task = run_on_all_ranks(lambda: kind(flags.task, config.T))
    check_task(config.task, task)
    if flags.method.beta:
        task.keep_reference()
    task.parallelize(processes.device_mesh(task.device.type))
    return task


def train(trainer: Trainer, folder: Path, stop_request: processes.StopRequest, tracker: Any) -> None:
    """Iterates, evaluating and saving as often as the configuration says; saves the averaged model at the end."""
    config, task, progress, is_rank0 = trainer.config, trainer.task, trainer.progress, rank() == 0
    results_folder = folder if is_rank0 else None
    if not progress.evaluations:
        trainer.evaluate(results_folder)
    columns = (*METRICS, *task.step_metric_names)
    log = CsvLog(folder / "metrics.csv", columns, progress.iteration) if is_rank0 else None
    if tracker:
        tracker.replay(progress.evaluations)
    counts = {"total": config.iterations, "initial": progress.iteration}
    # mininterval: at most one line a second where the output is a file.
    with tqdm(desc=config.method, **counts, mininterval=1, disable=not is_rank0) as bar:
        while progress.iteration < config.iterations:
            row = trainer.step()
            if log:
                log.add({"iteration": progress.iteration, **row})
            if tracker:
                tracker.add("train", progress.iteration, {name: row[name] for name in columns if name in row})
            last = progress.iteration == config.iterations
            if progress.iteration % config.evaluate_every == 0 or last:
                evaluation = trainer.evaluate(results_folder)
                if tracker:
                    tracker.add("evaluation", progress.iteration, evaluation)
            stop, is_good = max(processes.all_gather(stop_request.signal)), progress.consecutive_skips == 0
            if is_good and (progress.iteration % config.checkpoint_every == 0 or last or stop):
                trainer.save(folder)
            if stop and not last:
                raise processes.StoppedBySignal(stop, is_saved=is_good)
            held_out = {name: f"{progress.evaluations[-1][name]:.3f}" for name in list(task.held_out)[:2]}
            bar.set_postfix(reward=f"{row['reward']:.3f}", grad=f"{row['grad_norm']:.2g}", **held_out, refresh=False)
            bar.update()
    with trainer.ema.swapped():
        task.save(folder)


def announce(flags: Flags, folder: Path) -> None:
    """Prints in three lines what the run will do; `weight` and `leash` are columns of metrics.csv.

    On resume it names the newest checkpoint.  Should that one be damaged, loading it says so.
    """
    config, hyper = flags.run, flags.method
    loss = "-weight * reward" if hyper.lam is None else f"weight * max(0, {hyper.lam:g} - reward)"
    leash = f" + {hyper.beta:g} * leash" if hyper.beta else ""
    sizes = f"{config.iterations} iterations of {config.batch_size} samples, {config.T} steps each"
    done = [f", from iteration {int(path.name)} of {config.iterations}" for path in checkpoints(folder)[-1:]]
    print(f"{config.task} is trained to lower {loss}{leash}: {sizes}, lr {config.lr:g}{''.join(done)}.")
    print((METHODS[config.method].__doc__ or config.method).strip().splitlines()[0])
    unseen = ", ".join(task_class(config.task).held_out) or "none"
    print(f"Training never sees these evaluators: {unseen}. The folder is {folder}.", flush=True)


def next_command(task: str, hyper: Hyper) -> str:
    """What to try after a run of this task with these hyperparameters."""
    commands = NEXT_COMMANDS.get(task, ("python train_leap_align.py --help",))
    restraint = 2 if hyper.beta else int(hyper.lam is None)
    return commands[min(restraint, len(commands) - 1)]


def write_report(trainer: Trainer, folder: Path, tracker: Any) -> None:
    """Draws and tracks the figures, writes result.json, prints the evaluators before and after, and what to try."""
    trainer.task.draw_figures(folder)
    report.write_report(folder, trainer.progress)
    if tracker:
        tracker.add_figures(trainer.progress.iteration)
    pictures = [*sorted(folder.glob("*.png")), *sorted(folder.glob("samples/*.png"))[-1:]]
    print(f"look at {', '.join(map(str, pictures))}")
    print(f"next: {next_command(trainer.config.task, trainer.hyper)}")


def run(flags: Flags, stop_request: processes.StopRequest) -> None:
    """Checks, claims the folder, builds or restores, trains, reports."""
    config, hyper = flags.run, flags.method
    run_on_rank0(lambda: check(config, hyper, world_size()))
    open_tracker = run_on_all_ranks(lambda: report.tracker_class(config.tracker))
    folder = config.out or Path("runs") / f"{config.task}-{config.method}"
    settings = {"tool": TOOL, **asdict(config), **asdict(hyper), **asdict(flags.task), "out": folder}
    changeable = CHANGEABLE_ON_RESUME | task_class(config.task).changeable_on_resume
    with locked_folder(folder, "config.json", TOOL):
        run_on_rank0(lambda: check_run_folder(folder, settings, config.resume, changeable))
        run_on_all_ranks(lambda: check_shared_folder(folder))
        run_on_rank0(lambda: announce(flags, folder))  # before the task, which may take minutes to build
        trainer = Trainer(config, hyper, build_task(flags))
        contents = run_on_all_ranks(lambda: trainer.task.contents() if rank() == 0 else {})
        if config.resume:
            run_on_rank0(lambda: check_contents(folder, contents))
            trainer.restore(folder)
        run_on_rank0(lambda: write_settings(folder / "config.json", settings | {"contents": contents}))
        with run_on_all_ranks(lambda: open_tracker(folder, settings)) as tracker:
            stop_request.is_deferred = True  # from here on a signal ends the iteration and saves
            train(trainer, folder, stop_request, tracker)
            # The other ranks wait for the report: torchrun ends every process as soon as one has failed.
            run_on_rank0(lambda: write_report(trainer, folder, tracker))


def main(arguments: list[str] | None = None) -> None:
    """Runs, under torchrun on every process; a failure ends with one line."""
    error = None
    try:
        with processes.stop_on_signals() as stop_request:
            flags = parse(arguments)
            processes.init_process_group()
            run(flags, stop_request)
    except (BadInput, processes.UserCodeError, processes.StoppedBySignal, ImportError, OSError, RuntimeError) as caught:
        error = caught
    memory = "raise --gradient-accumulation-steps; full_scale/README.md says what else helps"
    processes.exit_process(error, "continue with --resume", memory)


if __name__ == "__main__":
    main()
