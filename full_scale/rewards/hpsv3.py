"""HPSv3, with transformers' Qwen2-VL."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from full_scale.rewards.contract import TextCachingReward
from full_scale.rewards.images import normalise, resize_like_pil
from full_scale.rewards.weights import check_keys, load_pretrained, locate_files, read_state_dict, rename_keys
from leap_align import require
from runtime.files import read_json

REPOSITORY, CHECKPOINT = "MizzenAI/HPSv3", "HPSv3.safetensors"
TOKENIZER_REPOSITORY = "Qwen/Qwen2-VL-7B-Instruct"

OFFICIAL_NAMES = {"model.": "language_model.", "rm_head.": "head."}
"""Official names of weights: names in this module; for rename_keys."""

REWARD_TOKEN = "<|Reward|>"


class HPSv3(TextCachingReward):
    """HPSv3 (arXiv 2508.03789): Qwen2-VL reads image, instruction and prompt; its head gives mu and sigma; mu counts.

    body: transformers' Qwen2VLModel, in float32 or bfloat16.  head: (B, D) to (B, 2), in float32.
    """

    def __init__(self, body: nn.Module, head: nn.Module, tokenizer: Callable) -> None:
        super().__init__(body=body, head=head, tokenizer=tokenizer)
        body.activation_checkpointing_enable()
        body.disable_input_require_grads()  # the line above sets it; here the pixels already have gradient
        for layer in body.modules():
            if hasattr(layer, "gradient_checkpointing"):
                layer.training = True  # transformers recomputes only in training mode; the layer's parts stay in eval
        self.reward_token_id = tokenizer.convert_tokens_to_ids(REWARD_TOKEN)

    @classmethod
    def load(
        cls, weights: str | Path | None = None, device: str | torch.device = "cpu", precision: torch.dtype | None = None
    ) -> "HPSv3":
        """weights: a hub id, or a folder with HPSv3.safetensors and Qwen2-VL-7B-Instruct's config.json and tokenizer.

        precision: of the language model; by default bfloat16, as in HPSv3's training, and float32 on a CPU.
        """
        from transformers import Qwen2Tokenizer, Qwen2VLConfig, Qwen2VLModel

        path, folder = locate_files(weights, REPOSITORY, CHECKPOINT, TOKENIZER_REPOSITORY)
        tokenizer = Qwen2Tokenizer.from_pretrained(folder, local_files_only=True)
        tokenizer.add_special_tokens({"additional_special_tokens": [REWARD_TOKEN]})
        config = Qwen2VLConfig.from_dict(read_json(folder / "config.json"))
        state = rename_keys(read_state_dict(path), OFFICIAL_NAMES)
        head = cls.new_head(config.text_config.hidden_size)
        head_state = {key.removeprefix("head."): state.pop(key) for key in list(state) if key.startswith("head.")}
        check_keys(head, head_state, path)
        head.load_state_dict(head_state)
        state.pop("lm_head.weight", None)  # it would predict the next token
        if "language_model.embed_tokens.weight" in state:  # one row more than Qwen2-VL's, for <|Reward|>
            config.text_config.vocab_size = len(state["language_model.embed_tokens.weight"])
        precision = precision or (torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16)
        return cls(load_pretrained(Qwen2VLModel, config, state, path, precision), head, tokenizer).to(device)

    @staticmethod
    def new_head(width: int) -> nn.Module:
        """A head with random weights: (B, width) to mu and sigma, (B, 2)."""
        hidden = [nn.Linear(width, 1024), nn.ReLU(), nn.Dropout(), nn.Linear(1024, 16), nn.ReLU()]
        return nn.Sequential(*hidden, nn.Linear(16, 2))

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """mu."""
        height, width = resized_size(*images.shape[2:])
        image_tokens, image_id = height * width // 28**2, self.body.config.image_token_id
        # The cached texts hold one image token; the image's size decides how many the model needs.
        texts = self.text_features(prompts)
        texts = [ids.repeat_interleave(torch.where(ids == image_id, image_tokens, 1)) for ids in texts]
        return self.score_pixels(normalise(resize_like_pil(images, height, width)), texts)[:, 0]

    def score_pixels(self, pixels: Tensor, texts: list[Tensor]) -> Tensor:
        """(mu, sigma), (B, 2), of preprocessed pixels (B, 3, 28 m, 28 n) and B sequences of token ids.

        Positions are 0, 1, 2, ... on all three axes, also for image tokens.  The official code never computed
        Qwen2-VL's 3-D rotary positions, and HPSv3 was trained that way.
        """
        # Padding on the right has no effect: attention is causal, and the head reads a token before the padding.
        ids = nn.utils.rnn.pad_sequence(texts, batch_first=True).to(pixels.device)
        grid = torch.tensor([[1, pixels.shape[2] // 14, pixels.shape[3] // 14]], device=pixels.device)
        hidden = self.body(
            input_ids=ids,
            position_ids=torch.arange(ids.shape[1], device=pixels.device).expand(3, len(ids), -1),
            pixel_values=patchify(pixels),
            image_grid_thw=grid.expand(len(ids), -1),
            use_cache=False,
        ).last_hidden_state
        return self.head(hidden[ids == self.reward_token_id].to(pixels.dtype))

    def encode_text(self, prompt: str) -> Tensor:
        """Token ids (L,) with one token for the image; their features depend on the image before them."""
        text = CHAT_TEMPLATE.format(INSTRUCTION.format(text_prompt=prompt))
        ids = self.tokenizer(text, return_tensors="pt").input_ids[0]
        is_plain = all((ids == token).sum() == 1 for token in (self.reward_token_id, self.body.config.image_token_id))
        require(is_plain, f"the prompt {prompt!r:.60} holds a special token: remove {REWARD_TOKEN} or <|image_pad|>")
        return ids.to(self.body.device)


def resized_size(height: int, width: int) -> tuple[int, int]:
    """The official size: multiples of 28 with about the same aspect ratio and 256 * 28 * 28 pixels."""
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    return smart_resize(height, width, min_pixels=256 * 28 * 28, max_pixels=256 * 28 * 28)


def patchify(images: Tensor) -> Tensor:
    """Qwen2-VL's patches, (B h w, 3 * 2 * 14 * 14), of images (B, 3, 14 h, 14 w).

    Neighbouring 2 x 2 patches are adjacent, and each patch stands twice, as two frames of a video.
    """
    b, c, height, width = images.shape
    x = images.reshape(b, c, height // 28, 2, 14, width // 28, 2, 14)
    x = x.permute(0, 2, 5, 3, 6, 1, 4, 7)[:, :, :, :, :, :, None]
    return x.expand(-1, -1, -1, -1, -1, -1, 2, -1, -1).reshape(-1, c * 2 * 14 * 14)


CHAT_TEMPLATE = """<|im_start|>system
You are a helpful assistant.<|im_end|>
<|im_start|>user
<|vision_start|><|image_pad|><|vision_end|>{}<|im_end|>
<|im_start|>assistant
"""
"""Qwen2-VL's chat template, for one image and one text."""

INSTRUCTION = Path(__file__).with_name("hpsv3_instruction.txt").read_text(encoding="utf-8")
"""The text that HPSv3 was trained with, unchanged: INSTRUCTION and prompt_with_special_token of the package hpsv3,
version 1.0.0, hpsv3/dataset/data_collator_qwen.py, MIT License, Copyright (c) 2024 HPSv3 Team."""
