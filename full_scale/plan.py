"""What a full-size run needs, from executing its own code on tensors without values: memory, operations, traffic, time.

    python -m full_scale plan            FLUX.1-dev, every weight, eight GPUs of 80 GiB, eight samples on each at once
    python -m full_scale plan --gpus 1 --lora-rank 64 --gradient-accumulation-steps 64     LoRA on one GPU
    python -m full_scale plan --nodes 2 --gradient-accumulation-steps 4 --json plan.json   two nodes of eight GPUs

The training's flags have the same meaning here.  Text is encoded in every step unless --prompts holds few prompts or
embeddings.  No weights, network or GPU are needed.  Operations are those of one step with the timesteps that --seed
draws.
"""

import argparse
import math
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import tyro
from torch.profiler import record_function
from tqdm import tqdm

from beyond import DEFAULTS, Hyper
from full_scale.models import FAMILIES
from full_scale.pipeline import check_trainable
from full_scale.prompts import few_prompts, read_prompts
from full_scale.simulation import SIMULATED_REWARD, Simulation, counted_host_copies, simulated, simulated_cluster
from full_scale.transformer import EXPORT_FILE_BYTES, export_files
from leap_align import require
from runtime import processes
from runtime.checkpoint import FILE_BYTES, checkpoint_bytes
from runtime.command_line import check, choose, parse
from runtime.cost_counter import HOST, Piece, total
from runtime.files import write_json
from train_leap_align import METHODS, TASKS, Config, Flags, TaskOptions, Trainer, task_class

GIB = 2**30
RESERVED_GIB = 3.0  # an assumption: CUDA's context, NCCL's and cuBLAS's buffers, fragmentation
KINDS = ("weights", "gathered weights", "gradients", "moments", "average", "reference", "activations", "frozen models")
PHASES = ("text", "rollout", "leaps", "decode", "reward", "backward", "optimizer", "EMA", "evaluation")


@dataclass(frozen=True)
class Machine:
    """The machine to plan for."""

    gpus: int = 8  # GPUs of a node.
    nodes: int = 1  # Nodes.
    gpu_memory: float = 80.0  # Memory of a GPU in GiB, as nvidia-smi shows it; a card sold as 48 GB has about 45.
    tflops: float = 400.0  # Operations that a GPU really does, in TFLOP/s: about 40 % of the bfloat16 peak of an H100.
    bandwidth: tuple[float, float] = (400.0, 40.0)
    """GB/s at which a GPU receives from its own node, and from other nodes."""
    host_bandwidth: float = 20.0  # GB/s at which a GPU and host memory exchange, with --cpu-offload.
    disk: float = 1.0  # GB/s at which all processes of a node together read and write files.
    stored_embeddings: bool = False
    """Plan for prompts from `python -m full_scale embed`, or for at most 200 prompts, without giving --prompts."""
    json: Path | None = None  # File for the plan's numbers.

    @property
    def world_size(self) -> int:
        """GPUs of all nodes, one process each."""
        return self.gpus * self.nodes


@dataclass(frozen=True)
class PlanConfig(Config):
    """The run; flags that do not matter to a plan are not offered."""

    task: str = "flux"  # Model: flux (FLUX.1-dev), sd3 (SD3.5-M) or klein (FLUX.2-klein).
    tracker: tyro.conf.Suppress[str | None] = None
    out: tyro.conf.Suppress[Path | None] = None
    resume: tyro.conf.Suppress[bool] = False
    allow_changed: tyro.conf.Suppress[tuple[str, ...]] = ()


@dataclass(frozen=True)
class PlanFlags(Flags[TaskOptions]):
    """The training's flags and the machine."""

    run: PlanConfig
    machine: Machine = Machine()


@dataclass
class Costs:
    """What a run needs."""

    peaks: dict[str, dict[str, int]]  # bytes alive on a GPU at each phase's peak, by kind
    pieces: dict[str, Counter[Piece]]  # of one optimizer step on one GPU, by phase
    evaluation: Counter[Piece]  # of one image
    host: dict[str, int]  # bytes of a node's main memory while a run loads, writes a checkpoint, exports
    disk: dict[str, int]  # bytes read at the start, of a checkpoint, of all that exist at a time, and of the export

    def gib(self) -> float:
        """The largest peak of all phases."""
        return max(map(total_gib, self.peaks.values()))

    def fits(self, machine: Machine) -> bool:
        """Whether the peak leaves RESERVED_GIB of a GPU free."""
        return self.gib() + RESERVED_GIB <= machine.gpu_memory


def total_gib(peak: dict[str, int]) -> float:
    """GiB alive at a phase's peak."""
    return sum(peak.values()) / GIB


# ------------------------------------------------------ Execute ------------------------------------------------------
def simulate(flags: PlanFlags, title: str) -> Costs:
    """Executes one optimizer step and the evaluation of one image, as rank 0 of the machine, with a bar."""
    machine = flags.machine
    simulation = Simulation(PHASES, machine.gpus)
    with (
        tempfile.TemporaryDirectory() as folder,
        simulated_cluster(machine.nodes, machine.gpus),
        counted_host_copies(simulation),
        tqdm(desc=title, total=3, leave=False) as bar,
    ):
        trainer = start_trainer(flags, simulation, Path(folder))
        with simulation:
            warm_up(trainer)
        label(simulation, trainer)
        simulation.phases.clear()
        bar.update()
        with simulation:
            pieces = step_pieces(simulation, trainer)
            bar.update()
            with trainer.ema.swapped(), torch.no_grad(), record_function("evaluation"):
                trainer.task.evaluate_images("a red cube", trainer.task.noise(1, torch.Generator()))
            bar.update()
        peaks = {name: simulation.phases[name].peak for name in PHASES}
        pieces = {name: pieces[name] for name in PHASES if name in pieces}
        evaluation = simulation.phases["evaluation"].counted()
        return Costs(peaks, pieces, evaluation, *host_and_disk(trainer, machine))


def start_trainer(flags: PlanFlags, simulation: Simulation, folder: Path) -> Trainer:
    """The trainer of the run, whose networks have no values."""
    name, prompts = flags.run.task, folder / "prompts.txt"
    write_json(folder / "model_index.json", {"_class_name": FAMILIES[name].pipeline_name})
    prompts.write_text("".join(f"prompt {i}\n" for i in range(10_000)))
    files = {"model": str(folder), "prompts": prompts, "evaluation_prompts": None, "lora": None, "transformer": None}
    kind = simulated(task_class(name), flags.task.model, simulation, flags.machine.stored_embeddings)
    task = kind(replace(flags.task, **files), flags.run.T)
    if flags.run.beta:
        task.keep_reference()
    with simulation:
        task.parallelize(processes.device_mesh("cpu"))
    return Trainer(flags.run, flags.method, task)


def label(simulation: Simulation, trainer: Trainer) -> None:
    """Says what the storages that exist before the step are."""
    task, model, states = trainer.task, trainer.task.model, trainer.optimizer.state.values()
    modules = [("reference", each) for each in task.transformers()] + [("weights", model)]
    for kind, module in modules + [("frozen models", each) for each in task.frozen_modules()]:
        simulation.label(kind, [*module.parameters(), *module.buffers()])
    simulation.label("average", trainer.ema.average)
    moments = [value for state in states for value in state.values() if torch.is_tensor(value)]
    simulation.label("moments", moments)
    if task.options.cpu_offload:
        simulation.label(HOST, [*task.transformers().parameters(), *trainer.ema.average, *moments])
    shapes = [(p.shape, p.to_local().shape if hasattr(p, "to_local") else p.shape) for p in trainer.parameters]
    simulation.gradient_shapes = {shape for pair in shapes for shape in pair}


def warm_up(trainer: Trainer) -> None:
    """What only a first step does: the moments, from zero gradients, and what a task keeps of its prompts."""
    trainer.task.velocity(["a red cube"])
    for parameter in trainer.parameters:
        parameter.grad = torch.zeros_like(parameter)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()


def step_pieces(simulation: Simulation, trainer: Trainer) -> dict[str, Counter[Piece]]:
    """What one step costs, by phase.  At most two microbatches are executed, for all but the last one cost the same.

    The second one shows the peak, because the first one has left its gradient.
    """
    run, microbatches = trainer.config, []
    steps, executed = run.gradient_accumulation_steps, min(run.gradient_accumulation_steps, 2)
    trainer.config = replace(run, gradient_accumulation_steps=executed, batch_size=run.batch_size // steps * executed)
    backward = trainer.backward

    def counted(*arguments: Any, **keywords: Any) -> Any:
        before = pieces_by_phase(simulation)
        result = backward(*arguments, **keywords)
        after = pieces_by_phase(simulation).items()
        microbatches.append({name: pieces - before.get(name, Counter()) for name, pieces in after})
        return result

    trainer.backward = counted
    trainer.step()
    pieces = pieces_by_phase(simulation)
    for name, repeated in microbatches[0].items():
        pieces[name].update({key: (steps - executed) * value for key, value in repeated.items()})
    return pieces


def pieces_by_phase(simulation: Simulation) -> dict[str, Counter[Piece]]:
    """What each phase has cost until now."""
    return {name: cost.counted() for name, cost in simulation.phases.items()}


def host_and_disk(trainer: Trainer, machine: Machine) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes of a node's main memory, and of the run's folder, derived from the writers' own limits.

    The processes of a node map the same files, and write file by file.
    """
    task, checkpoint = trainer.task, checkpoint_bytes(trainer.parameters)
    transformer = export_files(task.empty_transformer(), task.dtype).metadata["total_size"]
    export = checkpoint // 4 if task.options.lora_rank else transformer  # the adapters' average
    most = (trainer.config.checkpoints_total_limit + 1) * checkpoint
    loading = sum(p.nbytes for module in task.frozen_modules() for p in module.parameters())
    is_async = trainer.config.async_checkpoints
    saving = checkpoint // machine.nodes if is_async else min(machine.gpus * FILE_BYTES, checkpoint)
    host, start = {"loading": loading, "checkpoint": saving}, 2 * (loading + transformer)  # once for the digest
    if task.options.cpu_offload:
        processes.reshard(task.model)
        host["training"] = machine.gpus * sum(map(offloaded_bytes, task.transformers().parameters()))
    disk = {"read at the start": start, "checkpoint": checkpoint, "checkpoints at most": most, "export": export}
    if every := trainer.config.export_every:
        disk["exports along the way"] = trainer.config.iterations // every * export
    return host | {"export": min(EXPORT_FILE_BYTES, export)}, disk


def offloaded_bytes(parameter: torch.nn.Parameter) -> int:
    """Bytes of host memory for a process's shard: weight, gradient, two moments and average, or a frozen weight."""
    size = parameter.to_local().nbytes
    pinned = 1 << (size - 1).bit_length()  # torch rounds page-locked memory, of weight and gradient, up to a power of 2
    return 2 * pinned + 3 * size if parameter.requires_grad else pinned


# ------------------------------------------------------- Judge -------------------------------------------------------
def seconds(pieces: Counter[Piece], machine: Machine) -> float:
    """Time of a phase: a piece's computing overlaps with its traffic within the node, and with no other."""
    within, between, host = (1e9 * bandwidth for bandwidth in (*machine.bandwidth, machine.host_bandwidth))
    overlapping = {p: max(p.flop / machine.tflops / 1e12, p.within / within) for p in pieces}
    times = {p: overlapping[p] + p.between / between + p.host / host for p in pieces}
    return sum(n * times[piece] for piece, n in pieces.items())


def hours(flags: PlanFlags, costs: Costs) -> dict[str, float]:
    """Hours of the whole run, by what takes them, exports with the checkpoints.  Evaluators of --held-out not known."""
    run, machine, disk = flags.run, flags.machine, {name: value / 1e9 for name, value in costs.disk.items()}
    step = sum(seconds(pieces, machine) for pieces in costs.pieces.values())
    images = math.ceil(flags.task.evaluation_images / machine.world_size) * seconds(costs.evaluation, machine)
    waits = min(checkpoints(run, step), 1 if run.async_checkpoints else run.iterations)  # the run ends with a wait
    written = waits * disk["checkpoint"] + disk["export"] + disk.get("exports along the way", 0)
    return {
        "iterations": run.iterations * step / 3600,
        "evaluations": (1 + math.ceil(run.iterations / run.evaluate_every)) * images / 3600,
        "checkpoints": written / machine.disk / 3600,
        "start": disk["read at the start"] / machine.disk / 3600,
    }


def checkpoints(run: Config, step: float) -> int:
    """How many checkpoints a run writes whose iterations take so many seconds."""
    saved = [0]
    for i in range(1, run.iterations + 1):
        is_late = (i - saved[-1]) * step > 60 * run.checkpoint_minutes
        if is_late or i % run.checkpoint_every == 0 or i == run.iterations:
            saved.append(i)
    return len(saved) - 1


def remedies(flags: PlanFlags) -> Iterator[tuple[str, PlanFlags]]:
    """Changes of flags that save memory, in the order of what they cost; each comes with the ones before it."""
    machine, run, task, text = flags.machine, flags.run, flags.task, ""
    most = run.batch_size // machine.world_size
    accumulation = f"--gradient-accumulation-steps {most}"
    stored = "--stored-embeddings (prompts from `embed`, or at most 200)"
    gathers = machine.gpus > 1 and not task.reshard_after_forward
    can_quantize = machine.world_size == 1 and not task.load_in_4bit and find_spec("torchao")
    for helps, change, part, values in (
        (task.gradient_checkpointing != "on", "--gradient-checkpointing on", "task", {"gradient_checkpointing": "on"}),
        (run.gradient_accumulation_steps < most, accumulation, "run", {"gradient_accumulation_steps": most}),
        (gathers, "--reshard-after-forward", "task", {"reshard_after_forward": True}),
        (not machine.stored_embeddings, stored, "machine", {"stored_embeddings": True}),
        (not task.lora_rank, "--lora-rank 64 --lr 1e-4", "task", {"lora_rank": 64}),
        (can_quantize, "--load-in-4bit", "task", {"load_in_4bit": True}),
    ):
        if helps:
            text, flags = f"{text} {change}".strip(), replace(flags, **{part: replace(getattr(flags, part), **values)})
            yield text, flags


def verdict(flags: PlanFlags, costs: Costs) -> str:
    """Whether the run fits, and if not, the first of `remedies` with which it does."""
    machine, least = flags.machine, costs.gib()
    if costs.fits(machine):
        return "fits"
    for change, changed in remedies(flags):
        costs = simulate(changed, f"with {change}")
        if costs.fits(machine):
            return f"does not fit; with {change} it does ({costs.gib():.1f} GiB)"
        least = min(least, costs.gib())
    more = "use more or larger GPUs"
    if machine.world_size == 1 and find_spec("torchao") is None:
        more += ", or install torchao and plan --load-in-4bit"
    return f"does not fit; with all changes of flags it still needs {least:.1f} GiB: {more}"


# ------------------------------------------------------- Report ------------------------------------------------------
def plan(arguments: list[str]) -> None:
    """Compute memory, time and traffic of a full-size run by executing its code on tensors without values."""
    flags = read_flags(arguments)
    import diffusers  # not for --help, which ends above

    diffusers.utils.logging.set_verbosity_error()
    machine, costs = flags.machine, simulate(flags, "plan")
    values = numbers(flags, costs)
    print_tables(values["phases"])
    for title, kind in {"host memory of a node": "host_gb", "disk": "disk_gb"}.items():
        print(f"{title}: " + ", ".join(f"{name} {value:.1f} GB" for name, value in values[kind].items()))
    parts = ", ".join(f"{name} {value:.2f}" for name, value in values["hours"].items())
    share = 100 * values["hours"]["checkpoints"] / sum(values["hours"].values())
    print(f"hours of {flags.run.iterations} iterations: {parts}; checkpoints take {share:.1f} % of them")
    print(values["summary"])
    judgement = verdict(flags, costs)
    print(f"{costs.gib():.1f} GiB and {RESERVED_GIB:.0f} reserved, of {machine.gpu_memory:.0f} GiB: {judgement}")
    if machine.json:
        write_json(machine.json, values | {"verdict": judgement})


def read_flags(arguments: list[str]) -> PlanFlags:
    """The command line, for FLUX.1-dev if it names no task; refuses values that cannot work."""
    ignored = argparse.ArgumentParser(add_help=False, allow_abbrev=False)  # a training's flags may be pasted
    ignored.add_argument("--tracker"), ignored.add_argument("--out"), ignored.add_argument("--allow-changed", nargs="+")
    ignored.add_argument("--resume", action="store_true")
    arguments, tasks = ignored.parse_known_args(arguments)[1], {name: TASKS[name] for name in FAMILIES}
    program = "python -m full_scale plan"
    flags = parse(arguments, PlanFlags, PlanConfig, Hyper, tasks, DEFAULTS, __doc__, program)
    run, task, machine = flags.run, flags.task, flags.machine
    if machine.json:
        require(machine.json.parent.is_dir(), f"json: {machine.json.parent} does not exist: make it first")
    published = task_class(run.task).Options.model
    if task.model != published:
        is_folder = (Path(task.model) / "model_index.json").is_file()
        require(is_folder, f"model={task.model}: give a pipeline's folder, or leave it out to plan for {published}")
        check_trainable(FAMILIES[run.task], Path(task.model))
    is_known = task.reward == SIMULATED_REWARD
    require(is_known, f"reward={task.reward}: plan knows {SIMULATED_REWARD}; plan with that one")
    for name in ("gpus", "nodes", "gpu_memory", "tflops", "bandwidth", "host_bandwidth", "disk"):
        value = min(machine.bandwidth) if name == "bandwidth" else getattr(machine, name)
        require(0 < value < math.inf, f"{name}={value:g} must be positive and finite")
    check(run, flags.method, choose("method", run.method, METHODS), machine.world_size)
    if (path := task.prompts) and (path.is_dir() or few_prompts(read_prompts(path))):
        return replace(flags, machine=replace(machine, stored_embeddings=True))
    return flags


def numbers(flags: PlanFlags, costs: Costs) -> dict[str, Any]:
    """The plan as JSON: of one GPU or node; tflop_per_step and gpu_hours of all GPUs together."""
    machine, run_hours, phases = flags.machine, hours(flags, costs), {}
    for name, peak in costs.peaks.items():
        pieces = costs.pieces.get(name, Counter())
        flop, within, between, host = total(pieces)
        phases[name] = {"gib": {kind: peak.get(kind, 0) / GIB for kind in KINDS}, "peak_gib": total_gib(peak)}
        phases[name] |= {"tflop": flop / 1e12, "seconds": seconds(pieces, machine)}
        phases[name] |= {"gb_within": within / 1e9, "gb_between": between / 1e9, "gb_host": host / 1e9}
    step, gpu_hours = sum(phase["seconds"] for phase in phases.values()), sum(run_hours.values()) * machine.world_size
    whole = f"{sum(run_hours.values()):.2f} hours and {gpu_hours:.1f} GPU-hours in all"
    return {
        "summary": f"{step:.2f} s an iteration, {costs.gib():.1f} GiB on a GPU, {whole}",
        "settings": planned_settings(flags),
        "peak_gib": costs.gib(),
        "training_gib": max(total_gib(peak | {"frozen models": 0}) for peak in costs.peaks.values()),
        "fits": costs.fits(machine),
        "tflop_per_step": sum(phase["tflop"] for phase in phases.values()) * machine.world_size,
        "seconds_per_step": step,
        "hours": run_hours,
        "gpu_hours": gpu_hours,
        "host_gb": {name: value / 1e9 for name, value in costs.host.items()},
        "disk_gb": {name: value / 1e9 for name, value in costs.disk.items()},
        "phases": phases,
    }


def planned_settings(flags: PlanFlags) -> dict[str, Any]:
    """Those that a run compares with its own."""
    settings = asdict(flags.run) | asdict(flags.method) | asdict(flags.task)
    settings |= {"processes": flags.machine.world_size, "processes a node": str(flags.machine.gpus)}
    unknown = {"tracker", "out", "resume", "allow_changed", *task_class(flags.run.task).paths}
    return {name: settings[name] for name in settings.keys() - unknown}


def print_tables(phases: dict[str, dict[str, Any]]) -> None:
    """Memory: a row per phase, a column per kind.  Time: a row per phase of an optimizer step, and their sum."""
    print(f"\n{'GiB per GPU':12}" + "".join(f"{kind.split()[0]:>12}" for kind in (*KINDS, "sum")))
    for name, phase in phases.items():
        print(f"{name:12}" + "".join(f"{value:12.2f}" for value in (*phase["gib"].values(), phase["peak_gib"])))
    print(f"\n{'per GPU':12}{'TFLOP':>12}{'GB in node':>12}{'GB between':>12}{'GB to host':>12}{'seconds':>12}")
    columns = ("tflop", "gb_within", "gb_between", "gb_host", "seconds")
    rows = {name: [phase[column] for column in columns] for name, phase in phases.items()}
    rows = {name: values for name, values in rows.items() if any(values)}
    for name, values in (rows | {"step": map(sum, zip(*rows.values()))}).items():
        print(f"{name:12}" + "".join(f"{value:12.1f}" for value in values))
    print()
