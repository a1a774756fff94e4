"""The two networks of the toy tasks: a velocity, and a reward that scores like CLIP."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FREQUENCIES = 4
EMBEDDING = 32


def _mlp(*widths: int) -> nn.Sequential:
    layers = [layer for a, b in pairwise(widths) for layer in (nn.Linear(a, b), nn.SiLU())]
    return nn.Sequential(*layers[:-1])


class VelocityNet(nn.Module):
    """Velocity of a flow over samples of any shape: x (B, *S), t () or (B,), prompt (B,) integers, to (B, *S)."""

    def __init__(self, shape: tuple[int, ...], classes: int, width: int, depth: int) -> None:
        super().__init__()
        size = torch.Size(shape).numel()
        self.prompt = nn.Embedding(classes, EMBEDDING)
        self.body = _mlp(size + 2 * FREQUENCIES + EMBEDDING, *[width] * depth, size)
        self.register_buffer("frequencies", torch.pi * 2.0 ** torch.arange(FREQUENCIES), persistent=False)

    def forward(self, x: Tensor, t: Tensor, prompt: Tensor) -> Tensor:
        phase = t.reshape(-1, 1) * self.frequencies
        time = torch.cat([phase.sin(), phase.cos()], 1).expand(len(x), -1)
        v = self.body(torch.cat([x.flatten(1), time, self.prompt(prompt)], 1))
        return v.reshape(x.shape)


class RewardNet(nn.Module):
    """Reward of a sample (B, *S) under a prompt (B,), to (B,): a scaled cosine of two embeddings, as in CLIP, HPS."""

    def __init__(self, shape: tuple[int, ...], classes: int, width: int = 128) -> None:
        super().__init__()
        self.sample = _mlp(torch.Size(shape).numel(), width, width, EMBEDDING)
        self.prompt = nn.Embedding(classes, EMBEDDING)
        self.log_scale = nn.Parameter(torch.tensor(1.5))
        self.register_buffer("zero", torch.zeros(()))  # is subtracted, so that a chosen score becomes 0

    def forward(self, sample: Tensor, prompt: Tensor) -> Tensor:
        cosine = F.cosine_similarity(self.sample(sample.flatten(1)), self.prompt(prompt))
        return self.log_scale.exp() * cosine - self.zero
