"""Runs that start from exported weights: adapters of any origin, a whole transformer; exports along a run's way."""

import errno
import os
import pkgutil
import shlex
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests import tiny_pipelines as tiny  # first: skips without the libraries

# isort: split

from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

from full_scale.models import FAMILIES
from runtime.files import read_csv
from tests import toy_runs
from tests.tiny_pipelines import flags, refusal, sampling, slow, tool, train
from toy.nets import VelocityNet

pytestmark = pytest.mark.usefixtures("one_process")
WEIGHTS, LORA = "diffusion_pytorch_model.safetensors", "pytorch_lora_weights.safetensors"
RANK, ALPHA, TARGETS = 3, 12, ["to_q", "to_out.0"]
LIKE_IT = ["--lora-rank", RANK, "--lora-targets", *TARGETS]


def write_lora(models, name, folder, form, **changes):
    """Random adapters as other programs write them, by diffusers or peft; returns their path, and B A by layer."""
    model = FAMILIES[name].transformer_class.from_pretrained(models / name / "transformer")
    config = {"r": RANK, "lora_alpha": ALPHA, "target_modules": TARGETS, "init_lora_weights": False}
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(**config | changes))
    adapters = {key.removeprefix("base_model.model."): w for key, w in get_peft_model_state_dict(model).items()}
    if "peft" in form:
        model.save_pretrained(folder)
    else:
        metadata = model.peft_config["default"].to_dict() if "metadata" in form else None
        saving = {"transformer_lora_layers": adapters, "transformer_lora_adapter_metadata": metadata}
        FAMILIES[name].pipeline_class.save_lora_weights(folder, **saving)
    if "alphas" in form:
        file, alpha = folder / LORA, torch.tensor(float(ALPHA))
        layers = [key.removesuffix(".lora_A.weight") for key in load_file(file) if ".lora_A." in key]
        save_file(load_file(file) | {f"{layer}.alpha": alpha.clone() for layer in layers}, file)
    path = next(folder.glob("*.safetensors")) if "file" in form else folder
    return path, products(adapters)


def products(adapters):
    """B A of each layer, from tensors named LAYER.lora_A.weight and LAYER.lora_B.weight."""
    a, b = (
        {key.removeprefix("transformer.").split(".lora_")[0]: w.float() for key, w in adapters.items() if side in key}
        for side in (".lora_A.", ".lora_B.")
    )
    return {layer: b[layer].flatten(1) @ a[layer].flatten(1) for layer in a}


FORMS = {  # the factor of B A in the transformer with these adapters
    "diffusers": 1,
    "diffusers metadata": ALPHA / RANK,
    "diffusers metadata file": ALPHA / RANK,
    "peft": ALPHA / RANK,
    "peft file": ALPHA / RANK,
    "peft rslora": ALPHA / RANK**0.5,
}


@pytest.mark.parametrize(
    ("name", "form", "alpha"),
    [*(("flux", form, 7) for form in FORMS), ("flux", "diffusers alphas", 7), ("flux", "diffusers metadata", None)]
    + [slow(name, form, 7) for name in ("sd3", "klein") for form in FORMS],
)
def test_a_run_starts_with_the_function_of_adapters_of_any_format_and_alpha(models, tmp_path, name, form, alpha):
    path, expected = write_lora(models, name, tmp_path / "foreign", form, use_rslora="rslora" in form)
    factor = FORMS.get(form, ALPHA / RANK)
    train(tmp_path / "run", flags(models, name, *LIKE_IT, "--lora-alpha", alpha, "--lora", path, "--iterations", 0))
    found = products(tiny.exported(tmp_path / "run"))
    tiny.assert_close(found, {layer: factor * w for layer, w in expected.items()}, 1e-5, 1e-6)
    assert tiny.read(tmp_path / "run" / "config.json")["contents"]["lora"]


ADVICE = {  # what peft calls the layers, and what --lora-targets does
    r"transformer_blocks\.\d\.attn\.(to_q|to_out\.0)": "to_out.0 'transformer_blocks.*.attn.to_q'",
    r".*\.(to_q|proj_mlp|ff\.net\.2)": "ff.net.2 proj_mlp to_q",
    r"single_transformer_blocks\.1\.(proj_mlp|attn\.to_v)|x_embedder": "single_transformer_blocks.1.attn.to_v "
    "single_transformer_blocks.1.proj_mlp x_embedder",
}


@pytest.mark.parametrize(("layers", "targets"), ADVICE.items())
def test_adapters_of_any_layers_start_a_run_with_the_flags_that_the_refusal_gives(models, tmp_path, layers, targets):
    path, expected = write_lora(models, "flux", tmp_path / "foreign", "diffusers", target_modules=layers)
    arguments = flags(models, "flux", "--lora", path, "--iterations", 0)
    _, advice = refusal([*arguments, "--out", tmp_path / "run"]).split(": give ")
    assert advice == f"--lora-rank {RANK} --lora-targets {targets}"
    train(tmp_path / "run", [*arguments, *shlex.split(advice)])
    tiny.assert_close(products(tiny.exported(tmp_path / "run")), expected, 1e-5, 1e-6)


def test_a_file_of_kohya_for_some_blocks_starts_a_run(models, tmp_path):
    torch.manual_seed(0)
    layer = "lora_unet_double_blocks_0_img_attn_qkv"
    down, up = torch.randn(RANK, 32), torch.randn(3 * 32, RANK)
    file = {f"{layer}.lora_down.weight": down, f"{layer}.lora_up.weight": up, f"{layer}.alpha": torch.tensor(6.0)}
    save_file(file, tmp_path / "kohya.safetensors")
    arguments = flags(models, "flux", "--lora", tmp_path / "kohya.safetensors", "--iterations", 0)
    _, advice = refusal([*arguments, "--out", tmp_path / "run"]).split(": give ")
    train(tmp_path / "run", [*arguments, *shlex.split(advice)])
    parts = zip(("to_q", "to_k", "to_v"), up.chunk(3))
    expected = {f"transformer_blocks.0.attn.{name}": 6 / RANK * part @ down for name, part in parts}
    tiny.assert_close(products(tiny.exported(tmp_path / "run")), expected, 1e-5, 1e-6)


UNUSABLE = [("flux", {"lora_alpha": float(value)}, "its alpha must be positive") for value in ("0", "-1", "inf", "nan")]
UNUSABLE += [
    ("flux", {"rank_pattern": {"to_q": 2}}, "several ranks [2, 3]"),
    ("flux", {"target_modules": "proj_out"}, "adapts proj_out and not all layers that end so"),
    ("sd3", {"target_modules": ["pos_embed.proj"]}, "no plain LoRA (pos_embed.proj.lora_A.weight)"),
]


@pytest.mark.parametrize(("name", "changes", "words"), UNUSABLE)
def test_adapters_that_no_flags_fit_are_refused(models, tmp_path, name, changes, words):
    path, _ = write_lora(models, name, tmp_path / "foreign", "peft", **changes)
    assert words in refusal([*flags(models, name, *LIKE_IT, "--lora", path), "--out", tmp_path / "run"])


@pytest.mark.parametrize("name", ["flux", slow("sd3"), slow("klein")])
@pytest.mark.parametrize("more", [slow("--lr 0.01"), "--lr 0.1 --lora-rank 2 --lora-alpha 5"])
def test_a_run_continues_from_an_export_of_another_and_its_leash_holds_the_base(models, tmp_path, name, more):
    """Its first evaluation is that of the export's iteration; the leash is zero in a run that starts at the base.

    On --resume it needs neither the export nor the flag, and still records both.
    """
    first, second, kind = tmp_path / "first", tmp_path / "second", "lora" if "lora" in more else "transformer"
    arguments = flags(models, name, *more.split(), "--beta", 1, "--iterations", 2)
    cold = train(first, [*arguments, "--export-every", 1])
    exported = [f"--{kind}", first / "exports" / "000002" / kind]
    warm = train(second, [*arguments, *exported])
    expected, found = (read_csv(run / "evaluations.csv") for run in (first, second))
    before, after, start = ({k: float(v) for k, v in row.items() if k != "iteration"} for row in (*expected, found[0]))
    assert start == pytest.approx(after, abs=1e-5) and start != pytest.approx(before, abs=1e-4)
    assert cold[0]["leash"] == 0 and warm[0]["leash"] > 1e-4
    part = tmp_path / "part"
    train(part, [*arguments, *exported, "--iterations", 1])
    recorded = tiny.read(part / "config.json")
    assert recorded[kind] == str(exported[1]) and recorded["contents"][kind]
    shutil.rmtree(exported[1])
    train(part, [*arguments, "--iterations", 1, "--resume"])
    assert train(part, [*arguments, exported[0], tmp_path / "gone", "--resume"]) == warm
    resumed = tiny.read(part / "config.json")
    assert (resumed[kind], resumed["contents"]) == (recorded[kind], recorded["contents"])


def weights(folder):
    """The bytes of every tensor; the metadata in a file have no fixed order."""
    files = {file.relative_to(folder): load_file(file) for file in folder.rglob("*.safetensors")}
    return {(file, name): w.numpy().tobytes() for file, tensors in files.items() for name, w in tensors.items()}


def runner(models, task):
    """The name of what this task exports, and a function (folder, *flags) that runs two iterations."""
    if task == "toy":
        return "model", lambda out, *more: toy_runs.run(out, "--iterations", "2", *more)
    name, *more = task.split()
    arguments = flags(models, name, *more, "--iterations", 2)
    return "lora" if more else "transformer", lambda out, *more: train(out, [*arguments, *more])


@pytest.mark.parametrize("task", ["toy", slow("flux"), "flux --lora-rank 2"])
def test_exports_are_what_a_shorter_run_ends_with_and_all_are_kept(models, tmp_path, task):
    """Also what a run resumed between two exports writes, with another number of iterations between them."""
    kind, run = runner(models, task)
    run(tmp_path / "whole", "--export-every", "1")
    run(tmp_path / "part", "--export-every", "1", "--iterations", "1")
    shorter, exports = weights(tmp_path / "part" / kind), tmp_path / "whole" / "exports"
    assert weights(exports / "000001" / kind) == shorter
    assert weights(exports / "000002" / kind) == weights(tmp_path / "whole" / kind) != shorter
    run(tmp_path / "part", "--export-every", "2", "--resume")
    assert weights(tmp_path / "part" / "exports") == weights(exports)


def fill_disk(monkeypatch, fault):
    """The function of this name answers for the export of iteration 1 that the disk is full."""
    function = pkgutil.resolve_name(fault)

    def call(*inputs, **named):
        if any("exports/000001" in str(value) for value in inputs if isinstance(value, str | Path)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "FILE")
        return function(*inputs, **named)

    monkeypatch.setattr(fault, call)


SAVE, SAVE_LORA = "full_scale.transformer.save_file", "diffusers.FluxPipeline.save_lora_weights"


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize(
    ("task", "fault"),
    [("toy", "os.mkdir"), ("toy", "runtime.task.save_file"), ("flux", SAVE), ("flux --lora-rank 2", SAVE_LORA)],
)
def test_a_failed_export_is_a_warning_and_changes_nothing_else(models, tmp_path, monkeypatch, capsys, task, fault):
    kind, run = runner(models, task)
    fill_disk(monkeypatch, fault)
    rows = run(tmp_path / "run", "--export-every", "1")
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if "warning: " in line]
    words = "(No space left on device): free some space" if fault == SAVE else "FILE: No space left on device"
    assert warning.endswith(f"{words}; the run continues without it")
    exports = tmp_path / "run" / "exports"
    assert len(rows) == 2 and not weights(exports / "000001") and not [*exports.rglob("*.part")]
    assert weights(exports / "000002" / kind) == weights(tmp_path / "run" / kind)


@pytest.mark.slow
@pytest.mark.parametrize(("more", "fault"), [("", SAVE), ("--lora-rank 2", SAVE_LORA), ("", "os.mkdir")])
def test_an_export_that_fails_on_rank_0_lets_no_other_rank_wait(models, tmp_path, monkeypatch, fault, more):
    fill_disk(monkeypatch, fault)
    arguments = flags(models, "flux", *more.split(), "--iterations", 2, "--export-every", 1, "--out", tmp_path)
    toy_runs.in_group(toy_runs.train_rank, arguments)
    exports = tmp_path / "exports"
    assert weights(exports / "000002") and not weights(exports / "000001") and (tmp_path / "result.json").exists()


@pytest.mark.usefixtures("no_figures")
def test_a_signal_in_the_evaluation_after_an_export_loses_no_export(tmp_path, monkeypatch):
    """The checkpoint that it leaves is that of the export's iteration."""
    arguments, calls = ["--iterations", "4", "--export-every", "2", "--evaluate-every", "2"], []

    def forward(*inputs, forward=VelocityNet.forward):
        calls.append(inputs)
        if len(calls) == 27 + 2 * 21 + 5:  # in the second evaluation, at iteration 2
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(*inputs)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(VelocityNet, "forward", forward)
        toy_runs.run(tmp_path, *arguments)
    assert toy_runs.checkpoints(tmp_path) == ["000002"]
    toy_runs.run(tmp_path, *arguments, "--resume")
    assert sorted(path.name for path in (tmp_path / "exports").iterdir()) == ["000002", "000004"]


def images(folder):
    return {file.name: np.array(Image.open(file)).astype(int) for file in folder.glob("*.png")}


@pytest.mark.parametrize("form", [slow("diffusers metadata"), "peft"])
def test_sample_scales_the_adapters_of_any_format(models, tmp_path, form):
    """At 0 the images are the base's; otherwise those of adapters whose B is multiplied by hand."""
    path, _ = write_lora(models, "flux", tmp_path / "foreign", form)
    train(tmp_path / "run", flags(models, "flux", *LIKE_IT, "--lora", path, "--iterations", 0))
    adapters = tiny.exported(tmp_path / "run")  # with alpha as the rank
    save_file({k: w / 4 if ".lora_B." in k else w for k, w in adapters.items()}, tmp_path / "quarter.safetensors")
    drawings = {"base": [], "zero": ["--lora", path, "--lora-scale", 0], "one": ["--lora", path]}
    drawings |= {"scaled": [*drawings["one"], "--lora-scale", 0.25]}
    drawings |= {"quarter": ["--lora", tmp_path / "quarter.safetensors"]}
    for name, more in drawings.items():
        tool(*sampling(models, tmp_path / name, *more))
    drawn = {name: images(tmp_path / name) for name in drawings}
    difference = lambda a, b: max(abs(drawn[a][file] - drawn[b][file]).max() for file in drawn["base"])  # noqa: E731
    assert difference("base", "zero") == 0 and difference("scaled", "quarter") <= 1
    assert difference("base", "scaled") > 2 and difference("scaled", "one") > 2
    line = refusal(sampling(models, tmp_path / "scaled", "--lora", path, "--lora-scale", 0.5))
    assert "lora_scale was 0.25, is 0.5" in line
