"""What the tools and the trainer of the image models refuse, and how they say it."""

import io
import json
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from tests import tiny_pipelines as tiny  # first: skips without the libraries

# isort: split

from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

from full_scale import __main__ as tools
from full_scale import transformer
from full_scale.prompts import embedding_file
from leap_align import BadInput
from tests.tiny_pipelines import PROMPTS, ROOT, TASKS, content_of, flags, options_of, refusal, sampling, start, tool

pytestmark = pytest.mark.usefixtures("one_process")


@pytest.fixture(scope="module")
def odd(models, tmp_path_factory):
    """A folder of inputs that cannot work."""
    odd = tmp_path_factory.mktemp("odd")
    (odd / "empty.txt").write_text("\n \n")
    (odd / "mine.txt").write_text("mine")
    (odd / "unknown").mkdir()
    (odd / "unknown" / "model_index.json").write_text('{"_class_name": "SomePipeline"}')
    entries = ("transformer/config.json", "guidance_embeds", False), ("model_index.json", "is_distilled", True)
    for name, (file, key, value) in zip(("flux", "klein"), entries):  # as distilled models describe themselves
        shutil.copytree(models / name, odd / name)
        (odd / name / file).write_text(json.dumps(tiny.read(odd / name / file) | {key: value}))
    (odd / "flux" / "prompts.txt").write_text("a red cube\n")
    weights = load_file(models / "flux" / "reward" / "open_clip_model.safetensors")
    shutil.copytree(models / "flux" / "reward", odd / "reward")
    save_file({k: w for k, w in weights.items() if k != "logit_scale"}, odd / "reward" / "open_clip_model.safetensors")
    tiny.train(odd / "run", flags(models, "sd3", "--iterations", "1", "--lora-rank", "2", "--export-every", "1"))
    weights = load_file(odd / "run" / "lora" / "pytorch_lora_weights.safetensors")
    wide = {k.replace("transformer_blocks.1", "transformer_blocks.0"): w.repeat(1, 2) for k, w in weights.items()}
    save_file(wide, odd / "wide.safetensors")
    first, again = min(weights), weights[min(weights)].clone()
    save_file({k: w for k, w in weights.items() if k != first}, odd / "half.safetensors")
    save_file(weights | {first.replace("lora_A.weight", "dora_scale"): again}, odd / "dora.safetensors")
    save_file(weights | {f"text_encoder.{first}": again}, odd / "text.safetensors")
    tool(*tiny.embedding(models, odd / "embedded", name="sd3"))
    next((odd / "embedded").glob("*.safetensors")).unlink()
    tool(*tiny.embedding(models, odd / "short", "--max-sequence-length", 9))
    tool(*sampling(models, odd / "whole"))
    shutil.copytree(odd / "whole", odd / "images")
    (odd / "images" / "00000_0.png").unlink()
    yield odd
    assert (odd / "mine.txt").read_text() == "mine"


DISTILLED = "holds a model that is distilled to few steps: train its base model, such as black-forest-labs/FLUX."
LIKE_IT = "of another rank: give --lora-rank 2 --lora-targets to_k to_out.0 to_q to_v"
ANOTHER = "choose the files of this pipeline's kind"
REFUSALS = """
train --height 500                      | height=500 must be a multiple of 16
train --prompts {odd}/empty.txt         | empty.txt holds no prompt
train --prompts {odd}/none.txt          | cannot read prompts from {odd}/none.txt
train --prompts {odd}/flux              | flux was not filled by `python -m full_scale embed`
train --prompts {odd}/embedded          | embedded holds embeddings of another model than {models}/flux
train --prompts {odd}/short             | short holds embeddings of 9 tokens, not 512: give --max-sequence-length 9
train --reward shapes                   | reward=shapes: the judge `shapes` has no gradient; name it in --held-out
train --max-sequence-length 0           | max_sequence_length=0 must lie between 1 and 512
sample --max-sequence-length 513        | max_sequence_length=513 must lie between 1 and 512
embed --max-sequence-length 0           | max_sequence_length=0 must lie between 1 and 512
sd3 --prompts {odd}/embedded            | embedded lacks 1 embeddings, such as that of
bare                                    | prompts is missing
train --model no/such/folder            | model=no/such/folder is neither a hub id
train --model {models}/sd3              | a StableDiffusion3Pipeline, not a FluxPipeline: FluxPipeline is --task flux
train --model {models}/klein            | StableDiffusion3Pipeline is --task sd3, Flux2KleinPipeline is --task klein
train --model {odd}/flux                | {odd}/flux {DISTILLED}1-dev
klein --model {odd}/klein               | {odd}/klein {DISTILLED}2-klein-base-4B
train --reward-weights {odd}/reward     | missing, such as logit_scale
few --reward beauty                     | unknown reward 'beauty': choose from hpsv2.1,
train --held-out beauty                 | unknown reward 'beauty': choose from hpsv2.1,
train --held-out shapes                 | 'a red cube' is no caption of shapes, such as
train --held-out-weights {models}       | held_out_weights are given without --held-out
train --held-out hpsv2.1:inf            | 'hpsv2.1:inf' must be a reward's name, a colon and a finite weight
train --evaluation-images 3             | evaluation_images=3 must be even
train --evaluation-T 0                  | evaluation_T=0 must be at least 1
train --batch-size 3 --gradient-accumulation-steps 2 | batch_size=3 must be a multiple of
train --guidance nan                    | guidance=nan must be at least 0 for FLUX.1-dev, and finite
train --guidance -1                     | guidance=-1.0 must be at least 0 for FLUX.1-dev, and finite
sd3 --guidance 0.5                      | guidance=0.5 must be at least 1 for SD3.5-M, and finite
klein --guidance 0.5                    | guidance=0.5 must be at least 1 for FLUX.2-klein, and finite
train --lora-rank -1                    | lora_rank=-1 must be at least 0
train --lora-rank 33                    | lora_rank=33 must be at most 32, the width of the narrowest target layer
train --lora-alpha 2                    | lora_alpha=2.0 scales adapters, but there are none: give --lora-rank, too
train --lora-rank 2 --lora-alpha 0      | lora_alpha=0.0 must be positive and finite
train --lora-rank 2 --lora-alpha inf    | lora_alpha=inf must be positive and finite
train --lora-rank 2 --lora-targets to_q nothing | no linear layer of FluxTransformer2DModel is called 'nothing'
train --lora-rank 2 --lora-targets      | lora_targets is empty
sd3 --lora {odd}/run/lora               | {LIKE_IT}
sd3 --lora-rank 3 --lora {odd}/run/lora | {LIKE_IT}
sd3 --lora-rank 2 --lora-targets to_q --lora {odd}/run/lora | {LIKE_IT}
sd3 --lora-rank 2 --lora-targets to_q to_k to_v to_out.0 to_add_out --lora {odd}/run/lora | {LIKE_IT}
sd3 --lora-rank 2 --lora {odd}/run      | lora={odd}/run holds no weights: give {odd}/run/lora
sd3 --lora {odd}/run/exports/000001     | 000001 holds no weights: give {odd}/run/exports/000001/lora
sd3 --lora {odd}/run/exports            | exports holds no weights: give {odd}/run/exports/000001/lora
sd3 --lora {odd}/run/checkpoint         | checkpoint holds no weights: give the folder lora/ of a run
sd3 --lora {odd}                        | lora_weights.safetensors does not exist: give the folder lora/ of a run
sd3 --lora-rank 2 --lora {odd}/none     | lora={odd}/none does not exist: give the folder lora/ of a run
sd3 --lora-rank 2 --lora {odd}/half.safetensors | half.safetensors
sd3 --lora-rank 2 --lora {odd}/dora.safetensors | dora_scale of a DoRA: give a LoRA
sd3 --lora-rank 2 --lora {odd}/text.safetensors | text.safetensors does not fit the model: text_encoder.
train --lora-rank 2 --lora {odd}/run/lora | run/lora does not fit the model: transformer_blocks.
train --transformer {odd}/none          | transformer={odd}/none does not exist: give the folder transformer/ of a run
train --transformer {models}/flux       | flux holds no weights: give {models}/flux/transformer
train --transformer {odd}/run           | run holds no weights: give the folder transformer/ of a run
train --transformer {odd}/mine.txt      | transformer={odd}/mine.txt is a file: give the folder transformer/ of a run
train --transformer {models}/flux/transformer --lora-rank 2 | flux/transformer would stay frozen under LoRA: leave out
train --transformer {models}/sd3/transformer | sd3/transformer holds the weights of another model, or not all
train --export-every -1                 | export_every=-1 must lie between 0 and
train --lr-warmup-steps -1              | lr_warmup_steps=-1 must lie between 0 and
sample --lora-scale 0.5                 | lora_scale=0.5 scales adapters, but there are none: give --lora, too
sample --lora-scale nan                 | lora_scale=nan must be finite
train --load-in-4bit                    | every weight is trained: give --lora-rank, too
train --load-in-4bit --lora-rank 2 --compile | torch cannot compile these weights: leave out --compile
train --load-in-4bit --lora-rank 2 --cpu-offload | load_in_4bit keeps its weights on the GPU: leave out --cpu-offload
plan --load-in-4bit --lora-rank 64 --gpus 2  | load_in_4bit does not shard the weights: start one process
plan --task klein --model {odd}/klein   | {odd}/klein {DISTILLED}2-klein-base-4B
plan --prompts /nowhere                 | cannot read prompts from /nowhere
plan --task digits                      | unknown task 'digits': choose from flux, sd3, klein
plan --reward pickscore                 | reward=pickscore
plan --model /nowhere                   | model=/nowhere: give a pipeline's folder
plan --json /nowhere/plan.json          | json: /nowhere does not exist
plan --gpus 0                           | gpus=0
plan --tflops 0                         | tflops=0
plan --gpus 3 --nodes 4                 | batch_size=64 must be a multiple of 12 processes
sample --model {odd}/unknown            | holds a SomePipeline: choose a pipeline of class FluxPipeline, Stable
sample --height 500                     | height=500 must be a multiple of 16
sample --guidance inf                   | guidance=inf must be at least 0 for FLUX.1-dev, and finite
sample --model {models}/sd3 --guidance 0.5   | guidance=0.5 must be at least 1 for SD3.5-M, and finite
sample --model {odd}/flux --guidance 3.5     | guidance=3.5, but {odd}/flux is distilled to few steps and has none
sample --model {models}/sd3 --height 1552    | height=1552 must be at most 1536, the largest size that this model
sd3 --width 1552                        | width=1552 must be at most 1536, the largest size that this model knows
plan --task sd3 --height 6160           | height=6160 must be at most 6144
sample --steps 0                        | steps=0 must be at least 1
sample --geneval {odd}/mine.txt         | give either --prompts FILE or --geneval
sample --lora {odd}/run/lora            | lora does not fit the model: transformer_blocks.
sample --lora {odd}/wide.safetensors    | wide.safetensors does not fit the model: transformer_blocks.
sample --lora {odd}/run                 | lora={odd}/run holds no weights: give {odd}/run/lora
sample --transformer {models}/flux      | flux holds no weights: give {models}/flux/transformer
sample --lora {odd}/none                | none does not exist: give the folder lora/ of a run
sample --lora {odd} --transformer {odd} | give --transformer or --lora, not both
sample --transformer {models}/sd3/transformer   | a SD3Transformer2DModel, not a FluxTransformer2DModel: {ANOTHER}
score --images {odd}/images             | images lacks 1 of 5 images
score --images {models}                 | images={models} needs a prompts.json
score --images {odd}/whole --reward-weights {odd}/none | {odd}/none does not exist
tiny --sd3 --klein                      | give --sd3 or --klein, not both
benchmark                               | no CUDA device
benchmark --task toy                    | task=toy: benchmark knows flux, sd3, klein
geneval-prompts --out {odd}/mine.txt    | mine.txt exists: choose another --out, or delete it
"""


@pytest.mark.parametrize("row", REFUSALS.strip().splitlines(), ids=lambda row: row.split(" | ")[0].strip())
def test_what_cannot_work_is_refused(models, odd, tmp_path, monkeypatch, row):
    """A line is a command, with the usual flags of the tool or task in front of it, and words of the message."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out, names = tmp_path / "out", {"odd": odd, "models": models, "DISTILLED": DISTILLED, "ANOTHER": ANOTHER}
    names["LIKE_IT"] = LIKE_IT
    command, _, words = row.format(**names).partition(" | ")
    usual = {"train": flags(models, "flux"), "sd3": flags(models, "sd3"), "klein": flags(models, "klein")}
    usual |= {"few": ["--task", "flux", *tiny.files(models)], "bare": ["--task", "flux", "--model", models / "flux"]}
    usual |= {
        "embed": tiny.embedding(models, out),
        "sample": sampling(models, out),
        "score": ["score", "--out", out],
        "tiny": ["tiny", out],
    }
    usual |= {"benchmark": ["benchmark", "--out", out]}
    name, *more = shlex.split(command)
    is_tool = name in tools.TOOLS
    assert words.strip() in refusal([*usual.get(name, [name]), *more, *([] if is_tool else ["--out", out])])
    assert not (is_tool and out.exists())


CLASSES = {
    "text_encoder": (
        ["transformers", "AutoModel"],
        ["transformers", "T5EncoderModel"],
        ["my_code", "CLIPTextModel"],
        [],
    ),
    "tokenizer_2": (["transformers", "AutoTokenizer"], ["transformers", "pipeline"]),
    "scheduler": (["diffusers", "EulerDiscreteScheduler"], ["diffusers", "FlowMatchEulerDiscreteScheduler", "x"]),
    "vae": (["diffusers", "AutoModel"], ["os", "system"], [None, "AutoencoderKL"]),
}


@pytest.mark.parametrize(("part", "entry"), [(part, entry) for part, found in CLASSES.items() for entry in found])
def test_a_pipeline_has_its_own_classes_and_runs_no_code_of_its_folder(models, tmp_path, part, entry):
    shutil.copytree(models / "flux", tmp_path / "flux")
    index = tiny.read(tmp_path / "flux" / "model_index.json") | {part: entry}
    (tmp_path / "flux" / "model_index.json").write_text(json.dumps(index))
    for file in tmp_path.glob(f"flux/{part}/*config.json"):
        own = {"auto_map": {name: "evil.Evil" for name in ("AutoModel", "AutoTokenizer", "AutoConfig")}}
        file.write_text(json.dumps(tiny.read(file) | own))
    (tmp_path / "flux" / part / "evil.py").write_text("raise SystemExit('code of the folder was run')")
    shutil.copy(models / "prompts.txt", tmp_path)
    line = refusal(["sample", *tiny.files(tmp_path), "--out", tmp_path / "images"])
    assert f"model_index.json gives {part} as {entry}, not as " in line


@pytest.mark.parametrize("name", ["flux", "klein"])
def test_a_distilled_model_is_only_sampled_and_without_guidance(models, odd, tmp_path, monkeypatch, name):
    tool(*sampling(models, tmp_path / "i", "--model", odd / name))
    assert tiny.read(tmp_path / "i" / "settings.json")["guidance"] == 1 and list(tmp_path.glob("i/*.png"))
    monkeypatch.setattr("huggingface_hub.snapshot_download", download := Mock(return_value=odd / name))
    line = refusal([*flags(models, name), "--model", "someone/distilled", "--out", tmp_path / "run"])
    assert "distilled to few steps" in line
    asked = {pattern for call in download.call_args_list for pattern in call.kwargs["allow_patterns"]}
    assert asked == {"model_index.json", "scheduler/*", "transformer/config.json"}  # no weights


RESPONSE = SimpleNamespace(headers={}, request=None)


@pytest.mark.parametrize(
    "error, cause, remedy",
    [
        (GatedRepoError("gated", response=RESPONSE), "accept its licence", "hf auth login"),
        (RepositoryNotFoundError("none", response=RESPONSE), "check the name", "hf auth login"),
        (LocalEntryNotFoundError("offline"), "cannot be reached", "hf download"),
        (ConnectionError("refused"), "cannot be reached", "hf download"),
    ],
)
def test_a_model_that_the_hub_does_not_give(models, tmp_path, monkeypatch, error, cause, remedy):
    monkeypatch.setattr("huggingface_hub.snapshot_download", Mock(side_effect=error))
    line = refusal([*flags(models, "flux"), "--model", "black-forest-labs/FLUX.1-dev", "--out", tmp_path / "run"])
    assert all(words in line for words in ("black-forest-labs/FLUX.1-dev", cause, remedy))
    if "hf download" in line:  # the files that a run reads, and no copies of them
        patterns = ("'transformer/*'", "'vae/*'", "'text_encoder_[23]/*'", "'model_index.json'")
        assert all(f"--include {pattern}" in line for pattern in patterns) and "--exclude '*.fp16.*'" in line


def test_a_local_path_asks_no_network(models, monkeypatch):
    connect = Mock(side_effect=OSError("no network here"))  # a library might catch the error, so calls are counted
    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)
    TASKS["flux"](options_of(models, "flux"), 4)
    assert not connect.called
    with pytest.raises(BadInput, match="cannot be reached"):
        TASKS["flux"](options_of(models, "flux", model="nobody/nothing"), 4)
    assert connect.called


@pytest.mark.parametrize(
    ("device", "words"),
    [
        ("cuda", "for each GPU.* use more GPUs, --lora-rank 64"),
        ("cpu", "for each process on the CPU.*free: use GPUs, --lora-rank"),
    ],
)
def test_too_little_memory_says_what_to_change(models, monkeypatch, device, words):
    task = TASKS["flux"](options_of(models, "flux"), 4)
    trained = sum(p.numel() for p in task.model.parameters())
    frozen = sum(p.numel() for module in task.frozen_modules() for p in module.parameters())
    needed = 20 * trained + (4 * frozen if device == "cuda" else 0)  # what is on the CPU already counts no more

    def check(free, shards=1):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, needed))
        monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=free))
        transformer.check_memory(task.model, task.frozen_modules(), torch.device(device), shards)

    check(needed)
    with pytest.raises(BadInput, match=words):
        check(needed - 1)
    check(needed - 1, shards=2)
    if device == "cpu":
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # two processes share the memory
        with pytest.raises(BadInput):
            check(needed)
        check(needed, shards=2)


@pytest.mark.parametrize(
    ("changes", "frozen_bytes"),
    [({}, 2), ({"lora_rank": 2}, 0), pytest.param({"lora_rank": 2, "load_in_4bit": True}, 0, marks=tiny.needs_torchao)],
    ids=["full", "lora", "4bit"],
)
def test_the_memory_check_counts_the_reference_of_a_leash(models, monkeypatch, changes, frozen_bytes):
    """LoRA needs no second transformer; a frozen weight takes two bytes, or half a byte in four bits."""
    task = TASKS["flux"](options_of(models, "flux", precision="bfloat16", **changes), 4)
    task.keep_reference()
    weights, size = list(task.model.parameters()), 0.5 if "load_in_4bit" in changes else 2
    needed = sum(20 * p.numel() if p.requires_grad else size * p.numel() for p in weights)
    needed += sum(frozen_bytes * p.numel() for p in weights)
    monkeypatch.setattr(transformer, "_free_memory", Mock(side_effect=[needed, needed - 1]))
    task.check_memory(shards=1)
    with pytest.raises(BadInput):
        task.check_memory(shards=1)


@pytest.mark.parametrize(("reshards", "remedy"), [(False, "--reshard-after-forward, --lora"), (True, "GPUs?, --lora")])
def test_the_memory_check_counts_weights_that_stay_gathered(models, monkeypatch, reshards, remedy):
    task = TASKS["flux"](options_of(models, "flux", precision="bfloat16", reshard_after_forward=reshards), 4)
    weights = sum(p.numel() for p in task.model.parameters())
    needed = 20 * weights / 2 + (0 if reshards else 2 * weights)
    monkeypatch.setattr(transformer, "_free_memory", Mock(side_effect=[needed, needed - 1]))
    task.check_memory(shards=2)
    with pytest.raises(BadInput, match=remedy):
        task.check_memory(shards=2)


def commands(inputs, out):
    """Each program's command line that fills a folder in `out`; the paths of its inputs lie in `inputs`."""
    score, training = tiny.scoring(inputs, inputs / "images", out / "scores"), flags(inputs, "flux", "--iterations", 1)
    return {
        "tiny": ["tiny", out / "tiny"],
        "embed": tiny.embedding(inputs, out / "embedded"),
        "sample": sampling(inputs, out / "images"),
        "sample trained": sampling(inputs, out / "trained-images", "--transformer", inputs / "trained"),
        "score": score,
        "score mine": [*score[:-1], out / "my-scores", "--reward", "my_scored:bright", "--reward-weights"],
        "train": [*training, "--out", out / "run"],
    }


@pytest.fixture(scope="module")
def filled(models, tmp_path_factory):
    """What each program has written, beside the model, prompts and rewards that it read."""
    folder = tmp_path_factory.mktemp("filled")
    shutil.copytree(models / "flux", folder / "flux")
    shutil.copytree(models / "flux" / "transformer", folder / "trained")
    shutil.copy(models / "prompts.txt", folder / "prompts.txt")
    (folder / "my_scored.py").write_text("def bright():\n    return lambda images, prompts: images.mean((1, 2, 3))\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setattr(sys, "dont_write_bytecode", True)
        for command in commands(folder, folder).values():
            start(command)
    return folder


def change(path):
    """Other weights, another image, prompts in another order, another reward."""
    if path.is_dir():
        file = next(path.glob("*.safetensors"))
        weights = load_file(file)
        name = min(weights)
        save_file(weights | {name: weights[name] + 1}, file, metadata={"format": "pt"})
    elif path.suffix == ".png":
        shutil.copy(path.with_name("00001_0.png"), path)
    elif path.suffix == ".py":
        path.write_text(path.read_text().replace("mean", "std"))
    else:
        path.write_text("\n".join(PROMPTS[:1] + PROMPTS[:0:-1]))


CHANGES = """
tiny                   |                     |
tiny --sd3             |                     | tiny was filled with other settings: task was flux, is sd3
embed                  |                     |
embed                  | prompts.txt         | embedded was filled with other settings: prompts was content
embed                  | flux/tokenizer/chat_template.jinja | embedded was filled with other settings: model was content
embed                  | flux/text_encoder_2 | embedded was filled with other settings: model was content
sample --steps 3       |                     | images was filled with other settings: steps was 1, is 3
sample                 | flux/transformer    | images was filled with other settings: transformer was content
sample                 | flux/vae            | images was filled with other settings: model was content
sample                 | flux/text_encoder   | images was filled with other settings: model was content
sample trained         | flux/transformer    |
sample trained         | trained             | trained-images was filled with other settings: transformer was content
score                  |                     |
score                  | images/00000_0.png  | scores was filled with other settings: images was content
score                  | flux/reward         | scores was filled with other settings: reward_weights was content
score mine             |                     |
score mine             | my_scored.py        | my-scores was filled with other settings: reward_weights was content
train --resume         | prompts.txt         | error: prompts changed since
train --resume         | flux/transformer    | error: model changed since
train --resume         | flux/vae            | error: model changed since
train --resume         | flux/text_encoder   | error: text_encoders changed since
train --resume         | flux/reward         | error: reward_weights changed since
train --resume --prompts {0}/my_scored.py | | error: evaluation_prompts, prompts changed since
"""


@pytest.mark.parametrize("row", CHANGES.strip().splitlines())
def test_the_same_command_continues_only_from_the_same_content(filled, tmp_path, monkeypatch, capsys, row):
    """A line is a command, what changes before it runs again in a moved folder, and its refusal, if any."""
    shutil.copytree(filled, tmp_path, dirs_exist_ok=True)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.delitem(sys.modules, "my_scored", raising=False)
    command, changed, words = (part.strip() for part in row.format(tmp_path).split("|"))
    name, *more = command.split(" --")
    command = [*commands(tmp_path, tmp_path)[name], *(word for flag in more for word in f"--{flag}".split())]
    if changed:
        change(tmp_path / changed)
    before = content_of(tmp_path)
    if words:
        line = refusal(command)
        assert words in line and ("choose another folder" in line or "restore it, or choose another --out" in line)
    else:
        start(command)
        mean = tiny.read(tmp_path / "scores" / "images_rewards_log.json")["mean"]
        assert (f"of 5 images: {mean:.4f}; already in" in capsys.readouterr().out) == (name == "score")
    assert content_of(tmp_path) == before


def taken_for_damage(error):
    """The error as the cause of one that advises to download a file again."""
    damaged = BadInput("x is damaged: restore it, or download it again")
    damaged.__cause__ = error
    return damaged


NO_MEMORY = [torch.OutOfMemoryError("CUDA out"), RuntimeError("DefaultCPUAllocator: can't"), MemoryError()]
NO_MEMORY += [RuntimeError(f"could not create a {name}") for name in ("memory object", "primitive")]
NO_MEMORY += [OSError(12, "Cannot allocate memory"), ImportError("x.so: failed to map segment from shared object")]
NO_MEMORY += [taken_for_damage(error) for error in NO_MEMORY]


@pytest.mark.parametrize("error", NO_MEMORY, ids=lambda error: f"{error!r} {error.__cause__!r}")
def test_a_tool_that_runs_out_of_memory_advises_only_what_it_has(monkeypatch, tmp_path, error):
    """And does so on a line of its own, below the progress bar of a loop that the error leaves."""
    output = io.StringIO()
    bar = tqdm(total=3, file=output, leave=False)
    monkeypatch.setattr("full_scale.pipeline.check_image_size", Mock(side_effect=error))
    line = refusal(["sample", "--model", "m", "--out", tmp_path])
    assert line.startswith("error: out of memory") and "--batch-size of sample" in line and "--resume" not in line
    assert bar.disable and output.getvalue().endswith("\r")


def test_a_full_disk_names_the_file(models, tmp_path, monkeypatch):
    monkeypatch.setattr("full_scale.prompts.save", Mock(side_effect=OSError(28, "No space left on device")))
    line, file = refusal(tiny.embedding(models, tmp_path)), embedding_file(tmp_path, "")
    assert line == f"error: {file}: No space left on device; then the same command continues from here"


@pytest.mark.parametrize("handler, status", [(signal.SIG_DFL, -signal.SIGINT), (signal.SIG_IGN, 0)])
def test_ctrl_c_during_the_imports_ends_without_a_traceback_unless_it_is_ignored(handler, status):
    options = {"cwd": ROOT, "text": True, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    options["preexec_fn"] = lambda: signal.signal(signal.SIGINT, handler)
    process = subprocess.Popen([sys.executable, "-m", "full_scale", "--help"], **options)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == status and "Traceback" not in errors
