"""Draw images from a base or trained model with diffusers' own pipeline."""

import json
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from full_scale import pipeline
from full_scale.adapters import adapters_path, load_adapters
from full_scale.components import load_component
from full_scale.contents import files_content, prompts_content
from full_scale.pipeline import TEXT_SUBFOLDERS, Precision, pipeline_folder
from full_scale.prompts import read_lines, read_prompts
from full_scale.transformer import check_start
from leap_align import require
from runtime.files import atomic_file, parse_json, write_text
from runtime.processes import (
    barrier,
    is_first_of_node,
    printable,
    rank,
    run_on_all_ranks,
    run_on_rank0,
    world_size,
)
from runtime.run_dir import claimed_output_folder


@torch.no_grad()
def sample(
    model: str,
    out: Path,
    prompts: Path | None = None,
    geneval: Path | None = None,
    transformer: Path | None = None,
    lora: Path | None = None,
    lora_scale: float = 1.0,
    steps: int = 50,
    images_per_prompt: int = 4,
    height: int = 720,
    width: int = 720,
    guidance: float | None = None,
    max_sequence_length: int | None = None,
    batch_size: int = 4,
    precision: Precision = "bfloat16",
) -> None:
    """Draw images with diffusers' own pipeline: one PNG per image, and prompts.json.

    An image's noise depends only on the numbers of its prompt and image, never on the number of processes.

    Args:
        model: Pipeline: a local folder in diffusers' layout, or a hub id.
        out: Folder to fill; images that it already holds are not drawn again.
        prompts: Text file, one prompt per line.
        geneval: Instead of prompts, GenEval's evaluation_metadata.jsonl; OUT gets its evaluator's folder layout.
        transformer: A run's folder transformer/, in place of the pipeline's own.
        lora: A run's folder lora/, on top of the pipeline's transformer; or any LoRA that diffusers or peft read.
        lora_scale: Strength of the adapters: 0 draws the pipeline's own images, 1 the trained ones.
        steps: Sampling steps.
        images_per_prompt: Images per prompt.
        height: Pixels, a multiple of 16.
        width: Pixels, a multiple of 16.
        guidance: Guidance scale; 4 for FLUX.2-klein and 3.5 for the others if not given.
        max_sequence_length: Tokens of the largest text encoder; the pipeline's own if not given.
        batch_size: Images of one prompt that are drawn at once.
        precision: What the networks compute in.
    """
    pipeline.silence_other_ranks()
    pipeline.check_image_size(height, width)
    for name, value in {"steps": steps, "images_per_prompt": images_per_prompt, "batch_size": batch_size}.items():
        require(value >= 1, f"{name}={value} must be at least 1")
    guidance = run_on_all_ranks(lambda: pipeline.choose_guidance(model, guidance))
    if max_sequence_length is not None:
        pipeline.check_sequence_length(max_sequence_length)
    layout = run_on_all_ranks(lambda: choose_layout(prompts, geneval, images_per_prompt))
    texts = prompts_content([*layout.prompts, *layout.metadata])
    settings = {"prompts": texts, "steps": steps, "images_per_prompt": images_per_prompt, "height": height}
    settings |= {"width": width, "guidance": guidance, "batch_size": batch_size, "precision": precision}
    settings |= {"max_sequence_length": max_sequence_length, "lora_scale": lora_scale if lora else None}
    pipe = run_on_all_ranks(lambda: open_trained(model, transformer, lora, lora_scale, getattr(torch, precision)))
    pipeline.check_positions(pipe.transformer, height, width)
    pipeline.count_cut_prompts(pipe, layout.prompts, max_sequence_length)
    settings |= run_on_all_ranks(lambda: contents(model, transformer, lora) if is_first_of_node() else {})
    with claimed_output_folder(out, "sample", settings):
        run_on_rank0(lambda: layout.write(out))
        pipe.to(pipeline.gpu_or_cpu())
        options = {"height": height, "width": width, "num_inference_steps": steps, "guidance_scale": guidance}
        options |= {"max_sequence_length": max_sequence_length} if max_sequence_length else {}
        draw_missing(partial(pipe, **options), layout, out, batch_size)
        barrier()
    if rank() == 0:
        count = sum(map(len, layout.files))
        path = printable(out)
        print(f"{count} images are in {path}: score them with python -m full_scale score --images {path} --out SCORES")


def contents(model: str, transformer: Path | None, lora: Path | None) -> dict[str, str | None]:
    """Digests of the weights that determine the images."""
    folder = pipeline_folder(model)
    return {
        "model": files_content(folder, *TEXT_SUBFOLDERS, "vae", "scheduler"),
        "transformer": files_content(transformer or folder / "transformer", "."),
        "lora": files_content(adapters_path(lora), ".") if lora else None,
    }


def draw_missing(draw: Any, layout: "Layout", out: Path, batch_size: int) -> None:
    """Draws this rank's part of the prompts, apart from those whose images all exist."""
    for i in tqdm(range(len(layout.prompts))[rank() :: world_size()], "sample", mininterval=1, disable=rank() > 0):
        files = [out / name for name in layout.files[i]]
        if not all(file.exists() for file in files):
            draw_prompt(draw, i, layout.prompts[i], files, batch_size)


def draw_prompt(draw: Any, i: int, prompt: str, files: list[Path], batch_size: int) -> None:
    """Draws the images of prompt number i, batch_size at once.  draw: the pipeline with size, steps and guidance."""
    for start in range(0, len(files), batch_size):
        numbers = range(len(files))[start : start + batch_size]
        noise = [torch.Generator().manual_seed(i << 16 | number) for number in numbers]
        images = draw(prompt=prompt, num_images_per_prompt=len(numbers), generator=noise).images
        for number, image in zip(numbers, images):
            with atomic_file(files[number]) as temporary:
                image.save(temporary, format="png")


@dataclass(frozen=True)
class Layout:
    """Which prompts are drawn, and into which files."""

    prompts: list[str]
    files: list[list[str]]  # the images of each prompt, relative to the output folder
    metadata: list[str]  # each prompt's line of GenEval's metadata; empty without GenEval

    def write(self, out: Path) -> None:
        """Writes prompts.json, and beside each prompt's images the metadata that GenEval's evaluator reads."""
        prompts = {file: prompt for prompt, files in zip(self.prompts, self.files) for file in files}
        write_text(out / "prompts.json", json.dumps(prompts, indent=1) + "\n")
        for files, line in zip(self.files, self.metadata):
            write_text((out / files[0]).parent.with_name("metadata.jsonl"), line + "\n")


def choose_layout(prompts: Path | None, geneval: Path | None, images_per_prompt: int) -> Layout:
    """00000_0.png for prompts of a text file, 00000/samples/0000.png for GenEval's metadata."""
    is_one = (prompts is None) != (geneval is None)
    require(is_one, "give either --prompts FILE or --geneval evaluation_metadata.jsonl")
    lines = read_prompts(prompts) if geneval is None else read_lines(geneval)
    name = "{:05d}_{}.png" if geneval is None else "{:05d}/samples/{:04d}.png"
    files = [[name.format(i, number) for number in range(images_per_prompt)] for i in range(len(lines))]
    if geneval is None:
        return Layout(lines, files, [])
    return Layout([read_geneval_line(geneval, line) for line in lines], files, lines)


def read_geneval_line(path: Path, line: str) -> str:
    """The prompt in a line of GenEval's metadata."""
    try:
        prompt = parse_json(line)["prompt"]
    except (ValueError, LookupError, TypeError):
        prompt = None
    is_text = isinstance(prompt, str)
    require(is_text, f'{path}: the line {line!r:.60} must be a JSON object with a text "prompt"')
    return prompt


def open_trained(model: str, transformer: Path | None, lora: Path | None, lora_scale: float, dtype: torch.dtype) -> Any:
    """A complete pipeline on the CPU, with the trained transformer or adapters if one is given."""
    require(math.isfinite(lora_scale), f"lora_scale={lora_scale} must be finite")
    require(lora or lora_scale == 1, f"lora_scale={lora_scale} scales adapters, but there are none: give --lora, too")
    require(not (transformer and lora), "give --transformer or --lora, not both: a run trains one of them")
    check_start(lora, transformer)
    folder = pipeline_folder(model)
    family, components = pipeline.family_of(folder), {}
    if transformer:
        components["transformer"] = load_component(transformer, family.transformer_class, dtype)
    pipe = pipeline.open_pipeline(family, folder, dtype, **components)
    if lora:
        load_adapters(lora, family, pipe.transformer)
        pipe.transformer.set_adapters(pipe.transformer.active_adapters(), lora_scale)
    pipe.set_progress_bar_config(disable=True)
    return pipe
