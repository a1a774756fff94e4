"""HPSv2.1, with open_clip."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from full_scale.rewards.contract import TextCachingReward
from full_scale.rewards.images import letterbox, normalise
from full_scale.rewards.weights import check_keys, download, local_path, read_json, read_state_dict

REPOSITORY, CHECKPOINT = "xswu/HPSv2", "HPS_v2.1_compressed.pt"


class HPSv2(TextCachingReward):
    """HPSv2.1 (arXiv 2306.09341): cos(image, text) of CLIP ViT-H-14's features, without the logit scale.

    model: an open_clip CLIP.  tokenizer: texts to (B, 77).
    """

    def __init__(self, model: nn.Module, tokenizer: Callable[[str], Tensor]) -> None:
        super().__init__(model=model, tokenizer=tokenizer)

    @classmethod
    def load(cls, weights: str | Path | None = None, device: str | torch.device = "cpu") -> "HPSv2":
        """weights: HPS_v2.1_compressed.pt, the same as safetensors, a hub id, or a folder in open_clip's layout."""
        import open_clip

        path = local_path(weights) or download(str(weights or REPOSITORY), CHECKPOINT) / CHECKPOINT
        config = open_clip.get_model_config("ViT-H-14")
        if path.is_dir():
            config = cls.read_config(path)
            path = path / "open_clip_model.safetensors"
        state, reward = read_state_dict(path), cls.empty(config)
        model = reward.model
        check_keys(model, state, path)
        model.load_state_dict(state, assign=True)
        # No checkpoint holds the causal mask, so it is still on the meta device.
        length = model.context_length
        model.register_buffer("attn_mask", torch.full((length, length), -math.inf).triu(1), persistent=False)
        return reward.to(device, torch.float32)

    @staticmethod
    def read_config(folder: Path) -> dict[str, Any]:
        """The architecture of a folder in open_clip's layout."""
        return read_json(folder / "open_clip_config.json")["model_cfg"]

    @classmethod
    def empty(cls, config: dict[str, Any] | None = None) -> "HPSv2":
        """The architecture without weights, on the meta device.  config: open_clip's, ViT-H-14 if not given."""
        import open_clip

        with torch.device("meta"):
            model = open_clip.CLIP(**(config or open_clip.get_model_config("ViT-H-14")))
        return cls(model, open_clip.SimpleTokenizer(context_length=model.context_length))

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """cos(image, text), in [-1, 1]."""
        pixels = normalise(letterbox(images, self.model.visual.image_size[0]))
        image_features = self.model.encode_image(pixels, normalize=True)
        return (image_features * torch.stack(self.text_features(prompts))).sum(1)

    def encode_text(self, prompt: str) -> Tensor:
        """(D,), of length 1."""
        tokens = self.tokenizer(prompt).to(self.model.positional_embedding.device)
        return self.model.encode_text(tokens, normalize=True)[0]
