"""Scenes of coloured shapes: captions in GenEval's kinds, scenes that show them, or differ in one respect, rendering.

a circle | a circle and a square | two blue squares | a red circle | a red circle left of a blue square
a red circle and a blue square
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import permutations, product, zip_longest
from random import Random

import torch
from torch import Tensor

from leap_align import require

SIZE = 32  # pixels of a side
SHAPES = ("circle", "square", "triangle")
COLORS = {
    "red": (220, 40, 40), "green": (40, 170, 60), "blue": (50, 80, 220),
    "yellow": (240, 210, 50), "purple": (150, 60, 190), "orange": (245, 140, 30),
}  # fmt: skip
GROUND = 245  # the grey level of the background
RADII = (5.0, 6.2)  # pixels
JITTER = 1.0  # pixels by which a centre moves at most, in x and in y
COUNTS = {"two": 2, "three": 3}
TOKENS = 10  # of a caption: eight words at most, the end, and one to spare
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}  # the first's side, (x, y)
KINDS = ("single object", "two objects", "counting", "colors", "position", "color attribution")


@dataclass(frozen=True)
class Item:
    """A shape that a caption names; color None: any."""

    shape: str
    color: str | None = None

    def __str__(self) -> str:
        words = f"{self.color} {self.shape}" if self.color else self.shape
        return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


@dataclass(frozen=True)
class Caption:
    """What a scene must show, and nothing else: its items; of two, perhaps the side of the first one."""

    items: tuple[Item, ...]
    relation: str | None = None

    def __str__(self) -> str:
        first, count = self.items[0], len(self.items)
        if count > 1 and len(set(self.items)) == 1:
            number = next(word for word, value in COUNTS.items() if value == count)
            return f"{number} {first.color} {first.shape}s"
        return f" {self.relation or 'and'} ".join(map(str, self.items))

    @property
    def kind(self) -> str:
        """GenEval's kind of prompt."""
        if len(self.items) == 1:
            return "colors" if self.items[0].color else "single object"
        if len(set(self.items)) == 1:
            return "counting"
        if self.relation:
            return "position"
        return "color attribution" if self.items[0].color else "two objects"


def captions() -> dict[str, list[Caption]]:
    """Every caption, by kind."""
    plain, colored = [Item(shape) for shape in SHAPES], [Item(*pair) for pair in product(SHAPES, COLORS)]
    pairs = [p for p in permutations(colored, 2) if p[0].shape != p[1].shape and p[0].color != p[1].color]
    found = [Caption((item,)) for item in (*plain, *colored)]
    found += [Caption(pair) for pair in (*permutations(plain, 2), *pairs)]
    found += [Caption((item,) * count) for item, count in product(colored, COUNTS.values())]
    found += [Caption(pair, relation) for pair, relation in product(pairs, RELATIONS)]
    return {kind: [caption for caption in found if caption.kind == kind] for kind in KINDS}


BY_TEXT = {str(caption): caption for kind in captions().values() for caption in kind}


def read_caption(text: str) -> Caption:
    """The caption with this text."""
    require(text in BY_TEXT, f"{text!r:.60} is no caption of shapes, such as 'a red circle left of a blue square'")
    return BY_TEXT[text]


# ------------------------------------------------------ Scenes -------------------------------------------------------
@dataclass(frozen=True)
class Placed:
    """A shape in a scene; x and y of its centre and its radius in pixels, y downwards."""

    shape: str
    color: str
    x: float
    y: float
    radius: float


Scene = tuple[Placed, ...]


def place(caption: Caption, random: Random) -> Scene:
    """A random scene that shows the caption, and nothing else: each shape near the centre of a quarter of the image."""
    quarters = [(x, y) for x in (SIZE / 4, 3 * SIZE / 4) for y in (SIZE / 4, 3 * SIZE / 4)]
    while True:
        centres = random.sample(quarters, len(caption.items))
        scene = tuple(_placed(item, *centre, random) for item, centre in zip(caption.items, centres))
        if caption.relation is None or is_on_side(scene[0], scene[1], caption.relation, margin=3):
            return scene


def _placed(item: Item, x: float, y: float, random: Random) -> Placed:
    x, y = (centre + random.uniform(-JITTER, JITTER) for centre in (x, y))
    return Placed(item.shape, item.color or random.choice(list(COLORS)), x, y, random.uniform(*RADII))


def is_on_side(a: Placed, b: Placed, relation: str, margin: float = 0) -> bool:
    """Whether a lies on this side of b: farther along that axis than across it, by more than `margin` pixels."""
    dx, dy = a.x - b.x, a.y - b.y
    side_x, side_y = RELATIONS[relation]
    along, across = dx * side_x + dy * side_y, dx * side_y + dy * side_x
    return along > abs(across) + margin


def spoil(caption: Caption, random: Random) -> Caption:
    """What a scene shows that is wrong in one respect: a color, a shape, the number, swapped colors, the side."""
    items, at = list(caption.items), random.randrange(len(caption.items))
    item, (first, *others) = items[at], items
    faults = {
        "shape": replace_at(items, at, replace(item, shape=other(SHAPES, item.shape, random))),
        "new": [*items, Item(random.choice(SHAPES), item.color and random.choice(list(COLORS)))],
        "copy": [*items, item],
    }
    if item.color:
        faults["color"] = replace_at(items, at, replace(item, color=other(COLORS, item.color, random)))
    if others:
        faults["less"] = replace_at(items, at)
    if others and first.color != others[0].color:
        faults["swap"] = [replace(first, color=others[0].color), replace(others[0], color=first.color)]
    fault = random.choice([*faults, *(["side"] if caption.relation else [])])
    if fault == "side":
        return replace(caption, relation=other(RELATIONS, caption.relation, random))
    return Caption(tuple(faults[fault]), None if fault == "less" else caption.relation)


def other(choices: Sequence[str], known: str, random: Random) -> str:
    """One of the choices, but not this one."""
    return random.choice([choice for choice in choices if choice != known])


def replace_at(items: list[Item], at: int, *new: Item) -> list[Item]:
    """The items with new ones in place of one of them."""
    return [*items[:at], *new, *items[at + 1 :]]


def draw(scenes: Sequence[Scene]) -> Tensor:
    """Images (N, 3, SIZE, SIZE) in [0, 1], with smooth edges."""
    images = torch.full((len(scenes), 3, SIZE, SIZE), GROUND / 255)
    for column in zip_longest(*scenes):
        rows = [n for n, item in enumerate(column) if item]
        items = [item for item in column if item]
        color = torch.tensor([COLORS[item.color] for item in items])[:, :, None, None] / 255
        images[rows] = images[rows].lerp(color.expand(-1, -1, SIZE, SIZE), coverage(items)[:, None])
    return images


def coverage(items: Sequence[Placed]) -> Tensor:
    """How much of each pixel each item covers, (N, SIZE, SIZE)."""
    x, y, radius = torch.tensor([(item.x, item.y, item.radius) for item in items])[:, :, None, None].unbind(1)
    centres = torch.arange(SIZE) + 0.5
    dx, dy = (centres - x).expand(-1, SIZE, SIZE), (centres[:, None] - y).expand(-1, SIZE, SIZE)
    slope = 3**0.5 / 2 * dx.abs() - dy / 2  # along the normal of a triangle's side
    distances = {  # to the edge, negative inside
        "circle": (dx.square() + dy.square()).sqrt() - radius,
        "square": torch.maximum(dx.abs(), dy.abs()) - 0.9 * radius,
        "triangle": torch.maximum(slope - 0.55 * radius, dy - 0.85 * radius),
    }
    of_each = torch.stack([distances[item.shape][n] for n, item in enumerate(items)])
    return (0.5 - of_each).clamp(0, 1)
