"""Score images with a reward: a row per image, and the mean."""

import json
import math
import shutil
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, PngImagePlugin
from torch import Tensor, nn
from tqdm import tqdm

from full_scale import rewards
from full_scale.contents import prompts_content, reward_content
from full_scale.pipeline import gpu_or_cpu, silence_other_ranks
from leap_align import BadInput, require
from runtime.files import digest, parse_json, read_json, write_text
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

ROW = {"image": str, "prompt": str, "reward": float}  # what a log holds of each image


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
    prompts, device = run_on_all_ranks(lambda: read_image_prompts(images)), gpu_or_cpu()
    model = run_on_all_ranks(lambda: rewards.load(reward, reward_weights, device=device))
    settings = run_on_all_ranks(lambda: contents(images, prompts, reward, model) if is_first_of_node() else {})
    log = out / f"{images.resolve().name}_rewards_log.json"
    with claimed_output_folder(out, "score", settings):
        is_old = log.exists()
        if not is_old:
            score_images(model, images, prompts, log.with_suffix(".parts"), device)
            run_on_rank0(lambda: write_log(log, log.with_suffix(".parts"), prompts, reward))
        run_on_rank0(lambda: print_result(log, model, prompts, reward, "already in" if is_old else "written to"))


def contents(images: Path, prompts: dict[str, str], reward: str, model: nn.Module) -> dict[str, str]:
    """Digests of the images, prompts and weights that determine the scores; refuses a damaged image."""
    for name in tqdm(prompts, "check", leave=False, delay=2):
        check_image(images / name)
    lines = [f"{name} {digest(images / name)} {prompt}" for name, prompt in prompts.items()]
    contents = {"images": prompts_content([*lines, ""]), "reward": reward}
    return contents | {"reward_weights": reward_content(reward, model)}


def check_image(path: Path) -> None:
    """Refuses a file that is no whole image, or has wrong checksums.  PIL's errors are of many kinds.

    It does not notice a JPEG or an interlaced PNG that was ended too early.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            image.verify()
        with Image.open(path, formats=FORMATS) as image:
            if image.format == "PNG" and not image.info.get("interlace"):
                check_rows(image, path.read_bytes()[24:26])
        read_image(path)
    except BadInput:
        raise
    except Exception as error:
        remedy = "replace it, or delete it and let `python -m full_scale sample` draw it again"
        kinds = ", ".join(FORMATS)
        raise BadInput(f"{path} cannot be read as {kinds} ({one_line(error)}): {remedy}") from error


def check_rows(image: PngImagePlugin.PngImageFile, pixel: bytes) -> None:
    """Raises ValueError for a PNG, not interlaced, with fewer pixels than its header says; PIL leaves them black.

    pixel: the bits of a channel, and the code of the channels.
    """
    bits = pixel[0] * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[pixel[1]]
    size = image.height * (1 + math.ceil(image.width * bits / 8))
    image.load_prepare()
    stream = b"".join(iter(lambda: image.load_read(2**16), b""))
    if len(zlib.decompressobj().decompress(stream, size)) < size:
        raise ValueError("it lacks rows of pixels")


FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP")  # others, such as EPS, would start other programs
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp")
MODES = "1 L LA P PA RGB RGBA CMYK YCbCr".split()  # of PIL, with 8 bits a channel


def read_image(path: Path) -> Tensor:
    """An image (1, 3, H, W) in [0, 1], turned as its camera says.  Raises BadInput for pixels of unknown range."""
    with Image.open(path, formats=FORMATS) as image:
        is_16_bits = image.mode == "I;16" and image.format == "PNG"  # a TIFF's may be 12, or inverted
        is_known = is_16_bits or image.mode in MODES
        require(is_known, f"{path} has pixels of unknown range ({image.mode}): save it with 8 bits a channel")
        image = ImageOps.exif_transpose(image)
        if is_16_bits:
            image = Image.fromarray((np.array(image) / 257).round().astype(np.uint8))
        pixels = np.array(image.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255


def score_images(
    model: nn.Module, images: Path, prompts: dict[str, str], rows_folder: Path, device: torch.device
) -> None:
    """Writes a row for each image of this rank's part, apart from those that have one already."""
    run_on_rank0(lambda: rows_folder.mkdir(exist_ok=True))
    scored = read_rows(rows_folder)
    barrier()  # otherwise a fast rank would write rows while a slow one still reads
    with (rows_folder / f"{rank()}.jsonl").open("a") as file:
        file.write("\n")  # ends a row that was cut off
        names = [name for name in list(prompts)[rank() :: world_size()] if name not in scored]
        for name in tqdm(names, "score", mininterval=1, disable=rank() > 0):
            value = float(model(read_image(images / name).to(device), [prompts[name]]))
            file.write(json.dumps(dict(zip(ROW, (name, prompts[name], value)))) + "\n")
            file.flush()
    barrier()


def read_image_prompts(images: Path) -> dict[str, str]:
    """prompts.json of a folder of images, by file; all images must exist."""
    path = images / "prompts.json"
    require(path.exists(), f"images={images} needs a prompts.json, {{file: prompt}}, as `sample` writes it")
    prompts = read_json(path)
    for name, prompt in prompts.items():
        require(isinstance(prompt, str), f"{path}: the prompt of {name} must be a text, not {prompt!r:.40}")
    missing = [name for name in prompts if not (images / name).is_file()]
    message = f"{images} lacks {len(missing)} of {len(prompts)} images: finish `python -m full_scale sample`"
    require(prompts and not missing, message)
    names = {str(file.relative_to(images)) for file in images.rglob("*") if file.suffix.lower() in SUFFIXES}
    others = [name for name in names - prompts.keys() if not any(part[0] in ".@" for part in Path(name).parts)]
    if others and rank() == 0:
        tqdm.write(f"{printable(path)} names {len(prompts)} images; {len(others)} others are not scored")
    return prompts


def read_rows(rows_folder: Path) -> dict[str, dict[str, Any]]:
    """The rows that all ranks have written, by image; a row that was cut off does not count."""
    rows = {}
    texts = [file.read_text(errors="replace") for file in rows_folder.glob("[0-9]*.jsonl")]
    for line in "\n".join(texts).splitlines():
        with suppress(ValueError):
            if is_row(row := parse_json(line)):
                rows[row["image"]] = row
    return rows


def is_row(row: Any) -> bool:
    """Whether a value that was read is a log's row of an image."""
    return isinstance(row, dict) and {name: type(value) for name, value in row.items()} == ROW


def write_log(log: Path, rows_folder: Path, prompts: dict[str, str], reward: str) -> None:
    """Collects the rows of all ranks, in the order of the images, and removes their files."""
    rows = read_rows(rows_folder)
    mean = float(np.mean([rows[name]["reward"] for name in prompts]))
    result = {"mean": mean, "reward": reward, "images": [rows[name] for name in prompts]}
    write_text(log, json.dumps(result, indent=1) + "\n")
    shutil.rmtree(rows_folder)


def print_result(log: Path, model: rewards.Reward, images: dict[str, str], reward: str, where: str) -> None:
    """Prints the mean in a log, and the means of groups of prompts if the reward knows any."""
    result = read_json(log)
    rows = result.get("images")
    is_table = isinstance(rows, list) and all(map(is_row, rows))
    is_whole = is_table and {row["image"]: row["prompt"] for row in rows} == images and len(rows) == len(images)
    is_whole = is_whole and isinstance(result.get("mean"), float)
    require(is_whole, f"{log} is damaged: delete it, and the same command scores the images again")
    prompts, scores = zip(*((row["prompt"], row["reward"]) for row in rows))
    for group, mean in model.summary(prompts, scores).items():
        print(f"{group:20}{mean:8.3f}")
    print(f"mean {reward} of {len(rows)} images: {result['mean']:.4f}; {where} {printable(log)}")
