"""The pipeline of coloured shapes that the project holds, at work: it draws, is trained, exported and scored."""

from random import Random

import pytest
import torch
import torch.distributed as dist

from tests import tiny_pipelines as tiny  # first: skips without the libraries

# isort: split

from diffusers import FluxPipeline, FluxTransformer2DModel

import train_leap_align as trainer
from full_scale import rewards
from full_scale.shapes import build, scenes
from full_scale.shapes.judge import Judge
from leap_align import rollout
from runtime.files import read_csv
from runtime.task import EVALUATION_SEED
from tests.tiny_pipelines import seeded, tool, train
from tests.toy_runs import ROOT

pytestmark = pytest.mark.usefixtures("one_process")
TRAINED = ROOT / "full_scale" / "shapes" / "trained"
ALL = scenes.captions()
RECORDED, ERROR = 0.493, 0.03  # the mean over kinds on the page, and the error of 300 images
SIZE = {"height": 32, "width": 32, "max_sequence_length": 10}


def run_flags(*more):
    """The recommended run with few images to evaluate, and more flags in place of its own."""
    return [*build.recommended_run(TRAINED).split()[2:], "--evaluation-images", 24, "--evaluation-T", 8, *more]


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


def share_of_right_images(pipeline):
    """The mean over kinds, of 50 images each."""
    prompts = [str(caption) for members in ALL.values() for caption in Random(0).choices(members, k=50)]
    images = pipeline(prompts, **SIZE, num_inference_steps=12, generator=seeded(), output_type="pt").images
    return Judge().summary(prompts, Judge()(images, prompts).tolist())["overall"]


def fault(caption, wrong):
    """In what a spoiled caption differs."""
    if len(wrong.items) != len(caption.items):
        return "number"
    changed = [(a, b) for a, b in zip(caption.items, wrong.items) if a != b]
    if not changed:
        return "side"
    return "colors swapped" if len(changed) == 2 else "shape" if changed[0][0].shape != changed[0][1].shape else "color"


def test_it_draws_as_recorded():
    assert abs(share_of_right_images(pipeline_of()) - RECORDED) < 3 * ERROR


def test_its_reward_chooses_the_scene_that_shows_the_caption(n=400):
    """Of two scenes; the page has the shares."""
    random, reward = Random(0), rewards.load("hpsv2.1", [TRAINED / "reward"])
    captions = random.sample(ALL["position"], n)
    wrong = [scenes.spoil(caption, random) for caption in captions]
    texts = [str(caption) for caption in captions]
    with torch.no_grad():
        good, bad = (reward(scenes.draw([scenes.place(c, random) for c in of]), texts) for of in (captions, wrong))
    found = {}
    for caption, spoiled, is_right in zip(captions, wrong, (good > bad).tolist()):
        found.setdefault(fault(caption, spoiled), []).append(is_right)
    shares = {name: sum(values) / len(values) for name, values in found.items()}
    print(shares)
    assert shares.keys() == {"number", "side", "colors swapped", "shape", "color"}
    assert all(share > (0.7 if name == "side" else 0.95) for name, share in shares.items())


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


@pytest.fixture(scope="module")
def task():
    if dist.is_initialized():
        dist.destroy_process_group()
    task = tiny.TASKS["flux"](trainer.parse(list(map(str, run_flags()))).task, T=8)
    task.parallelize(None)
    return task


def drawn_by_diffusers(task, **components):
    """The prompts of an evaluation, its noise, and what diffusers' own pipeline draws from it."""
    prompts = [prompt for prompt in task.evaluation_prompts for _ in range(2)]
    x_T = task.noise(len(prompts), torch.Generator().manual_seed(EVALUATION_SEED))
    arguments = {"latents": x_T, "num_inference_steps": 8, "guidance_scale": 3.5, "output_type": "pt"}
    return prompts, x_T, pipeline_of(**components)(prompts, **SIZE, **arguments).images


def test_its_rollout_is_the_pipelines(task):
    prompts, x_T, expected = drawn_by_diffusers(task)
    images = task.decode(rollout(task.velocity(prompts), x_T, task.times)[0]).clamp(0, 1)
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)


def test_diffusers_draws_from_the_export_what_the_run_evaluated(run, task):
    transformer = FluxTransformer2DModel.from_pretrained(run / "transformer")
    prompts, _, images = drawn_by_diffusers(task, transformer=transformer)
    share = Judge()(images, prompts).mean().item()
    assert share == pytest.approx(float(read_csv(run / "evaluations.csv")[-1]["shapes"]), abs=1e-6)


@pytest.mark.slow
def test_the_command_builds_a_pipeline_of_the_recorded_quality(tmp_path):
    """Half an hour."""
    tool("shapes", tmp_path)
    pipeline = FluxPipeline.from_pretrained(tmp_path, torch_dtype=torch.float32)
    assert abs(share_of_right_images(pipeline) - RECORDED) < 4 * ERROR
