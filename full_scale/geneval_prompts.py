"""Training prompts in GenEval's templates."""

import hashlib
import random
from base64 import b64decode
from itertools import permutations
from pathlib import Path

from tqdm import tqdm

from runtime.run_dir import check_new_file, write_text

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
TEST_PROMPT_HASHES = """
ABC/AGHlARMRAhw6AwA4BGrXBG88BQDIBYLtBZ/KBbPLBe3JBhAQBhaOBmUrBs+7ByLjB4HSB74hB8VZB+XZCAkYCIcwCLzzCnUGCvHiCwvBCzkGC0yWC2
gkC7qfDCYsDDvyDQQ2DTsFDW+MDYvJDZvsDb9qDeJFDhILDpySD7xuD8XeENOtEfNFEvsnE407E/0HFDAJFJ03FMqCFNr5FOp+FOybFRdgFSeWFVraFXvU
FknHFpZkF3joF3prF95OGE4YGNR3GPLKGPp9GpKJG9cDHAOOHDNdHK1iHVTiHc3pHddXHzIHH4iHH8aKIEUcIEgbINQTIWzpIYhrIcLfIcnvIzqjI8hjI/
czJBsLJFutJHzUJT53Ja2PJgLKJhWbKGo2KY/vKaRXKuX4LNKlLOJ0LdOiLxipMHSmMRd5Mk0yMp+xMqATMsevM0OmM28iNBEKNfgRNi1RNr0oNsPyN9nR
OPM7ORKWOYAbOYN/ObeuObt7OhNiOjPIOnU2OzXgOz5SO5afO59eO8hFO80lO/ztPL+rPMSVPUS4PWO4PctsPe+bPfwbPompPq8lQFCRQJCQQLtfQOMVQU
dGQfUoQuUIQwaPQynlQy7rRNSJRTU/RUSsRuzjR2YLR7/5SAq5SEHhSvAkTITHTOY/ThQATkoVTnnCTouuTqdITrQcTtJ4T0vpT5g8T5tcT9nXUBeWUiSx
U7hPVCyZVhOGVh2qVkquVn8wVtLsV39gV+4KWAGRWC8TWkANWs+9WtpEWv5XWxOdW89uXFAUXFHHXMEAXZAJXdQ1Xga8XiplXopCX2OEX+V8X+5RYTv/YU
X1YWkkYeIdYj1GYzJNY2qeY4aOZIQeZgI7Zg+WZi1dZxlrZ15laF0mab7Iad0Nal1oan8+bBcjbLHlbUGNbbSnblhZbrLAbwiOb74kb/+acHsvcPHfcSZk
chH2cnCIcn6DcqOMcswactMWdK00dObjdUHedZPOdiEtdrlIdupvdvKXd1iPePyleXpceZQKew+Nez6xe2N1e6/xfIWpfZBRffMYfhknfmt6fnJDfpfcfq
oqftysfuGSfuckfzrtf2Fgf9JtgDEDgHvtgJCegVa+gbU7gg+6glF2gq76gw3pg9Lxg+E5g+q9hK3+hM1thaAfhjzuht04h5X7iG3MiMK1iUYJiUweiYPy
ijjVimNVioaxixpFjClYjGZ8jPv4jY23jgswji0jjjHVjkOnjm7njqHxjqj9jyypj/d1kDlHkQPPkzCVkzx4lB0zlgS2l6q6l+cEmZaAmom7m+9cnIcvnI
pUnUOrnVQdnuPgn/B1oGIaoK5OoMXpoYnAoan+odF7oeznopiOo1nKpAqYpOlLpP+FpRWzpY6rpdvfpi4Rpj4epu9hp7zhqGKiqaBYqdiKqkKBqoF7q1mD
q7GWq815q+AEq/4arQfTriZ7r35Vr8tRsARrsFDksIDcsI8YsOM+sRwDsUFBseuGsgyrsioJswr/s1pds+/itCJJtIj9tZeits7etxAXtx/Lt1Ift/ZbuD
jNuHMeuXt5uZ3zufC1uhf5ulj2ul6IvBv4vD6UvGFCvHrovafWvanjvdnDvklvv9fEwLBmwO+8wlgHwlk2wmhOwv51xMIKxN/+xPJSxZkNxcnKxif3xqCv
xrn0xtYVxutwx03Yx//JyEQlyRccyTkoyq7Byy5gyzkiy0fIy2/Wy37Fy7p5y9PIy94uzE6HzGVIzG3szQmLzhx1zuFC0NeD0bQF0f1Q0lNy0lg80oLp0u
Se0vSb010E04N9068J0+zi1A+31Bfc1Dgo1Dve1HmU1MI41WsR1kbv1soj11N+2CJu2EYw2Q7z2Upg2YfF2Z+S2b262fcv2ito2tgT20Qt24gt3FCM3IIS
3NEJ3ORD3T1n3UvM3eAY3qYG3vvu33rP33+b37bj4IZb4JmG4Ljj4MPz4R6f4WNq4W1e4ZiG4em34nVG4pZx5Fab5K5I5PdY5S3K5WNt5Wws5XFo5cQh5c
uB5doC5ekQ5i875lKg5zKJ53JH6BEP6SAq6gsF6oNe6sG16xQj6+D36/2i7D0G7EeD7Pt17VwP7bNI7e1g76nr78AO8I0V8UtC8WiA8Wyp8eS08kMr85k7
89kv9KER9fa99kB19kEJ9k0d9k1R9tpM952B981E+NAz+NWF+TwQ+rZN+8A//E92/Q+m/oY//yKw/ykW/65Z/+IS
"""
"""The first three bytes of the SHA-1 of each of GenEval's 553 test prompts, in base64; never train on these."""


def geneval_prompts(out: Path) -> None:
    """Write 50,000 training prompts in GenEval's templates and the paper's ratio, none of them a test prompt.

    There are few distinct prompts for counting (160) and colors (696): these repeat many times.

    Args:
        out: New text file, one prompt per line.
    """
    check_new_file(out)
    hashes = b64decode(TEST_PROMPT_HASHES)
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
