"""FLUX.1-dev's architecture with random weights on a GPU: what the trainer's own step costs at full size.

Pipeline, VAE and reward are tiny, the transformer has the real one's size and trains LoRA adapters.  So this measures
the transformer's part, 98 % of a step.  Nothing is downloaded, and nothing is learned.  Each row shows the measured
values beside those predicted from counts of operations and bytes.
"""

import gc
import statistics
import tempfile
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from beyond import Hyper
from flux_adapter import Flux
from full_scale import rewards
from full_scale.tiny import tiny_flux
from full_scale.transformer import repeated_blocks
from leap_align import BadInput
from runtime.run_dir import claimed_output_folder, write_csv
from train_leap_align import Config, Trainer

FLUX_DEV: dict[str, Any] = {
    "patch_size": 1, "in_channels": 64, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128,
    "num_attention_heads": 24, "joint_attention_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": True,
    "axes_dims_rope": (16, 56, 56),
}  # fmt: skip
"""FLUX.1-dev's transformer/config.json."""
TEXT_TOKENS = 512
"""Tokens of a prompt."""
FORWARD_FLOP = 37.6e12
"""Operations of a forward of one sample at 720 px, with adapters."""
BACKWARD_FORWARDS = 1.2
"""Cost of a backward in forwards.  LoRA needs gradients to inputs, hardly any to weights; attention's takes 2.5."""
RECOMPUTED_FORWARDS = {"on": 2, "selective": 1, "off": 0}
"""Forwards that checkpointing repeats in a step."""
WEIGHTS_GIB = 23.6
"""Weights, adapters, optimizer and average."""
ACTIVATIONS_GIB = {"on": 0.84, "selective": 6.3, "off": 11.9}
"""What a differentiated forward of one sample keeps, by checkpointing."""
ASSUMED_FLOPS, PEAK_FLOPS = 400e12, 989e12
"""Operations a second in bfloat16: the assumption behind the predicted seconds, and the peak of an H100 or H200."""


class RandomFlux(Flux):
    """The task `flux` with a transformer of any size and random weights; prompt embeddings are random numbers."""

    transformer_config: ClassVar[dict[str, Any]] = FLUX_DEV

    def empty_transformer(self) -> nn.Module:
        """The architecture, on the meta device."""
        with torch.device("meta"):
            return diffusers.FluxTransformer2DModel(**self.transformer_config).eval()

    @torch.no_grad()
    def load_pretrained(self) -> None:
        """Random weights, small enough to stay finite through 57 blocks."""
        for parameter in self.model.parameters():
            nn.init.normal_(parameter, std=0.02)

    def encode(self, prompts: list[str]) -> dict[str, Tensor]:
        """Random text inputs in the shapes of T5's and CLIP's."""
        options, config = {"device": self.device, "dtype": self.dtype}, self.transformer_config
        return {
            "encoder_hidden_states": torch.randn(len(prompts), TEXT_TOKENS, config["joint_attention_dim"], **options),
            "pooled_projections": torch.randn(len(prompts), config["pooled_projection_dim"], **options),
        }


@dataclass(frozen=True)
class Case:
    """A step to measure."""

    checkpointing: str
    """on, selective (every second block) or off."""
    compiled: bool
    batch_size: int
    T: int = 25
    pixels: int = 720
    task_class: type[RandomFlux] = RandomFlux

    def flop(self) -> float:
        """Operations of the step, computed from FORWARD_FLOP."""
        forwards = self.T + 2 * BACKWARD_FORWARDS + RECOMPUTED_FORWARDS[self.checkpointing]
        return self.batch_size * FORWARD_FLOP * forwards

    def predicted_gib(self) -> float:
        """Peak memory: the two differentiated forwards keep their activations."""
        return WEIGHTS_GIB + 2 * self.batch_size * ACTIVATIONS_GIB[self.checkpointing]


def benchmark(out: Path = Path("runs/full-size-benchmark")) -> None:
    """Measure seconds and memory of a training step of FLUX.1-dev's size on one GPU, with random weights.

    Every combination of checkpointing, compilation and batch size 1 to 4, with LoRA of rank 64 at 720 px.

    Args:
        out: Folder for the table, gpu.csv; an older table there is replaced.
    """
    if not torch.cuda.is_available():
        raise BadInput("benchmark measures a GPU, but there is no CUDA device here")
    modes, rows = product((False, True), RECOMPUTED_FORWARDS, (1, 2, 3, 4)), []
    cases = [Case(checkpointing, compiled, batch_size) for compiled, checkpointing, batch_size in modes]
    with claimed_output_folder(out, "benchmark", {}), tempfile.TemporaryDirectory() as folder:
        write_tiny_pipeline(Path(folder))
        for case in tqdm(cases, "FLUX.1-dev's size"):
            rows.append(measure(case, Path(folder)))
            write_csv(out / "gpu.csv", rows)
            tqdm.write(", ".join(f"{name} {value}" for name, value in rows[-1].items()))
    print(f"the table is {out / 'gpu.csv'}")


def write_tiny_pipeline(folder: Path) -> None:
    """A tiny FLUX pipeline, its reward and prompts; only its transformer is replaced by a large one."""
    diffusers.utils.logging.disable_progress_bar()
    tiny_flux().save_pretrained(folder)
    rewards.tiny("hpsv2.1", folder / "reward")
    (folder / "prompts.txt").write_text("a red cube\ntwo dogs on a beach\n")


def measure(case: Case, folder: Path) -> dict[str, Any]:
    """A row of the table; if the step does not fit or fails, the column GiB says why."""
    row = {"checkpointing": case.checkpointing, "compiled": case.compiled, "batch": case.batch_size}
    row |= {"predicted s": case.flop() / ASSUMED_FLOPS, "s": "", "share of peak": ""}
    row |= {"predicted GiB": case.predicted_gib(), "GiB": ""}
    release_memory()
    try:
        seconds, gib = step_cost(case, folder)
        row |= {"s": seconds, "share of peak": case.flop() / seconds / PEAK_FLOPS, "GiB": gib}
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


def step_cost(case: Case, folder: Path) -> tuple[float, float]:
    """Median seconds of three steps after a first one, and peak GiB."""
    trainer = start_trainer(case, folder)
    rows = [trainer.step() for _ in range(4)]
    if any(row["skipped"] for row in rows):
        raise BadInput("not measured: a gradient was not finite, so a step was skipped")
    seconds = statistics.median(row["seconds"] for row in rows[1:])
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return seconds, peak / 2**30


def start_trainer(case: Case, folder: Path) -> Trainer:
    """A trainer for the case; `folder` holds the tiny pipeline."""
    options = case.task_class.Options(
        model=str(folder), prompts=folder / "prompts.txt", reward_weights=(str(folder / "reward"),),
        height=case.pixels, width=case.pixels, lora_rank=64, compile=case.compiled,
        gradient_checkpointing=case.checkpointing != "off",
    )  # fmt: skip
    task = case.task_class(options, case.T)
    task.parallelize(None)
    if case.checkpointing == "selective":
        checkpoint_every_second_block(task.model)
    return Trainer(Config(task="flux", batch_size=case.batch_size, T=case.T), Hyper(lam=None), task)


def checkpoint_every_second_block(model: nn.Module) -> None:
    """Selective checkpointing, for a model with gradient checkpointing: every other block keeps its activations."""
    checkpoint, checkpointed = model._gradient_checkpointing_func, set(repeated_blocks(model)[::2])

    def selective(block: nn.Module, *inputs: Any) -> Any:
        return checkpoint(block, *inputs) if block in checkpointed else block(*inputs)

    model._gradient_checkpointing_func = selective
