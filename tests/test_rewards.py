"""The rewards: their contract, their parity with the official code, and what they refuse."""

import hashlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rewards
from leap_align import BadInput
from rewards import PRESETS, REWARDS, WeightedSum, check_reward, load, tiny

NEEDS = {"hpsv2.1": "open_clip", "pickscore": "transformers", "hpsv3": "transformers", "imagereward": "transformers"}
ROOT = Path(__file__).parents[1]
PROMPTS = ["a red cube", "Two dogs on a beach, oil painting"]
every_reward = pytest.mark.parametrize("name", NEEDS)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """folder(name): where a tiny random model of this reward lies; skips where its library is not installed."""
    root = tmp_path_factory.mktemp("tiny")

    def written(name):
        pytest.importorskip(NEEDS[name])
        if not (root / name).exists():
            tiny(name, root / name)
        return root / name

    return written


@pytest.fixture
def reward(folder, name):
    return REWARDS[name].load(folder(name))


def pictures(n=2, height=40, width=56, seed=0):
    """Blobs under noise, in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = F.interpolate(torch.rand(n, 3, 5, 5, generator=generator), (height, width), mode="bilinear")
    return (0.6 * coarse + 0.4 * torch.rand(n, 3, height, width, generator=generator)).clamp(0, 1)


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


def test_importing_rewards_needs_no_large_library():
    done = subprocess.run(
        [sys.executable, "-c", "import sys, rewards; print(*sys.modules)"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert not set(done.stdout.split()) & {"transformers", "open_clip", "safetensors", "huggingface_hub", "PIL"}


# The contract, for every reward


def test_every_reward_has_its_table_entries():
    assert NEEDS.keys() == REWARDS.keys() == PRESETS.keys() == rewards.TINY.keys()


@every_reward
@pytest.mark.parametrize("size", [(3, 40, 56), (3, 70, 33)])
def test_keeps_the_contract(reward, size):
    check_reward(reward, size)


@every_reward
def test_gradient_is_right(reward, name):
    """Central differences in float64, along the gradient and a random direction, both of length 1.

    Qwen2-VL's norms compute in float32 whatever they are given, and its head has kinks: a longer step, less precision.
    """
    step, tolerance = (0.01, 5e-3) if name == "hpsv3" else (1e-4, 1e-6)
    images, reward = pictures(1).double(), reward.double()
    leaf = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(reward(leaf, PROMPTS[:1]).sum(), leaf)
    generator = torch.Generator().manual_seed(1)
    for d in [gradient, torch.randn(images.shape, generator=generator, dtype=torch.float64)]:
        d = d / d.norm()
        with torch.no_grad():
            up, down = (reward(images + by * d, PROMPTS[:1]).sum() for by in (step, -step))
        slope = (gradient * d).sum().item()
        assert abs(slope) > 1e-5
        assert (up - down).item() / (2 * step) == pytest.approx(slope, rel=tolerance, abs=1e-9)


@every_reward
def test_a_cached_text_is_the_same_text(folder, name):
    images = pictures(3)
    first, fresh = (REWARDS[name].load(folder(name)) for _ in range(2))
    first(images[:1], PROMPTS[1:])
    again = first(images, [PROMPTS[0], PROMPTS[1], PROMPTS[0]])
    assert torch.equal(again, fresh(images, [PROMPTS[0], PROMPTS[1], PROMPTS[0]]))
    assert torch.equal(again, first(images, [PROMPTS[0], PROMPTS[1], PROMPTS[0]]))


@every_reward
def test_the_cache_is_bounded(reward, monkeypatch):
    monkeypatch.setattr(rewards, "CACHED", 2)
    texts = ["a", "b", "c", "a", "d"]
    long = reward(pictures(5), texts)
    assert len(reward.texts) <= 2
    alone = [reward(pictures(5)[i : i + 1], texts[i : i + 1])[0] for i in range(5)]
    assert long.tolist() == pytest.approx([score.item() for score in alone], abs=1e-6)


@every_reward
def test_the_prompt_matters(reward):
    a, b = reward(pictures(1).repeat(2, 1, 1, 1), ["a red cube", "a red sphere"]).tolist()
    assert abs(a - b) > 1e-4


@every_reward
def test_stays_frozen_and_in_eval_mode(reward):
    parent = nn.Sequential(reward).train()
    assert parent.training and not any(module.training for module in reward.modules())
    assert not any(p.requires_grad for p in reward.parameters())
    reward(pictures().requires_grad_(), PROMPTS).sum().backward()
    assert all(p.grad is None for p in reward.parameters())


@every_reward
def test_casting_forgets_the_cached_text(folder, name):
    used, fresh = (REWARDS[name].load(folder(name)) for _ in range(2))
    used(pictures(), PROMPTS)
    scores = used.double()(pictures(), PROMPTS)
    assert scores.dtype == torch.float64 and torch.equal(scores, fresh.double()(pictures(), PROMPTS))


@every_reward
def test_half_precision_pictures_are_judged_in_float32(reward):
    images = pictures().bfloat16()
    assert torch.equal(reward(images, PROMPTS), reward(images.float(), PROMPTS))


@every_reward
def test_a_callers_autocast_changes_nothing(reward):
    with torch.autocast("cpu", torch.bfloat16):
        inside = reward(pictures(), PROMPTS)
    assert torch.equal(inside, reward(pictures(), PROMPTS))


@every_reward
@pytest.mark.parametrize(
    ("images", "prompts", "word"),
    [
        (torch.rand(3, 8, 8), ["a"], "(B, 3, H, W)"),
        (torch.rand(1, 4, 8, 8), ["a"], "(B, 3, H, W)"),
        ("a.png", ["a"], "(B, 3, H, W)"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), ["a"], "uint8"),
        (torch.rand(2, 3, 8, 8), ["a"], "1 prompts"),
        (torch.rand(1, 3, 8, 8), [], "not empty"),
        (torch.rand(1, 3, 8, 8), "a", "list"),
        (torch.rand(1, 3, 8, 8), [None], "list"),
    ],
)
def test_refuses_what_is_no_batch(reward, images, prompts, word):
    with pytest.raises(BadInput) as error:
        reward(images, prompts)
    assert word in one_line(error)


# HPSv2

SIZES = [(224, 224), (300, 200), (97, 411), (512, 512), (225, 640), (1, 300)]

OFFICIAL_HPSV2 = """
import builtins, json, os, sys, types, warnings
import open_clip.tokenizer
sys.modules["turtle"] = types.ModuleType("turtle")  # hpsv2 imports it by mistake; it needs tkinter
sys.modules["turtle"].forward = None
vocabulary, read = open_clip.tokenizer.default_bpe(), builtins.open


def open_(file, *rest, **named):
    missing = str(file).endswith("bpe_simple_vocab_16e6.txt.gz") and not os.path.exists(file)
    return read(vocabulary if missing else file, *rest, **named)  # the wheel forgot it; open_clip ships the same bytes


builtins.open = open_
from hpsv2 import img_score
from hpsv2.src.open_clip import factory

job = json.load(sys.stdin)
if job["config"]:
    factory._MODEL_CONFIGS["ViT-H-14"] = job["config"]
create = img_score.create_model_and_transforms
img_score.create_model_and_transforms = lambda name, pretrained, **rest: create(name, None, **rest)  # no download
score = lambda image, prompt: img_score.score(image, prompt, cp=job["weights"], hps_version="v2.1")[0]
print(json.dumps([float(score(*pair)) for pair in job["pairs"]]))
"""


def official_hpsv2(weights, config, images, prompts, tmp_path):
    """The official package's scores; it runs in a process of its own, for its import changes settings for all."""
    image = pytest.importorskip("PIL.Image")
    paths = [str(tmp_path / f"{i}.png") for i in range(len(images))]
    for path, picture in zip(paths, images):
        image.fromarray(picture[0].permute(1, 2, 0).numpy()).save(path)
    job = {"weights": str(weights), "config": config, "pairs": list(zip(paths, prompts))}
    command = [sys.executable, "-W", "ignore", "-c", OFFICIAL_HPSV2]
    surroundings = os.environ | {"HPS_ROOT": str(tmp_path)}  # or it makes a folder in the user's home
    done = subprocess.run(
        command, input=json.dumps(job), cwd=tmp_path, env=surroundings, capture_output=True, text=True
    )
    lines = done.stderr.strip().splitlines()
    if done.returncode and any(kind in lines[-1] for kind in ("ImportError", "ModuleNotFoundError")):
        pytest.skip(f"the official package cannot be imported here: {lines[-1]}")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


def bytes_pictures(sizes):
    return [(pictures(1, *size, seed=i) * 255).round().to(torch.uint8) for i, size in enumerate(sizes)]


def test_hpsv2_is_the_official_score(folder, tmp_path):
    pytest.importorskip("hpsv2")
    place = folder("hpsv2.1")
    reward = REWARDS["hpsv2.1"].load(place)
    config = json.loads((place / "open_clip_config.json").read_text())["model_cfg"]
    torch.save({"state_dict": reward.model.state_dict()}, tmp_path / "tiny.pt")
    images, prompts = bytes_pictures(SIZES), [*PROMPTS, "", "émoji 🦊 & <b>html</b>", "word " * 100, "A  b\tc"]
    expected = official_hpsv2(tmp_path / "tiny.pt", config, images, prompts, tmp_path)
    ours = [reward(image / 255, [prompt]).item() for image, prompt in zip(images, prompts)]
    assert ours == pytest.approx(expected, abs=1e-6)
    assert max(expected) - min(expected) > 0.05


@pytest.mark.slow
def test_hpsv2_of_full_size_is_the_official_score(tmp_path):
    """ViT-H-14 with random weights, written as the official checkpoint is: half precision under `state_dict`."""
    open_clip = pytest.importorskip("open_clip")
    pytest.importorskip("hpsv2")
    torch.manual_seed(0)
    state = {key: value.half() for key, value in open_clip.create_model("ViT-H-14").state_dict().items()}
    path = tmp_path / "HPS_v2.1_compressed.pt"
    torch.save({"state_dict": state}, path)
    del state
    images = bytes_pictures([(512, 512), (300, 200)])
    expected = official_hpsv2(path, None, images, PROMPTS, tmp_path)
    reward = load("hpsv2.1", [path])
    ours = [reward(image / 255, [prompt]).item() for image, prompt in zip(images, PROMPTS)]
    path.unlink()
    assert ours == pytest.approx(expected, abs=1e-6)


def test_hpsv2_reads_a_file_of_half_precision(folder, tmp_path, monkeypatch):
    """The official file is one file, which says nothing of its architecture: that is ViT-H-14, here a tiny one."""
    open_clip = pytest.importorskip("open_clip")
    place = folder("hpsv2.1")
    reward = REWARDS["hpsv2.1"].load(place)
    config = json.loads((place / "open_clip_config.json").read_text())["model_cfg"]
    monkeypatch.setattr(open_clip, "get_model_config", {"ViT-H-14": config}.get)
    torch.save({"state_dict": reward.half().model.state_dict()}, tmp_path / "half.pt")
    single = load("hpsv2.1", [tmp_path / "half.pt"])
    assert {p.dtype for p in single.parameters()} == {torch.float32}
    assert torch.equal(single(pictures(), PROMPTS), reward.float()(pictures(), PROMPTS))


# PickScore


def official_pickscore(model, tokenizer, pixels, prompts):
    """As in the model card, with the pixels given."""
    with torch.no_grad():
        tokens = tokenizer(prompts, padding=True, truncation=True, max_length=77, return_tensors="pt")
        return model(pixel_values=pixels, **tokens).logits_per_image.diagonal()


def test_pickscore_is_the_models_logit_over_100(folder):
    reward = REWARDS["pickscore"].load(folder("pickscore"))
    pixels = torch.randn(3, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    prompts = [*PROMPTS, "word " * 100]
    expected = official_pickscore(reward.model, reward.tokenizer, pixels, prompts)
    assert (reward.judge(pixels, prompts) * 100).tolist() == pytest.approx(expected.tolist(), abs=1e-5)


@pytest.mark.parametrize("size", [(224, 224), (300, 200), (411, 97), (512, 512), (225, 640), (150, 1001)])
def test_pickscore_sees_what_the_official_processor_sees(folder, size):
    """That one resizes bytes by PIL, so it rounds to 1/255 twice, and each bound is a rounding's worth."""
    image = pytest.importorskip("PIL.Image")
    reward = REWARDS["pickscore"].load(folder("pickscore"))
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    picture = bytes_pictures([size])[0]
    official = CLIPImageProcessorPil()(image.fromarray(picture[0].permute(1, 2, 0).numpy()), return_tensors="pt")
    ours = rewards.normalised(rewards.cropped(picture / 255, 224, math.floor))
    apart = (ours - official.pixel_values).abs() * torch.tensor(rewards.STD)[:, None, None] * 255
    assert apart.max() < 1.5 and apart.mean() < 0.5
    expected = official_pickscore(reward.model, reward.tokenizer, official.pixel_values, PROMPTS[:1])
    assert reward(picture / 255, PROMPTS[:1]).item() * 100 == pytest.approx(expected.item(), abs=2e-3)


def test_pickscore_wants_its_tokenizer(folder, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(folder("pickscore") / name)
    with pytest.raises(BadInput) as error:
        load("pickscore", [tmp_path])
    assert "copy the tokenizer files of laion/CLIP-ViT-H-14-laion2B-s32B-b79K" in one_line(error)


# What the official code says of a tiny random model, taken down where its old libraries can be installed

FIXTURES = Path(__file__).parent / "fixtures"


def official(name):
    """What was taken down, and the official state dict that it belongs to, filled by the fixture's rule."""
    known = json.loads((FIXTURES / name).read_text())
    state = {}
    for i, (key, shape) in enumerate(known["sorted_keys_and_shapes"]):
        if not key.endswith("position_ids"):
            noise = np.random.RandomState(known["seed"] * 100003 + i).standard_normal(shape)
            base = 1 if len(shape) == 1 and key.endswith("weight") else 0
            state[key] = torch.tensor(base + known["std"] * noise, dtype=torch.float32)
    return known, state


def uniform(seed, *shape):
    return torch.tensor(np.random.RandomState(seed).random_sample(shape).astype(np.float32))


def assert_gradient(gradient, known):
    assert gradient.norm().item() == pytest.approx(known["norm"], abs=1e-6)
    for place, value in known["at"]:
        assert gradient[tuple(place)].item() == pytest.approx(value, abs=1e-7)


def test_imagereward_is_the_official_score(folder, tmp_path):
    known, state = official("imagereward_tiny_1.json")
    for file in folder("imagereward").glob("tokenizer*"):
        (tmp_path / file.name).symlink_to(file)
    vision = known["config"]["vision"]
    eps = vision.pop("layer_norm_eps")  # which med_config.json does not say
    config = known["config"]["text"] | {"vision": vision}
    (tmp_path / "med_config.json").write_text(json.dumps(config))
    torch.save(state, tmp_path / "ImageReward.pt")
    reward = REWARDS["imagereward"].load(tmp_path)
    assert reward.vision.post_layernorm.eps == reward.vision.encoder.layers[0].layer_norm1.eps == eps
    pixels = uniform(known["seed"] + 1, 2, 3, 224, 224).requires_grad_()
    scores = reward.judge(pixels, torch.tensor(known["input_ids"]), torch.tensor(known["attention_mask"]))
    assert scores.tolist() == pytest.approx(known["reward"], abs=2e-6)
    scores.sum().backward()
    assert_gradient(pixels.grad, known["pixel_gradient_of_sum"])


@pytest.mark.parametrize("size", [(224, 224), (300, 201), (411, 97), (225, 640)])
def test_imagereward_sees_what_the_official_transform_sees(size):
    """torchvision on a PIL image, as in the official code; it crops half a pixel another way than PickScore's."""
    transforms = pytest.importorskip("torchvision.transforms")
    image = pytest.importorskip("PIL.Image")
    bicubic = transforms.InterpolationMode.BICUBIC
    steps = [transforms.Resize(224, interpolation=bicubic), transforms.CenterCrop(224), transforms.ToTensor()]
    picture = bytes_pictures([size])[0]
    official = transforms.Compose(steps)(image.fromarray(picture[0].permute(1, 2, 0).numpy()))
    apart = (rewards.cropped(picture / 255, 224, round) - official).abs() * 255
    assert apart.max() < 1.5 and apart.mean() < 0.5


def hpsv3_of(known, state, tmp_path):
    """The reward with the fixture's weights and configuration; its tokens are given, so the tokenizer is a stub."""
    from transformers import Qwen2VLConfig, Qwen2VLModel

    text, vision = dict(known["config"]["text"]), known["config"]["vision"]
    rope = {"rope_type": "default", "rope_theta": text.pop("rope_theta"), "mrope_section": text.pop("mrope_section")}
    tokens = {key: value for key, value in known["config"].items() if key.endswith("_token_id")}
    mark = tokens.pop("reward_token_id")
    config = Qwen2VLConfig(text_config=text | {"rope_parameters": rope}, vision_config=vision, **tokens)
    body, head = Qwen2VLModel(config), nn.Sequential(*[nn.Identity()] * 6)
    head[0], head[1], head[3] = nn.Linear(text["hidden_size"], 1024), nn.ReLU(), nn.Linear(1024, 16)
    head[4], head[5] = nn.ReLU(), nn.Linear(16, 2)
    head.load_state_dict({key.removeprefix("rm_head."): state[key] for key in state if key.startswith("rm_head.")})
    kept = {key.replace("model.", "language_model.", 1): value for key, value in state.items() if "_head." not in key}
    body.load_state_dict(kept)
    tokenizer = type("Stub", (), {"convert_tokens_to_ids": lambda self, token: mark})()
    return REWARDS["hpsv3"](body, head, tokenizer)


def test_hpsv3_is_the_official_score(tmp_path):
    """With the pictures resized and the tokens given; the second sequence is shorter, so there is padding."""
    pytest.importorskip("transformers")
    known, state = official("hpsv3_tiny_1.json")
    reward = hpsv3_of(known, state, tmp_path)
    ids = [torch.tensor(row)[: sum(mask)] for row, mask in zip(known["input_ids"], known["attention_mask"])]
    images = uniform(known["seed"], 2, 3, 112, 112).requires_grad_()
    scores = reward.judge(rewards.normalised(images), ids)
    for ours, theirs, other in zip(scores.tolist(), known["mu_sigma"], known["mu_sigma_if_3d_positions"]):
        assert ours == pytest.approx(theirs, abs=2e-6)
        assert ours != pytest.approx(other, abs=1e-3)
    scores[:, 0].sum().backward()
    assert_gradient(images.grad, known["pixel_gradient_of_mu_sum"])


def test_hpsv3_counts_mu_and_not_sigma(folder):
    reward = REWARDS["hpsv3"].load(folder("hpsv3"))
    reward.head[5].load_state_dict({"weight": torch.zeros(2, 16), "bias": torch.tensor([1.0, 5.0])})
    assert reward(pictures(), PROMPTS).tolist() == [1, 1]


def test_hpsv3_loads_what_it_is_given(folder):
    """The tensors of the file, under the names that the model has for them."""
    safetensors = pytest.importorskip("safetensors.torch")
    state = safetensors.load_file(folder("hpsv3") / "HPSv3.safetensors")
    reward = REWARDS["hpsv3"].load(folder("hpsv3"))
    own = reward.body.language_model.layers[1].mlp.up_proj.weight
    assert torch.equal(own, state["model.layers.1.mlp.up_proj.weight"])
    assert torch.equal(reward.head[5].bias, state["rm_head.5.bias"])
    assert torch.equal(reward.body.visual.merger.ln_q.weight, state["visual.merger.ln_q.weight"])


def test_hpsv3_reads_the_official_configuration(folder, tmp_path):
    """Qwen2-VL-7B-Instruct's config.json is of 2024: the language model's settings stand at the top."""
    import shutil

    shutil.copytree(folder("hpsv3"), tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    old = {key: text[key] for key in text if key not in config and key not in ("layer_types", "model_type")}
    old |= {"rope_theta": rope["rope_theta"], "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]}}
    old |= {"vocab_size": 152064, "tie_word_embeddings": False}  # of Qwen2-VL; HPSv3's file has rows of its own
    (tmp_path / "config.json").write_text(json.dumps(config | old))
    expected = REWARDS["hpsv3"].load(folder("hpsv3"))(pictures(), PROMPTS)
    assert torch.equal(REWARDS["hpsv3"].load(tmp_path)(pictures(), PROMPTS), expected)


def test_hpsv3_recomputes_its_layers_and_keeps_the_gradient(folder):
    """Fewer bytes are saved for the backward pass, and the gradient is the same."""
    outcomes = []
    for recompute in True, False:
        reward, images, saved = REWARDS["hpsv3"].load(folder("hpsv3")), pictures().requires_grad_(), []
        if not recompute:
            reward.body.activation_checkpointing_disable()
        with torch.autograd.graph.saved_tensors_hooks(lambda x, saved=saved: saved.append(x.nbytes) or x, lambda x: x):
            scores = reward(images, PROMPTS)
        scores.sum().backward()
        outcomes.append((sum(saved), images.grad))
    assert outcomes[0][0] < 0.75 * outcomes[1][0]
    torch.testing.assert_close(outcomes[0][1], outcomes[1][1], rtol=1e-5, atol=1e-9)


def test_hpsv3_in_bfloat16_keeps_its_head_in_float32(folder):
    place = folder("hpsv3")
    half = REWARDS["hpsv3"].load(place, precision=torch.bfloat16)
    assert {p.dtype for p in half.body.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in half.head.parameters()} == {torch.float32}
    images = pictures().requires_grad_()
    scores = half(images, PROMPTS)
    assert scores.dtype == torch.float32
    assert scores.tolist() == pytest.approx(REWARDS["hpsv3"].load(place)(images, PROMPTS).tolist(), abs=2e-2)
    scores.sum().backward()
    assert images.grad.any()


def test_hpsv3_asks_as_the_official_package_does(folder):
    """The text by its digest, from the package; around it, Qwen2-VL's chat template."""
    reward = REWARDS["hpsv3"].load(folder("hpsv3"))
    text = rewards.INSTRUCTION
    assert (
        hashlib.sha256(text.encode()).hexdigest() == "f6ee57479d4e9eee76b49c00dc962e1e696a5a2b3cc32cebd9b1fa76fe27502c"
    )
    ids = reward.encode("a {red} cube").tolist()
    decoded = reward.tokenizer.decode(ids)
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    picture = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>"
    asked = text.replace("{text_prompt}", "a {red} cube")
    assert decoded == system + picture + asked + "<|im_end|>\n<|im_start|>assistant\n"
    with pytest.raises(BadInput) as error:
        reward(pictures(1), ["a cube <|Reward|>"])
    assert "<|Reward|>" in one_line(error)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((512, 512), (448, 448)),
        ((720, 720), (448, 448)),
        ((1024, 1024), (448, 448)),
        ((768, 768), (420, 420)),
        ((40, 56), (392, 532)),
        ((448, 448), (448, 448)),
    ],
)
def test_hpsv3_resizes_to_the_official_size(size, expected):
    assert rewards.qwen_size(*size) == expected


def test_hpsv3_patches_are_the_processors(folder):
    """transformers' own image processor, on a picture that needs no resizing."""
    pytest.importorskip("transformers")
    image = pytest.importorskip("PIL.Image")
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    pictures = bytes_pictures([(448, 448)] * 2)
    given = [image.fromarray(picture[0].permute(1, 2, 0).numpy()) for picture in pictures]
    official = Qwen2VLImageProcessorPil()(given, return_tensors="pt")
    ours = rewards.patches(rewards.normalised(torch.cat(pictures) / 255))
    assert torch.allclose(ours, official.pixel_values, atol=1e-6)
    assert official.image_grid_thw.tolist() == [[1, 32, 32]] * 2


# Which reward


class Brightness(nn.Module):
    """A user's own: mean of the picture, times a weight."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))

    def forward(self, images, prompts):
        return self.weight * images.mean((1, 2, 3))


def redness():
    return lambda images, prompts: images[:, 0].mean((1, 2))


HERE = "tests.test_rewards"


def test_a_reward_of_ones_own():
    images = pictures()
    own = load(f"{HERE}:Brightness")
    assert torch.equal(own(images, PROMPTS), 2 * images.mean((1, 2, 3)))
    assert not any(p.requires_grad for p in own.parameters()) and not own.function.training
    assert torch.equal(load(f"{HERE}:redness")(images, PROMPTS), images[:, 0].mean((1, 2)))
    check_reward(own)
    check_reward(load(f"{HERE}:redness"))


@pytest.mark.parametrize(
    ("spec", "bright", "red"),
    [
        (f"{HERE}:Brightness:0.5", 0.5, 0),
        (f"{HERE}:Brightness:0.5,{HERE}:redness:-2", 0.5, -2),
        (f"{HERE}:Brightness, {HERE}:redness", 1, 1),
        (f"{HERE}:redness:1e-1,{HERE}:redness", 0, 1.1),
    ],
)
def test_a_sum_is_the_sum_by_hand(spec, bright, red):
    images = pictures()
    expected = bright * 2 * images.mean((1, 2, 3)) + red * images[:, 0].mean((1, 2))
    total = load(spec)
    assert isinstance(total, WeightedSum)
    assert torch.allclose(total(images, PROMPTS), expected, atol=1e-6)
    check_reward(total)


def test_a_sum_with_a_built_in_reward(folder):
    place, images = folder("hpsv2.1"), pictures()
    total = load(f"{HERE}:redness:3,hpsv2.1:0.25", [str(place)])
    alone = load("hpsv2.1", [place])
    assert isinstance(alone, REWARDS["hpsv2.1"])
    expected = 3 * images[:, 0].mean((1, 2)) + 0.25 * alone(images, PROMPTS)
    assert torch.allclose(total(images, PROMPTS), expected, atol=1e-7)


def test_a_sum_of_two_built_in_rewards(folder):
    places, images = {name: folder(name) for name in ("pickscore", "hpsv2.1")}, pictures()
    total = load("pickscore:2,hpsv2.1", list(places.values()))
    pick, hps = (REWARDS[name].load(place)(images, PROMPTS) for name, place in places.items())
    assert torch.allclose(total(images, PROMPTS), 2 * pick + hps, atol=1e-7)


@pytest.mark.parametrize(
    ("spec", "weights", "word"),
    [
        ("hpsv4", [], "hpsv2.1"),
        ("hpsv4:2", [], "hpsv2.1"),
        ("", [], "unknown reward ''"),
        (":2", [], "finite weight"),
        (f"{HERE}:redness:nan", [], "finite weight"),
        ("no_such_module:factory", [], "cannot import"),
        (f"{HERE}:no_such_factory", [], "cannot import"),
        (f"{HERE}:PROMPTS", [], "callable"),
        (f"{HERE}:dict", [], "cannot import"),
        (f"{HERE}:redness", ["a.pt"], "1 places"),
        ("hpsv2.1:1,hpsv2.1:2", ["a.pt"], "1 places"),
    ],
)
def test_refuses_a_wrong_spec(spec, weights, word):
    with pytest.raises(BadInput) as error:
        load(spec, weights)
    assert word in one_line(error)


# Weights that are not there, or others


@every_reward
@pytest.mark.parametrize("missing", ["no/such/folder", "weights/missing.safetensors", "nothing", "/no/where"])
def test_a_missing_file_is_one_line(name, missing):
    pytest.importorskip(NEEDS[name])
    with pytest.raises(BadInput) as error:
        load(name, [missing])
    assert missing in one_line(error) and "does not exist" in str(error.value)


@every_reward
def test_an_unreachable_hub_is_one_line(name, monkeypatch):
    pytest.importorskip(NEEDS[name])
    huggingface_hub = pytest.importorskip("huggingface_hub")

    def unreachable(repository, **rest):
        raise OSError("no network\nand more lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    for weights in [], ["somebody/something"]:
        with pytest.raises(BadInput) as error:
            load(name, weights)
        assert all(word in one_line(error) for word in ("/", "cannot be reached", "--reward-weights", "hf download"))


HUB = {
    "hpsv2.1": {"xswu/HPSv2": {"HPS_v2.1_compressed.pt"}},
    "pickscore": {
        "yuvalkirstain/PickScore_v1": {"config.json", "model.safetensors"},
        "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": {"tokenizer*"},
    },
    "hpsv3": {
        "MizzenAI/HPSv3": {"HPSv3.safetensors"},
        "Qwen/Qwen2-VL-7B-Instruct": {"config.json", "tokenizer*"},
    },
    "imagereward": {
        "THUDM/ImageReward": {"ImageReward.pt", "med_config.json"},
        "google-bert/bert-base-uncased": {"tokenizer*"},
    },
}


@every_reward
def test_takes_from_the_hub_what_it_needs(folder, name, monkeypatch, tmp_path):
    """The hub is a folder here, with the tiny model cut up as the official files are."""
    place, asked = folder(name), {}
    huggingface_hub = pytest.importorskip("huggingface_hub")
    if name == "hpsv2.1":
        import open_clip

        config = json.loads((place / "open_clip_config.json").read_text())["model_cfg"]
        monkeypatch.setattr(open_clip, "get_model_config", {"ViT-H-14": config}.get)
        state = {"state_dict": rewards._read(place / "open_clip_model.safetensors")}
        torch.save(state, tmp_path / "HPS_v2.1_compressed.pt")

    def snapshot(repository, allow_patterns, **_):
        asked[repository] = set(allow_patterns)
        (tmp_path / repository).mkdir(parents=True)
        for source in (place, tmp_path):
            for pattern in allow_patterns:
                for file in source.glob(pattern):
                    (tmp_path / repository / file.name).symlink_to(file)
        return str(tmp_path / repository)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    scores = load(name)(pictures(), PROMPTS)
    assert torch.equal(scores, REWARDS[name].load(place)(pictures(), PROMPTS))
    assert asked.keys() == HUB[name].keys() and all(files <= asked[key] for key, files in HUB[name].items())


@pytest.mark.parametrize("name", [name for name in NEEDS if name != "hpsv2.1"])
def test_the_file_itself_may_be_given(folder, name):
    place = folder(name)
    assert torch.equal(load(name, [weights_file(place)])(pictures(), PROMPTS), load(name, [place])(pictures(), PROMPTS))


@every_reward
def test_a_local_folder_needs_no_network(folder, name, monkeypatch):
    import socket

    tried = []

    def refuse(*arguments):
        tried.append(arguments)  # counted, for a library may swallow the error
        raise OSError("no network here")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    REWARDS[name].load(folder(name))
    assert not tried


def weights_file(place):
    """The file that holds the tiny model's tensors."""
    (file,) = [p for p in Path(place).iterdir() if p.suffix in rewards.FORMATS]
    return file


@every_reward
def test_other_keys_are_one_line(folder, name, tmp_path):
    import shutil

    shutil.copytree(folder(name), tmp_path, dirs_exist_ok=True)
    file = weights_file(tmp_path)
    state = dict(rewards._read(file))
    key = max(key for key in state if key.endswith("weight") and "lm_head" not in key)
    state["stranger"] = state.pop(key).clone()
    save(state, file)
    with pytest.raises(BadInput) as error:
        load(name, [tmp_path])
    assert str(file) in one_line(error) and "missing" in str(error.value) and "stranger" in str(error.value)


@every_reward
def test_a_damaged_file_is_one_line(folder, name, tmp_path):
    import shutil

    shutil.copytree(folder(name), tmp_path, dirs_exist_ok=True)
    weights_file(tmp_path).write_bytes(b"<html>not found</html>")
    with pytest.raises(BadInput) as error:
        load(name, [tmp_path])
    assert "cannot be read" in one_line(error)


@every_reward
def test_an_empty_folder_is_one_line(name, tmp_path):
    pytest.importorskip(NEEDS[name])
    with pytest.raises(BadInput) as error:
        load(name, [tmp_path])
    assert str(tmp_path) in one_line(error)


def save(state, file):
    state = {key: value.clone() for key, value in state.items()}  # they may be mapped from the very file
    if file.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file(state, file)
    else:
        torch.save(state, file)


def test_tiny_refuses_an_unknown_name(tmp_path):
    with pytest.raises(BadInput, match="unknown reward 'x'"):
        tiny("x", tmp_path)


# check_reward finds what is broken


def mean(images):
    return images.mean((1, 2, 3))


class Trainable(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, images, prompts):
        return self.scale * mean(images)


def half_cut(images, prompts):
    """The gradient of half the score alone."""
    return mean(images) + mean(images.detach()) * images.detach()[:, 0, 0, 0]


def in_place(images, prompts):
    score = mean(images)
    with torch.no_grad():
        images.mul_(0.5)
    return score


soft_prompt = torch.ones((), requires_grad=True)
chance = torch.Generator().manual_seed(0)

BROKEN = {
    "detached": (lambda images, prompts: mean(images.detach()), "no gradient"),
    "through uint8": (lambda images, prompts: mean((images * 255).to(torch.uint8).float() / 255), "no gradient"),
    "rounded": (lambda images, prompts: mean((images * 255).round() / 255), "no finite gradient"),
    "a column": (lambda images, prompts: mean(images)[:, None], "(B,)"),
    "one number": (lambda images, prompts: images.mean(), "(B,)"),
    "double": (lambda images, prompts: mean(images).double(), "float32"),
    "infinite": (lambda images, prompts: mean(images) / 0, "finite"),
    "over the batch": (lambda images, prompts: mean(images) - mean(images).mean(), "batch"),
    "trainable": (Trainable(), "requires_grad_"),
    "graph through the text": (lambda images, prompts: soft_prompt * mean(images), "text"),
    "in place": (in_place, "changes the images"),
    "at random": (lambda images, prompts: mean(images) * torch.rand((), generator=chance), "another score"),
    "half cut": (half_cut, "finite differences"),
    "cliff": (lambda images, prompts: mean(images) + 9 * (images[:, 0, 0, 0] * 255 % 1 < 1e-2).float(), "8 bits"),
    "square only": (lambda images, prompts: mean(images) / (images.shape[3] > images.shape[2]), "another shape"),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_check_reward_finds_it(broken):
    reward, clause = BROKEN[broken]
    with pytest.raises(BadInput) as error:
        check_reward(reward)
    assert clause in one_line(error)


def test_check_reward_passes_a_sound_one():
    check_reward(lambda images, prompts: (images**2).mean((1, 2, 3)))
