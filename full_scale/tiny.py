"""Tiny random pipelines and rewards: the real classes at a toy's size, to rehearse a run on a laptop."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import diffusers
import tokenizers
import torch
import transformers
import tyro
from torch import nn
from tqdm import tqdm

from full_scale import rewards
from full_scale.architectures import ARCHITECTURES, CLIP_G, CLIP_L, T5_XXL
from runtime.run_dir import claimed_output_folder, write_errors_named


def tiny(folder: Annotated[Path, tyro.conf.Positional], sd3: bool = False, full_size: bool = False) -> None:
    """Write a tiny random pipeline and tiny rewards, to rehearse a whole run on a laptop.

    FOLDER/reward is HPSv2.1; each other reward is in a folder of its name.

    The classes are the real ones at a toy's size: the images are noise and stay noise.

    Args:
        folder: Folder to fill: a new one, an empty one, or one that this tool has filled.
        sd3: SD3.5's architecture instead of FLUX's.
        full_size: Transformer and VAE of the real size, 5 GB for SD3.5-M and 24 GB for FLUX; the rest stays tiny.
    """
    task = "sd3" if sd3 else "flux"
    with claimed_output_folder(folder, "tiny", {"sd3": sd3, "full_size": full_size}), write_errors_named(folder):
        torch.manual_seed(0)
        networks = full_size_networks(task) if full_size else {}
        PIPELINES[task](**networks).save_pretrained(folder, max_shard_size="2GB")
        for name in tqdm(rewards.REWARDS, "tiny rewards"):
            rewards.tiny(name, folder / ("reward" if name == "hpsv2.1" else name))
    size = "--lora-rank 4 --batch-size 1 --T 4 --evaluation-images 2 --iterations 2"
    size = size if full_size else "--batch-size 4 --iterations 3"
    print(
        f"try: python train_leap_align.py --task {task} --model {folder} --prompts PROMPTS.txt "
        f"--reward-weights {folder}/reward --height 64 --width 64 {size}"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Of the real size
# ---------------------------------------------------------------------------------------------------------------------


def full_size_networks(task: str) -> dict[str, Any]:
    """Transformer and VAE of the real size, and the widths of the text that this transformer reads."""
    widths = {"clip_widths": (CLIP_L["hidden_size"], CLIP_G["hidden_size"]), "t5_width": T5_XXL["d_model"]}
    return widths | {name: random_network(ARCHITECTURES[task][name]) for name in ("transformer", "vae")}


@torch.no_grad()
def random_network(config: dict[str, Any]) -> nn.Module:
    """A network of diffusers with random bfloat16 weights, small enough to stay finite; no float32 copy is made."""
    with torch.device("meta"):
        network = getattr(diffusers, config["_class_name"]).from_config(config)
    network = nn.Module.to(network, torch.bfloat16).to_empty(device="cpu")
    for name, weight in network.state_dict().items():
        if weight.ndim == 1:
            weight.fill_(0 if name.endswith("bias") else 1)  # the others scale a norm
        else:
            weight.normal_(std=0.02)
    return network


# ---------------------------------------------------------------------------------------------------------------------
# Tiny
# ---------------------------------------------------------------------------------------------------------------------


def tiny_text(t5_width: int, clip_widths: Sequence[int]) -> dict[str, Any]:
    """A CLIP's config for each width, which reads bytes, and a T5 that reads characters, with their tokenizers."""
    characters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    words = [*characters, *(f"{c}</w>" for c in characters), "<|startoftext|>", "<|endoftext|>"]
    clip = transformers.CLIPTokenizer({word: i for i, word in enumerate(words)}, [], model_max_length=77)
    letters = [(word, 0.0) for word in ("<pad>", "</s>", "<unk>", "▁")] + [(chr(i), -1.0) for i in range(33, 127)]
    sizes = {
        "vocab_size": len(words), "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1, "pad_token_id": len(words) - 1,
    }  # fmt: skip
    t5 = transformers.T5Config(
        vocab_size=len(letters) + 100, d_model=t5_width, d_kv=8, d_ff=64, num_layers=2, num_heads=4
    )
    return {
        "clips": [transformers.CLIPTextConfig(hidden_size=w, projection_dim=w, **sizes) for w in clip_widths],
        "clip_tokenizer": clip,
        "t5": transformers.T5EncoderModel(t5),
        "t5_tokenizer": transformers.T5Tokenizer(letters, extra_ids=100, model_max_length=512),
    }


def tiny_vae(scaling: float, shift: float) -> nn.Module:
    """A VAE with the latents of the real one: 16 channels, an eighth of the size."""
    return diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[8] * 4, layers_per_block=1, norm_num_groups=4, latent_channels=16,
        use_quant_conv=False, use_post_quant_conv=False, scaling_factor=scaling, shift_factor=shift,
    )  # fmt: skip


def tiny_flux(t5_width: int = 32, clip_widths: Sequence[int] = (32,), **networks: nn.Module) -> Any:
    """FLUX.1-dev's pipeline with one double and two single blocks.

    networks: replace the tiny transformer or VAE.
    """
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


def tiny_sd3(t5_width: int = 64, clip_widths: Sequence[int] = (32, 32), **networks: nn.Module) -> Any:
    """SD3.5-M's pipeline with two blocks, the first with dual attention.

    networks: replace the tiny transformer or VAE.
    """
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


PIPELINES = {"flux": tiny_flux, "sd3": tiny_sd3}
"""By the name of the task."""
