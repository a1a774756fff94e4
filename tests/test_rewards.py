"""The contract that every reward keeps, the choice of a reward by its name, and what check_reward finds."""

import sys

import pytest
import torch
from torch import nn

from full_scale import __main__ as tools
from full_scale.rewards import PRESETS, REWARDS, WeightedSum, check_reward, contract, load, tiny
from full_scale.rewards.tiny import TINY
from runtime.processes import UserCodeError
from tests.tiny_rewards import LIBRARY, PROMPTS, every_reward, random_images, refusal, tiny_folder, tiny_reward

HERE = "tests.test_rewards"


def test_every_reward_has_its_table_entries(tmp_path):
    assert LIBRARY.keys() == REWARDS.keys() == PRESETS.keys() == TINY.keys()
    assert "unknown reward 'x'" in refusal(tiny, "x", tmp_path)


@every_reward
@pytest.mark.parametrize("size", [(3, 40, 56), (3, 70, 33)])
def test_a_reward_keeps_the_contract(name, size):
    check_reward(tiny_reward(name), size)


@every_reward
def test_the_gradient_equals_finite_differences(name):
    """Central differences in float64, along the sum of the gradient and a random direction, both of length 1."""
    # Qwen2-VL's norms compute in float32, and HPSv3's head has kinks: a longer step and a looser bound.
    step, tolerance = (0.01, 5e-3) if name == "hpsv3" else (1e-4, 1e-6)
    images, reward = random_images(1).double().requires_grad_(), tiny_reward(name).double()
    (gradient,) = torch.autograd.grad(reward(images, PROMPTS[:1]), images)
    random = torch.randn(images.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    direction = gradient / gradient.norm() + random / random.norm()
    with torch.no_grad():
        up, down = (reward(images + h * direction, PROMPTS[:1]).item() for h in (step, -step))
    slope = (gradient * direction).sum().item()
    assert slope > 1e-5 and (up - down) / (2 * step) == pytest.approx(slope, rel=tolerance)


@every_reward
def test_a_score_depends_on_its_image_and_prompt_alone(name, monkeypatch):
    """Not on the text cache, which is bounded and survives no change of dtype, nor on the caller's autocast."""
    images, prompts = random_images(3), [PROMPTS[0], PROMPTS[1], PROMPTS[0]]
    used, fresh = tiny_reward(name), tiny_reward(name)
    used(images[:1], PROMPTS[1:])
    scores = fresh(images, prompts)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(scores, used(images, prompts)) for _ in range(2))
    half = images.bfloat16()
    assert torch.equal(used(half, prompts), used(half.float(), prompts))
    doubled = used.double()(images, prompts)
    assert doubled.dtype == torch.float64 and torch.equal(doubled, tiny_reward(name).double()(images, prompts))
    monkeypatch.setattr(contract, "TEXT_CACHE_SIZE", 2)
    small, prompts = tiny_reward(name), ["a", "b", "c", "a", "d"]
    a, b, c, again, d = small(images[:1].expand(5, -1, -1, -1), prompts).tolist()
    assert small.cached_text.cache_info().currsize == 2
    assert [a, b, c, again, d] == pytest.approx([fresh(images[:1], [p]).item() for p in prompts], abs=1e-6)
    assert a == pytest.approx(again, abs=1e-6) and min(abs(a - b), abs(a - c), abs(a - d)) > 1e-4


@every_reward
def test_a_reward_stays_frozen_and_in_eval_mode(name):
    reward = tiny_reward(name)
    parent = nn.Sequential(reward).train()
    # transformers recomputes activations only in layers that are in training mode; nothing in them is random.
    recomputed = [module for module in reward.modules() if getattr(module, "gradient_checkpointing", False)]
    assert parent.training and [module for module in reward.modules() if module.training] == recomputed
    assert bool(recomputed) == (name == "hpsv3")
    assert not any(p.requires_grad for p in reward.parameters())


WRONG_BATCHES = [
    (torch.rand(3, 8, 8), ["a"], "(B, 3, H, W)"),
    (torch.rand(1, 4, 8, 8), ["a"], "(B, 3, H, W)"),
    (torch.rand(1, 3, 0, 8), ["a"], "(B, 3, H, W)"),
    ("a.png", ["a"], "(B, 3, H, W)"),
    (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), ["a"], "uint8"),
    (torch.rand(2, 3, 8, 8), ["a"], "1 prompts"),
    (torch.rand(1, 3, 8, 8), [], "not empty"),
    (torch.rand(1, 3, 8, 8), "a", "list"),
    (torch.rand(1, 3, 8, 8), [None], "list"),
]


@every_reward
def test_a_reward_refuses_a_wrong_batch(name):
    reward = tiny_reward(name)
    for images, prompts, words in WRONG_BATCHES:
        assert words in refusal(reward, images, prompts)


def mean(images):
    return images.mean((1, 2, 3))


class Trainable(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, images, prompts):
        return self.scale * mean(images)


def redness():
    return lambda images, prompts: images[:, 0].mean((1, 2))


def test_a_custom_reward_is_loaded_and_frozen():
    images = random_images()
    brightness, red = load(f"{HERE}:Trainable"), load(f"{HERE}:redness")
    assert torch.equal(brightness(images, PROMPTS), 2 * mean(images))
    assert not any(p.requires_grad for p in brightness.parameters()) and not brightness.function.training
    assert torch.equal(red(images, PROMPTS), images[:, 0].mean((1, 2)))
    with torch.inference_mode():
        assert red(images.clone(), PROMPTS).shape == (2,)
    for reward in (brightness, red, load(f"{HERE}:Trainable:0.5,{HERE}:redness:-2")):
        check_reward(reward)
    check_reward(lambda images, prompts: mean(images**2))


@pytest.mark.parametrize(
    ("spec", "terms"),
    [
        (f"{HERE}:Trainable:0.5", {f"{HERE}:Trainable": 0.5}),
        (f"{HERE}:Trainable:0.5,{HERE}:redness:-2", {f"{HERE}:Trainable": 0.5, f"{HERE}:redness": -2}),
        (f"{HERE}:Trainable, {HERE}:redness", {f"{HERE}:Trainable": 1, f"{HERE}:redness": 1}),
        (f"{HERE}:redness:1e-1,{HERE}:redness", {f"{HERE}:redness": 1.1}),
        (f"{HERE}:redness:3,hpsv2.1:0.25", {f"{HERE}:redness": 3, "hpsv2.1": 0.25}),
        ("pickscore:2,hpsv2.1", {"pickscore": 2, "hpsv2.1": 1}),
    ],
)
def test_a_weighted_sum_equals_its_formula(spec, terms):
    """Built-in rewards take the paths of their weights in the order of the text."""
    images, folders = random_images(), {name: [tiny_folder(name)] for name in terms if name in REWARDS}
    total = load(spec, [folder for (folder,) in folders.values()])
    expected = sum(weight * load(name, folders.get(name, ()))(images, PROMPTS) for name, weight in terms.items())
    assert isinstance(total, WeightedSum)
    assert torch.allclose(total(images, PROMPTS), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("spec", "weights", "words"),
    [
        ("hpsv4", [], "hpsv2.1"),
        ("", [], "unknown reward ''"),
        (":2", [], "finite weight"),
        (f"{HERE}:redness:nan", [], "finite weight"),
        ("no_such_module:factory", [], "its folder in PYTHONPATH"),
        ("no_such_package.module:factory", [], "its folder in PYTHONPATH"),
        (f"{HERE}:no_such_factory", [], "cannot import"),
        (f"{HERE}:PROMPTS", [], f"{HERE}:PROMPTS is a value of type list, not a callable"),
        (f"{HERE}:dict", [], "cannot import"),
        (f"{HERE}:nothing_at_all", [], "must return a callable (images, prompts) -> (B,), not None"),
        (f"{HERE}:redness", ["a.pt"], "1 paths"),
        ("hpsv2.1:1,hpsv2.1:2", ["a.pt"], "1 paths"),
    ],
)
def test_load_refuses_a_wrong_spec(spec, weights, words):
    assert words in refusal(load, spec, weights)


def returns(value):
    """A factory of a reward that returns value(images)."""
    return lambda: lambda images, prompts: value(images)


def shrink(images):
    """Darkens the images of its caller."""
    images.detach().mul_(0.5)
    return mean(images)


nothing_at_all = lambda: None  # noqa: E731
in_place = returns(shrink)
not_a_number = returns(lambda images: mean(images) * float("nan"))
without_gradient = returns(lambda images: mean(images.detach()))
normalised = returns(lambda images: mean(images) - 0.01 * mean(images).mean())  # hardly, for two similar images
raising = returns(lambda images: {}["x"])


def through_data():
    """Changes its images in a way that torch does not record."""
    return lambda images, prompts: mean(images) + mean(images.data.mul_(0.5))


def use(spec, when):
    """Scores images as a training step or an evaluation does."""
    with torch.set_grad_enabled(when == "training"):
        return load(spec)((random_images() * 1).requires_grad_(when == "training"), PROMPTS)


@pytest.mark.parametrize(
    ("name", "when", "words"),
    [
        ("in_place", "training", "changes its images in place"),  # it would falsify the other scores of a sum
        ("in_place", "evaluation", "changes its images in place"),
        ("not_a_number", "evaluation", "gave [nan, nan] for finite images"),  # in training, the step is skipped
    ],
)
def test_a_broken_custom_reward_is_refused(name, when, words):
    for spec in (f"{HERE}:{name}", f"{HERE}:{name},{HERE}:redness"):
        assert refusal(use, spec, when).startswith(f"your reward {HERE}:{name} {words}")
    use(f"{HERE}:redness", when)


def test_a_score_of_nan_passes_in_training_and_for_broken_images():
    assert use(f"{HERE}:not_a_number", "training").isnan().all()
    with torch.no_grad():
        assert load(f"{HERE}:redness")(random_images() * float("nan"), PROMPTS).isnan().all()


@pytest.mark.parametrize(
    ("name", "source", "what", "cause"),
    [
        ("A.raising", "class A: from tests.test_rewards import raising", "reward broken_rewards:A.raising", KeyError),
        ("f", "def f(): {}['x']", "factory broken_rewards:f, called without arguments,", KeyError),
        ("f", "def f(x): pass", "factory broken_rewards:f, called without arguments,", TypeError),
        ("f", "def f(:", "module broken_rewards", SyntaxError),
        ("f", "import no_such_library", "module broken_rewards", ImportError),
        ("f", "1 / 0", "module broken_rewards", ZeroDivisionError),
    ],
)
def test_an_exception_in_the_users_code_names_it(name, source, what, cause, tmp_path, monkeypatch):
    (tmp_path / "broken_rewards.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "broken_rewards", raising=False)
    with pytest.raises(UserCodeError) as error:
        load(f"broken_rewards:{name}")(random_images(), PROMPTS)
    assert str(error.value) == f"your {what}" and isinstance(error.value.__cause__, cause)


def test_the_tool_says_in_one_line_that_a_reward_keeps_the_contract_or_what_is_wrong(capsys):
    weights = [str(tiny_folder(name)) for name in ("hpsv2.1", "pickscore")]
    for spec, more in ((f"{HERE}:redness", []), ("hpsv2.1:1,pickscore:2", ["--reward-weights", *weights])):
        tools.main(["check-reward", spec, *more])
        assert capsys.readouterr().out == f"{spec} keeps the contract\n"
    for spec, words in (
        (f"{HERE}:normalised", f"your reward {HERE}:normalised breaks the contract: a score depends on the rest"),
        (f"{HERE}:no_such_factory", f"cannot import the reward '{HERE}:no_such_factory'"),
    ):
        assert refusal(tools.main, ["check-reward", spec], error=SystemExit).startswith(f"error: {words}")


def darken_blue(images, prompts):
    """Spoils, past autograd, pixels that it does not read; not in its first call."""
    images.data[:, 2] *= 1 if images.requires_grad else 0.5
    return images[:, 0].mean((1, 2))


soft_prompt = torch.ones((), requires_grad=True)
ALLOWED = "for 2 images, but must give a floating-point tensor (B,) = (2,) on cpu"
FLOAT = f"of torch.float32 on cpu {ALLOWED}"
noise_generator = torch.Generator().manual_seed(0)

VIOLATIONS = {
    "rounded": (lambda images, prompts: mean((images * 255).round() / 255), "no finite gradient"),
    "a column": (lambda images, prompts: mean(images)[:, None], f"gave a tensor (2, 1) {FLOAT}"),
    "nothing": (lambda images, prompts: None, f"gave None {ALLOWED}"),
    "integers": (lambda images, prompts: mean(images).long(), f"gave a tensor (2,) of torch.int64 on cpu {ALLOWED}"),
    "elsewhere": (lambda images, prompts: mean(images).to("meta"), "gave a tensor (2,) of torch.float32 on meta for"),
    "squeezed": (lambda images, prompts: mean(images).squeeze(), "a tensor () of torch.float32 on cpu for 1 images"),
    "double": (lambda images, prompts: mean(images).double(), "float32"),
    "infinite": (lambda images, prompts: mean(images) / 0, "finite"),
    "over the batch, too weakly for the scores": (lambda x, prompts: mean(x) - 1e-5 * mean(x).mean(), "batch"),
    "over the batch, detached": (lambda images, prompts: mean(images) - 0.01 * mean(images.detach()).mean(), "batch"),
    "over more than two": (lambda images, prompts: mean(images) - (len(images) > 2) * mean(images).mean(), "batch"),
    "by position": (lambda images, prompts: mean(images) * (1 + (torch.arange(len(images)) > 1)), "batch"),
    "by the brightest": (lambda images, prompts: mean(images) - (mean(images).max() - 0.6).relu(), "batch"),
    "by the longest prompt": (lambda images, prompts: mean(images) * max(40, *map(len, prompts), 0) / 40, "batch"),
    "trainable": (Trainable(), "requires_grad_"),
    "graph through the text": (lambda images, prompts: soft_prompt * mean(images), "and encode the text under no_grad"),
    "trainable inside": (Trainable().forward, "call requires_grad_(False) on every network that the reward uses"),
    "in place, past autograd": (through_data(), "changes its images"),
    "in place, later": (darken_blue, "changes its images"),
    "at random": (lambda images, prompts: mean(images) * torch.rand((), generator=noise_generator), "another score"),
    "partly detached": (lambda x, prompts: mean(x) + mean(x.detach()) * x.detach()[:, 0, 0, 0], "finite differences"),
    "cliff": (lambda images, prompts: mean(images) + 9 * (images[:, 0, 0, 0] * 255 % 1 < 1e-2).float(), "8 bits"),
    "landscape only": (lambda images, prompts: mean(images) / (images.shape[3] > images.shape[2]), "another shape"),
}


@pytest.mark.parametrize("violation", VIOLATIONS)
def test_check_reward_finds_a_violation(violation):
    reward, words = VIOLATIONS[violation]
    assert words in refusal(check_reward, reward)
