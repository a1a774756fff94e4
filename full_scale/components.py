"""One component of a diffusers pipeline: check its files, load it."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from leap_align import BadInput
from runtime.processes import one_line
from runtime.run_dir import read_json

REMEDY = "restore it, or download it again"
LOADING_ERRORS = (OSError, ValueError, TypeError, KeyError, AttributeError, IndexError, RuntimeError, SafetensorError)
"""What diffusers and transformers raise for files with unexpected content."""


def load_component(folder: Path, kind: Any, dtype: torch.dtype) -> Any:
    """A network, tokenizer or scheduler from its folder; kind: its class.

    Raises BadInput that names the file for damaged files, and for weights that are missing or of another model.
    """
    check_files(folder)
    options: dict[str, Any] = {"local_files_only": True}
    is_network = isinstance(kind, type) and issubclass(kind, nn.Module)
    if is_network:
        _check_class(folder, kind)
        options |= {"dtype": dtype, "use_safetensors": True, "output_loading_info": True}
    try:
        loaded = kind.from_pretrained(folder, **options)
    except LOADING_ERRORS as error:
        raise BadInput(f"{folder} cannot be loaded as {kind.__name__} ({one_line(error)}): {REMEDY}") from error
    if not is_network:
        return loaded
    network, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise BadInput(f"weights are missing in {folder} ({len(missing)}, such as {missing[0]}): {REMEDY}")
    return network


def _check_class(folder: Path, kind: type[nn.Module]) -> None:
    """Refuses a network of another class; transformers' configs name none."""
    name = read_json(folder / "config.json").get("_class_name", kind.__name__)
    if name != kind.__name__:
        raise BadInput(f"{folder} holds a {name}, not a {kind.__name__}: choose the weights of this pipeline's kind")


def check_files(folder: Path) -> None:
    """Refuses a component's folder with a damaged file, or a tokenizer's that is not complete."""
    if not folder.is_dir():
        raise BadInput(f"{folder} does not exist: {REMEDY}")
    for file in sorted(folder.glob("*.json")):
        read_json(file)
    weight_shapes(folder)
    if folder.name.startswith("tokenizer"):
        _check_tokenizer(folder)


def _check_tokenizer(folder: Path) -> None:
    """transformers would take an empty vocabulary and no limit of length without a word."""
    vocabularies = "tokenizer.json", "vocab.json", "spiece.model"
    if not any((folder / name).is_file() for name in vocabularies):
        raise BadInput(f"{folder} holds no vocabulary ({', '.join(vocabularies)}): {REMEDY}")
    config = folder / "tokenizer_config.json"
    if "model_max_length" not in read_json(config):
        raise BadInput(f"{config} gives no model_max_length: {REMEDY}")


def weight_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every weight in a folder's *.safetensors files; reads no weights."""
    shapes = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
        except (OSError, SafetensorError) as error:
            raise BadInput(f"{path} is damaged ({one_line(error)}): {REMEDY}") from error
    return shapes
