"""One trainer for every task and every method.

    python train_leap_align.py                                     the 2-D toy with LeapAlign, from nothing
    python train_leap_align.py --task digits                       the same on 8x8 images of real digits
    python train_leap_align.py --method drtune --out runs/drtune   another method
    torchrun --nproc_per_node=2 train_leap_align.py                two processes, with the same result
    python train_leap_align.py --task flux --help                  every flag of a task, here FLUX.1-dev

A run's folder holds config.json, metrics.csv (a row per iteration), evaluations.csv, result.json (the evaluators before
and after training), figures, checkpoint/ and the trained weights' average (model/, transformer/ or lora/).
"""

import argparse
import math
import pkgutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

import torch
import tyro
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.profiler import record_function
from tqdm import tqdm

from leap_align import METHODS, BadInput, BatchGenerator, Endpoints, Hyper, differentiable, objective, uniform_times
from runtime import processes, report
from runtime.checkpoint import Progress, load_checkpoint, save_checkpoint
from runtime.ema import EMA
from runtime.processes import full_value, rank, run_on_all_ranks, run_on_rank0, world_size
from runtime.run_dir import CsvLog, check_shared_folder, claim_run_folder, write_csv
from runtime.task import Task

TASKS = {
    "toy": "toy.modes:Modes",
    "digits": "toy.digits:Digits",
    "flux": "flux_adapter:Flux",
    "sd3": "flux_adapter:SD3",
}
"""Where each task's class is; it is imported only when the task is chosen."""
METRICS = ("loss", "reward", "grad_norm", "weight", "d_j", "d_0", "hinge_active", "i_k", "i_j", "seconds", "skipped")
"""The columns of metrics.csv, after `iteration` and before those of the task."""
CHANGEABLE_ON_RESUME = frozenset(
    "iterations gradient_accumulation_steps evaluate_every checkpoint_every checkpoints_total_limit max_skipped_steps "
    "out resume".split()
)
"""Fields of Config that may change on --resume: no iteration depends on them."""


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
    return pkgutil.resolve_name(choose("task", name, TASKS))


def parse(arguments: list[str] | None) -> Flags:
    """The command line.  Task and reward are read first, because they decide about flags and defaults."""
    first_pass = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first_pass.add_argument("--task", default=Config.task)
    first_pass.add_argument("--reward")
    chosen, _ = first_pass.parse_known_args(arguments)
    kind = task_class(chosen.task)
    defaults = kind.defaults(chosen.reward)
    run = {name: value for name, value in defaults.items() if name in Config.__dataclass_fields__}
    method = {name: value for name, value in defaults.items() if name in Hyper.__dataclass_fields__}
    return tyro.cli(
        Annotated[Flags[kind.Options], tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff],
        args=arguments,
        default=Flags(Config(task=chosen.task, **run), Hyper(**method), kind.Options()),
        description=__doc__,
    )


def check(config: Config, hyper: Hyper, world_size: int) -> None:
    """Refuses values that cannot work, before anything expensive is built."""
    method = choose("method", config.method, METHODS)
    least = {"T": 2, "iterations": 0, "weight_decay": 0, "seed": 0, "batch_size": 1, "gradient_accumulation_steps": 1}
    least |= {"evaluate_every": 1, "checkpoint_every": 1, "checkpoints_total_limit": 1, "max_skipped_steps": 1}
    for name, bound in least.items():
        if not bound <= getattr(config, name) < 2**63:
            raise BadInput(f"{name}={getattr(config, name)} must be at least {bound}")
    if not config.lr > 0 or not config.max_grad_norm > 0:
        raise BadInput(f"lr={config.lr} and max_grad_norm={config.max_grad_norm} must be positive")
    if not 0 <= config.ema_decay < 1:
        raise BadInput(f"ema_decay={config.ema_decay} must lie in [0, 1)")
    if config.batch_size % (world_size * config.gradient_accumulation_steps):
        raise BadInput(
            f"batch_size={config.batch_size} must be a multiple of {world_size} processes x "
            f"gradient_accumulation_steps={config.gradient_accumulation_steps}"
        )
    # The method itself checks its hyperparameters against T: run it once with a model that costs nothing.
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
            raise BadInput("trained parameters must exist and be float32: bfloat16 loses steps of 1e-5 and the average")
        # Fused: one pass over the weights instead of a dozen.
        decay = config.weight_decay
        self.optimizer = torch.optim.AdamW(self.parameters, lr=config.lr, weight_decay=decay, fused=True)
        self.ema = EMA(self.parameters, config.ema_decay)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.progress = Progress()

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
            if isinstance(task.model, FSDPModule):
                task.model.set_requires_all_reduce(rows == microbatches[-1])  # between nodes once an iteration
            # Every microbatch starts from the same state, so that all of them draw the same timesteps.
            generator = BatchGenerator(batch_size, rows)
            generator.set_state(state)
            metrics.append(self.backward(condition[rows], x_T[rows].to(task.device), generator))
        self.generator.set_state(generator.get_state())
        row = processes.mean_over_ranks(mean(metrics), task.device)
        row["grad_norm"] = self.optimizer_step(row["loss"])
        self.progress.iteration += 1
        row |= {"seconds": time.perf_counter() - start, "skipped": float(self.progress.consecutive_skips > 0)}
        self.progress.seconds += row["seconds"]
        return row

    def backward(self, condition: Any, x_T: Tensor, generator: torch.Generator) -> dict[str, float]:
        """Adds the gradient of one microbatch; returns its metrics.

        The loss is the sum over the method's endpoints, as in Algorithm 1; other metrics are means over them.
        """
        with record_function("text"):
            velocity = self.task.velocity(condition)
        endpoints = self.method(velocity, x_T, self.task.times, self.hyper, generator)
        metrics = [self.backward_endpoint(x_0, weight, condition) for x_0, weight in endpoints]
        log = endpoints.log | {"loss": sum(row["loss"] for row in metrics)}
        return mean(metrics) | {name: torch.as_tensor(value).float().mean().item() for name, value in log.items()}

    def backward_endpoint(self, x_0: Tensor, weight: Tensor, condition: Any) -> dict[str, float]:
        """Adds the gradient of one endpoint of the method; returns its metrics."""
        lam = self.hyper.lam
        with record_function("decode"):
            sample = self.task.decode(x_0)
        with record_function("reward"):
            reward = differentiable(self.task.reward(sample, condition), x_0)
        loss = objective(reward, weight, lam)
        with record_function("backward"):
            (loss / self.config.gradient_accumulation_steps).backward()
        active = 1.0 if lam is None else (reward < lam).float().mean().item()
        metrics = {"loss": loss.item(), "reward": reward.mean().item(), "weight": weight.mean().item()}
        return metrics | {"hinge_active": active} | self.task.step_metrics(sample)

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
            raise BadInput(f"{skips} steps in a row skipped, now with {message}: lower lr or check the reward")

    def evaluate(self, folder: Path | None = None) -> dict[str, float]:
        """Evaluates the averaged weights and reports new signs of reward hacking.

        folder: the run's folder, for evaluations.csv and the task's samples; None writes nothing.
        """
        progress = self.progress
        with self.ema.swapped():
            values = self.task.evaluate(folder, progress.iteration)
        if broken := [name for name, value in values.items() if not math.isfinite(value)]:
            raise BadInput(f"{', '.join(broken)} not finite at iteration {progress.iteration}: lower lr")
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
        self.progress = load_checkpoint(folder, self.task.model, self.optimizer, self.ema, self.generator)
        if (done := self.progress.iteration) > self.config.iterations:
            raise BadInput(f"iterations={self.config.iterations}, but the run has already done {done}")


def mean(rows: list[dict[str, float]]) -> dict[str, float]:
    """The mean of each entry over rows with the same entries."""
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


def build_task(config: Config, options: Any) -> Task:
    """The task, with its model on its device and sharded over all processes."""
    kind = task_class(config.task)
    task = run_on_all_ranks(lambda: kind(options, config.T))
    task.parallelize(processes.device_mesh(task.device.type))
    return task


def train(trainer: Trainer, folder: Path, stop_request: processes.StopRequest) -> None:
    """Evaluates, then iterates, evaluating and saving as often as the configuration says; saves the averaged model."""
    config, task, is_rank0 = trainer.config, trainer.task, rank() == 0
    results_folder = folder if is_rank0 else None
    if config.resume:
        trainer.restore(folder)
    else:
        trainer.evaluate(results_folder)
    progress = trainer.progress
    log = CsvLog(folder / "metrics.csv", (*METRICS, *task.step_metric_names), progress.iteration) if is_rank0 else None
    total, done = config.iterations, progress.iteration
    # mininterval: at most one line a second where the output is a file.
    bar = tqdm(desc=config.method, total=total, initial=done, mininterval=1, disable=not is_rank0)
    while progress.iteration < config.iterations:
        row = trainer.step()
        if log:
            log.add({"iteration": progress.iteration, **row})
        last = progress.iteration == config.iterations
        if progress.iteration % config.evaluate_every == 0 or last:
            trainer.evaluate(results_folder)
        stop = max(processes.all_gather(stop_request.signal))
        if progress.iteration % config.checkpoint_every == 0 or last or stop:
            trainer.save(folder)
        if stop and not last:
            raise processes.StoppedBySignal(stop)
        held_out = {name: f"{progress.evaluations[-1][name]:.3f}" for name in list(task.held_out)[:2]}
        bar.set_postfix(reward=f"{row['reward']:.3f}", grad=f"{row['grad_norm']:.2g}", **held_out, refresh=False)
        bar.update()
    bar.close()
    with trainer.ema.swapped():
        task.save(folder)


def write_report(trainer: Trainer, folder: Path) -> None:
    """Writes result.json and the figures, prints the evaluators before and after."""
    progress = trainer.progress
    results = progress.evaluations, progress.seconds, progress.signs
    report.write_result(folder, *results)
    report.draw_curves(folder, progress.evaluations)
    trainer.task.draw_figures(folder)
    report.print_summary(folder, *results)


def run(arguments: list[str] | None) -> None:
    """Parses, checks, trains, reports."""
    flags = parse(arguments)
    processes.init_process_group()
    config, hyper = flags.run, flags.method
    run_on_rank0(lambda: check(config, hyper, world_size()))
    folder = config.out or Path("runs") / f"{config.task}-{config.method}"
    settings = {**asdict(config), **asdict(hyper), **asdict(flags.task), "out": folder}
    changeable = CHANGEABLE_ON_RESUME | task_class(config.task).changeable_on_resume
    run_on_rank0(lambda: claim_run_folder(folder, settings, config.resume, changeable))
    run_on_all_ranks(lambda: check_shared_folder(folder))
    trainer = Trainer(config, hyper, build_task(config, flags.task))
    with processes.stop_on_signals() as stop_request:
        train(trainer, folder, stop_request)
    # The other ranks wait for the report: torchrun ends every process as soon as one has failed.
    run_on_rank0(lambda: write_report(trainer, folder))


def main(arguments: list[str] | None = None) -> None:
    """Runs, under torchrun on every process; a failure ends with one line."""
    error = None
    try:
        run(arguments)
    except (BadInput, processes.StoppedBySignal, OSError, RuntimeError, KeyboardInterrupt) as caught:
        error = caught
    processes.exit_process(error)


if __name__ == "__main__":
    main()
