"""Frozen weights in four bits under LoRA: what is loaded, its gradient, and a whole run."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests import tiny_pipelines as tiny  # first: skips without the libraries

# isort: split

from full_scale import transformer
from leap_align import rollout
from tests.test_flux import gradients
from tests.tiny_pipelines import PROMPTS, assert_close, every_task, flags, seeded, task_of, train

pytest.importorskip("torchao")
pytestmark = pytest.mark.usefixtures("one_process")

BELOW = "1 0.6962 0.5251 0.3949 0.2844 0.1848 0.0911"
ABOVE = "0 0.0796 0.1609 0.2461 0.3379 0.4407 0.5626 0.723 1"
NF4 = torch.tensor([*(-float(level) for level in BELOW.split()), *map(float, ABOVE.split())])
"""The levels of QLoRA (arXiv:2305.14314, appendix E)."""
FILE = "transformer/diffusion_pytorch_model.safetensors"
FOUR_BITS = ["--lora-rank", "2", "--load-in-4bit"]


def rounded(weight):
    """Each weight at the nearest level of its block of 64, whose scale is its largest weight."""
    blocks = weight.reshape(-1, 64)
    scale = blocks.abs().amax(1, keepdim=True)
    return (NF4[(blocks / scale).unsqueeze(-1).sub(NF4).abs().argmin(-1)] * scale).view(weight.shape)


def stored(model):
    """The weights as layers use them, by the name in the pipeline's file; frozen linear layers of the blocks alone."""
    layers = [layer for block in transformer.repeated_blocks(model) for layer in block.modules()]
    frozen = {layer.weight for layer in layers if isinstance(layer, nn.Linear) and not layer.weight.requires_grad}
    named = [(name.replace(".base_layer", ""), p) for name, p in model.named_parameters() if p in frozen]
    return {name: p.get_original_weight() if hasattr(p, "get_original_weight") else p for name, p in named}


def train_b(task):
    """B of the adapters is zero at first, which hides the gradient of A."""
    generator = seeded(1)
    for name, p in task.model.named_parameters():
        if ".lora_B." in name:
            full_tensor = p.to_local() if hasattr(p, "to_local") else p
            full_tensor.data.copy_(torch.randn(p.shape, generator=generator) / 10)
    return task


def input_gradient(task):
    x = task.noise(2, seeded()).requires_grad_()
    v = task.velocity(PROMPTS[:2])(x, task.times[2])
    return torch.autograd.grad(v, x, task.noise(2, seeded(2)))


@every_task
def test_what_is_loaded_is_the_rounded_weight_of_the_file(models, name):
    file = load_file(models / name / FILE)
    loaded = stored(task_of(models, name, lora_rank=2, load_in_4bit=True).model)
    linear = [key for key, value in file.items() if "blocks." in key and value.ndim == 2]
    assert sorted(loaded) == sorted(linear)
    for key, weight in loaded.items():
        assert (weight - rounded(file[key])).abs().max() <= 0.01 * file[key].abs().max()  # a scale has eight bits
        assert (weight - file[key]).abs().max() > 0.03 * file[key].abs().max()


@pytest.mark.parametrize("checkpointing", ["on", "off"])
@every_task
def test_the_gradient_is_that_of_the_dequantised_weights(models, name, checkpointing):
    changes = {"lora_rank": 2, "gradient_checkpointing": checkpointing}
    task = train_b(task_of(models, name, load_in_4bit=True, **changes))
    by_name, by_input, dequantised = gradients(task), input_gradient(task), stored(task.model)
    plain = train_b(task_of(models, name, **changes))
    assert (input_gradient(plain)[0] - by_input[0]).abs().max() > 1e-3 * by_input[0].abs().max()
    with torch.no_grad():
        for key, p in plain.model.named_parameters():
            p.copy_(dequantised.get(key.replace(".base_layer", ""), p))
    assert_close(gradients(plain), by_name, 1e-4, 1e-7)
    torch.testing.assert_close(input_gradient(plain), by_input, rtol=1e-4, atol=1e-6)


def test_a_resumed_run_equals_an_uninterrupted_one(models, tmp_path):
    arguments = flags(models, "flux", *FOUR_BITS, "--precision", "bfloat16", "--beta", "1e-3")
    uninterrupted = train(tmp_path / "uninterrupted", arguments)
    train(tmp_path / "resumed", [*arguments, "--iterations", "2"])
    assert train(tmp_path / "resumed", [*arguments, "--resume"]) == uninterrupted
    assert all(row["grad_norm"] > 0 for row in uninterrupted)
    assert_close(*(tiny.exported(tmp_path / run) for run in ("resumed", "uninterrupted")), 0, 0)


@every_task
def test_diffusers_draws_from_the_adapters_on_the_dequantised_weights_what_was_trained(models, tmp_path, name):
    train(tmp_path, flags(models, name, "--iterations", "2", "--lr", "0.02", *FOUR_BITS))
    task = task_of(models, name, lora_rank=2, load_in_4bit=True)
    task.load(tmp_path)
    x_T, pipeline = task.noise(1, seeded()), tiny.pipeline_of(models, name)
    trained = tiny.final_latents(task, rollout(task.velocity(PROMPTS[:1]), x_T, task.times)[0])
    pipeline.transformer.load_state_dict(stored(task.model), strict=False)
    untrained = tiny.draw(pipeline, x_T, PROMPTS[:1], 4)
    pipeline.load_lora_weights(tmp_path / "lora")
    torch.testing.assert_close(tiny.draw(pipeline, x_T, PROMPTS[:1], 4), trained, rtol=0, atol=1e-4)
    assert (untrained - trained).abs().max() > 30e-4


def test_four_bits_without_torchao_are_refused(models, tmp_path, monkeypatch):
    monkeypatch.setattr(transformer, "find_spec", lambda name: None)
    line = tiny.refusal([*flags(models, "flux", *FOUR_BITS), "--out", tmp_path])
    assert line == "error: load_in_4bit needs torchao: pip install torchao==0.18.0"
