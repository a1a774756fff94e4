"""What a file of this folder says about its model, and what several models are made of."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from runtime.files import read_json

Config = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """The pipelines of one diffusers class; NAME.json has the published config of every network, by subfolder."""

    name: str  # of the task
    title: str  # the model's name, for people
    model: str  # the hub id of the published pipeline
    pipeline_name: str  # of its class in diffusers
    transformer_name: str  # of its class in diffusers
    encode_text: Callable[[Any, list[str], torch.device, int], dict[str, Tensor]]
    """(pipeline, prompts, device, max_sequence_length) to the transformer's text inputs by name, each (B, ...)."""
    text_shapes: Callable[[Config, int], dict[str, tuple[int, ...]]]
    """The transformer's config and max_sequence_length to the shapes of one prompt's text inputs by name."""
    tiny: Callable[..., Any]
    """() to a tiny random pipeline; its arguments replace transformer, VAE and the widths of its text encoders."""
    widths: Config = field(default_factory=dict)
    """Arguments of `tiny` with which its text encoders have the published widths."""
    max_sequence_length: int = 512  # of the largest text encoder, in tokens, as in the pipeline
    guidance: float = 3.5  # the usual guidance scale
    guidance_is_input: bool = False  # whether the transformer reads the scale; otherwise guidance is classifier-free

    @property
    def pipeline_class(self) -> Any:
        """The class in diffusers, imported only now: --help needs no large library."""
        import diffusers

        return getattr(diffusers, self.pipeline_name)

    @property
    def transformer_class(self) -> Any:
        """The class in diffusers, imported only now."""
        import diffusers

        return getattr(diffusers, self.transformer_name)

    @property
    def configs(self) -> dict[str, Config]:
        """The config of every network and of the scheduler, by subfolder, as its authors publish it."""
        return read_json(Path(__file__).parent / f"{self.name}.json")


def text_shapes(config: Config, tokens: int) -> dict[str, tuple[int, ...]]:
    """The text inputs of a model that reads so many tokens, and a pooled text."""
    pooled = (config["pooled_projection_dim"],)
    return {"encoder_hidden_states": (tokens, config["joint_attention_dim"]), "pooled_projections": pooled}


def tiny_text(t5_width: int, clip_widths: Sequence[int]) -> dict[str, Any]:
    """A CLIP's config for each width, which reads bytes, and a T5 that reads characters, with their tokenizers."""
    import tokenizers
    import transformers

    characters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    words = [*characters, *(f"{c}</w>" for c in characters), "<|startoftext|>", "<|endoftext|>"]
    clip = transformers.CLIPTokenizer({word: i for i, word in enumerate(words)}, [], model_max_length=77)
    letters = [(word, 0.0) for word in ("<pad>", "</s>", "<unk>", "▁")] + [(chr(i), -1.0) for i in range(33, 127)]
    sizes = {
        "vocab_size": len(words), "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1, "pad_token_id": len(words) - 1,
    }  # fmt: skip
    vocabulary = len(letters) + 100
    t5 = transformers.T5Config(vocab_size=vocabulary, d_model=t5_width, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    return {
        "clips": [transformers.CLIPTextConfig(hidden_size=w, projection_dim=w, **sizes) for w in clip_widths],
        "clip_tokenizer": clip,
        "t5": transformers.T5EncoderModel(t5),
        "t5_tokenizer": transformers.T5Tokenizer(letters, extra_ids=100, model_max_length=512),
    }


def tiny_vae(scaling: float, shift: float) -> nn.Module:
    """A VAE with the latents of the real one: 16 channels, an eighth of the size."""
    import diffusers

    return diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[8] * 4, layers_per_block=1, norm_num_groups=4, latent_channels=16,
        use_quant_conv=False, use_post_quant_conv=False, scaling_factor=scaling, shift_factor=shift,
    )  # fmt: skip
