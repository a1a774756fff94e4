"""Runs that start from exported weights: adapters of any origin, a whole transformer; exports along a run's way."""

import os
import signal

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
    return {layer: b[layer] @ a[layer] for layer in a}


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


@pytest.mark.parametrize("name", ["flux", slow("sd3"), slow("klein")])
@pytest.mark.parametrize("more", ["--lr 0.01", "--lr 0.1 --lora-rank 2 --lora-alpha 5"], ids=["transformer", "lora"])
def test_a_run_continues_from_an_export_of_another_and_its_leash_holds_the_base(models, tmp_path, name, more):
    """Its first evaluation is that of the export's iteration; the leash is zero in a run that starts at the base."""
    first, second, kind = tmp_path / "first", tmp_path / "second", "lora" if "lora" in more else "transformer"
    arguments = flags(models, name, *more.split(), "--beta", 1, "--iterations", 2)
    cold = train(first, [*arguments, "--export-every", 1])
    exported = [f"--{kind}", first / "exports" / "000002" / kind]
    warm = train(second, [*arguments, *exported])
    expected, found = (read_csv(run / "evaluations.csv") for run in (first, second))
    before, after, start = ({k: float(v) for k, v in row.items() if k != "iteration"} for row in (*expected, found[0]))
    assert start == pytest.approx(after, abs=1e-5) and start != pytest.approx(before, abs=1e-4)
    assert cold[0]["leash"] == 0 and warm[0]["leash"] > 1e-4
    train(tmp_path / "part", [*arguments, *exported, "--iterations", 1])
    assert train(tmp_path / "part", [*arguments, "--resume"]) == warm  # which needs the export no more


def weights(folder):
    """The bytes of every tensor; the metadata in a file have no fixed order."""
    files = {file.relative_to(folder): load_file(file) for file in folder.rglob("*.safetensors")}
    return {(file, name): w.numpy().tobytes() for file, tensors in files.items() for name, w in tensors.items()}


@pytest.mark.parametrize("task", ["toy", "flux", "flux --lora-rank 2"])
def test_exports_are_what_a_shorter_run_ends_with_and_all_are_kept(models, tmp_path, task):
    """Also what a run resumed between two exports writes."""
    if task == "toy":
        kind, run = "model", lambda out, *more: toy_runs.run(out, "--iterations", "2", *more)
    else:
        name, *more = task.split()
        arguments, kind = flags(models, name, *more, "--iterations", 2), "lora" if more else "transformer"
        run = lambda out, *more: train(out, [*arguments, *more])  # noqa: E731
    run(tmp_path / "whole", "--export-every", "1")
    run(tmp_path / "part", "--export-every", "1", "--iterations", "1")
    shorter, exports = weights(tmp_path / "part" / kind), tmp_path / "whole" / "exports"
    assert weights(exports / "000001" / kind) == shorter
    assert weights(exports / "000002" / kind) == weights(tmp_path / "whole" / kind) != shorter
    run(tmp_path / "part", "--export-every", "1", "--resume")
    assert weights(tmp_path / "part" / "exports") == weights(exports)


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
