"""FLUX.1-dev and SD3.5-M on tiny random pipelines made of the real classes, and the tools around a run."""

# ruff: noqa: E402 (what may be missing is asked for before it is imported)

import csv
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

for library in ("diffusers", "transformers", "peft", "open_clip", "torchvision"):
    pytest.importorskip(library)

import diffusers
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file

import flux_adapter as adapter
import train_leap_align as trainer
from leap_align import METHODS, BadInput, BatchGenerator, Hyper, rollout

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = ["a red cube", "two dogs on a beach", "an old clock in the rain", "a photo of a bench", "a"]
CLASSES = {"flux": adapter.Flux, "sd3": adapter.SD3}
both = pytest.mark.parametrize("name", CLASSES)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Tiny pipelines by task, as `flux_adapter.py tiny` writes them, and a file of prompts."""
    folder = tmp_path_factory.mktemp("tiny")
    tool("tiny", folder / "flux")
    tool("tiny", folder / "sd3", "--sd3")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n\n")
    return folder


@pytest.fixture(autouse=True)
def _alone():
    """No process group outlives its test."""
    torch.set_num_threads(1)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


SIZE = "--height 32 --width 48 --steps 2 --images-per-prompt 3 --batch-size 2 --precision float32".split()


def options_of(models, name, **changes):
    settings = {"model": str(models / name), "prompts": models / "prompts.txt", "height": 64, "width": 96}
    settings |= {"reward_weights": (str(models / name / "reward"),), "precision": "float32", "evaluation_images": 2}
    return CLASSES[name].Options(**settings | changes)


def task_of(models, name="flux", T=4, **changes):
    """A task in place, in float32."""
    if dist.is_initialized():
        dist.destroy_process_group()
    task = CLASSES[name](options_of(models, name, **changes), T)
    task.place(None)
    return task


def pipeline_of(models, name, **parts):
    pipeline = getattr(diffusers, CLASSES[name].pipeline_name).from_pretrained(models / name, **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def drawn(pipeline, x_T, prompts, T, output_type="latent"):
    """What diffusers' own pipeline makes of the noise."""
    arguments = {"height": 64, "width": 96, "num_inference_steps": T, "guidance_scale": 3.5}
    return pipeline(prompts, latents=x_T, output_type=output_type, **arguments).images


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def flags(models, name, *more):
    files = [
        "--model",
        models / name,
        "--prompts",
        models / "prompts.txt",
        "--reward-weights",
        models / name / "reward",
    ]
    sizes = "--height 32 --width 48 --precision float32 --T 5 --batch-size 4 --evaluation-images 2".split()
    steps = "--iterations 3 --lr 1e-3 --ema 0".split()
    return ["--task", name, *map(str, files), *sizes, *steps, *map(str, more)]


def run(out, arguments):
    trainer.main([*arguments, "--out", str(out)])
    return rows(out)


def tool(*arguments):
    adapter.main(list(map(str, arguments)))


def rows(out):
    with (out / "metrics.csv").open(newline="") as file:
        return [{k: float(v) for k, v in row.items() if v and k != "seconds"} for row in csv.DictReader(file)]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def torchrun(*arguments, nodes=1, environment=None):
    """A program on two processes, on one node or on two."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={2 // nodes}", f"--nnodes={nodes}"]
    command += ["--master_addr=127.0.0.1", f"--master_port={free_port()}"]
    processes = [
        subprocess.Popen(
            [*command, f"--node_rank={node}", *map(str, arguments)],
            cwd=ROOT,
            env={**os.environ, **(environment or {})},
            stderr=subprocess.PIPE,
            text=True,
        )
        for node in range(nodes)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors[-3000:]


def assert_close(a, b, rtol=1e-4, atol=1e-6):
    assert a.keys() == b.keys() and a
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=rtol, atol=atol)


# The forward pass


@pytest.mark.parametrize("T", [4, 25])
@pytest.mark.parametrize("name, tolerance", [("flux", 0.0), ("sd3", 1e-5)])
def test_rollout_is_the_pipelines(models, name, tolerance, T):
    task = task_of(models, name, T)
    x_T = task.noise(2, seeded())
    states = rollout(task.velocity(PROMPTS[:2]), x_T, task.times)
    pipeline = pipeline_of(models, name)
    assert (drawn(pipeline, x_T, PROMPTS[:2], T) - states[0]).abs().max() <= tolerance
    with torch.no_grad():
        images = task.decode(states[0])
    # The VAE's convolutions round by where their input lies in memory, on some processors.
    assert (drawn(pipeline, x_T, PROMPTS[:2], T, "pt") - images).abs().max() <= 1e-5
    assert images.shape == (2, 3, 64, 96)
    assert (0 < images.min() and images.max() < 1) or task.measured["saturated"] > 0


def test_grid_at_720_pixels_is_the_dynamic_shift(models):
    times = task_of(models, height=720, width=720, T=25).times
    u, s = torch.linspace(0, 1, 26), 2.2243  # exp(mu) of 2025 tokens
    torch.testing.assert_close(times, s * u / (1 + (s - 1) * u), rtol=0, atol=2e-5)
    assert task_of(models, shift=3.0).times[2] == pytest.approx(0.75)


def test_grid_of_sd3_is_the_schedulers_and_no_shift_of_an_even_one(models):
    times = task_of(models, "sd3", T=25).times
    u = torch.linspace(0, 1, 26)
    assert times[0] == 0 and times[-1] == 1 and (times - 3 * u / (1 + 2 * u)).abs().max() > 0.05


@both
def test_weights_read_through_the_meta_device_are_those_on_disk(models, name):
    task = task_of(models, name)
    own = {k: getattr(v, "full_tensor", lambda v=v: v)() for k, v in task.model.state_dict().items()}
    assert_close(own, load_file(models / name / "transformer" / "diffusion_pytorch_model.safetensors"), 0, 0)
    assert {k for k, _ in task.model.named_buffers()} <= own.keys()  # nothing that no file could fill


def test_half_precision_computes_in_bfloat16_and_keeps_the_rest_in_float32(models):
    task = task_of(models, "flux", precision="bfloat16")
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
    task.renew()  # until then the cast weights lie in front of those that are trained
    assert {p.dtype for p in task.model.parameters()} == {torch.float32}
    assert task.pipeline.vae.dtype == torch.bfloat16
    assert {p.dtype for p in task.reward_model.parameters()} == {torch.float32}


@both
def test_a_new_velocity_sees_weights_that_were_changed_after_a_forward(models, name):
    task = task_of(models, name)
    x = task.noise(1, seeded())
    with torch.no_grad():
        parameters = list(task.model.parameters())
        before = task.velocity(PROMPTS[:1])(x, task.times[2])
        for p in parameters:
            p.add_(0.01)
        after = task.velocity(PROMPTS[:1])(x, task.times[2])
        again = task_of(models, name)
        for p in again.model.parameters():
            p.add_(0.01)
        expected = again.velocity(PROMPTS[:1])(x, again.times[2])
    assert torch.equal(after, expected) and not torch.equal(after, before)


def test_sd3_sees_times_that_no_precision_has_rounded(models):
    task = task_of(models, "sd3", precision="bfloat16")
    seen = []
    task.model.time_text_embed.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    task.velocity(PROMPTS[:1])(task.noise(1, seeded()), task.times[1])
    assert seen[0].dtype == torch.float32 and torch.equal(seen[0], 1000 * task.times[1].expand(2))


# The gradient


@both
def test_gradient_through_adapter_vae_and_reward_is_that_of_finite_differences(models, name):
    task = task_of(models, name, T=2, precision="float64", height=32, width=32)
    task.reward_model.double()
    task.times = task.times.double()
    x_T = task.noise(2, seeded()).double()
    parameters = [p for p in task.model.parameters() if p.requires_grad]
    directions = [torch.randn(p.shape, generator=seeded(i)) * p.to_local().std() for i, p in enumerate(parameters)]

    def total():
        (x_0, _) = next(METHODS["full_backprop"](task.velocity(PROMPTS[:2]), x_T, task.times, Hyper(), seeded()))
        return task.reward(task.decode(x_0), PROMPTS[:2]).sum()

    total().backward()
    slope = sum((p.grad.full_tensor().double() * d).sum().item() for p, d in zip(parameters, directions))

    @torch.no_grad()
    def moved(h):
        for p, d in zip(parameters, directions):
            p.to_local().add_(d, alpha=h)
        value = total().item()
        for p, d in zip(parameters, directions):
            p.to_local().sub_(d, alpha=h)
        return value

    numeric = (moved(1e-4) - moved(-1e-4)) / 2e-4  # a small step, for a pixel that begins to saturate is a kink
    assert abs(slope) > 1e-4 and slope == pytest.approx(numeric, rel=2e-3)


def gradients(task, method="leap_align", prompts=PROMPTS[:2]):
    """The gradient of one step, by parameter."""
    generator = BatchGenerator()
    generator.manual_seed(1)
    generator.size, generator.rows = len(prompts), slice(None)
    x_T = task.noise(len(prompts), seeded())
    for x_0, weight in METHODS[method](task.velocity(prompts), x_T, task.times, Hyper(m=2), generator):
        (task.reward(task.decode(x_0), prompts) * weight).sum().backward()
    named = {k: p for k, p in task.model.named_parameters() if p.requires_grad}
    return {k: getattr(p.grad, "full_tensor", lambda p=p: p.grad)() for k, p in named.items() if p.grad is not None}


@both
def test_checkpointing_does_not_change_the_gradient(models, name):
    on, off = (gradients(task_of(models, name, gradient_checkpointing=flag)) for flag in (True, False))
    assert_close(on, off, 1e-5, 1e-9)


@both
@pytest.mark.parametrize("method", METHODS)
def test_no_parameter_is_left_without_a_gradient(models, name, method):
    task = task_of(models, name)
    found = gradients(task, method)
    assert found.keys() == {k for k, _ in task.model.named_parameters()}
    assert all(g.isfinite().all() for g in found.values())
    zero = {k for k, g in found.items() if not g.any()}
    # SD3's text asks nothing in its last block, where it ends; the reward cannot depend on that.
    assert not {k for k in zero if not re.search(r"transformer_blocks.1.attn.(add_q_proj|norm_added_q)", k)}


def test_the_sharded_gradient_is_the_plain_models(models):
    task = task_of(models)
    own = gradients(task)
    plain = pipeline_of(models, "flux").transformer
    task.model = plain
    assert_close(own, gradients(task), 1e-5, 1e-9)


def test_lora_trains_the_adapters_alone(models):
    task = task_of(models, lora_rank=2)
    found = gradients(task)
    assert found and all(".lora_" in k for k in found)
    assert all(g.any() == (".lora_B." in k) for k, g in found.items())  # B starts at zero, and hides A
    frozen = [p for p in task.model.parameters() if not p.requires_grad]
    assert frozen and all(p.grad is None for p in frozen)


def test_lora_keeps_the_base_in_half_precision_and_the_adapters_in_single(models):
    task = task_of(models, lora_rank=2, precision="bfloat16")
    kinds = {(".lora_" in k, p.dtype) for k, p in task.model.named_parameters()}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}
    assert all(g.dtype == torch.float32 for g in gradients(task).values())


def test_a_saturated_pixel_has_no_gradient_and_is_counted(models):
    task = task_of(models)
    x_0 = (50 * task.noise(2, seeded())).requires_grad_()
    image = task.decode(x_0)
    assert task.measured["saturated"] == pytest.approx(((image == 0) | (image == 1)).float().mean().item(), abs=1e-3)
    assert task.measured["saturated"] > 0.01


# Prompts


@both
def test_stored_embeddings_are_those_computed_on_the_fly(models, name, tmp_path):
    where = ["--model", models / name, "--prompts", models / "prompts.txt"]
    tool("embed", *where, "--out", tmp_path, "--precision", "float32")
    stored, live = task_of(models, name, prompts=tmp_path), task_of(models, name)
    assert not adapter.text_encoders(stored.pipeline) and stored.prompts == live.prompts == PROMPTS
    assert_close(stored.encode(PROMPTS[:3]), live.encode(PROMPTS[:3]), 0, 1e-5)
    x_T = live.noise(2, seeded())
    a, b = (task.velocity(PROMPTS[:2])(x_T, task.times[2]) for task in (stored, live))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_embedding_goes_on_where_it_stopped(models, tmp_path):
    command = ["embed", "--model", models / "flux", "--prompts", models / "prompts.txt", "--out", tmp_path]
    tool(*command)
    kept, gone = sorted(tmp_path.glob("*.safetensors"))[:2]
    stamp, content = kept.stat().st_mtime_ns, gone.read_bytes()
    gone.unlink()
    (tmp_path / "prompts.txt").unlink()
    tool(*command)
    assert kept.stat().st_mtime_ns == stamp and gone.read_bytes() == content
    assert (tmp_path / "prompts.txt").read_text().splitlines() == PROMPTS


def test_embeddings_of_another_model_or_too_few_are_refused(models, tmp_path):
    tool("embed", "--model", models / "sd3", "--prompts", models / "prompts.txt", "--out", tmp_path / "e")
    arguments = [*flags(models, "flux"), "--prompts", tmp_path / "e", "--out", tmp_path / "run"]
    assert "holds embeddings of" in refused(arguments)
    next((tmp_path / "e").glob("*.safetensors")).unlink()
    arguments = [*flags(models, "sd3"), "--prompts", tmp_path / "e", "--out", tmp_path / "run"]
    assert "lacks 1 embeddings" in refused(arguments)


def test_flux_reads_512_tokens_padding_included(models):
    assert task_of(models).encode(["a"])["encoder_hidden_states"].shape == (1, 512, 32)


def test_prompts_are_drawn_from_the_whole_list(models):
    task = task_of(models)
    assert set(task.conditions(200, seeded())) == set(PROMPTS)
    assert task.conditions(5, seeded()) == task.conditions(5, seeded()) != task.conditions(5, seeded(1))


# Runs


def assert_same_run(one, two):
    """The same log and, but for rounding, the same exported weights."""
    for a, b in zip(rows(one), rows(two), strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6)
    (file,) = [*one.glob("transformer/*.safetensors"), *one.glob("lora/*.safetensors")]
    a, b = load_file(file), load_file(two / file.relative_to(one))
    # Adam's first steps are lr * sign(gradient): where that is rounding alone, the processes may part by 2 lr a step.
    apart = torch.cat([(a[k] - b[k]).abs().flatten() for k in a])
    assert a.keys() == b.keys() and (apart > 1e-5).float().mean() < 0.01


@pytest.mark.parametrize(
    "name, more, nodes",
    [
        pytest.param("flux", ["--lora-rank", "2", "--accumulate", "2"], 2, id="lora on two nodes, accumulated"),
        pytest.param("sd3", [], 1, id="sd3", marks=pytest.mark.slow),
    ],
)
def test_two_processes_equal_one(models, tmp_path, name, more, nodes):
    run(tmp_path / "one", flags(models, name, *more))
    torchrun("train_leap_align.py", *flags(models, name, *more), "--out", tmp_path / "two", nodes=nodes)
    assert_same_run(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_what_one_process_alone_refuses_is_said_once(models, tmp_path):
    """Only the second process lacks memory: the line comes from it, and nobody waits for ever."""
    script = tmp_path / "short.py"
    script.write_text(
        "import os\nimport flux_adapter, train_leap_align\n"
        "def check(*_):\n    if os.environ['RANK'] == '1':\n"
        "        raise flux_adapter.BadInput('this GPU is too small')\n"
        "flux_adapter.Adapter.check_memory = check\ntrain_leap_align.main()\n"
    )
    with pytest.raises(AssertionError) as failed:
        torchrun(script, *flags(models, "flux"), "--out", tmp_path / "run", environment={"PYTHONPATH": str(ROOT)})
    assert str(failed.value).count("this GPU is too small") == 1 and "BadInput" not in str(failed.value)


def test_the_whole_path_on_two_processes_and_on_one(tmp_path):
    """tiny -> embed -> train -> export -> sample -> score."""
    model, prompts, reward = tmp_path / "model", tmp_path / "prompts.txt", tmp_path / "model" / "reward"
    prompts.write_text("\n".join(PROMPTS))
    tool("tiny", model)
    tool("embed", "--model", model, "--prompts", prompts, "--out", tmp_path / "embeddings", "--precision", "float32")
    train = ["--task", "flux", "--model", model, "--prompts", tmp_path / "embeddings", "--reward-weights", reward]
    train += "--height 32 --width 32 --T 4 --batch-size 4 --lr 1e-3 --ema 0 --iterations 3".split()
    train += "--evaluation-images 2 --precision float32".split()
    run(tmp_path / "one", list(map(str, train)))
    torchrun("train_leap_align.py", *train, "--out", tmp_path / "two")
    assert_same_run(tmp_path / "one", tmp_path / "two")

    draw = ["--model", model, "--transformer", tmp_path / "two" / "transformer", "--prompts", prompts, *SIZE]
    images = ["--images", tmp_path / "two" / "images", "--reward-weights", reward, "--out", tmp_path / "two"]
    # One program for both, which spares the imports of a second one.
    (tmp_path / "tools.py").write_text(
        "import sys, torch.distributed as dist, tyro, flux_adapter as adapter\n"
        "dist.init_process_group('gloo')\n"
        "at = sys.argv.index('score')\n"
        "for arguments in sys.argv[1:at], sys.argv[at:]:\n"
        "    tyro.extras.subcommand_cli_from_dict(adapter.TOOLS, args=arguments)\n"
        "adapter.leave(None)\n"
    )
    both = ["sample", *draw, "--out", tmp_path / "two" / "images", "score", *images]
    torchrun(tmp_path / "tools.py", *both, environment={"PYTHONPATH": str(ROOT)})
    tool("sample", *draw, "--out", tmp_path / "one" / "images")
    tool("score", "--images", tmp_path / "one" / "images", "--reward-weights", reward, "--out", tmp_path / "one")
    drawn = {p.name: p.read_bytes() for p in (tmp_path / "one" / "images").glob("*.png")}
    assert drawn == {p.name: p.read_bytes() for p in (tmp_path / "two" / "images").glob("*.png")}
    assert len(drawn) == len(set(drawn.values())) == 3 * len(PROMPTS)
    one, two = (json.loads((tmp_path / n / "images_rewards_log.json").read_text()) for n in ("one", "two"))
    assert one == two and [row["image"] for row in one["images"]] == sorted(drawn)
    assert one["mean"] == pytest.approx(sum(row["reward"] for row in one["images"]) / len(drawn))


def test_the_export_is_the_average_of_the_weights(models, tmp_path, monkeypatch):
    seen, descend = [], trainer.Run.descend

    def whole(run):
        return {name: p.full_tensor().clone() for name, p in run.task.model.named_parameters()}

    def watched(self, loss):
        seen.append(whole(self))
        norm = descend(self, loss)
        seen.append(whole(self))
        return norm

    monkeypatch.setattr(trainer.Run, "descend", watched)
    run(tmp_path, flags(models, "flux", "--iterations", "2", "--ema", "0.5"))
    start, one, _, two = seen
    expected = {name: 0.5 * (0.5 * start[name] + 0.5 * one[name]) + 0.5 * two[name] for name in start}
    assert_close(load_file(tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"), expected, 0, 1e-6)
    assert max((two[name] - expected[name]).abs().max() for name in start) > 1e-4


def test_a_run_goes_on_by_other_means(models, tmp_path):
    """More parts and no recomputation: what is computed stays the same, and a run may go on with it."""
    whole = run(tmp_path / "whole", [*flags(models, "flux"), "--iterations", "2"])
    run(tmp_path / "parts", [*flags(models, "flux"), "--iterations", "1"])
    more = ["--iterations", "2", "--resume", "--accumulate", "2", "--no-gradient-checkpointing"]
    for a, b in zip(run(tmp_path / "parts", [*flags(models, "flux"), *more]), whole, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6)


def test_a_resumed_run_equals_an_uninterrupted_one(models, tmp_path):
    whole = run(tmp_path / "whole", flags(models, "flux", "--lora-rank", "2"))
    run(tmp_path / "parts", [*flags(models, "flux", "--lora-rank", "2"), "--iterations", "2"])
    assert run(tmp_path / "parts", [*flags(models, "flux", "--lora-rank", "2"), "--resume"]) == whole
    a, b = (load_file(tmp_path / n / "lora" / "pytorch_lora_weights.safetensors") for n in ("whole", "parts"))
    assert_close(a, b, 0, 0)


def test_a_run_logs_saturated_pixels_and_active_hinges_and_draws_its_images(models, tmp_path):
    table = run(tmp_path, flags(models, "flux", "--lam", "0.0", "--iterations", "2"))
    assert all(0 <= row["saturated"] <= 1 and row["hinge_active"] in (0, 0.25, 0.5, 0.75, 1) for row in table)
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == ["000000.png", "000002.png"]
    after = json.loads((tmp_path / "result.json").read_text())["after"]
    assert after.keys() == {"reward", "diversity", "saturated"}


def test_the_papers_settings_are_the_defaults(models):
    config, hyper, options, _ = trainer.parse(["--task", "flux"])
    assert (config.lr, config.weight_decay, config.batch_size, config.iterations) == (1e-5, 1e-4, 64, 300)
    assert (config.ema, config.T, hyper.alpha, hyper.lam, hyper.tau) == (0.995, 25, 0.3, 0.55, 0.1)
    assert (options.height, options.width, options.guidance, options.reward) == (720, 720, 3.5, "hpsv2.1")
    assert trainer.parse(["--task", "sd3"])[2].model == "stabilityai/stable-diffusion-3.5-medium"


@pytest.mark.parametrize(
    "reward, folders",
    [
        ("hpsv2.1", ["reward"]),
        ("pickscore", ["pickscore"]),
        ("hpsv3", ["hpsv3"]),
        ("imagereward", ["imagereward"]),
        ("hpsv2.1:1,imagereward:0.5", ["reward", "imagereward"]),
        ("tests.test_flux:brightness", []),
    ],
)
def test_every_reward_trains_and_scores(models, tmp_path, reward, folders):
    places = [str(models / "flux" / folder) for folder in folders]
    about = ["--reward", reward, *(["--reward-weights", *places] if places else [])]
    where = ["--model", str(models / "flux"), "--prompts", str(models / "prompts.txt")]
    sizes = "--height 32 --width 48 --T 3 --batch-size 2 --evaluation-images 2 --iterations 1 --lam None".split()
    (row,) = run(tmp_path / "run", ["--task", "flux", *where, *sizes, "--precision", "float32", *about])
    assert row["grad_norm"] > 0
    more = ["--transformer", str(tmp_path / "run" / "transformer"), *SIZE, "--images-per-prompt", "1"]
    tool("sample", *where, *more, "--out", tmp_path / "images")
    tool("score", "--images", tmp_path / "images", *about, "--out", tmp_path)
    log = json.loads((tmp_path / "images_rewards_log.json").read_text())
    assert log["reward"] == reward and len({row["reward"] for row in log["images"]}) == len(PROMPTS)


def brightness():
    """A reward of one's own, which a run takes by its name."""
    return lambda images, prompts: images.mean((1, 2, 3))


@pytest.mark.parametrize("reward", ["hpsv2.1", "pickscore", "hpsv3", "imagereward", "hpsv3:1,hpsv2.1:2"])
def test_each_reward_brings_the_papers_settings(reward):
    config, hyper, _, _ = trainer.parse(["--task", "flux", "--reward", reward])
    # Where the paper gives none: no hinge, for a lambda on another scale might silence every sample.
    paper = {"hpsv2.1": (0.3, 0.55, 1e-5), "pickscore": (0.1, 0.4, 1e-5), "hpsv3": (0.1, 13.5, 8e-6)}
    assert (hyper.alpha, hyper.lam, config.lr) == paper.get(reward, (0.3, None, 1e-5))


# Exports


@both
@pytest.mark.parametrize("more", [[], ["--lora-rank", "2", "--lora-alpha", "6"]], ids=["full", "lora"])
def test_the_export_samples_in_diffusers_what_the_trained_model_samples(models, tmp_path, name, more):
    run(tmp_path, flags(models, name, "--iterations", "2", "--lr", "0.02", *more))
    task = task_of(models, name, **({"lora_rank": 2, "lora_alpha": 6.0} if more else {}))
    x_T = task.noise(1, seeded())
    untrained = rollout(task.velocity(PROMPTS[:1]), x_T, task.times)[0]
    task.load(tmp_path)
    trained = rollout(task.velocity(PROMPTS[:1]), x_T, task.times)[0]
    if more:
        pipeline = pipeline_of(models, name)
        pipeline.load_lora_weights(tmp_path / "lora")
    else:
        kind = getattr(diffusers, CLASSES[name].transformer_name)
        pipeline = pipeline_of(models, name, transformer=kind.from_pretrained(tmp_path / "transformer"))
    torch.testing.assert_close(drawn(pipeline, x_T, PROMPTS[:1], 4), trained, rtol=0, atol=1e-4)
    assert (trained - untrained).abs().max() > 1e-2


# Tools


def test_sampling_goes_on_where_it_stopped(models, tmp_path):
    command = ["sample", "--model", models / "flux", "--prompts", models / "prompts.txt", *SIZE, "--out", tmp_path]
    tool(*command)
    kept, *_, gone = sorted(tmp_path.glob("*.png"))
    stamp, content = kept.stat().st_mtime_ns, gone.read_bytes()
    gone.unlink()
    tool(*command)
    assert kept.stat().st_mtime_ns == stamp and gone.read_bytes() == content
    prompts = json.loads((tmp_path / "prompts.json").read_text())
    assert prompts == {f"{i:05d}_{n}.png": text for i, text in enumerate(PROMPTS) for n in range(3)}


def test_scoring_goes_on_where_it_stopped(models, tmp_path, monkeypatch):
    tool("sample", "--model", models / "flux", "--prompts", models / "prompts.txt", *SIZE, "--out", tmp_path / "i")
    command = ["score", "--images", tmp_path / "i", "--reward-weights", models / "flux" / "reward", "--out"]
    tool(*command, tmp_path / "whole")
    load, calls = adapter.rewards.load, []

    def counting(stop):
        def counted(*args, **kwargs):
            reward = load(*args, **kwargs)

            def score(images, prompts):
                calls.append(prompts)
                if len(calls) == stop:
                    raise KeyboardInterrupt
                return reward(images, prompts)

            return score

        return counted

    monkeypatch.setattr(adapter.rewards, "load", counting(stop=6))
    with pytest.raises(SystemExit, match="goes on from here"):
        tool(*command, tmp_path / "parts")
    part = tmp_path / "parts" / "i_rewards_log.parts" / "0.jsonl"
    part.write_text(part.read_text()[:-9])  # cut off in the middle of a row
    monkeypatch.setattr(adapter.rewards, "load", counting(stop=None))
    tool(*command, tmp_path / "parts")
    assert len(calls) == 6 + 15 - 4
    a, b = ((tmp_path / n / "i_rewards_log.json").read_text() for n in ("whole", "parts"))
    assert a == b and not part.parent.exists()


def test_geneval_samples_lie_where_its_evaluator_looks(models, tmp_path):
    lines = [{"tag": "colors", "include": [{"class": "dog", "count": 1}], "prompt": text} for text in PROMPTS[:2]]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    where = ["--model", models / "sd3", "--geneval", tmp_path / "metadata.jsonl"]
    tool("sample", *where, *SIZE, "--out", tmp_path / "o")
    for i, line in enumerate(lines):
        folder = tmp_path / "o" / f"{i:05d}"
        assert json.loads((folder / "metadata.jsonl").read_text()) == line
        assert sorted(p.name for p in (folder / "samples").iterdir()) == ["0000.png", "0001.png", "0002.png"]


def test_geneval_prompts_keep_the_ratio_and_no_test_prompt(tmp_path):
    tool("geneval-prompts", "--out", tmp_path / "prompts.txt")
    prompts = (tmp_path / "prompts.txt").read_text().splitlines()
    assert len(prompts) == 50_000
    tests = [
        line for line in (ROOT / "tests/fixtures/geneval_test_prompts.txt").read_text().splitlines() if line[0] != "#"
    ]
    assert len(tests) == 553 and not set(prompts) & set(tests)
    color = "(red|orange|yellow|green|blue|purple|pink|brown|black|white)"
    kinds = {
        "position": r"left of|right of|above|below",
        "counting": r"^a photo of (two|three|four) ",
        "attribute": f"an? {color} .* and an? {color} ",
        "two objects": " and ",
        "colors": f"^a photo of an? {color} ",
    }
    counts = dict.fromkeys(kinds, 0)
    for prompt in prompts:
        counts[next(kind for kind, pattern in kinds.items() if re.search(pattern, prompt))] += 1
    assert counts == {"position": 20588, "counting": 14706, "attribute": 8824, "colors": 2941, "two objects": 2941}
    # Every test prompt but a single object's is in the templates: ours are GenEval's own, word for word.
    templates = {text for texts in adapter.geneval_templates().values() for text in texts}
    assert len(set(tests) - templates) == 80


# Bad input: one line each, before anything is trained


def refused(arguments, program=trainer.main):
    with pytest.raises(SystemExit) as stop:
        program([str(a) for a in arguments])
    line = str(stop.value)
    assert line.startswith("error: ") and "\n" not in line
    return line


def response():
    return SimpleNamespace(headers={}, request=None)


@pytest.mark.parametrize(
    "error, told",
    [
        (lambda: GatedRepoError("gated", response=response()), ["accept its licence", "hf auth login"]),
        (lambda: RepositoryNotFoundError("none", response=response()), ["look at its name", "hf auth login"]),
        (lambda: LocalEntryNotFoundError("offline"), ["cannot be reached", "hf download"]),
        (lambda: ConnectionError("refused"), ["cannot be reached", "hf download"]),
    ],
    ids=["gated", "missing", "offline", "unreachable"],
)
def test_a_model_that_the_hub_does_not_give(models, tmp_path, monkeypatch, error, told):
    def snapshot_download(*_, **__):
        raise error()

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    arguments = [*flags(models, "flux"), "--model", "black-forest-labs/FLUX.1-dev", "--out", tmp_path / "run"]
    line = refused(arguments)
    assert "black-forest-labs/FLUX.1-dev" in line and all(words in line for words in told)


def test_a_local_path_asks_no_network(models, monkeypatch):
    tried = []

    def connect(*arguments):
        tried.append(arguments)  # counted, for a library may swallow the error
        raise OSError("no network here")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)
    CLASSES["flux"](options_of(models, "flux"), 4)
    assert not tried
    with pytest.raises(BadInput, match="cannot be reached"):
        CLASSES["flux"](options_of(models, "flux", model="nobody/nothing"), 4)
    assert tried


def broken_reward(models, folder):
    folder.mkdir()
    for file in (models / "flux" / "reward").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = load_file(folder / "open_clip_model.safetensors")
    weights.pop("logit_scale")
    save_file(weights, folder / "open_clip_model.safetensors")
    return folder


def test_flags_that_cannot_be_right(models, tmp_path):
    usual, out = flags(models, "flux"), ["--out", tmp_path / "run"]
    assert "height=500 must be a multiple of 16" in refused([*usual, *out, "--height", "500"])
    (tmp_path / "empty.txt").write_text("\n \n")
    assert "empty.txt holds no prompt" in refused([*usual, *out, "--prompts", tmp_path / "empty.txt"])
    assert "prompts is missing" in refused(["--task", "flux", "--model", models / "flux", *out])
    assert "cannot read prompts" in refused([*usual, *out, "--prompts", tmp_path / "none.txt"])
    assert "no/such/folder" in refused([*usual, *out, "--model", "no/such/folder"])
    assert "StableDiffusion3Pipeline" in refused([*usual, *out, "--model", models / "sd3"])
    line = refused([*usual, *out, "--reward-weights", broken_reward(models, tmp_path / "reward")])
    assert "logit_scale" in line and "missing" in line
    line = refused([*usual, *out, "--prompts", models / "flux"])
    assert "cannot read prompts" in line
    assert "evaluation_images=3 even" in refused([*usual, *out, "--evaluation-images", "3"])
    assert "lora_targets" in refused([*usual, *out, "--lora-rank", "2", "--lora-targets", "nothing"])
    assert "batch_size=3 must be a multiple of" in refused([*usual, *out, "--batch-size", "3", "--accumulate", "2"])
    few = ["--task", "flux", "--model", models / "flux", "--prompts", models / "prompts.txt"]
    assert "unknown reward 'beauty'" in refused([*few, *out, "--reward", "beauty"])


def test_a_world_that_does_not_divide_the_batch(tmp_path):
    with pytest.raises(BadInput, match="batch_size=64 must be a multiple of 12 processes"):
        trainer.check(trainer.Config(batch_size=64), Hyper(), world=12)


def test_too_little_memory_says_what_to_change(models, monkeypatch):
    task = CLASSES["flux"](options_of(models, "flux"), 4)
    task.device = torch.device("cuda")
    trained = sum(p.numel() for p in task.model.parameters())
    whole = sum(p.numel() for module in task.frozen() for p in module.parameters())
    need = 4 * whole + 20 * trained
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (need, need))
    task.check_memory(1, set())
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (need - 1, need))
    with pytest.raises(BadInput, match="--lora-rank 64"):
        task.check_memory(1, set())
    task.check_memory(2, set())


def test_adapters_of_another_model_are_refused(models, tmp_path):
    run(tmp_path / "sd3", flags(models, "sd3", "--iterations", "1", "--lora-rank", "2"))
    where = ["sample", "--model", models / "flux", "--prompts", models / "prompts.txt", *SIZE, "--out", tmp_path / "i"]
    assert "does not fit" in refused([*where, "--lora", tmp_path / "sd3" / "lora"], adapter.main)
    assert "does not exist" in refused([*where, "--lora", tmp_path / "none"], adapter.main)
    assert "does not fit" in refused([*where, "--transformer", models / "sd3" / "transformer"], adapter.main)
    wide = load_file(tmp_path / "sd3" / "lora" / "pytorch_lora_weights.safetensors")
    (tmp_path / "wide").mkdir()
    wide = {k.replace("transformer_blocks.1", "transformer_blocks.0"): w.repeat(1, 2) for k, w in wide.items()}
    save_file(wide, tmp_path / "wide" / "pytorch_lora_weights.safetensors")
    assert "does not fit" in refused([*where, "--lora", tmp_path / "wide"], adapter.main)
    assert not (tmp_path / "i").exists()


def test_a_folder_filled_under_other_settings_is_left_alone(models, tmp_path):
    where = ["sample", "--model", models / "flux", "--prompts", models / "prompts.txt", *SIZE, "--out", tmp_path]
    tool(*where)
    assert "steps was 2, is 3" in refused([*where, "--steps", "3"], adapter.main)
    (tmp_path / "00000_0.png").unlink()
    line = refused(["score", "--images", tmp_path, "--out", tmp_path / "s"], adapter.main)
    assert "lacks 1 of 15 images" in line
    assert "prompts.json" in refused(["score", "--images", models, "--out", tmp_path / "s"], adapter.main)
