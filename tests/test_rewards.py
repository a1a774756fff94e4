"""The contract that every reward keeps, the choice of a reward by its name, and what check_reward finds."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from full_scale.rewards import PRESETS, REWARDS, WeightedSum, check_reward, contract, load, tiny
from full_scale.rewards.tiny import TINY
from leap_align import BadInput
from tests.tiny_rewards import LIBRARY, PROMPTS, every_reward, message, random_images, tiny_folder, tiny_reward


def test_importing_rewards_imports_no_large_library():
    command = [sys.executable, "-c", "import sys, full_scale.rewards; print(*sys.modules)"]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not set(done.stdout.split()) & {"transformers", "open_clip", "safetensors", "huggingface_hub", "PIL"}


# The contract, for every reward


def test_every_reward_has_its_table_entries():
    assert LIBRARY.keys() == REWARDS.keys() == PRESETS.keys() == TINY.keys()


@every_reward
@pytest.mark.parametrize("size", [(3, 40, 56), (3, 70, 33)])
def test_a_reward_keeps_the_contract(name, size):
    check_reward(tiny_reward(name), size)


@every_reward
def test_the_gradient_equals_finite_differences(name):
    """Central differences in float64, along the gradient and a random direction, both of length 1.

    Qwen2-VL's norms always compute in float32, and HPSv3's head has kinks: it gets a longer step and a looser bound.
    """
    step, tolerance = (0.01, 5e-3) if name == "hpsv3" else (1e-4, 1e-6)
    images, reward = random_images(1).double(), tiny_reward(name).double()
    leaf = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(reward(leaf, PROMPTS[:1]).sum(), leaf)
    generator = torch.Generator().manual_seed(1)
    for d in [gradient, torch.randn(images.shape, generator=generator, dtype=torch.float64)]:
        d = d / d.norm()
        with torch.no_grad():
            up, down = (reward(images + h * d, PROMPTS[:1]).sum() for h in (step, -step))
        slope = (gradient * d).sum().item()
        assert abs(slope) > 1e-5
        assert (up - down).item() / (2 * step) == pytest.approx(slope, rel=tolerance, abs=1e-9)


@every_reward
def test_cached_text_features_give_the_same_scores(name):
    images, prompts = random_images(3), [PROMPTS[0], PROMPTS[1], PROMPTS[0]]
    used, fresh = tiny_reward(name), tiny_reward(name)
    used(images[:1], PROMPTS[1:])
    scores = used(images, prompts)
    assert torch.equal(scores, fresh(images, prompts))
    assert torch.equal(scores, used(images, prompts))


@every_reward
def test_the_text_cache_is_bounded(name, monkeypatch):
    monkeypatch.setattr(contract, "TEXT_CACHE_SIZE", 2)
    reward, images, prompts = tiny_reward(name), random_images(5), ["a", "b", "c", "a", "d"]
    scores = reward(images, prompts)
    assert len(reward.text_cache) <= 2
    one_by_one = [reward(images[i : i + 1], prompts[i : i + 1]).item() for i in range(5)]
    assert scores.tolist() == pytest.approx(one_by_one, abs=1e-6)


@every_reward
def test_the_prompt_changes_the_score(name):
    a, b = tiny_reward(name)(random_images(1).repeat(2, 1, 1, 1), ["a red cube", "a red sphere"]).tolist()
    assert abs(a - b) > 1e-4


@every_reward
def test_a_reward_stays_frozen_and_in_eval_mode(name):
    reward = tiny_reward(name)
    parent = nn.Sequential(reward).train()
    # transformers recomputes activations only in layers that are in training mode; nothing in them is random.
    recomputed = [module for module in reward.modules() if getattr(module, "gradient_checkpointing", False)]
    assert parent.training and [module for module in reward.modules() if module.training] == recomputed
    assert bool(recomputed) == (name == "hpsv3")
    assert not any(p.requires_grad for p in reward.parameters())
    reward(random_images().requires_grad_(), PROMPTS).sum().backward()
    assert all(p.grad is None for p in reward.parameters())


@every_reward
def test_casting_clears_the_text_cache(name):
    used, fresh = tiny_reward(name), tiny_reward(name)
    used(random_images(), PROMPTS)
    scores = used.double()(random_images(), PROMPTS)
    assert scores.dtype == torch.float64 and torch.equal(scores, fresh.double()(random_images(), PROMPTS))


@every_reward
def test_half_precision_images_are_scored_in_float32(name):
    reward, images = tiny_reward(name), random_images().bfloat16()
    assert torch.equal(reward(images, PROMPTS), reward(images.float(), PROMPTS))


@every_reward
def test_the_callers_autocast_has_no_effect(name):
    reward = tiny_reward(name)
    with torch.autocast("cpu", torch.bfloat16):
        inside = reward(random_images(), PROMPTS)
    assert torch.equal(inside, reward(random_images(), PROMPTS))


@every_reward
@pytest.mark.parametrize(
    ("images", "prompts", "words"),
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
def test_a_reward_refuses_a_wrong_batch(name, images, prompts, words):
    with pytest.raises(BadInput) as error:
        tiny_reward(name)(images, prompts)
    assert words in message(error)


# Custom rewards and weighted sums


class Brightness(nn.Module):
    """A trainable custom reward."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))

    def forward(self, images, prompts):
        return self.weight * images.mean((1, 2, 3))


def redness():
    return lambda images, prompts: images[:, 0].mean((1, 2))


HERE = "tests.test_rewards"


def test_a_custom_reward_is_loaded_and_frozen():
    images = random_images()
    brightness = load(f"{HERE}:Brightness")
    assert torch.equal(brightness(images, PROMPTS), 2 * images.mean((1, 2, 3)))
    assert not any(p.requires_grad for p in brightness.parameters()) and not brightness.function.training
    assert torch.equal(load(f"{HERE}:redness")(images, PROMPTS), images[:, 0].mean((1, 2)))
    check_reward(brightness)
    check_reward(load(f"{HERE}:redness"))


@pytest.mark.parametrize(
    ("spec", "brightness_weight", "redness_weight"),
    [
        (f"{HERE}:Brightness:0.5", 0.5, 0),
        (f"{HERE}:Brightness:0.5,{HERE}:redness:-2", 0.5, -2),
        (f"{HERE}:Brightness, {HERE}:redness", 1, 1),
        (f"{HERE}:redness:1e-1,{HERE}:redness", 0, 1.1),
    ],
)
def test_a_weighted_sum_equals_its_formula(spec, brightness_weight, redness_weight):
    images = random_images()
    expected = brightness_weight * 2 * images.mean((1, 2, 3)) + redness_weight * images[:, 0].mean((1, 2))
    total = load(spec)
    assert isinstance(total, WeightedSum)
    assert torch.allclose(total(images, PROMPTS), expected, atol=1e-6)
    check_reward(total)


def test_a_weighted_sum_may_mix_built_in_and_custom_rewards():
    folder, images = tiny_folder("hpsv2.1"), random_images()
    total = load(f"{HERE}:redness:3,hpsv2.1:0.25", [str(folder)])
    hpsv2 = load("hpsv2.1", [folder])
    assert isinstance(hpsv2, REWARDS["hpsv2.1"])
    expected = 3 * images[:, 0].mean((1, 2)) + 0.25 * hpsv2(images, PROMPTS)
    assert torch.allclose(total(images, PROMPTS), expected, atol=1e-7)


def test_a_weighted_sum_of_two_built_in_rewards_takes_their_weights_in_order():
    names, images = ("pickscore", "hpsv2.1"), random_images()
    total = load("pickscore:2,hpsv2.1", [tiny_folder(name) for name in names])
    pickscore, hpsv2 = (tiny_reward(name)(images, PROMPTS) for name in names)
    assert torch.allclose(total(images, PROMPTS), 2 * pickscore + hpsv2, atol=1e-7)


@pytest.mark.parametrize(
    ("spec", "weights", "words"),
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
        (f"{HERE}:redness", ["a.pt"], "1 paths"),
        ("hpsv2.1:1,hpsv2.1:2", ["a.pt"], "1 paths"),
    ],
)
def test_load_refuses_a_wrong_spec(spec, weights, words):
    with pytest.raises(BadInput) as error:
        load(spec, weights)
    assert words in message(error)


def test_tiny_refuses_an_unknown_name(tmp_path):
    with pytest.raises(BadInput, match="unknown reward 'x'"):
        tiny("x", tmp_path)


# check_reward finds every violation


def mean(images):
    return images.mean((1, 2, 3))


class Trainable(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, images, prompts):
        return self.scale * mean(images)


def partly_detached(images, prompts):
    """One of two terms has no gradient."""
    return mean(images) + mean(images.detach()) * images.detach()[:, 0, 0, 0]


def in_place(images, prompts):
    score = mean(images)
    with torch.no_grad():
        images.mul_(0.5)
    return score


soft_prompt = torch.ones((), requires_grad=True)
noise_generator = torch.Generator().manual_seed(0)

VIOLATIONS = {
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
    "at random": (lambda images, prompts: mean(images) * torch.rand((), generator=noise_generator), "another score"),
    "partly detached": (partly_detached, "finite differences"),
    "cliff": (lambda images, prompts: mean(images) + 9 * (images[:, 0, 0, 0] * 255 % 1 < 1e-2).float(), "8 bits"),
    "landscape only": (lambda images, prompts: mean(images) / (images.shape[3] > images.shape[2]), "another shape"),
}


@pytest.mark.parametrize("violation", VIOLATIONS)
def test_check_reward_finds_a_violation(violation):
    reward, words = VIOLATIONS[violation]
    with pytest.raises(BadInput) as error:
        check_reward(reward)
    assert words in message(error)


def test_check_reward_accepts_a_sound_reward():
    check_reward(lambda images, prompts: (images**2).mean((1, 2, 3)))
