"""What the tools and the trainer of the image models refuse, and how they say it."""

import io
import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm

pytest.importorskip("diffusers")

from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

import train_leap_align as trainer
from beyond import Hyper
from full_scale import __main__ as tools
from full_scale import pipeline, transformer
from full_scale.prompts import read_prompts
from leap_align import BadInput
from runtime.processes import UserCodeError, exit_process
from runtime.run_dir import atomic_file, atomic_folder, write_errors_named
from tests.tiny_pipelines import (
    ROOT,
    SAMPLING,
    TASKS,
    every_task,
    flags,
    options_of,
    refusal,
    tool,
    train,
)

pytestmark = pytest.mark.usefixtures("one_process")


# Bad input is refused in one line, before anything is trained


def response():
    return SimpleNamespace(headers={}, request=None)


@pytest.mark.parametrize(
    "error, expected",
    [
        (lambda: GatedRepoError("gated", response=response()), ["accept its licence", "hf auth login"]),
        (lambda: RepositoryNotFoundError("none", response=response()), ["check the name", "hf auth login"]),
        (lambda: LocalEntryNotFoundError("offline"), ["cannot be reached", "hf download"]),
        (lambda: ConnectionError("refused"), ["cannot be reached", "hf download"]),
    ],
    ids=["gated", "missing", "offline", "unreachable"],
)
def test_a_model_that_the_hub_does_not_give(models, tmp_path, monkeypatch, error, expected):
    def snapshot_download(*_, **__):
        raise error()

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    line = refusal([*flags(models, "flux"), "--model", "black-forest-labs/FLUX.1-dev", "--out", tmp_path / "run"])
    assert "black-forest-labs/FLUX.1-dev" in line and all(words in line for words in expected)


def test_a_local_path_asks_no_network(models, monkeypatch):
    tried = []

    def connect(*arguments):
        tried.append(arguments)  # a library might catch the error, so it is also counted
        raise OSError("no network here")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)
    TASKS["flux"](options_of(models, "flux"), 4)
    assert not tried
    with pytest.raises(BadInput, match="cannot be reached"):
        TASKS["flux"](options_of(models, "flux", model="nobody/nothing"), 4)
    assert tried


def broken_reward(models, folder):
    shutil.copytree(models / "flux" / "reward", folder)
    weights = load_file(folder / "open_clip_model.safetensors")
    weights.pop("logit_scale")
    save_file(weights, folder / "open_clip_model.safetensors")
    return folder


def test_flags_that_cannot_be_right(models, tmp_path):
    usual, out = flags(models, "flux"), ["--out", tmp_path / "run"]
    assert "height=500 must be a multiple of 16" in refusal([*usual, *out, "--height", "500"])
    (tmp_path / "empty.txt").write_text("\n \n")
    assert "empty.txt holds no prompt" in refusal([*usual, *out, "--prompts", tmp_path / "empty.txt"])
    assert "prompts is missing" in refusal(["--task", "flux", "--model", models / "flux", *out])
    assert "cannot read prompts" in refusal([*usual, *out, "--prompts", tmp_path / "none.txt"])
    assert "no/such/folder" in refusal([*usual, *out, "--model", "no/such/folder"])
    assert "StableDiffusion3Pipeline" in refusal([*usual, *out, "--model", models / "sd3"])
    line = refusal([*usual, *out, "--model", models / "klein"])
    assert "holds a Flux2KleinPipeline, not a FluxPipeline: FluxPipeline is --task flux" in line
    assert "Flux2KleinPipeline is --task klein" in line
    line = refusal([*usual, *out, "--reward-weights", broken_reward(models, tmp_path / "reward")])
    assert "logit_scale" in line and "missing" in line
    assert "cannot read prompts" in refusal([*usual, *out, "--prompts", models / "flux"])
    assert "evaluation_images=3 must be even" in refusal([*usual, *out, "--evaluation-images", "3"])
    assert "lora_rank=-1 must be at least 0" in refusal([*usual, *out, "--lora-rank", "-1"])
    assert "lora_targets" in refusal([*usual, *out, "--lora-rank", "2", "--lora-targets", "nothing"])
    line = refusal([*usual, *out, "--batch-size", "3", "--gradient-accumulation-steps", "2"])
    assert "batch_size=3 must be a multiple of" in line
    few = ["--task", "flux", "--model", models / "flux", "--prompts", models / "prompts.txt"]
    assert "unknown reward 'beauty'" in refusal([*few, *out, "--reward", "beauty"])


def test_a_world_size_that_does_not_divide_the_batch():
    with pytest.raises(BadInput, match="batch_size=64 must be a multiple of 12 processes"):
        trainer.check(trainer.Config(batch_size=64), Hyper(), world_size=12)


def test_a_pipeline_of_an_unknown_class(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "SomePipeline"}')
    with pytest.raises(BadInput, match="holds a SomePipeline: choose a pipeline of class FluxPipeline, Stable"):
        pipeline.family_of(tmp_path)


@pytest.fixture
def distilled(models, tmp_path):
    """A folder with FLUX.1's and FLUX.2-klein's tiny pipelines, as their distilled relatives describe themselves."""
    for name, file, entry in (
        ("flux", "transformer/config.json", {"guidance_embeds": False}),
        ("klein", "model_index.json", {"is_distilled": True}),
    ):
        shutil.copytree(models / name, tmp_path / name)
        path = tmp_path / name / file
        path.write_text(json.dumps(json.loads(path.read_text()) | entry))
    return tmp_path


@pytest.mark.parametrize("name", ["flux", "klein"])
def test_a_model_without_guidance_is_drawn_from_but_not_trained(models, distilled, name):
    base = {"flux": "black-forest-labs/FLUX.1-dev", "klein": "black-forest-labs/FLUX.2-klein-base-4B"}[name]
    expected = f"{distilled / name} holds a model that is distilled to few steps: train its base model, such as {base}"
    model = ["--model", distilled / name]
    assert expected in refusal([*flags(models, name), *model, "--out", distilled / "run"])
    plan = ["plan", "--task", name, *model, "--reward-weights", models / name / "reward"]
    assert expected in refusal(plan, tools.main)
    command = ["sample", *model, "--prompts", models / "prompts.txt", *SAMPLING, "--out", distilled / "images"]
    line = refusal([*command, "--guidance", "3.5"], tools.main)
    assert f"guidance=3.5, but {distilled / name} is distilled to few steps and has none: leave --guidance out" in line
    tools.main([str(argument) for argument in command])
    assert json.loads((distilled / "images" / "settings.json").read_text())["guidance"] == 1
    assert list((distilled / "images").rglob("*.png"))


@pytest.mark.parametrize("name", ["flux", "klein"])
def test_a_model_without_guidance_is_refused_before_its_weights_are_downloaded(models, distilled, monkeypatch, name):
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download",
        lambda _, allow_patterns, **__: asked.extend(allow_patterns) or distilled / name,
    )
    line = refusal([*flags(models, name), "--model", "someone/distilled", "--out", distilled / "run"])
    assert "distilled to few steps" in line
    assert set(asked) == {"model_index.json", "scheduler/*", "transformer/config.json"}


@every_task
def test_sample_takes_the_usual_guidance_of_its_model(models, tmp_path, name):
    tool("sample", "--model", models / name, "--prompts", models / "prompts.txt", *SAMPLING, "--out", tmp_path)
    settings = json.loads((tmp_path / "settings.json").read_text())
    assert settings["guidance"] == {"flux": 3.5, "sd3": 3.5, "klein": 4.0}[name]


def test_tiny_writes_one_pipeline(tmp_path):
    line = refusal(["tiny", tmp_path / "tiny", "--sd3", "--klein"], tools.main)
    assert "give --sd3 or --klein, not both" in line and not (tmp_path / "tiny").exists()


def test_too_little_memory_says_what_to_change(models, monkeypatch):
    task = TASKS["flux"](options_of(models, "flux"), 4)
    trained = sum(p.numel() for p in task.model.parameters())
    frozen = sum(p.numel() for module in task.frozen_modules() for p in module.parameters())
    needed = 4 * frozen + 20 * trained

    def check(free, shards):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, needed))
        transformer.check_memory(task.model, task.frozen_modules(), torch.device("cuda"), shards)

    check(needed, shards=1)
    with pytest.raises(BadInput, match="--lora-rank 64"):
        check(needed - 1, shards=1)
    check(needed - 1, shards=2)


@pytest.mark.parametrize("changes", [{}, {"lora_rank": 2}], ids=["full", "lora"])
def test_the_memory_check_counts_the_frozen_transformer_of_a_leash(models, monkeypatch, changes):
    """Two bytes a weight beside the 20 of training; LoRA needs no second transformer."""
    task = TASKS["flux"](options_of(models, "flux", precision="bfloat16", **changes), 4)
    task.keep_reference()
    weights = list(task.model.parameters())
    needed = sum(p.nbytes * (5 if p.requires_grad else 1) for p in weights)
    needed += 0 if changes else sum(2 * p.numel() for p in weights)
    monkeypatch.setattr(transformer, "shard", lambda *_: pytest.fail("it fits"))
    for free, outcome in ((needed - 1, BadInput), (needed, pytest.fail.Exception)):
        monkeypatch.setattr(transformer, "_free_memory", lambda device, free=free: free)
        with pytest.raises(outcome):
            task.parallelize(SimpleNamespace(size=lambda dim: 1))


def test_adapters_of_another_model_are_refused(models, tmp_path):
    train(tmp_path / "sd3", flags(models, "sd3", "--iterations", "1", "--lora-rank", "2"))
    command = ["sample", "--model", models / "flux", "--prompts", models / "prompts.txt", *SAMPLING]
    command += ["--out", tmp_path / "i"]
    assert "does not fit" in refusal([*command, "--lora", tmp_path / "sd3" / "lora"], tools.main)
    assert "does not exist" in refusal([*command, "--lora", tmp_path / "none"], tools.main)
    for name, kind in {"sd3": "SD3Transformer2DModel", "klein": "Flux2Transformer2DModel"}.items():
        line = refusal([*command, "--transformer", models / name / "transformer"], tools.main)
        assert f"transformer holds a {kind}, not a FluxTransformer2DModel: choose the weights of this" in line
    weights = load_file(tmp_path / "sd3" / "lora" / "pytorch_lora_weights.safetensors")
    (tmp_path / "wide").mkdir()
    wide = {k.replace("transformer_blocks.1", "transformer_blocks.0"): w.repeat(1, 2) for k, w in weights.items()}
    save_file(wide, tmp_path / "wide" / "pytorch_lora_weights.safetensors")
    assert "does not fit" in refusal([*command, "--lora", tmp_path / "wide"], tools.main)
    assert not (tmp_path / "i").exists()


def test_a_folder_that_was_filled_with_other_settings_is_refused(models, tmp_path):
    command = ["sample", "--model", models / "flux", "--prompts", models / "prompts.txt", *SAMPLING, "--out", tmp_path]
    tool(*command)
    assert "steps was 2, is 3" in refusal([*command, "--steps", "3"], tools.main)
    (tmp_path / "00000_0.png").unlink()
    line = refusal(["score", "--images", tmp_path, "--out", tmp_path / "s"], tools.main)
    assert "lacks 1 of 15 images" in line
    assert "prompts.json" in refusal(["score", "--images", models, "--out", tmp_path / "s"], tools.main)


# What a tool says at its end


def test_embed_and_sample_say_where_their_files_are(models, tmp_path, capsys):
    files = ["--model", models / "flux", "--prompts", models / "prompts.txt"]
    tool("embed", *files, "--out", tmp_path / "e")
    assert (
        capsys.readouterr().out
        == f"the embeddings of 5 prompts are in {tmp_path}/e: train with --prompts {tmp_path}/e\n"
    )
    tool("sample", *files, *SAMPLING, "--out", tmp_path / "i")
    command = f"python -m full_scale score --images {tmp_path}/i --out SCORES"
    assert capsys.readouterr().out == f"15 images are in {tmp_path}/i: score them with {command}\n"


def test_the_mark_that_some_editors_put_first_is_not_part_of_a_prompt(tmp_path):
    (tmp_path / "prompts.txt").write_bytes(b"\xef\xbb\xbfa red cube\r\na cat\r\n")
    assert read_prompts(tmp_path / "prompts.txt") == ["a red cube", "a cat"]


@pytest.mark.parametrize(
    "error, expected",
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "lower the --batch-size of sample"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), "--batch-size"),
        (OSError(28, "No space left on device", "x.png"), "x.png: No space left on device; then the same command"),
        (UserCodeError("your reward a:b"), "your reward a:b raised ValueError: mine"),
    ],
)
def test_a_tool_advises_only_what_it_has(monkeypatch, tmp_path, error, expected):
    error.__cause__ = ValueError("mine")

    def sample(out: str) -> None:
        raise error

    monkeypatch.setattr("full_scale.sample.sample", sample)
    with pytest.raises(SystemExit) as stop:
        tools.main(["sample", "--out", str(tmp_path)])
    assert expected in stop.value.code and "--resume" not in stop.value.code


def test_a_full_disk_names_the_file(models, tmp_path, monkeypatch):
    write, count = Path.write_bytes, []

    def write_bytes(path, content):
        count.append(path)
        if len(count) > 1:  # the first is settings.json
            raise OSError(28, "No space left on device")
        return write(path, content)

    files = ["--model", models / "flux", "--prompts", models / "prompts.txt", "--out", tmp_path / "e"]
    tool("embed", *files)
    removed = next((tmp_path / "e").glob("*.safetensors"))
    removed.unlink()
    monkeypatch.setattr("pathlib.Path.write_bytes", write_bytes)
    line = refusal(["embed", *files], tools.main)
    assert line == f"error: {removed}: No space left on device; then the same command continues from here"


def test_a_full_disk_in_a_library_written_in_rust_names_the_folder(tmp_path):
    with pytest.raises(OSError, match=r"No space left on device") as full, write_errors_named(tmp_path / "lora"):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert full.value.filename == str(tmp_path / "lora") and full.value.errno == 28
    with pytest.raises(OSError) as full, atomic_file(tmp_path / "x.png"):
        raise OSError(28, "No space left on device")
    assert full.value.filename == str(tmp_path / "x.png")
    with pytest.raises(OSError), atomic_folder(tmp_path / "f"):
        raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("handler, status", [(signal.SIG_DFL, -signal.SIGINT), (signal.SIG_IGN, 0)])
def test_ctrl_c_during_the_imports_ends_without_a_traceback_unless_it_is_ignored(handler, status):
    command, options = [sys.executable, "-m", "full_scale", "--help"], {"cwd": ROOT, "text": True}
    options |= {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, preexec_fn=lambda: signal.signal(signal.SIGINT, handler), **options)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == status and "Traceback" not in errors


def test_too_little_main_memory_is_refused_without_a_gpu(models, monkeypatch):
    task = TASKS["flux"](options_of(models, "flux"), 4)
    needed = 20 * sum(p.numel() for p in task.model.parameters())
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=needed))
    transformer.check_memory(task.model, task.frozen_modules(), torch.device("cpu"), 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(BadInput, match="for each process on the CPU"):
        transformer.check_memory(task.model, task.frozen_modules(), torch.device("cpu"), 1)
    transformer.check_memory(task.model, task.frozen_modules(), torch.device("cpu"), 2)


def test_an_error_does_not_follow_a_progress_bar_on_its_line():
    output = io.StringIO()
    bar = tqdm(range(3), file=output, leave=False)
    rounds = iter(bar)
    next(rounds)  # as in a loop that an error leaves
    with pytest.raises(SystemExit, match="error: mine"):
        exit_process(BadInput("mine"), "", "")
    assert bar.disable and output.getvalue().endswith("\r")
