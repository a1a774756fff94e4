"""Short digests of what runs and tools read, of texts, files and tensors: a moved file keeps its digest."""

import hashlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from full_scale.components import is_read
from full_scale.rewards import REWARDS
from runtime.files import digest, digest_files


def prompts_content(prompts: Sequence[str]) -> str:
    """The digest of a list of texts."""
    return _short(digest("\n".join(prompts).encode()))


def files_content(path: Path, *subfolders: str) -> str:
    """The digest of a file, or of what diffusers and transformers read from a folder's subfolders (patterns)."""
    if path.is_file():
        return _short(digest(path))
    suffixes = [".json", ".txt", ".model", ".safetensors"]
    if any(template for name in subfolders for template in path.glob(f"{name}/*.jinja")):
        suffixes.append(".jinja")  # a tokenizer's chat template; digests of folders without one stay what they were
    patterns = [f"{name}/*{suffix}" for name in subfolders for suffix in suffixes]
    digests = [digest_files(path, filter(is_read, path.glob(pattern))) for pattern in patterns]
    return _short(digest("".join(digests).encode()))


def tensors_content(tensors: Mapping[str, Tensor]) -> str:
    """The digest of named tensors, on whatever device they are."""
    total = hashlib.blake2b()
    for name, value in tensors.items():
        total.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        total.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return _short(total.hexdigest())


def reward_content(reward: str, model: nn.Module) -> str:
    """The digest of a reward's weights, and of the source file of each custom reward in it.

    reward: the text that `rewards.load` made the model of.
    """
    names = [term.strip().split(":")[0] for term in reward.split(",")]
    sources = [getattr(sys.modules.get(name), "__file__", None) for name in names if name not in REWARDS]
    tensors = {name: value for name, value in model.state_dict().items() if torch.is_tensor(value)}
    digests = [tensors_content(tensors), *(digest(Path(file)) for file in sources if file)]
    return _short(digest(" ".join(digests).encode()))


def _short(whole_digest: str) -> str:
    """A digest as settings.json and error messages show it."""
    return f"content {whole_digest[:12]}"
