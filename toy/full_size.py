"""FLUX.1-dev's architecture with random weights on a GPU: what the trainer's own step costs at full size.

`python -m toy.benchmark --parts gpu` calls it.  Pipeline, VAE and reward are tiny, the transformer is of the real one's
size, LoRA is trained: so it is the transformer's step, 98 % of the whole.  Nothing is loaded, so nothing is learned.
Each row holds what was predicted from counts of operations and bytes beside what was measured.
"""

import gc
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

import train_leap_align as trainer
from flux_adapter import Flux, repeated_blocks
from leap_align import BadInput, Hyper

DEV: dict[str, Any] = {
    "patch_size": 1, "in_channels": 64, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128,
    "num_attention_heads": 24, "joint_attention_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": True,
    "axes_dims_rope": (16, 56, 56),
}  # fmt: skip
"""FLUX.1-dev's config.json."""
TOKENS = 512
"""Of a prompt."""
FORWARD = 37.6e12
"""Operations of a forward and sample at 720 px, adapters included."""
BACKWARD = 1.2
"""A backward in forwards: LoRA needs gradients to the layers' inputs, hardly any to weights; attention counts 2.5."""
BASE, ACTIVATIONS = 23.6, {"on": 0.84, "selective": 6.3, "off": 11.9}
"""GiB: weights, adapters, optimizer and average; what a differentiated forward and sample keeps under LoRA."""
PEAK, RATE = 989e12, 400e12
"""Operations a second in bfloat16: what an H100 or H200 can do, and what is assumed for the predicted seconds."""


class RandomFlux(Flux):
    """The task `flux` with a transformer of any size and random weights; prompts are random numbers."""

    size: ClassVar[dict[str, Any]] = DEV

    def empty_transformer(self) -> nn.Module:
        """The architecture alone, on the meta device."""
        with torch.device("meta"):
            return diffusers.FluxTransformer2DModel(**self.size).eval()

    @torch.no_grad()
    def read_transformer(self, folder: Path) -> None:
        """Random weights, small enough for 57 blocks."""
        for parameter in self.model.parameters():
            nn.init.normal_(parameter, std=0.02)

    def encode(self, prompts: list[str]) -> dict[str, Tensor]:
        """Random text inputs in the shapes of T5's and CLIP's."""
        place = {"device": self.device, "dtype": self.dtype}
        tokens = torch.randn(len(prompts), TOKENS, self.size["joint_attention_dim"], **place)
        return {
            "encoder_hidden_states": tokens,
            "pooled_projections": torch.randn(len(prompts), self.size["pooled_projection_dim"], **place),
        }


def every_other(model: nn.Module) -> None:
    """Selective checkpointing: every second block keeps its activations."""
    checkpoint, some = model._gradient_checkpointing_func, set(repeated_blocks(model)[::2])
    model._gradient_checkpointing_func = lambda block, *x: checkpoint(block, *x) if block in some else block(*x)


def survey(folder: Path) -> Iterator[dict[str, Any]]:
    """Every combination of checkpointing, compilation and batch; one that does not fit says so."""
    cases = [(mode, compiled, n) for compiled in (False, True) for mode in ACTIVATIONS for n in (1, 2, 3, 4)]
    for chosen in tqdm(cases, "FLUX.1-dev's size"):
        yield case(folder, *chosen)


def case(
    folder: Path, checkpointing: str, compiled: bool, n: int, task_class: type = RandomFlux, pixels: int = 720
) -> dict[str, Any]:
    """Seconds and memory of a trainer's step with a batch of n, predicted and measured; T = 25, LoRA of rank 64."""
    flops = n * FORWARD * (25 + 2 * BACKWARD + {"on": 2, "selective": 1, "off": 0}[checkpointing])
    row = {"checkpointing": checkpointing, "compiled": compiled, "batch": n, "predicted s": flops / RATE}
    row |= {"s": "", "share of peak": "", "predicted GiB": BASE + 2 * n * ACTIVATIONS[checkpointing], "GiB": ""}
    if dist.is_initialized():
        dist.destroy_process_group()
    gc.collect()  # the case before refers to itself in circles
    torch.cuda.empty_cache()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        seconds, row["GiB"] = step_cost(folder, checkpointing, compiled, n, task_class, pixels)
        row |= {"s": seconds, "share of peak": flops / seconds / PEAK}
    except torch.OutOfMemoryError:
        row["GiB"] = "out of memory"
    except BadInput as error:
        row["GiB"] = str(error)[:80]
    return row


def step_cost(
    folder: Path, checkpointing: str, compiled: bool, n: int, task_class: type, pixels: int
) -> tuple[float, float]:
    """Median seconds of three steps after a first one, and peak GiB."""
    options = task_class.Options(
        model=str(folder / "flux"), prompts=folder / "prompts.txt", reward_weights=(str(folder / "flux" / "reward"),),
        height=pixels, width=pixels, lora_rank=64, compile=compiled, gradient_checkpointing=checkpointing != "off",
    )  # fmt: skip
    config = trainer.Config(task="flux", batch_size=n)
    run = trainer.build(config, Hyper(lam=None), options, task_class)
    if checkpointing == "selective":
        every_other(run.task.model)
    steps = [run.step() for _ in range(4)]
    if any(step["skipped"] for step in steps):
        raise BadInput("not measured: a gradient was not finite, so that a step was left out")
    seconds = statistics.median(step["seconds"] for step in steps[1:])
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return seconds, peak / 2**30
