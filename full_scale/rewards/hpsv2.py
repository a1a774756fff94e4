"""HPSv2.1, with open_clip."""

import math
from pathlib import Path

import torch
from torch import Tensor

from full_scale.rewards.contract import TextCachingReward
from full_scale.rewards.images import letterbox, normalise
from full_scale.rewards.weights import check_keys, download, local_path, read_state_dict
from runtime.files import read_json

REPOSITORY, CHECKPOINT = "xswu/HPSv2", "HPS_v2.1_compressed.pt"


class HPSv2(TextCachingReward):
    """HPSv2.1 (arXiv 2306.09341): cos(image, text) of CLIP ViT-H-14's features, without the logit scale.

    model: an open_clip CLIP.  tokenizer: texts to (B, 77).
    """

    @classmethod
    def load(cls, weights: str | Path | None = None, device: str | torch.device = "cpu") -> "HPSv2":
        """weights: HPS_v2.1_compressed.pt, the same as safetensors, a hub id, or a folder in open_clip's layout."""
        path = local_path(weights) or download(str(weights or REPOSITORY), CHECKPOINT) / CHECKPOINT
        folder = path if path.is_dir() else None
        reward, path = cls.empty(folder), path / "open_clip_model.safetensors" if folder else path
        state, model = read_state_dict(path), reward.model
        check_keys(model, state, path)
        model.load_state_dict(state, assign=True)
        # No checkpoint holds the causal mask, so it is still on the meta device.
        mask = torch.full((model.context_length, model.context_length), -math.inf).triu(1)
        model.register_buffer("attn_mask", mask, persistent=False)
        return reward.to(device, torch.float32)

    @classmethod
    def empty(cls, folder: Path | None = None) -> "HPSv2":
        """The architecture without weights, on the meta device.  folder: in open_clip's layout; ViT-H-14 by default."""
        import open_clip

        config = open_clip.get_model_config("ViT-H-14")
        if folder is not None:
            config = read_json(folder / "open_clip_config.json")["model_cfg"]
        with torch.device("meta"):
            model = open_clip.CLIP(**config)
        return cls(model=model, tokenizer=open_clip.SimpleTokenizer(context_length=model.context_length))

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """cos(image, text), in [-1, 1]."""
        size = self.model.visual.image_size  # of a ViT (H, W), of a ResNet one number
        pixels = normalise(letterbox(images, size[0] if isinstance(size, tuple) else size))
        image_features = self.model.encode_image(pixels, normalize=True)
        return (image_features * torch.stack(self.text_features(prompts))).sum(1)

    def encode_text(self, prompt: str) -> Tensor:
        """(D,), of length 1."""
        tokens = self.tokenizer(prompt).to(self.model.positional_embedding.device)
        return self.model.encode_text(tokens, normalize=True)[0]
