"""Image preprocessing in torch, with gradient: the official code of each reward does the same with PIL."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""Mean and standard deviation of CLIP's training images, one per channel; all four rewards use them."""


def normalise(images: Tensor) -> Tensor:
    """(x - mean) / std for each channel."""
    return (images - images.new_tensor(CLIP_MEAN)[:, None, None]) / images.new_tensor(CLIP_STD)[:, None, None]


def resize(images: Tensor, height: int, width: int) -> Tensor:
    """Bicubic with antialiasing, as PIL resizes floats; values may leave [0, 1] at sharp edges."""
    return F.interpolate(images, (height, width), mode="bicubic", antialias=True, align_corners=False)


def resize_like_pil(images: Tensor, height: int, width: int) -> Tensor:
    """The closest to PIL's resize of 8-bit images, which clips to [0, 1] after each of its two passes."""
    wide = resize(images, images.shape[2], width).clamp(0, 1)
    return resize(wide, height, width).clamp(0, 1)


def letterbox(images: Tensor, side: int) -> Tensor:
    """Resizes the longest side to `side` and centres the result on a black square."""
    height, width = (max(1, round(n * (side / max(images.shape[2:])))) for n in images.shape[2:])
    top, left = (side - height) // 2, (side - width) // 2
    return F.pad(resize(images, height, width), (left, side - width - left, top, side - height - top))


def crop(images: Tensor, side: int, rounding: Callable[[float], int]) -> Tensor:
    """Resizes the shortest side to `side` and crops the central square.

    rounding: makes the crop's offset an integer; official code differs in how it rounds half a pixel.
    """
    height, width = (int(side * n / min(images.shape[2:])) for n in images.shape[2:])
    top, left = rounding((height - side) / 2), rounding((width - side) / 2)
    return resize_like_pil(images, height, width)[:, :, top : top + side, left : left + side]
