"""Tiny random pipelines and rewards: the real classes at a toy's size, to rehearse a run on a laptop."""

from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import nn
from tqdm import tqdm

from full_scale import rewards
from full_scale.components import network_from_config
from full_scale.models import FAMILIES
from leap_align import require
from runtime.files import write_errors_named
from runtime.run_dir import claimed_output_folder


def tiny(
    folder: Annotated[Path, tyro.conf.Positional], sd3: bool = False, klein: bool = False, full_size: bool = False
) -> None:
    """Write a tiny random pipeline and tiny rewards, to rehearse a whole run on a laptop.

    FOLDER/reward is HPSv2.1; each other reward is in a folder of its name.

    The classes are the real ones at a toy's size: the images are noise and stay noise.

    Args:
        folder: Folder to fill: a new one, an empty one, or one that this tool has filled.
        sd3: SD3.5's architecture instead of FLUX.1's.
        klein: FLUX.2-klein's architecture instead of FLUX.1's.
        full_size: Transformer and VAE of the real size, 5 GB for SD3.5-M, 8 GB for FLUX.2-klein and 24 GB for
            FLUX.1; the rest stays tiny.
    """
    require(not (sd3 and klein), "give --sd3 or --klein, not both: a folder holds one pipeline")
    task = "sd3" if sd3 else "klein" if klein else "flux"
    with claimed_output_folder(folder, "tiny", {"task": task, "full_size": full_size}), write_errors_named(folder):
        torch.manual_seed(0)
        family = FAMILIES[task]
        names = ("transformer", "vae") if full_size else ()
        networks = {name: random_network(family.configs[name]) for name in names}
        widths = family.widths if full_size else {}
        family.tiny(**widths, **networks).save_pretrained(folder, max_shard_size="2GB")
        for name in tqdm(rewards.REWARDS, "tiny rewards"):
            rewards.tiny(name, folder / ("reward" if name == "hpsv2.1" else name))
    real_size = "--lora-rank 4 --batch-size 1 --T 4 --evaluation-images 2 --iterations 2"
    size = real_size if full_size else "--batch-size 4 --iterations 3"
    paths = f"--model {folder} --prompts PROMPTS.txt --reward-weights {folder}/reward"
    print(f"try: python train_leap_align.py --task {task} {paths} --height 64 --width 64 {size}")


@torch.no_grad()
def random_network(config: dict[str, Any]) -> nn.Module:
    """A network of diffusers with random bfloat16 weights, small enough to stay finite; no float32 copy is made."""
    network = nn.Module.to(network_from_config(config), torch.bfloat16).to_empty(device="cpu")
    for name, weight in network.state_dict().items():
        if weight.ndim < 2:
            weight.fill_(0 if name.endswith(("bias", "mean", "tracked")) else 1)  # the others scale a norm
        else:
            weight.normal_(std=0.02)
    return network
