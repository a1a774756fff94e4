"""Runs of the image models: processes, resuming, exports, flags, sheets of images."""

import json

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

pytest.importorskip("diffusers")

import train_leap_align as trainer
from full_scale import __main__ as tools
from full_scale import transformer
from full_scale.sheet import draw_sheet
from leap_align import rollout
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


def test_a_run_logs_saturated_pixels_and_active_hinges_and_writes_its_images(models, tmp_path, capsys):
    table = train(tmp_path, flags(models, "flux", "--lam", "0.0", "--iterations", "2"))
    assert f"look at {tmp_path}/curves.png, {tmp_path}/samples/000002.png\nnext: python -m" in capsys.readouterr().out
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
        ("--guidance nan", "guidance=nan must be at least 0 for FLUX.1-dev, and finite"),
        ("--guidance inf", "guidance=inf must be at least 0 for FLUX.1-dev, and finite"),
        ("--guidance -1", "guidance=-1.0 must be at least 0 for FLUX.1-dev, and finite"),
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


@pytest.mark.parametrize(("name", "title"), [("sd3", "SD3.5-M"), ("klein", "FLUX.2-klein")])
def test_a_scale_that_the_pipeline_would_ignore_is_refused(models, tmp_path, name, title):
    """diffusers' pipelines guide from a scale above 1."""
    line = f"guidance=0.5 must be at least 1 for {title}, and finite"
    assert line in refusal([*flags(models, name), "--out", tmp_path / "run", "--guidance", "0.5"])
    sampling = ["sample", "--model", models / name, "--prompts", models / "prompts.txt", "--out", tmp_path / "images"]
    assert line in refusal([*sampling, "--guidance", "0.5"], tools.main)


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

    monkeypatch.setattr("full_scale.task.draw_sheet", recorded)
    more = ["--iterations", "1", "--evaluation-images", "4"]
    train(tmp_path / "run", [*flags(models, "flux"), *more])
    assert seen == [PROMPTS[:2]] * 2
