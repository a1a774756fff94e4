"""FLUX.1-dev, SD3.5-M and FLUX.2-klein as tasks: tiny random pipelines made of the real classes."""

import math
import re
from itertools import product
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo import config as dynamo_config
from torch._dynamo.utils import counters
from torch.distributed.fsdp import FSDPModule

pytest.importorskip("diffusers")

import train_leap_align as trainer
from beyond import DEFAULTS, Hyper
from full_scale import transformer
from leap_align import full_backprop, rollout
from runtime.backward import BatchGenerator
from runtime.processes import full_value
from tests import tiny_pipelines as tiny
from tests.tiny_pipelines import PROMPTS, assert_close, draw, every_task, final_latents, pipeline_of, seeded, task_of

pytestmark = pytest.mark.usefixtures("one_process")
a_flux = pytest.mark.parametrize("name", ["flux", "klein"])
every_rank = pytest.mark.parametrize("lora_rank", [0, 2], ids=["full", "lora"])


@pytest.mark.parametrize(
    "name, tolerance, T", [("flux", 0.0, 25), ("flux", 0.0, 4), ("sd3", 1e-5, 4), ("klein", 0.0, 4)]
)
def test_the_rollout_is_the_pipelines(models, name, tolerance, T):
    task = task_of(models, name, T)
    x_T = task.noise(2, seeded())
    states = rollout(task.velocity(PROMPTS[:2]), x_T, task.times)
    pipeline = pipeline_of(models, name)
    assert (draw(pipeline, x_T, PROMPTS[:2], T) - final_latents(task, states[0])).abs().max() <= tolerance
    with torch.no_grad():
        sample = task.decode(states[0])
    # On some processors the VAE's convolutions round by where their input is in memory.
    images = draw(pipeline, x_T, PROMPTS[:2], T, "pt")
    assert sample.shape == (2, 3, 64, 96) and (images - sample.clamp(0, 1)).abs().max() <= 1e-5


@pytest.mark.parametrize(
    "name, T, mu", [("flux", 25, math.log(2.2243)), ("klein", 25, 1.9745554), ("klein", 50, 1.8066816)]
)
def test_the_grid_at_720_pixels_is_the_dynamic_shift(models, name, T, mu):
    """klein's mu of 2025 tokens: 2.0752798 for 10 steps, 0.7994384 for 200 and linear in between."""
    times = task_of(models, name, height=720, width=720, T=T).times
    u, s = torch.linspace(0, 1, T + 1), math.exp(mu)
    torch.testing.assert_close(times, s * u / (1 + (s - 1) * u), rtol=0, atol=2e-5)
    assert task_of(models, name, shift=3.0).times[2] == pytest.approx(0.75)


@pytest.mark.parametrize("guidance, evaluations", [(1.0, 1), (1.5, 2)])
def test_klein_is_guided_from_a_scale_above_1_as_in_its_pipeline(models, guidance, evaluations):
    task, seen = task_of(models, "klein", guidance=guidance), []
    task.model.register_forward_pre_hook(lambda *_: seen.append(1))
    x_T = task.noise(2, seeded())
    x_0 = rollout(task.velocity(PROMPTS[:2]), x_T, task.times)[0]
    assert len(seen) == 4 * evaluations
    drawn = draw(pipeline_of(models, "klein"), x_T, PROMPTS[:2], 4, guidance=guidance)
    assert torch.equal(drawn, final_latents(task, x_0))


@pytest.mark.parametrize("name, tolerance, tokens", [("flux", 0.0, 9), ("sd3", 1e-5, 77 + 9), ("klein", 0.0, 9)])
def test_short_text_inputs_are_the_pipelines(models, name, tolerance, tokens):
    task = task_of(models, name, max_sequence_length=9)
    x_T = task.noise(2, seeded())
    x_0 = rollout(task.velocity(PROMPTS[:2]), x_T, task.times)[0]
    drawn = draw(pipeline_of(models, name), x_T, PROMPTS[:2], 4, max_sequence_length=9)
    assert (drawn - final_latents(task, x_0)).abs().max() <= tolerance
    assert task.encode(PROMPTS[:2])["encoder_hidden_states"].shape[1] == tokens


@every_task
def test_weights_loaded_through_the_meta_device_are_those_on_disk_and_every_block_is_sharded(models, name):
    task = task_of(models, name)
    loaded = {key: full_value(value) for key, value in task.model.state_dict().items()}
    assert_close(loaded, load_file(models / name / "transformer" / "diffusion_pytorch_model.safetensors"), 0, 0)
    assert {key for key, _ in task.model.named_buffers()} <= loaded.keys()  # the file fills every buffer
    # Were a block not sharded by itself, a forward would gather the whole transformer at once.
    blocks = [block for kind, blocks in task.model.named_children() if kind.endswith("blocks") for block in blocks]
    assert len(blocks) == {"flux": 3, "sd3": 2, "klein": 3}[name]
    assert all(isinstance(block, FSDPModule) for block in blocks)


@a_flux
def test_half_precision_computes_in_bfloat16_and_keeps_the_rest_in_float32(models, name):
    task, seen = task_of(models, name, precision="bfloat16"), []
    inputs = lambda block, kwargs: (block.attn.to_q.weight, kwargs["hidden_states"], kwargs["image_rotary_emb"][0])  # noqa: E731
    look = lambda block, args, kwargs: seen.extend(inputs(block, kwargs))  # noqa: E731
    task.model.transformer_blocks[0].register_forward_pre_hook(look, with_kwargs=True)
    x = task.noise(1, seeded())
    with torch.no_grad():
        assert task.velocity(PROMPTS[:1])(x, task.times[2]).dtype == torch.float32
    assert [tensor.dtype for tensor in seen[:3]] == [torch.bfloat16, torch.bfloat16, torch.float32]
    transformer.reshard(task.model)  # until then the bfloat16 copies hide the trained weights
    assert {p.dtype for p in [*task.model.parameters(), *task.reward_model.parameters()]} == {torch.float32}
    assert task.pipeline.vae.dtype == torch.bfloat16


def test_half_precision_applies_the_statistics_of_kleins_latents_in_float32(models):
    task = task_of(models, "klein", precision="bfloat16")
    x_0, bn = task.noise(1, seeded()), task.pipeline.vae.bn
    mean, variance = (value.double().view(1, -1, 1, 1) for value in (bn.running_mean, bn.running_var))
    expected = x_0.double() * (variance + task.pipeline.vae.config.batch_norm_eps).sqrt() + mean
    found = final_latents(task, x_0)
    assert found.dtype == torch.float32
    # The channels of a state are 2x2 patches of the latents.
    patches = found.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 1, 4, 5, 2, 3).flatten(1, 3)
    torch.testing.assert_close(patches, expected.float(), rtol=1e-6, atol=1e-6)


@every_task
def test_half_precision_rounds_the_time_where_the_pipeline_does(models, name):
    task, pipeline = task_of(models, name, precision="bfloat16"), pipeline_of(models, name)
    pipeline.to(torch.bfloat16)
    times = {task.model: [], pipeline.transformer: []}
    for model in times:
        look = lambda model, _, inputs: times[model].append(inputs["timestep"].float())  # noqa: E731
        model.register_forward_pre_hook(look, with_kwargs=True)
    x_T = task.noise(1, seeded())
    rollout(task.velocity(PROMPTS[:1]), x_T, task.times)
    draw(pipeline, x_T.to(torch.bfloat16), PROMPTS[:1], 4)
    found, expected = map(torch.cat, times.values())
    assert len(expected) >= 4 and torch.equal(found, expected)
    assert torch.equal(found, found.bfloat16().float()) == (name != "sd3")  # whose times stay float32


@every_task
def test_a_new_velocity_sees_weights_that_changed_after_a_forward(models, name):
    found = []
    for is_asked_before in (True, False):
        task = task_of(models, name)
        x, parameters = task.noise(1, seeded()), list(task.model.parameters())
        with torch.no_grad():
            found += [task.velocity(PROMPTS[:1])(x, task.times[2])] if is_asked_before else []
            for p in parameters:  # after a forward, the model would list unsharded copies
                p.add_(0.01)
            found.append(task.velocity(PROMPTS[:1])(x, task.times[2]))
    before, after, expected = found
    assert torch.equal(after, expected) and not torch.equal(after, before)


def test_prompts_are_drawn_from_the_whole_list(models):
    task = task_of(models)
    assert set(task.sample_conditions(200, seeded())) == set(PROMPTS)
    one, again, other = (task.sample_conditions(5, seeded(seed)) for seed in (0, 0, 1))
    assert one == again != other


@every_task
def test_gradient_through_task_vae_and_reward_is_that_of_finite_differences(models, name):
    task = task_of(models, name, T=2, precision="float64", height=32, width=32)
    task.reward_model.double()
    task.times = task.times.double()
    x_T = task.noise(2, seeded()).double()
    parameters = [p for p in task.model.parameters() if p.requires_grad]
    directions = [torch.randn(p.shape, generator=seeded(i)) * p.to_local().std() for i, p in enumerate(parameters)]

    def total():
        x_0, *_ = next(full_backprop(task.velocity(PROMPTS[:2]), x_T, task.times, Hyper(), seeded()))
        return task.reward(task.decode(x_0), PROMPTS[:2]).sum()

    total().backward()
    slope = sum((p.grad.full_tensor().double() * d).sum().item() for p, d in zip(parameters, directions))

    @torch.no_grad()
    def total_at(h):
        for p, d in zip(parameters, directions):
            p.to_local().add_(d, alpha=h)
        return total().item()

    # A small step: a pixel that begins to saturate is a kink.
    numeric = (total_at(1e-4) - total_at(-2e-4)) / 2e-4
    assert abs(slope) > 1e-4 and slope == pytest.approx(numeric, rel=2e-3)


def gradients(task, method="leap_align", prompts=PROMPTS[:2]):
    """The gradient of one step, by parameter."""
    generator = BatchGenerator(len(prompts), slice(None))
    generator.manual_seed(1)
    x_T = task.noise(len(prompts), seeded())
    hyper = Hyper(m=2, **DEFAULTS.get(method, {}))
    for x_0, weight, _ in trainer.METHODS[method](task.velocity(prompts), x_T, task.times, hyper, generator):
        (task.reward(task.decode(x_0), prompts) * weight).sum().backward()
    trained = {name: p for name, p in task.model.named_parameters() if p.requires_grad}
    return {name: full_value(p.grad) for name, p in trained.items() if p.grad is not None}


@every_task
def test_the_gradient_is_the_plain_models_with_and_without_gradient_checkpointing(models, name):
    """The plain model is diffusers' own, on this process and not sharded."""
    tasks = [task_of(models, name, gradient_checkpointing=mode) for mode in ("off", "off", "on", "selective")]
    tasks[0].model = pipeline_of(models, name).transformer
    plain, *others = map(gradients, tasks)
    for gradient in others:
        assert_close(gradient, plain, 1e-5, 1e-9)


@pytest.mark.parametrize(
    ("name", "method"), [*product(["flux"], trainer.METHODS), ("sd3", "leap_align"), ("klein", "leap_align")]
)
def test_every_parameter_gets_a_gradient(models, name, method):
    task = task_of(models, name, T=5)
    by_name = gradients(task, method)
    assert by_name.keys() == {name for name, _ in task.model.named_parameters()}
    assert all(gradient.isfinite().all() for gradient in by_name.values())
    zero = {name for name, gradient in by_name.items() if not gradient.any()}
    # In SD3's last block the text ends and asks nothing, so the reward cannot depend on these.
    assert not {k for k in zero if not re.search(r"transformer_blocks.1.attn.(add_q_proj|norm_added_q)", k)}


@pytest.mark.slow
@every_task
@pytest.mark.parametrize("lora_rank, gradient_checkpointing", [(2, "on"), (0, "off")])
def test_compilation_does_not_change_the_gradient(models, name, lora_rank, gradient_checkpointing):
    options = {"lora_rank": lora_rank, "gradient_checkpointing": gradient_checkpointing}
    eager = gradients(task_of(models, name, **options))
    torch.compiler.reset()
    counters.clear()
    with dynamo_config.patch(fail_on_recompile_limit_hit=True):  # beyond its limit, torch would run eager code
        compiled = gradients(task_of(models, name, compile=True, **options))
    assert counters["stats"]["unique_graphs"] >= 2 and not counters["unimplemented"]
    assert_close(compiled, eager, 1e-4, 1e-7)


@a_flux
def test_lora_trains_only_the_adapters_and_adapts_every_block(models, name):
    task = task_of(models, name, lora_rank=2)
    by_name = gradients(task)
    assert by_name and all(".lora_" in name for name in by_name)
    assert all(g.any() == (".lora_B." in name) for name, g in by_name.items())  # B starts at zero, which hides A
    assert len({name.split(".attn.")[0] for name in by_name}) == 3
    frozen = [p for p in task.model.parameters() if not p.requires_grad]
    assert frozen and all(p.grad is None for p in frozen)


@every_rank
def test_the_reference_needs_no_second_transformer_with_lora_and_all_is_in_its_precision(models, lora_rank):
    task = task_with_reference(models, "flux", precision="bfloat16", lora_rank=lora_rank)
    kinds = lambda model: {(p.requires_grad, p.dtype) for p in model.parameters()}  # noqa: E731
    trained, frozen = (True, torch.float32), (False, torch.bfloat16)
    assert kinds(task.model) == ({trained, frozen} if lora_rank else {trained})
    assert all(gradient.dtype == torch.float32 for gradient in gradients(task).values())
    assert isinstance(task.reference, torch.nn.Module) == (not lora_rank)
    assert lora_rank or kinds(task.reference) == {frozen}


def test_a_saturated_pixel_has_no_gradient_and_is_counted(models):
    task = task_of(models)
    sample = task.decode((50 * task.noise(2, seeded())).requires_grad_())
    saturated = (sample < 0) | (sample > 1)
    (gradient,) = torch.autograd.grad(task.reward(sample, PROMPTS[:2]).sum(), sample)
    assert gradient[~saturated].any() and not gradient[saturated].any()
    assert task.step_metrics(sample) == {"saturated": pytest.approx(saturated.float().mean().item())}
    assert saturated.float().mean() > 0.01


# The leash


def task_with_reference(models, name, **changes):
    """A task that keeps its reference, and whose trained weights then change."""
    task = tiny.TASKS[name](tiny.options_of(models, name, **changes), 4)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    task.keep_reference()
    task.parallelize(None)
    with torch.no_grad():
        [p.add_(0.02) for p in task.model.parameters() if p.requires_grad]
    return task


@every_task
@pytest.mark.parametrize(("lora_rank", "precision"), [(0, "float32"), (2, "bfloat16")])
def test_the_reference_is_the_pretrained_model_whatever_the_trained_one_becomes(models, name, lora_rank, precision):
    pretrained = task_of(models, name, precision=precision, lora_rank=lora_rank)
    x, t = pretrained.noise(2, seeded()), pretrained.times[2]
    with torch.no_grad():
        expected = pretrained.velocity(PROMPTS[:2])(x, t)
        task = task_with_reference(models, name, precision=precision, lora_rank=lora_rank)
        with patch.object(task, "encode", wraps=task.encode) as encode:
            v, v_ref = task.velocity_and_reference(PROMPTS[:2])
        assert [call for call in encode.call_args_list if call.args[0] != [""]] == [((PROMPTS[:2],),)]  # once for both
        assert torch.equal(v_ref(x, t), expected)
        assert not torch.equal(v(x, t), expected)
        assert torch.equal(v(x, t), task.velocity(PROMPTS[:2])(x, t))  # the reference left the trained model alone


@every_rank
@pytest.mark.parametrize("checkpointing", ["on", "off"])
def test_an_evaluation_of_the_reference_does_not_change_the_gradient(models, lora_rank, checkpointing):
    task = task_with_reference(models, "flux", gradient_checkpointing=checkpointing, lora_rank=lora_rank)
    expected = gradients(task)
    task.model.zero_grad()
    velocity, reference = task.velocity_and_reference(PROMPTS[:2])
    task.velocity = lambda condition: lambda x, t: (velocity(x, t), torch.no_grad()(reference)(x, t))[0]
    assert_close(gradients(task), expected, 0, 0)
