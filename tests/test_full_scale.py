"""The tools around a run: embed, sample, score, GenEval's prompts, and models and rewards of every kind."""

import gc
import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
import weakref
from collections import Counter
from dataclasses import replace
from functools import partial

import psutil
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests import tiny_pipelines as tiny  # first: skips without the libraries

# isort: split

from full_scale import geneval_prompts
from full_scale.components import weight_shapes
from full_scale.models import FAMILIES, Family
from full_scale.score import read_image
from leap_align import BadInput
from tests.tiny_pipelines import (
    PROMPTS,
    ROOT,
    TASKS,
    every_task,
    flags,
    options_of,
    sampling,
    slow,
    task_of,
    tool,
    train,
)

pytestmark = pytest.mark.usefixtures("one_process")


@pytest.mark.parametrize("others", [(), slow(("two",))])
def test_the_whole_path_on_one_process_and_on_two(tmp_path, others):
    """tiny -> embed -> train -> export -> sample -> score."""
    tool("tiny", tmp_path / "flux")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    tool(*tiny.embedding(tmp_path, tmp_path / "embeddings"))
    training = [*flags(tmp_path, "flux", "--width", 32, "--T", 4), "--prompts", tmp_path / "embeddings"]
    train(tmp_path / "one", training)
    for run in others:
        tiny.torchrun("train_leap_align.py", *training, "--out", tmp_path / run)
        tiny.assert_same_run(tmp_path / "one", tmp_path / run)
    images, logs, trained = [], [], ["--transformer", tmp_path / "one" / "transformer", "--images-per-prompt", 3]
    for run in ("one", *others):
        out, start = tmp_path / run, tool if run == "one" else partial(tiny.torchrun, "-m", "full_scale")
        start(*sampling(tmp_path, out / "images", "--steps", 2, *trained))
        start(*tiny.scoring(tmp_path, out / "images", out / "scores"))
        images.append({path.name: path.read_bytes() for path in (out / "images").glob("*.png")})
        logs.append(tiny.read(out / "scores" / "images_rewards_log.json"))
    assert images[0] == images[-1] and len(images[0]) == len(set(images[0].values())) == 3 * len(PROMPTS)
    assert logs[0] == logs[-1] and [row["image"] for row in logs[0]["images"]] == sorted(images[0])
    assert logs[0]["mean"] == pytest.approx(sum(row["reward"] for row in logs[0]["images"]) / len(images[0]))


@pytest.mark.slow
@every_task
def test_a_pipeline_of_the_real_size_trains_and_samples(tmp_path, monkeypatch, name):
    """The path of `tiny --full-size`, with fewer and narrower blocks in place of the real ones."""
    networks = FAMILIES[name].configs
    vae = networks["vae"] | {"block_out_channels": [32] * 4, "layers_per_block": 1}
    monkeypatch.setattr(Family, "configs", networks | {"transformer": tiny.small_config(name), "vae": vae})
    model, prompts, written = tmp_path / "model", tmp_path / "prompts.txt", []
    prompts.write_text("\n".join(PROMPTS[:2]))
    for _ in range(2):
        tool("tiny", model, "--full-size", *tiny.tiny_flags(name))
        files = [*(model / "transformer").glob("*.safetensors"), *(model / "vae").glob("*.safetensors")]
        written.append({f"{f} {key}": value for f in files for key, value in load_file(f).items()})
    assert {weight.dtype for weight in written[0].values() if weight.is_floating_point()} == {torch.bfloat16}
    tiny.assert_close(*written, 0, 0)
    (row,) = train(tmp_path / "run", real_step(name, model, prompts, 32, "--iterations", 1))
    assert 0 < row["grad_norm"] < math.inf and row["saturated"] < 0.5
    tool(*real_sample(model, prompts, tmp_path / "run", 32, tmp_path / "images"))
    assert len(list((tmp_path / "images").glob("*.png"))) == 2


def real_step(name, model, prompts, pixels, *more):
    """The README's command for a step of the real size."""
    files = ["--task", name, "--model", model, "--prompts", prompts, "--reward-weights", model / "reward"]
    sizes = "--lora-rank 4 --lr 1e-4 --batch-size 1 --T 4 --evaluation-images 2".split()
    return [str(word) for word in (*files, *sizes, "--height", pixels, "--width", pixels, *more)]


def real_sample(model, prompts, run, pixels, out):
    """The README's command that draws with the adapters of such a run."""
    files = ["sample", "--model", model, "--lora", run / "lora", "--prompts", prompts, "--out", out]
    return [*files, "--height", pixels, "--width", pixels, *"--steps 4 --images-per-prompt 1".split()]


@pytest.mark.slow
def test_a_real_step_at_the_real_size_of_sd3(tmp_path):
    """SD3.5-M: 2.5 billion weights, its VAE, 64 pixels; train, resume, export, sample in less than 22 GB each."""
    if psutil.virtual_memory().available < 16 * 2**30:
        pytest.skip("needs 16 GiB of free memory")
    model, prompts, run, images = (tmp_path / name for name in ("model", "prompts.txt", "run", "images"))
    prompts.write_text("\n".join(PROMPTS[:2]))

    def start(*command):
        subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, check=True)

    start("-m", "full_scale", "tiny", model, "--sd3", "--full-size")
    assert sum(map(math.prod, weight_shapes(model / "transformer").values())) == pytest.approx(2.5e9, rel=0.02)
    training = ["train_leap_align.py", *real_step("sd3", model, prompts, 64, "--out", run)]
    start(*training, "--iterations", 2)
    first = tiny.read_metrics(run)
    start(*training, "--iterations", 3, "--resume")
    rows = tiny.read_metrics(run)
    assert rows[:2] == first and len(rows) == 3
    assert all(0 < row["grad_norm"] < math.inf and not row["skipped"] for row in rows)
    start("-m", "full_scale", *real_sample(model, prompts, run, 64, images))
    assert len({file.read_bytes() for file in images.glob("*.png")}) == 2
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 < 22e9  # of the largest process


@pytest.mark.parametrize(
    "reward, weights",
    [
        ("hpsv2.1", "reward"),
        ("pickscore", "pickscore"),
        ("hpsv3", "hpsv3"),
        ("imagereward", "imagereward"),
        ("hpsv2.1:1,imagereward:0.5", "reward imagereward"),
        ("tests.test_rewards:redness", ""),
    ],
)
def test_every_reward_trains_and_scores(models, tmp_path, reward, weights):
    chosen = ["--reward", reward, "--reward-weights", *(models / "flux" / folder for folder in weights.split())]
    (row,) = train(tmp_path / "run", flags(models, "flux", *"--T 3 --iterations 1 --lam None".split(), *chosen))
    assert row["grad_norm"] > 0
    tool(*sampling(models, tmp_path / "images", "--transformer", tmp_path / "run" / "transformer"))
    tool(*tiny.scoring(models, tmp_path / "images", tmp_path / "scores", *chosen))
    log = tiny.read(tmp_path / "scores" / "images_rewards_log.json")
    assert log["reward"] == reward and len({row["reward"] for row in log["images"]}) == len(PROMPTS)


@every_task
def test_embeddings_are_those_computed_in_every_step_and_free_the_text_encoders(models, name, tmp_path, monkeypatch):
    """Embeddings from files, or of few prompts that are encoded once."""
    tool(*tiny.embedding(models, tmp_path, name=name))
    few = TASKS[name](options_of(models, name), 4)
    encoders = [weakref.ref(encoder) for encoder in few.text_encoders().values()]
    few.parallelize(None)
    gc.collect()
    assert encoders and not any(encoder() for encoder in encoders)
    monkeypatch.setattr("full_scale.prompts.FEW_PROMPTS", len(PROMPTS))  # one too few: the empty prompt counts
    stored, live = task_of(models, name, prompts=tmp_path), task_of(models, name)
    assert stored.prompts == live.prompts == PROMPTS
    assert stored.pipeline.text_encoder is None and live.pipeline.text_encoder is not None
    assert few.text_encoders() == {} and few.contents() == live.contents()
    assert len(few.frozen_modules()) == len(stored.frozen_modules()) == 2 < len(live.frozen_modules())
    for prompt in PROMPTS:
        tiny.assert_close(few.encode([prompt]), live.encode([prompt]), 0, 0)
    # The processor may round differently in a batch, as it does for SD3.5's pooled text.
    tiny.assert_close(few.encode(PROMPTS), live.encode(PROMPTS), 0, 1e-6)
    tiny.assert_close(stored.encode(PROMPTS[:3]), live.encode(PROMPTS[:3]), 0, 1e-5)
    x_T = live.noise(2, tiny.seeded())
    a, b = (task.velocity(PROMPTS[:2])(x_T, task.times[2]) for task in (stored, live))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_evaluation_prompts_may_be_embedded_in_a_folder_of_their_own(models, tmp_path):
    (tmp_path / "other.txt").write_text("a cat on the moon\n")
    folders = {"prompts": tmp_path / "train", "evaluation_prompts": tmp_path / "evaluation"}
    tool(*tiny.embedding(models, tmp_path / "train"))
    tool(*tiny.embedding(models, tmp_path / "evaluation", "--prompts", tmp_path / "other.txt"))
    task = TASKS["flux"](options_of(models, "flux", **folders), 4)
    assert task.evaluation_prompts == ["a cat on the moon"] and task.pipeline.text_encoder is None
    assert task.encode(["a cat on the moon", "a red cube"])["encoder_hidden_states"].shape == (2, 512, 32)
    tool(*tiny.embedding(models, tmp_path / "short", "--max-sequence-length", 9))
    live = options_of(models, "flux", max_sequence_length=9)
    stored = replace(live, prompts=tmp_path / "short")
    tiny.assert_close(*(TASKS["flux"](options, 4).encode(PROMPTS[:1]) for options in (live, stored)), 0, 1e-6)
    (tmp_path / "evaluation" / "prompts.txt").write_text("a dog\n")
    with pytest.raises(BadInput, match="evaluation lacks 1 embeddings"):
        TASKS["flux"](options_of(models, "flux", **folders), 4)


EMBEDDED = "the embeddings of 5 prompts are in {0}: train with --prompts {0}\n"
SAMPLED = "5 images are in {0}: score them with python -m full_scale score --images {0} --out SCORES\n"


@pytest.mark.parametrize(
    "command_of, kind, last, says",
    [(tiny.embedding, "safetensors", "txt", EMBEDDED), (sampling, "png", "json", SAMPLED)],
)
def test_a_tool_continues_where_it_stopped(models, tmp_path, capsys, command_of, kind, last, says):
    command, prompts = command_of(models, tmp_path), tmp_path / f"prompts.{last}"
    tool(*command)
    assert capsys.readouterr().out == says.format(tmp_path)
    kept, *_, removed = sorted(tmp_path.glob(f"*.{kind}"))
    before, time = tiny.content_of(tmp_path), kept.stat().st_mtime_ns
    removed.unlink()
    prompts.unlink()
    tool(*command)
    assert kept.stat().st_mtime_ns == time and tiny.content_of(tmp_path) == before
    if last == "txt":
        assert prompts.read_text().splitlines() == PROMPTS


@every_task
def test_sample_takes_the_usual_guidance_of_its_model_and_numbers_its_images(models, tmp_path, name):
    tool(*sampling(models, tmp_path, "--images-per-prompt", 2, name=name))
    assert tiny.read(tmp_path / "settings.json")["guidance"] == {"flux": 3.5, "sd3": 3.5, "klein": 4.0}[name]
    prompts = {f"{i:05d}_{n}.png": text for i, text in enumerate(PROMPTS) for n in range(2)}
    assert tiny.read(tmp_path / "prompts.json") == prompts and all((tmp_path / file).exists() for file in prompts)


def test_an_image_is_read_as_numbers_from_0_to_1(tmp_path):
    Image.new("RGB", (2, 3), (255, 0, 51)).save(tmp_path / "image.png")
    image = read_image(tmp_path / "image.png")
    assert image.shape == (1, 3, 3, 2) and image[0, :, 2, 1].tolist() == pytest.approx([1, 0, 0.2])


def test_score_continues_where_it_stopped(models, tmp_path, monkeypatch, capsys):
    tool(*sampling(models, tmp_path / "i", "--images-per-prompt", 3))
    tool(*tiny.scoring(models, tmp_path / "i", tmp_path / "uninterrupted"))
    calls, command = [], tiny.scoring(models, tmp_path / "i", tmp_path / "resumed")

    def interrupted(path):
        calls.append(path)
        if len(calls) in (6, 6 + 15 + 6):  # while the images are checked, then while they are scored
            os.kill(os.getpid(), signal.SIGINT)
        return read_image(path)

    monkeypatch.setattr("full_scale.score.read_image", interrupted)
    for _ in range(2):
        with pytest.raises(SystemExit, match="130"):
            tool(*command)
        last = capsys.readouterr().err.splitlines()[-1]
        assert last == "stopped by SIGINT, progress is saved: the same command continues from here"
    part = tmp_path / "resumed" / "i_rewards_log.parts" / "0.jsonl"
    part.write_text(part.read_text()[:-9])  # cut off in the middle of a row
    tool(*command)
    assert len(calls) == 6 + (15 + 6) + 15 + (15 - 4)
    a, b = ((tmp_path / name / "i_rewards_log.json").read_text() for name in ("uninterrupted", "resumed"))
    assert a == b and not part.parent.exists()


def test_geneval_samples_are_where_its_evaluator_looks(models, tmp_path):
    lines = [{"tag": tag, "include": [{"class": "dog", "count": 1}], "prompt": "a dog"} for tag in ("colors", "dogs")]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    files = ["--model", models / "sd3", "--geneval", tmp_path / "metadata.jsonl", "--out", tmp_path / "o"]
    tool("sample", *files, *tiny.SAMPLING)
    for i, line in enumerate(lines):
        folder = tmp_path / "o" / f"{i:05d}"
        assert tiny.read(folder / "metadata.jsonl") == line
        assert sorted(p.name for p in (folder / "samples").iterdir()) == ["0000.png", "0001.png", "0002.png"]
    assert len({file.read_bytes() for file in (tmp_path / "o").rglob("*.png")}) == 6  # each from its own noise


COLOR = "(red|orange|yellow|green|blue|purple|pink|brown|black|white)"
KINDS = {
    "left of|right of|above|below": 20588,
    "^a photo of (two|three|four) ": 14706,
    f"an? {COLOR} .* and an? {COLOR} ": 8824,
    " and ": 2941,
    f"^a photo of an? {COLOR} ": 2941,
}
"""50,000 prompts: position, counting, attributes of two objects, two objects, colors."""


def test_geneval_prompts_keep_the_ratio_and_no_test_prompt(tmp_path):
    tool("geneval-prompts", "--out", tmp_path / "prompts.txt")
    prompts = (tmp_path / "prompts.txt").read_text().splitlines()
    lines = (ROOT / "tests/fixtures/geneval_test_prompts.txt").read_text().splitlines()
    tests = [line for line in lines if line[0] != "#"]
    assert len(tests) == 553 and not set(prompts) & set(tests)
    assert Counter(next(kind for kind in KINDS if re.search(kind, prompt)) for prompt in prompts) == KINDS
    # All test prompts except those of a single object are in the templates: ours are GenEval's own, word for word.
    templates = {text for texts in geneval_prompts.templates().values() for text in texts}
    assert len(set(tests) - templates) == 80
