"""FLUX.2-klein-base-4B; the 9B model has the same classes.

Sources of klein.json: diffusers' scripts/convert_flux2_to_diffusers.py ("klein-4b"; the VAE has its class's defaults),
and Qwen3-4B, of which the pipeline joins three layers: 3 x 2560 is the transformer's joint_attention_dim.
"""

from typing import Any

import torch
from torch import Tensor, nn

from full_scale.models.family import Family

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n<think>\n\n</think>\n\n"
)
"""What Qwen3's own template makes of one message of the user, without thinking."""


def encode_text(pipeline: Any, prompts: list[str], device: torch.device, max_sequence_length: int) -> dict[str, Tensor]:
    """Three layers of Qwen3's hidden states, beside each other.  Padding stays, because the pipeline keeps it."""
    tokens, _ = pipeline.encode_prompt(prompts, device=device, max_sequence_length=max_sequence_length)
    return {"encoder_hidden_states": tokens}


def tiny_qwen3(width: int) -> dict[str, nn.Module]:
    """A Qwen3 that reads bytes, and its tokenizer.  The pipeline reads the hidden states after layer 27."""
    import tokenizers
    import transformers

    words = [*sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()), "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    config = transformers.Qwen3Config(
        vocab_size=len(words), hidden_size=width, intermediate_size=32, num_hidden_layers=28, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, tie_word_embeddings=True,
    )  # fmt: skip
    tokenizer = transformers.Qwen2Tokenizer(
        {word: i for i, word in enumerate(words)}, [], extra_special_tokens=words[-2:], model_max_length=512
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return {"text_encoder": transformers.Qwen3ForCausalLM(config), "tokenizer": tokenizer}


def tiny_vae() -> nn.Module:
    """A VAE with the latents of the real one: 32 channels, an eighth of the size; its batch norm changes them."""
    import diffusers

    vae = diffusers.AutoencoderKLFlux2(block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=4)
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2)
    return vae


def tiny(qwen3_width: int = 16, **networks: nn.Module) -> Any:
    """FLUX.2-klein's pipeline with one double and two single blocks."""
    import diffusers

    text = tiny_qwen3(qwen3_width)
    transformer = diffusers.Flux2Transformer2DModel(
        in_channels=128, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=48, timestep_guidance_channels=32, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False,
    )  # fmt: skip
    networks = {"transformer": transformer, "vae": tiny_vae()} | networks
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    return diffusers.Flux2KleinPipeline(scheduler=scheduler, **text, **networks)


FAMILY = Family(
    name="klein",
    title="FLUX.2-klein",
    model="black-forest-labs/FLUX.2-klein-base-4B",
    pipeline_name="Flux2KleinPipeline",
    transformer_name="Flux2Transformer2DModel",
    encode_text=encode_text,
    text_shapes=lambda config, tokens: {"encoder_hidden_states": (tokens, config["joint_attention_dim"])},
    tiny=tiny,
    widths={"qwen3_width": 2560},
    guidance=4.0,
)
