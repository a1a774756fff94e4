"""Score images with a reward: a row per image, and the mean."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from tqdm import tqdm

from full_scale import rewards
from full_scale.pipeline import gpu_or_cpu, silence_other_ranks
from leap_align import BadInput
from runtime.processes import barrier, rank, run_on_all_ranks, run_on_rank0, world_size
from runtime.run_dir import claim_output_folder, write_text

Row = dict[str, Any]
"""image, prompt and reward of one image."""


@torch.no_grad()
def score(images: Path, out: Path, reward: str = "hpsv2.1", reward_weights: tuple[str, ...] = ()) -> None:
    """Score every image that `sample` drew: prints the mean, writes OUT/IMAGES_rewards_log.json.

    Args:
        images: Folder with prompts.json and the images that it names.
        out: Folder for the log.
        reward: A reward's name, NAME:weight,NAME:weight for a sum, or your own package.module:factory.
        reward_weights: Local path of each named reward's weights, in their order; the hub's if not given.
    """
    silence_other_ranks()
    prompts = read_image_prompts(images)
    log = out / f"{images.resolve().name}_rewards_log.json"
    if log.exists():
        run_on_rank0(lambda: print_finished(log, prompts, reward))
        return
    rows_folder, device = log.with_suffix(".parts"), gpu_or_cpu()
    settings = {"images": images.resolve(), "reward": reward, "reward_weights": reward_weights}
    run_on_rank0(lambda: claim_output_folder(rows_folder, settings))
    model = run_on_all_ranks(lambda: rewards.load(reward, reward_weights, device=device))
    scored = read_rows(rows_folder)
    barrier()  # otherwise a fast rank would write rows while a slow one still reads
    with (rows_folder / f"{rank()}.jsonl").open("a") as file:
        file.write("\n")  # ends a row that was cut off
        for name in tqdm(list(prompts)[rank() :: world_size()], "score", mininterval=1, disable=rank() > 0):
            if name in scored:
                continue
            image = torchvision.io.decode_image(str(images / name), torchvision.io.ImageReadMode.RGB)
            value = model(image[None].to(device) / 255, [prompts[name]]).item()
            file.write(json.dumps({"image": name, "prompt": prompts[name], "reward": value}) + "\n")
            file.flush()
    barrier()
    run_on_rank0(lambda: write_log(log, rows_folder, prompts, reward))


def read_image_prompts(images: Path) -> dict[str, str]:
    """prompts.json of a folder of images, by file; all images must exist."""
    try:
        prompts = json.loads((images / "prompts.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise BadInput(f"images={images} needs a prompts.json, {{file: prompt}}, as `sample` writes it") from error
    missing = [name for name in prompts if not (images / name).exists()]
    if missing or not prompts:
        raise BadInput(f"{images} lacks {len(missing)} of {len(prompts)} images: finish `python -m full_scale sample`")
    return prompts


def read_rows(rows_folder: Path) -> dict[str, Row]:
    """The rows that all ranks have written, by image; a row that was cut off does not count."""
    rows = {}
    for file in rows_folder.glob("*.jsonl"):
        for line in file.read_text().splitlines():
            try:
                row = json.loads(line)
                rows[row["image"]] = row
            except json.JSONDecodeError:
                continue
    return rows


def write_log(log: Path, rows_folder: Path, prompts: dict[str, str], reward: str) -> None:
    """Collects the rows of all ranks, in the order of the images, removes their files and prints the mean."""
    rows = read_rows(rows_folder)
    mean = float(np.mean([rows[name]["reward"] for name in prompts]))
    result = {"mean": mean, "reward": reward, "images": [rows[name] for name in prompts]}
    write_text(log, json.dumps(result, indent=1) + "\n")
    shutil.rmtree(rows_folder)
    print(f"mean {reward} of {len(prompts)} images: {mean:.4f}; written to {log}")


def print_finished(log: Path, prompts: dict[str, str], reward: str) -> None:
    """Prints the mean in an existing log; refuses a log of another reward or of other images."""
    result = json.loads(log.read_text())
    if result["reward"] != reward or [row["image"] for row in result["images"]] != list(prompts):
        raise BadInput(f"{log} holds scores of {result['reward']}, or of other images: choose another --out")
    print(f"mean {reward} of {len(prompts)} images: {result['mean']:.4f}; already in {log}")
