"""A sheet of images with their prompts."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

PADDING = 4  # pixels around each image
FONT = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
SMALLEST = 96  # pixels; lower images are enlarged by a whole factor
LINES_OF_TEXT = 3  # under the images of a prompt; a longer prompt is cut off


def draw_sheet(images: Tensor, prompts: Sequence[str], columns: int = 4) -> Image.Image:
    """The images of each prompt side by side, with the prompt below them; `columns` prompts in a row of the sheet.

    images: 8 bits, (P * n, 3, H, W), n for each of the P prompts, one prompt's after the other's.
    """
    from torchvision.utils import make_grid

    enlarged = max(1, SMALLEST // images.shape[2])
    images = images.repeat_interleave(enlarged, 2).repeat_interleave(enlarged, 3)
    cells = [_draw_cell(group, prompt) for group, prompt in zip(images.chunk(len(prompts)), prompts)]
    sheet = make_grid(cells, nrow=columns, padding=0, pad_value=255)
    return Image.fromarray(sheet.permute(1, 2, 0).numpy())


def _draw_cell(images: Tensor, prompt: str) -> Tensor:
    """The images (n, 3, H, W) of one prompt in a row, the prompt, and a margin at the right and below; (3, h, w)."""
    from torchvision.utils import make_grid

    row = make_grid(images, nrow=len(images), padding=PADDING, pad_value=255)
    font = ImageFont.truetype(str(FONT), max(10, images.shape[2] // 16))
    line_height = int(1.25 * font.size)
    characters = int((row.shape[2] - 2 * PADDING) / font.getlength("n"))
    lines = textwrap.wrap(prompt, max(characters, 8), max_lines=LINES_OF_TEXT, placeholder=" …")
    below = LINES_OF_TEXT * line_height + int(font.size)
    cell = F.pad(row, (0, int(font.size), 0, below), value=255)
    cell = Image.fromarray(cell.permute(1, 2, 0).numpy())
    for i, line in enumerate(lines):
        ImageDraw.Draw(cell).text((PADDING, row.shape[1] + i * line_height), line, "black", font)
    return torch.from_numpy(np.array(cell)).permute(2, 0, 1)
