"""A damaged, incomplete or foreign file: one line names it, before anything is trained, drawn or printed."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("diffusers")

from full_scale import __main__ as tools
from full_scale.components import check_files
from leap_align import BadInput
from tests.tiny_pipelines import PROMPTS, SAMPLING, flags, refusal, tool, train

pytestmark = pytest.mark.usefixtures("one_process")
WEIGHTS = "diffusion_pytorch_model.safetensors"
LORA = "pytorch_lora_weights.safetensors"


def halve(path):
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 64
    path.write_bytes(content)


def make_a_list(path):
    path.write_text("[1]")


def make_binary(path):
    path.write_bytes(b"\xff\xfe\x00")


def make_empty_object(path):
    path.write_text("{}")


def remove(path):
    path.unlink()


def drop_a_weight(path):
    weights = load_file(path)
    weights.pop(sorted(weights)[len(weights) // 2])
    save_file(weights, path, metadata={"format": "pt"})


def take_from_sd3(path):
    shutil.copy(path.parents[2] / "sd3" / "transformer" / WEIGHTS, path)


@pytest.fixture
def copy(models, tmp_path):
    """A copy of the tiny models to damage."""
    shutil.copytree(models, tmp_path / "copy")
    return tmp_path / "copy"


def sampling(models, out, *more):
    files = ["--model", models / "flux", "--prompts", models / "prompts.txt"]
    return ["sample", *files, *SAMPLING, "--images-per-prompt", "1", "--steps", "1", "--out", out, *more]


# The pipeline


@pytest.mark.parametrize(
    "file, damage, expected",
    [
        (f"transformer/{WEIGHTS}", halve, f"transformer/{WEIGHTS} is damaged"),
        (f"transformer/{WEIGHTS}", drop_a_weight, "transformer holds the weights of another model, or not all ("),
        (f"transformer/{WEIGHTS}", take_from_sd3, "transformer holds the weights of another model, or not all ("),
        (f"transformer/{WEIGHTS}", remove, "transformer holds the weights of another model, or not all ("),
        (f"vae/{WEIGHTS}", halve, f"vae/{WEIGHTS} is damaged"),
        (f"vae/{WEIGHTS}", drop_a_weight, "weights are missing in "),
        (f"vae/{WEIGHTS}", take_from_sd3, "weights are missing in "),
        (f"vae/{WEIGHTS}", remove, "vae cannot be loaded as AutoencoderKL"),
        ("text_encoder/model.safetensors", halve, "text_encoder/model.safetensors is damaged"),
        ("text_encoder/model.safetensors", drop_a_weight, "weights are missing in "),
        ("text_encoder_2/model.safetensors", drop_a_weight, "weights are missing in "),
        ("text_encoder_2/model.safetensors", take_from_sd3, "weights are missing in "),
        ("model_index.json", halve, "model_index.json is damaged"),
        ("model_index.json", make_a_list, "model_index.json must hold a JSON object"),
        ("model_index.json", make_empty_object, "model_index.json names no pipeline's class"),
        ("model_index.json", make_binary, "model_index.json is damaged"),
        *(
            (f"{name}/config.json", damage, f"{name}/config.json {words}")
            for name in ("transformer", "vae", "text_encoder", "text_encoder_2")
            for damage, words in (
                (halve, "is damaged"),
                (make_a_list, "must hold"),
                (make_binary, "is damaged"),
                (remove, "is missing"),
            )
        ),
        ("scheduler/scheduler_config.json", halve, "scheduler/scheduler_config.json is damaged"),
        ("scheduler/scheduler_config.json", make_a_list, "scheduler/scheduler_config.json must hold a JSON object"),
        ("scheduler/scheduler_config.json", remove, "scheduler cannot be loaded as FlowMatchEuler"),
        ("text_encoder/config.json", make_empty_object, "text_encoder cannot be loaded as CLIPTextModel"),
        ("tokenizer/tokenizer.json", halve, "tokenizer/tokenizer.json is damaged"),
        ("tokenizer/tokenizer.json", make_empty_object, "tokenizer cannot be loaded as CLIPTokenizer"),
        ("tokenizer/tokenizer.json", remove, "tokenizer holds no vocabulary"),
        ("tokenizer_2/tokenizer.json", remove, "tokenizer_2 holds no vocabulary"),
        ("tokenizer/tokenizer_config.json", make_empty_object, "tokenizer_config.json gives no model_max_length"),
        ("tokenizer/tokenizer_config.json", remove, "tokenizer_config.json is missing"),
    ],
)
def test_a_damaged_pipeline(copy, tmp_path, file, damage, expected):
    damage(copy / "flux" / file)
    assert expected in refusal([*flags(copy, "flux"), "--out", tmp_path / "run"])
    assert str(copy / "flux") in refusal(sampling(copy, tmp_path / "images"), tools.main)
    assert not (tmp_path / "images").exists()


def test_weights_of_a_larger_model_are_not_trained(copy, tmp_path):
    path = copy / "flux" / "transformer" / WEIGHTS
    save_file(load_file(path) | {"another.weight": torch.ones(2)}, path, metadata={"format": "pt"})
    line = refusal([*flags(copy, "flux"), "--out", tmp_path / "run"])
    assert "another.weight is (2,), but absent in the model of its config.json" in line


def test_a_whole_pipeline_is_accepted(models):
    for folder in (models / "flux").glob("[tvs]*/"):
        check_files(folder)
    with pytest.raises(BadInput, match="none does not exist"):
        check_files(models / "none")


# A run's exports


@pytest.mark.parametrize("damage", [halve, make_binary, remove, lambda path: save_file({}, path)])
def test_damaged_adapters(models, tmp_path, damage):
    train(tmp_path / "run", flags(models, "flux", "--iterations", "1", "--lora-rank", "2"))
    damage(tmp_path / "run" / "lora" / LORA)
    line = refusal(sampling(models, tmp_path / "i", "--lora", tmp_path / "run" / "lora"), tools.main)
    assert str(tmp_path / "run" / "lora") in line
    if damage is halve:
        assert f"{LORA} is missing or damaged" in line
        file = tmp_path / "run" / "lora" / LORA
        assert f"{LORA} is missing or damaged" in refusal(sampling(models, tmp_path / "i", "--lora", file), tools.main)


@pytest.mark.parametrize(
    "file, damage, expected",
    [
        (WEIGHTS, halve, f"{WEIGHTS} is damaged"),
        (WEIGHTS, drop_a_weight, "weights are missing in"),
        ("config.json", halve, "config.json is damaged"),
        ("config.json", remove, "config.json is missing"),
    ],
)
def test_a_damaged_transformer_of_a_run(models, tmp_path, file, damage, expected):
    shutil.copytree(models / "flux" / "transformer", tmp_path / "trained")
    damage(tmp_path / "trained" / file)
    line = refusal(sampling(models, tmp_path / "i", "--transformer", tmp_path / "trained"), tools.main)
    assert expected in line and str(tmp_path / "trained") in line
    line = refusal(sampling(models, tmp_path / "i", "--transformer", tmp_path / "trained" / file), tools.main)
    assert "is not a folder" in line


# Embeddings


@pytest.mark.parametrize("damage", [halve, flip_a_bit, make_binary])
def test_a_damaged_embedding_is_named_and_embed_makes_it_anew(models, tmp_path, damage):
    command = ["embed", "--model", models / "flux", "--prompts", models / "prompts.txt", "--out", tmp_path / "e"]
    tool(*command)
    whole = {path: path.read_bytes() for path in (tmp_path / "e").glob("*.safetensors")}
    assert len(whole) == len(PROMPTS) + 1
    for path in whole:
        damage(path)
    arguments = [*flags(models, "flux"), "--prompts", tmp_path / "e", "--iterations", "1"]
    line = refusal([*arguments, "--out", tmp_path / "run"])
    assert any(str(path) in line for path in whole) and "is damaged" in line
    assert "run the same `python -m full_scale embed` again, which makes it anew" in line
    tool(*command)
    assert {path: path.read_bytes() for path in whole} == whole
    assert train(tmp_path / "run", arguments)


@pytest.mark.parametrize("damage", [halve, make_a_list, make_binary, make_empty_object, remove])
def test_damaged_settings_of_embeddings(models, tmp_path, damage):
    tool("embed", "--model", models / "flux", "--prompts", models / "prompts.txt", "--out", tmp_path / "e")
    damage(tmp_path / "e" / "settings.json")
    line = refusal([*flags(models, "flux"), "--prompts", tmp_path / "e", "--out", tmp_path / "run"])
    assert str(tmp_path / "e") in line


# Images and scores


@pytest.fixture
def images(models, tmp_path):
    tool(*sampling(models, tmp_path / "images"))
    return tmp_path / "images"


def scoring(models, tmp_path):
    weights = ["--reward-weights", models / "flux" / "reward"]
    return ["score", "--images", tmp_path / "images", *weights, "--out", tmp_path / "scores"]


@pytest.mark.parametrize("damage", [halve, lambda p: flip_a_bit(p), make_binary, lambda p: p.write_bytes(b"")])
def test_a_damaged_image_is_named_and_the_advice_works(models, tmp_path, images, damage):
    file = images / "00001_0.png"
    content = file.read_bytes()
    damage(file)
    line = refusal(scoring(models, tmp_path), tools.main)
    assert f"{file} is not a whole image" in line
    file.unlink()
    tool(*sampling(models, images))
    assert file.read_bytes() == content
    tool(*scoring(models, tmp_path))


@pytest.mark.parametrize("text", ["{", "[1]", "5", '{"00000_0.png": 5}', '{"none.png": "a cat"}', "{}", b"\xff\xfe"])
def test_a_damaged_list_of_prompts(models, tmp_path, images, text):
    (images / "prompts.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert str(images) in refusal(scoring(models, tmp_path), tools.main)
    assert not (tmp_path / "scores").exists()


@pytest.mark.parametrize(
    "text", ["{", "[1]", "{}", '{"mean": 1.0, "images": 5}', '{"mean": "x", "images": []}', "\xff"]
)
def test_a_damaged_log_of_scores(models, tmp_path, images, text):
    tool(*scoring(models, tmp_path))
    log = tmp_path / "scores" / "images_rewards_log.json"
    whole = log.read_text()
    log.write_text(text, encoding="latin1")
    assert str(log) in refusal(scoring(models, tmp_path), tools.main)
    log.unlink()
    tool(*scoring(models, tmp_path))
    assert log.read_text() == whole


def test_rows_of_scores_that_are_no_rows_do_not_count(models, tmp_path, images):
    tool(*scoring(models, tmp_path))
    log = tmp_path / "scores" / "images_rewards_log.json"
    whole = log.read_text()
    log.unlink()
    (tmp_path / "scores" / "images_rewards_log.parts").mkdir()
    part = tmp_path / "scores" / "images_rewards_log.parts" / "3.jsonl"
    part.write_text('5\n[1]\n{"image": "00000_0.png"}\n{"image": ["x"], "prompt": "a", "reward": 1}\n{"im')
    tool(*scoring(models, tmp_path))
    assert log.read_text() == whole


@pytest.mark.parametrize("line", ['{"prompt": 5}', "[1]", "5", "{", '{"tag": "colors"}', '"a cat"'])
def test_a_damaged_line_of_geneval(models, tmp_path, line):
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"prompt": "a photo of a dog"}) + "\n" + line + "\n")
    command = ["sample", "--model", models / "flux", "--geneval", tmp_path / "metadata.jsonl", "--out", tmp_path / "i"]
    assert f"metadata.jsonl: the line {line!r} must be a JSON object" in refusal(command, tools.main)
