"""Frozen weights in four bits under LoRA: what is loaded, and its gradient."""

import pytest
import torch
from safetensors.torch import load_file

from tests import tiny_pipelines as tiny  # first: skips without the libraries

# isort: split

from full_scale import transformer
from tests.test_flux import gradients
from tests.tiny_pipelines import PROMPTS, assert_close, every_task, flags, seeded, task_of

pytest.importorskip("torchao")
pytestmark = pytest.mark.usefixtures("one_process")

BELOW = "1 0.6962 0.5251 0.3949 0.2844 0.1848 0.0911"
ABOVE = "0 0.0796 0.1609 0.2461 0.3379 0.4407 0.5626 0.723 1"
NF4 = torch.tensor([*(-float(level) for level in BELOW.split()), *map(float, ABOVE.split())])
"""The levels of QLoRA (arXiv:2305.14314, appendix E)."""


def rounded(weight):
    """Each weight at the nearest level of its block of 64, whose scale is its largest weight."""
    blocks = weight.reshape(-1, 64)
    scale = blocks.abs().amax(1, keepdim=True)
    return (NF4[(blocks / scale).unsqueeze(-1).sub(NF4).abs().argmin(-1)] * scale).view(weight.shape)


def train_b(task):
    """B of the adapters is zero at first, which hides the gradient of A."""
    generator = seeded(1)
    for name, p in task.model.named_parameters():
        if ".lora_B." in name:
            local = p.to_local() if hasattr(p, "to_local") else p
            local.data.copy_(torch.randn(p.shape, generator=generator) / 10)
    return task


def input_gradient(task):
    x = task.noise(2, seeded()).requires_grad_()
    v = task.velocity(PROMPTS[:2])(x, task.times[2])
    return torch.autograd.grad(v, x, task.noise(2, seeded(2)))


@every_task
def test_what_is_loaded_is_the_rounded_weight_of_the_file(models, name):
    file = load_file(models / name / "transformer" / "diffusion_pytorch_model.safetensors")
    loaded = tiny.dequantised(task_of(models, name, lora_rank=2, load_in_4bit=True).model)
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
    by_name, by_input, dequantised = gradients(task), input_gradient(task), tiny.dequantised(task.model)
    plain = train_b(task_of(models, name, **changes))
    assert (input_gradient(plain)[0] - by_input[0]).abs().max() > 1e-3 * by_input[0].abs().max()
    with torch.no_grad():
        for key, p in plain.model.named_parameters():
            p.copy_(dequantised.get(key.replace(".base_layer", ""), p))
    assert_close(gradients(plain), by_name, 1e-4, 1e-7)
    torch.testing.assert_close(input_gradient(plain), by_input, rtol=1e-4, atol=1e-6)


def test_four_bits_without_torchao_are_refused(models, tmp_path, monkeypatch):
    monkeypatch.setattr(transformer, "find_spec", lambda name: None)
    line = tiny.refusal([*flags(models, "flux", "--lora-rank", 2, "--load-in-4bit"), "--out", tmp_path])
    assert line == "error: load_in_4bit needs torchao: pip install torchao==0.18.0"
