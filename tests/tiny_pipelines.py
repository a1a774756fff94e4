"""Tiny random pipelines made of the real classes, and how the tests train, sample and score with them."""

# ruff: noqa: E402 (optional libraries are checked before they are imported)

import json
import os
import pkgutil
import socket
import subprocess
import sys
from functools import cache, partial
from importlib.util import find_spec
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

for library in ("diffusers", "transformers", "peft", "open_clip", "torchvision"):
    pytest.importorskip(library)

import open_clip

import train_leap_align as trainer
from full_scale import __main__ as tools
from full_scale.models import FAMILIES
from full_scale.transformer import repeated_blocks
from tests.problems import seeded  # noqa: F401 (for the tests of pipelines)
from tests.toy_runs import ROOT
from tests.toy_runs import metrics as read_metrics

open_clip.SimpleTokenizer = cache(open_clip.SimpleTokenizer)  # reads its vocabulary for a fifth of a second
PROMPTS = ["a red cube", "two dogs on a beach", "an old clock in the rain", "a photo of a bench", "a"]
TASKS = {name: pkgutil.resolve_name(trainer.TASKS[name]) for name in FAMILIES}
every_task = pytest.mark.parametrize("name", TASKS)
slow = partial(pytest.param, marks=pytest.mark.slow)
needs_torchao = pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed")
SAMPLING = "--height 32 --width 48 --steps 2 --images-per-prompt 3 --batch-size 2 --precision float32".split()

SMALL = {
    "flux": {"num_layers": 2, "num_single_layers": 2, "axes_dims_rope": [4, 4, 8]},
    "sd3": {"num_layers": 4, "dual_attention_layers": [0, 1], "caption_projection_dim": 64},
    "klein": {"num_layers": 2, "num_single_layers": 2, "axes_dims_rope": [4, 4, 4, 4]},
}
"""What is left of the real architectures, which keep the widths of their inputs: four blocks of four heads."""


def small_config(name):
    return FAMILIES[name].configs["transformer"] | {"attention_head_dim": 16, "num_attention_heads": 4} | SMALL[name]


def start(command):
    """A tool of `python -m full_scale`, or the trainer, in this process."""
    command = list(map(str, command))
    (tools if command[0] in tools.TOOLS else trainer).main(command)


def tool(*command):
    start(command)


def tiny_flags(name):
    """The flag of `tiny` that chooses a task's model."""
    return [] if name == "flux" else [f"--{name}"]


def write_models(folder):
    """The models, and prompts as some editors write them: with a mark in front, and empty lines."""
    for name in TASKS:
        tool("tiny", folder / name, *tiny_flags(name))
    (folder / "prompts.txt").write_text("\r\n".join(PROMPTS) + "\n\n", encoding="utf-8-sig", newline="")
    return folder


def files(models, name="flux"):
    return ["--model", models / name, "--prompts", models / "prompts.txt"]


def embedding(models, out, *more, name="flux"):
    return ["embed", *files(models, name), "--precision", "float32", "--out", out, *more]


def sampling(models, out, *more, name="flux"):
    """One image per prompt, in one step."""
    few = ["--images-per-prompt", 1, "--steps", 1]
    return ["sample", *files(models, name), *SAMPLING, *few, "--out", out, *more]


def scoring(models, images, out, *more):
    weights = [] if "--reward" in more else ["--reward-weights", models / "flux" / "reward"]
    return ["score", "--images", images, *weights, "--out", out, *more]


def flags(models, name, *more):
    """Training in three tiny iterations."""
    sizes = "--height 32 --width 48 --precision float32 --T 5 --batch-size 4 --evaluation-images 2".split()
    steps = "--iterations 3 --lr 1e-3 --ema-decay 0".split()
    reward = ["--reward-weights", models / name / "reward"]
    return list(map(str, ["--task", name, *files(models, name), *reward, *sizes, *steps, *more]))


def options_of(models, name, **changes):
    settings = {"model": str(models / name), "prompts": models / "prompts.txt", "height": 64, "width": 96}
    settings |= {"reward_weights": (str(models / name / "reward"),), "precision": "float32", "evaluation_images": 2}
    return TASKS[name].Options(**settings | {"guidance": 3.5} | changes)


def task_of(models, name="flux", T=4, **changes):
    """A task ready for training on this process alone, in float32."""
    if dist.is_initialized():
        dist.destroy_process_group()
    task = TASKS[name](options_of(models, name, **changes), T)
    task.parallelize(None)
    return task


def pipeline_of(models, name, **components):
    """diffusers' own pipeline."""
    pipeline = FAMILIES[name].pipeline_class.from_pretrained(models / name, **components)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline, x_T, prompts, T, output_type="latent", guidance=3.5, **more):
    """What diffusers' own pipeline draws from this noise."""
    arguments = {"height": 64, "width": 96, "num_inference_steps": T, "guidance_scale": guidance}
    return pipeline(prompt=prompts, latents=x_T, output_type=output_type, **arguments, **more).images


def final_latents(task, x_0):
    """A final state as the pipeline returns it for output_type="latent": FLUX.2-klein's is ready for the VAE."""
    with patch.object(task, "images", lambda latents: latents):
        return task.decode(x_0) if task.family is FAMILIES["klein"] else x_0


def assert_close(a, b, rtol=1e-4, atol=1e-6):
    assert a.keys() == b.keys() and a
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=rtol, atol=atol)


def train(out, arguments):
    """Trains in this process; returns the rows of metrics.csv."""
    trainer.main([*map(str, arguments), "--out", str(out)])
    return read_metrics(out)


def assert_same_metrics(one, two):
    """Rows of metrics.csv, up to rounding."""
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6)


def dequantised(model):
    """The weights as layers use them, by the name in the pipeline's file; frozen linear layers of the blocks alone."""
    layers = [layer for block in repeated_blocks(model) for layer in block.modules()]
    frozen = {layer.weight for layer in layers if isinstance(layer, torch.nn.Linear) and not layer.weight.requires_grad}
    named = [(name.replace(".base_layer", ""), p) for name, p in model.named_parameters() if p in frozen]
    return {name: p.get_original_weight() if hasattr(p, "get_original_weight") else p for name, p in named}


def exported(out):
    """The weights that a run has exported."""
    (file,) = [*out.glob("transformer/*.safetensors"), *out.glob("lora/*.safetensors")]
    return load_file(file)


def assert_same_run(one, two):
    """The same metrics and the same exported weights, up to rounding."""
    assert_same_metrics(read_metrics(one), read_metrics(two))
    a, b = exported(one), exported(two)
    # Adam's first steps are lr * sign(gradient): where a gradient is only rounding, two runs may differ by 2 lr a step.
    difference = torch.cat([(a[k] - b[k]).abs().flatten() for k in a])
    assert a.keys() == b.keys() and (difference > 1e-5).float().mean() < 0.01


def refusal(command, program=start):
    """The one line with which a program ends."""
    with pytest.raises(SystemExit) as stop:
        program([str(word) for word in command])
    line = str(stop.value)
    assert line.startswith("error: ") and "\n" not in line
    return line


def content_of(folder):
    """Every file of a folder, apart from the lock."""
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


def read(path):
    return json.loads(path.read_text())


def torchrun(*arguments, nodes=1, processes=2, environment=None, status=0):
    """Runs a program on two processes, on one node or on two, or on one process; returns what it writes to stderr."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={nodes}", "--master_addr=127.0.0.1"]
    command += [f"--nproc_per_node={processes // nodes}", f"--master_port={port}"]
    options = {"cwd": ROOT, "env": {**os.environ, **(environment or {})}, "stderr": subprocess.PIPE, "text": True}
    programs = [[*command, f"--node_rank={node}", *map(str, arguments)] for node in range(nodes)]
    for process in [subprocess.Popen(program, **options) for program in programs]:
        errors = process.communicate(timeout=600)[1]
        assert process.returncode == status, errors[-3000:]
    return errors
