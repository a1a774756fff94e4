"""The tools around a run: embed, sample, score, GenEval's prompts, and what they and the trainer refuse."""

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

import psutil
import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("diffusers")


from full_scale import geneval_prompts, rewards
from full_scale.components import weight_shapes
from full_scale.models import FAMILIES
from leap_align import BadInput
from tests.tiny_pipelines import (
    PROMPTS,
    ROOT,
    SAMPLING,
    TASKS,
    assert_close,
    assert_same_run,
    every_task,
    flags,
    options_of,
    read_metrics,
    refusal,
    seeded,
    task_of,
    tiny_flags,
    tool,
    torchrun,
    train,
)

pytestmark = pytest.mark.usefixtures("one_process")


# From the prompts to the score


def test_the_whole_path_on_two_processes_and_on_one(tmp_path):
    """tiny -> embed -> train -> export -> sample -> score."""
    model, prompts, reward = tmp_path / "model", tmp_path / "prompts.txt", tmp_path / "model" / "reward"
    prompts.write_text("\n".join(PROMPTS))
    tool("tiny", model)
    tool("embed", "--model", model, "--prompts", prompts, "--out", tmp_path / "embeddings", "--precision", "float32")
    training = ["--task", "flux", "--model", model, "--prompts", tmp_path / "embeddings", "--reward-weights", reward]
    training += "--height 32 --width 32 --T 4 --batch-size 4 --lr 1e-3 --ema-decay 0 --iterations 3".split()
    training += "--evaluation-images 2 --precision float32".split()
    train(tmp_path / "one", training)
    torchrun("train_leap_align.py", *training, "--out", tmp_path / "two")
    assert_same_run(tmp_path / "one", tmp_path / "two")

    def commands(out):
        sampling = ["--model", model, "--transformer", tmp_path / "two" / "transformer", "--prompts", prompts]
        yield ["sample", *sampling, *SAMPLING, "--out", out / "images"]
        yield ["score", "--images", out / "images", "--reward-weights", reward, "--out", out / "scores"]

    for command in commands(tmp_path / "one"):
        tool(*command)
    for command in commands(tmp_path / "two"):
        torchrun("-m", "full_scale", *command)
    images, images_of_two = (
        {path.name: path.read_bytes() for path in (tmp_path / run / "images").glob("*.png")} for run in ("one", "two")
    )
    assert images == images_of_two and len(images) == len(set(images.values())) == 3 * len(PROMPTS)
    logs = [tmp_path / run / "scores" / "images_rewards_log.json" for run in ("one", "two")]
    log, log_of_two = (json.loads(path.read_text()) for path in logs)
    assert log == log_of_two and [row["image"] for row in log["images"]] == sorted(images)
    assert log["mean"] == pytest.approx(sum(row["reward"] for row in log["images"]) / len(images))


SMALL = {
    "flux": {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "axes_dims_rope": [4, 4, 8]},
    "sd3": {"num_layers": 2, "dual_attention_layers": [0], "attention_head_dim": 16, "caption_projection_dim": 32},
    "klein": {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "axes_dims_rope": [4, 4, 4, 4]},
}
"""What is left of the real architectures, which keep the widths of their inputs, with two heads."""


@every_task
def test_a_pipeline_of_the_real_size_trains_and_samples(tmp_path, monkeypatch, name):
    """The path of `tiny --full-size`, with fewer and narrower blocks in place of the real ones."""
    networks = FAMILIES[name].configs
    monkeypatch.setitem(networks, "transformer", networks["transformer"] | SMALL[name] | {"num_attention_heads": 2})
    monkeypatch.setitem(networks, "vae", networks["vae"] | {"block_out_channels": [32] * 4, "layers_per_block": 1})
    model, prompts = tmp_path / "model", tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS[:2]))
    command = ["tiny", model, "--full-size", *tiny_flags(name)]
    tool(*command)
    first = [load_file(file) for folder in ("transformer", "vae") for file in (model / folder).glob("*.safetensors")]
    dtypes = {tensor.dtype for tensors in first for tensor in tensors.values() if tensor.is_floating_point()}
    assert dtypes == {torch.bfloat16}
    tool(*command)
    again = [load_file(file) for folder in ("transformer", "vae") for file in (model / folder).glob("*.safetensors")]
    for tensors, same in zip(first, again, strict=True):
        assert_close(tensors, same, 0, 0)
    (row,) = train(tmp_path / "run", real_step(name, model, prompts, 32, "--iterations", 1))
    assert 0 < row["grad_norm"] < math.inf and row["saturated"] < 0.5
    tool(*real_sample(model, prompts, tmp_path / "run", 32, tmp_path / "images"))
    assert len(list((tmp_path / "images").glob("*.png"))) == 2


def real_step(name, model, prompts, pixels, *more):
    """The README's command for a step of the real size."""
    files = ["--task", name, "--model", model, "--prompts", prompts, "--reward-weights", model / "reward"]
    sizes = ["--height", pixels, "--width", pixels, *"--lora-rank 4 --lr 1e-4 --batch-size 1 --T 4".split()]
    return [str(word) for word in (*files, *sizes, "--evaluation-images", 2, *more)]


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
    shapes = weight_shapes(model / "transformer").values()
    assert sum(map(math.prod, shapes)) == pytest.approx(2.5e9, rel=0.02)
    training = ["train_leap_align.py", *real_step("sd3", model, prompts, 64, "--out", run)]
    start(*training, "--iterations", 2)
    rows = read_metrics(run)
    start(*training, "--iterations", 3, "--resume")
    assert read_metrics(run)[:2] == rows and len(read_metrics(run)) == 3
    assert all(0 < row["grad_norm"] < math.inf and not row["skipped"] for row in read_metrics(run))
    start("-m", "full_scale", *real_sample(model, prompts, run, 64, images))
    assert len({file.read_bytes() for file in images.glob("*.png")}) == 2
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 < 22e9  # of the largest process


@pytest.mark.parametrize(
    "reward, folders",
    [
        ("hpsv2.1", ["reward"]),
        ("pickscore", ["pickscore"]),
        ("hpsv3", ["hpsv3"]),
        ("imagereward", ["imagereward"]),
        ("hpsv2.1:1,imagereward:0.5", ["reward", "imagereward"]),
        ("tests.test_full_scale:brightness", []),
    ],
)
def test_every_reward_trains_and_scores(models, tmp_path, reward, folders):
    weights = [str(models / "flux" / folder) for folder in folders]
    reward_flags = ["--reward", reward, *(["--reward-weights", *weights] if weights else [])]
    files = ["--model", models / "flux", "--prompts", models / "prompts.txt"]
    sizes = "--height 32 --width 48 --T 3 --batch-size 2 --evaluation-images 2 --iterations 1 --lam None".split()
    (row,) = train(tmp_path / "run", ["--task", "flux", *files, *sizes, "--precision", "float32", *reward_flags])
    assert row["grad_norm"] > 0
    sampling = ["--transformer", tmp_path / "run" / "transformer", *SAMPLING, "--images-per-prompt", "1"]
    tool("sample", *files, *sampling, "--out", tmp_path / "images")
    tool("score", "--images", tmp_path / "images", *reward_flags, "--out", tmp_path / "scores")
    log = json.loads((tmp_path / "scores" / "images_rewards_log.json").read_text())
    assert log["reward"] == reward and len({row["reward"] for row in log["images"]}) == len(PROMPTS)


def brightness():
    """A custom reward, which a run takes by its name."""
    return lambda images, prompts: images.mean((1, 2, 3))


# Embeddings


@every_task
def test_stored_embeddings_are_those_computed_on_the_fly(models, name, tmp_path, monkeypatch):
    monkeypatch.setattr("full_scale.prompts.FEW_PROMPTS", 0)
    files = ["--model", models / name, "--prompts", models / "prompts.txt"]
    tool("embed", *files, "--out", tmp_path, "--precision", "float32")
    stored, live = task_of(models, name, prompts=tmp_path), task_of(models, name)
    assert stored.prompts == live.prompts == PROMPTS
    assert stored.pipeline.text_encoder is None and live.pipeline.text_encoder is not None
    assert len(stored.frozen_modules()) == 2 < len(live.frozen_modules())
    assert_close(stored.encode(PROMPTS[:3]), live.encode(PROMPTS[:3]), 0, 1e-5)
    x_T = live.noise(2, seeded())
    a, b = (task.velocity(PROMPTS[:2])(x_T, task.times[2]) for task in (stored, live))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@every_task
def test_few_prompts_are_encoded_once_and_free_the_text_encoders(models, name, monkeypatch):
    few = TASKS[name](options_of(models, name), 4)
    encoders = [weakref.ref(encoder) for encoder in few.text_encoders().values()]
    few.parallelize(None)
    gc.collect()
    assert encoders and not any(encoder() for encoder in encoders)
    monkeypatch.setattr("full_scale.prompts.FEW_PROMPTS", len(PROMPTS))  # one too few: the empty prompt counts
    many = task_of(models, name)
    assert few.text_encoders() == {} and len(few.frozen_modules()) == 2 < len(many.frozen_modules())
    for prompt in PROMPTS:
        assert_close(few.encode([prompt]), many.encode([prompt]), 0, 0)
    # The processor may round differently in a batch, as it does for SD3.5's pooled text.
    assert_close(few.encode(PROMPTS), many.encode(PROMPTS), 0, 1e-6)
    assert few.contents() == many.contents()


def test_a_run_may_encode_its_prompts_once_or_in_every_step(models, tmp_path, monkeypatch):
    arguments = flags(models, "flux", "--iterations", "2")
    once = train(tmp_path / "once", arguments)
    with monkeypatch.context() as patch:
        patch.setattr("full_scale.prompts.FEW_PROMPTS", 0)
        train(tmp_path / "both", [*arguments, "--iterations", "1"])
    assert train(tmp_path / "both", [*arguments, "--resume"]) == once


def test_embed_continues_where_it_stopped(models, tmp_path):
    command = ["embed", "--model", models / "flux", "--prompts", models / "prompts.txt", "--out", tmp_path]
    tool(*command)
    kept, removed = sorted(tmp_path.glob("*.safetensors"))[:2]
    time, content = kept.stat().st_mtime_ns, removed.read_bytes()
    removed.unlink()
    (tmp_path / "prompts.txt").unlink()
    tool(*command)
    assert kept.stat().st_mtime_ns == time and removed.read_bytes() == content
    assert (tmp_path / "prompts.txt").read_text().splitlines() == PROMPTS


def test_embeddings_of_another_model_or_too_few_are_refused(models, tmp_path):
    tool("embed", "--model", models / "sd3", "--prompts", models / "prompts.txt", "--out", tmp_path / "e")
    arguments = [*flags(models, "flux"), "--prompts", tmp_path / "e", "--out", tmp_path / "run"]
    assert "holds embeddings of" in refusal(arguments)
    next((tmp_path / "e").glob("*.safetensors")).unlink()
    arguments = [*flags(models, "sd3"), "--prompts", tmp_path / "e", "--out", tmp_path / "run"]
    assert "lacks 1 embeddings" in refusal(arguments)


def test_evaluation_prompts_may_be_embedded_in_a_folder_of_their_own(models, tmp_path):
    (tmp_path / "evaluation.txt").write_text("a cat on the moon\n")
    for prompts, out in (models / "prompts.txt", "train"), (tmp_path / "evaluation.txt", "evaluation"):
        tool("embed", "--model", models / "flux", "--prompts", prompts, "--out", tmp_path / out)
    folders = {"prompts": tmp_path / "train", "evaluation_prompts": tmp_path / "evaluation"}
    task = TASKS["flux"](options_of(models, "flux", **folders), 4)
    assert task.evaluation_prompts == ["a cat on the moon"] and task.pipeline.text_encoder is None
    assert task.encode(["a cat on the moon", "a red cube"])["encoder_hidden_states"].shape == (2, 512, 32)
    next((tmp_path / "evaluation").glob("*.safetensors")).unlink()
    (tmp_path / "evaluation" / "prompts.txt").write_text("a dog\n")
    with pytest.raises(BadInput, match="evaluation lacks 1 embeddings"):
        TASKS["flux"](options_of(models, "flux", **folders), 4)


# Sample and score


def test_sample_continues_where_it_stopped(models, tmp_path):
    command = ["sample", "--model", models / "flux", "--prompts", models / "prompts.txt", *SAMPLING, "--out", tmp_path]
    tool(*command)
    kept, *_, removed = sorted(tmp_path.glob("*.png"))
    time, content = kept.stat().st_mtime_ns, removed.read_bytes()
    removed.unlink()
    tool(*command)
    assert kept.stat().st_mtime_ns == time and removed.read_bytes() == content
    prompts = json.loads((tmp_path / "prompts.json").read_text())
    assert prompts == {f"{i:05d}_{n}.png": text for i, text in enumerate(PROMPTS) for n in range(3)}


class InterruptedReward(torch.nn.Module):
    """A reward that counts its calls, and gets Ctrl-C in one of them."""

    def __init__(self, reward, calls, stop):
        super().__init__()
        self.reward, self.calls, self.stop = reward, calls, stop

    def forward(self, images, prompts):
        self.calls.append(prompts)
        if len(self.calls) == self.stop:
            os.kill(os.getpid(), signal.SIGINT)
        return self.reward(images, prompts)


def test_score_continues_where_it_stopped(models, tmp_path, monkeypatch, capsys):
    files = ["--model", models / "flux", "--prompts", models / "prompts.txt"]
    tool("sample", *files, *SAMPLING, "--out", tmp_path / "i")
    command = ["score", "--images", tmp_path / "i", "--reward-weights", models / "flux" / "reward", "--out"]
    tool(*command, tmp_path / "uninterrupted")
    load, calls = rewards.load, []
    monkeypatch.setattr(rewards, "load", lambda *a, **k: InterruptedReward(load(*a, **k), calls, stop=6))
    with pytest.raises(SystemExit) as stop:
        tool(*command, tmp_path / "resumed")
    assert stop.value.code == 130
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "stopped by SIGINT, everything is saved: the same command continues from here"
    part = tmp_path / "resumed" / "i_rewards_log.parts" / "0.jsonl"
    part.write_text(part.read_text()[:-9])  # cut off in the middle of a row
    monkeypatch.setattr(rewards, "load", lambda *a, **k: InterruptedReward(load(*a, **k), calls, stop=None))
    tool(*command, tmp_path / "resumed")
    assert len(calls) == 6 + 15 - 4
    a, b = ((tmp_path / name / "i_rewards_log.json").read_text() for name in ("uninterrupted", "resumed"))
    assert a == b and not part.parent.exists()


# GenEval


def test_geneval_samples_are_where_its_evaluator_looks(models, tmp_path):
    lines = [{"tag": "colors", "include": [{"class": "dog", "count": 1}], "prompt": text} for text in PROMPTS[:2]]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    files = ["--model", models / "sd3", "--geneval", tmp_path / "metadata.jsonl"]
    tool("sample", *files, *SAMPLING, "--out", tmp_path / "o")
    for i, line in enumerate(lines):
        folder = tmp_path / "o" / f"{i:05d}"
        assert json.loads((folder / "metadata.jsonl").read_text()) == line
        assert sorted(p.name for p in (folder / "samples").iterdir()) == ["0000.png", "0001.png", "0002.png"]


COLOR = "(red|orange|yellow|green|blue|purple|pink|brown|black|white)"
KINDS = {
    "position": r"left of|right of|above|below",
    "counting": r"^a photo of (two|three|four) ",
    "attribute": f"an? {COLOR} .* and an? {COLOR} ",
    "two objects": " and ",
    "colors": f"^a photo of an? {COLOR} ",
}


def kind_of(prompt):
    for kind, pattern in KINDS.items():
        if re.search(pattern, prompt):
            return kind
    raise AssertionError(prompt)


def test_geneval_prompts_keep_the_ratio_and_no_test_prompt(tmp_path):
    tool("geneval-prompts", "--out", tmp_path / "prompts.txt")
    prompts = (tmp_path / "prompts.txt").read_text().splitlines()
    assert len(prompts) == 50_000
    lines = (ROOT / "tests/fixtures/geneval_test_prompts.txt").read_text().splitlines()
    tests = [line for line in lines if line[0] != "#"]
    assert len(tests) == 553 and not set(prompts) & set(tests)
    counts = dict.fromkeys(KINDS, 0)
    for prompt in prompts:
        counts[kind_of(prompt)] += 1
    assert counts == {"position": 20588, "counting": 14706, "attribute": 8824, "colors": 2941, "two objects": 2941}
    # All test prompts except those of a single object are in the templates: ours are GenEval's own, word for word.
    templates = {text for texts in geneval_prompts.templates().values() for text in texts}
    assert len(set(tests) - templates) == 80
