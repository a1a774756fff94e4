"""Draw the same prompts before and after training, in frames that say whether an image shows its prompt."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tqdm import tqdm

from full_scale.score import read_image, read_image_prompts
from full_scale.shapes.judge import Judge
from full_scale.shapes.scenes import KINDS, read_caption
from leap_align import require
from runtime.files import atomic_file

FRAMES = {1.0: ("#0072B2", "-"), 0.0: ("#D55E00", (0, (1.5, 1.5)))}  # color and line of right and of wrong images
COLUMNS, ROWS = 12, 3  # prompts, and images of each, at most


def shapes_sheet(before: Path, after: Path, out: Path = Path("sheet.png")) -> None:
    """Draw twelve prompts of the shapes before and after training: solid blue frames are right, dashed orange wrong.

    Below each column stands how many of all images of its prompt are right.

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
    shown = min(ROWS, *(len(images_of[prompt]) for prompt in chosen))
    figure = Figure(figsize=(COLUMNS, 2 * shown + 1), layout="constrained")
    parts = figure.subfigures(2, height_ratios=[shown + 0.7, shown + 0.3])
    for part, folder, label in zip(parts, (before, after), ("before", "after")):
        part.supylabel(label, fontsize=11)
        columns = part.subplots(shown, len(chosen), squeeze=False).T
        for column, prompt in tqdm(list(zip(columns, chosen)), label, mininterval=1):
            draw_column(column, folder, images_of[prompt], prompt)
    for axis, prompt in zip(parts[0].axes, chosen):
        axis.set_title("\n".join(textwrap.wrap(prompt, 12)), fontsize=8)
    with atomic_file(out) as temporary:
        figure.savefig(temporary, dpi=72, format="png")
    print(f"{out}: solid blue frames are right, dashed orange ones are wrong")


def draw_column(axes: Sequence[Axes], folder: Path, names: list[str], prompt: str) -> None:
    """The first images of a prompt in their frames, and the share of right ones among all."""
    images = [read_image(folder / name) for name in names]
    verdicts = [Judge()(image, [prompt]).item() for image in images]
    for axis, image, verdict in zip(axes, images, verdicts):
        axis.imshow(image[0].permute(1, 2, 0))
        axis.set(xticks=[], yticks=[])
        color, line = FRAMES[verdict]
        for spine in axis.spines.values():
            spine.set(color=color, linestyle=line, linewidth=3, capstyle="butt")
    axes[-1].set_xlabel(f"{sum(verdicts):.0f} of {len(verdicts)}", fontsize=8)
