"""PickScore, with transformers' CLIP."""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from full_scale.rewards.contract import TextCachingReward
from full_scale.rewards.images import crop, normalise
from full_scale.rewards.weights import load_pretrained, locate_files, read_state_dict
from runtime.files import read_json

REPOSITORY, CHECKPOINT = "yuvalkirstain/PickScore_v1", "model.safetensors"
TOKENIZER_REPOSITORY = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


class PickScore(TextCachingReward):
    """PickScore (arXiv 2305.01569): exp(logit_scale) cos(image, text) / 100, of a fine-tuned CLIP ViT-H-14.

    model: transformers' CLIPModel.  The paper's lambda is for the score divided by 100; others report it undivided.
    """

    @classmethod
    def load(cls, weights: str | Path | None = None, device: str | torch.device = "cpu") -> "PickScore":
        """weights: a hub id, or a folder with config.json, model.safetensors and the tokenizer of CLIP ViT-H-14."""
        from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

        path, folder = locate_files(weights, REPOSITORY, CHECKPOINT, TOKENIZER_REPOSITORY, "config.json")
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        config = CLIPConfig.from_dict(read_json(path.with_name("config.json")))
        model = load_pretrained(CLIPModel, config, read_state_dict(path), path)
        return cls(model=model, tokenizer=tokenizer).to(device)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """exp(logit_scale) cos(image, text) / 100."""
        side = self.model.config.vision_config.image_size
        return self.score_pixels(normalise(crop(images, side, math.floor)), prompts)

    def score_pixels(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        """The score of preprocessed pixels (B, 3, 224, 224)."""
        image_features = F.normalize(self.model.get_image_features(pixels).pooler_output, dim=1)
        cosine = (image_features * torch.stack(self.text_features(prompts))).sum(1)
        return self.model.logit_scale.exp() * cosine / 100

    def encode_text(self, prompt: str) -> Tensor:
        """(D,), of length 1."""
        tokens = self.tokenizer(prompt, truncation=True, max_length=77, return_tensors="pt").to(self.model.device)
        return F.normalize(self.model.get_text_features(**tokens).pooler_output, dim=1)[0]
