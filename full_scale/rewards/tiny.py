"""Tiny random models of the rewards, for tests and for a rehearsal of a full run on a laptop."""

import json
from pathlib import Path

import torch

from full_scale.rewards import hpsv3, imagereward
from full_scale.rewards.weights import rename_keys
from leap_align import require

SIZE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def tiny(name: str, folder: str | Path) -> None:
    """Writes a tiny random model of a reward into a folder, in the layout that REWARDS[name].load(folder) reads."""
    require(name in TINY, f"unknown reward {name!r}: choose from {', '.join(TINY)}")
    Path(folder).mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        TINY[name](Path(folder))


def _tiny_hpsv2(folder: Path) -> None:
    import open_clip
    from safetensors.torch import save_file

    vision = {"layers": 2, "width": 64, "head_width": 32, "patch_size": 14, "image_size": 224}
    config = {"embed_dim": 32, "vision_cfg": vision, "text_cfg": {"width": 32, "heads": 2, "layers": 2}}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    save_file(open_clip.CLIP(**config).state_dict(), folder / "open_clip_model.safetensors")


def _tiny_pickscore(folder: Path) -> None:
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    vocabulary = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    ids = {token: i for i, token in enumerate(vocabulary)}
    CLIPTokenizer(vocab=ids, merges=[], model_max_length=77).save_pretrained(folder)
    special = {"bos_token_id": ids["<|startoftext|>"], "eos_token_id": ids["<|endoftext|>"]}
    text = SIZE | special | {"vocab_size": len(vocabulary)}
    vision = SIZE | {"patch_size": 14, "image_size": 224}
    CLIPModel(CLIPConfig(projection_dim=32, text_config=text, vision_config=vision)).save_pretrained(folder)


def _tiny_imagereward(folder: Path) -> None:
    from transformers import BertTokenizer

    letters = [chr(i) for i in range(33, 127)]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *("##" + letter for letter in letters)]
    BertTokenizer(vocab={token: i for i, token in enumerate(vocabulary)}).save_pretrained(folder)
    size = SIZE | {"initializer_range": 0.2}  # with the default, the image would hardly change the score
    config = size | {"vocab_size": len(vocabulary), "vision": size}
    (folder / "med_config.json").write_text(json.dumps(config))
    state = imagereward.ImageReward.from_config(config, None).state_dict()
    official_names = {new: old for old, new in reversed(imagereward.OFFICIAL_NAMES.items())}
    torch.save(rename_keys(state, official_names), folder / "ImageReward.pt")


def _tiny_hpsv3(folder: Path) -> None:
    from safetensors.torch import save_file
    from transformers import Qwen2VLConfig, Qwen2VLModel

    tokenizer = _tiny_qwen_tokenizer()
    tokenizer.save_pretrained(folder)
    special = {"bos_token_id": None, "eos_token_id": None}
    text = SIZE | special | {"vocab_size": len(tokenizer) + 1, "num_key_value_heads": 1}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2}
    image_id, video_id = tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|video_pad|>"])
    config = Qwen2VLConfig(text_config=text, vision_config=vision, image_token_id=image_id, video_token_id=video_id)
    (folder / "config.json").write_text(config.to_json_string(use_diff=False))
    state = Qwen2VLModel(config).state_dict()
    state |= {f"head.{key}": value for key, value in hpsv3.HPSv3.new_head(32).state_dict().items()}
    official_names = {new: old for old, new in hpsv3.OFFICIAL_NAMES.items()}
    save_file(rename_keys(state, official_names), folder / "HPSv3.safetensors")


def _tiny_qwen_tokenizer():
    """A token for each byte, and one for each line of the instruction, for speed."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    vocabulary = {token: i for i, token in enumerate([*sorted(ByteLevel.alphabet()), "<|endoftext|>"])}
    special = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    lines = [line for line in hpsv3.INSTRUCTION.splitlines() if line and not {"{", "|"} & set(line)]
    return Qwen2Tokenizer(vocab=vocabulary, merges=[], extra_special_tokens=special + lines)


TINY = {"hpsv2.1": _tiny_hpsv2, "pickscore": _tiny_pickscore, "hpsv3": _tiny_hpsv3, "imagereward": _tiny_imagereward}
