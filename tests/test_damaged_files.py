"""A damaged, incomplete or foreign file: one line names it, before anything is trained, drawn or printed."""

import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("diffusers")

from full_scale import __main__ as tools
from full_scale.components import check_files
from leap_align import BadInput
from tests.tiny_pipelines import PROMPTS, embedding, files, flags, refusal, sampling, scoring, tool, train

pytestmark = pytest.mark.usefixtures("one_process")
WEIGHTS = "diffusion_pytorch_model.safetensors"
LORA = "pytorch_lora_weights.safetensors"


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 64
    path.write_bytes(content)


def drop_a_weight(path):
    weights = load_file(path)
    weights.pop(sorted(weights)[len(weights) // 2])
    save_file(weights, path, metadata={"format": "pt"})


DAMAGES = {
    "half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: path.write_bytes(b""),
    "flipped": flip_a_bit,
    "binary": lambda path: path.write_bytes(b"\xff\xfe\x00"),
    "list": lambda path: path.write_text("[1]"),
    "object": lambda path: path.write_text("{}"),
    "gone": lambda path: path.unlink(),
    "no weights": lambda path: save_file({}, path),
    "fewer": drop_a_weight,
    "sd3's": lambda path: shutil.copy(path.parents[2] / "sd3" / "transformer" / WEIGHTS, path),
}


def damaged_by(*names):
    return pytest.mark.parametrize("damage", names)


@pytest.fixture
def copy(models, tmp_path):
    """A copy of the tiny models to damage."""
    shutil.copytree(models, tmp_path / "copy")
    return tmp_path / "copy"


# A pipeline: damages ~ files in its folder ~ words of the line; CONFIGS are those of its four networks

CONFIGS = " ".join(f"{name}/config.json" for name in ("transformer", "vae", "text_encoder", "text_encoder_2"))
SCHEDULER, TOKENIZER, CLIP = (
    "scheduler/scheduler_config.json",
    "tokenizer/tokenizer.json",
    "text_encoder/model.safetensors",
)
PIPELINE = f"""
half ~ model_index.json {SCHEDULER} {TOKENIZER} {CONFIGS} transformer/{WEIGHTS} vae/{WEIGHTS} {CLIP} ~ FILE is damaged
binary ~ model_index.json {CONFIGS} ~ FILE is damaged
list ~ model_index.json {SCHEDULER} {CONFIGS} ~ FILE must hold a JSON object
gone ~ tokenizer/tokenizer_config.json {CONFIGS} ~ FILE is missing
fewer sd3's gone ~ transformer/{WEIGHTS} ~ transformer holds the weights of another model, or not all (
fewer ~ vae/{WEIGHTS} {CLIP} text_encoder_2/model.safetensors ~ weights are missing in
sd3's ~ vae/{WEIGHTS} text_encoder_2/model.safetensors ~ weights are missing in
gone ~ vae/{WEIGHTS} ~ vae cannot be loaded as AutoencoderKL
gone ~ {SCHEDULER} ~ scheduler cannot be loaded as FlowMatchEuler
gone ~ {TOKENIZER} ~ tokenizer holds no vocabulary
gone ~ tokenizer_2/tokenizer.json ~ tokenizer_2 holds no vocabulary
object ~ model_index.json ~ FILE names no pipeline's class
object ~ text_encoder/config.json ~ text_encoder cannot be loaded as CLIPTextModel
object ~ {TOKENIZER} ~ tokenizer cannot be loaded as CLIPTokenizer
object ~ tokenizer/tokenizer_config.json ~ tokenizer_config.json gives no model_max_length
"""
ROWS = [row.split(" ~ ") for row in PIPELINE.strip().splitlines()]
ROWS = [(damage, file, words) for damages, files, words in ROWS for damage in damages.split() for file in files.split()]


@pytest.mark.parametrize("damage, file, words", ROWS)
def test_a_damaged_pipeline(copy, tmp_path, damage, file, words):
    DAMAGES[damage](copy / "flux" / file)
    assert words.replace("FILE", file) in refusal([*flags(copy, "flux"), "--out", tmp_path / "run"])
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


@pytest.fixture(scope="module")
def adapters(models, tmp_path_factory):
    """The file of a run's adapters."""
    out = tmp_path_factory.mktemp("lora") / "run"
    train(out, flags(models, "flux", "--iterations", "1", "--lora-rank", "2"))
    return out / "lora" / LORA


@damaged_by("half", "binary", "gone", "no weights")
def test_damaged_adapters(models, tmp_path, adapters, damage):
    file = shutil.copytree(adapters.parent, tmp_path / "lora") / LORA
    DAMAGES[damage](file)
    for path in (file.parent, file):
        line = refusal(sampling(models, tmp_path / "i", "--lora", path), tools.main)
        assert str(file.parent) in line and (damage != "half" or f"{LORA} is missing or damaged" in line)


@pytest.mark.parametrize("damage, file, words", [
    ("half", WEIGHTS, f"{WEIGHTS} is damaged"),
    ("fewer", WEIGHTS, "weights are missing in"),
    ("half", "config.json", "config.json is damaged"),
    ("gone", "config.json", "config.json is missing"),
])  # fmt: skip
def test_a_damaged_transformer_of_a_run(models, tmp_path, file, damage, words):
    trained = shutil.copytree(models / "flux" / "transformer", tmp_path / "trained")
    DAMAGES[damage](trained / file)
    line = refusal(sampling(models, tmp_path / "i", "--transformer", trained), tools.main)
    assert words in line and str(trained) in line
    line = refusal(sampling(models, tmp_path / "i", "--transformer", trained / file), tools.main)
    assert "is not a folder" in line


# Embeddings


@damaged_by("half", "flipped", "binary")
def test_a_damaged_embedding_is_named_and_embed_makes_it_anew(models, tmp_path, damage):
    command = ["embed", *files(models), "--out", tmp_path / "e"]
    tool(*command)
    whole = {path: path.read_bytes() for path in (tmp_path / "e").glob("*.safetensors")}
    assert len(whole) == len(PROMPTS) + 1
    for path in whole:
        DAMAGES[damage](path)
    arguments = [*flags(models, "flux"), "--prompts", tmp_path / "e", "--iterations", "1"]
    line = refusal([*arguments, "--out", tmp_path / "run"])
    assert any(str(path) in line for path in whole) and "is damaged" in line
    assert "run the same `python -m full_scale embed` again, which makes it anew" in line
    tool(*command)
    assert {path: path.read_bytes() for path in whole} == whole
    assert train(tmp_path / "run", arguments)


@pytest.fixture(scope="module")
def embedded(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("embedded")
    tool(*embedding(models, folder / "e"))
    return folder / "e"


@damaged_by("half", "list", "binary", "object", "gone")
def test_damaged_settings_of_embeddings(models, tmp_path, embedded, damage):
    shutil.copytree(embedded, tmp_path / "e")
    DAMAGES[damage](tmp_path / "e" / "settings.json")
    line = refusal([*flags(models, "flux"), "--prompts", tmp_path / "e", "--out", tmp_path / "run"])
    assert str(tmp_path / "e") in line


# Images and scores


@pytest.fixture(scope="module")
def scored(models, tmp_path_factory):
    """A folder with images/ and scores/, which tests copy."""
    folder = tmp_path_factory.mktemp("scored")
    tool(*sampling(models, folder / "images"))
    tool(*scoring(models, folder / "images", folder / "scores"))
    return folder


@damaged_by("half", "flipped", "binary", "empty")
def test_a_damaged_image_is_named_and_the_advice_works(models, tmp_path, scored, damage):
    images = shutil.copytree(scored / "images", tmp_path / "images")
    file = images / "00001_0.png"
    content = file.read_bytes()
    DAMAGES[damage](file)
    assert f"{file} is not a whole image" in refusal(scoring(models, images, tmp_path / "scores"), tools.main)
    file.unlink()
    tool(*sampling(models, images))
    assert file.read_bytes() == content
    tool(*scoring(models, images, tmp_path / "scores"))


@pytest.mark.parametrize("text", ["{", "[1]", "5", '{"00000_0.png": 5}', '{"none.png": "a cat"}', "{}", "\xff\xfe"])
def test_a_damaged_list_of_prompts(models, tmp_path, scored, text):
    images = shutil.copytree(scored / "images", tmp_path / "images")
    (images / "prompts.json").write_text(text, encoding="latin1")
    assert str(images) in refusal(scoring(models, images, tmp_path / "scores"), tools.main)
    assert not (tmp_path / "scores").exists()


NO_ROWS = '5\n[1]\n{"image": "00000_0.png"}\n{"image": ["x"], "prompt": "a", "reward": 1}\n{"im'


@pytest.mark.parametrize("text", [
    "{", "[1]", "{}", '{"mean": 1.0, "images": 5}', '{"mean": "x", "images": []}', "\xff", NO_ROWS,
])  # fmt: skip
def test_a_damaged_log_of_scores(models, tmp_path, scored, text):
    """Rows of an unfinished log that are no rows do not count."""
    command = scoring(models, scored / "images", tmp_path / "scores")
    log = shutil.copytree(scored / "scores", tmp_path / "scores") / "images_rewards_log.json"
    log.unlink()
    if text == NO_ROWS:
        (log.parent / "images_rewards_log.parts").mkdir()
        (log.parent / "images_rewards_log.parts" / "3.jsonl").write_text(text)
    else:
        log.write_text(text, encoding="latin1")
        assert str(log) in refusal(command, tools.main)
        log.unlink()
    tool(*command)
    assert log.read_text() == (scored / "scores" / log.name).read_text()


@pytest.mark.parametrize("line", ['{"prompt": 5}', "[1]", "5", "{", '{"tag": "colors"}', '"a cat"'])
def test_a_damaged_line_of_geneval(models, tmp_path, line):
    (tmp_path / "metadata.jsonl").write_text(f'{{"prompt": "a photo of a dog"}}\n{line}\n')
    command = ["sample", "--model", models / "flux", "--geneval", tmp_path / "metadata.jsonl", "--out", tmp_path / "i"]
    assert f"metadata.jsonl: the line {line!r} must be a JSON object" in refusal(command, tools.main)
