"""A sheet of images with their prompts."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torchvision
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

PADDING = 4
"""Pixels around each image."""
FONT = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
LINES_OF_TEXT = 3
"""Under the images of a prompt; a longer prompt is cut off."""


def draw_sheet(images: Tensor, prompts: Sequence[str], columns: int = 4) -> Image.Image:
    """The images of each prompt side by side, with the prompt below them; `columns` prompts in a row of the sheet.

    images: 8 bits, (P * n, 3, H, W), n for each of the P prompts, one prompt's after the other's.
    """
    cells = [_draw_cell(group, prompt) for group, prompt in zip(images.chunk(len(prompts)), prompts)]
    width, height = cells[0].size
    columns = min(columns, len(cells))
    sheet = Image.new("RGB", (columns * width, -(-len(cells) // columns) * height), "white")
    for i, cell in enumerate(cells):
        sheet.paste(cell, (i % columns * width, i // columns * height))
    return sheet


def _draw_cell(images: Tensor, prompt: str) -> Image.Image:
    """The images (n, 3, H, W) of one prompt in a row, the prompt, and a margin at the right and below."""
    row = torchvision.utils.make_grid(images, nrow=len(images), padding=PADDING, pad_value=255)
    font = ImageFont.truetype(str(FONT), max(10, images.shape[2] // 16))
    line_height = int(1.25 * font.size)
    characters = int((row.shape[2] - 2 * PADDING) / font.getlength("n"))
    lines = textwrap.wrap(prompt, max(characters, 8), max_lines=LINES_OF_TEXT, placeholder=" …")
    size = row.shape[2] + font.size, row.shape[1] + LINES_OF_TEXT * line_height + font.size
    cell = Image.new("RGB", tuple(map(int, size)), "white")
    cell.paste(Image.fromarray(np.asarray(row.permute(1, 2, 0))), (0, 0))
    for i, line in enumerate(lines):
        ImageDraw.Draw(cell).text((PADDING, row.shape[1] + i * line_height), line, "black", font)
    return cell
