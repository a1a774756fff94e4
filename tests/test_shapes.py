"""The small FLUX.1 that draws coloured shapes: scenes, the exact judge, and the pipeline of the project at work."""

import json
import re
from random import Random
from unittest.mock import Mock

import pytest
import torch

from tests import tiny_pipelines as tiny  # first: skips without the libraries

# isort: split

from matplotlib.axes import Axes
from matplotlib.spines import Spine
from PIL import Image

import train_leap_align as trainer
from full_scale.shapes import build, scenes
from full_scale.shapes.judge import Judge, read_scene, shows
from full_scale.shapes.scenes import Caption, Item, Placed
from full_scale.shapes.train import save_state, spoiled
from leap_align import BadInput
from runtime.files import read_csv
from tests.tiny_pipelines import tool, train
from tests.toy_runs import ROOT

pytestmark = pytest.mark.usefixtures("one_process")
ALL = scenes.captions()
RED_SQUARE, BLUE_CIRCLE = Item("square", "red"), Item("circle", "blue")


def test_the_captions_are_those_of_the_grammar():
    """3 shapes, 6 colors: 18 objects, 36 counts, 6 * 30 ordered pairs that differ in shape and color, 4 relations."""
    sizes = {"single object": 3, "two objects": 6, "counting": 36, "colors": 18, "position": 720}
    assert {kind: len(members) for kind, members in ALL.items()} == sizes | {"color attribution": 180}
    known = {
        "a circle": ("single object", 1), "a circle and a square": ("two objects", 2),
        "an orange square": ("colors", 1), "two blue squares": ("counting", 2),
        "a red circle left of a blue square": ("position", 2),
        "a red circle and a blue square": ("color attribution", 2),
    }  # fmt: skip
    for text, (kind, count) in known.items():
        caption = scenes.read_caption(text)
        assert (caption.kind, len(caption.items), str(caption)) == (kind, count, text)
    for kind, members in ALL.items():
        assert all(scenes.read_caption(str(caption)) == caption and caption.kind == kind for caption in members)


def test_no_prompt_is_both_trained_on_and_held_out_and_the_first_lines_have_every_kind():
    files = build.prompts()
    assert not set(files["prompts.txt"]) & set(files["held-out.txt"])
    for texts in files.values():
        assert len(set(texts)) == len(texts) and {scenes.read_caption(text).kind for text in texts[:6]} == ALL.keys()


@pytest.mark.parametrize("kind", ALL)
def test_the_judge_knows_right_scenes_from_scenes_that_are_wrong_in_one_respect(kind):
    """100 right ones, and 170 wrong ones: 1,020 over all kinds."""
    random = Random(kind)
    captions = [random.choice(ALL[kind]) for _ in range(170)]
    right = scenes.draw([scenes.place(caption, random) for caption in captions[:100]])
    wrong = []
    for caption in captions:
        while shows(scene := scenes.place(scenes.spoil(caption, random), random), caption):
            pass
        wrong.append(scene)
    texts = [str(caption) for caption in captions]
    assert Judge()(right, texts[:100]).mean() == 1
    assert Judge()(scenes.draw(wrong), texts).sum() == 0


def test_the_judge_against_scenes_that_were_placed_by_hand():
    square, circle = Placed("square", "red", 8, 9, 6), Placed("circle", "blue", 24, 8, 5.5)
    cases = {
        "a red square and a blue circle": 1, "a blue circle and a red square": 1, "a square and a circle": 1,
        "a red square left of a blue circle": 1, "a blue circle right of a red square": 1, "a red square": 0,
        "a red square right of a blue circle": 0, "a red square above a blue circle": 0, "a circle": 0,
        "a blue square and a red circle": 0, "two red squares": 0,
    }  # fmt: skip
    image = scenes.draw([(square, circle)])
    assert Judge()(image.expand(len(cases), -1, -1, -1), list(cases)).tolist() == list(cases.values())
    assert {(p.shape, p.color) for p in read_scene(image[0])} == {("square", "red"), ("circle", "blue")}
    column = [Placed("circle", "blue", 15, 8, 5), Placed("square", "red", 17, 24, 5)]
    above, below = "a blue circle above a red square", "a blue circle below a red square"
    assert Judge()(scenes.draw([column, column]), [above, below]).tolist() == [1, 0]
    empty, both = torch.full_like(image, scenes.GROUND / 255), image.clone()
    both[:, :, :, :8] = image[:, [2, 1, 0], :, :8]  # one half of the square becomes blue
    assert Judge()(torch.cat([empty, both]), ["a red square", "a red square and a blue circle"]).sum() == 0


def test_the_judge_against_pixels_that_were_filled_by_hand():
    images = torch.full((2, 3, 32, 32), 245 / 255)
    x, y = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="xy")
    square, disc = (abs(x - 9) <= 4) & (abs(y - 9) <= 4), (x - 20) ** 2 + (y - 20) ** 2 <= 25
    images[0, :, square] = torch.tensor([220.0, 40, 40])[:, None] / 255  # red
    images[1, :, disc] = torch.tensor([50.0, 80, 220])[:, None] / 255  # blue
    for shape, color in (("square", "red"), ("circle", "red"), ("square", "blue"), ("circle", "blue")):
        expected = [float((shape, color) == known) for known in (("square", "red"), ("circle", "blue"))]
        assert Judge()(images, [f"a {color} {shape}"] * 2).tolist() == expected


def test_what_the_judge_refuses():
    image = torch.rand(1, 3, 32, 32)
    with pytest.raises(BadInput, match="'a dog' is no caption of shapes, such as"):
        Judge()(image, ["a dog"])
    with pytest.raises(BadInput, match=r"images of \(32, 48\) pixels: .* reads 32 x 32"):
        Judge()(torch.rand(1, 3, 32, 48), ["a circle"])


def test_its_table_is_the_mean_over_kinds():
    prompts = ["a circle", "a square", "two red circles"]
    assert Judge().summary(prompts, [1, 0, 1]) == {"single object": 0.5, "counting": 1, "overall": 0.75}


def test_spoiled_captions_differ_in_one_respect():
    caption, random = Caption((RED_SQUARE, BLUE_CIRCLE), "left of"), Random(0)
    found = [scenes.spoil(caption, random) for _ in range(200)]
    sides = {other.relation for other in found if other.items == caption.items}
    assert sides == set(scenes.RELATIONS) - {"left of"} and caption not in found
    swapped = Caption((Item("square", "blue"), Item("circle", "red")), "left of")
    assert swapped in found and {len(other.items) for other in found} == {1, 2, 3}


@pytest.mark.slow
def test_an_interrupted_build_continues_to_the_bit(tmp_path, monkeypatch):
    """Stopped after the second of three steps of the VAE, then of the pipeline, then of the reward."""
    monkeypatch.setattr("full_scale.shapes.train.SAVE_EVERY", 2)
    tool("shapes", tmp_path / "once", "--smoke")
    for saves in 1, 2, 2:
        with monkeypatch.context() as patch:
            patch.setattr("full_scale.shapes.train.save_state", stopping(saves))
            assert "No space" in tiny.refusal(["shapes", tmp_path / "stopped", "--smoke"])
    tool("shapes", tmp_path / "stopped", "--smoke")
    assert tiny.content_of(tmp_path / "once") == tiny.content_of(tmp_path / "stopped")
    refused = tiny.refusal(["shapes", tmp_path / "once", "--smoke", "--seed", 1])
    assert "was filled with other settings: seed" in refused


def stopping(saves, save=save_state):
    """save_state, which fails after it has written so many times."""
    written = []

    def save_and_stop(*arguments):
        save(*arguments)
        written.append(arguments)
        if len(written) == saves:
            raise OSError(28, "No space left on device")

    return save_and_stop


# Scores, sheets and runs ---------------------------------------------------------------------------------------------


def write_images(folder, captions, place):
    """A folder as `sample` fills it, with a rendered scene for each caption."""
    folder.mkdir()
    images = scenes.draw([place(caption, Random(i)) for i, caption in enumerate(captions)])
    for i, image in enumerate(images.mul(255).round().byte().permute(0, 2, 3, 1).numpy()):
        Image.fromarray(image).save(folder / f"{i}.png")
    (folder / "prompts.json").write_text(json.dumps({f"{i}.png": str(c) for i, c in enumerate(captions)}))
    return folder


def test_score_gives_a_table_by_kinds_and_a_sheet_shows_what_is_right(tmp_path, capsys, monkeypatch):
    captions = [caption for members in ALL.values() for caption in members[:2]]
    before, after = (write_images(tmp_path / p.__name__, captions, p) for p in (spoiled, scenes.place))
    for folder, share in ((before, 0), (after, 1)):
        tool("score", "--images", folder, "--reward", "shapes", "--out", tmp_path / f"scores-{share}")
        printed = capsys.readouterr().out
        assert all(re.search(rf"^{kind} +{share}.000$", printed, re.M) for kind in (*ALL, "overall"))
    monkeypatch.setattr(Axes, "imshow", shown := Mock())
    monkeypatch.setattr(Spine, "set", frames := Mock())
    tool("shapes-sheet", "--before", before, "--after", after, "--out", tmp_path / "sheet.png")
    assert Image.open(tmp_path / "sheet.png").size[0] > 800 and len(shown.call_args_list) == 24
    lines = [call.kwargs["linestyle"] for call in frames.call_args_list if "linestyle" in call.kwargs]
    assert lines == [(0, (1.5, 1.5))] * 48 + ["-"] * 48  # four sides of twelve images
    (after / "prompts.json").write_text(json.dumps({"0.png": "a circle"}))
    line = tiny.refusal(["shapes-sheet", "--before", before, "--after", after])
    assert "hold images of different prompts" in line
    (before / "prompts.json").write_text(json.dumps({"0.png": "a dog"}))
    line = tiny.refusal(["score", "--images", before, "--reward", "shapes", "--out", tmp_path / "others"])
    assert "'a dog' is no caption of shapes" in line


def test_a_run_is_watched_by_the_judge(models, tmp_path):
    """Tiny random models draw noise, which shows nothing."""
    (tmp_path / "prompts.txt").write_text("\n".join(build.prompts()["held-out.txt"][:4]))
    few = ["--prompts", tmp_path / "prompts.txt", "--width", 32, "--iterations", 1, "--held-out", "shapes"]
    train(tmp_path / "run", [*tiny.flags(models, "flux"), *few])
    assert {row["shapes"] for row in read_csv(tmp_path / "run" / "evaluations.csv")} == {"0.0"}


def test_the_command_that_the_tool_prints_is_complete_and_that_of_the_pages(tmp_path):
    """It parses, and names files that the tool writes."""
    for page in ("README.md", "full_scale/shapes/README.md"):
        text = " ".join((ROOT / page).read_text().replace("\\\n", " ").split())
        assert f"```bash {build.recommended_run('full_scale/shapes/trained')}" in text
    words = build.recommended_run(tmp_path).split()[2:]
    flags = trainer.parse(words)
    assert flags.task.held_out == "shapes" and flags.task.height == flags.task.width == scenes.SIZE
    assert {flags.task.prompts.name, flags.task.evaluation_prompts.name} == build.prompts().keys()
    assert max(len(text.split()) for text in scenes.BY_TEXT) < flags.task.max_sequence_length
