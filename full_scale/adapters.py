"""LoRA adapters in a file: those of a run, or any that diffusers or peft read."""

import math
import re
import shlex
from collections.abc import Collection, Iterable
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from full_scale.components import PEFT_FILE, check_finite, loading, weight_files
from full_scale.pipeline import Family
from full_scale.transformer import chosen_layers, linear_layers, lora_scale
from leap_align import BadInput, require
from runtime.files import check_no_pipe
from runtime.processes import one_line


def adapters_path(path: Path) -> Path:
    """The folder of a file that peft wrote, beside which its config is; any other path itself."""
    return path.parent if path.name == PEFT_FILE else path


def load_adapters(path: Path, family: Family, model: nn.Module) -> dict[str, Tensor]:
    """Adds the adapters in a folder or a file to a transformer; returns their weights by diffusers' names.

    The formats are peft's, and those that the loader of the family's pipeline in diffusers reads.
    Refuses damaged files, and adapters of layers that the transformer does not have: diffusers would ignore them.
    """
    from peft import LoraConfig

    path = adapters_path(path)
    file = next(iter(weight_files(path)), path / "pytorch_lora_weights.safetensors") if path.is_dir() else path
    adapters = read_adapters(file)
    with loading(f"{path} does not fit {family.title}"):
        if file.name == PEFT_FILE:
            adapters = {name.replace("base_model.model.", "transformer.", 1): w for name, w in adapters.items()}
            settings = LoraConfig.from_pretrained(path).to_dict().items()
            alphas, metadata = [], {f"transformer.{name}": value for name, value in settings}
        else:
            options = {"return_alphas": True, "return_lora_metadata": True}  # FLUX.1's loader alone returns alphas
            options |= {"local_files_only": True, "use_safetensors": True}
            adapters, *alphas, metadata = family.pipeline_class.lora_state_dict(file, **options)
        check_layers(path, adapters, model)
        scaling = {"metadata": metadata, "network_alphas": alphas[0] if alphas else None}
        model.load_lora_adapter(adapters, low_cpu_mem_usage=True, **scaling)
    return adapters


def read_adapters(file: Path) -> dict[str, Tensor]:
    """The tensors in a file of adapters; refuses a damaged one, and DoRA's scales, which diffusers would drop."""
    remedy = "give the folder lora/ of a run, or the file of a LoRA"
    try:
        adapters = load_file(check_no_pipe(file))
    except (OSError, SafetensorError) as error:
        fault = f"is damaged ({one_line(error)}): restore it" if file.exists() else f"does not exist: {remedy}"
        raise BadInput(f"{file} {fault}") from error
    check_finite(adapters, file)
    require(adapters, f"{file} holds no adapters: {remedy}")
    dora = next((name for name in adapters if "dora_scale" in name), None)
    require(dora is None, f"{file} holds {dora} of a DoRA: give a LoRA")
    return adapters


def check_layers(path: Path, adapters: dict[str, Tensor], model: nn.Module) -> None:
    """Refuses adapters that fit no layer of the transformer."""
    layers = dict(model.named_modules())
    for name, weight in adapters.items():
        layer, _, side = name.removeprefix("transformer.").partition(".lora_")
        axis = 1 if side.startswith("A") else 0  # A is (rank, in), B is (out, rank)
        fits = layer in layers and weight.shape[axis] == layers[layer].weight.shape[axis]
        require(fits, f"{path} does not fit the model: {layer} is not one of its layers, or has another size")


def adapters_of_run(path: Path, family: Family, empty: nn.Module, model: nn.Module) -> dict[str, Tensor]:
    """The adapters in a folder or a file as parameters of a model with adapters, which then has the same function.

    Whatever alpha the file has, B is scaled for the model's own.  empty: the transformer without adapters, on the meta
    device; it gets the file's.  Refuses adapters of other layers, another rank or another kind than the model's.
    """
    from peft.tuners.lora import Linear

    layers = linear_layers(empty)
    weights = {name.removeprefix("transformer."): w.float() for name, w in load_adapters(path, family, empty).items()}
    found, own = ({n: m for n, m in part.named_modules() if isinstance(m, Linear)} for part in (empty, model))
    expected = {f"{name}.lora_{side}.weight" for name in found for side in "AB"}
    other = min(weights.keys() ^ expected, default=None)
    require(other is None, f"lora={path} is not whole, or no plain LoRA ({other}): give another file")
    ranks = sorted({rank for layer in found.values() for rank in layer.r.values()})
    require(len(ranks) == 1, f"lora={path} has adapters of several ranks {ranks}: give a LoRA with one")
    if found.keys() != own.keys() or ranks != [model.peft_config["default"].r]:
        remedy = f"give --lora-rank {ranks[0]} --lora-targets {shlex.join(targets_of(found, layers))}"
        raise BadInput(f"lora={path} has adapters of other layers than the run, or of another rank: {remedy}")
    state = {}
    for name, layer in found.items():
        (scale,) = layer.scaling.values()
        require(0 < scale < math.inf, f"lora={path} scales {name} by {scale}: its alpha must be positive and finite")
        state[f"{name}.lora_A.default.weight"] = weights[f"{name}.lora_A.weight"]
        state[f"{name}.lora_B.default.weight"] = weights[f"{name}.lora_B.weight"] * (scale / lora_scale(model))
    return state


def targets_of(chosen: Collection[str], layers: Iterable[str]) -> list[str]:
    """The shortest --lora-targets that choose exactly these of a model's linear layers."""
    targets = set()
    for name in chosen:
        parts = name.split(".")
        ends = [".".join(parts[i:]) for i in reversed(range(len(parts))) if not parts[i].isdigit()]
        choices = (choice for end in ends for choice in (re.sub(r"\.\d+\.", ".*.", end), end))
        target = next((choice for choice in choices if chosen_layers(choice, layers) <= set(chosen)), None)
        fault = f"the LoRA adapts {name} and not all layers that end so, which peft cannot choose"
        require(target, f"{fault}: give another one")
        targets.add(target)
    return sorted(targets)
