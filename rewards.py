"""Differentiable rewards behind one contract: images in [0, 1] and their prompts to one number each.

    reward = load("hpsv2.1", device="cuda")                  weights from the Hugging Face hub
    reward = load("hpsv2.1", ["HPS_v2.1_compressed.pt"])     or from here, without a network
    reward = load("hpsv2.1:1,pickscore:0.5")                 a weighted sum
    reward = load("my_module:my_factory")                    one's own; check_reward says whether it keeps the contract
    reward(images, prompts)                                  images (B, 3, H, W) in [0, 1], B prompts, to (B,)

Every step from the pixels to the score is torch: PIL, uint8 or no_grad on the way would cut the gradient.  Weights are
frozen, the text carries no gradient, and the large libraries are imported only by the reward that needs them.
"""

import json
import math
import pkgutil
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leap_align import BadInput

PRESETS: dict[str, dict[str, float]] = {
    "hpsv2.1": {"alpha": 0.3, "lam": 0.55, "lr": 1e-5},
    "pickscore": {"alpha": 0.1, "lam": 0.4, "lr": 1e-5},
    "hpsv3": {"alpha": 0.1, "lam": 13.5, "lr": 8e-6},
    "imagereward": {},
}
"""The training settings that the paper gives with each reward; ImageReward it uses for evaluation alone."""

CACHED = 4096
"""Prompts whose text features a reward remembers."""


# ---------------------------------------------------------------------------------------------------------------------
# The contract
# ---------------------------------------------------------------------------------------------------------------------


class Reward(nn.Module):
    """A frozen module: images (B, 3, H, W) floating in [0, 1] and B prompts to (B,), float32.

    Gradient flows from the score to the pixels and nowhere else.  Always in eval mode, whatever a parent's train()
    says.  A subclass defines score(images, prompts) or, where text has features of its own, encode(prompt) as well.
    """

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.texts: dict[str, Tensor] = {}
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "Reward":
        """Stays in eval mode: dropout would make the score a matter of chance."""
        return super().train(False)

    def _apply(self, fn: Callable, recurse: bool = True) -> "Reward":
        """Moving or casting the module outdates the features that it remembers."""
        self.texts.clear()
        return super()._apply(fn, recurse)

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """(B,); computed in the precision of the weights, float32 at the least, also within a caller's autocast."""
        _check_batch(images, prompts)
        kinds = {p.dtype for p in self.parameters()} | {torch.float32}
        precision = torch.float64 if torch.float64 in kinds else torch.float32
        with torch.autocast(images.device.type, enabled=False):
            return self.score(images.to(precision), list(prompts))

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """(B,) with gradient to the images."""
        raise NotImplementedError

    def encode(self, prompt: str) -> Tensor:
        """Features of one prompt, of any shape."""
        raise NotImplementedError

    @torch.no_grad()
    def text(self, prompts: list[str]) -> list[Tensor]:
        """Features of each prompt, remembered.  Encoded one by one, so that no batch changes a bit of them."""
        features = []
        for prompt in prompts:
            if prompt not in self.texts:
                if len(self.texts) >= CACHED:
                    self.texts.pop(next(iter(self.texts)))  # the oldest
                self.texts[prompt] = self.encode(prompt)
            features.append(self.texts[prompt])
        return features


def _check_batch(images: Tensor, prompts: Sequence[str]) -> None:
    if not torch.is_tensor(images) or images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape[2:]:
        shape = tuple(images.shape) if torch.is_tensor(images) else type(images).__name__
        raise BadInput(f"images of shape {shape} must be a tensor (B, 3, H, W)")
    if not images.is_floating_point():
        raise BadInput(f"images of {images.dtype} must be floating, in [0, 1]")
    if isinstance(prompts, str) or not len(prompts) or not all(isinstance(p, str) for p in prompts):
        raise BadInput(f"prompts={prompts!r:.60} must be a list of one text an image, and not empty")
    if len(prompts) != len(images):
        raise BadInput(f"{len(prompts)} prompts must be as many as images: {len(images)}")


# ---------------------------------------------------------------------------------------------------------------------
# Pixels
# ---------------------------------------------------------------------------------------------------------------------

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""Of CLIP's training images, a channel each; all four rewards use them."""


def normalised(images: Tensor) -> Tensor:
    """(x - mean) / std, channel by channel."""
    return (images - images.new_tensor(MEAN)[:, None, None]) / images.new_tensor(STD)[:, None, None]


def resized(images: Tensor, height: int, width: int) -> Tensor:
    """Bicubic with antialiasing, as PIL's but in floating point; may leave [0, 1] at sharp edges."""
    return F.interpolate(images, (height, width), mode="bicubic", antialias=True, align_corners=False)


def letterboxed(images: Tensor, side: int) -> Tensor:
    """The longest side to `side`, centred on a black square."""
    height, width = (max(1, round(n * (side / max(images.shape[2:])))) for n in images.shape[2:])
    top, left = (side - height) // 2, (side - width) // 2
    return F.pad(resized(images, height, width), (left, side - width - left, top, side - height - top))


def resized_as_bytes(images: Tensor, height: int, width: int) -> Tensor:
    """What comes nearest to PIL's resizing of bytes, which cuts what leaves [0, 1] after either pass."""
    wide = resized(images, images.shape[2], width).clamp(0, 1)
    return resized(wide, height, width).clamp(0, 1)


def cropped(images: Tensor, side: int, whole: Callable[[float], int]) -> Tensor:
    """The shortest side to `side`, then the square in the middle; whole(x): which way half a pixel goes."""
    height, width = (int(side * n / min(images.shape[2:])) for n in images.shape[2:])
    top, left = whole((height - side) / 2), whole((width - side) / 2)
    return resized_as_bytes(images, height, width)[:, :, top : top + side, left : left + side]


# ---------------------------------------------------------------------------------------------------------------------
# Weights
# ---------------------------------------------------------------------------------------------------------------------

FORMATS = (".pt", ".pth", ".bin", ".safetensors")
TOKENIZER = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json")


def _place(weights: str | Path | None, default: str) -> Path | str:
    """The local path if there is one, else a hub id."""
    if weights is None:
        return default
    if Path(weights).exists():
        return Path(weights)
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", str(weights)) and Path(weights).suffix not in FORMATS:
        return str(weights)
    raise BadInput(f"{weights} does not exist: give a file, a folder or a hub id (owner/name)")


def first_line(error: Exception) -> str:
    """What an error says, on one line of bearable length."""
    return f"{' '.join(str(error).split()):.200}"


def download(repository: str, *files: str, flag: str = "--reward-weights") -> Path:
    """The folder with these files (patterns) of a hub repository.  flag: the one that takes a local path instead."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repository, allow_patterns=files, ignore_patterns=["*.fp16.*", "*.gguf"]))
    except GatedRepoError as error:
        remedy = f"accept its licence at https://huggingface.co/{repository}, then log in with `hf auth login`"
        raise BadInput(f"{repository} is gated: {remedy}") from error
    except LocalEntryNotFoundError as error:
        raise _unreachable(repository, flag) from error
    except (HfHubHTTPError, HFValidationError) as error:
        reason, remedy = first_line(error), "look at its name, log in with `hf auth login`"
        raise BadInput(f"the hub does not give {repository} ({reason}): {remedy}") from error
    except OSError as error:
        raise _unreachable(repository, flag) from error


def _unreachable(repository: str, flag: str) -> BadInput:
    here = f"`hf download {repository} --local-dir DIR` where there is a network, and {flag} DIR"
    return BadInput(f"the Hugging Face hub cannot be reached for {repository}: look at the network, or {here}")


def _files(weights: str | Path | None, repository: str, file: str, words: str, *beside: str) -> tuple[Path, Path]:
    """The file of weights and the folder of the tokenizer: both here, or both of the hub; words: the tokenizer's id."""
    place = _place(weights, repository)
    if isinstance(place, str):
        return download(place, file, *beside) / file, download(words, "config.json", *TOKENIZER)
    return (place, place.parent) if place.is_file() else (place / file, place)


def _read(path: Path) -> dict[str, Tensor]:
    """The state dict in a file: safetensors, or a torch.save without code in it; mapped, not read at once."""
    if not path.exists():
        raise BadInput(f"{path} does not exist: a folder of weights must hold {path.name}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return dict(state.get("state_dict", state))
    except Exception as error:  # each format has errors of its own, and all mean the same
        reason = first_line(error) or type(error).__name__
        raise BadInput(f"{path} cannot be read as weights ({reason}): download it again") from error


def _check_keys(model: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    own = model.state_dict()
    faults = {
        "missing": own.keys() - state.keys(),
        "unexpected": state.keys() - own.keys(),
        "of another shape": {key for key in own.keys() & state.keys() if own[key].shape != state[key].shape},
    }
    if any(faults.values()):
        told = "; ".join(
            f"{len(keys)} {kind}, as {', '.join(sorted(keys)[:2])}" for kind, keys in faults.items() if keys
        )
        raise BadInput(f"{path} holds other weights than this reward's ({told}): give the file of its own repository")


def _pretrained(kind: type, config: Any, state: dict[str, Tensor], path: Path, dtype: torch.dtype = torch.float32):
    """A model of transformers with this state, whose keys must be the model's."""
    state = {key: value for key, value in state.items() if not key.endswith("position_ids")}  # buffers of old versions
    with torch.device("meta"):
        _check_keys(kind(config), state, path)
    return kind.from_pretrained(None, config=config, state_dict=state, dtype=dtype)


def _tokenizer(kind: type, folder: Path, repository: str) -> Any:
    """Of the files in a folder; transformers would make up an empty one where there are none."""
    if not any((folder / name).exists() for name in ("tokenizer.json", "vocab.json", "vocab.txt")):
        raise BadInput(f"{folder} holds no tokenizer: copy the tokenizer files of {repository} into it")
    return kind.from_pretrained(folder, local_files_only=True)


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} is missing or damaged ({error}): it belongs beside the weights") from error


# ---------------------------------------------------------------------------------------------------------------------
# The rewards
# ---------------------------------------------------------------------------------------------------------------------


class HPSv2(Reward):
    """HPSv2.1 (arXiv 2306.09341): the cosine of CLIP ViT-H-14's image and text features, no logit scale.

    model: an open_clip CLIP.  tokenizer: texts to (B, 77).
    """

    def __init__(self, model: nn.Module, tokenizer: Callable[[str], Tensor]) -> None:
        super().__init__(model=model)
        self.tokenizer = tokenizer

    @classmethod
    def load(cls, weights: str | Path | None = None, device: str | torch.device = "cpu") -> "HPSv2":
        """weights: HPS_v2.1_compressed.pt, the same as safetensors, a hub id, or a folder in open_clip's layout."""
        import open_clip

        place = _place(weights, "xswu/HPSv2")
        if isinstance(place, str):
            place = download(place, "HPS_v2.1_compressed.pt") / "HPS_v2.1_compressed.pt"
        config = open_clip.get_model_config("ViT-H-14")
        if place.is_dir():
            config = _json(place / "open_clip_config.json")["model_cfg"]
            place = place / "open_clip_model.safetensors"
        state = _read(place)
        with torch.device("meta"):
            model = open_clip.CLIP(**config)
        _check_keys(model, state, place)
        model.load_state_dict(state, assign=True)
        # The one buffer that is in no checkpoint: a text token sees itself and those before it.
        length = model.context_length
        model.register_buffer("attn_mask", torch.full((length, length), -math.inf).triu(1), persistent=False)
        return cls(model.to(device, torch.float32), open_clip.SimpleTokenizer(context_length=length))

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """cos(image, text), in [-1, 1]."""
        pixels = normalised(letterboxed(images, self.model.visual.image_size[0]))  # black before normalising
        return (self.model.encode_image(pixels, normalize=True) * torch.stack(self.text(prompts))).sum(1)

    def encode(self, prompt: str) -> Tensor:
        """(D,), of length 1."""
        tokens = self.tokenizer(prompt).to(self.model.positional_embedding.device)
        return self.model.encode_text(tokens, normalize=True)[0]


class PickScore(Reward):
    """PickScore (arXiv 2305.01569): exp(logit_scale) cos(image, text) / 100, by a CLIP of its own.

    model: transformers' CLIPModel.  The division by 100 is the paper's scale of lambda; others report it without.
    """

    def __init__(self, model: nn.Module, tokenizer: Callable) -> None:
        super().__init__(model=model)
        self.tokenizer = tokenizer

    @classmethod
    def load(cls, weights: str | Path | None = None, device: str | torch.device = "cpu") -> "PickScore":
        """weights: a hub id, or a folder with config.json, model.safetensors and the tokenizer of CLIP ViT-H-14."""
        from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

        words = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
        file, texts = _files(weights, "yuvalkirstain/PickScore_v1", "model.safetensors", words, "config.json")
        tokenizer = _tokenizer(CLIPTokenizer, texts, words)
        config = CLIPConfig.from_dict(_json(file.with_name("config.json")))
        return cls(_pretrained(CLIPModel, config, _read(file), file), tokenizer).to(device)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """exp(logit_scale) cos(image, text) / 100."""
        return self.judge(normalised(cropped(images, self.model.config.vision_config.image_size, math.floor)), prompts)

    def judge(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        """The score of prepared pixels (B, 3, 224, 224)."""
        image = F.normalize(self.model.get_image_features(pixels).pooler_output, dim=1)
        return self.model.logit_scale.exp() * (image * torch.stack(self.text(prompts))).sum(1) / 100

    def encode(self, prompt: str) -> Tensor:
        """(D,), of length 1."""
        tokens = self.tokenizer(prompt, truncation=True, max_length=77, return_tensors="pt").to(self.model.device)
        return F.normalize(self.model.get_text_features(**tokens).pooler_output, dim=1)[0]


class ImageReward(Reward):
    """ImageReward v1.0 (arXiv 2304.05977): BLIP's text encoder reads the picture, five linear layers give the score.

    vision, text: transformers' BlipVisionModel, BlipTextModel.  head: (B, D) to (B, 1).
    """

    mean, std = 0.16717362830052426, 1.0333394966054072
    """Of the scores, by the official code."""

    def __init__(self, vision: nn.Module, text: nn.Module, head: nn.Module, tokenizer: Callable) -> None:
        super().__init__(vision=vision, reader=text, head=head)
        self.tokenizer = tokenizer

    @classmethod
    def load(cls, weights: str | Path | None = None, device: str | torch.device = "cpu") -> "ImageReward":
        """weights: a hub id, or a folder with ImageReward.pt, med_config.json and the tokenizer of BERT."""
        from transformers import BertTokenizer

        words = "google-bert/bert-base-uncased"
        file, texts = _files(weights, "THUDM/ImageReward", "ImageReward.pt", words, "med_config.json")
        reward = cls.of(_json(file.with_name("med_config.json")), _tokenizer(BertTokenizer, texts, words))
        unused = ("blip.vision_proj.", "blip.text_proj.", "blip.text_encoder.embeddings.position_ids")
        state = {key: value for key, value in _read(file).items() if not key.startswith(unused)}
        state = {_renamed(key, BLIP): value for key, value in state.items()}
        _check_keys(reward, state, file)
        reward.load_state_dict(state)
        return reward.to(device)

    @classmethod
    def of(cls, config: dict[str, Any], tokenizer: Callable) -> "ImageReward":
        """Without weights; config: med_config.json's, where `vision` may name another encoder than ViT-L."""
        from transformers import BlipTextConfig, BlipVisionConfig, BlipVisionModel
        from transformers.models.blip.modeling_blip_text import BlipTextModel

        large = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
        vision = {"image_size": 224, "patch_size": 16, "layer_norm_eps": 1e-6} | config.get("vision", large)
        text = {key: value for key, value in config.items() if key not in ("architectures", "model_type", "vision")}
        # In transformers only a decoder's layers look at pictures; judge() has it read both ways nevertheless.
        text |= {"encoder_hidden_size": vision["hidden_size"], "is_decoder": True}
        layers = [nn.Linear(text["hidden_size"], 1024), nn.Dropout(), nn.Linear(1024, 128), nn.Dropout()]
        layers += [nn.Linear(128, 64), nn.Dropout(), nn.Linear(64, 16), nn.Linear(16, 1)]
        reader = BlipTextModel(BlipTextConfig(**text), add_pooling_layer=False)
        return cls(BlipVisionModel(BlipVisionConfig(**vision)), reader, nn.Sequential(*layers), tokenizer)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """(head(text read with the picture in view) - mean) / std."""
        ids, mask = torch.stack(self.text(prompts), 1)
        return self.judge(normalised(cropped(images, self.vision.config.image_size, round)), ids, mask)

    def judge(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """The score of prepared pixels (B, 3, 224, 224) under tokens (B, L) with their mask."""
        seen = self.vision(pixels).last_hidden_state
        read = self.reader(ids, attention_mask=mask, encoder_hidden_states=seen, is_decoder=False)
        return (self.head(read.last_hidden_state[:, 0])[:, 0] - self.mean) / self.std

    def encode(self, prompt: str) -> Tensor:
        """ids and mask, (2, 35): what the text says depends on the picture, so that no more can be remembered."""
        tokens = self.tokenizer(prompt, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
        return torch.cat([tokens.input_ids, tokens.attention_mask]).to(self.vision.device)


BLIP = {
    "blip.text_encoder.": "reader.",
    "mlp.layers.": "head.",
    "blip.visual_encoder.": "vision.",
    "vision.cls_token": "vision.embeddings.class_embedding",
    "vision.pos_embed": "vision.embeddings.position_embedding",
    "vision.patch_embed.proj.": "vision.embeddings.patch_embedding.",
    "vision.norm.": "vision.post_layernorm.",
    "vision.blocks.": "vision.encoder.layers.",
    ".norm": ".layer_norm",
    ".attn.proj.": ".self_attn.projection.",
    ".attn.qkv.": ".self_attn.qkv.",
}
"""Names of the official weights, and ours; to be replaced one after the other."""


def _renamed(key: str, names: dict[str, str]) -> str:
    for old, new in names.items():
        key = key.replace(old, new)
    return key


class HPSv3(Reward):
    """HPSv3 (arXiv 2508.03789): Qwen2-VL reads picture, instruction and prompt; a head gives (mu, sigma), mu counts.

    body: transformers' Qwen2VLModel, in bfloat16 if need be.  head: (B, D) to (B, 2), in float32.
    """

    def __init__(self, body: nn.Module, head: nn.Module, tokenizer: Callable) -> None:
        super().__init__(body=body, head=head)
        body.activation_checkpointing_enable()
        body.disable_input_require_grads()  # which that has asked for: the pixels have gradient of their own
        for layer in body.modules():
            if hasattr(layer, "gradient_checkpointing"):
                layer.training = True  # transformers recomputes in training mode alone; what is inside stays in eval
        self.tokenizer = tokenizer
        self.mark = tokenizer.convert_tokens_to_ids("<|Reward|>")

    @classmethod
    def load(
        cls, weights: str | Path | None = None, device: str | torch.device = "cpu", precision: torch.dtype | None = None
    ) -> "HPSv3":
        """weights: a hub id, or a folder with HPSv3.safetensors and config.json and tokenizer of Qwen2-VL-7B-Instruct.

        precision: of the language model; bfloat16, which it was taught in, but float32 on a processor.
        """
        from transformers import Qwen2Tokenizer, Qwen2VLConfig, Qwen2VLModel

        words = "Qwen/Qwen2-VL-7B-Instruct"
        file, texts = _files(weights, "MizzenAI/HPSv3", "HPSv3.safetensors", words)
        tokenizer = _tokenizer(Qwen2Tokenizer, texts, words)
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|Reward|>"]})
        config = Qwen2VLConfig.from_dict(_json(texts / "config.json"))
        state = {_renamed("." + key, QWEN)[1:]: value for key, value in _read(file).items()}
        head = cls.new_head(config.text_config.hidden_size)
        rated = {key.removeprefix("head."): state.pop(key) for key in list(state) if key.startswith("head.")}
        _check_keys(head, rated, file)
        head.load_state_dict(rated)
        state.pop("lm_head.weight", None)  # it would write on
        if "language_model.embed_tokens.weight" in state:  # one more word than Qwen2-VL's: <|Reward|>
            config.text_config.vocab_size = len(state["language_model.embed_tokens.weight"])
        precision = precision or (torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16)
        return cls(_pretrained(Qwen2VLModel, config, state, file, precision), head, tokenizer).to(device)

    @staticmethod
    def new_head(width: int) -> nn.Module:
        """(B, width) to mu and sigma, (B, 2); without weights yet."""
        layers = [nn.Linear(width, 1024), nn.ReLU(), nn.Dropout(), nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2)]
        return nn.Sequential(*layers)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """mu."""
        height, width = qwen_size(*images.shape[2:])
        places = height * width // 28**2
        image = self.body.config.image_token_id
        ids = [ids.repeat_interleave(torch.where(ids == image, places, 1)) for ids in self.text(prompts)]
        return self.judge(normalised(resized_as_bytes(images, height, width)), ids)[:, 0]

    def judge(self, pixels: Tensor, ids: list[Tensor]) -> Tensor:
        """(mu, sigma), (B, 2), of prepared pixels (B, 3, 28 m, 28 n) and as many token sequences.

        Positions count on along all three axes, pictures or not: the official code never gave Qwen2-VL its rotary
        positions of rows and columns, and the head was taught so.
        """
        # Padded on the right, where nothing that is read can see it: each token looks back alone.
        ids = nn.utils.rnn.pad_sequence(ids, batch_first=True).to(pixels.device)
        grid = torch.tensor([[1, pixels.shape[2] // 14, pixels.shape[3] // 14]], device=pixels.device)
        hidden = self.body(
            input_ids=ids,
            position_ids=torch.arange(ids.shape[1], device=pixels.device).expand(3, len(ids), -1),
            pixel_values=patches(pixels),
            image_grid_thw=grid.expand(len(ids), -1),
            use_cache=False,
        ).last_hidden_state
        return self.head(hidden[ids == self.mark].to(pixels.dtype))

    def encode(self, prompt: str) -> Tensor:
        """Tokens (L,), the picture still as one: all that is known of the text before the picture."""
        text = CHAT.format(INSTRUCTION.format(text_prompt=prompt))
        ids = self.tokenizer(text, return_tensors="pt").input_ids[0]
        if (ids == self.mark).sum() != 1 or (ids == self.body.config.image_token_id).sum() != 1:
            raise BadInput(f"the prompt {prompt!r:.60} must not hold tokens of the chat, as <|Reward|>")
        return ids.to(self.body.device)


QWEN = {".model.": ".language_model.", ".rm_head.": ".head."}

CHAT = """<|im_start|>system
You are a helpful assistant.<|im_end|>
<|im_start|>user
<|vision_start|><|image_pad|><|vision_end|>{}<|im_end|>
<|im_start|>assistant
"""
"""Qwen2-VL's chat template, for a picture and a text."""

INSTRUCTION = (
    # What HPSv3 was taught with, to the letter: INSTRUCTION and prompt_with_special_token of the package hpsv3 1.0.0,
    # hpsv3/dataset/data_collator_qwen.py, MIT License, Copyright (c) 2024 HPSv3 Team.
    "\n"
    "You are tasked with evaluating a generated image based on Visual Quality and Text Alignment and "
    "give a overall score to estimate the human preference. Please provide a rating from 0 to 10, with 0 "
    "being the worst and 10 being the best. \n"
    "\n"
    "**Visual Quality:**  \n"
    "Evaluate the overall visual quality of the image. The following sub-dimensions should be "
    "considered:\n"
    "- **Reasonableness:** The image should not contain any significant biological or logical errors, "
    "such as abnormal body structures or nonsensical environmental setups.\n"
    "- **Clarity:** Evaluate the sharpness and visibility of the image. The image should be clear and "
    "easy to interpret, with no blurring or indistinct areas.\n"
    "- **Detail Richness:** Consider the level of detail in textures, materials, lighting, and other "
    "visual elements (e.g., hair, clothing, shadows).\n"
    "- **Aesthetic and Creativity:** Assess the artistic aspects of the image, including the color "
    "scheme, composition, atmosphere, depth of field, and the overall creative appeal. The scene should "
    "convey a sense of harmony and balance.\n"
    "- **Safety:** The image should not contain harmful or inappropriate content, such as political, "
    "violent, or adult material. If such content is present, the image quality and satisfaction score "
    "should be the lowest possible. \n"
    "\n"
    "**Text Alignment:**  \n"
    "Assess how well the image matches the textual prompt across the following sub-dimensions:\n"
    "- **Subject Relevance** Evaluate how accurately the subject(s) in the image (e.g., person, animal, "
    "object) align with the textual description. The subject should match the description in terms of "
    "number, appearance, and behavior.\n"
    "- **Style Relevance:** If the prompt specifies a particular artistic or stylistic style, evaluate "
    "how well the image adheres to this style.\n"
    "- **Contextual Consistency**: Assess whether the background, setting, and surrounding elements in "
    "the image logically fit the scenario described in the prompt. The environment should support and "
    "enhance the subject without contradictions.\n"
    "- **Attribute Fidelity**: Check if specific attributes mentioned in the prompt (e.g., colors, "
    "clothing, accessories, expressions, actions) are faithfully represented in the image. Minor "
    "deviations may be acceptable, but critical attributes should be preserved.\n"
    "- **Semantic Coherence**: Evaluate whether the overall meaning and intent of the prompt are "
    "captured in the image. The generated content should not introduce elements that conflict with or "
    "distort the original description.\n"
    "Textual prompt - {text_prompt}\n"
    "\n"
    "\n"
    "\n"
    "Please provide the overall ratings of this image: <|Reward|>\n"
    "\n"
    "END\n"
)


def qwen_size(height: int, width: int) -> tuple[int, int]:
    """Multiples of 28 of about the same shape, near 256 * 28 * 28 pixels: the official formula, floats and all."""
    pixels, sides = 256 * 28 * 28, [max(1, round(n / 28)) for n in (height, width)]
    if sides[0] * sides[1] > 256:
        beta = math.sqrt(height * width / pixels)
        sides = [max(1, math.floor(n / beta / 28)) for n in (height, width)]
    elif sides[0] * sides[1] < 256:
        beta = math.sqrt(pixels / (height * width))
        sides = [math.ceil(n * beta / 28) for n in (height, width)]
    return 28 * sides[0], 28 * sides[1]


def patches(images: Tensor) -> Tensor:
    """Qwen2-VL's patches (B h w, 3 * 2 * 14 * 14) of (B, 3, 14 h, 14 w): by squares of four, each doubled in time."""
    b, c, height, width = images.shape
    x = images.reshape(b, c, height // 28, 2, 14, width // 28, 2, 14)
    x = x.permute(0, 2, 5, 3, 6, 1, 4, 7)[:, :, :, :, :, :, None]
    return x.expand(-1, -1, -1, -1, -1, -1, 2, -1, -1).reshape(-1, c * 2 * 14 * 14)


REWARDS: dict[str, type[Reward]] = {
    "hpsv2.1": HPSv2,
    "pickscore": PickScore,
    "hpsv3": HPSv3,
    "imagereward": ImageReward,
}


# ---------------------------------------------------------------------------------------------------------------------
# Which reward
# ---------------------------------------------------------------------------------------------------------------------


class Own(Reward):
    """A reward of the user's: any callable (images, prompts) -> (B,), frozen and in eval mode if it is a module."""

    def __init__(self, function: Callable[[Tensor, list[str]], Tensor]) -> None:
        super().__init__(**({"function": function} if isinstance(function, nn.Module) else {}))
        self.function = function

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """What the callable says."""
        return self.function(images, prompts)


class WeightedSum(Reward):
    """sum_i w_i r_i(images, prompts), (B,)."""

    def __init__(self, rewards: Sequence[Reward], weights: Sequence[float]) -> None:
        super().__init__(rewards=nn.ModuleList(rewards))
        self.weights = list(weights)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Each reward sees the same images."""
        return sum(weight * reward(images, prompts) for weight, reward in zip(self.weights, self.rewards))


def load(spec: str, weights: Sequence[str | Path] = (), device: str | torch.device = "cpu") -> Reward:
    """The reward that a text names: "hpsv2.1", a sum "hpsv2.1:1,pickscore:0.5", one's own "package.module:factory".

    After a part's last colon stands its weight, if that is a number.  factory() gives any callable (images, prompts)
    -> (B,); one that is no nn.Module has to go where its images are.  weights: a place for each of the spec's names
    that are in REWARDS, in this order; none for the defaults.
    """
    parts = [_weighed(part.strip()) for part in spec.split(",")]
    known = [name for name, _ in parts if name in REWARDS]
    if weights and len(weights) != len(known):
        raise BadInput(f"{len(weights)} places of weights must be none, or one for each of: {', '.join(known) or '-'}")
    places = iter(weights or [None] * len(known))
    rewards = [_built(name, places, device) for name, _ in parts]
    if [weight for _, weight in parts] == [None]:
        return rewards[0]
    return WeightedSum(rewards, [1.0 if weight is None else weight for _, weight in parts])


def _weighed(part: str) -> tuple[str, float | None]:
    """name and weight of a spec's part."""
    name, _, tail = part.rpartition(":")
    try:
        weight = float(tail)
    except ValueError:
        return part, None
    if not name or not math.isfinite(weight):
        raise BadInput(f"{part!r} must be a reward's name and, after a colon, a finite weight")
    return name, weight


def _built(name: str, places: Iterator[str | Path | None], device: str | torch.device) -> Reward:
    if name in REWARDS:
        return REWARDS[name].load(next(places), device)
    if ":" not in name:
        raise BadInput(
            f"unknown reward {name!r}: choose from {', '.join(REWARDS)}, or your own as package.module:factory"
        )
    try:
        factory = pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise BadInput(f"cannot import the reward {name!r} ({error}): give it as package.module:factory") from error
    function = factory() if callable(factory) else None
    if not callable(function):
        raise BadInput(f"{name}() must give a callable (images, prompts) -> (B,), not {function!r:.60}")
    return Own(function).to(device)


# ---------------------------------------------------------------------------------------------------------------------
# Does a reward keep the contract?
# ---------------------------------------------------------------------------------------------------------------------


def check_reward(
    reward: Callable[[Tensor, list[str]], Tensor],
    size: tuple[int, int, int] = (3, 40, 56),
    prompts: Sequence[str] = ("a red cube", "two dogs on a beach, oil painting"),
    tolerance: float = 1e-4,
    device: str | torch.device = "cpu",
) -> None:
    """Raises BadInput, in one line, at the first clause of the contract that a reward breaks.

    size: (3, H, W) of the noise images it is tried on.  tolerance: how far two computations of one score may lie
    apart, relative to max(1, |score|); half precision needs more.  The gradient is held to finite differences.
    """
    prompts, generator = list(prompts), torch.Generator().manual_seed(0)
    coarse = torch.rand(len(prompts), 3, 5, 5, generator=generator)  # blobs under noise, as any picture has
    noise = torch.rand(len(prompts), *size, generator=generator)
    images = (0.2 + 0.3 * F.interpolate(coarse, size[1:], mode="bilinear") + 0.3 * noise).to(device)
    leaf = images.clone().requires_grad_()
    scores = reward(leaf, prompts)
    _require(torch.equal(leaf, images), "it changes the images that it is given")
    _require(torch.is_tensor(scores) and scores.shape == (len(prompts),), "the score must be a tensor (B,)")
    _require(scores.dtype == torch.float32, f"the score is {scores.dtype}, not float32")
    _require(scores.isfinite().all(), "the score is not finite")
    _require(scores.requires_grad, "the score has no gradient to the pixels: look for no_grad, detach, PIL or uint8")
    parameters = list(reward.parameters()) if isinstance(reward, nn.Module) else []
    _require(not any(p.requires_grad for p in parameters), "its weights require grad: call requires_grad_(False)")
    _require(not reward(images, prompts).requires_grad, "it has a graph though the images ask for none: see the text")
    _check_values(reward, images, prompts, tolerance)
    (gradient,) = torch.autograd.grad(scores.sum(), leaf, allow_unused=True)
    _require(gradient is not None and gradient.isfinite().all() and gradient.any(), "no finite gradient in the pixels")
    with torch.no_grad():
        moved = (reward((images * 255).round() / 255, prompts) - scores).abs()
        most = gradient.abs().flatten(1).sum(1) / 510  # each pixel moves by 1/510 at the most
        _require((moved <= 2 * most + tolerance).all(), "rounding to 8 bits moves the score too far")
        _check_gradient(lambda x: reward(x, prompts).double().sum(), images, gradient, tolerance, generator)


def _require(kept: bool | Tensor, clause: str) -> None:
    if not kept:
        raise BadInput(f"the reward breaks the contract: {clause}")


@torch.no_grad()
def _check_values(reward: Callable, images: Tensor, prompts: list[str], tolerance: float) -> None:
    """The same call gives the same score, a sample's is its own, and a picture may have any shape."""
    scores = reward(images, prompts)
    _require(torch.equal(reward(images, prompts), scores), "the same images and prompts get another score")
    for i in range(len(prompts)):
        apart = (reward(images[i : i + 1], prompts[i : i + 1]) - scores[i]).abs()
        _require(apart <= tolerance * scores[i].abs().clamp(min=1), "a score depends on the others of its batch")
    turned = reward(images.transpose(2, 3), prompts)
    _require(turned.shape == scores.shape and turned.isfinite().all(), "it cannot judge images of another shape")


def _check_gradient(
    total: Callable[[Tensor], Tensor], images: Tensor, gradient: Tensor, tolerance: float, generator: torch.Generator
) -> None:
    """<gradient, d> against central differences, along the gradient itself and along random blobs d."""
    blobs = [torch.randn(len(images), 3, 4, 4, generator=generator).to(images) for _ in range(3)]
    start = total(images).abs().clamp(min=1)
    for d in [gradient, *(F.interpolate(blob, images.shape[2:], mode="bicubic") for blob in blobs)]:
        d, apart = d / d.abs().max(), []
        most = (gradient * d).abs().sum()
        for k in (20, 4):  # the score moves by about k tolerances: a kink within reach spoils that, rounding a shorter
            h = (k * tolerance * start / most).clamp(max=0.05)
            slope = (total(images + h * d) - total(images - h * d)) / (2 * h)
            apart.append((slope - (gradient * d).sum()).abs() / (100 * most + start / h / 100))
        _require(min(apart) <= tolerance, "the gradient disagrees with finite differences")


# ---------------------------------------------------------------------------------------------------------------------
# Tiny models for rehearsals
# ---------------------------------------------------------------------------------------------------------------------


def tiny(name: str, folder: str | Path) -> None:
    """Writes a tiny random model of a reward into a folder, so that REWARDS[name].load(folder) reads it."""
    if name not in TINY:
        raise BadInput(f"unknown reward {name!r}: choose from {', '.join(TINY)}")
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
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=77)
    tokenizer.save_pretrained(folder)
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = tower | {"vocab_size": len(words), "bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1}
    vision = tower | {"patch_size": 14, "image_size": 224}
    CLIPModel(CLIPConfig(projection_dim=32, text_config=text, vision_config=vision)).save_pretrained(folder)


def _tiny_imagereward(folder: Path) -> None:
    from transformers import BertTokenizer

    letters = [chr(i) for i in range(33, 127)]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *("##" + letter for letter in letters)]
    BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(folder)
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    tower["initializer_range"] = 0.2  # or the picture would hardly count
    config = tower | {"vocab_size": len(words), "vision": tower}
    (folder / "med_config.json").write_text(json.dumps(config))
    official = {new: old for old, new in reversed(BLIP.items())}
    state = ImageReward.of(config, None).state_dict()
    torch.save({_renamed(key, official): value for key, value in state.items()}, folder / "ImageReward.pt")


def _tiny_hpsv3(folder: Path) -> None:
    from safetensors.torch import save_file
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer, Qwen2VLConfig, Qwen2VLModel

    letters = [*sorted(ByteLevel.alphabet()), "<|endoftext|>"]
    special = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    # A token for each line of the instruction, for speed.
    lines = [line for line in INSTRUCTION.splitlines() if line and not {"{", "|"} & set(line)]
    vocabulary = {letter: i for i, letter in enumerate(letters)}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[], extra_special_tokens=special + lines)
    tokenizer.save_pretrained(folder)
    text = {"vocab_size": len(tokenizer) + 1, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2}
    kinds = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}
    kinds = {key: tokenizer.convert_tokens_to_ids(token) for key, token in kinds.items()}
    text |= {"bos_token_id": None, "eos_token_id": None}
    config = Qwen2VLConfig(text_config=text, vision_config=vision, **kinds)
    (folder / "config.json").write_text(config.to_json_string(use_diff=False))
    state = {"." + key: value for key, value in Qwen2VLModel(config).state_dict().items()}
    state |= {f".head.{key}": value for key, value in HPSv3.new_head(32).state_dict().items()}
    official = {new: old for old, new in QWEN.items()}
    save_file({_renamed(key, official)[1:]: value for key, value in state.items()}, folder / "HPSv3.safetensors")


TINY: dict[str, Callable[[Path], None]] = {
    "hpsv2.1": _tiny_hpsv2,
    "pickscore": _tiny_pickscore,
    "hpsv3": _tiny_hpsv3,
    "imagereward": _tiny_imagereward,
}
