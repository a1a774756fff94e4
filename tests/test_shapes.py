"""The small FLUX.1 that draws coloured shapes: scenes, the exact judge, and the pipeline of the project at work."""

import re
from random import Random

import pytest
import torch

from tests import tiny_pipelines as tiny  # first: skips without the libraries

# isort: split

from diffusers import FluxPipeline, FluxTransformer2DModel
from PIL import Image

import train_leap_align as trainer
from full_scale.shapes import build, scenes
from full_scale.shapes.judge import Judge, read_scene, shows
from full_scale.shapes.scenes import Caption, Item, Placed
from full_scale.shapes.train import save_state
from leap_align import BadInput
from runtime.run_dir import read_csv
from runtime.task import EVALUATION_SEED
from tests.tiny_pipelines import seeded, tool, train
from tests.toy_runs import ROOT

pytestmark = pytest.mark.usefixtures("one_process")
TRAINED = ROOT / "full_scale" / "shapes" / "trained"
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
    for name, texts in files.items():
        assert len(set(texts)) == len(texts) and {scenes.read_caption(text).kind for text in texts[:6]} == ALL.keys()
        assert texts == (TRAINED / name).read_text().splitlines()


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
    assert Judge()(right, texts[:100]).mean() >= 0.98
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
    empty, both = torch.full_like(image, scenes.GROUND / 255), image.clone()
    both[:, :, :, :8] = image[:, [2, 1, 0], :, :8]  # one half of the square becomes blue
    assert Judge()(torch.cat([empty, both]), ["a red square", "a red square and a blue circle"]).sum() == 0


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


# The pipeline of the project ----------------------------------------------------------------------------------------

RECORDED, ERROR = 0.5, 0.03  # the share of right images on the page, the mean over kinds, and the error of 300 images
SIZE = {"height": 32, "width": 32, "max_sequence_length": 10}


def run_flags(*more):
    """The recommended run with few images to evaluate, and more flags in place of its own."""
    words = [word for word in build.recommended_run(TRAINED).split()[2:] if word != "\\"]
    return [*words, "--evaluation-images", 24, "--evaluation-T", 8, *more]


def pipeline_of(**components):
    """diffusers' own pipeline, in float32."""
    pipeline = FluxPipeline.from_pretrained(TRAINED, torch_dtype=torch.float32, **components)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of five iterations, evaluated with the trained weights themselves."""
    out = tmp_path_factory.mktemp("shapes") / "run"
    train(out, run_flags("--iterations", 5, "--evaluate-every", 5, "--ema-decay", 0))
    return out


def test_it_draws_as_recorded():
    prompts = [str(caption) for members in ALL.values() for caption in Random(0).choices(members, k=50)]
    images = pipeline_of()(prompts, **SIZE, num_inference_steps=12, generator=seeded(), output_type="pt").images
    share = Judge().summary(prompts, Judge()(images, prompts).tolist())["overall"]
    assert abs(share - RECORDED) < 3 * ERROR


def test_its_vae_keeps_what_the_judge_sees():
    vae, random = pipeline_of().vae, Random(0)
    captions = [random.choice(members) for members in ALL.values() for _ in range(30)]
    with torch.no_grad():
        images = scenes.draw([scenes.place(caption, random) for caption in captions])
        images = vae.decode(vae.encode(2 * images - 1).latent_dist.mean).sample / 2 + 0.5
    assert Judge()(images, [str(caption) for caption in captions]).mean() >= 0.95


def test_five_iterations_of_leap_align_raise_the_reward(run):
    before, after = (tiny.read(run / "result.json")[when]["reward"] for when in ("before", "after"))
    assert after > before + 0.005


def test_diffusers_draws_from_the_export_what_the_run_evaluated(run):
    task = tiny.TASKS["flux"](trainer.parse(list(map(str, run_flags()))).task, T=8)
    prompts = [prompt for prompt in task.evaluation_prompts for _ in range(2)]
    latents = task.noise(len(prompts), torch.Generator().manual_seed(EVALUATION_SEED))
    pipeline = pipeline_of(transformer=FluxTransformer2DModel.from_pretrained(run / "transformer"))
    arguments = {"latents": latents, "num_inference_steps": 8, "guidance_scale": 3.5, "output_type": "pt"}
    share = Judge()(pipeline(prompts, **SIZE, **arguments).images, prompts).mean().item()
    assert share == pytest.approx(float(read_csv(run / "evaluations.csv")[-1]["shapes"]), abs=1e-6)


def test_sample_and_score_give_a_table_by_kinds_and_a_sheet(run, tmp_path, capsys):
    few, (before, after) = tmp_path / "few.txt", (tmp_path / name for name in ("before", "after"))
    few.write_text("\n".join((TRAINED / "held-out.txt").read_text().splitlines()[:12]))
    sampling = ["sample", "--model", TRAINED, "--prompts", few, "--steps", 4, "--images-per-prompt", 2]
    for key, value in SIZE.items():
        sampling += [f"--{key.replace('_', '-')}", value]
    tool(*sampling, "--out", before)
    tool(*sampling, "--transformer", run / "transformer", "--out", after)
    tool("score", "--images", after, "--reward", "shapes", "--out", tmp_path / "scores")
    printed, log = capsys.readouterr().out, tiny.read(tmp_path / "scores" / "after_rewards_log.json")
    shares = Judge().summary(*zip(*((row["prompt"], row["reward"]) for row in log["images"])))
    assert all(re.search(rf"{name} +{share:.3f}", printed) for name, share in shares.items()) and len(shares) == 7
    tool("shapes-sheet", "--before", before, "--after", after, "--out", tmp_path / "sheet.png")
    assert Image.open(tmp_path / "sheet.png").size[0] > 800
    line = tiny.refusal(["shapes-sheet", "--before", before, "--after", run])
    assert "needs a prompts.json" in line


@pytest.mark.slow
def test_the_command_builds_a_pipeline_of_the_recorded_quality(tmp_path):
    """Half an hour."""
    tool("shapes", tmp_path)
    prompts = [str(caption) for members in ALL.values() for caption in Random(0).choices(members, k=50)]
    pipeline = FluxPipeline.from_pretrained(tmp_path, torch_dtype=torch.float32)
    images = pipeline(prompts, **SIZE, num_inference_steps=12, generator=seeded(), output_type="pt").images
    share = Judge().summary(prompts, Judge()(images, prompts).tolist())["overall"]
    assert abs(share - RECORDED) < 4 * ERROR
