"""Each reward gives the score and the gradient of its official code."""

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

from full_scale.rewards import load
from full_scale.rewards.hpsv3 import INSTRUCTION, resized_size
from full_scale.rewards.images import CLIP_STD, crop, normalise
from tests.tiny_rewards import PROMPTS, random_images, refusal, tiny_folder, tiny_reward, use_tiny_vit


def random_uint8_images(sizes):
    """One image (1, 3, H, W) for each (H, W), with contrasts at which a bicubic filter leaves [0, 1]."""
    images = (random_images(1, *size, seed=i) for i, size in enumerate(sizes))
    return [((4 * image - 1.5).clamp(0, 1) * 255).round().to(torch.uint8) for image in images]


def as_pil(image):
    """A PIL image of a uint8 tensor (1, 3, H, W)."""
    return pytest.importorskip("PIL.Image").fromarray(image[0].permute(1, 2, 0).numpy())


def assert_same_preprocessing(pixels, official):
    """Up to rounding: the official code resizes 8-bit images with PIL, which rounds to 1/255 twice."""
    difference = (pixels - official).abs() * torch.tensor(CLIP_STD)[:, None, None] * 255
    assert difference.max() < 1.5 and difference.mean() < 0.5


OFFICIAL_HPSV2 = """
import builtins, json, os, sys, types, warnings
import open_clip.tokenizer
sys.modules["turtle"] = types.ModuleType("turtle")  # hpsv2 imports it by mistake, and it needs tkinter
sys.modules["turtle"].forward = None
vocabulary, builtin_open = open_clip.tokenizer.default_bpe(), builtins.open


def open_(file, *arguments, **options):  # the wheel lacks its vocabulary file; open_clip ships the same bytes
    missing = str(file).endswith("bpe_simple_vocab_16e6.txt.gz") and not os.path.exists(file)
    return builtin_open(vocabulary if missing else file, *arguments, **options)


builtins.open = open_
from hpsv2 import img_score
from hpsv2.src.open_clip import factory

job = json.load(sys.stdin)
factory._MODEL_CONFIGS["ViT-H-14"] = job["config"]
create = img_score.create_model_and_transforms
img_score.create_model_and_transforms = lambda name, pretrained, **options: create(name, None, **options)  # no download
score = lambda image, prompt: img_score.score(image, prompt, cp=job["weights"], hps_version="v2.1")[0]
print(json.dumps([float(score(*pair)) for pair in job["pairs"]]))
"""


def official_hpsv2(weights, images, prompts, tmp_path):
    """The official package's scores, from a subprocess because importing it changes global settings."""
    pytest.importorskip("hpsv2")
    config = pytest.importorskip("open_clip").get_model_config("ViT-H-14")
    paths = [str(tmp_path / f"{i}.png") for i in range(len(images))]
    for path, image in zip(paths, images):
        as_pil(image).save(path)
    job = json.dumps({"weights": str(weights), "config": config, "pairs": list(zip(paths, prompts))})
    command = [sys.executable, "-W", "ignore", "-c", OFFICIAL_HPSV2]
    environment = os.environ | {"HPS_ROOT": str(tmp_path)}  # otherwise it creates a folder in the user's home
    done = subprocess.run(command, input=job, cwd=tmp_path, env=environment, capture_output=True, text=True)
    lines = done.stderr.strip().splitlines()
    if done.returncode and any(error in lines[-1] for error in ("ImportError", "ModuleNotFoundError")):
        pytest.skip(f"the official package cannot be imported here: {lines[-1]}")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


def assert_scores(reward, images, prompts, expected, tolerance=1e-6):
    scores = [reward(image / 255, [prompt]).item() for image, prompt in zip(images, prompts)]
    assert scores == pytest.approx(expected, abs=tolerance)


@pytest.mark.parametrize("size", ["tiny", pytest.param("full", marks=pytest.mark.slow)])
def test_hpsv2_equals_the_official_score(size, tmp_path, monkeypatch):
    """With random weights in the official checkpoint's format: half precision under `state_dict`."""
    file = tmp_path / "HPS_v2.1_compressed.pt"
    if size == "tiny":
        model = tiny_reward("hpsv2.1").model
        use_tiny_vit(monkeypatch)
    else:
        torch.manual_seed(0)
        model = pytest.importorskip("open_clip").create_model("ViT-H-14")
    torch.save({"state_dict": model.half().state_dict()}, file)
    del model
    images = random_uint8_images([(224, 224), (300, 200), (97, 411), (512, 512), (225, 640), (1, 300)])
    prompts = [*PROMPTS, "", "émoji 🦊 & <b>html</b>", "word " * 100, "A  b\tc"]
    expected = official_hpsv2(file, images, prompts, tmp_path)
    reward = load("hpsv2.1", [file])
    assert {p.dtype for p in reward.parameters()} == {torch.float32}
    assert_scores(reward, images, prompts, expected)
    assert size == "full" or max(expected) - min(expected) > 0.05
    file.unlink()


SIZES = pytest.mark.parametrize("size", [(224, 227), (300, 200), (300, 201), (411, 97), (225, 640), (150, 1001)])


@SIZES
def test_pickscore_equals_the_models_logit_over_100_after_the_official_processor(size):
    """As in the model card's code, with transformers."""
    module = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
    reward, image = tiny_reward("pickscore"), random_uint8_images([size])[0]
    official = module.CLIPImageProcessorPil()(as_pil(image), return_tensors="pt").pixel_values
    assert_same_preprocessing(normalise(crop(image / 255, 224, math.floor)), official)
    prompts = [*PROMPTS, "word " * 100]
    tokens = reward.tokenizer(prompts, padding=True, truncation=True, max_length=77, return_tensors="pt")
    with torch.no_grad():
        expected = reward.model(pixel_values=official, **tokens).logits_per_image[0] / 100
        scores = reward.score_pixels(official.expand(3, -1, -1, -1), prompts)
    assert scores.tolist() == pytest.approx(expected.tolist(), abs=1e-7)
    assert_scores(reward, [image] * 3, prompts, expected.tolist(), tolerance=2e-5)


def official_fixture(name, folder):
    """Recorded results of the official code with its old libraries, and its random weights; folder gets a tokenizer."""
    for file in tiny_folder(name).glob("tokenizer*"):
        (folder / file.name).symlink_to(file)
    recorded, state = json.loads((Path(__file__).parent / "fixtures" / f"{name}_tiny_1.json").read_text()), {}
    for i, (key, shape) in enumerate(recorded["sorted_keys_and_shapes"]):
        if not key.endswith("position_ids"):
            noise = np.random.RandomState(recorded["seed"] * 100003 + i).standard_normal(shape)
            base = 1 if len(shape) == 1 and key.endswith("weight") else 0
            state[key] = torch.tensor(base + recorded["std"] * noise, dtype=torch.float32)
    return recorded, state


def uniform(seed, *shape):
    return torch.tensor(np.random.RandomState(seed).random_sample(shape).astype(np.float32)).requires_grad_()


def assert_gradient(gradient, recorded):
    assert gradient.norm().item() == pytest.approx(recorded["norm"], abs=1e-6)
    for index, value in recorded["at"]:
        assert gradient[tuple(index)].item() == pytest.approx(value, abs=1e-7)


def test_imagereward_equals_the_official_score(tmp_path):
    recorded, state = official_fixture("imagereward", tmp_path)
    vision = recorded["config"]["vision"]
    eps = vision.pop("layer_norm_eps")  # med_config.json does not hold it
    (tmp_path / "med_config.json").write_text(json.dumps(recorded["config"]["text"] | {"vision": vision}))
    torch.save(state, tmp_path / "ImageReward.pt")
    reward = load("imagereward", [tmp_path])
    assert reward.vision.post_layernorm.eps == reward.vision.encoder.layers[0].layer_norm1.eps == eps
    pixels, ids, mask = uniform(recorded["seed"] + 1, 2, 3, 224, 224), recorded["input_ids"], recorded["attention_mask"]
    scores = reward.score_pixels(pixels, torch.tensor(ids), torch.tensor(mask))
    assert scores.tolist() == pytest.approx(recorded["reward"], abs=2e-6)
    scores.sum().backward()
    assert_gradient(pixels.grad, recorded["pixel_gradient_of_sum"])


@SIZES
def test_imagereward_preprocesses_as_the_official_transform(size, monkeypatch):
    """torchvision on a PIL image, as in the official code; its crop does not round half a pixel as PickScore's does."""
    transforms = pytest.importorskip("torchvision.transforms")
    bicubic = transforms.InterpolationMode.BICUBIC
    steps = [transforms.Resize(224, interpolation=bicubic), transforms.CenterCrop(224), transforms.ToTensor()]
    reward, image = tiny_reward("imagereward"), random_uint8_images([size])[0]
    monkeypatch.setattr(reward, "score_pixels", lambda pixels, ids, mask: pixels)
    official = normalise(transforms.Compose(steps)(as_pil(image)))
    assert_same_preprocessing(reward.score(image / 255, ["a"]), official)


def test_hpsv3_equals_the_official_score(tmp_path):
    """With given pixels and token ids; the second sequence is shorter, so there is padding."""
    # Qwen2-VL-7B-Instruct's config.json of 2024 has the language model's settings at the top level.
    recorded, state = official_fixture("hpsv3", tmp_path)
    config = recorded["config"] | recorded["config"]["text"] | {"vision_config": recorded["config"]["vision"]}
    config["rope_scaling"] = {"type": "mrope", "mrope_section": config.pop("mrope_section")}
    config |= {"vocab_size": 152064, "tie_word_embeddings": False}  # HPSv3's file has another number of rows
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save(state, tmp_path / "HPSv3.pt")
    reward = load("hpsv3", [tmp_path / "HPSv3.pt"])
    reward.reward_token_id = config["reward_token_id"]  # the fixture holds token ids, no tokenizer
    texts = [torch.tensor(ids)[: sum(mask)] for ids, mask in zip(recorded["input_ids"], recorded["attention_mask"])]
    images = uniform(recorded["seed"], 2, 3, 112, 112)
    scores = reward.score_pixels(normalise(images), texts)
    for score, expected, wrong in zip(scores.tolist(), recorded["mu_sigma"], recorded["mu_sigma_if_3d_positions"]):
        assert score == pytest.approx(expected, abs=2e-6)
        assert score != pytest.approx(wrong, abs=1e-3)
    scores[:, 0].sum().backward()
    assert_gradient(images.grad, recorded["pixel_gradient_of_mu_sum"])


def test_the_hpsv3_score_is_mu():
    reward = tiny_reward("hpsv3")
    reward.head[5].load_state_dict({"weight": torch.zeros(2, 16), "bias": torch.tensor([1.0, 5.0])})
    assert reward(random_images(), PROMPTS).tolist() == [1, 1]


def test_hpsv3_sends_the_official_text():
    """The instruction's digest is the official package's; around the instruction stands Qwen2-VL's chat template."""
    digest = "f6ee57479d4e9eee76b49c00dc962e1e696a5a2b3cc32cebd9b1fa76fe27502c"
    assert hashlib.sha256(INSTRUCTION.encode()).hexdigest() == digest
    reward = tiny_reward("hpsv3")
    text = reward.tokenizer.decode(reward.encode_text("a {red} cube").tolist())
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    image = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>"
    instruction = INSTRUCTION.replace("{text_prompt}", "a {red} cube")
    assert text == system + image + instruction + "<|im_end|>\n<|im_start|>assistant\n"


def test_hpsv3_refuses_a_prompt_with_a_special_token():
    reward = tiny_reward("hpsv3")
    for token in ("<|Reward|>", "<|image_pad|>"):
        assert f"'a cube {token}' holds a special token" in refusal(reward, random_images(1), [f"a cube {token}"])


def test_hpsv3_resizes_to_the_official_size():
    official = {(512, 512): (448, 448), (720, 720): (448, 448), (1024, 1024): (448, 448), (768, 768): (420, 420)}
    official |= {(40, 56): (392, 532), (448, 448): (448, 448)}
    assert {size: resized_size(*size) for size in official} == official
