"""Weights and tokenizers from a local path or the Hugging Face hub, and the check that weights fit their model."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from leap_align import BadInput, require
from runtime.files import check_no_pipe
from runtime.processes import one_line

SUFFIXES = (".pt", ".pth", ".bin", ".safetensors")  # the suffixes of weights files

IGNORED = ["*.fp16.*", "*.gguf"]  # what no program here reads

TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json")


def local_path(weights: str | Path | None) -> Path | None:
    """The existing file or folder that `weights` names; None for a hub id, or if no weights are given."""
    if weights is None:
        return None
    path = Path(weights)
    is_hub_id = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", str(weights)) and path.suffix not in SUFFIXES
    require(path.exists() or is_hub_id, f"{weights} does not exist: give a file, a folder or a hub id (owner/name)")
    for file in path.iterdir() if path.is_dir() else ():
        check_no_pipe(file)
    return path if path.exists() else None


def download(
    repository: str, *files: str, flag: str = "--reward-weights", by_hand: Sequence[str] | None = None
) -> Path:
    """Downloads files (patterns) of a hub repository and returns their folder.

    For the error message: the option that takes a local path instead, and what to download then, if it is not `files`.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    # Other files of a repository, such as a second copy of the weights, would only cost time.
    patterns = [f"--include '{file}'" for file in by_hand or files] + [f"--exclude '{file}'" for file in IGNORED]
    command = f"`hf download {repository} {' '.join(patterns)} --local-dir DIR`"
    remedy = f"check the network, or run {command} where there is one, and give {flag} DIR"
    unreachable = f"the Hugging Face hub cannot be reached for {repository}: {remedy}"
    try:
        return Path(snapshot_download(repository, allow_patterns=files, ignore_patterns=IGNORED))
    except GatedRepoError as error:
        remedy = f"accept its licence at https://huggingface.co/{repository}, then log in with `hf auth login`"
        raise BadInput(f"{repository} is gated: {remedy}") from error
    except LocalEntryNotFoundError as error:  # also an HfHubHTTPError
        raise BadInput(unreachable) from error
    except (HfHubHTTPError, HFValidationError) as error:
        remedy = "check the name, or log in with `hf auth login`"
        raise BadInput(f"the hub does not give {repository} ({one_line(error)}): {remedy}") from error
    except OSError as error:
        raise BadInput(unreachable) from error


def locate_files(
    weights: str | Path | None, repository: str, file: str, tokenizer_repository: str, *other_files: str
) -> tuple[Path, Path]:
    """The weights file and the tokenizer's folder: both local if `weights` is a local path, else both from the hub.

    weights: a file, a folder with `file`, a hub id, or None for `repository`.  other_files: to download beside `file`.
    """
    path = local_path(weights)
    if path is None:
        path = download(str(weights or repository), file, *other_files) / file
        folder = download(tokenizer_repository, "config.json", *TOKENIZER_FILES)
    else:
        folder = path.parent if path.is_file() else path
        path = path if path.is_file() else path / file
    # Without this check transformers would silently make an empty tokenizer.
    has_tokenizer = any((folder / name).exists() for name in ("tokenizer.json", "vocab.json", "vocab.txt"))
    require(has_tokenizer, f"{folder} holds no tokenizer: copy the tokenizer files of {tokenizer_repository} into it")
    return path, folder


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The state dict in a safetensors file or in a torch.save file; pickled code is refused."""
    require(check_no_pipe(path).exists(), f"{path} does not exist: a folder of weights must hold {path.name}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return dict(state.get("state_dict", state))
    except Exception as error:  # each file format raises its own errors, and all mean the same
        reason = one_line(error) or type(error).__name__
        raise BadInput(f"{path} cannot be read as weights ({reason}): download it again") from error


def rename_keys(state: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    """Applies each replacement (old: new) in turn; `old` matches at the start of a key or after a dot."""
    for old, new in names.items():
        state = {f".{key}".replace(f".{old}", f".{new}")[1:]: value for key, value in state.items()}
    return state


def check_keys(model: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Raises BadInput unless the state dict has the model's keys and shapes."""
    expected = model.state_dict()
    wrong_keys = {
        "missing": expected.keys() - state.keys(),
        "unexpected": state.keys() - expected.keys(),
        "of another shape": {key for key in expected.keys() & state.keys() if expected[key].shape != state[key].shape},
    }
    if any(wrong_keys.values()):
        counts = [f"{len(k)} {problem}, such as {', '.join(sorted(k)[:2])}" for problem, k in wrong_keys.items() if k]
        remedy = "use the file of the reward's own repository"
        raise BadInput(f"{path} does not hold this reward's weights ({'; '.join(counts)}): {remedy}")


def load_pretrained(
    model_class: type, config: Any, state: dict[str, Tensor], path: Path, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """A transformers model with these weights; raises BadInput if they do not fit it."""
    state = {key: value for key, value in state.items() if not key.endswith("position_ids")}  # buffers of old versions
    with torch.device("meta"):
        check_keys(model_class(config), state, path)
    return model_class.from_pretrained(None, config=config, state_dict=state, dtype=dtype)
