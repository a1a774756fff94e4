"""The contract of a reward: its base class, and check_reward, which tests whether a reward keeps it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leap_align import BadInput

TEXT_CACHE_SIZE = 4096
"""How many prompts' text features a reward keeps."""


class Reward(nn.Module, ABC):
    """A frozen module: images (B, 3, H, W), floating point in [0, 1], and B prompts to (B,) scores, float32.

    Gradient flows from the scores to the pixels only.  A reward stays in eval mode, also when its parent is trained.
    A subclass passes its modules and other attributes to __init__ and defines score().
    """

    def __init__(self, **attributes: Any) -> None:
        super().__init__()
        self.name = f"the reward {type(self).__name__}"  # as error messages call it
        for name, value in attributes.items():
            setattr(self, name, value)
        self.requires_grad_(False)
        super().train(False)

    def train(self, mode: bool = True) -> "Reward":
        """Does nothing, so that a parent's train() leaves every part in the mode that the reward has chosen.

        That is eval mode, because dropout would make the scores random; HPSv3 makes exceptions to save memory.
        """
        return self

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores (B,), computed in float32, or float64 if the weights are; a caller's autocast has no effect.

        Raises BadInput for a wrong batch and, outside of training (which skips such a step), for a score of NaN or inf.
        """
        _check_batch(images, prompts)
        dtypes = {parameter.dtype for parameter in self.parameters()}
        dtype = torch.float64 if torch.float64 in dtypes else torch.float32
        with torch.autocast(images.device.type, enabled=False):
            scores = self.score(images.to(dtype), list(prompts))
        if not torch.is_grad_enabled() and images.isfinite().all() and not scores.isfinite().all():
            raise BadInput(f"{self.name} gave {scores.tolist()!s:.60} for finite images: every score must be finite")
        return scores

    @abstractmethod
    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Scores (B,) with gradient to the images."""


class TextCachingReward(Reward):
    """A reward that computes text features without the image, and keeps them for the next call."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.text_cache: dict[str, Tensor] = {}

    @abstractmethod
    def encode_text(self, prompt: str) -> Tensor:
        """Features of one prompt, of any shape."""

    @torch.no_grad()
    def text_features(self, prompts: list[str]) -> list[Tensor]:
        """Features of each prompt.  It encodes prompts one by one, so that the features do not depend on the batch."""
        features = []
        for prompt in prompts:
            if prompt not in self.text_cache:
                if len(self.text_cache) >= TEXT_CACHE_SIZE:
                    self.text_cache.pop(next(iter(self.text_cache)))  # the oldest
                self.text_cache[prompt] = self.encode_text(prompt)
            features.append(self.text_cache[prompt])
        return features

    def _apply(self, fn: Callable, recurse: bool = True) -> "TextCachingReward":
        """Moving or casting the module invalidates the cached features."""
        self.text_cache.clear()
        return super()._apply(fn, recurse)


def _check_batch(images: Tensor, prompts: Sequence[str]) -> None:
    if not torch.is_tensor(images) or images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape[2:]:
        shape = tuple(images.shape) if torch.is_tensor(images) else type(images).__name__
        raise BadInput(f"images must be a tensor (B, 3, H, W), not {shape}")
    if not images.is_floating_point():
        raise BadInput(f"images must be floating point in [0, 1], not {images.dtype}")
    if isinstance(prompts, str) or not len(prompts) or not all(isinstance(prompt, str) for prompt in prompts):
        raise BadInput(f"prompts must be a list with one text per image, and not empty, not {prompts!r:.60}")
    if len(prompts) != len(images):
        raise BadInput(f"{len(prompts)} prompts for {len(images)} images: give one prompt per image")


# ---------------------------------------------------------------------------------------------------------------------
# check_reward
# ---------------------------------------------------------------------------------------------------------------------


def check_reward(
    reward: Callable[[Tensor, list[str]], Tensor],
    size: tuple[int, int, int] = (3, 40, 56),
    prompts: Sequence[str] = ("a red cube", "two dogs on a beach, oil painting"),
    tolerance: float = 1e-4,
    device: str | torch.device = "cpu",
) -> None:
    """Raises BadInput, in one line, for the first rule of the contract that a reward breaks.

    size: (3, H, W) of the random test images.  tolerance: how much two computations of one score may differ, relative
    to max(1, |score|); half precision needs more.
    """
    prompts, generator = list(prompts), torch.Generator().manual_seed(0)
    images = _test_images(len(prompts), size, generator).to(device)
    leaf = images.clone().requires_grad_()
    pixels = leaf.clone()  # a leaf would refuse a change in place with a message of its own
    scores = reward(pixels, prompts)
    _require(reward, torch.equal(pixels, images), "it changes the images of its caller")
    _check_scores(reward, scores, pixels)
    _check_frozen(reward, images, prompts)
    _check_consistency(reward, images, prompts)
    _check_independence(reward, images, prompts, tolerance)
    (gradient,) = torch.autograd.grad(scores.sum(), leaf, allow_unused=True)
    is_sound = gradient is not None and gradient.isfinite().all() and gradient.any()
    _require(reward, is_sound, "no finite gradient in the pixels")
    with torch.no_grad():
        change = (reward((images * 255).round() / 255, prompts) - scores).abs()
    bound = gradient.abs().flatten(1).sum(1) / 510  # rounding moves each pixel by at most 1/510
    _require(reward, (change <= 2 * bound + tolerance).all(), "rounding to 8 bits changes the score too much")
    _check_gradient(reward, images, prompts, gradient, tolerance, generator)
    _require(reward, torch.equal(pixels, images), "it changes the images of its caller")


def name_of(reward: Callable) -> str:
    """What error messages call a reward."""
    return reward.name if isinstance(reward, Reward) else "the reward"


def describe(value: Any) -> str:
    """What error messages call a value of the wrong type."""
    return "None" if value is None else f"a value of type {type(value).__name__}"


def check_type(name: str, scores: Any, images: Tensor) -> None:
    """Raises BadInput, in one line, unless scores are a floating-point tensor (B,) on the images' device."""
    if not torch.is_tensor(scores):
        given = describe(scores)
    elif scores.shape == images.shape[:1] and scores.is_floating_point() and scores.device == images.device:
        return
    else:
        given = f"a tensor {tuple(scores.shape)} of {scores.dtype} on {scores.device}"
    allowed = f"a floating-point tensor (B,) = ({len(images)},) on {images.device}"
    raise BadInput(f"{name} gave {given} for {len(images)} images, but must give {allowed}")


def _require(reward: Callable, condition: bool | Tensor, message: str) -> None:
    if not condition:
        raise BadInput(f"{name_of(reward)} breaks the contract: {message}")


def _test_images(n: int, size: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """Smooth blobs plus noise: like photographs, they have coarse and fine structure."""
    blobs = F.interpolate(torch.rand(n, 3, 5, 5, generator=generator), size[1:], mode="bilinear")
    return 0.2 + 0.3 * blobs + 0.3 * torch.rand(n, *size, generator=generator)


def _scores(reward: Callable, images: Tensor, prompts: list[str]) -> Tensor:
    scores = reward(images, prompts)
    check_type(name_of(reward), scores, images)
    return scores


def _check_scores(reward: Callable, scores: Any, images: Tensor) -> None:
    check_type(name_of(reward), scores, images)
    _require(reward, scores.dtype == torch.float32, f"the score is {scores.dtype}, not float32")
    _require(reward, scores.isfinite().all(), "the score is not finite")
    _require(
        reward, scores.requires_grad, "the score has no gradient to the pixels: look for no_grad, detach, PIL or uint8"
    )


def _check_frozen(reward: Callable, images: Tensor, prompts: list[str]) -> None:
    parameters = reward.parameters() if isinstance(reward, nn.Module) else []
    trainable = any(p.requires_grad for p in parameters)
    _require(reward, not trainable, "its weights require grad: call requires_grad_(False)")
    graph = reward(images, prompts).requires_grad
    _require(reward, not graph, "the score requires grad although the images do not: encode the text under no_grad")


@torch.no_grad()
def _check_consistency(reward: Callable, images: Tensor, prompts: list[str]) -> None:
    """A second call gives equal scores, and any image shape is accepted."""
    scores = reward(images, prompts)
    is_same = torch.equal(reward(images, prompts), scores)
    _require(reward, is_same, "the same images and prompts get another score")
    transposed = reward(images.transpose(2, 3), prompts)
    is_good = transposed.shape == scores.shape and transposed.isfinite().all()
    _require(reward, is_good, "it fails on images of another shape")


def _check_independence(reward: Callable, images: Tensor, prompts: list[str], tolerance: float) -> None:
    """An image has the same score alone, in a small batch, and at another place among very different ones.

    Its gradient also stays in its own pixels, which reveals a dependence that is too weak to be seen in the scores.
    """
    n, message = len(prompts), "a score depends on the rest of its batch"
    with torch.no_grad():
        alone = torch.cat([_scores(reward, images[i : i + 1], prompts[i : i + 1]) for i in range(n)])
        together = reward(images, prompts)
    bright, dark = 1 - 0.2 * images, 0.2 * images[:1]
    batch = torch.cat([bright, images.flip(0), bright, dark]).requires_grad_()
    scores = _scores(reward, batch, [*prompts, *reversed(prompts), *["x"] * n, "a very long prompt, " * 8])
    for others in (together, scores[n : 2 * n].flip(0)):
        _require(reward, ((others - alone).abs() <= tolerance * alone.abs().clamp(min=1)).all(), message)
    (gradient,) = torch.autograd.grad(scores[n], batch, materialize_grads=True)
    largest = gradient.abs().amax((1, 2, 3))
    _require(reward, (largest > 1e-6 * largest[n]).sum() <= 1, message)


@torch.no_grad()
def _check_gradient(
    reward: Callable, images: Tensor, prompts: list[str], gradient: Tensor, tolerance: float, generator: torch.Generator
) -> None:
    """<gradient, d> against central differences, for d the gradient itself and random blobs."""

    def total(x: Tensor) -> Tensor:
        return reward(x, prompts).double().sum()

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
        _require(reward, min(errors) <= tolerance, "the gradient disagrees with finite differences")
