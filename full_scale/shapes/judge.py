"""The exact judge of the shapes: finds them in an image and compares them with a caption.  It has no gradient."""

from collections.abc import Sequence
from itertools import permutations

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from full_scale.rewards import Reward
from full_scale.shapes.scenes import COLORS, GROUND, KINDS, SIZE, Caption, Placed, coverage, is_on_side, read_caption
from leap_align import require

CONTRAST = 70  # grey levels from the ground's, in some channel, from which a pixel belongs to a shape
SPECK = 8  # pixels; smaller spots are no shapes
PURITY = 0.8  # the share of a shape's inner pixels that must be nearest to one color
FITS = {"circle": (0.564, 0.0), "square": (0.556, 0.0), "triangle": (0.675, 0.135)}
"""Radius, and depth of the centre of mass below the centre, of each shape of area 1."""
PALETTE = np.array(list(COLORS.values()), dtype=float)


def read_scene(image: Tensor) -> list[Placed] | None:
    """The shapes in an image (3, H, W) in [0, 1]; None if one of them has no single color."""
    pixels = 255 * image.permute(1, 2, 0).double().numpy()
    labels, count = ndimage.label(np.abs(pixels - GROUND).max(2) > CONTRAST)
    spots = [labels == number for number in range(1, count + 1)]
    found = [_read_spot(spot, pixels) for spot in spots if spot.sum() >= SPECK]
    return None if None in found else found


def _read_spot(spot: np.ndarray, pixels: np.ndarray) -> Placed | None:
    """The shape of its area and centre of mass that covers a spot best, in the color of its inner pixels."""
    inner = ndimage.binary_erosion(spot)
    distances = np.linalg.norm(pixels[inner if inner.any() else spot][:, None] - PALETTE, axis=2)
    counts = np.bincount(distances.argmin(1), minlength=len(PALETTE))
    if counts.max() < PURITY * counts.sum():
        return None
    y, x = ndimage.center_of_mass(spot)
    color, size = list(COLORS)[counts.argmax()], spot.sum() ** 0.5
    candidates = [
        Placed(shape, color, x + 0.5, y + 0.5 - low * size, size * radius) for shape, (radius, low) in FITS.items()
    ]
    misfits = (coverage(candidates).numpy() - spot) ** 2
    return candidates[misfits.sum((1, 2)).argmin()]


def shows(scene: Sequence[Placed] | None, caption: Caption) -> bool:
    """Whether a scene has the shapes that a caption names, on the side that it names, and no other shapes."""
    if scene is None or len(scene) != len(caption.items):
        return False
    for placed in permutations(scene):
        pairs = zip(placed, caption.items)
        is_right = all(p.shape == item.shape and item.color in (None, p.color) for p, item in pairs)
        if is_right and (caption.relation is None or is_on_side(placed[0], placed[1], caption.relation)):
            return True
    return False


class Judge(Reward):
    """1 for an image that shows its prompt, else 0: `shapes` in --held-out and in `score`."""

    @torch.no_grad()
    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """(B,), without gradient.  Raises BadInput for prompts that are no captions, and for images of another size."""
        captions, size = [read_caption(prompt) for prompt in prompts], tuple(images.shape[2:])
        require(size == (SIZE, SIZE), f"images of {size} pixels: the judge of the shapes reads {SIZE} x {SIZE}")
        pairs = zip(images.clamp(0, 1).cpu(), captions)
        return torch.tensor(
            [float(shows(read_scene(image), caption)) for image, caption in pairs], device=images.device
        )

    def summary(self, prompts: Sequence[str], scores: Sequence[float]) -> dict[str, float]:
        """The share of right images of each of GenEval's kinds, and `overall`, the mean over the kinds."""
        rows = [(read_caption(prompt).kind, score) for prompt, score in zip(prompts, scores, strict=True)]
        by_kind = {kind: [score for of, score in rows if of == kind] for kind in KINDS}
        shares = {kind: sum(values) / len(values) for kind, values in by_kind.items() if values}
        return shares | {"overall": sum(shares.values()) / len(shares)}
