"""A damaged, incomplete or foreign file: one line names it, before anything is trained, drawn or printed."""

import ast
import json
import os
import shlex
import shutil
import subprocess

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("diffusers")

import train_leap_align as trainer
from full_scale import __main__ as tools
from full_scale.components import check_format
from full_scale.contents import tensors_content
from leap_align import BadInput
from tests.tiny_pipelines import PROMPTS, embedding, flags, refusal, sampling, scoring, tool, train
from tests.toy_runs import flip_a_bit

pytestmark = pytest.mark.usefixtures("one_process")
WEIGHTS = "diffusion_pytorch_model.safetensors"
LORA = "pytorch_lora_weights.safetensors"
LOG = "scores/images_rewards_log.json"


@pytest.fixture(scope="module")
def whole(models, tmp_path_factory):
    """The tiny models, and beside them what the tools make: adapters, a transformer, embeddings, images, scores."""
    folder = tmp_path_factory.mktemp("whole") / "files"
    shutil.copytree(models, folder)
    train(folder / "run", flags(models, "flux", "--iterations", "1", "--lora-rank", "2"))
    (folder / "run" / "lora").rename(folder / "lora")
    shutil.copytree(folder / "flux" / "transformer", folder / "trained")
    shutil.copytree(folder / "flux" / "reward", folder / "reward")
    tool(*embedding(models, folder / "e"))
    tool(*sampling(models, folder / "images"))
    tool(*scoring(models, folder / "images", folder / "scores"))
    return folder


@pytest.fixture
def copy(whole, tmp_path):
    """A copy of it to damage."""
    return shutil.copytree(whole, tmp_path / "copy", ignore=shutil.ignore_patterns("klein", "run"))


@pytest.fixture
def commands(whole, copy):
    """Programs, and arguments with which they read the copy; `score again` continues from scores of whole images."""
    new = copy / "new"
    training, drawing = [*flags(copy, "flux"), "--out", copy / "trained anew"], sampling(copy, new)
    return {
        "train": (trainer.main, training),
        "train on e": (trainer.main, [*training, "--prompts", copy / "e"]),
        "sample": (tools.main, drawing),
        "lora": (tools.main, [*drawing, "--lora", copy / "lora"]),
        "lora's file": (tools.main, [*drawing, "--lora", copy / "lora" / LORA]),
        "trained": (tools.main, [*drawing, "--transformer", copy / "trained"]),
        "trained's file": (tools.main, [*drawing, "--transformer", copy / "trained" / "config.json"]),
        "score": (tools.main, [*scoring(copy, copy / "images", new), "--reward-weights", copy / "reward"]),
        "score again": (tools.main, scoring(whole, whole / "images", copy / "scores")),
    }


def change(path, more):
    """Drops a weight, or adds one."""
    weights = load_file(path)
    weights.pop(sorted(weights)[len(weights) // 2])
    save_file(load_file(path) | {"another.weight": torch.ones(2)} if more else weights, path, metadata={"format": "pt"})


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def spoil(path, value):
    """Puts a number into one weight."""
    weights = load_file(path)
    weights[sorted(weights)[len(weights) // 2]].view(-1)[0] = value
    save_file(weights, path, metadata={"format": "pt"})


def pickle(path):
    """The same weights as torch.save writes them."""
    names = {WEIGHTS: "diffusion_pytorch_model.bin", "model.safetensors": "pytorch_model.bin"}
    torch.save(load_file(path), path.with_name(names[path.name]))
    path.unlink()


def point_outside(path):
    """An index in place of the weights, which names a file outside of the pipeline's folder."""
    path.unlink()
    names = {"weight": "../../outside/x.safetensors"}
    path.with_name(f"{path.name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


def replace_by_pipe(path):
    path.unlink()
    os.mkfifo(path)


DAMAGES = {
    "pipe": replace_by_pipe,
    "deep": lambda path: path.write_text('{"a":' * 5000 + "1" + "}" * 5000),
    "surrogate": lambda path: path.write_text('{"00000_0.png": "\\ud800"}'),
    "quantised": lambda path: edit(path, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
    "euler": lambda path: edit(path, _class_name="EulerDiscreteScheduler"),
    "names": lambda path: edit(path, images=[row | {"image": ["x"]} for row in json.loads(path.read_text())["images"]]),
    "texts": lambda path: edit(path, images=[row | {"reward": "a"} for row in json.loads(path.read_text())["images"]]),
    "length": lambda path: edit(path, model_max_length="x"),
    "heads": lambda path: edit(path, attention_head_dim=0),
    "groups": lambda path: edit(path, norm_num_groups=0),
    "rope": lambda path: edit(path, axes_dims_rope=[1]),
    "hidden": lambda path: edit(path, hidden_size=-1),
    "string": lambda path: edit(path, vae="AutoencoderKL"),
    "number": lambda path: edit(path, vae=5),
    "rows": lambda path: edit(path, images=json.loads(path.read_text())["images"][::2]),
    "nan": lambda path: spoil(path, float("nan")),
    "inf": lambda path: spoil(path, float("inf")),
    "pickled": pickle,
    "fp16": lambda path: path.rename(path.with_suffix(".fp16.safetensors")),
    "outside": point_outside,
    "half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: path.write_bytes(b""),
    "flipped": lambda path: flip_a_bit(path, -5),
    "binary": lambda path: path.write_bytes(b"\xff\xfe\x00"),
    "gone": lambda path: shutil.rmtree(path) if path.is_dir() else path.unlink(),
    "none": lambda path: save_file({}, path),
    "fewer": lambda path: change(path, more=False),
    "more": lambda path: change(path, more=True),
    "sd3's": lambda path: shutil.copy(path.parents[2] / "sd3" / "transformer" / WEIGHTS, path),
}
"""Any other damage is the file's new text."""
CONFIGS = " ".join(f"flux/{name}/config.json" for name in ("transformer", "vae", "text_encoder", "text_encoder_2"))
WEIGHTS_OF_PARTS = f"flux/transformer/{WEIGHTS} flux/vae/{WEIGHTS} flux/text_encoder/M flux/text_encoder_2/M"
SETTINGS = f"flux/model_index.json flux/scheduler/scheduler_config.json {CONFIGS}"
TABLE = f"""
outside ~ {WEIGHTS_OF_PARTS} ~ names '../../outside/x.safetensors', which is not in its folder ~ train, sample
pickled ~ {WEIGHTS_OF_PARTS} ~ if you trust it, convert it: python -c ~ train, sample
fp16 ~ {WEIGHTS_OF_PARTS} ~ .fp16.safetensors, but no ~ train, sample
nan ~ {WEIGHTS_OF_PARTS} ~ FILE: ~ train, sample
inf ~ flux/transformer/{WEIGHTS} flux/text_encoder/M ~ holds NaN or infinite numbers ~ train, sample
nan ~ lora/{LORA} ~ FILE: ~ lora, lora's file
nan ~ trained/{WEIGHTS} ~ FILE: ~ trained
pipe ~ flux/vae/config.json flux/tokenizer/tokenizer.json flux/text_encoder/M ~ FILE is a pipe or a device ~ train
pipe ~ {WEIGHTS_OF_PARTS} ~ FILE is a pipe or a device, read once: write it to a file first ~ sample
pipe ~ flux/transformer/{WEIGHTS} ~ FILE is a pipe ~ train
pipe ~ lora/{LORA} ~ FILE is a pipe ~ lora, lora's file
pipe ~ images/prompts.json reward/open_clip_model.safetensors ~ FILE is a pipe ~ score
deep ~ {SETTINGS} flux/tokenizer/tokenizer.json ~ FILE is damaged (nested too deeply) ~ train, sample
deep surrogate ~ images/prompts.json ~ FILE is damaged ~ score
deep rows names texts ~ {LOG} ~ {LOG} is damaged ~ score again
deep ~ e/settings.json ~ FILE is damaged (nested too deeply) ~ train on e
quantised ~ {CONFIGS} ~ holds quantised weights ~ train, sample
euler ~ flux/scheduler/scheduler_config.json ~ holds a EulerDiscreteScheduler, not a FlowMatchEuler ~ train, sample
half ~ {SETTINGS} flux/tokenizer/tokenizer.json ~ FILE is damaged ~ train, sample
half ~ flux/transformer/{WEIGHTS} flux/vae/{WEIGHTS} flux/text_encoder/M ~ FILE is damaged ~ train, sample
binary ~ flux/model_index.json {CONFIGS} ~ FILE is damaged ~ train, sample
length ~ flux/tokenizer/tokenizer_config.json ~ FILE gives no model_max_length ~ train, sample
heads rope ~ flux/transformer/config.json ~ transformer ~ train, sample
groups ~ flux/vae/config.json ~ vae cannot be loaded as AutoencoderKL (integer ~ train, sample
hidden ~ flux/text_encoder/config.json ~ cannot be loaded as ~ train, sample
string number ~ flux/model_index.json ~ FILE gives vae as ~ train, sample
[1] ~ {SETTINGS} ~ FILE must hold a JSON object ~ train, sample
gone ~ flux/tokenizer/tokenizer_config.json {CONFIGS} ~ FILE is missing ~ train, sample
fewer sd3's gone ~ flux/transformer/{WEIGHTS} ~ transformer holds the weights of another model, or not ~ train, sample
more ~ flux/transformer/{WEIGHTS} ~ another.weight is (2,), but absent in the model of its config.json ~ train
fewer ~ flux/vae/{WEIGHTS} flux/text_encoder/M flux/text_encoder_2/M ~ weights are missing in ~ train, sample
sd3's ~ flux/vae/{WEIGHTS} flux/text_encoder_2/M ~ weights are missing in ~ train, sample
gone ~ flux/vae/{WEIGHTS} ~ vae cannot be loaded as AutoencoderKL ~ train, sample
gone ~ flux/scheduler/scheduler_config.json ~ scheduler cannot be loaded as FlowMatchEuler ~ train, sample
gone ~ flux/tokenizer/tokenizer.json ~ tokenizer holds no vocabulary ~ train, sample
gone ~ flux/tokenizer_2/tokenizer.json ~ tokenizer_2 holds no vocabulary ~ train, sample
{{}} ~ flux/model_index.json ~ FILE names no pipeline's class ~ train, sample
{{}} ~ flux/text_encoder/config.json ~ text_encoder cannot be loaded as CLIPTextModel ~ train, sample
{{}} ~ flux/tokenizer/tokenizer.json ~ tokenizer cannot be loaded as CLIPTokenizer ~ train, sample
{{}} ~ flux/tokenizer/tokenizer_config.json ~ tokenizer_config.json gives no model_max_length ~ train, sample
half ~ lora/{LORA} ~ {LORA} is damaged ~ lora, lora's file
binary gone none ~ lora/{LORA} ~ lora ~ lora
half ~ trained/{WEIGHTS} trained/config.json ~ FILE is damaged ~ trained
fewer ~ trained/{WEIGHTS} ~ weights are missing in ~ trained
gone ~ trained/config.json ~ FILE is missing ~ trained
{{}} ~ trained/config.json ~ is a file: give the folder transformer/ of a run ~ trained's file
gone ~ flux/vae ~ FILE does not exist ~ train, sample
half [1] binary {{}} gone ~ e/settings.json ~ /e ~ train on e
{{ [1] 5 {{"00000_0.png":5}} {{"none.png":"a"}} {{}} binary ~ images/prompts.json ~ images ~ score
{{ [1] {{}} {{"mean":1.0,"images":5}} {{"mean":"x","images":[]}} binary ~ {LOG} ~ {LOG} ~ score again
""".replace("/M", "/model.safetensors")
"""Damages ~ files ~ words of the line ~ commands that print it."""


def rows():
    for row in TABLE.strip().splitlines():
        damages, files, words, commands = row.split(" ~ ")
        for damage in damages.split():
            yield from ((damage, file, words.replace("FILE", file), commands.split(", ")) for file in files.split())


@pytest.mark.parametrize("damage, file, words, readers", rows())
def test_a_damaged_file_is_named_in_one_line(copy, commands, damage, file, words, readers):
    DAMAGES.get(damage, lambda path: path.write_text(damage))(copy / file)
    for number, name in enumerate(readers):
        program, arguments = commands[name]
        line = refusal(arguments, program)
        assert str(copy / file.split("/")[0]) in line
        assert number or words in line
        assert program is trainer.main or not (copy / "new").exists()


@pytest.mark.parametrize("damage", ["half", "flipped", "binary"])
def test_a_damaged_embedding_is_named_and_embed_makes_it_anew(whole, copy, commands, damage):
    contents = {path.name: path.read_bytes() for path in (whole / "e").glob("*.safetensors")}
    assert len(contents) == len(PROMPTS) + 1
    for name in contents:
        DAMAGES[damage](copy / "e" / name)
    program, arguments = commands["train on e"]
    line = refusal(arguments, program)
    assert any(str(copy / "e" / name) in line for name in contents) and "is damaged" in line
    assert "run the same `python -m full_scale embed` again, which makes it anew" in line
    tool(*embedding(copy, copy / "e"))
    assert {name: (copy / "e" / name).read_bytes() for name in contents} == contents
    program([*map(str, arguments), "--iterations", "1"])


NO_NUMBERS = {
    "half precision": lambda value: value.half(),
    "none": lambda value: value[:0],
    "bool": lambda value: value > 0,
    "complex": lambda value: value.cfloat(),
    "whole": lambda value: value.int(),
    "nan": lambda value: value * float("nan"),
}


@pytest.mark.parametrize("kind", NO_NUMBERS)
def test_embeddings_that_are_no_finite_numbers_are_refused_and_made_anew(whole, copy, commands, kind):
    for path in (copy / "e").glob("*.safetensors"):
        values = {name: NO_NUMBERS[kind](value).contiguous() for name, value in load_file(path).items()}
        save_file(values, path, {"content": tensors_content(values)})
    program, arguments = commands["train on e"]
    line = refusal(arguments, program)
    assert "holds no finite float32 or bfloat16 numbers: run the same `python -m full_scale embed` again" in line
    tool(*embedding(copy, copy / "e"))
    for path in (copy / "e").glob("*.safetensors"):
        assert path.read_bytes() == (whole / "e" / path.name).read_bytes()


def test_embeddings_of_another_shape_are_refused(copy, commands):
    for path in (copy / "e").glob("*.safetensors"):
        values = {name: value[..., :-1].contiguous() for name, value in load_file(path).items()}
        save_file(values, path, {"content": tensors_content(values)})
    program, arguments = commands["train on e"]
    assert "{'encoder_hidden_states': (512, 31), 'pooled_projections': (31,)}, not " in refusal(arguments, program)


def test_pickled_weights_are_converted_by_the_command_that_the_line_names(copy, commands):
    program, arguments = commands["sample"]
    for file in (f"flux/transformer/{WEIGHTS}", "flux/text_encoder_2/model.safetensors"):
        pickle(copy / file)
        assert not (copy / file).exists()
        exec(shlex.split(refusal(arguments, program).partition("convert it: ")[2])[2])
        assert (copy / file).is_file()
    edit(copy / "flux" / "transformer" / "config.json", pos_embed_max_size="x")  # FLUX has no such table
    program(list(map(str, arguments)))


HOSTILE = [{"_class_name": "A; __import__('os')"}, *({"architectures": names} for names in (5, {"a": 1}, [5], []))]


@pytest.mark.parametrize("settings", HOSTILE)
def test_no_command_is_made_of_a_text_that_is_no_class(tmp_path, settings):
    (tmp_path / "pytorch_model.bin").touch()
    (tmp_path / "config.json").write_text(json.dumps(settings))
    check_format(tmp_path)


def test_a_folders_name_is_quoted_in_the_command(tmp_path):
    folder = tmp_path / """a "b" $(c) `d` 'e' \\f"""
    folder.mkdir()
    (folder / "pytorch_model.bin").touch()
    (folder / "config.json").write_text('{"architectures": ["CLIPTextModel"]}')
    with pytest.raises(BadInput) as caught:
        check_format(folder)
    code = subprocess.run(["sh", "-c", "printf %s " + str(caught.value).partition(" -c ")[2]], capture_output=True)
    names = [node.value for node in ast.walk(ast.parse(code.stdout)) if isinstance(node, ast.Constant)]
    assert names.count(str(folder)) == 2


@pytest.mark.parametrize("damage", ["half", "flipped", "binary", "empty"])
def test_a_damaged_image_is_drawn_and_scored_again(whole, copy, commands, damage):
    file = copy / "images" / "00001_0.png"
    DAMAGES[damage](file)
    assert f"{file} cannot be read as PNG, " in refusal(*commands["score"][::-1])
    file.unlink()
    tool(*sampling(whole, copy / "images"))
    assert file.read_bytes() == (whole / "images" / file.name).read_bytes()
    tool(*commands["score"][1])


def test_a_removed_log_is_made_again_and_rows_that_are_no_rows_do_not_count(whole, copy, commands):
    (copy / LOG).unlink()
    parts = (copy / LOG).with_suffix(".parts")
    parts.mkdir()
    no_rows = "[" * 5000 + '\n5\n[1]\n{"image": "00000_0.png"}\n{"image": ["x"], "prompt": "a", "reward": 1}\n{"im'
    (parts / "0.jsonl").write_bytes(b"\xff\xfe\0\n")
    (parts / "4.jsonl").write_text('{"image": "00000_0.png", "prompt": "a red cube", "reward": "abc"}')
    (parts / "3.jsonl").write_text(no_rows)
    tool(*commands["score again"][1])
    assert (copy / LOG).read_text() == (whole / LOG).read_text()


LINES = ['{"prompt": 5}', "[1]", "5", "{", '{"tag": "colors"}', '"a cat"', '{"prompt": "\\ud800"}', "[" * 5000]


@pytest.mark.parametrize("line", LINES, ids=lambda line: line[:20])
def test_a_damaged_line_of_geneval(models, tmp_path, line):
    (tmp_path / "metadata.jsonl").write_text(f'{{"prompt": "a photo of a dog"}}\n{line}\n')
    command = ["sample", "--model", models / "flux", "--geneval", tmp_path / "metadata.jsonl", "--out", tmp_path / "i"]
    assert f"metadata.jsonl: the line {line!r:.60} must be a JSON object" in refusal(command, tools.main)
