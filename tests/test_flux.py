"""FLUX.1-dev, SD3.5-M and FLUX.2-klein as tasks: tiny random pipelines made of the real classes."""

import json
import math
import re

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch._dynamo import config as dynamo_config
from torch._dynamo.utils import counters
from torch.distributed.fsdp import FSDPModule

pytest.importorskip("diffusers")

import train_leap_align as trainer
from beyond import DEFAULTS, Hyper
from full_scale import __main__ as tools
from full_scale import transformer
from full_scale.sheet import draw_sheet
from leap_align import BatchGenerator, full_backprop, rollout
from runtime.processes import full_value
from tests.tiny_pipelines import (
    PROMPTS,
    TASKS,
    assert_close,
    assert_same_run,
    draw,
    every_task,
    final_latents,
    flags,
    options_of,
    pipeline_of,
    refusal,
    seeded,
    start_torchrun,
    task_of,
    torchrun,
    train,
)

pytestmark = pytest.mark.usefixtures("one_process")
WEIGHTS = "diffusion_pytorch_model.safetensors"


# The forward pass


@pytest.mark.parametrize("T", [4, 25])
@pytest.mark.parametrize("name, tolerance", [("flux", 0.0), ("sd3", 1e-5), ("klein", 0.0)])
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
    saturated = ((images == 0) | (images == 1)).float().mean().item()
    assert task.step_metrics(sample)["saturated"] == pytest.approx(saturated, abs=1e-3)


def test_the_grid_at_720_pixels_is_the_dynamic_shift(models):
    times = task_of(models, height=720, width=720, T=25).times
    u, s = torch.linspace(0, 1, 26), 2.2243  # exp(mu) of 2025 tokens
    torch.testing.assert_close(times, s * u / (1 + (s - 1) * u), rtol=0, atol=2e-5)
    assert task_of(models, shift=3.0).times[2] == pytest.approx(0.75)


@pytest.mark.parametrize("T, mu", [(25, 1.9745554), (50, 1.8066816)])
def test_the_grid_of_klein_shifts_with_the_number_of_steps(models, T, mu):
    """At 720 pixels, 2025 tokens: mu is 2.0752798 for 10 steps, 0.7994384 for 200 and linear in between."""
    times = task_of(models, "klein", height=720, width=720, T=T).times
    u, s = torch.linspace(0, 1, T + 1), math.exp(mu)
    torch.testing.assert_close(times, s * u / (1 + (s - 1) * u), rtol=0, atol=2e-5)


@pytest.mark.parametrize("guidance, evaluations", [(0.5, 1), (1.0, 1), (1.5, 2)])
def test_klein_is_guided_from_a_scale_above_1_as_in_its_pipeline(models, guidance, evaluations):
    task, seen = task_of(models, "klein", guidance=guidance), []
    task.model.register_forward_pre_hook(lambda *_: seen.append(1))
    x_T = task.noise(2, seeded())
    x_0 = rollout(task.velocity(PROMPTS[:2]), x_T, task.times)[0]
    assert len(seen) == 4 * evaluations
    drawn = draw(pipeline_of(models, "klein"), x_T, PROMPTS[:2], 4, guidance=guidance)
    assert torch.equal(drawn, final_latents(task, x_0))


def test_the_grid_of_sd3_is_the_schedulers_and_no_shift_of_an_even_grid(models):
    times = task_of(models, "sd3", T=25).times
    u = torch.linspace(0, 1, 26)
    assert times[0] == 0 and times[-1] == 1 and (times - 3 * u / (1 + 2 * u)).abs().max() > 0.05


@every_task
def test_weights_loaded_through_the_meta_device_are_those_on_disk(models, name):
    task = task_of(models, name)
    loaded = {name: full_value(value) for name, value in task.model.state_dict().items()}
    assert_close(loaded, load_file(models / name / "transformer" / "diffusion_pytorch_model.safetensors"), 0, 0)
    assert {name for name, _ in task.model.named_buffers()} <= loaded.keys()  # the file fills every buffer


@pytest.mark.parametrize("name", ["flux", "klein"])
def test_half_precision_computes_in_bfloat16_and_keeps_the_rest_in_float32(models, name):
    task = task_of(models, name, precision="bfloat16")
    seen = {}

    def look(block, args, kwargs):
        seen["weight"] = block.attn.to_q.weight.dtype
        seen["hidden"] = kwargs["hidden_states"].dtype
        seen["rotary"] = kwargs["image_rotary_emb"][0].dtype

    task.model.transformer_blocks[0].register_forward_pre_hook(look, with_kwargs=True)
    x = task.noise(1, seeded())
    with torch.no_grad():
        assert task.velocity(PROMPTS[:1])(x, task.times[2]).dtype == torch.float32
    assert seen == {"weight": torch.bfloat16, "hidden": torch.bfloat16, "rotary": torch.float32}
    transformer.reshard(task.model)  # until then the bfloat16 copies hide the trained weights
    assert {p.dtype for p in task.model.parameters()} == {torch.float32}
    assert task.pipeline.vae.dtype == torch.bfloat16
    assert {p.dtype for p in task.reward_model.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", ["flux", "klein"])
def test_half_precision_rounds_the_time_as_the_pipeline_does(models, name):
    task, pipeline, times = (
        task_of(models, name, precision="bfloat16"),
        pipeline_of(models, name),
        {"task": [], "own": []},
    )
    pipeline.to(torch.bfloat16)
    for key, model in (("task", task.model), ("own", pipeline.transformer)):
        look = lambda model, args, kwargs, key=key: times[key].append(kwargs["timestep"].float())  # noqa: E731
        model.register_forward_pre_hook(look, with_kwargs=True)
    x_T = task.noise(1, seeded())
    rollout(task.velocity(PROMPTS[:1]), x_T, task.times)
    draw(pipeline, x_T.to(torch.bfloat16), PROMPTS[:1], 4)
    assert len(times["own"]) >= 4 and torch.equal(torch.cat(times["task"]), torch.cat(times["own"]))
    exact = task.times.flip(0)[:-1]
    assert any((time - exact).abs().min() > 1e-4 for time in torch.cat(times["task"]))


@every_task
def test_a_new_velocity_sees_weights_that_changed_after_a_forward(models, name):
    task = task_of(models, name)
    x = task.noise(1, seeded())
    with torch.no_grad():
        parameters = list(task.model.parameters())
        before = task.velocity(PROMPTS[:1])(x, task.times[2])
        for p in parameters:
            p.add_(0.01)
        after = task.velocity(PROMPTS[:1])(x, task.times[2])
        other = task_of(models, name)
        for p in other.model.parameters():
            p.add_(0.01)
        expected = other.velocity(PROMPTS[:1])(x, other.times[2])
    assert torch.equal(after, expected) and not torch.equal(after, before)


def test_sd3_sees_times_that_no_precision_has_rounded(models):
    task = task_of(models, "sd3", precision="bfloat16")
    seen = []
    task.model.time_text_embed.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    task.velocity(PROMPTS[:1])(task.noise(1, seeded()), task.times[1])
    assert seen[0].dtype == torch.float32 and torch.equal(seen[0], 1000 * task.times[1].expand(2))


@pytest.mark.parametrize("name, width", [("flux", 32), ("klein", 3 * 16)])
def test_a_flux_reads_512_tokens_with_padding(models, name, width):
    assert task_of(models, name).encode(["a"])["encoder_hidden_states"].shape == (1, 512, width)


def test_prompts_are_drawn_from_the_whole_list(models):
    task = task_of(models)
    assert set(task.sample_conditions(200, seeded())) == set(PROMPTS)
    draws = [task.sample_conditions(5, seeded(seed)) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


# The gradient


@every_task
def test_gradient_through_task_vae_and_reward_is_that_of_finite_differences(models, name):
    task = task_of(models, name, T=2, precision="float64", height=32, width=32)
    task.reward_model.double()
    task.times = task.times.double()
    x_T = task.noise(2, seeded()).double()
    parameters = [p for p in task.model.parameters() if p.requires_grad]
    directions = [torch.randn(p.shape, generator=seeded(i)) * p.to_local().std() for i, p in enumerate(parameters)]

    def total():
        (x_0, _) = next(full_backprop(task.velocity(PROMPTS[:2]), x_T, task.times, Hyper(), seeded()))
        return task.reward(task.decode(x_0), PROMPTS[:2]).sum()

    total().backward()
    slope = sum((p.grad.full_tensor().double() * d).sum().item() for p, d in zip(parameters, directions))

    @torch.no_grad()
    def total_at(h):
        for p, d in zip(parameters, directions):
            p.to_local().add_(d, alpha=h)
        value = total().item()
        for p, d in zip(parameters, directions):
            p.to_local().sub_(d, alpha=h)
        return value

    numeric = (total_at(1e-4) - total_at(-1e-4)) / 2e-4  # a small step: a pixel that begins to saturate is a kink
    assert abs(slope) > 1e-4 and slope == pytest.approx(numeric, rel=2e-3)


def gradients(task, method="leap_align", prompts=PROMPTS[:2]):
    """The gradient of one step, by parameter."""
    generator = BatchGenerator(len(prompts), slice(None))
    generator.manual_seed(1)
    x_T = task.noise(len(prompts), seeded())
    hyper = Hyper(m=2, **DEFAULTS.get(method, {}))
    for x_0, weight in trainer.METHODS[method](task.velocity(prompts), x_T, task.times, hyper, generator):
        (task.reward(task.decode(x_0), prompts) * weight).sum().backward()
    trained = {name: p for name, p in task.model.named_parameters() if p.requires_grad}
    return {name: full_value(p.grad) for name, p in trained.items() if p.grad is not None}


@every_task
def test_gradient_checkpointing_does_not_change_the_gradient(models, name):
    on, selective, off = (
        gradients(task_of(models, name, gradient_checkpointing=mode)) for mode in ("on", "selective", "off")
    )
    assert_close(on, off, 1e-5, 1e-9)
    assert_close(selective, off, 1e-5, 1e-9)


@every_task
@pytest.mark.parametrize("method", trainer.METHODS)
def test_every_parameter_gets_a_gradient(models, name, method):
    task = task_of(models, name, T=5)
    by_name = gradients(task, method)
    assert by_name.keys() == {name for name, _ in task.model.named_parameters()}
    assert all(gradient.isfinite().all() for gradient in by_name.values())
    zero = {name for name, gradient in by_name.items() if not gradient.any()}
    # In SD3's last block the text ends and asks nothing, so the reward cannot depend on these.
    assert not {k for k in zero if not re.search(r"transformer_blocks.1.attn.(add_q_proj|norm_added_q)", k)}


def test_the_sharded_gradient_is_the_plain_models(models):
    task = task_of(models)
    sharded = gradients(task)
    task.model = pipeline_of(models, "flux").transformer
    assert_close(sharded, gradients(task), 1e-5, 1e-9)


@every_task
def test_every_block_is_sharded_by_itself(models, name):
    """Otherwise a forward would gather the whole transformer at once."""
    model = task_of(models, name).model
    blocks = [block for kind, blocks in model.named_children() if kind.endswith("blocks") for block in blocks]
    assert len(blocks) == {"flux": 3, "sd3": 2, "klein": 3}[name] and all(
        isinstance(block, FSDPModule) for block in blocks
    )


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


@pytest.mark.parametrize("name", ["flux", "klein"])
def test_lora_trains_only_the_adapters_and_adapts_every_block(models, name):
    task = task_of(models, name, lora_rank=2)
    by_name = gradients(task)
    assert by_name and all(".lora_" in name for name in by_name)
    assert all(g.any() == (".lora_B." in name) for name, g in by_name.items())  # B starts at zero, which hides A
    assert len({name.split(".attn.")[0] for name in by_name}) == 3
    frozen = [p for p in task.model.parameters() if not p.requires_grad]
    assert frozen and all(p.grad is None for p in frozen)


def test_lora_keeps_the_base_in_half_precision_and_the_adapters_in_single(models):
    task = task_of(models, lora_rank=2, precision="bfloat16")
    kinds = {(".lora_" in name, p.dtype) for name, p in task.model.named_parameters()}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}
    assert all(gradient.dtype == torch.float32 for gradient in gradients(task).values())


def test_a_saturated_pixel_has_no_gradient_and_is_counted(models):
    task = task_of(models)
    sample = task.decode((50 * task.noise(2, seeded())).requires_grad_())
    saturated = (sample < 0) | (sample > 1)
    (gradient,) = torch.autograd.grad(task.reward(sample, PROMPTS[:2]).sum(), sample)
    assert gradient[~saturated].any() and not gradient[saturated].any()
    assert task.step_metrics(sample) == {"saturated": pytest.approx(saturated.float().mean().item())}
    assert saturated.float().mean() > 0.01


# The leash

LORA = ["--lora-rank", "2"]
every_kind = pytest.mark.parametrize("kind", [{}, {"lora_rank": 2}], ids=["full", "lora"])


def task_with_reference(models, name, **changes):
    """A task that keeps its reference, and whose trained weights then change."""
    task = TASKS[name](options_of(models, name, **changes), 4)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    task.keep_reference()
    task.parallelize(None)
    with torch.no_grad():
        for p in task.model.parameters():
            if p.requires_grad:
                p.add_(0.02)
    return task


@every_task
@every_kind
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_reference_is_the_pretrained_model_whatever_the_trained_one_becomes(models, name, kind, precision):
    pretrained = task_of(models, name, precision=precision, **kind)
    x, t = pretrained.noise(2, seeded()), pretrained.times[2]
    with torch.no_grad():
        expected = pretrained.velocity(PROMPTS[:2])(x, t)
        task = task_with_reference(models, name, precision=precision, **kind)
        v, v_ref = task.velocity_and_reference(PROMPTS[:2])
        assert torch.equal(v_ref(x, t), expected)
        assert not torch.equal(v(x, t), expected)
        assert torch.equal(v(x, t), task.velocity(PROMPTS[:2])(x, t))  # the reference left the trained model alone


@every_kind
@pytest.mark.parametrize("checkpointing", [True, False])
def test_an_evaluation_of_the_reference_does_not_change_the_gradient(models, kind, checkpointing):
    task = task_with_reference(models, "flux", gradient_checkpointing=checkpointing, **kind)
    expected = gradients(task)
    task.model.zero_grad()
    velocity, reference = task.velocity_and_reference(PROMPTS[:2])

    def both(x, t):
        v = velocity(x, t)
        with torch.no_grad():
            reference(x, t)
        return v

    task.velocity = lambda condition: both
    found = gradients(task)
    assert found.keys() == expected.keys() and all(torch.equal(found[k], expected[k]) for k in found)


def test_the_prompts_are_encoded_once_for_both_velocities(models, monkeypatch):
    task, seen = task_with_reference(models, "flux"), []
    encode = task.encode
    monkeypatch.setattr(task, "encode", lambda prompts: seen.append(prompts) or encode(prompts))
    task.velocity_and_reference(PROMPTS[:2])
    assert seen == [PROMPTS[:2]]


def test_lora_needs_no_second_transformer_and_full_training_one_frozen_in_half_precision(models):
    lora, full = (task_with_reference(models, "flux", precision="bfloat16", **kind) for kind in ({"lora_rank": 2}, {}))
    assert not isinstance(lora.reference, torch.nn.Module)
    assert {(p.dtype, p.requires_grad) for p in full.reference.parameters()} == {(torch.bfloat16, False)}


@pytest.mark.parametrize("name", ["flux", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sd3", "klein"))])
@pytest.mark.parametrize("more", [[], LORA], ids=["full", "lora"])
def test_a_resumed_run_on_a_leash_equals_an_uninterrupted_one(models, tmp_path, name, more):
    arguments = [*flags(models, name, *more), "--beta", "1"]
    uninterrupted = train(tmp_path / "uninterrupted", arguments)
    assert uninterrupted[0]["leash"] == 0 < uninterrupted[2]["leash"]
    train(tmp_path / "resumed", [*arguments, "--iterations", "2"])
    assert train(tmp_path / "resumed", [*arguments, "--resume"]) == uninterrupted


@pytest.mark.slow
@every_task
@pytest.mark.parametrize("more", [[], LORA], ids=["full", "lora"])
def test_two_processes_on_a_leash_equal_one(models, tmp_path, name, more):
    arguments = [*flags(models, name, *more), "--beta", "1"]
    train(tmp_path / "one", arguments)
    torchrun("train_leap_align.py", *arguments, "--out", tmp_path / "two")
    assert_same_run(tmp_path / "one", tmp_path / "two")


# Runs


@pytest.mark.parametrize(
    "name, more, nodes",
    [
        pytest.param(
            "flux",
            ["--lora-rank", "2", "--gradient-accumulation-steps", "2"],
            2,
            id="lora on two nodes with gradient accumulation",
        ),
        pytest.param("sd3", [], 1, id="sd3", marks=pytest.mark.slow),
        pytest.param("klein", ["--lora-rank", "2"], 1, id="klein with lora"),
        pytest.param("klein", [], 1, id="klein", marks=pytest.mark.slow),
        pytest.param(
            "flux",
            ["--method", "stratified", "--gradient-accumulation-steps", "2"],
            2,
            id="stratified on two nodes with gradient accumulation",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_two_processes_equal_one(models, tmp_path, name, more, nodes):
    train(tmp_path / "one", flags(models, name, *more))
    torchrun("train_leap_align.py", *flags(models, name, *more), "--out", tmp_path / "two", nodes=nodes)
    assert_same_run(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize("name, more", [("flux", ["--lora-rank", "2"]), ("sd3", []), ("klein", [])])
def test_a_compiled_run_equals_an_eager_one_on_one_process_and_on_two(models, tmp_path, name, more):
    """In an empty cache, whose files show that the run compiled; the second run may find the code of the first."""
    arguments, cache = flags(models, name, *more), tmp_path / "cache"
    train(tmp_path / "eager", arguments)
    for processes in 2, 1:
        out = tmp_path / f"{processes}"
        program = ["train_leap_align.py", *arguments, "--compile", "--out", out]
        torchrun(*program, processes=processes, environment={"TORCHINDUCTOR_CACHE_DIR": str(cache)})
        assert_same_run(tmp_path / "eager", out)
        assert list(cache.rglob("*.so"))


REFUSING_REWARD = """
import os, sys
from full_scale import __main__ as tools
from full_scale import transformer
from full_scale.sheet import draw_sheet
from leap_align import BadInput

def refuse(*_):
    raise BadInput("this GPU is too small")

def factory():
    assert "train_leap_align" not in sys.modules, "the trainer is loaded twice"
    if os.environ["RANK"] == "1":
        transformer.check_memory = refuse
    return lambda images, prompts: images.mean((1, 2, 3))
"""


def test_what_only_rank_1_refuses_is_printed_once(models, tmp_path):
    """The real script, where the memory check fails on the second process alone; the first does not wait for ever."""
    (tmp_path / "refusing_reward.py").write_text(REFUSING_REWARD)
    small = "--task flux --height 32 --width 48 --T 2 --batch-size 2 --evaluation-images 2".split()
    files = ["--model", models / "flux", "--prompts", models / "prompts.txt", "--out", tmp_path / "run"]
    arguments = ["train_leap_align.py", *small, *files, "--reward", "refusing_reward:factory"]
    (process,) = start_torchrun(*arguments, environment={"PYTHONPATH": str(tmp_path)})
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1 and "BadInput" not in errors
    line = "error: this GPU is too small"
    # Once, and once more in the table that torchrun prints at the end.
    assert [row for row in errors.splitlines() if "too small" in row] == [line, f"  traceback : {line}"]


def test_the_export_is_the_average_of_the_weights(models, tmp_path, monkeypatch):
    seen, optimizer_step = [], trainer.Trainer.optimizer_step

    def weights(run):
        return {name: p.full_tensor().clone() for name, p in run.task.model.named_parameters()}

    def recorded_step(self, loss):
        seen.append(weights(self))
        norm = optimizer_step(self, loss)
        seen.append(weights(self))
        return norm

    monkeypatch.setattr(trainer.Trainer, "optimizer_step", recorded_step)
    train(tmp_path, flags(models, "flux", "--iterations", "2", "--ema-decay", "0.5"))
    start, one, _, two = seen
    expected = {name: 0.5 * (0.5 * start[name] + 0.5 * one[name]) + 0.5 * two[name] for name in start}
    assert_close(load_file(tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"), expected, 0, 1e-6)
    assert max((two[name] - expected[name]).abs().max() for name in start) > 1e-4


@pytest.mark.parametrize("more", ["--method lagrange", "--method stratified --K 3", "--T 8 --solver ab2"])
def test_what_is_beyond_the_paper_trains(models, tmp_path, more):
    (row,) = train(tmp_path, flags(models, "flux", *more.split(), "--iterations", "1"))
    assert row["grad_norm"] > 0 and row["skipped"] == 0
    assert (tmp_path / "transformer" / "config.json").exists()


def test_evaluation_T_sets_the_steps_of_an_evaluation_and_is_T_otherwise(models):
    task, other = task_of(models), task_of(models, evaluation_T=9)
    assert torch.equal(task.evaluation_times, task.times) and len(other.times) == 5
    torch.testing.assert_close(other.evaluation_times, task_of(models, T=9).times, rtol=0, atol=0)
    assert task.evaluate(None, 0)["reward"] != other.evaluate(None, 0)["reward"]


def test_accumulation_and_checkpointing_may_change_on_resume_and_change_no_result(models, tmp_path):
    uninterrupted = train(tmp_path / "uninterrupted", [*flags(models, "flux"), "--iterations", "2"])
    train(tmp_path / "resumed", [*flags(models, "flux"), "--iterations", "1"])
    more = "--iterations 2 --resume --gradient-accumulation-steps 2 --gradient-checkpointing off".split()
    resumed = train(tmp_path / "resumed", [*flags(models, "flux"), *more])
    for a, b in zip(resumed, uninterrupted, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6)


def test_a_resumed_run_equals_an_uninterrupted_one(models, tmp_path):
    lora = flags(models, "flux", "--lora-rank", "2")
    uninterrupted = train(tmp_path / "uninterrupted", lora)
    train(tmp_path / "resumed", [*lora, "--iterations", "2"])
    assert train(tmp_path / "resumed", [*lora, "--resume"]) == uninterrupted
    file = "lora/pytorch_lora_weights.safetensors"
    assert_close(load_file(tmp_path / "resumed" / file), load_file(tmp_path / "uninterrupted" / file), 0, 0)


def test_a_run_logs_saturated_pixels_and_active_hinges_and_writes_its_images(models, tmp_path):
    table = train(tmp_path, flags(models, "flux", "--lam", "0.0", "--iterations", "2"))
    assert all(0 <= row["saturated"] <= 1 and row["hinge_active"] in (0, 0.25, 0.5, 0.75, 1) for row in table)
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == ["000000.png", "000002.png"]
    after = json.loads((tmp_path / "result.json").read_text())["after"]
    assert after.keys() == {"reward", "diversity", "saturated"}


def test_the_papers_settings_are_the_defaults():
    flux = trainer.parse(["--task", "flux"])
    config, hyper, options = flux.run, flux.method, flux.task
    assert (config.lr, config.weight_decay, config.batch_size, config.iterations) == (1e-5, 1e-4, 64, 300)
    assert (config.ema_decay, config.T, hyper.alpha, hyper.lam, hyper.tau) == (0.995, 25, 0.3, 0.55, 0.1)
    assert (options.height, options.width, options.guidance, options.reward) == (720, 720, 3.5, "hpsv2.1")
    assert trainer.parse(["--task", "sd3"]).task.model == "stabilityai/stable-diffusion-3.5-medium"


@pytest.mark.parametrize("reward", ["hpsv2.1", "pickscore", "hpsv3", "imagereward", "hpsv3:1,hpsv2.1:2"])
def test_each_reward_brings_the_papers_settings(reward):
    parsed = trainer.parse(["--task", "flux", "--reward", reward])
    # Without a value of the paper there is no hinge: a lambda on another scale could silence every sample.
    paper = {"hpsv2.1": (0.3, 0.55, 1e-5), "pickscore": (0.1, 0.4, 1e-5), "hpsv3": (0.1, 13.5, 8e-6)}
    assert (parsed.method.alpha, parsed.method.lam, parsed.run.lr) == paper.get(reward, (0.3, None, 1e-5))


# Exports


@every_task
@pytest.mark.parametrize("more", [[], ["--lora-rank", "2", "--lora-alpha", "6"]], ids=["full", "lora"])
def test_diffusers_draws_from_the_export_what_the_trained_model_draws(models, tmp_path, name, more):
    train(tmp_path, flags(models, name, "--iterations", "2", "--lr", "0.02", *more))
    task = task_of(models, name, **({"lora_rank": 2, "lora_alpha": 6.0} if more else {}))
    x_T = task.noise(1, seeded())
    untrained = rollout(task.velocity(PROMPTS[:1]), x_T, task.times)[0]
    task.load(tmp_path)
    trained = rollout(task.velocity(PROMPTS[:1]), x_T, task.times)[0]
    if more:
        pipeline = pipeline_of(models, name)
        pipeline.load_lora_weights(tmp_path / "lora")
    else:
        kind = TASKS[name].family.transformer_class
        pipeline = pipeline_of(models, name, transformer=kind.from_pretrained(tmp_path / "transformer"))
    drawn = draw(pipeline, x_T, PROMPTS[:1], 4)
    torch.testing.assert_close(drawn, final_latents(task, trained), rtol=0, atol=1e-4)
    assert (trained - untrained).abs().max() > 1e-2


@every_task
@pytest.mark.parametrize("limit", [10**9, 10**5], ids=["one file", "many files"])
def test_the_export_has_the_files_of_diffusers_own(models, tmp_path, monkeypatch, name, limit):
    monkeypatch.setattr(transformer, "EXPORT_FILE_BYTES", limit)
    task_of(models, name, precision="bfloat16").save(tmp_path)
    plain = pipeline_of(models, name, dtype=torch.bfloat16).transformer
    plain.save_pretrained(tmp_path / "expected", max_shard_size=limit)
    expected, found = (
        {path.name: path.read_bytes() for path in (tmp_path / folder).iterdir() if path.name != "config.json"}
        for folder in ("expected", "transformer")
    )
    if (index := f"{WEIGHTS}.index.json") in expected:
        assert json.loads(expected.pop(index)) == json.loads(found.pop(index))
    assert found == expected and (len(found) > 1) == (limit == 10**5)
    task = task_of(models, name, precision="bfloat16")
    with torch.no_grad():
        [p.zero_() for p in task.model.parameters()]
    task.load(tmp_path)
    loaded = {name: full_value(value).bfloat16() for name, value in task.model.state_dict().items()}
    assert_close(loaded, plain.state_dict(), 0, 0)


def test_an_export_onto_a_full_disk_continues_with_resume(models, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    arguments = flags(models, "flux", "--iterations", "1")
    with monkeypatch.context() as patch:
        patch.setattr(transformer, "save_file", fail)
        line = refusal([*arguments, "--out", tmp_path])
    assert f"{WEIGHTS} (No space left on device): free some space, then continue with --resume" in line
    assert not list(tmp_path.glob("transformer*"))
    train(tmp_path, [*arguments, "--resume"])
    assert (tmp_path / "transformer" / WEIGHTS).exists()


# Flags


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ("--guidance nan", "guidance=nan must be at least 0, and finite"),
        ("--guidance inf", "guidance=inf must be at least 0, and finite"),
        ("--guidance -1", "guidance=-1.0 must be at least 0, and finite"),
        ("--lora-alpha 2", "lora_alpha=2.0 scales adapters, but there are none: give --lora-rank, too"),
        ("--lora-rank 2 --lora-alpha 0", "lora_alpha=0.0 must be positive and finite"),
        ("--lora-rank 2 --lora-alpha nan", "lora_alpha=nan must be positive and finite"),
        ("--lora-rank 2 --lora-alpha inf", "lora_alpha=inf must be positive and finite"),
        ("--lora-rank -1", "lora_rank=-1 must be at least 0"),
        ("--lora-rank 33", "lora_rank=33 must be at most 32, the width of the narrowest target layer"),
        ("--lora-rank 2 --lora-targets to_q nothing", "no linear layer of FluxTransformer2DModel is called 'nothing'"),
        ("--lora-rank 2 --lora-targets", "lora_targets is empty"),
    ],
)
def test_a_flag_that_cannot_work_is_named(models, tmp_path, arguments, expected):
    assert expected in refusal([*flags(models, "flux"), "--out", tmp_path / "run", *arguments.split()])
    sampling = ["sample", "--model", models / "flux", "--prompts", models / "prompts.txt", "--out", tmp_path / "i"]
    if "guidance" in arguments:
        assert expected in refusal([*sampling, *arguments.split()], tools.main)
        assert not (tmp_path / "i").exists()


def test_the_settings_of_klein_are_those_of_flux_with_its_own_guidance():
    klein, flux = trainer.parse(["--task", "klein"]), trainer.parse(["--task", "flux"])
    assert (klein.task.model, klein.task.guidance) == ("black-forest-labs/FLUX.2-klein-base-4B", 4.0)
    assert (klein.task.height, klein.task.width) == (720, 720) and klein.method == flux.method
    assert (klein.run.lr, klein.run.iterations, klein.run.T) == (flux.run.lr, flux.run.iterations, flux.run.T)


def test_the_settings_of_sd3_are_those_of_supplement_a2():
    sd3 = trainer.parse(["--task", "sd3"])
    flux = trainer.parse(["--task", "flux"])
    assert (sd3.task.height, sd3.task.width, sd3.run.iterations) == (512, 512, 200)
    assert sd3.method == flux.method
    assert (sd3.run.lr, sd3.run.batch_size, sd3.run.T) == (flux.run.lr, flux.run.batch_size, flux.run.T)
    hpsv3 = trainer.parse(["--task", "sd3", "--reward", "hpsv3"])
    assert (hpsv3.method.lam, hpsv3.run.lr, hpsv3.run.iterations) == (13.5, 8e-6, 200)


def test_a_lora_run_prints_no_warning_about_other_models(models, tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr("diffusers.models.modeling_utils.logger.warning", warnings.append)
    train(tmp_path / "run", flags(models, "flux", "--iterations", "1", "--lora-rank", "2"))
    assert warnings == []


# Sheets


def test_a_sheet_shows_every_image_unchanged_and_its_prompt_below():
    images = torch.randint(256, (6, 3, 32, 48), dtype=torch.uint8, generator=seeded())
    sheets = [draw_sheet(images, ["a red cube", text, "a"], columns=2) for text in ("", "two dogs", "x " * 500)]
    pixels = [torch.from_numpy(np.array(sheet)).permute(2, 0, 1) for sheet in sheets]
    height, width = pixels[0].shape[1] // 2, pixels[0].shape[2] // 2
    for i in range(6):
        row, column, place = i // 4, i // 2 % 2, i % 2
        top, left = row * height + 4, column * width + 4 + place * 52
        assert all(torch.equal(sheet[:, top : top + 32, left : left + 48], images[i]) for sheet in pixels)
    captions = [sheet[:, 40:height, width:] for sheet in pixels]
    assert (captions[0] == 255).all() and (captions[1] < 128).any() and (captions[2] < 128).any()
    others = [sheet[:, 40:height, :width] for sheet in pixels]
    assert torch.equal(others[0], others[2]) and (others[0] < 128).any()  # a long prompt stays in its own cell


def test_a_runs_sheets_carry_its_prompts(models, tmp_path, monkeypatch):
    seen = []

    def recorded(images, prompts):
        seen.append(prompts)
        return draw_sheet(images, prompts)

    monkeypatch.setattr("flux_adapter.draw_sheet", recorded)
    more = ["--iterations", "1", "--evaluation-images", "4"]
    train(tmp_path / "run", [*flags(models, "flux"), *more])
    assert seen == [PROMPTS[:2]] * 2
