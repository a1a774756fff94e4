"""A model's architecture with random weights on a GPU: what the trainer's own step costs at full size.

Pipeline, VAE and reward are tiny, the transformer has the real one's size and trains LoRA adapters.  So this measures
the transformer's part, 98 % of a step of FLUX.1-dev.  Nothing is downloaded, and nothing is learned.  Each row shows
the measured values beside those of `python -m full_scale plan` for the same step.
"""

import gc
import statistics
import tempfile
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, get_args

import diffusers
import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from beyond import Hyper
from full_scale import rewards
from full_scale.models import FAMILIES
from full_scale.plan import Machine, PlanFlags, peak_gib, seconds, simulate
from full_scale.transformer import Checkpointing
from leap_align import BadInput
from runtime.cost_counter import FLOP
from runtime.run_dir import claimed_output_folder, write_csv, write_json
from train_leap_align import Config, Trainer, task_class

CHECKPOINTING = get_args(Checkpointing)
PEAK_FLOPS = 989e12
"""Operations a second in bfloat16, of an H100 or H200."""


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
        options, shapes = {"device": self.device, "dtype": self.dtype}, self.family.text_shapes(self.model.config)
        return {name: torch.randn(len(prompts), *shape, **options) for name, shape in shapes.items()}


@dataclass(frozen=True)
class Case:
    """A step to measure, of a task and its pipeline in a folder."""

    task: str
    folder: Path
    checkpointing: Checkpointing
    compiled: bool
    batch_size: int
    T: int = 25
    pixels: int = 720

    def flags(self) -> PlanFlags:
        """The step as flags, with LoRA of rank 64 on one GPU."""
        options = task_class(self.task).Options(
            model=str(self.folder), prompts=self.folder / "prompts.txt", reward_weights=(str(self.folder / "reward"),),
            height=self.pixels, width=self.pixels, lora_rank=64, compile=self.compiled,
            gradient_checkpointing=self.checkpointing,
        )  # fmt: skip
        run = Config(task=self.task, batch_size=self.batch_size, T=self.T)
        return PlanFlags(run, Hyper(lam=None), options, Machine(gpus=1, stored_embeddings=True))


def benchmark(task: str = "flux", out: Path = Path("runs/full-size-benchmark")) -> None:
    """Measure seconds and memory of a training step of a model's size on one GPU, with random weights.

    Every combination of checkpointing, compilation and batch size 1 to 4, with LoRA of rank 64 at 720 px.

    Args:
        task: The model: flux, sd3 or klein.
        out: Folder for the table, gpu.csv; an older table there is replaced.
    """
    if task not in FAMILIES:
        raise BadInput(f"task={task}: benchmark knows {', '.join(FAMILIES)}")
    if not torch.cuda.is_available():
        raise BadInput("benchmark measures a GPU, but there is no CUDA device here")
    modes, rows = list(product((False, True), CHECKPOINTING, (1, 2, 3, 4))), []
    with claimed_output_folder(out, "benchmark", {"task": task}), tempfile.TemporaryDirectory() as folder:
        write_pipeline(Path(folder), task, FAMILIES[task].configs["transformer"])
        for compiled, checkpointing, batch_size in tqdm(modes, f"the size of {FAMILIES[task].title}"):
            rows.append(measure(Case(task, Path(folder), checkpointing, compiled, batch_size)))
            write_csv(out / "gpu.csv", rows)
            tqdm.write(", ".join(f"{name} {value}" for name, value in rows[-1].items()))
    print(f"the table is {out / 'gpu.csv'}")


def write_pipeline(folder: Path, task: str, transformer_config: dict[str, Any]) -> None:
    """A task's tiny pipeline, its reward and prompts; only its transformer has another config, and no weights."""
    diffusers.utils.logging.disable_progress_bar()
    FAMILIES[task].tiny().save_pretrained(folder)
    rewards.tiny("hpsv2.1", folder / "reward")
    (folder / "prompts.txt").write_text("a red cube\ntwo dogs on a beach\n")
    write_json(folder / "transformer" / "config.json", transformer_config)


def measure(case: Case) -> dict[str, Any]:
    """A row of the table; if the step does not fit or fails, the column GiB says why."""
    release_memory()
    flags = case.flags()
    costs = simulate(flags, "plan")
    flop = sum(counts[FLOP] for counts in costs.counts.values())
    row = {"checkpointing": case.checkpointing, "compiled": case.compiled, "batch": case.batch_size}
    row |= {"planned s": sum(seconds(counts, flags.machine) for counts in costs.counts.values()), "s": ""}
    row |= {"share of peak": "", "planned GiB": peak_gib(costs), "GiB": ""}
    try:
        measured_seconds, gib = step_cost(case)
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


def step_cost(case: Case) -> tuple[float, float]:
    """Median seconds of three steps after a first one, and peak GiB."""
    trainer = start_trainer(case.flags())
    rows = [trainer.step() for _ in range(4)]
    if any(row["skipped"] for row in rows):
        raise BadInput("not measured: a gradient was not finite, so a step was skipped")
    median = statistics.median(row["seconds"] for row in rows[1:])
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return median, peak / 2**30


def start_trainer(flags: PlanFlags) -> Trainer:
    """A trainer of random weights."""
    kind = task_class(flags.run.task)
    task = type(kind.__name__, (RandomWeights, kind), {})(flags.task, flags.run.T)
    task.parallelize(None)
    return Trainer(flags.run, flags.method, task)
