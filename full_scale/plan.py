"""What a full-size run needs, from executing its own code on tensors without values: memory, operations, traffic, time.

    python -m full_scale plan            FLUX.1-dev, every weight, eight GPUs of 80 GiB, eight samples on each at once
    python -m full_scale plan --gpus 1 --lora-rank 64 --gradient-accumulation-steps 64     LoRA on one GPU
    python -m full_scale plan --nodes 2 --gradient-accumulation-steps 4 --json plan.json   two nodes of eight GPUs

All flags of the training are flags here, with the same meaning.  Text is encoded in every step unless --prompts holds
few prompts or embeddings.  No weights, network or GPU are needed.
Operations are those of one step with the timesteps that --seed draws.
"""

import math
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor
from torch.profiler import record_function
from tqdm import tqdm

from full_scale.models import FAMILIES
from full_scale.pipeline import check_trainable
from full_scale.prompts import few_prompts, read_prompts
from full_scale.simulation import SIMULATED_REWARD, Simulation, simulated, simulated_cluster
from full_scale.transformer import EXPORT_FILE_BYTES, export_files
from leap_align import BadInput
from runtime import processes
from runtime.checkpoint import HOST_BYTES, checkpoint_bytes
from runtime.cost_counter import BETWEEN, FLOP, WITHIN
from runtime.run_dir import write_json
from train_leap_align import Flags, TaskOptions, Trainer, check, parse, task_class

GIB = 2**30
RESERVED_GIB = 3.0
"""What a GPU needs beside tensors: CUDA's context, NCCL's and cuBLAS's buffers, fragmentation.  An assumption."""
KINDS = ("weights", "gathered weights", "gradients", "moments", "average", "reference", "activations", "frozen models")
PHASES = ("text", "rollout", "leaps", "decode", "reward", "backward", "optimizer", "EMA", "evaluation")


@dataclass(frozen=True)
class Machine:
    """The machine to plan for."""

    gpus: int = 8
    """GPUs of a node."""
    nodes: int = 1
    """Nodes."""
    gpu_memory: float = 80.0
    """Memory of a GPU in GiB, as nvidia-smi shows it; a card sold as 48 GB has about 45."""
    tflops: float = 400.0
    """Operations that a GPU really does, in TFLOP/s: about 40 % of the bfloat16 peak of an H100."""
    bandwidth: tuple[float, float] = (400.0, 40.0)
    """GB/s at which a GPU receives from its own node, and from other nodes."""
    stored_embeddings: bool = False
    """Plan for prompts from `python -m full_scale embed`, or for at most 200 prompts, without giving --prompts."""
    json: Path | None = None
    """File for the plan's numbers."""


def check_machine(machine: Machine) -> None:
    """Refuses a machine that does not exist."""
    values = {"gpus": machine.gpus, "nodes": machine.nodes, "gpu_memory": machine.gpu_memory}
    values |= {"tflops": machine.tflops, "bandwidth": min(machine.bandwidth)}
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise BadInput(f"{name}={value:g} must be positive and finite")


@dataclass(frozen=True)
class PlanFlags(Flags[TaskOptions]):
    """The training's flags and the machine."""

    machine: Machine = Machine()


@dataclass
class Costs:
    """What a run needs."""

    peaks: dict[str, dict[str, int]]
    """Bytes alive on a GPU at each phase's peak, by kind."""
    counts: dict[str, Counter[str]]
    """Of one optimizer step on one GPU, by phase."""
    host: dict[str, int]
    """Bytes of a node's main memory while a run loads, writes a checkpoint, exports."""
    disk: dict[str, int]
    """Bytes of a checkpoint, of all that exist at the same time, and of the export."""


# ---------------------------------------------------------------------------------------------------------------------
# Execute
# ---------------------------------------------------------------------------------------------------------------------


def simulate(flags: PlanFlags, title: str) -> Costs:
    """Executes one optimizer step and the evaluation of one image, as rank 0 of the machine, with a bar."""
    machine = flags.machine
    simulation = Simulation(PHASES, machine.gpus)
    with (
        tempfile.TemporaryDirectory() as folder,
        simulated_cluster(machine.nodes, machine.gpus),
        tqdm(desc=title, total=3, leave=False) as bar,
    ):
        trainer = start_trainer(flags, simulation, Path(folder))
        label(simulation, trainer)
        bar.update()
        with simulation:
            warm_up(trainer)
            simulation.label("moments", optimizer_tensors(trainer))
            simulation.phases.clear()
            counts = step_counts(simulation, trainer)
            bar.update()
            simulate_evaluation(trainer)
            bar.update()
        peaks = {name: simulation.phases[name].peak for name in PHASES}
        counts = {name: counts[name] for name in PHASES if name in counts}
        return Costs(peaks, counts, host_bytes(trainer, machine), disk_bytes(trainer))


def start_trainer(flags: PlanFlags, simulation: Simulation, folder: Path) -> Trainer:
    """The trainer of the run, whose networks have no values."""
    write_json(folder / "model_index.json", {"_class_name": FAMILIES[flags.run.task].pipeline_name})
    (folder / "prompts.txt").write_text("".join(f"prompt {i}\n" for i in range(10_000)))
    files = {"model": str(folder), "prompts": folder / "prompts.txt", "evaluation_prompts": None}
    name = flags.run.task
    kind = simulated(task_class(name), name, flags.task.model, simulation, flags.machine.stored_embeddings)
    task = kind(replace(flags.task, **files), flags.run.T)
    if flags.method.beta:
        task.keep_reference()
    with simulation:
        task.parallelize(processes.device_mesh("cpu"))
    return Trainer(flags.run, flags.method, task)


def label(simulation: Simulation, trainer: Trainer) -> None:
    """Says what the storages that exist before the step are."""
    task, model = trainer.task, trainer.task.model
    for reference in task.transformers():
        simulation.label("reference", [*reference.parameters(), *reference.buffers()])
    simulation.label("weights", [*model.parameters(), *model.buffers()])
    simulation.label("average", trainer.ema.average)
    for module in task.frozen_modules():
        simulation.label("frozen models", [*module.parameters(), *module.buffers()])
    shapes = [(p.shape, p.to_local().shape if hasattr(p, "to_local") else p.shape) for p in trainer.parameters]
    simulation.gradient_shapes = {shape for pair in shapes for shape in pair}


def warm_up(trainer: Trainer) -> None:
    """What only a first step does: the moments, from zero gradients, and what a task keeps of its prompts."""
    trainer.task.velocity(["a red cube"])
    for parameter in trainer.parameters:
        parameter.grad = torch.zeros_like(parameter)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()


def optimizer_tensors(trainer: Trainer) -> list[Tensor]:
    """The moments of AdamW."""
    return [value for state in trainer.optimizer.state.values() for value in state.values() if torch.is_tensor(value)]


def step_counts(simulation: Simulation, trainer: Trainer) -> dict[str, Counter[str]]:
    """Counts of one step by phase.  At most two microbatches are executed, for all but the last one cost the same.

    The second one shows the peak, because the first one has left its gradient.
    """
    run, microbatches = trainer.config, []
    steps, executed = run.gradient_accumulation_steps, min(run.gradient_accumulation_steps, 2)
    trainer.config = replace(run, gradient_accumulation_steps=executed, batch_size=run.batch_size // steps * executed)
    backward = trainer.backward

    def counted(*arguments: Any, **keywords: Any) -> Any:
        before = counts_by_phase(simulation)
        result = backward(*arguments, **keywords)
        after = counts_by_phase(simulation)
        microbatches.append({name: after[name] - before.get(name, Counter()) for name in after})
        return result

    trainer.backward = counted
    trainer.step()
    counts = counts_by_phase(simulation)
    for name, repeated in microbatches[0].items():
        for key, value in repeated.items():
            counts[name][key] += (steps - executed) * value
    return counts


def counts_by_phase(simulation: Simulation) -> dict[str, Counter[str]]:
    """What each phase has counted until now."""
    return {name: Counter(cost.counts) for name, cost in simulation.phases.items()}


def simulate_evaluation(trainer: Trainer) -> None:
    """The evaluation of one image with the averaged weights."""
    task = trainer.task
    with trainer.ema.swapped(), torch.no_grad(), record_function("evaluation"):
        task.evaluate_image("a red cube", task.noise(1, torch.Generator()))


def host_bytes(trainer: Trainer, machine: Machine) -> dict[str, int]:
    """Of a node, derived from the writers' own limits: its processes map the same files, and write file by file."""
    loading = sum(p.nbytes for module in trainer.task.frozen_modules() for p in module.parameters())
    disk = disk_bytes(trainer)
    checkpoint = min(machine.gpus * HOST_BYTES, 3 * disk["checkpoint"])
    return {"loading": loading, "checkpoint": checkpoint, "export": min(EXPORT_FILE_BYTES, disk["export"])}


def disk_bytes(trainer: Trainer) -> dict[str, int]:
    """Of the run's folder."""
    task, checkpoint = trainer.task, checkpoint_bytes(trainer.parameters)
    if task.options.lora_rank:
        export = checkpoint // 4  # the adapters' average
    else:
        export = export_files(task.empty_transformer(), task.dtype).metadata["total_size"]
    most = (trainer.config.checkpoints_total_limit + 1) * checkpoint
    return {"checkpoint": checkpoint, "checkpoints at most": most, "export": export}


# ---------------------------------------------------------------------------------------------------------------------
# Judge
# ---------------------------------------------------------------------------------------------------------------------


def total(peak: dict[str, int]) -> float:
    """GiB alive."""
    return sum(peak.values()) / GIB


def peak_gib(costs: Costs) -> float:
    """The largest peak of all phases."""
    return max(map(total, costs.peaks.values()))


def training_gib(costs: Costs) -> float:
    """The largest peak without text encoders, VAE and reward: weights, gradients, optimizer, average, activations."""
    return max(total(peak | {"frozen models": 0}) for peak in costs.peaks.values())


def fits(costs: Costs, machine: Machine) -> bool:
    """Whether the peak leaves RESERVED_GIB of a GPU free."""
    return peak_gib(costs) + RESERVED_GIB <= machine.gpu_memory


def seconds(counts: Counter[str], machine: Machine) -> float:
    """Time of a phase: computing overlaps with the traffic within the node, not with that between nodes."""
    within, between = machine.bandwidth
    overlapped = max(counts[FLOP] / machine.tflops / 1e12, counts[WITHIN] / within / 1e9)
    return overlapped + counts[BETWEEN] / between / 1e9


def remedies(flags: PlanFlags) -> Iterator[tuple[str, PlanFlags]]:
    """Changes of flags that save memory, in the order of what they cost; each comes with the ones before it."""
    machine, run = flags.machine, flags.run
    changes, most = [], run.batch_size // (machine.gpus * machine.nodes)
    if flags.task.gradient_checkpointing != "on":
        flags = replace(flags, task=replace(flags.task, gradient_checkpointing="on"))
        changes.append("--gradient-checkpointing on")
        yield " ".join(changes), flags
    if run.gradient_accumulation_steps < most:
        flags = replace(flags, run=replace(run, gradient_accumulation_steps=most))
        changes.append(f"--gradient-accumulation-steps {most}")
        yield " ".join(changes), flags
    if not machine.stored_embeddings:
        flags = replace(flags, machine=replace(machine, stored_embeddings=True))
        changes.append("--stored-embeddings (prompts from `embed`, or at most 200)")
        yield " ".join(changes), flags
    if not flags.task.lora_rank:
        flags = replace(flags, task=replace(flags.task, lora_rank=64))
        changes.append("--lora-rank 64 --lr 1e-4")
        yield " ".join(changes), flags
    if machine.gpus * machine.nodes == 1 and not flags.task.load_in_4bit and find_spec("torchao"):
        changes.append("--load-in-4bit")
        yield " ".join(changes), replace(flags, task=replace(flags.task, load_in_4bit=True))


def verdict(flags: PlanFlags, costs: Costs) -> str:
    """Whether the run fits, and if not, the first of `remedies` with which it does."""
    if fits(costs, flags.machine):
        return "fits"
    least, more = peak_gib(costs), "use more or larger GPUs"
    for change, changed in remedies(flags):
        costs = simulate(changed, f"with {change}")
        if fits(costs, flags.machine):
            return f"does not fit; with {change} it does ({peak_gib(costs):.1f} GiB)"
        least = min(least, peak_gib(costs))
    if flags.machine.gpus * flags.machine.nodes == 1 and find_spec("torchao") is None:
        more += ", or install torchao and plan --load-in-4bit"
    return f"does not fit; with all changes of flags it still needs {least:.1f} GiB: {more}"


# ---------------------------------------------------------------------------------------------------------------------
# Report
# ---------------------------------------------------------------------------------------------------------------------


def plan(arguments: list[str]) -> None:
    """Compute memory, time and traffic of a full-size run by executing its code on tensors without values."""
    diffusers.utils.logging.set_verbosity_error()
    flags = read_flags(arguments)
    machine, costs = flags.machine, simulate(flags, "plan")
    print_memory(costs)
    print_time(costs, machine)
    for title, values in {"host memory of a node": costs.host, "disk": costs.disk}.items():
        print(f"{title}: " + ", ".join(f"{name} {value / 1e9:.1f} GB" for name, value in values.items()))
    judgement = verdict(flags, costs)
    print(f"{peak_gib(costs):.1f} GiB and {RESERVED_GIB:.0f} reserved, of {machine.gpu_memory:.0f} GiB: {judgement}")
    if machine.json:
        write_json(machine.json, numbers(costs, flags) | {"verdict": judgement})


def read_flags(arguments: list[str]) -> PlanFlags:
    """The command line, for FLUX.1-dev if it names no task; refuses values that cannot work."""
    folder_of = [Path(path).parent for flag, path in pairwise(arguments) if flag == "--json"]
    if missing := [folder for folder in folder_of if not folder.is_dir()]:
        raise BadInput(f"json: {missing[0]} does not exist: make it first")
    if not any(argument.startswith("--task") for argument in arguments):
        arguments = ["--task", "flux", *arguments]
    flags = parse(arguments, PlanFlags, __doc__, "python -m full_scale plan")
    if flags.run.task not in FAMILIES:
        raise BadInput(f"task={flags.run.task}: plan knows {', '.join(FAMILIES)}")
    published = task_class(flags.run.task).Options.model
    if flags.task.model != published and not (Path(flags.task.model) / "model_index.json").is_file():
        raise BadInput(f"model={flags.task.model}: give a pipeline's folder, or leave it out to plan for {published}")
    if flags.task.model != published:
        check_trainable(FAMILIES[flags.run.task], Path(flags.task.model))
    if flags.task.reward != SIMULATED_REWARD:
        raise BadInput(f"reward={flags.task.reward}: plan knows {SIMULATED_REWARD}; plan with that one")
    check_machine(flags.machine)
    check(flags.run, flags.method, flags.machine.gpus * flags.machine.nodes)
    if (path := flags.task.prompts) and (path.is_dir() or few_prompts(read_prompts(path))):
        return replace(flags, machine=replace(flags.machine, stored_embeddings=True))
    return flags


def print_memory(costs: Costs) -> None:
    """A row per phase, a column per kind, in GiB."""
    print(f"\n{'GiB per GPU':12}" + "".join(f"{kind.split()[0]:>12}" for kind in (*KINDS, "sum")))
    for phase, peak in costs.peaks.items():
        values = [peak.get(kind, 0) / GIB for kind in KINDS]
        print(f"{phase:12}" + "".join(f"{value:12.2f}" for value in (*values, total(peak))))


def print_time(costs: Costs, machine: Machine) -> None:
    """A row per phase of an optimizer step."""
    print(f"\n{'per GPU':12}{'TFLOP':>12}{'GB in node':>12}{'GB between':>12}{'seconds':>12}")
    rows = {}
    for phase, counts in costs.counts.items():
        values = [counts[FLOP] / 1e12, counts[WITHIN] / 1e9, counts[BETWEEN] / 1e9, seconds(counts, machine)]
        if any(values):
            rows[phase] = values
    rows["step"] = [sum(column) for column in zip(*rows.values())]
    for phase, values in rows.items():
        print(f"{phase:12}" + "".join(f"{value:12.1f}" for value in values))
    print()


def numbers(costs: Costs, flags: PlanFlags) -> dict[str, Any]:
    """The plan as JSON.  tflop_per_step is that of all GPUs together; everything else is that of one GPU or node."""
    machine, step = flags.machine, sum(costs.counts.values(), Counter())
    phases = {}
    for name, peak in costs.peaks.items():
        counts = costs.counts.get(name, Counter())
        phases[name] = {"gib": {kind: peak.get(kind, 0) / GIB for kind in KINDS}, "peak_gib": total(peak)}
        phases[name] |= {"tflop": counts[FLOP] / 1e12, "seconds": seconds(counts, machine)}
        phases[name] |= {"gb_within": counts[WITHIN] / 1e9, "gb_between": counts[BETWEEN] / 1e9}
    return {
        "peak_gib": peak_gib(costs),
        "training_gib": training_gib(costs),
        "fits": fits(costs, machine),
        "tflop_per_step": step[FLOP] / 1e12 * machine.gpus * machine.nodes,
        "seconds_per_step": sum(seconds(counts, machine) for counts in costs.counts.values()),
        "host_gb": {name: value / 1e9 for name, value in costs.host.items()},
        "disk_gb": {name: value / 1e9 for name, value in costs.disk.items()},
        "phases": phases,
    }
