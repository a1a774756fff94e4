"""Prompts: read them, embed them, find their embeddings."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from full_scale.pipeline import (
    TEXT_SUBFOLDERS,
    Precision,
    family_of,
    gpu_or_cpu,
    open_pipeline,
    pipeline_folder,
)
from leap_align import BadInput
from runtime.processes import barrier, one_line, rank, run_on_rank0, world_size
from runtime.run_dir import atomic_file, claim_output_folder, write_text


def read_prompts(path: Path | None) -> list[str]:
    """The prompts of a text file, one per line, or of a folder that `embed` filled."""
    if path is None:
        raise BadInput("prompts is missing: give --prompts FILE, a text file with one prompt per line")
    file = path / "prompts.txt" if path.is_dir() else path
    try:
        prompts = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        message = f"cannot read prompts from {file} ({one_line(error)}): give a text file with one prompt per line"
        raise BadInput(message) from error
    if not prompts:
        raise BadInput(f"{file} holds no prompt: write one per line")
    return prompts


# ---------------------------------------------------------------------------------------------------------------------
# Embeddings
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def embed(model: str, prompts: Path, out: Path, precision: Precision = "bfloat16") -> None:
    """Store the text embedding of every prompt, 4.2 MB each for FLUX.1-dev; then train with --prompts OUT.

    Args:
        model: Pipeline: a local folder in diffusers' layout, or a hub id.
        prompts: Text file, one prompt per line.
        out: Folder to fill; embeddings that it already holds are not computed again.
        precision: What the text encoders compute in.
    """
    texts = read_prompts(prompts)
    folder = pipeline_folder(model, TEXT_SUBFOLDERS)
    family, device = family_of(folder), gpu_or_cpu()
    run_on_rank0(lambda: claim_output_folder(out, {"model": model, "precision": precision}))
    pipeline = open_pipeline(family, folder, getattr(torch, precision), transformer=None, vae=None).to(device)
    # SD3.5's guidance also needs the empty prompt.
    distinct = list(dict.fromkeys(["", *texts]))
    for text in tqdm(distinct[rank() :: world_size()], "embed", mininterval=1, disable=rank() > 0):
        if (path := embedding_file(out, text)).exists():
            continue
        embedding = family.encode_text(pipeline, [text], device)
        with atomic_file(path) as temporary:
            save_file({name: value[0].contiguous().cpu() for name, value in embedding.items()}, temporary)
    # The list comes last, so that a training run that finds it also finds every embedding.
    barrier()
    run_on_rank0(lambda: write_text(out / "prompts.txt", "\n".join(texts) + "\n"))


def embedding_file(folder: Path, prompt: str) -> Path:
    """Where a folder keeps the embedding of a prompt."""
    return folder / (hashlib.sha1(prompt.encode()).hexdigest() + ".safetensors")


def embedding_folders(sources: Sequence[tuple[Path, Sequence[str]]], model: str) -> list[Path]:
    """The sources that are folders of embeddings of this model's.

    sources: the path of each list of prompts, and the prompts.  If all are folders, they must hold every embedding.
    """
    folders = [path for path, _ in sources if path.is_dir()]
    for path, prompts in sources:
        if path.is_dir():
            check_embeddings(path, model, prompts if len(folders) == len(sources) else [])
    return folders


def find_embedding(prompt: str, folders: Sequence[Path]) -> Path | None:
    """The file with the embedding of a prompt in the first folder that has one, or None."""
    for folder in folders:
        if (path := embedding_file(folder, prompt)).exists():
            return path
    return None


def load_embeddings(paths: Sequence[Path], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """The text inputs in some embedding files by name, each (B, ...)."""
    embeddings = [load_file(path, device=str(device)) for path in paths]
    return {name: torch.stack([row[name] for row in embeddings]).to(dtype) for name in embeddings[0]}


def check_embeddings(folder: Path, model: str, prompts: Sequence[str]) -> None:
    """Refuses a folder with embeddings of another model, or without one of these prompts."""
    try:
        embedded_model = json.loads((folder / "settings.json").read_text())["model"]
    except (OSError, ValueError, KeyError) as error:
        message = f"{folder} was not filled by `python -m full_scale embed` ({one_line(error)})"
        raise BadInput(message) from error
    if embedded_model != model:
        raise BadInput(
            f"{folder} holds embeddings of {embedded_model}, not of {model}: embed the prompts with this --model"
        )
    if missing := [prompt for prompt in prompts if not embedding_file(folder, prompt).exists()]:
        raise BadInput(
            f"{folder} lacks {len(missing)} embeddings, such as that of {missing[0]!r:.60}: "
            "finish `python -m full_scale embed`"
        )
