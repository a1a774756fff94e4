"""Draw the same prompts before and after training, in frames that say whether an image shows its prompt."""

import textwrap
from pathlib import Path

import torch
from matplotlib.figure import Figure

from full_scale.score import read_image, read_image_prompts
from full_scale.shapes.judge import Judge
from full_scale.shapes.scenes import KINDS, read_caption
from leap_align import require
from runtime.run_dir import atomic_file

FRAMES = {1.0: ("#0072B2", "-"), 0.0: ("#D55E00", (0, (1.5, 1.5)))}  # color and line of right and of wrong images
COLUMNS = 12


def shapes_sheet(before: Path, after: Path, out: Path = Path("sheet.png")) -> None:
    """Draw twelve prompts of the shapes before and after training: solid blue frames are right, dashed orange wrong.

    Args:
        before: Folder that `sample` filled with the pipeline's own images.
        after: Folder that `sample` filled with the same prompts and a trained transformer.
        out: The figure.
    """
    prompts = read_image_prompts(before)
    require(prompts == read_image_prompts(after), f"{before} and {after} hold images of different prompts")
    first = {prompt: name for name, prompt in reversed(prompts.items())}  # the first image of each prompt
    kinds = {kind: [prompt for prompt in first if read_caption(prompt).kind == kind] for kind in KINDS}
    chosen = [prompt for members in kinds.values() for prompt in members[: COLUMNS // len(KINDS)]]
    figure = Figure(figsize=(COLUMNS, 2.9), layout="constrained")
    rows = figure.subplots(2, len(chosen), squeeze=False)
    for row, (folder, label) in zip(rows, ((before, "before"), (after, "after"))):
        images = torch.cat([read_image(folder / first[prompt]) for prompt in chosen])
        row[0].set_ylabel(label)
        for axis, image, right in zip(row, images, Judge()(images, chosen).tolist()):
            axis.imshow(image.permute(1, 2, 0))
            axis.set(xticks=[], yticks=[])
            color, line = FRAMES[right]
            for spine in axis.spines.values():
                spine.set(color=color, linestyle=line, linewidth=3, capstyle="butt")
    for axis, prompt in zip(rows[0], chosen):
        axis.set_title("\n".join(textwrap.wrap(prompt, 12)), fontsize=7)
    with atomic_file(out) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    print(f"{out}: solid blue frames are right, dashed orange ones are wrong")
