"""Runs of the image models: processes, resuming, exports, settings, sheets of images."""

import json
import math
import os
import re
import shutil
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tests import tiny_pipelines as tiny  # first: skips without the libraries

# isort: split

import train_leap_align as trainer
from full_scale import transformer
from full_scale.sheet import draw_sheet
from leap_align import rollout
from runtime.cost_counter import CostCounter, total
from runtime.files import read_csv
from runtime.processes import RaisedOnAllRanks, full_value
from tests.tiny_pipelines import PROMPTS, TASKS, assert_close, every_task, flags, seeded, slow, task_of, tool, train
from tests.toy_runs import in_group, train_rank

pytestmark = pytest.mark.usefixtures("one_process")
WEIGHTS = "diffusion_pytorch_model.safetensors"
IN_4BIT = "--lora-rank 2 --load-in-4bit"


@pytest.mark.parametrize(
    ("name", "more", "nodes"),
    [
        ("flux", "--lora-rank 2 --gradient-accumulation-steps 2", 2),
        slow("klein", "--lora-rank 2", 1),
        slow("sd3", "", 1),
        slow("klein", "", 1),
        slow("flux", "--method stratified --gradient-accumulation-steps 2", 2),
        *(slow(name, f"--beta 1 --lora-rank {rank}", 1) for name in TASKS for rank in (0, 2)),
    ],
)
def test_two_processes_equal_one(models, tmp_path, name, more, nodes):
    arguments = flags(models, name, *more.split())
    train(tmp_path / "one", arguments)
    in_group(train_rank, [*arguments, "--out", tmp_path / "two"], nodes)
    tiny.assert_same_run(tmp_path / "one", tmp_path / "two")


def received(rank, arguments):
    """Bytes that a run receives in a group of two processes."""
    with CostCounter(ranks_per_node=2) as counter:
        train_rank(rank, arguments)
    return total(counter.phases[""].counted()).within


def gathering(models, tmp_path, *more):
    """Flags of two runs: one keeps the weights gathered for a microbatch, the other does not; and their folders."""
    sizes = "--iterations 2 --gradient-accumulation-steps 2 --ema-decay 0.5 --evaluate-every 2".split()
    kept, resharded = tmp_path / "kept", tmp_path / "resharded"
    arguments = flags(models, "flux", *more, *sizes)
    return [*arguments, "--out", kept], [*arguments, "--reshard-after-forward", "--out", resharded], kept, resharded


@pytest.mark.parametrize("more", ["", slow("--lora-rank 2"), slow("--beta 1 --precision bfloat16")])
def test_weights_that_stay_gathered_for_a_microbatch_train_the_same_to_the_bit(models, tmp_path, more):
    *runs, kept, resharded = gathering(models, tmp_path, *more.split())
    for arguments in runs:
        in_group(train_rank, arguments)
    assert_close(tiny.exported(kept), tiny.exported(resharded), rtol=0, atol=0)
    assert read_csv(kept / "evaluations.csv") == read_csv(resharded / "evaluations.csv")


@pytest.mark.slow
def test_weights_that_stay_gathered_are_received_once_a_microbatch(models, tmp_path):
    kept, resharded = (in_group(received, arguments)[0] for arguments in gathering(models, tmp_path)[:2])
    # Two iterations of two microbatches: T = 5 evaluations, two again in the backward; two images in between.
    spared = 2 * 2 * (5 + 2 - 1) + 2 * (5 - 1)
    weights = sum(p.nbytes for p in task_of(models).model.parameters())
    assert resharded - kept == pytest.approx(spared * weights / 2, rel=0.02)


def skips(rank, arguments):
    """The error of a run whose loss is never a number."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RaisedOnAllRanks) as error:
        patch.setattr(trainer, "objective", lambda reward, weight, lam: math.nan * reward.mean())
        train_rank(rank, arguments)
    return str(error.value)


def test_gradients_that_are_not_finite_are_named_on_two_processes(models, tmp_path):
    more = ["--lora-rank", 2, "--max-skipped-steps", 1, "--evaluate-every", 9, "--out", tmp_path]
    one, two = in_group(skips, flags(models, "flux", *more))
    adapters = sum(p.requires_grad for p in task_of(models, lora_rank=2).model.parameters())
    names = r"(\w+\.)+lora_[AB]\.default\.weight"
    assert one == two and re.search(rf"not finite in {names}, {names}, {names} \({adapters}\)", one)


@pytest.mark.slow
@pytest.mark.parametrize("name, more", [("flux", ["--lora-rank", "2"]), ("sd3", []), ("klein", [])])
def test_a_compiled_run_equals_an_eager_one_on_one_process_and_on_two(models, tmp_path, name, more):
    """In an empty cache, whose files show that the run compiled; the second run may find the code of the first."""
    arguments, cache = flags(models, name, *more), tmp_path / "cache"
    train(tmp_path / "eager", arguments)
    for processes in 2, 1:
        program = ["train_leap_align.py", *arguments, "--compile", "--out", tmp_path / f"{processes}"]
        tiny.torchrun(*program, processes=processes, environment={"TORCHINDUCTOR_CACHE_DIR": str(cache)})
        tiny.assert_same_run(tmp_path / "eager", tmp_path / f"{processes}")
        assert list(cache.rglob("*.so"))


REFUSING_REWARD = """
import os, sys
from full_scale import transformer

def factory():
    assert "train_leap_align" not in sys.modules, "the trainer is loaded twice"
    if os.environ["RANK"] == "1":
        transformer._free_memory = lambda device: 0
    return lambda images, prompts: images.mean((1, 2, 3))
"""


@pytest.mark.slow
def test_what_only_rank_1_refuses_is_printed_once(models, tmp_path):
    """The real script, where the memory check fails on the second process alone; the first does not wait for ever."""
    (tmp_path / "refusing_reward.py").write_text(REFUSING_REWARD)
    arguments = ["train_leap_align.py", "--task", "flux", *tiny.files(models), "--out", tmp_path / "run"]
    arguments += "--reward refusing_reward:factory --height 32 --width 48 --T 2 --batch-size 2".split()
    errors = tiny.torchrun(*arguments, environment={"PYTHONPATH": str(tmp_path)}, status=1)
    line, in_the_table = (row for row in errors.splitlines() if "are free" in row)  # torchrun's table, at the end
    assert line.startswith("error: weights and optimizer need") and in_the_table == f"  traceback : {line}"
    assert "BadInput" not in errors


def test_evaluation_T_sets_the_steps_of_an_evaluation_and_is_T_otherwise(models):
    task, other = task_of(models), task_of(models, evaluation_T=9)
    assert torch.equal(task.evaluation_times, task.times) and len(other.times) == 5
    torch.testing.assert_close(other.evaluation_times, task_of(models, T=9).times, rtol=0, atol=0)
    assert task.evaluate(None, 0)["reward"] != other.evaluate(None, 0)["reward"]


def test_a_run_logs_saturated_pixels_and_active_hinges_and_writes_its_images(models, tmp_path, capsys, monkeypatch):
    """And prints no warning of diffusers that concerns other models."""
    sheet, warning = Mock(side_effect=draw_sheet), Mock()
    monkeypatch.setattr("full_scale.task.draw_sheet", sheet)
    monkeypatch.setattr("diffusers.models.modeling_utils.logger.warning", warning)
    more = "--lora-rank 2 --lam 0.0 --iterations 2 --evaluation-images 4".split()
    table = train(tmp_path, flags(models, "flux", *more))
    assert f"look at {tmp_path}/curves.png, {tmp_path}/samples/000002.png\nnext: python -m" in capsys.readouterr().out
    assert all(0 <= row["saturated"] <= 1 and row["hinge_active"] in (0, 0.25, 0.5, 0.75, 1) for row in table)
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == ["000000.png", "000002.png"]
    after = tiny.read(tmp_path / "result.json")["after"]
    assert after.keys() == {"reward", "diversity", "saturated"} and after["diversity"] > 0
    assert [call.args[1] for call in sheet.call_args_list] == [PROMPTS[:2]] * 2 and not warning.called


PLANNED = "9.00 s an iteration, 2.5 GiB on a GPU, 4.00 hours and 8.0 GPU-hours in all"
OWN = {"task": "flux", "iterations": 12, "processes": 1, "processes a node": "1", "lora_targets": ["to_q", "to_k"]}
OTHER, DIFFERENCES = OWN | {"T": 25, "processes": 8}, ", with other settings: T was 25, is 5; processes was 8, is 1"


@pytest.mark.parametrize(
    ("done", "gib", "settings", "planned"),
    [
        (0, 0, None, ""),
        (0, 3, None, ""),
        (1, 3, OWN, f"{PLANNED}."),
        (0, 0, OTHER, f"{PLANNED}{DIFFERENCES}."),
    ],
)
def test_a_run_prints_its_plan_and_after_ten_iterations_what_it_measured(
    models, tmp_path, monkeypatch, capsys, done, gib, settings, planned
):
    """Also on --resume, which may add the plan.  The first iteration of a process does not count."""
    took = iter([])

    def step(self):
        self.progress.iteration += 1
        return {"reward": 0.0, "grad_norm": 1.0, "seconds": next(took)}

    monkeypatch.setattr(trainer.Trainer, "step", step)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: gib * 2**30)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 2 * gib * 2**30)
    arguments = flags(models, "flux", *"--lora-rank 1 --lora-targets to_q to_k --evaluate-every 99".split())
    if done:
        took = iter([3600])
        train(tmp_path / "run", [*arguments, "--iterations", done])
        capsys.readouterr()
    if settings:
        (tmp_path / "plan.json").write_text(json.dumps({"summary": PLANNED, "settings": settings}))
        arguments += ["--plan", tmp_path / "plan.json"]
    took = iter([3600, *range(100, 1000, 100), 3600, 3600])  # nine between 100 and 900, with a mean of 500
    train(tmp_path / "run", [*arguments, "--iterations", 12, "--resume"])
    memory = "3.0 GiB on a GPU (6.0 with torch's cache), " if gib else ""
    rest = "0.14 hours for 1 more" if done else "0.28 hours for 2 more"
    measured = f"Measured: 500.00 s an iteration, {memory}{rest}{'; planned: ' if planned else '.'}{planned}"
    expected = [f"Planned: {planned}"] * bool(planned) + [measured] * bool(planned or gib)
    printed = capsys.readouterr().out.splitlines()
    assert [line for line in printed if "lanned" in line or "Measured" in line] == expected
    assert not planned or printed.index(expected[0]) == 4


NO_PLANS = ["[]", "3", '"summary"', "{", "\0", "{}", '{"settings": {}}', '{"summary": ""}', '{"hours": {}}']
NO_PLANS += [f'{{"summary": "", "settings": {wrong}}}' for wrong in ("[]", "3", "null", '"x"')]


@pytest.mark.parametrize("text", [None, ..., *NO_PLANS])
def test_a_file_that_is_no_plan_is_refused(models, tmp_path, text):
    """None for no file, ... for a folder."""
    path = tmp_path / "plan.json"
    path.write_text(text) if isinstance(text, str) else text and path.mkdir()
    line = tiny.refusal([*flags(models, "flux"), "--plan", path, "--out", tmp_path / "run"])
    assert line.startswith(f"error: plan={path} is no plan (") and "`python -m full_scale plan --json FILE`" in line


def test_held_out_rewards_are_watched_and_every_term_of_a_sum_is_logged(models, tmp_path, capsys):
    """Training lowers PickScore, so its evaluator warns; before training it is what a run that raises it evaluates."""
    folders = {name: models / "flux" / name for name in ("pickscore", "reward")}
    few = [*flags(models, "flux"), "--lam", "None", "--evaluate-every", 1]
    both = ["--reward", "pickscore:-2,hpsv2.1:0.01", "--reward-weights", *folders.values()]
    watched = ["--held-out", "pickscore:1e-6", "--held-out-weights", folders["pickscore"]]
    rows = train(tmp_path / "sum", [*few, *both, *watched])
    assert all(row["reward"] == pytest.approx(0.01 * row["hpsv2.1"] - 2 * row["pickscore"], abs=1e-5) for row in rows)
    output = capsys.readouterr().out
    assert "never sees these evaluators: diversity, pickscore." in output
    assert "perhaps reward hacking" in output and ", but pickscore " in output
    train(
        tmp_path / "one", [*few, "--iterations", 1, "--reward", "pickscore", "--reward-weights", folders["pickscore"]]
    )
    held_out, reward = (read_csv(tmp_path / run / "evaluations.csv")[0] for run in ("sum", "one"))
    assert held_out["pickscore"] == reward["reward"]
    contents = tiny.read(tmp_path / "sum" / "config.json")["contents"]
    assert contents["held_out_weights"] != contents["reward_weights"]


def test_a_sheet_shows_every_image_unchanged_and_its_prompt_below():
    small = torch.randint(256, (6, 3, 32, 48), dtype=torch.uint8, generator=seeded())
    images = small.repeat_interleave(3, 2).repeat_interleave(3, 3)  # a sheet of small images enlarges them
    texts = "", "two dogs", "x " * 500
    sheets = [np.array(draw_sheet(small, ["a red cube", text, "a"], columns=2)) for text in texts]
    height, width = sheets[0].shape[0] // 2, sheets[0].shape[1] // 2
    for i, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
        top, left = i // 4 * height + 4, i // 2 % 2 * width + 4 + i % 2 * 148
        assert all((sheet[top : top + 96, left : left + 144] == image).all() for sheet in sheets)
    darkest = [sheet[104:height, width:].min() for sheet in sheets]  # of the caption of two dogs
    assert darkest[0] == 255 and max(darkest[1:]) < 128
    first, _, beside_a_long_one = (sheet[104:height, :width] for sheet in sheets)
    assert (first == beside_a_long_one).all() and first.min() < 128


@pytest.mark.parametrize(
    ("name", "more", "on_resume"),
    [
        slow("flux", "--lora-rank 2 --method lagrange", ""),
        slow("flux", "--T 8 --solver ab2", "--gradient-accumulation-steps 2 --gradient-checkpointing off"),
        pytest.param("flux", f"{IN_4BIT} --precision bfloat16 --beta 1e-3", "", marks=tiny.needs_torchao),
        ("flux", "--lora-rank 0 --beta 1", ""),
        *(slow(name, f"--lora-rank {rank} --beta 1", "") for name in ("sd3", "klein") for rank in (0, 2)),
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one(models, tmp_path, monkeypatch, name, more, on_resume):
    """It may have encoded its prompts in every step, or had other settings that change no result."""
    arguments, part = flags(models, name, *more.split()), tmp_path / "resumed"
    once = train(tmp_path / "once", arguments)
    assert all(row["grad_norm"] > 0 and ("--beta" in more) == (row.get("leash", 0) > 0) for row in once[1:])
    with monkeypatch.context() as patch:
        if name != "sd3":  # whose pooled text rounds differently in a batch
            patch.setattr("full_scale.prompts.FEW_PROMPTS", 0)
        train(part, [*arguments, "--iterations", "2"])
    resumed = train(part, [*arguments, "--resume", *on_resume.split()])
    tiny.assert_same_run(tmp_path / "once", part)
    assert on_resume or resumed == once


@pytest.mark.parametrize("name", ["flux", slow("sd3"), slow("klein")])
def test_a_run_may_move_from_text_to_embeddings_and_to_another_place_on_resume(models, tmp_path, name):
    """Neither files beside those that diffusers reads count, nor, with embeddings, missing text encoders."""
    more = ["--lora-rank", "2", "--evaluation-prompts", models / "prompts.txt"]
    uninterrupted = train(tmp_path / "uninterrupted", flags(models, name, *more))
    train(tmp_path / "run", flags(models, name, *more, "--iterations", "2"))
    encoder = shutil.copytree(models / name, tmp_path / "whole" / name) / "text_encoder"
    os.link(encoder / "model.safetensors", encoder / "model.fp16.safetensors")
    (encoder / "notes.md").write_text("mine")
    tool(*tiny.embedding(models, tmp_path / "embedded", "--model", tmp_path / "whole" / name))
    shutil.copytree(models / name, tmp_path / name, ignore=shutil.ignore_patterns("text_encoder*", "tokenizer*"))
    shutil.copytree(tmp_path / "embedded", tmp_path / "prompts.txt")  # flags() gives this name to the prompts
    moved = [*flags(tmp_path, name, *more), "--evaluation-prompts", tmp_path / "embedded", "--resume"]
    tiny.assert_same_metrics(train(tmp_path / "run", moved), uninterrupted)
    contents = tiny.read(tmp_path / "run" / "config.json")["contents"]
    assert contents.keys() == {"model", "text_encoders", "prompts", "evaluation_prompts", "reward_weights"}


@pytest.mark.slow
def test_sd3_without_t5_is_planned_embedded_trained_and_sampled_alike(models, tmp_path):
    """diffusers leaves T5 out of a folder that says so, and puts zeros in place of its text."""
    whole, folder = models / "sd3", tmp_path / "sd3"
    shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("*_3"))
    index = tiny.read(whole / "model_index.json") | {"text_encoder_3": [None, None], "tokenizer_3": [None, None]}
    (folder / "model_index.json").write_text(json.dumps(index))
    shutil.copy(models / "prompts.txt", tmp_path)
    gib = []
    for model in (whole, folder):
        reward, sizes = ["--reward-weights", whole / "reward"], "--gpus 1 --height 64 --width 64 --T 2 --batch-size 1"
        tool("plan", "--task", "sd3", "--model", model, *reward, *sizes.split(), "--json", tmp_path / "plan.json")
        gib.append(tiny.read(tmp_path / "plan.json")["phases"]["backward"]["gib"]["frozen models"])
    t5 = sum(value.numel() for value in load_file(whole / "text_encoder_3" / "model.safetensors").values())
    assert (gib[0] - gib[1]) * 2**30 == pytest.approx(2 * t5, rel=1e-3)  # in bfloat16
    tool(*tiny.embedding(tmp_path, tmp_path / "embedded", name="sd3"))
    tool(*tiny.sampling(tmp_path, tmp_path / "images", name="sd3"))
    for prompts in (tmp_path / "prompts.txt", tmp_path / "embedded"):
        task = task_of(tmp_path, "sd3", prompts=prompts)
        text = task.encode(PROMPTS[:1])["encoder_hidden_states"][0]
        assert text.shape[0] == 77 + 256 and text[:77].any() and not text[77:].any()
        x_T = task.noise(2, seeded())
        x_0 = rollout(task.velocity(PROMPTS[:2]), x_T, task.times)[0]
        pipeline = tiny.pipeline_of(tmp_path, "sd3", text_encoder_3=None, tokenizer_3=None)
        drawn = tiny.draw(pipeline, x_T, PROMPTS[:2], 4)
        torch.testing.assert_close(x_0, drawn, rtol=0, atol=1e-5)


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("twin", [".fp16", ".bf16", ".ema", ".non_ema", " (1)", "-old", ".fp16-00001-of-00002"])
def test_a_file_beside_the_weights_is_never_trained(models, tmp_path, twin, sharded):
    """A file whose name sorts before or after, at the transformer, the VAE or a text encoder; digests ignore it."""
    expected = tiny.task_of(models)
    shutil.copytree(models / "flux", tmp_path / "flux")
    shutil.copy(models / "prompts.txt", tmp_path)
    for part, name in (("transformer", WEIGHTS), ("vae", WEIGHTS), ("text_encoder", "model.safetensors")):
        folder = tmp_path / "flux" / part
        weights = load_file(folder / name)
        for other in (name.replace(".safetensors", f"{twin}.safetensors"), f"a{name}"):
            save_file({key: torch.zeros_like(value) for key, value in weights.items()}, folder / other)
        if sharded:
            parts = [f"{name.removesuffix('.safetensors')}-0000{i}-of-00002.safetensors" for i in (1, 2)]
            weight_map = {key: parts[i % 2] for i, key in enumerate(weights)}
            for file in parts:
                save_file({key: weights[key] for key in weights if weight_map[key] == file}, folder / file)
            (folder / f"{name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
            (folder / name).unlink()
    task = tiny.task_of(tmp_path)
    for one, other in ((task.model, expected.model), (task.pipeline.vae, expected.pipeline.vae)):
        assert_close(dict(one.named_parameters()), dict(other.named_parameters()), 0, 0)
    texts = (t.encode(["a red cube"]) for t in (task, expected))
    assert_close(*texts, 0, 0)
    assert sharded or task.contents() == expected.contents()


def test_the_export_is_the_average_of_the_weights(models, tmp_path):
    runs = ("--iterations 1", "--iterations 2", "--iterations 2 --ema-decay 0.15")
    for more in runs:
        train(tmp_path / more, flags(models, "flux", *more.split()))
    start = load_file(models / "flux" / "transformer" / WEIGHTS)
    one, two, average = (tiny.exported(tmp_path / more) for more in runs)
    # The decay is 1/10 at the first update and 0.15, below 2/11, at the second.
    expected = {name: 0.015 * start[name] + 0.135 * one[name] + 0.85 * two[name] for name in start}
    assert_close(average, expected, 0, 1e-6)
    assert max((two[name] - expected[name]).abs().max() for name in start) > 1e-4


@pytest.mark.parametrize(
    ("name", "more"), [slow("flux", "--precision bfloat16"), slow("sd3", ""), ("flux", "--lora-rank 2 --lora-alpha 6")]
)
def test_export_gives_the_raw_and_the_averaged_weights_of_any_checkpoint(models, tmp_path, capsys, name, more):
    """What the checkpoint's files hold; the last average is, with every other file, what the run's end wrote."""
    run, kind = tmp_path / "run", "lora" if "lora" in more else "transformer"
    train(run, flags(models, name, *"--iterations 2 --checkpoint-every 1 --ema-decay 0.5".split(), *more.split()))
    run = run.rename(tmp_path / "\x1b[31mrun")
    for choice in ([], ["--raw"], ["--iteration", 1, "--raw"]):
        out, checkpoint = tmp_path / f"{choice}", run / "checkpoint" / f"00000{2 - (1 in choice)}"
        tool("export", "--run", run, "--out", out, *choice)
        assert r"/\x1b[31mrun/checkpoint/" in capsys.readouterr().out
        stored = {k: v for file in checkpoint.glob("*.safetensors") for k, v in load_file(file).items()}
        prefix, found = "model." if "--raw" in choice else "average.", tiny.exported(out)
        expected = {k.removeprefix(prefix): v for k, v in stored.items() if k.startswith(prefix)}
        if "bfloat16" in more:
            expected = {k: v.bfloat16() for k, v in expected.items()}
        if kind == "lora":
            expected = {f"transformer.{k.replace('.default', '')}": v for k, v in expected.items()}
            expected = {k: 3 * v if ".lora_B." in k else v for k, v in expected.items()}  # alpha over rank
        assert_close({k: v for k, v in found.items() if k != "pos_embed.pos_embed"}, expected, 0, 0)
        assert tiny.content_of(out / kind).keys() == tiny.content_of(run / kind).keys()
        assert all(torch.equal(found[k], v) for k, v in tiny.exported(run).items()) == (not choice)


@pytest.mark.parametrize(
    ("more", "settings", "message"),
    [
        ("--iteration 7", {}, "iteration=7: {run} has checkpoints of 1"),
        ("", {"task": "toy"}, "run={run} is no run with an image model (flux, sd3, klein)"),
        ("", {"task": "flux"}, "{run}/checkpoint/000001 is damaged (state.json is not what was written"),
        ("", {"task": ["flux"]}, "run={run} is no run with an image model"),
        ("", {"model": None}, "{run}/config.json is damaged (model=None): restore it"),
        ("", {"precision": "nonsense"}, "{run}/config.json is damaged (precision='nonsense'): restore it"),
        ("", {"precision": ["float32"]}, "{run}/config.json is damaged (precision=['float32']): restore it"),
        ("", {"lora_rank": "2"}, "{run}/config.json is damaged (lora_rank='2'): restore it"),
        ("", {"lora_rank": 2, "lora_targets": "to_q"}, "{run}/config.json is damaged (lora_targets='to_q')"),
        ("", {"lora_rank": -2}, "lora_rank=-2 must be at least 0"),
        ("--iteration 2", None, "{run}/config.json is missing"),
    ],
)
def test_export_refuses_what_is_no_checkpoint_of_an_image_model(models, tmp_path, more, settings, message):
    run = tmp_path / "run"
    (run / "checkpoint" / "000001").mkdir(parents=True)
    (run / "checkpoint" / "000001" / "state.json").touch()
    if settings is not None:
        known = {"task": "flux", "model": str(models / "flux"), "precision": "float32", "lora_rank": 0}
        (run / "config.json").write_text(json.dumps(known | settings))
    line = tiny.refusal(["export", "--run", run, "--out", tmp_path / "out", *more.split()])
    assert message.format(run=run) in line


LORA, IN_4_BITS = {"lora_rank": 2, "lora_alpha": 6.0}, {"lora_rank": 2, "load_in_4bit": True}
EXPORTED = [("flux", {}), ("flux", LORA), *(slow(name, change) for name in ("sd3", "klein") for change in ({}, LORA))]


@pytest.mark.parametrize(
    ("name", "changes"), [*EXPORTED, *(pytest.param(name, IN_4_BITS, marks=tiny.needs_torchao) for name in TASKS)]
)
def test_diffusers_draws_from_the_export_what_the_trained_model_draws(models, tmp_path, name, changes):
    more = " ".join(f"--{key} {value}" for key, value in changes.items()).replace("_", "-").replace(" True", "")
    train(tmp_path, flags(models, name, "--iterations", "2", "--lr", "0.02", *more.split()))
    task = task_of(models, name, **changes)
    x_T, velocity, pipeline = task.noise(1, seeded()), task.velocity(PROMPTS[:1]), tiny.pipeline_of(models, name)
    untrained = rollout(velocity, x_T, task.times)[0]
    task.load(tmp_path)
    trained = rollout(velocity, x_T, task.times)[0]
    if "load_in_4bit" in changes:
        pipeline.transformer.load_state_dict(tiny.dequantised(task.model), strict=False)
    if changes:  # with peft's settings or, as in other programs, from the weights alone
        file = tmp_path / "lora" / "pytorch_lora_weights.safetensors"
        if name == "flux":
            save_file(load_file(file), file)
        pipeline.load_lora_weights(tmp_path / "lora")
    else:
        pipeline.transformer = type(pipeline.transformer).from_pretrained(tmp_path / "transformer")
    drawn = tiny.draw(pipeline, x_T, PROMPTS[:1], 4)
    torch.testing.assert_close(drawn, tiny.final_latents(task, trained), rtol=0, atol=1e-4)
    assert (trained - untrained).abs().max() > 30e-4


@every_task
@pytest.mark.parametrize("limit", [10**9, 10**5], ids=["one file", "many files"])
def test_the_export_has_the_files_of_diffusers_own(models, tmp_path, monkeypatch, name, limit):
    monkeypatch.setattr(transformer, "EXPORT_FILE_BYTES", limit)
    task = task_of(models, name, precision="bfloat16")
    task.save(tmp_path)
    plain = tiny.pipeline_of(models, name, dtype=torch.bfloat16).transformer
    plain.save_pretrained(tmp_path / "expected", max_shard_size=limit)
    found, expected = (tiny.content_of(tmp_path / folder) for folder in ("transformer", "expected"))
    for file in Path("config.json"), Path(f"{WEIGHTS}.index.json"):
        a, b = found.pop(file, "{}"), expected.pop(file, "{}")
        assert file.name == "config.json" or json.loads(a) == json.loads(b)
    assert found == expected and (len(found) > 1) == (limit == 10**5)
    with torch.no_grad():
        [p.zero_() for p in task.model.parameters()]
    task.load(tmp_path)
    loaded = {name: full_value(value).bfloat16() for name, value in task.model.state_dict().items()}
    assert_close(loaded, plain.state_dict(), 0, 0)


def test_an_export_onto_a_full_disk_continues_with_resume(models, tmp_path, monkeypatch):
    full = Mock(side_effect=SafetensorError("I/O error: No space left on device (os error 28)"))
    arguments = flags(models, "flux", "--iterations", "1")
    with monkeypatch.context() as patch:
        patch.setattr(transformer, "save_file", full)
        line = tiny.refusal([*arguments, "--out", tmp_path])
    assert f"{WEIGHTS} (No space left on device): free some space, then continue with --resume" in line
    assert not list(tmp_path.glob("transformer*"))
    train(tmp_path, [*arguments, "--resume"])
    assert (tmp_path / "transformer" / WEIGHTS).exists()


PAPER = {"lr": 1e-5, "weight_decay": 1e-4, "batch_size": 64, "iterations": 300, "ema_decay": 0.995, "T": 25}
PAPER |= {"alpha": 0.3, "lam": 0.55, "tau": 0.1, "height": 720, "width": 720, "guidance": 3.5, "reward": "hpsv2.1"}
SD3 = {"max_sequence_length": 256, "height": 512, "width": 512, "iterations": 200}  # supplement A2


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ("flux", PAPER),
        ("sd3", PAPER | SD3 | {"model": "stabilityai/stable-diffusion-3.5-medium"}),
        ("sd3 --reward hpsv3", SD3 | {"lam": 13.5, "lr": 8e-6}),
        ("klein", PAPER | {"model": "black-forest-labs/FLUX.2-klein-base-4B", "guidance": 4.0}),
        ("flux --reward pickscore", {"alpha": 0.1, "lam": 0.4, "lr": 1e-5}),
        ("flux --reward hpsv3", {"alpha": 0.1, "lam": 13.5, "lr": 8e-6}),
        # Without a value of the paper there is no hinge: a lambda on another scale could silence every sample.
        ("flux --reward imagereward", {"alpha": 0.3, "lam": None, "lr": 1e-5}),
        ("flux --reward hpsv3:1,hpsv2.1:2", {"alpha": 0.3, "lam": None, "lr": 1e-5}),
    ],
)
def test_the_defaults_are_the_papers_settings(more, expected):
    parsed = [trainer.parse(["--task", *words.split()]) for words in (more, "flux")]
    given, flux = (vars(flags.run) | vars(flags.method) | vars(flags.task) for flags in parsed)
    assert expected.items() <= given.items()
    if "--reward" not in more:
        assert {name for name in flux if given[name] != flux[name]} <= {"task", "lora_targets", *expected}
