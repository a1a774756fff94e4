"""The networks of the small FLUX.1 and of its reward, untrained: real classes of diffusers, transformers, open_clip."""

from typing import Any

import diffusers
import open_clip
import tokenizers
import transformers
from torch import nn

from full_scale.shapes.scenes import BY_TEXT, SIZE, TOKENS

WIDTH, TEXT_WIDTH, CHANNELS = 96, 64, 8  # of the transformer, of both text encoders, of the VAE's latents
WORDS = sorted({word for text in BY_TEXT for word in text.split()}, key=lambda word: (-len(word), word))
REWARD = {
    "embed_dim": 64,
    "vision_cfg": {"layers": [1, 2, 2, 1], "width": 16, "image_size": 64},
    "text_cfg": {"context_length": 14, "width": 32, "heads": 4, "layers": 2},
}


def clip_tokenizer() -> Any:
    """A CLIP tokenizer with a token for each word of a caption, and letters for other words."""
    letters, merges = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()), {}
    for word in WORDS:  # long words come first: a merge of a short one would break a long one in another place
        start, *rest = [*word[:-1], f"{word[-1]}</w>"]
        for part in rest:
            merges[start, part] = start = start + part
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *merges.values(), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    return transformers.CLIPTokenizer(vocabulary, list(merges), model_max_length=TOKENS + 2)


def t5_tokenizer() -> Any:
    """A T5 tokenizer with a token for each word of a caption, and letters for other words."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁{word}", -1.0) for word in WORDS), ("▁", -9.0)]
    pieces += [(chr(i), -10.0) for i in range(33, 127)]
    return transformers.T5Tokenizer(pieces, extra_ids=0, model_max_length=512)


def text_encoders() -> dict[str, Any]:
    """CLIP and T5 with their tokenizers, by their names in FluxPipeline."""
    clip_words, t5_words, sizes = clip_tokenizer(), t5_tokenizer(), {"hidden_size": TEXT_WIDTH}
    end = clip_words.eos_token_id
    sizes |= {"intermediate_size": 4 * TEXT_WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"vocab_size": len(clip_words), "max_position_embeddings": clip_words.model_max_length}
    clip = transformers.CLIPTextConfig(**sizes, bos_token_id=end - 1, eos_token_id=end, pad_token_id=end)
    t5 = transformers.T5Config(
        vocab_size=len(t5_words), d_model=TEXT_WIDTH, d_kv=16, d_ff=4 * TEXT_WIDTH, num_layers=2, num_heads=4,
        dropout_rate=0.0,
    )  # fmt: skip
    models = {"text_encoder": transformers.CLIPTextModel(clip), "text_encoder_2": transformers.T5EncoderModel(t5)}
    return models | {"tokenizer": clip_words, "tokenizer_2": t5_words}


def vae() -> nn.Module:
    """A VAE with latents of a quarter of the image's size."""
    return diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3,
        block_out_channels=(16, 32, 48), layers_per_block=1, norm_num_groups=8, latent_channels=CHANNELS,
        use_quant_conv=False, use_post_quant_conv=False, mid_block_add_attention=False, sample_size=SIZE,
        scaling_factor=1.0, shift_factor=0.0,
    )  # fmt: skip


def transformer() -> nn.Module:
    """FLUX.1's transformer with two double and three single blocks."""
    return diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4 * CHANNELS, num_layers=2, num_single_layers=3, attention_head_dim=WIDTH // 4,
        num_attention_heads=4, joint_attention_dim=TEXT_WIDTH, pooled_projection_dim=TEXT_WIDTH, guidance_embeds=True,
        axes_dims_rope=(4, 10, 10),
    )  # fmt: skip


def pipeline() -> Any:
    """The whole FluxPipeline; its grid is shifted to the noise, where a caption matters."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    return diffusers.FluxPipeline(scheduler=scheduler, transformer=transformer(), vae=vae(), **text_encoders())


def reward() -> nn.Module:
    """An open_clip CLIP, as HPSv2.1 is."""
    return open_clip.CLIP(**REWARD)
