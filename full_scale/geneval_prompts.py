"""Training prompts in GenEval's templates."""

import hashlib
import random
from base64 import b64decode
from itertools import permutations
from pathlib import Path

from tqdm import tqdm

from leap_align import require
from runtime.files import write_text

COUNTS = {"position": 20588, "counting": 14706, "attribute": 8824, "colors": 2941, "two objects": 2941}
"""Prompts of each kind: 50,000 in the paper's ratio 7 : 5 : 3 : 1 : 1."""
COLORS = "red orange yellow green blue purple pink brown black white".split()
OBJECTS = """
person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign, parking
meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella, handbag, tie,
suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, surfboard, tennis
racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot, hot dog,
pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop, computer mouse, tv remote,
computer keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors, teddy bear,
hair drier, toothbrush
"""
"""The 80 classes of COCO."""
TEST_PROMPT_HASHES = Path(__file__).parent / "geneval_test_hashes.txt"
"""The first three bytes of the SHA-1 of each of GenEval's 553 test prompts, in base64; never train on these."""


def geneval_prompts(out: Path) -> None:
    """Write 50,000 training prompts in GenEval's templates and the paper's ratio, none of them a test prompt.

    There are few distinct prompts for counting (160) and colors (696): these repeat many times.

    Args:
        out: New text file, one prompt per line.
    """
    require(not out.exists(), f"{out} exists: choose another --out, or delete it")
    hashes = b64decode(TEST_PROMPT_HASHES.read_text())
    test_prompts = {hashes[i : i + 3] for i in range(0, len(hashes), 3)}
    generator, prompts = random.Random(0), []
    for kind, texts in tqdm(templates().items(), "geneval-prompts"):
        allowed = [text for text in texts if hashlib.sha1(text.encode()).digest()[:3] not in test_prompts]
        repeats, rest = divmod(COUNTS[kind], len(allowed))
        prompts += allowed * repeats + generator.sample(allowed, rest)
    generator.shuffle(prompts)
    write_text(out, "\n".join(prompts) + "\n")
    print(f"{len(prompts)} prompts, {len(set(prompts))} of them distinct, written to {out}")


def templates() -> dict[str, list[str]]:
    """Every prompt of each kind, test prompts included."""
    objects = " ".join(OBJECTS.split()).split(", ")
    colored = [name for name in objects if name != "person"]
    positions = ["left of", "right of", "above", "below"]
    a = {name: f"{'an' if name[0] in 'aeiou' else 'a'} {name}" for name in objects + COLORS}
    plural = {name: name + ("es" if name.endswith("s") else "s") for name in objects}
    pairs, colors = list(permutations(objects, 2)), list(permutations(COLORS, 2))
    return {
        "position": [f"a photo of {a[x]} {where} {a[y]}" for x, y in pairs for where in positions],
        "counting": [f"a photo of {number} {plural[x]}" for x in objects for number in ("two", "three", "four")],
        "attribute": [f"a photo of {a[c]} {x} and {a[d]} {y}" for x, y in permutations(colored, 2) for c, d in colors],
        "colors": [f"a photo of {a[c]} {x}" for x in colored for c in COLORS],
        "two objects": [f"a photo of {a[x]} and {a[y]}" for x, y in pairs],
    }
