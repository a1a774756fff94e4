"""Runs of the image models: processes, resuming, exports, settings, sheets of images."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from tests import tiny_pipelines as tiny  # first: skips without the libraries

# isort: split

import train_leap_align as trainer
from full_scale import transformer
from full_scale.sheet import draw_sheet
from leap_align import rollout
from runtime.processes import full_value
from tests.tiny_pipelines import PROMPTS, assert_close, every_task, flags, seeded, task_of, tool, train

pytestmark = pytest.mark.usefixtures("one_process")
WEIGHTS, LORA = "diffusion_pytorch_model.safetensors", "pytorch_lora_weights.safetensors"


def slow(*values, id):
    return pytest.param(*values, id=id, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("name", "more", "nodes"),
    [
        pytest.param("flux", "--lora-rank 2 --gradient-accumulation-steps 2", 2, id="lora on two nodes"),
        slow("sd3", "", 1, id="sd3"),
        pytest.param("klein", "--lora-rank 2", 1, id="klein with lora"),
        slow("klein", "", 1, id="klein"),
        slow("flux", "--method stratified --gradient-accumulation-steps 2", 2, id="stratified on two nodes"),
    ],
)
def test_two_processes_equal_one(models, tmp_path, name, more, nodes):
    arguments = flags(models, name, *more.split())
    train(tmp_path / "one", arguments)
    tiny.torchrun("train_leap_align.py", *arguments, "--out", tmp_path / "two", nodes=nodes)
    tiny.assert_same_run(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize("name, more", [("flux", ["--lora-rank", "2"]), ("sd3", []), ("klein", [])])
def test_a_compiled_run_equals_an_eager_one_on_one_process_and_on_two(models, tmp_path, name, more):
    """In an empty cache, whose files show that the run compiled; the second run may find the code of the first."""
    arguments, cache = flags(models, name, *more), tmp_path / "cache"
    train(tmp_path / "eager", arguments)
    for processes in 2, 1:
        out = tmp_path / f"{processes}"
        program = ["train_leap_align.py", *arguments, "--compile", "--out", out]
        tiny.torchrun(*program, processes=processes, environment={"TORCHINDUCTOR_CACHE_DIR": str(cache)})
        tiny.assert_same_run(tmp_path / "eager", out)
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
    arguments = ["train_leap_align.py", *small, *tiny.files(models), "--out", tmp_path / "run"]
    arguments += ["--reward", "refusing_reward:factory"]
    (process,) = tiny.start_torchrun(*arguments, environment={"PYTHONPATH": str(tmp_path)})
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1 and "BadInput" not in errors
    line = "error: this GPU is too small"
    # Once, and once more in the table that torchrun prints at the end.
    assert [row for row in errors.splitlines() if "too small" in row] == [line, f"  traceback : {line}"]


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


def test_a_run_logs_saturated_pixels_and_active_hinges_and_writes_its_images(models, tmp_path, capsys, monkeypatch):
    prompts_of_sheets = []

    def recorded(images, prompts):
        prompts_of_sheets.append(prompts)
        return draw_sheet(images, prompts)

    monkeypatch.setattr("full_scale.task.draw_sheet", recorded)
    table = train(tmp_path, flags(models, "flux", *"--lam 0.0 --iterations 2 --evaluation-images 4".split()))
    assert f"look at {tmp_path}/curves.png, {tmp_path}/samples/000002.png\nnext: python -m" in capsys.readouterr().out
    assert all(0 <= row["saturated"] <= 1 and row["hinge_active"] in (0, 0.25, 0.5, 0.75, 1) for row in table)
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == ["000000.png", "000002.png"]
    after = tiny.read(tmp_path / "result.json")["after"]
    assert after.keys() == {"reward", "diversity", "saturated"} and after["diversity"] > 0
    assert prompts_of_sheets == [PROMPTS[:2]] * 2


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


def test_a_lora_run_prints_no_warning_about_other_models(models, tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr("diffusers.models.modeling_utils.logger.warning", warnings.append)
    train(tmp_path / "run", flags(models, "flux", "--iterations", "1", "--lora-rank", "2"))
    assert warnings == []


def test_a_resumed_run_equals_an_uninterrupted_one(models, tmp_path):
    lora = flags(models, "flux", "--lora-rank", "2")
    uninterrupted = train(tmp_path / "uninterrupted", lora)
    train(tmp_path / "resumed", [*lora, "--iterations", "2"])
    assert train(tmp_path / "resumed", [*lora, "--resume"]) == uninterrupted
    assert_close(*(load_file(tmp_path / run / "lora" / LORA) for run in ("resumed", "uninterrupted")), 0, 0)


def test_accumulation_and_checkpointing_may_change_on_resume_and_change_no_result(models, tmp_path):
    uninterrupted = train(tmp_path / "uninterrupted", flags(models, "flux", "--iterations", 2))
    train(tmp_path / "resumed", flags(models, "flux", "--iterations", 1))
    more = "--iterations 2 --resume --gradient-accumulation-steps 2 --gradient-checkpointing off".split()
    tiny.assert_same_metrics(train(tmp_path / "resumed", flags(models, "flux", *more)), uninterrupted)


@every_task
def test_a_run_may_move_from_text_to_embeddings_and_to_another_place_on_resume(models, tmp_path, name):
    more = ["--lora-rank", "2", "--evaluation-prompts", models / "prompts.txt"]
    uninterrupted = train(tmp_path / "uninterrupted", flags(models, name, *more))
    train(tmp_path / "run", flags(models, name, *more, "--iterations", "2"))
    tool(*tiny.embedding(models, tmp_path / "embedded", name=name))
    shutil.copytree(models / name, tmp_path / name)
    shutil.copytree(tmp_path / "embedded", tmp_path / "prompts.txt")  # flags() gives this name to the prompts
    moved = [*flags(tmp_path, name, *more), "--evaluation-prompts", tmp_path / "embedded", "--resume"]
    tiny.assert_same_metrics(train(tmp_path / "run", moved), uninterrupted)
    contents = tiny.read(tmp_path / "run" / "config.json")["contents"]
    assert contents.keys() == {"model", "text_encoders", "prompts", "evaluation_prompts", "reward_weights"}


def test_embeddings_fit_their_model_without_text_encoders_beside_other_files_and_in_another_place(models, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(models)
        tool("embed", "--model", "./flux", "--prompts", "prompts.txt", "--out", tmp_path / "e")
    shutil.copytree(models / "flux", tmp_path / "model")
    folder = tmp_path / "model" / "text_encoder"
    os.link(folder / "model.safetensors", folder / "model.fp16.safetensors")
    (folder / "notes.md").write_text("mine")
    shutil.copytree(models / "flux", tmp_path / "bare", ignore=shutil.ignore_patterns("text_encoder*", "tokenizer*"))
    for model in ("model", "bare"):
        files = ["--model", tmp_path / model, "--prompts", tmp_path / "e", "--iterations", 1]
        assert train(tmp_path / f"{model}-run", flags(models, "flux", *files))


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
    assert_close(load_file(tmp_path / "transformer" / WEIGHTS), expected, 0, 1e-6)
    assert max((two[name] - expected[name]).abs().max() for name in start) > 1e-4


@every_task
@pytest.mark.parametrize("lora", [{}, {"lora_rank": 2, "lora_alpha": 6.0}], ids=["full", "lora"])
def test_diffusers_draws_from_the_export_what_the_trained_model_draws(models, tmp_path, name, lora):
    more = [word for key, value in lora.items() for word in (f"--{key.replace('_', '-')}", value)]
    train(tmp_path, flags(models, name, "--iterations", "2", "--lr", "0.02", *more))
    task = task_of(models, name, **lora)
    x_T = task.noise(1, seeded())
    untrained = rollout(task.velocity(PROMPTS[:1]), x_T, task.times)[0]
    task.load(tmp_path)
    trained = rollout(task.velocity(PROMPTS[:1]), x_T, task.times)[0]
    if lora:
        pipeline = tiny.pipeline_of(models, name)
        pipeline.load_lora_weights(tmp_path / "lora")
    else:
        kind = task.family.transformer_class
        pipeline = tiny.pipeline_of(models, name, transformer=kind.from_pretrained(tmp_path / "transformer"))
    drawn = tiny.draw(pipeline, x_T, PROMPTS[:1], 4)
    torch.testing.assert_close(drawn, tiny.final_latents(task, trained), rtol=0, atol=1e-4)
    assert (trained - untrained).abs().max() > 1e-2


@every_task
@pytest.mark.parametrize("limit", [10**9, 10**5], ids=["one file", "many files"])
def test_the_export_has_the_files_of_diffusers_own(models, tmp_path, monkeypatch, name, limit):
    monkeypatch.setattr(transformer, "EXPORT_FILE_BYTES", limit)
    task_of(models, name, precision="bfloat16").save(tmp_path)
    plain = tiny.pipeline_of(models, name, dtype=torch.bfloat16).transformer
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
        line = tiny.refusal([*arguments, "--out", tmp_path])
    assert f"{WEIGHTS} (No space left on device): free some space, then continue with --resume" in line
    assert not list(tmp_path.glob("transformer*"))
    train(tmp_path, [*arguments, "--resume"])
    assert (tmp_path / "transformer" / WEIGHTS).exists()


def settings(*arguments):
    """All flags by name."""
    parsed = trainer.parse(list(arguments))
    return {**vars(parsed.run), **vars(parsed.method), **vars(parsed.task)}


PAPER = {"lr": 1e-5, "weight_decay": 1e-4, "batch_size": 64, "iterations": 300, "ema_decay": 0.995, "T": 25}
PAPER |= {"alpha": 0.3, "lam": 0.55, "tau": 0.1, "height": 720, "width": 720, "guidance": 3.5, "reward": "hpsv2.1"}
SD3 = {"height": 512, "width": 512, "iterations": 200}  # supplement A2


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--task flux", PAPER),
        ("--task sd3", PAPER | SD3 | {"model": "stabilityai/stable-diffusion-3.5-medium"}),
        ("--task sd3 --reward hpsv3", SD3 | {"lam": 13.5, "lr": 8e-6}),
        ("--task klein", PAPER | {"model": "black-forest-labs/FLUX.2-klein-base-4B", "guidance": 4.0}),
        ("--task flux --reward pickscore", {"alpha": 0.1, "lam": 0.4, "lr": 1e-5}),
        ("--task flux --reward hpsv3", {"alpha": 0.1, "lam": 13.5, "lr": 8e-6}),
        # Without a value of the paper there is no hinge: a lambda on another scale could silence every sample.
        ("--task flux --reward imagereward", {"alpha": 0.3, "lam": None, "lr": 1e-5}),
        ("--task flux --reward hpsv3:1,hpsv2.1:2", {"alpha": 0.3, "lam": None, "lr": 1e-5}),
    ],
)
def test_the_defaults_are_the_papers_settings(arguments, expected):
    parsed, flux = settings(*arguments.split()), settings("--task", "flux")
    assert {name: parsed[name] for name in expected} == expected
    if "--reward" not in arguments:
        assert {name for name in flux if parsed[name] != flux[name]} <= {"task", "lora_targets", *expected}
