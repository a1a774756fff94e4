"""Prompts: read them, embed them, find their embeddings."""

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from full_scale.contents import files_content, prompts_content, tensors_content
from full_scale.models import Family
from full_scale.pipeline import (
    TEXT_SUBFOLDERS,
    Precision,
    check_sequence_length,
    count_cut_prompts,
    family_of,
    gpu_or_cpu,
    open_pipeline,
    pipeline_folder,
)
from leap_align import BadInput, require
from runtime.files import atomic_file, check_no_pipe, read_json, write_text
from runtime.processes import (
    barrier,
    is_first_of_node,
    one_line,
    printable,
    rank,
    run_on_all_ranks,
    run_on_rank0,
    world_size,
)
from runtime.run_dir import claimed_output_folder

EMBED = "embed"  # the `tool` of settings.json, by which a folder of embeddings is recognised


LONGEST = 10_000  # characters of a prompt; a tokenizer takes minutes for a million without spaces


def read_prompts(path: Path | None) -> list[str]:
    """The prompts of a text file, one per line, or of a folder that `embed` filled."""
    require(path is not None, "prompts is missing: give --prompts FILE, a text file with one prompt per line")
    file = path / "prompts.txt" if path.is_dir() else path
    is_table = file.suffix.lower() in (".json", ".jsonl", ".csv", ".tsv")
    prompts = [] if is_table else read_lines(file)
    objects = [line for line in prompts if line.startswith("{")]
    is_table |= any(map(is_json, [*prompts[:1], *objects, "\n".join(prompts)]))
    require(not is_table, f"{file} holds a table or JSON, not text: write its prompts into a file, one per line")
    return prompts


def is_json(text: str) -> bool:
    """Whether a text is a list or an object in JSON."""
    try:
        return isinstance(json.loads(text), list | dict)
    except RecursionError:  # nested deeply
        return True
    except ValueError:
        return False


def read_lines(file: Path) -> list[str]:
    """The lines of a text file that are not empty; only line feed and carriage return end a line."""
    try:
        text = check_no_pipe(file).read_text(encoding="utf-8-sig")  # without the mark that some editors put first
    except (OSError, UnicodeDecodeError) as error:
        remedy = "give a text file with one prompt per line"
        raise BadInput(f"cannot read prompts from {file} ({one_line(error)}): {remedy}") from error
    require("\0" not in text, f"{file} holds zero bytes: save it as UTF-8")
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    require(lines, f"{file} holds no prompt: write one per line")
    number = 1 + max(range(len(lines)), key=lambda i: len(lines[i]))
    longest = len(lines[number - 1])
    require(longest <= LONGEST, f"{file}: prompt {number} has {longest} characters: {LONGEST} are allowed")
    return lines


FEW_PROMPTS = 200
"""Up to so many distinct prompts are encoded once, before training (4.2 MB each for FLUX.1-dev); text encoders go."""


def few_prompts(*prompts: list[str]) -> list[str]:
    """The distinct ones of some lists and the empty one, for classifier-free guidance, if they are few; else none."""
    distinct = list(dict.fromkeys(["", *chain(*prompts)]))
    return distinct if len(distinct) <= FEW_PROMPTS else []


def embed(
    model: str, prompts: Path, out: Path, precision: Precision = "bfloat16", max_sequence_length: int | None = None
) -> None:
    """Store the text embedding of every prompt, 4.2 MB each for FLUX.1-dev, 7.9 MB for FLUX.2-klein.

    Then train with --prompts OUT.

    Args:
        model: Pipeline: a local folder in diffusers' layout, or a hub id.
        prompts: Text file, one prompt per line.
        out: Folder to fill; embeddings that it already holds are not computed again, unless they are damaged.
        precision: What the text encoders compute in.
        max_sequence_length: Tokens of the largest text encoder, as in training; the pipeline's own if not given.
    """
    texts = run_on_all_ranks(lambda: read_prompts(prompts))
    folder = run_on_all_ranks(lambda: pipeline_folder(model, TEXT_SUBFOLDERS))
    family, dtype = run_on_all_ranks(lambda: family_of(folder)), getattr(torch, precision)
    tokens = family.max_sequence_length if max_sequence_length is None else max_sequence_length
    check_sequence_length(tokens)
    pipeline = run_on_all_ranks(lambda: open_pipeline(family, folder, dtype, transformer=None, vae=None))
    count_cut_prompts(pipeline, texts, tokens)
    read = lambda: {"model": files_content(folder, *TEXT_SUBFOLDERS)} if is_first_of_node() else {}  # noqa: E731
    settings = run_on_all_ranks(read) | {"prompts": prompts_content(texts), "precision": precision}
    settings |= {"max_sequence_length": tokens}
    with claimed_output_folder(out, EMBED, settings):
        # Classifier-free guidance also needs the empty prompt.
        store_embeddings(family, pipeline, list(dict.fromkeys(["", *texts])), out, tokens)
        barrier()  # a training run that finds the list also finds every embedding
        run_on_rank0(lambda: write_text(out / "prompts.txt", "\n".join(texts) + "\n"))
    if rank() == 0:
        print(f"the embeddings of {len(texts)} prompts are in {printable(out)}: train with --prompts {printable(out)}")


@torch.no_grad()
def store_embeddings(family: Family, pipeline: Any, texts: Sequence[str], out: Path, tokens: int) -> None:
    """Stores the embeddings of this rank's part of the texts, apart from whole ones that are there already."""
    device = gpu_or_cpu()
    pipeline.to(device)
    for text in tqdm(texts[rank() :: world_size()], "embed", mininterval=1, disable=rank() > 0):
        path = embedding_file(out, text)
        with suppress(BadInput):
            read_embedding(path)
            continue
        rows = family.encode_text(pipeline, [text], device, tokens)
        embedding = {name: value[0].contiguous().cpu() for name, value in rows.items()}
        with atomic_file(path) as temporary:
            temporary.write_bytes(save(embedding, {"content": tensors_content(embedding)}))


def read_embedding(path: Path) -> dict[str, Tensor]:
    """The text inputs of one prompt by name, on the CPU.  Raises BadInput if the file is missing or damaged."""
    remedy = "run the same `python -m full_scale embed` again, which makes it anew"
    try:
        with safe_open(check_no_pipe(path), "pt") as file:
            embedding = {name: file.get_tensor(name) for name in file.keys()}
            content = (file.metadata() or {}).get("content")
    except (OSError, SafetensorError) as error:
        raise BadInput(f"{path} is damaged ({one_line(error)}): {remedy}") from error
    require(content == tensors_content(embedding), f"{path} is damaged (its checksum differs): {remedy}")
    for name, value in embedding.items():
        is_kind = value.dtype in (torch.float32, torch.bfloat16) and value.numel() and value.isfinite().all()
        kind = f"{tuple(value.shape)} of {value.dtype}"
        require(is_kind, f"{path}: {name} {kind} holds no finite float32 or bfloat16 numbers: {remedy}")
    return embedding


def embedding_file(folder: Path, prompt: str) -> Path:
    """Where a folder keeps the embedding of a prompt."""
    return folder / (hashlib.sha1(prompt.encode()).hexdigest() + ".safetensors")


def embedding_folders(sources: Sequence[tuple[Path, Sequence[str]]], folder: Path, tokens: int) -> list[Path]:
    """The sources that are folders of embeddings by the text encoders of the pipeline in a folder.

    sources: the path of each list of prompts, and the prompts.  If all are folders, they must hold every embedding.
    tokens: of each embedding.
    """
    folders = [path for path, _ in sources if path.is_dir()]
    for path, prompts in sources:
        if path.is_dir():
            check_embeddings(path, folder, tokens)
            missing = [prompt for prompt in prompts if not embedding_file(path, prompt).exists()]
            if missing and len(folders) == len(sources):
                example = f"{len(missing)} embeddings, such as that of {missing[0]!r:.60}"
                raise BadInput(f"{path} lacks {example}: finish `python -m full_scale embed`")
    return folders


def check_embeddings(folder: Path, pipeline: Path, tokens: int) -> None:
    """Refuses a folder with embeddings of another pipeline's text encoders, or of another number of tokens.

    A pipeline's folder need not hold its text encoders; then there is nothing to compare.  Only rank 0 reads them.
    """
    settings = read_json(folder / "settings.json") if (folder / "settings.json").exists() else {}
    is_own = settings.get("tool") == EMBED
    require(is_own, f"{folder} was not filled by `python -m full_scale embed`: give a text file, or embed it")
    if rank() == 0 and any(pipeline.glob("text_encoder*/*.safetensors")):
        is_same = settings.get("model") == files_content(pipeline, *TEXT_SUBFOLDERS)
        remedy = "embed the prompts with this --model"
        require(is_same, f"{folder} holds embeddings of another model than {pipeline}: {remedy}")
    stored = settings.get("max_sequence_length", tokens)  # older folders do not say
    fault = f"{folder} holds embeddings of {stored} tokens, not {tokens}"
    require(stored == tokens, f"{fault}: give --max-sequence-length {stored}")


def find_embedding(prompt: str, folders: Sequence[Path]) -> Path | None:
    """The file with the embedding of a prompt in the first folder that has one, or None."""
    return next((path for folder in folders if (path := embedding_file(folder, prompt)).exists()), None)
