"""What a folder or a run was filled with is recognised by content; a tool writes only into its own folder."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("diffusers")

from full_scale import __main__ as tools
from full_scale import benchmark
from full_scale.contents import text_content
from runtime.run_dir import claimed_output_folder
from tests.tiny_pipelines import PROMPTS, SAMPLING, every_task, flags, refusal, tool, train

pytestmark = pytest.mark.usefixtures("one_process")
FEW = [*SAMPLING, "--images-per-prompt", "1", "--steps", "1"]


def sampling(models, out, *more, model=None):
    model = models / "flux" if model is None else model
    return ["sample", "--model", model, "--prompts", models / "prompts.txt", *FEW, "--out", out, *more]


def scoring(models, images, out, *more):
    weights = [] if "--reward" in more else ["--reward-weights", models / "flux" / "reward"]
    return ["score", "--images", images, *weights, "--out", out, *more]


def change_weights(folder):
    """Another value in one of the weights files of a folder."""
    file = next(folder.glob("*.safetensors"))
    weights = load_file(file)
    name = sorted(weights)[0]
    save_file(weights | {name: weights[name] + 1}, file, metadata={"format": "pt"})


def content_of(folder):
    """Every file of a folder, apart from the lock."""
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


# Content, not spelling


def test_score_never_prints_the_mean_of_another_folder(models, tmp_path):
    out = tmp_path / "scores"
    tool(*sampling(models, tmp_path / "a" / "images"))
    tool(*sampling(models, tmp_path / "b" / "images", "--guidance", "9"))
    tool(*scoring(models, tmp_path / "a" / "images", out))
    line = refusal(scoring(models, tmp_path / "b" / "images", out), tools.main)
    assert "scores was filled with other settings: images was content " in line
    assert "choose another folder" in line


def test_score_finds_its_mean_again_when_images_and_weights_have_moved(models, tmp_path, capsys):
    tool(*sampling(models, tmp_path / "images"))
    tool(*scoring(models, tmp_path / "images", tmp_path / "scores"))
    first = capsys.readouterr().out
    (tmp_path / "elsewhere").mkdir()
    shutil.move(tmp_path / "images", tmp_path / "elsewhere" / "images")
    tool(*scoring(models, tmp_path / "elsewhere" / "images", tmp_path / "scores"))
    mean = first.split("images: ")[-1].split(";")[0]
    assert capsys.readouterr().out == f"mean hpsv2.1 of 5 images: {mean}; already in {tmp_path}/scores/" + (
        "images_rewards_log.json\n"
    )


def test_score_checks_the_reward_before_it_prints_an_old_mean(models, tmp_path):
    tool(*sampling(models, tmp_path / "images"))
    tool(*scoring(models, tmp_path / "images", tmp_path / "scores"))
    command = ["score", "--images", tmp_path / "images", "--out", tmp_path / "scores", "--reward-weights"]
    assert "none does not exist" in refusal([*command, tmp_path / "none"], tools.main)
    shutil.copytree(models / "flux" / "reward", tmp_path / "reward")
    change_weights(tmp_path / "reward")
    assert "reward_weights was content" in refusal([*command, tmp_path / "reward"], tools.main)


def test_the_source_of_a_custom_reward_is_part_of_its_content(models, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_scored.py").write_text("def bright():\n    return lambda images, prompts: images.mean((1, 2, 3))\n")
    tool(*sampling(models, tmp_path / "images"))
    command = scoring(models, tmp_path / "images", tmp_path / "scores", "--reward", "my_scored:bright")
    tool(*command)
    tool(*command)
    (tmp_path / "my_scored.py").write_text("def bright():\n    return lambda images, prompts: images.std((1, 2, 3))\n")
    assert "reward_weights was content" in refusal(command, tools.main)


def test_sample_notices_other_weights_behind_the_same_path(models, tmp_path):
    trained = tmp_path / "trained"
    shutil.copytree(models / "flux" / "transformer", trained)
    tool(*sampling(models, tmp_path / "images", "--transformer", trained))
    before = content_of(tmp_path / "images")
    change_weights(trained)
    line = refusal(sampling(models, tmp_path / "images", "--transformer", trained), tools.main)
    assert "images was filled with other settings: transformer was content" in line
    assert content_of(tmp_path / "images") == before


@pytest.mark.parametrize("part", ["vae", "text_encoder", "text_encoder_2"])
def test_sample_notices_another_pipeline_behind_the_same_path(models, tmp_path, part):
    shutil.copytree(models / "flux", tmp_path / "model")
    tool(*sampling(models, tmp_path / "images", model=tmp_path / "model"))
    change_weights(tmp_path / "model" / part)
    line = refusal(sampling(models, tmp_path / "images", model=tmp_path / "model"), tools.main)
    assert "images was filled with other settings: model was content" in line


def test_a_model_is_the_same_under_two_spellings_and_after_a_move(models, tmp_path, monkeypatch):
    monkeypatch.chdir(models)
    tool(*sampling(models, tmp_path / "images", model="flux"))
    tool(*sampling(models, tmp_path / "images", model="./flux"))
    tool("embed", "--model", "flux", "--prompts", "prompts.txt", "--out", tmp_path / "e", "--precision", "float32")
    shutil.copytree(models / "flux", tmp_path / "model")
    tool(*sampling(models, tmp_path / "images", model=tmp_path / "model"))
    arguments = [*flags(models, "flux"), "--model", tmp_path / "model", "--prompts", tmp_path / "e"]
    assert train(tmp_path / "run", [*arguments, "--iterations", "1"])


# Only what is new, empty or its own


def command_of(name, models, tmp_path, out):
    """A tool's command line that fills `out`."""
    if name == "score":
        tool(*sampling(models, tmp_path / "images"))
        return scoring(models, tmp_path / "images", out)
    return {
        "tiny": ["tiny", out],
        "embed": ["embed", "--model", models / "flux", "--prompts", models / "prompts.txt", "--out", out],
        "sample": sampling(models, out),
        "benchmark": ["benchmark", "--out", out],
    }[name]


@pytest.fixture
def no_measurement(monkeypatch):
    """The benchmark with a GPU that measures nothing."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(benchmark, "write_pipeline", lambda *_: None)
    monkeypatch.setattr(benchmark, "measure", lambda case: {"batch": case.batch_size})


every_tool = pytest.mark.parametrize("name", ["tiny", "embed", "sample", "score", "benchmark"])


@every_tool
def test_a_tool_writes_only_into_a_folder_of_its_own(models, tmp_path, name, request):
    if name == "benchmark":
        request.getfixturevalue("no_measurement")
    foreign = tmp_path / "foreign"
    shutil.copytree(models / "sd3", foreign)
    command = command_of(name, models, tmp_path, foreign)
    for settings in ('{"tool": "another"}', '{"model": "x"}', "[1]", "{", None):
        (foreign / "settings.json").unlink()
        if settings:
            (foreign / "settings.json").write_text(settings)
        before = content_of(foreign)
        line = refusal(command, tools.main)
        assert f"{foreign} is not empty, and {name} did not fill it: choose another" in line or "settings.json" in line
        assert content_of(foreign) == before
        (foreign / "settings.json").touch()


@every_tool
def test_a_second_process_in_the_same_folder_is_refused(models, tmp_path, name, request):
    command = command_of(name, models, tmp_path, tmp_path / "out")
    if name == "benchmark":
        request.getfixturevalue("no_measurement")
    with claimed_output_folder(tmp_path / "out", name, {}):
        assert "out is in use by another process" in refusal(command, tools.main)


def test_a_training_run_does_not_write_into_its_own_model(models, tmp_path):
    shutil.copytree(models / "flux", tmp_path / "model")
    for _ in range(2):  # as `tiny` wrote it, and as from the hub
        before = content_of(tmp_path / "model")
        line = refusal([*flags(models, "flux"), "--model", tmp_path / "model", "--out", tmp_path / "model"])
        assert "model is not empty, and train_leap_align did not fill it" in line
        assert content_of(tmp_path / "model") == before
        (tmp_path / "model" / "settings.json").unlink(missing_ok=True)


def test_tiny_writes_the_same_model_again_and_keeps_other_files(models, tmp_path):
    tool("tiny", tmp_path / "tiny")
    (tmp_path / "tiny" / "prompts.txt").write_text("a red cube\n")
    before = content_of(tmp_path / "tiny")
    tool("tiny", tmp_path / "tiny")
    assert content_of(tmp_path / "tiny") == before
    assert "task was flux, is sd3" in refusal(["tiny", tmp_path / "tiny", "--sd3"], tools.main)
    assert content_of(tmp_path / "tiny") == before


def test_prompts_beside_a_tiny_model_are_no_embeddings(models, tmp_path):
    shutil.copytree(models / "flux", tmp_path / "tiny")
    (tmp_path / "tiny" / "prompts.txt").write_text("a red cube\n")
    line = refusal([*flags(models, "flux"), "--prompts", tmp_path / "tiny", "--out", tmp_path / "run"])
    assert "tiny was not filled by `python -m full_scale embed`" in line


def test_geneval_prompts_overwrites_no_file(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    line = refusal(["geneval-prompts", "--out", tmp_path / "mine.txt"], tools.main)
    assert line == f"error: {tmp_path}/mine.txt exists: choose another --out, or delete it"
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_embed_refuses_a_second_list_in_the_same_folder(models, tmp_path):
    (tmp_path / "other.txt").write_text("a cat\n")
    command = ["embed", "--model", models / "flux", "--out", tmp_path / "e", "--prompts"]
    tool(*command, models / "prompts.txt")
    assert "e was filled with other settings: prompts was content" in refusal(
        [*command, tmp_path / "other.txt"], tools.main
    )
    assert (tmp_path / "e" / "prompts.txt").read_text().splitlines() == PROMPTS
    shutil.copy(models / "prompts.txt", tmp_path / "copy.txt")
    tool(*command, tmp_path / "copy.txt")


# Runs


def changed_inputs(models, folder):
    """A copy of a model, its reward and its prompts, and flags that use the copy."""
    shutil.copytree(models / "flux", folder / "flux")
    shutil.copy(models / "prompts.txt", folder / "prompts.txt")
    return [*flags(folder, "flux"), "--iterations", "1"]


@pytest.mark.parametrize(
    "name, change",
    [
        ("evaluation_prompts, prompts", lambda folder: (folder / "prompts.txt").write_text("a cat\n")),
        ("prompts", lambda folder: (folder / "prompts.txt").write_text("\n".join([*PROMPTS, "a cat"]))),
        ("model", lambda folder: change_weights(folder / "flux" / "transformer")),
        ("model", lambda folder: change_weights(folder / "flux" / "vae")),
        ("text_encoders", lambda folder: change_weights(folder / "flux" / "text_encoder")),
        ("reward_weights", lambda folder: change_weights(folder / "flux" / "reward")),
    ],
)
def test_resume_refuses_inputs_that_have_changed_on_disk(models, tmp_path, name, change):
    arguments, run = changed_inputs(models, tmp_path), tmp_path / "run"
    train(run, arguments)
    before = content_of(run)
    change(tmp_path)
    line = refusal([*arguments, "--out", run, "--resume", "--iterations", "2"])
    assert line == f"error: {name} changed since {run} was started: restore it, or choose another --out"
    assert content_of(run) == before


@every_task
def test_a_run_may_move_from_text_to_embeddings_and_to_another_place_on_resume(models, tmp_path, name):
    more = ["--lora-rank", "2", "--evaluation-prompts", models / "prompts.txt"]
    uninterrupted = train(tmp_path / "uninterrupted", flags(models, name, *more))
    train(tmp_path / "run", flags(models, name, *more, "--iterations", "2"))
    files = ["--model", models / name, "--prompts", models / "prompts.txt"]
    tool("embed", *files, "--out", tmp_path / "embedded", "--precision", "float32")
    shutil.copytree(models / name, tmp_path / name)
    shutil.copytree(tmp_path / "embedded", tmp_path / "prompts.txt")  # flags() gives this name to the prompts
    moved = [*flags(tmp_path, name, *more), "--evaluation-prompts", tmp_path / "embedded", "--resume"]
    for a, b in zip(train(tmp_path / "run", moved), uninterrupted, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6)
    contents = json.loads((tmp_path / "run" / "config.json").read_text())["contents"]
    assert contents.keys() == {"model", "text_encoders", "prompts", "evaluation_prompts", "reward_weights"}


def test_embeddings_are_enough_without_the_text_encoders_on_disk(models, tmp_path):
    tool("embed", "--model", models / "flux", "--prompts", models / "prompts.txt", "--out", tmp_path / "e")
    shutil.copytree(models / "flux", tmp_path / "model", ignore=shutil.ignore_patterns("text_encoder*", "tokenizer*"))
    arguments = [*flags(models, "flux"), "--model", tmp_path / "model", "--prompts", tmp_path / "e"]
    assert train(tmp_path / "run", [*arguments, "--iterations", "1"])


def test_half_precision_files_beside_the_weights_do_not_count(models, tmp_path):
    tool("embed", "--model", models / "flux", "--prompts", models / "prompts.txt", "--out", tmp_path / "e")
    shutil.copytree(models / "flux", tmp_path / "model")
    folder = tmp_path / "model" / "text_encoder"
    os.link(folder / "model.safetensors", folder / "model.fp16.safetensors")
    (folder / "notes.md").write_text("mine")
    arguments = [*flags(models, "flux"), "--model", tmp_path / "model", "--prompts", tmp_path / "e"]
    assert train(tmp_path / "run", [*arguments, "--iterations", "1"])


def test_another_chat_template_makes_other_text_encoders(models, tmp_path):
    shutil.copytree(models / "klein", tmp_path / "klein")
    template = tmp_path / "klein" / "tokenizer" / "chat_template.jinja"
    assert text_content(tmp_path / "klein") == text_content(models / "klein")
    template.write_text(template.read_text() + "!")
    assert text_content(tmp_path / "klein") != text_content(models / "klein")
