"""A model's architecture with random weights on a GPU: what the trainer's own step costs at full size.

Pipeline, VAE and reward are tiny, the transformer has the real one's size and trains LoRA adapters.  So this measures
the transformer's part, 98 % of a step of FLUX.1-dev.  Nothing is downloaded, and nothing is learned.  Each row shows
the measured values beside those of `python -m full_scale plan` for the same step.
"""

import gc
import statistics
import tempfile
from itertools import product
from pathlib import Path
from typing import Any, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from beyond import Hyper
from full_scale import rewards
from full_scale.models import FAMILIES
from full_scale.plan import Machine, PlanFlags, seconds, simulate
from full_scale.transformer import Checkpointing
from leap_align import BadInput, require
from runtime.cost_counter import total
from runtime.files import write_csv, write_json
from runtime.run_dir import claimed_output_folder
from train_leap_align import Config, Trainer, task_class

CHECKPOINTING = get_args(Checkpointing)
PEAK_FLOPS = 989e12  # operations a second in bfloat16, of an H100 or H200


class RandomWeights:
    """What a task with random weights does instead of reading them; it stands in front of the task's own class."""

    @torch.no_grad()
    def load_pretrained(self, model: nn.Module) -> None:
        """Random weights, small enough to stay finite through FLUX.1-dev's 57 blocks; SD3's position table is zero."""
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.02)
        for buffer in model.buffers():
            buffer.zero_()

    def encode(self, prompts: list[str]) -> dict[str, Tensor]:
        """Random text inputs in the shapes of the text encoders'."""
        options, tokens = {"device": self.device, "dtype": self.dtype}, self.options.max_sequence_length
        shapes = self.family.text_shapes(self.model.config, tokens)
        return {name: torch.randn(len(prompts), *shape, **options) for name, shape in shapes.items()}


def benchmark(task: str = "flux", out: Path = Path("runs/full-size-benchmark")) -> None:
    """Measure seconds and memory of a training step of a model's size on one GPU, with random weights.

    Every combination of checkpointing, compilation and batch size 1 to 4, with LoRA of rank 64 at 720 px.

    Args:
        task: The model: flux, sd3 or klein.
        out: Folder for the table, gpu.csv; an older table there is replaced.
    """
    require(task in FAMILIES, f"task={task}: benchmark knows {', '.join(FAMILIES)}")
    require(torch.cuda.is_available(), "benchmark measures a GPU, but there is no CUDA device here")
    modes, rows = list(product((False, True), CHECKPOINTING, (1, 2, 3, 4))), []
    with claimed_output_folder(out, "benchmark", {"task": task}), tempfile.TemporaryDirectory() as folder:
        write_pipeline(Path(folder), task, FAMILIES[task].configs["transformer"])
        for compiled, checkpointing, batch_size in tqdm(modes, f"the size of {FAMILIES[task].title}"):
            rows.append(measure(step_flags(task, Path(folder), checkpointing, compiled, batch_size)))
            write_csv(out / "gpu.csv", rows)
            tqdm.write(", ".join(f"{name} {value}" for name, value in rows[-1].items()))
    print(f"the table is {out / 'gpu.csv'}")


def write_pipeline(folder: Path, task: str, transformer_config: dict[str, Any]) -> None:
    """A task's tiny pipeline, its reward and prompts; only its transformer has another config, and no weights."""
    import diffusers

    diffusers.utils.logging.disable_progress_bar()
    FAMILIES[task].tiny().save_pretrained(folder)
    rewards.tiny("hpsv2.1", folder / "reward")
    (folder / "prompts.txt").write_text("a red cube\ntwo dogs on a beach\n")
    write_json(folder / "transformer" / "config.json", transformer_config)


def step_flags(
    task: str, folder: Path, checkpointing: str, compiled: bool, batch_size: int, T: int = 25, pixels: int = 720
) -> PlanFlags:
    """The step of a task with the pipeline in a folder and LoRA of rank 64, on one GPU."""
    options = task_class(task).Options(
        model=str(folder), prompts=folder / "prompts.txt", reward_weights=(str(folder / "reward"),), height=pixels,
        width=pixels, lora_rank=64, compile=compiled, gradient_checkpointing=checkpointing,
    )  # fmt: skip
    run, machine = Config(task=task, batch_size=batch_size, T=T), Machine(gpus=1, stored_embeddings=True)
    return PlanFlags(run, Hyper(lam=None), options, machine)


def measure(flags: PlanFlags) -> dict[str, Any]:
    """A row of the table; if the step does not fit or fails, the column GiB says why."""
    release_memory()
    costs = simulate(flags, "plan")
    flop = sum(total(pieces).flop for pieces in costs.pieces.values())
    planned_seconds = sum(seconds(pieces, flags.machine) for pieces in costs.pieces.values())
    row = {"checkpointing": flags.task.gradient_checkpointing, "compiled": flags.task.compile}
    row |= {"batch": flags.run.batch_size, "planned s": planned_seconds, "s": "", "share of peak": ""}
    row |= {"planned GiB": costs.gib(), "GiB": ""}
    try:
        measured_seconds, gib = step_cost(flags)
        row |= {"s": measured_seconds, "share of peak": flop / measured_seconds / PEAK_FLOPS, "GiB": gib}
    except torch.OutOfMemoryError:
        row["GiB"] = "out of memory"
    except BadInput as error:
        row["GiB"] = f"{error!s:.80}"
    return row


def release_memory() -> None:
    """Frees the process group and the memory of the previous case, and resets the measurement of the peak."""
    if dist.is_initialized():
        dist.destroy_process_group()
    gc.collect()  # the previous case's objects form reference cycles
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def step_cost(flags: PlanFlags) -> tuple[float, float]:
    """Median seconds of three steps after a first one, and peak GiB."""
    trainer = start_trainer(flags)
    rows = [trainer.step() for _ in range(4)]
    is_complete = not any(row["skipped"] for row in rows)
    require(is_complete, "not measured: a gradient was not finite, so a step was skipped")
    median = statistics.median(row["seconds"] for row in rows[1:])
    return median, torch.cuda.max_memory_allocated() / 2**30  # 0 without a GPU


def start_trainer(flags: PlanFlags) -> Trainer:
    """A trainer of random weights."""
    kind = task_class(flags.run.task)
    task = type(kind.__name__, (RandomWeights, kind), {})(flags.task, flags.run.T)
    task.parallelize(None)
    return Trainer(flags.run, flags.method, task)
