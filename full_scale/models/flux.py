"""FLUX.1-dev."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from full_scale.models.family import Family, text_shapes, tiny_text, tiny_vae


def encode_text(pipeline: Any, prompts: list[str], device: torch.device, max_sequence_length: int) -> dict[str, Tensor]:
    """T5's tokens and CLIP's pooled text.  Padding stays, because FLUX was trained with it."""
    tokens, pooled, _ = pipeline.encode_prompt(prompts, device=device, max_sequence_length=max_sequence_length)
    return {"encoder_hidden_states": tokens, "pooled_projections": pooled}


def tiny(t5_width: int = 32, clip_widths: Sequence[int] = (32,), **networks: nn.Module) -> Any:
    """FLUX.1-dev's pipeline with one double and two single blocks."""
    import diffusers
    import transformers

    text = tiny_text(t5_width, clip_widths)
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=64, num_layers=1, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32, guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    networks = {"transformer": transformer, "vae": tiny_vae(0.3611, 0.1159)} | networks
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        text_encoder=transformers.CLIPTextModel(text["clips"][0]),
        tokenizer=text["clip_tokenizer"],
        text_encoder_2=text["t5"],
        tokenizer_2=text["t5_tokenizer"],
        **networks,
    )


FAMILY = Family(
    name="flux",
    title="FLUX.1-dev",
    model="black-forest-labs/FLUX.1-dev",
    pipeline_name="FluxPipeline",
    transformer_name="FluxTransformer2DModel",
    encode_text=encode_text,
    text_shapes=text_shapes,
    tiny=tiny,
    widths={"t5_width": 4096, "clip_widths": (768,)},
    guidance_is_input=True,
)
