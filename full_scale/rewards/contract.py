"""The contract of a reward: its base class, and check_reward, which tests whether a reward keeps it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leap_align import BadInput, require
from runtime.exit import user_code

TEXT_CACHE_SIZE = 4096  # the number of prompts whose text features a reward keeps
CHANGES_IMAGES = "changes its images in place: let it work on images.clone()"
TEST_PROMPTS = ("a red cube", "two dogs on a beach, oil painting")


class Reward(nn.Module, ABC):
    """A frozen module: images (B, 3, H, W), floating point in [0, 1], and B prompts to (B,) scores, float32.

    Gradient flows from the scores to the pixels only.  A reward stays in eval mode, also when its parent is trained.
    A subclass defines score(); its modules and other attributes are arguments of the constructor, by name.
    """

    terms: Sequence[str] = ()  # the names of its terms, if it is a sum

    def __init__(self, **attributes: Any) -> None:
        super().__init__()
        self.name = f"the reward {type(self).__name__}"  # as error messages call it
        for name, value in attributes.items():
            setattr(self, name, value)
        self.requires_grad_(False)
        super().train(False)

    def train(self, mode: bool = True) -> "Reward":
        """Does nothing: in training mode, dropout would make the scores random.  HPSv3 switches some layers itself."""
        return self

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores (B,), computed in float32, or float64 if the weights are; a caller's autocast has no effect.

        Raises BadInput for a wrong batch and, without gradient, for a score of NaN or inf.
        """
        _check_batch(images, prompts)
        dtypes = {parameter.dtype for parameter in self.parameters()}
        dtype = torch.float64 if torch.float64 in dtypes else torch.float32
        with torch.autocast(images.device.type, enabled=False):
            scores = self.score(images.to(dtype), list(prompts))
        if not torch.is_grad_enabled() and images.isfinite().all():  # with gradient, the trainer skips such a step
            _check_finite(self.name, scores)
        return scores

    @abstractmethod
    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Scores (B,) with gradient to the images."""

    def with_terms(self, images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """The scores, and those of each term of a sum by its name, all (B,) with gradient to the images."""
        return self(images, prompts), {}

    def summary(self, prompts: Sequence[str], scores: Sequence[float]) -> dict[str, float]:
        """What `score` prints beside the mean: means over groups of prompts by name."""
        return {}


class TextCachingReward(Reward):
    """A reward that computes text features without the image, and keeps them for the next call."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.cached_text = lru_cache(TEXT_CACHE_SIZE)(self.encode_text)

    @abstractmethod
    def encode_text(self, prompt: str) -> Tensor:
        """Features of one prompt, of any shape."""

    @torch.no_grad()
    def text_features(self, prompts: list[str]) -> list[Tensor]:
        """Features of each prompt, encoded one by one so that they do not depend on the batch."""
        return [self.cached_text(prompt) for prompt in prompts]

    def _apply(self, fn: Callable, recurse: bool = True) -> "TextCachingReward":
        """Moving or casting the module invalidates the cached features."""
        self.cached_text.cache_clear()
        return super()._apply(fn, recurse)


class CustomReward(Reward):
    """A user's reward: any callable (images, prompts) -> (B,); an nn.Module is frozen and set to eval mode."""

    def __init__(self, function: Callable[[Tensor, list[str]], Tensor], name: str = "your reward") -> None:
        super().__init__(function=function, name=name)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """function(images, prompts); raises UserCodeError if it raises, BadInput for anything but scores (B,)."""
        before = _version(images)
        with user_code(self.name):
            scores = self.function(images, prompts)
        require(_version(images) == before, f"{self.name} {CHANGES_IMAGES}")
        is_vector = torch.is_tensor(scores) and scores.shape == images.shape[:1]
        is_right = is_vector and scores.is_floating_point() and scores.device == images.device
        allowed = f"a floating-point tensor (B,) = ({len(images)},) on {images.device}"
        require(is_right, f"{self.name} gave {describe(scores)} for {len(images)} images, but must give {allowed}")
        return scores


def _check_batch(images: Tensor, prompts: Sequence[str]) -> None:
    is_tensor = torch.is_tensor(images)
    is_batch = is_tensor and images.ndim == 4 and images.shape[1] == 3 and 0 not in images.shape[2:]
    require(is_batch, f"images must be a tensor (B, 3, H, W), not {describe(images)}")
    require(images.is_floating_point(), f"images must be floating point in [0, 1], not {images.dtype}")
    is_list = not isinstance(prompts, str) and len(prompts) and all(isinstance(prompt, str) for prompt in prompts)
    require(is_list, f"prompts must be a list with one text per image, and not empty, not {prompts!r:.60}")
    require(len(prompts) == len(images), f"{len(prompts)} prompts for {len(images)} images: give one prompt per image")


def _check_finite(name: str, scores: Tensor) -> None:
    if not scores.isfinite().all():
        raise BadInput(f"{name} gave {scores.tolist()!s:.60} for finite images: every score must be finite")


def _version(images: Tensor) -> int:
    """A number that every change in place raises; tensors of inference mode have none."""
    return 0 if images.is_inference() else images._version


def describe(value: Any) -> str:
    """What error messages call a value of the wrong type."""
    if torch.is_tensor(value):
        return f"a tensor {tuple(value.shape)} of {value.dtype} on {value.device}"
    return "None" if value is None else f"a value of type {type(value).__name__}"


# Checks of a reward --------------------------------------------------------------------------------------------------


def random_images(n: int, size: tuple[int, int, int], device: str | torch.device) -> Tensor:
    """Smooth blobs plus noise, (n, *size): like photographs, they have coarse and fine structure."""
    generator = torch.Generator().manual_seed(0)
    blobs = F.interpolate(torch.rand(n, 3, 5, 5, generator=generator), size[1:], mode="bilinear")
    return (0.2 + 0.3 * blobs + 0.3 * torch.rand(n, *size, generator=generator)).to(device)


def try_out(reward: Reward, images: Tensor, prompts: Sequence[str] = TEST_PROMPTS) -> tuple[Tensor, Tensor]:
    """Scores (B,) of images, and the leaf (B, 3, H, W) to which their gradient flows.

    Raises BadInput, in one line, for a reward that cannot train.
    """
    leaf = images.clone().requires_grad_()
    pixels = leaf.clone()  # a leaf would refuse a change in place with a message of its own
    scores = reward(pixels, prompts)
    # Equality also reveals a change that torch does not record, through .data or numpy.
    require(torch.equal(pixels, images), f"{reward.name} {CHANGES_IMAGES}")
    message = f"{reward.name} gives no gradient to its images: look for no_grad, detach, PIL or uint8 in it"
    require(scores.requires_grad, message)
    _check_finite(reward.name, scores)
    return scores, leaf


def check_reward(
    reward: Callable[[Tensor, list[str]], Tensor],
    size: tuple[int, int, int] = (3, 40, 56),
    prompts: Sequence[str] = TEST_PROMPTS,
    tolerance: float = 1e-4,
    device: str | torch.device = "cpu",
) -> None:
    """Raises BadInput, in one line, for the first rule of the contract that a reward breaks.

    size: (3, H, W) of the random test images.  tolerance: how much two computations of one score may differ, relative
    to max(1, |score|); half precision needs more.
    """
    is_trainable = isinstance(reward, nn.Module) and any(p.requires_grad for p in reward.parameters())
    require(not is_trainable, "the reward breaks the contract: its weights require grad: call requires_grad_(False)")
    reward = reward if isinstance(reward, Reward) else CustomReward(reward, "the reward")
    images = random_images(len(prompts), size, device)
    for is_kept, fault in _rules(reward, images, list(prompts), tolerance):
        require(is_kept, f"{reward.name} breaks the contract: {fault}")


def _rules(reward: Reward, images: Tensor, prompts: list[str], tolerance: float) -> Iterator[tuple[Any, str]]:
    """For each rule of the contract, whether the reward keeps it, and the fault if it does not."""
    before, (scores, leaf) = images.clone(), try_out(reward, images, prompts)
    yield scores.dtype == torch.float32, f"the score is {scores.dtype}, not float32"
    has_graph = reward(images, prompts).requires_grad
    remedy = "call requires_grad_(False) on every network that the reward uses, and encode the text under no_grad"
    yield not has_graph, f"the score requires grad although the images do not: {remedy}"
    transposed = reward(images.transpose(2, 3), prompts)
    yield transposed.isfinite().all(), "it fails on images of another shape"
    with torch.no_grad():
        first, second = reward(images, prompts), reward(images, prompts)
        change = (reward((images * 255).round() / 255, prompts) - scores).abs()
    yield torch.equal(first, second), "the same images and prompts get another score"
    yield _is_independent(reward, images, prompts, tolerance), "a score depends on the rest of its batch"
    (gradient,) = torch.autograd.grad(scores.sum(), leaf, allow_unused=True)
    is_sound = gradient is not None and gradient.isfinite().all() and gradient.any()
    yield is_sound, "no finite gradient in the pixels"
    bound = gradient.abs().flatten(1).sum(1) / 510  # rounding moves each pixel by at most 1/510
    yield (change <= 2 * bound + tolerance).all(), "rounding to 8 bits changes the score too much"
    is_right = _equals_differences(lambda x: reward(x, prompts).double().sum(), images, gradient, tolerance)
    yield is_right, "the gradient disagrees with finite differences"
    yield torch.equal(images, before), f"it {CHANGES_IMAGES}"


def _is_independent(reward: Reward, images: Tensor, prompts: list[str], tolerance: float) -> bool | Tensor:
    """Whether an image scores the same alone, in a small batch, and at another place among very different ones.

    Its gradient must also stay in its own pixels, which reveals a dependence too weak to be seen in the scores.
    """
    n = len(prompts)
    with torch.no_grad():
        alone = torch.cat([reward(images[i : i + 1], prompts[i : i + 1]) for i in range(n)])
        together = reward(images, prompts)
    bright, dark = 1 - 0.2 * images, 0.2 * images[:1]
    batch = torch.cat([bright, images.flip(0), bright, dark]).requires_grad_()
    scores = reward(batch, [*prompts, *reversed(prompts), *["x"] * n, "a very long prompt, " * 8])
    difference = (torch.stack([together, scores[n : 2 * n].flip(0)]) - alone).abs()
    (gradient,) = torch.autograd.grad(scores[n], batch, materialize_grads=True)
    largest = gradient.abs().amax((1, 2, 3))
    is_within_image = (largest > 1e-6 * largest[n]).sum() <= 1
    return is_within_image and (difference <= tolerance * alone.abs().clamp(min=1)).all()


@torch.no_grad()
def _equals_differences(total: Callable, images: Tensor, gradient: Tensor, tolerance: float) -> bool:
    """Whether <gradient, d> equals central differences of total(images), for d the gradient itself and random blobs."""
    generator = torch.Generator().manual_seed(1)
    blobs = [torch.randn(len(images), 3, 4, 4, generator=generator).to(images) for _ in range(3)]
    scale = total(images).abs().clamp(min=1)
    for d in [gradient, *(F.interpolate(blob, images.shape[2:], mode="bicubic") for blob in blobs)]:
        d, errors = d / d.abs().max(), []
        largest_slope = (gradient * d).abs().sum()
        # The score moves by about 20 or 4 tolerances.  A kink spoils the long step, rounding the short one.
        for tolerances in (20, 4):
            h = (tolerances * tolerance * scale / largest_slope).clamp(max=0.05)
            slope = (total(images + h * d) - total(images - h * d)) / (2 * h)
            errors.append((slope - (gradient * d).sum()).abs() / (100 * largest_slope + scale / h / 100))
        if not min(errors) <= tolerance:
            return False
    return True
