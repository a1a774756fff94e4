"""One trainer for every task and every method.

    python train_leap_align.py                                     the 2-D toy with LeapAlign, from nothing
    python train_leap_align.py --task digits                       the same on 8x8 images of real digits
    python train_leap_align.py --method drtune --out runs/drtune   another method
    python train_leap_align.py --method lagrange --help            every flag, with the defaults of a method
    torchrun --nproc_per_node=2 train_leap_align.py                two processes, the same up to rounding
    python train_leap_align.py --task flux --help                  every flag of a task, here FLUX.1-dev

A run's folder holds config.json, metrics.csv (a row per iteration), evaluations.csv, result.json (the evaluators before
and after training), figures, checkpoint/ and the trained weights' average (model/, transformer/ or lora/; exports/).
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # a script's background job ignores it
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends without a traceback

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import Tensor
from torch.profiler import record_function
from tqdm import tqdm

import beyond
import leap_align
from beyond import SOLVERS, Hyper
from leap_align import differentiable, objective
from runtime import command_line, processes, report, run_dir
from runtime.backward import BatchGenerator, Leash, SplitVelocity, leaf, rows_of_rank
from runtime.checkpoint import Checkpoints, Progress, TrainingState, load_checkpoint
from runtime.ema import EMA
from runtime.environment import environment, sources
from runtime.exit import REPORTED, exit_process
from runtime.optimizer import clip_gradient, lr_schedule
from runtime.processes import mean, rank, run_on_all_ranks, run_on_rank0, world_size
from runtime.task import Task, check_evaluation, check_gradient, check_step_metrics, check_task, trained_parameters

TOOL = "train_leap_align"  # the `tool` of config.json, by which a run's folder is recognised
TASKS = {
    "toy": "toy.modes:Modes",
    "digits": "toy.digits:Digits",
    "flux": "flux_adapter:Flux",
    "sd3": "flux_adapter:SD3",
    "klein": "flux_adapter:Klein",
}
"""Where each task's class is; it is imported only when the task is chosen."""
METHODS = {**leap_align.METHODS, **beyond.METHODS}  # the methods of the paper, and those beyond it
METRICS = tuple("loss reward grad_norm weight d_j d_0 hinge_active i_k i_j leash v_norm lr seconds skipped".split())
"""The columns of metrics.csv, after `iteration` and before those of the task."""


@dataclass(frozen=True)
class Config:
    """The run."""

    task: str = "toy"  # Model and reward: toy, digits, flux (FLUX.1-dev), sd3 (SD3.5-M) or klein (FLUX.2-klein).
    # How the reward's gradient reaches the model: leap_align, refl, draft_lv, drtune, full_backprop; beyond the paper
    # sparse, bridge, lagrange, stratified, leap_align_per_sample. --method NAME --help shows a method's own defaults.
    method: str = "leap_align"
    iterations: int = 300  # Training iterations: one update of the weights each.
    batch_size: int = 256  # Samples per iteration, over all processes (B).
    gradient_accumulation_steps: int = 1  # Microbatches per iteration and process; more of them need less memory.
    T: int = 25  # Steps of a sampling run (T).
    solver: Literal["euler", "ab2"] = "euler"  # Solver of sampling runs in training; ab2: second-order Adams-Bashforth.
    beta: float = 0.0  # Weight of the leash to the pre-trained model (beta); 0 for no leash.
    lr: float = 1e-4  # AdamW's learning rate (eta).
    lr_scheduler: Literal["constant", "linear", "cosine"] = "constant"  # After the warmup; the others decay to 0.
    lr_warmup_steps: int = 0  # Iterations in which the learning rate rises linearly from lr / their number to lr.
    weight_decay: float = 1e-4  # AdamW's weight decay.
    max_grad_norm: float = 1.0  # A gradient with a larger norm is scaled down to this one.
    ema_decay: float = 0.995  # Decay of the averaged weights, which are evaluated and saved; lower at first.
    evaluate_every: int = 50  # Iterations between evaluations.
    checkpoint_every: int = 100  # Iterations between checkpoints, at most.
    checkpoint_minutes: float = 30.0  # Minutes between checkpoints, at most, and the rest of an iteration.
    checkpoints_total_limit: int = 2  # Checkpoints to keep; an older one replaces a damaged one.
    export_every: int = 0  # Iterations between exports of the averaged weights, all kept (exports/); 0 for none.
    async_checkpoints: bool = False  # Train on while a checkpoint is written, from a copy in host memory.
    max_skipped_steps: int = 10  # Consecutive iterations with a loss or gradient that is not finite before a run stops.
    process_group_timeout: float = processes.GROUP_MINUTES  # Minutes that a process waits for another one.
    seed: int = 0  # Seed of noise, prompts and timesteps.
    tracker: Literal["tensorboard", "wandb"] | None = None  # Where to watch the run's metrics and images, too.
    out: Path | None = None  # The run's folder; runs/TASK-METHOD if not given.
    resume: bool = False  # Continue the run in this folder from its newest checkpoint, or start it if there is none.
    allow_changed: tuple[command_line.Allowed, ...] = ()  # What --resume may change; config.json lists the changes.


TaskOptions = TypeVar("TaskOptions")


@dataclass(frozen=True)
class Flags(Generic[TaskOptions]):
    """All flags: those of the run, the method and the task."""

    run: Config
    method: Hyper
    task: TaskOptions


def parse(arguments: list[str] | None) -> Flags:
    """The command line."""
    return command_line.parse(arguments, Flags, Config, Hyper, TASKS, beyond.DEFAULTS, __doc__, None)


task_class = partial(command_line.task_class, tasks=TASKS)


class Trainer:
    """A task under training by one method: an iteration is `step`, its parts are `backward` and `optimizer_step`."""

    def __init__(self, config: Config, hyper: Hyper, task: Task, method: Callable | None = None) -> None:
        self.config, self.hyper, self.task = config, hyper, task
        self.method = method or METHODS[config.method]
        self.parameters = trained_parameters(config.task, task.model)
        # Fused: one pass over the weights instead of a dozen.
        self.optimizer = torch.optim.AdamW(self.parameters, config.lr, weight_decay=config.weight_decay, fused=True)
        self.schedule = lr_schedule(self.optimizer, config.lr_scheduler, config.lr_warmup_steps, config.iterations)
        self.ema = EMA(self.parameters, config.ema_decay)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.state = TrainingState(task.model, self.optimizer, self.ema, self.generator)
        self.progress, self.zero_is_reported = Progress(), False

    def step(self) -> dict[str, float]:
        """One iteration: draws the whole batch, runs this rank's microbatches, updates the weights; returns metrics."""
        start, task, batch_size = time.perf_counter(), self.task, self.config.batch_size
        draws = self.generator.clone_state()  # an interrupted iteration leaves the trainer's own generator as it was
        with record_function("data"):
            condition = task.sample_conditions(batch_size, draws)
            x_T = task.noise(batch_size, draws)
        state, metrics = draws.get_state(), []
        microbatches = rows_of_rank(batch_size, self.config.gradient_accumulation_steps, rank(), world_size())
        for rows in microbatches:
            # Every microbatch starts from the same state, so that all of them draw the same timesteps.
            generator = BatchGenerator(batch_size, rows)
            generator.set_state(state)
            arguments = condition[rows], x_T[rows].to(task.device), generator
            metrics.append(self.backward(*arguments, is_last=rows == microbatches[-1]))
        self.generator.set_state(generator.get_state())
        row = processes.mean_over_ranks(mean(metrics), task.device)
        row |= {"lr": self.schedule.get_last_lr()[0], "grad_norm": self.optimizer_step(row["loss"])}
        self.schedule.step()
        self.progress.iteration += 1
        if row["grad_norm"] == 0 and row["hinge_active"] > 0 and not self.zero_is_reported:
            self.zero_is_reported = True
            report.warn_of_zero_gradient(self.progress.iteration)
        row |= {"seconds": time.perf_counter() - start, "skipped": float(self.progress.consecutive_skips > 0)}
        self.progress.seconds += row["seconds"]
        return row

    def backward(self, condition: Any, x_T: Tensor, generator: torch.Generator, is_last: bool = True) -> dict:
        """Adds the gradient of one microbatch; returns its metrics.

        Loss and leash are sums over the method's endpoints, as in Algorithm 1; other metrics are means over them.
        is_last: whether this is the last microbatch, in whose backward the nodes add up their gradients (HSDP).
        """
        with record_function("text"):
            velocity = self.velocity(condition)
        step, rows = SOLVERS[self.config.solver](), []
        for x_0, weight, log in self.method(velocity, x_T, self.task.times, self.hyper, generator, step):
            check_gradient(self.config.task, "velocity", x_0)
            gradient, metrics = self.loss_gradient(x_0, weight, condition)
            processes.set_all_reduce(self.task.model, False)
            with record_function("backward"):
                before_last = partial(processes.set_all_reduce, self.task.model, is_last)
                leash = velocity.backward(x_0, gradient, weight, before_last)
            drawn = {name: torch.as_tensor(value).float().mean().item() for name, value in log.items()}
            rows.append(metrics | drawn | leash)
        sums = {name: sum(row[name] for row in rows) for name in ("loss", "leash") if name in rows[0]}
        sums["loss"] += self.config.beta * sums.get("leash", 0)
        return mean(rows) | {name: torch.tensor(value).item() for name, value in sums.items()}  # float32, as the loss

    def velocity(self, condition: Any) -> SplitVelocity:
        """v_theta for the method, on a leash if beta > 0."""
        if not self.config.beta:
            return SplitVelocity(self.task.velocity(condition))
        velocities = self.task.velocity_and_reference(condition)
        return Leash(*velocities, self.config.beta, self.config.gradient_accumulation_steps)

    def loss_gradient(self, x_0: Tensor, weight: Tensor, condition: Any) -> tuple[Tensor, dict[str, float]]:
        """The gradient of an endpoint's loss in x_0 (B, *S), and its metrics."""
        name, lam, image = self.config.task, self.hyper.lam, leaf(x_0)
        with record_function("decode"):
            sample = check_gradient(name, "decode", self.task.decode(image))
        with record_function("reward"):
            reward, terms = self.task.reward_and_terms(sample, condition)
            reward = differentiable(reward, image)
        loss = objective(reward, weight, lam)
        with record_function("backward"):
            (loss / self.config.gradient_accumulation_steps).backward()
        active = 1.0 if lam is None else (reward < lam).float().mean().item()
        metrics = {"loss": loss.item(), "reward": reward.mean().item(), "weight": weight.mean().item()}
        own = self.task.step_metrics(sample) | {term: value.mean().item() for term, value in terms.items()}
        check_step_metrics(name, self.task, own)
        return image.grad, metrics | {"hinge_active": active} | own

    def optimizer_step(self, loss: float) -> float:
        """Clips the gradient and updates weights and average; returns the norm before clipping.

        A loss or norm that is not finite, of the whole batch and so on all ranks, leaves everything unchanged.
        """
        with record_function("optimizer"):
            norm = clip_gradient(self.parameters, self.config.max_grad_norm)
        if math.isfinite(loss) and math.isfinite(norm):
            with record_function("optimizer"):
                self.optimizer.step()
            with record_function("EMA"):
                self.ema.update(self.progress.updates)
            self.progress.updates += 1
            self.progress.consecutive_skips = 0
        else:
            self.progress.consecutive_skips += 1
            report.skipped_step(self.task.model, loss, norm, self.progress, self.config.max_skipped_steps)
        self.optimizer.zero_grad()
        return norm

    def evaluate_if_due(self, folder: Path, tracker: Any) -> None:
        """Evaluates at the iterations that the configuration says, unless a signal came only after it."""
        config, progress = self.config, self.progress
        is_due = progress.iteration % config.evaluate_every == 0 or progress.iteration == config.iterations
        if is_due and progress.iteration not in [row["iteration"] for row in progress.evaluations]:
            tracker.add("evaluation", progress.iteration, self.evaluate(folder if rank() == 0 else None))

    def evaluate(self, folder: Path | None = None) -> dict[str, float]:
        """Evaluates the averaged weights and warns of reward hacking.

        folder: the run's folder, for evaluations.csv and the task's samples; None writes nothing.
        """
        with self.ema.swapped():
            values = self.task.evaluate(folder, self.progress.iteration)
        check_evaluation(self.config.task, self.task, values, self.progress.iteration)
        report.add_evaluation(self.progress, values, self.task.held_out, folder)
        return values

    def load(self, folder: Path) -> None:
        """Restores the newest checkpoint, and notes what --allow-changed has changed since."""
        self.progress, before = load_checkpoint(folder, self.state, self.config.iterations)
        self.progress.changes += command_line.allowed_changes(before, self.config, self.progress.iteration)
        for _ in range(self.progress.iteration):
            self.schedule.step()


def build_task(flags: Flags) -> Task:
    """The task, with its model on its device and sharded over all processes."""
    config, kind = flags.run, task_class(flags.run.task)
    task = run_on_all_ranks(lambda: kind(flags.task, config.T))
    check_task(config.task, task)
    if config.beta:
        task.keep_reference()
    task.parallelize(processes.device_mesh(task.device.type, config.process_group_timeout))
    return task


def train(trainer: Trainer, folder: Path, stop_request: processes.StopRequest, tracker: Any, plan: str) -> None:
    """Iterates, evaluating and saving as often as the configuration says; saves the averaged model at the end.

    A stop request ends it before the model's next forward pass, and saves the last finished iteration.
    """
    config, task, progress, is_rank0 = trainer.config, trainer.task, trainer.progress, rank() == 0
    saved_at, saved = time.monotonic(), progress.iteration if progress.evaluations else None  # the newest checkpoint
    columns, seconds = (*METRICS, *task.step_metric_names), []
    log = run_dir.CsvLog(folder / "metrics.csv", columns, progress.iteration) if is_rank0 else report.NoTracker()
    tracker.replay(progress.evaluations)
    bar = tqdm(None, config.method, config.iterations, initial=progress.iteration, mininterval=1, disable=not is_rank0)
    checkpoints = Checkpoints(folder, trainer.state, config.checkpoints_total_limit, config.async_checkpoints)
    with bar, checkpoints, task.model.register_forward_pre_hook(stop_request.check, prepend=True):
        try:
            trainer.evaluate_if_due(folder, tracker)
            while progress.iteration < config.iterations:
                stop_request.check()  # for a model that runs without its hooks
                row = trainer.step()
                log.add({"iteration": progress.iteration, **row})
                seconds.append(row["seconds"])
                report.print_measured(seconds, progress.iteration, config.iterations, plan)
                tracker.add("train", progress.iteration, {name: row[name] for name in columns if name in row})
                if config.export_every and progress.iteration % config.export_every == 0:
                    with trainer.ema.swapped():  # before an evaluation, in which a signal may end the run
                        processes.only_warn(partial(task.save, folder / "exports" / f"{progress.iteration:06d}"))
                trainer.evaluate_if_due(folder, tracker)
                progress.checkpoint_seconds += checkpoints.finish_if_written()
                is_late = time.monotonic() > saved_at + 60 * config.checkpoint_minutes
                is_due = progress.iteration % config.checkpoint_every == 0 or progress.iteration == config.iterations
                if any(processes.all_gather(is_late or is_due)) and progress.consecutive_skips == 0:
                    progress.checkpoint_seconds += checkpoints.save(progress)
                    saved_at, saved = time.monotonic(), progress.iteration
                bar.set_postfix(report.postfix(row, progress.evaluations[-1], task), refresh=False)
                bar.update()
            progress.checkpoint_seconds += checkpoints.finish()
        except processes.StoppedBySignal as stop:
            stop.is_saved = bool(progress.evaluations) and progress.consecutive_skips == 0
            if stop.is_saved and saved != progress.iteration:
                trainer.optimizer.zero_grad()  # an unfinished iteration has changed nothing else
                processes.reshard(task.model)
                checkpoints.save(progress)
            raise
    with trainer.ema.swapped():
        task.save(folder)


def run(flags: Flags, stop_request: processes.StopRequest) -> None:
    """Checks, claims the folder, builds or restores, trains, reports."""
    config, hyper, kind = flags.run, flags.method, task_class(flags.run.task)
    folder = config.out or Path("runs") / f"{config.task}-{config.method}"
    settings = {"tool": TOOL, **asdict(config), **asdict(hyper), **asdict(flags.task), "out": folder}
    processes.check_same(environment(kind) | {name: settings[name] for name in settings.keys() - {"out", *kind.paths}})
    method = command_line.choose("method", config.method, METHODS)
    run_on_rank0(lambda: command_line.check(config, hyper, method, world_size()))
    open_tracker = run_on_all_ranks(lambda: report.tracker_class(config.tracker))
    changeable = command_line.changeable_on_resume(config) | kind.changeable_on_resume
    with run_dir.locked_folder(folder, "config.json", TOOL):
        run_on_rank0(lambda: run_dir.check_run_folder(folder, settings, config.resume, changeable))
        plan = run_on_all_ranks(lambda: report.announce(flags, kind, method, folder) if rank() == 0 else "")
        is_resumed = config.resume and bool(run_dir.checkpoints(folder))
        unread = dict.fromkeys(kind.start_paths if is_resumed else ())
        trainer = Trainer(config, hyper, build_task(replace(flags, task=replace(flags.task, **unread))))
        contents = run_on_all_ranks(lambda: trainer.task.contents() if processes.is_first_of_node() else {})
        processes.check_same(contents | sources())  # now with what the task has imported
        if is_resumed:
            run_on_rank0(lambda: run_dir.check_contents(folder, contents))
            trainer.load(folder)
        run_on_rank0(lambda: run_dir.record_run(folder, settings, contents, trainer.progress.changes, unread))
        with run_on_all_ranks(lambda: open_tracker(folder, settings)) as tracker:
            stop_request.is_deferred = True  # from here on `train` looks for it
            train(trainer, folder, stop_request, tracker, plan)
            # The other ranks wait for the report: torchrun ends every process as soon as one has failed.
            run_on_rank0(lambda: report.write_report(folder, trainer.task, trainer.progress, tracker, flags))


def main(arguments: list[str] | None = None) -> None:
    """Runs, under torchrun on every process; a failure ends with one line."""
    error = None
    try:
        with processes.stop_on_signals() as stop_request:
            flags = parse(arguments)
            processes.init_process_group(minutes=flags.run.process_group_timeout)
            run(flags, stop_request)
    except REPORTED as caught:
        error = caught
    exit_process(error, "continue with --resume", "raise --gradient-accumulation-steps, or see full_scale/README.md")


if __name__ == "__main__":
    main()
