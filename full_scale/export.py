"""The weights in a checkpoint of a run, in the form that diffusers loads."""

from pathlib import Path
from typing import get_args

import torch
from torch import nn

from full_scale import transformer
from full_scale.models import FAMILIES
from full_scale.pipeline import Precision, pipeline_folder
from leap_align import require
from runtime.checkpoint import load_tensors
from runtime.files import digest, read_json
from runtime.processes import printable, world_size
from runtime.run_dir import checkpoints, claimed_output_folder

SETTINGS = {"model": str, "precision": str, "lora_rank": int, "lora_alpha": float | None, "lora_targets": list | None}
"""What an export reads in a run's config.json, beside the task."""


def export(run: Path, out: Path, iteration: int | None = None, raw: bool = False) -> None:
    """Write the weights in a checkpoint of a run as its end writes them: OUT/transformer or OUT/lora.

    It needs no GPU, and main memory for one transformer.  The run may have been stopped, or still be training.

    Args:
        run: Folder of a run with an image model.
        out: Folder to fill.
        iteration: The checkpoint's; the newest one if not given.
        raw: The trained weights themselves instead of their average.
    """
    require(world_size() == 1, "export is one process: start it without torchrun")
    settings = read_json(run / "config.json")
    require(settings.get("task") in [*FAMILIES], f"run={run} is no run with an image model ({', '.join(FAMILIES)})")
    for name, kind in SETTINGS.items():
        value = settings.get(name)
        is_kind = value in get_args(Precision) if name == "precision" else isinstance(value, kind)
        require(is_kind, f"{run}/config.json is damaged ({name}={value!r:.40}): restore it")
    transformer.check_lora(settings["lora_rank"], settings.get("lora_alpha"))
    path, family = choose_checkpoint(run, iteration), FAMILIES[settings["task"]]
    pipeline, dtype = pipeline_folder(settings["model"], ("transformer",)), getattr(torch, settings["precision"])
    model, empty = (transformer.empty_transformer(family, pipeline) for _ in range(2))
    if settings["lora_rank"]:
        transformer.add_lora(model, *(settings.get(f"lora_{name}") for name in ("rank", "alpha", "targets")), dtype)
        model.to_empty(device="cpu")  # the frozen weights take no memory, because nothing is written there
    else:
        nn.Module.to(model, dtype).to_empty(device="cpu")
        transformer.load_weights(model, pipeline / "transformer")  # for buffers, which are not trained
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    load_tensors(path, {f"{'model' if raw else 'average'}.{name}": p.data for name, p in trained.items()})
    with claimed_output_folder(out, "export", {"checkpoint": digest(path / "state.json"), "raw": raw}):
        transformer.export(model, family, empty, dtype, out)
    print(f"{out} holds the {'raw' if raw else 'averaged'} weights of {printable(path)}")


def choose_checkpoint(run: Path, iteration: int | None) -> Path:
    """The checkpoint of an iteration, or the newest one."""
    paths = {int(path.name): path for path in checkpoints(run)}
    require(paths, f"{run} has no checkpoint yet: let the run continue with --resume")
    known = ", ".join(map(str, paths))
    require(iteration in (None, *paths), f"iteration={iteration}: {run} has checkpoints of {known}")
    return paths[max(paths) if iteration is None else iteration]
