"""Build the small FLUX.1 that draws coloured shapes, its prompts and its reward."""

import shutil
from itertools import zip_longest
from pathlib import Path
from random import Random
from typing import Annotated, Any

import torch
import tyro
from safetensors.torch import save_file
from torch import nn

from full_scale.shapes.scenes import BY_TEXT, SIZE, TOKENS, captions
from full_scale.shapes.train import fit_pipeline, fit_reward, fit_vae
from runtime.files import atomic_folder, write_errors_named, write_json, write_text
from runtime.run_dir import claimed_output_folder

STEPS = {"vae": 900, "pipeline": 5000, "reward": 1500}
HELD_OUT, TRAINED = 10, 48  # prompts of a kind, at most; of the held-out ones also at most a third of the kind


def shapes(folder: Annotated[Path, tyro.conf.Positional], seed: int = 0, smoke: bool = False) -> None:
    """Build a small FLUX.1 that draws coloured shapes, its prompts and its reward, from nothing in half an hour.

    FOLDER gets the pipeline, prompts.txt, held-out.txt, and reward/ in HPSv2.1's format.  Some of the scenes that the
    pipeline learns from are not what their captions say, as on the web, and so are its images; alignment can mend them.

    Args:
        folder: Folder to fill: a new one, an empty one, or one in which this command was stopped.
        seed: Seed of the first weights; the same seed gives the same pipeline.
        smoke: Take three steps each, to see that everything runs: the images are noise.
    """
    steps = dict.fromkeys(STEPS, 3) if smoke else STEPS
    with claimed_output_folder(folder, "shapes", {"seed": seed, "steps": steps}), write_errors_named(folder):
        if not (folder / "held-out.txt").exists():  # the last file
            build(folder, seed, steps)
        shutil.rmtree(folder / "training", ignore_errors=True)
    print(f"{folder} holds a FLUX.1 that draws shapes, prompts.txt, held-out.txt and reward/")
    print(f"try: {recommended_run(folder)}")


def build(folder: Path, seed: int, steps: dict[str, int]) -> None:
    """Trains and writes everything.  An interrupted training continues from the folder training/."""
    import open_clip

    from full_scale.shapes import networks

    torch.manual_seed(seed)
    pipeline, reward = networks.pipeline(), networks.reward()
    tokenize = open_clip.SimpleTokenizer(context_length=reward.context_length)
    fit_vae(pipeline.vae, steps["vae"], folder / "training" / "vae.safetensors")
    fit_pipeline(pipeline, steps["pipeline"], folder / "training" / "pipeline.safetensors")
    fit_reward(reward, tokenize, pipeline, steps["reward"], folder / "training" / "reward.safetensors")
    known = torch.zeros(reward.vocab_size, 1).index_fill(0, tokenize(list(BY_TEXT)).unique(), 1)
    reward.token_embedding.weight.data *= known  # git stores zeros in no space
    # New ones: a used tokenizer's file holds the padding of its last batch.
    pipeline.register_modules(tokenizer=networks.clip_tokenizer(), tokenizer_2=networks.t5_tokenizer())
    for network in (pipeline.vae, pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2, reward):
        nn.Module.to(network, torch.bfloat16)
    pipeline.save_pretrained(folder)
    save_reward(reward, networks.REWARD, folder / "reward")
    for name, texts in prompts().items():
        write_text(folder / name, "\n".join(texts) + "\n")


def recommended_run(folder: Path) -> str:
    """The command of an aligned run with this pipeline."""
    words = [
        f"python train_leap_align.py --task flux --model {folder} --prompts {folder}/prompts.txt",
        f"--reward-weights {folder}/reward --held-out shapes --evaluation-prompts {folder}/held-out.txt",
        f"--evaluation-images 78 --height {SIZE} --width {SIZE} --max-sequence-length {TOKENS}",
        "--precision float32 --gradient-checkpointing off --lam None --beta 0.1 --lr 3e-4 --T 8 --solver ab2",
        "--batch-size 32 --iterations 200 --out runs/shapes",
    ]
    return " ".join(words)


def prompts() -> dict[str, list[str]]:
    """Training and held-out prompts by file, none in both; kinds take turns, so that any first lines have all kinds."""
    files: dict[str, list[list[str]]] = {"prompts.txt": [], "held-out.txt": []}
    for kind, members in captions().items():
        texts = Random(kind).sample([str(caption) for caption in members], len(members))
        held_out = min(HELD_OUT, len(texts) // 3)
        files["held-out.txt"].append(texts[:held_out])
        files["prompts.txt"].append(texts[held_out : held_out + TRAINED])
    return {name: [text for turn in zip_longest(*rows) for text in turn if text] for name, rows in files.items()}


def save_reward(model: nn.Module, config: dict[str, Any], folder: Path) -> None:
    """Writes a CLIP in open_clip's layout."""
    with atomic_folder(folder) as temporary:
        write_json(temporary / "open_clip_config.json", {"model_cfg": config})
        save_file(model.state_dict(), temporary / "open_clip_model.safetensors")
