"""SD3.5-M."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from full_scale.models.family import Family, text_shapes, tiny_text, tiny_vae


def encode_text(pipeline: Any, prompts: list[str], device: torch.device, max_sequence_length: int) -> dict[str, Tensor]:
    """The tokens of all three encoders and the pooled text of the two CLIPs."""
    options = {"device": device, "do_classifier_free_guidance": False, "max_sequence_length": max_sequence_length}
    tokens, _, pooled, _ = pipeline.encode_prompt(prompts, prompts, prompts, **options)
    return {"encoder_hidden_states": tokens, "pooled_projections": pooled}


def tiny(t5_width: int = 64, clip_widths: Sequence[int] = (32, 32), **networks: nn.Module) -> Any:
    """SD3.5-M's pipeline with two blocks, the first with dual attention."""
    import diffusers
    import transformers

    text = tiny_text(t5_width, clip_widths)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=32, patch_size=2, in_channels=16, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=64, caption_projection_dim=32, pooled_projection_dim=64, out_channels=16,
        pos_embed_max_size=96, qk_norm="rms_norm", dual_attention_layers=(0,),
    )  # fmt: skip
    networks = {"transformer": transformer, "vae": tiny_vae(1.5305, 0.0609)} | networks
    return diffusers.StableDiffusion3Pipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=transformers.CLIPTextModelWithProjection(text["clips"][0]),
        tokenizer=text["clip_tokenizer"],
        text_encoder_2=transformers.CLIPTextModelWithProjection(text["clips"][1]),
        tokenizer_2=text["clip_tokenizer"],
        text_encoder_3=text["t5"],
        tokenizer_3=text["t5_tokenizer"],
        **networks,
    )


FAMILY = Family(
    name="sd3",
    title="SD3.5-M",
    model="stabilityai/stable-diffusion-3.5-medium",
    pipeline_name="StableDiffusion3Pipeline",
    transformer_name="SD3Transformer2DModel",
    encode_text=encode_text,
    text_shapes=lambda config, tokens: text_shapes(config, 77 + tokens),
    tiny=tiny,
    widths={"t5_width": 4096, "clip_widths": (768, 1280)},
    max_sequence_length=256,
)
