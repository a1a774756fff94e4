"""ImageReward, with transformers' BLIP."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from full_scale.rewards.contract import TextCachingReward
from full_scale.rewards.images import crop, normalise
from full_scale.rewards.weights import check_keys, locate_files, read_state_dict, rename_keys
from runtime.files import read_json

REPOSITORY, CHECKPOINT = "THUDM/ImageReward", "ImageReward.pt"
TOKENIZER_REPOSITORY = "google-bert/bert-base-uncased"

OFFICIAL_NAMES = {
    "blip.text_encoder.": "text_encoder.",
    "mlp.layers.": "head.",
    "blip.visual_encoder.": "vision.",
    "vision.cls_token": "vision.embeddings.class_embedding",
    "vision.pos_embed": "vision.embeddings.position_embedding",
    "vision.patch_embed.proj.": "vision.embeddings.patch_embedding.",
    "vision.norm.": "vision.post_layernorm.",
    "vision.blocks.": "vision.encoder.layers.",
    "norm": "layer_norm",
    "attn.proj.": "self_attn.projection.",
    "attn.qkv.": "self_attn.qkv.",
}
"""Official names of weights: names in this module; for rename_keys, in this order."""

UNUSED = ("blip.vision_proj.", "blip.text_proj.", "blip.text_encoder.embeddings.position_ids")
VIT_LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}


class ImageReward(TextCachingReward):
    """ImageReward v1.0 (arXiv 2304.05977): BLIP's text encoder attends to the image, and linear layers give the score.

    vision, text_encoder: transformers' BlipVisionModel and BlipTextModel.  head: (B, D) to (B, 1).
    """

    mean, std = 0.16717362830052426, 1.0333394966054072
    """Mean and standard deviation of the head's output, from the official code."""

    @classmethod
    def load(cls, weights: str | Path | None = None, device: str | torch.device = "cpu") -> "ImageReward":
        """weights: a hub id, or a folder with ImageReward.pt, med_config.json and the tokenizer of BERT."""
        from transformers import BertTokenizer

        path, folder = locate_files(weights, REPOSITORY, CHECKPOINT, TOKENIZER_REPOSITORY, "med_config.json")
        tokenizer = BertTokenizer.from_pretrained(folder, local_files_only=True)
        reward = cls.from_config(read_json(path.with_name("med_config.json")), tokenizer)
        state = {key: value for key, value in read_state_dict(path).items() if not key.startswith(UNUSED)}
        state = rename_keys(state, OFFICIAL_NAMES)
        check_keys(reward, state, path)
        reward.load_state_dict(state)
        return reward.to(device)

    @classmethod
    def from_config(cls, config: dict[str, Any], tokenizer: Callable) -> "ImageReward":
        """With random weights; config: med_config.json, where `vision` may describe an encoder other than ViT-L."""
        from transformers import BlipTextConfig, BlipVisionConfig, BlipVisionModel
        from transformers.models.blip.modeling_blip_text import BlipTextModel

        vision = {"image_size": 224, "patch_size": 16, "layer_norm_eps": 1e-6} | config.get("vision", VIT_LARGE)
        text = {key: value for key, value in config.items() if key not in ("architectures", "model_type", "vision")}
        # transformers gives cross-attention to decoders only; score_pixels() switches the causal mask off.
        text |= {"encoder_hidden_size": vision["hidden_size"], "is_decoder": True}
        layers = [nn.Linear(text["hidden_size"], 1024), nn.Dropout(), nn.Linear(1024, 128), nn.Dropout()]
        layers += [nn.Linear(128, 64), nn.Dropout(), nn.Linear(64, 16), nn.Linear(16, 1)]
        head, text_encoder = nn.Sequential(*layers), BlipTextModel(BlipTextConfig(**text), add_pooling_layer=False)
        vision = BlipVisionModel(BlipVisionConfig(**vision))
        return cls(vision=vision, text_encoder=text_encoder, head=head, tokenizer=tokenizer)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """(head(text features that attend to the image) - mean) / std."""
        ids, mask = torch.stack(self.text_features(prompts), 1)
        return self.score_pixels(normalise(crop(images, self.vision.config.image_size, round)), ids, mask)

    def score_pixels(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """The score of preprocessed pixels (B, 3, 224, 224) with token ids (B, L) and their attention mask."""
        image_features = self.vision(pixels).last_hidden_state
        hidden = self.text_encoder(
            ids, attention_mask=mask, encoder_hidden_states=image_features, is_decoder=False
        ).last_hidden_state
        return (self.head(hidden[:, 0])[:, 0] - self.mean) / self.std

    def encode_text(self, prompt: str) -> Tensor:
        """Token ids and attention mask, (2, 35); everything after them depends on the image."""
        tokens = self.tokenizer(prompt, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
        return torch.cat([tokens.input_ids, tokens.attention_mask]).to(self.vision.device)
