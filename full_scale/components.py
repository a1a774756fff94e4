"""One component of a diffusers pipeline: check its files, load it."""

import json
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from leap_align import BadInput, require
from runtime.files import check_no_pipe, read_json
from runtime.processes import one_line

PEFT_FILE = "adapter_model.safetensors"  # beside adapter_config.json
REMEDY = "restore it, or download it again"
MAIN_FILES = {"diffusers": "diffusion_pytorch_model.safetensors", "transformers": "model.safetensors"}
READ = f"""config.json generation_config.json scheduler_config.json preprocessor_config.json tokenizer_config.json
tokenizer.json tokenizer.model spiece.model vocab.json vocab.txt merges.txt added_tokens.json special_tokens_map.json
chat_template.json chat_template.jinja adapter_config.json
{" ".join(f"{name}.index.json" for name in MAIN_FILES.values())}""".split()
"""What diffusers and transformers read in a component's folder, beside weights."""


@contextmanager
def loading(what: str) -> Iterator[None]:
    """Turns whatever diffusers and transformers raise for unexpected content into one line that starts with a text."""
    try:
        yield
    except (BadInput, ImportError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise BadInput(f"{what} ({one_line(error)}): {REMEDY}") from error


def network_from_config(config: dict[str, Any]) -> nn.Module:
    """The network of a config.json of diffusers or transformers, on the meta device."""
    import diffusers
    import transformers

    with loading("a config.json describes no network"), torch.device("meta"):
        if "_class_name" in config:
            return getattr(diffusers, config["_class_name"]).from_config(config)
        kind = getattr(transformers, config["architectures"][0])
        return kind(kind.config_class(**config))


def load_component(folder: Path, kind: Any, dtype: torch.dtype) -> Any:
    """A network, tokenizer or scheduler from its folder; kind: its class.

    Raises BadInput that names the file for damaged files, and for weights that are missing or of another model.
    """
    check_files(folder)
    options: dict[str, Any] = {"local_files_only": True}
    is_network = isinstance(kind, type) and issubclass(kind, nn.Module)
    if is_network:
        options |= {"dtype": dtype, "use_safetensors": True, "output_loading_info": True}
    config = folder / getattr(kind, "config_name", "config.json")
    if is_network or config.is_file():
        name = read_json(config).get("_class_name", kind.__name__)  # transformers' configs name none
        remedy = "choose the files of this pipeline's kind"
        require(name == kind.__name__, f"{folder} holds a {name}, not a {kind.__name__}: {remedy}")
    with loading(f"{folder} cannot be loaded as {kind.__name__}"):
        loaded = kind.from_pretrained(folder, **options)
    if is_network and (missing := sorted(loaded[1]["missing_keys"])):
        raise BadInput(f"weights are missing in {folder} ({len(missing)}, such as {missing[0]}): {REMEDY}")
    if is_network:
        check_finite(loaded[0].state_dict(), folder)
    return loaded[0] if is_network else loaded


def check_files(folder: Path) -> None:
    """Refuses a component's folder with a damaged file, or a tokenizer's that is not complete."""
    require(folder.is_dir(), f"{folder} does not exist: {REMEDY}")
    for file in folder.iterdir():
        check_no_pipe(file)
    for file in sorted(filter(is_read, folder.glob("*.json"))):
        read_json(file)
    weight_shapes(folder)
    if folder.name.startswith("tokenizer"):  # transformers silently takes an empty vocabulary and an unlimited length
        vocabularies, config = ("tokenizer.json", "vocab.json", "spiece.model"), folder / "tokenizer_config.json"
        has_vocabulary = any((folder / name).is_file() for name in vocabularies)
        require(has_vocabulary, f"{folder} holds no vocabulary ({', '.join(vocabularies)}): {REMEDY}")
        is_number = isinstance(read_json(config).get("model_max_length"), int | float)
        require(is_number, f"{config} gives no model_max_length: {REMEDY}")


def is_read(file: Path) -> bool:
    """Whether diffusers or transformers read this file: not a variant, a copy, or what an operating system left."""
    return file in weight_files(file.parent) if file.suffix == ".safetensors" else file.name in READ and file.is_file()


def read_config(folder: Path) -> dict[str, Any]:
    """A network's config.json; refuses quantised weights, and rotations that do not fit a head of FLUX."""
    config = read_json(folder / "config.json")
    message = f"{folder} holds quantised weights (quantization_config): choose those of the published pipeline"
    require("quantization_config" not in config, message)
    if (axes := config.get("axes_dims_rope")) is not None:
        size = config.get("attention_head_dim", 128)
        with loading(fault := f"{folder}/config.json: axes_dims_rope={axes} are not even numbers of sum {size}"):
            require(sum(axes) == size and not any(n % 2 for n in axes), f"{fault}: {REMEDY}")
    return config


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a component's weights, as diffusers or transformers choose them; none in other folders.

    Others beside them, such as a variant `.fp16.` or a copy, are never read.
    """
    config = folder / "config.json"
    if not config.is_file():
        adapters = (folder / name for name in ("pytorch_lora_weights.safetensors", PEFT_FILE))
        return [path for path in adapters if path.is_file()][:1]
    is_of_diffusers = "_class_name" in read_config(folder)
    main = check_no_pipe(folder / MAIN_FILES["diffusers" if is_of_diffusers else "transformers"])
    index = folder / f"{main.name}.index.json"
    if not index.is_file() or (main.is_file() and not is_of_diffusers):  # with both, diffusers reads the index's files
        return [main] if main.is_file() else []
    names = read_json(index).get("weight_map")
    is_map = isinstance(names, dict) and all(isinstance(name, str) for name in names.values())
    require(is_map, f"{index} has no weight_map of names of files: {REMEDY}")
    for name in names.values():
        require(Path(name).name == name, f"{index} names {name!r:.80}, which is not in its folder: {REMEDY}")
    return [check_no_pipe(folder / name) for name in sorted(set(names.values()))]


def check_finite(weights: Mapping[str, Tensor], folder: Path) -> None:
    """Refuses weights that were read from a folder, or a rank's part of them, with NaN or infinite numbers."""
    for name, value in weights.items():
        value = value.to_local() if isinstance(value, DTensor) else value
        is_plain = type(value) is Tensor  # torchao's four-bit weights know no isfinite
        if is_plain and value.is_floating_point() and not value.isfinite().all():
            source = next((file for file in weight_files(folder) if _holds(file, name)), folder)
            raise BadInput(f"{source}: {name} holds NaN or infinite numbers: {REMEDY}")


def _holds(file: Path, name: str) -> bool:
    with safe_open(file, "pt") as weights:
        return any(key.endswith(name) for key in weights.keys())  # transformers removes prefixes


def check_format(folder: Path) -> None:
    """Refuses a network's folder whose weights have only names that are not read; pickled ones might run code."""
    settings = read_config(folder) if (folder / "config.json").is_file() else {}
    library = "diffusers" if "_class_name" in settings else "transformers"
    kind = settings.get("_class_name") or settings.get("architectures") or ""
    kind = kind[0] if isinstance(kind, list) else kind
    is_name = str(kind).isidentifier()  # the line below is to be executed
    suffixes = (".bin", ".pt", ".pth", ".ckpt", ".safetensors") if is_name else ()
    for file in sorted(file for file in folder.glob("[!.]*") if file.suffix in suffixes):
        name = json.dumps(str(folder), ensure_ascii=False)
        code = f"from {library} import {kind}; {kind}.from_pretrained({name}, use_safetensors=False)"
        convert = f"if you trust it, convert it: python -c {shlex.quote(f'{code}.save_pretrained({name})')}"
        remedy = "rename it" if file.suffix == ".safetensors" else convert
        raise BadInput(f"{folder} holds {file.name}, but no {MAIN_FILES[library]}: {remedy}")


def weight_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every weight in a component's files; reads no weights."""
    shapes = {}
    if not (files := weight_files(folder)):
        check_format(folder)
    for path in files:
        try:
            with safe_open(path, "pt") as file:
                shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
        except (OSError, SafetensorError) as error:
            fault = "damaged" if path.exists() else "missing"
            raise BadInput(f"{path} is {fault} ({one_line(error)}): {REMEDY}") from error
    return shapes
