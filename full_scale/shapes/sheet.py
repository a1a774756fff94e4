"""Draw the same prompts before and after training, in frames that say whether an image shows its prompt."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from full_scale.score import read_image, read_image_prompts
from full_scale.shapes.judge import Judge
from full_scale.shapes.scenes import KINDS, read_caption
from leap_align import require
from runtime.run_dir import atomic_file

FRAMES = {1.0: ("#0072B2", "-"), 0.0: ("#D55E00", (0, (1.5, 1.5)))}  # color and line of right and of wrong images
COLUMNS, ROWS = 12, 3  # prompts, and images of each, at most


def shapes_sheet(before: Path, after: Path, out: Path = Path("sheet.png")) -> None:
    """Draw twelve prompts of the shapes before and after training: solid blue frames are right, dashed orange wrong.

    Args:
        before: Folder that `sample` filled with the pipeline's own images.
        after: Folder that `sample` filled with the same prompts and a trained transformer.
        out: The figure.
    """
    prompts = read_image_prompts(before)
    require(prompts == read_image_prompts(after), f"{before} and {after} hold images of different prompts")
    images_of: dict[str, list[str]] = {}
    for name, prompt in prompts.items():
        images_of.setdefault(prompt, []).append(name)
    chosen = sorted(list(images_of)[:COLUMNS], key=lambda prompt: KINDS.index(read_caption(prompt).kind))
    rows = list(zip(*(images_of[prompt][:ROWS] for prompt in chosen)))
    figure = Figure(figsize=(COLUMNS, 2 * len(rows) + 0.6), layout="constrained")
    upper, lower = figure.subfigures(2, height_ratios=[len(rows) + 0.6, len(rows)], hspace=0.02)
    for part, folder, label in ((upper, before, "before"), (lower, after, "after")):
        part.supylabel(label, fontsize=11)
        for axes, names in zip(part.subplots(len(rows), len(chosen), squeeze=False), rows):
            draw_row(axes, torch.cat([read_image(folder / name) for name in names]), chosen)
    for axis, prompt in zip(upper.axes, chosen):
        axis.set_title("\n".join(textwrap.wrap(prompt, 12)), fontsize=8)
    with atomic_file(out) as temporary:
        figure.savefig(temporary, dpi=72, format="png")
    print(f"{out}: solid blue frames are right, dashed orange ones are wrong")


def draw_row(axes: Sequence[Axes], images: Tensor, prompts: list[str]) -> None:
    """Images (n, 3, H, W) of these prompts in their frames."""
    for axis, image, right in zip(axes, images, Judge()(images, prompts).tolist()):
        axis.imshow(image.permute(1, 2, 0))
        axis.set(xticks=[], yticks=[])
        color, line = FRAMES[right]
        for spine in axis.spines.values():
            spine.set(color=color, linestyle=line, linewidth=3, capstyle="butt")
