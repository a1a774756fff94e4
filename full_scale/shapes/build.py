"""Build the small FLUX.1 that draws coloured shapes, its prompts and its reward."""

import shutil
from itertools import zip_longest
from pathlib import Path
from random import Random
from typing import Annotated

import open_clip
import torch
import tyro
from safetensors.torch import save_file
from torch import nn

from full_scale.shapes import networks
from full_scale.shapes.scenes import SIZE, captions
from full_scale.shapes.train import fit_pipeline, fit_reward, fit_vae
from runtime.run_dir import atomic_folder, claimed_output_folder, write_errors_named, write_json, write_text

STEPS = {"vae": 900, "pipeline": 6000, "reward": 1600}
RUN = "--lr 2e-4 --beta 0.1 --T 8 --solver ab2 --batch-size 64 --iterations 120"  # of the recommended run
HELD_OUT, TRAINED = 10, 48  # prompts of a kind, at most; of the held-out ones also at most a third of the kind


def shapes(folder: Annotated[Path, tyro.conf.Positional], seed: int = 0, smoke: bool = False) -> None:
    """Build, from nothing, a small FLUX.1 that draws coloured shapes, its prompts and its reward: half an hour.

    FOLDER gets the pipeline, prompts.txt, held-out.txt, and reward/ in HPSv2.1's format.  A third of the captions that
    the pipeline learns from are wrong, as on the web; so are about half of its images, and a reward can mend them.

    Args:
        folder: Folder to fill: a new one, an empty one, or one that this command was stopped in.
        seed: Seed of the first weights; the same gives the same pipeline.
        smoke: Take a few steps only: the pictures mean nothing.
    """
    steps = {name: 3 if smoke else number for name, number in STEPS.items()}
    with claimed_output_folder(folder, "shapes", {"seed": seed, "steps": steps}), write_errors_named(folder):
        torch.manual_seed(seed)
        pipeline, model = networks.pipeline(), networks.reward()
        tokenize = open_clip.SimpleTokenizer(context_length=model.context_length)
        states = {name: folder / "training" / f"{name}.safetensors" for name in steps}
        fit_vae(pipeline.vae, steps["vae"], states["vae"])
        fit_pipeline(pipeline, steps["pipeline"], states["pipeline"])
        fit_reward(model, tokenize, steps["reward"], states["reward"])
        pipeline.to(torch.bfloat16).save_pretrained(folder)
        save_reward(model.to(torch.bfloat16), folder / "reward")
        for name, texts in prompts().items():
            write_text(folder / name, "\n".join(texts) + "\n")
        shutil.rmtree(folder / "training")
    print(f"{folder} has the pipeline, its reward, prompts.txt and held-out.txt")
    print(f"try: {recommended_run(folder)}")


def recommended_run(folder: Path) -> str:
    """The command of an aligned run with this pipeline."""
    paths = f"--model {folder} --prompts {folder}/prompts.txt --reward-weights {folder}/reward"
    evaluation = f"--held-out shapes --evaluation-prompts {folder}/held-out.txt --evaluation-images 118"
    sizes = f"--height {SIZE} --width {SIZE} --max-sequence-length {networks.TOKENS} --precision float32"
    return f"python train_leap_align.py --task flux {paths} {evaluation} {sizes} {RUN}"


def prompts() -> dict[str, list[str]]:
    """Training and held-out prompts by file, none in both; kinds take turns, so that any first lines have all kinds."""
    files: dict[str, list[list[str]]] = {"held-out.txt": [], "prompts.txt": []}
    for kind, members in captions().items():
        texts = Random(kind).sample([str(caption) for caption in members], len(members))
        held_out = min(HELD_OUT, len(texts) // 3)
        files["held-out.txt"].append(texts[:held_out])
        files["prompts.txt"].append(texts[held_out : held_out + TRAINED])
    return {name: [text for turn in zip_longest(*rows) for text in turn if text] for name, rows in files.items()}


def save_reward(model: nn.Module, folder: Path) -> None:
    """Writes a CLIP in open_clip's layout."""
    with atomic_folder(folder) as temporary:
        write_json(temporary / "open_clip_config.json", {"model_cfg": networks.REWARD})
        save_file(model.state_dict(), temporary / "open_clip_model.safetensors")
