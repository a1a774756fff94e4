"""Trainers that differ from the project's in more than the method: policy gradient.

It needs no gradient of the reward.  A sampling run becomes a random walk (SDE), whose marginals are those
of the flow whatever eta is:

    x_s = mu + eta sqrt(t - s) noise,   mu = x_t - (t - s) (v + eta^2/2 (x_t + (1 - t) v) / t)

because -(x_t + (1 - t) v) / t is the score of x_t.  A group of images has one prompt and one x_T.  The log probability
of a step from mu_theta rises if its image is better than the mean of its group (PPO's clipped surrogate):

    A = (r - mean r) / std r over the group,   L = -mean min(q A, clip(q, 1 - c, 1 + c) A),   q = p_theta / p_old

    dancegrpo   DanceGRPO (arXiv 2505.07818): noise in every step, a random 60 % of the steps are trained, eta 0.3
    mixgrpo     MixGRPO (arXiv 2507.21802): noise and training in a window of 4 of 25 steps alone, which slides from the
                noise to the image, eta 0.7

Ours, for small toys: groups of 8 images for 12, log probabilities summed over the dimensions, so that PPO's usual c =
0.2 fits, two updates from a sampling run, and a last step without noise.
"""

import math
import time
from abc import abstractmethod

import torch
from torch import Tensor

from leap_align import leap, rollout
from train_leap_align import Trainer

GROUP = 8  # images of a prompt
CLIP = 0.2  # c: the probability of a step has no gradient once it has changed by this share
UPDATES = 2  # optimizer steps for a sampling run, each with half of the groups


class NoisyStep:
    """A step of the SDE at the timesteps `noisy`, Euler's at the others; keeps (x_t, mu, x_s) of the noisy ones."""

    def __init__(self, T: int, noisy: list[int], eta: float, generator: torch.Generator) -> None:
        self.i, self.noisy, self.eta, self.generator = T, set(noisy), eta, generator
        self.taken: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def __call__(self, x: Tensor, v: Tensor, t: Tensor, s: Tensor) -> Tensor:
        i, self.i = self.i, self.i - 1
        if i not in self.noisy:
            return leap(x, v, t, s)
        mu = noisy_mean(x, v, t, s, self.eta)
        x_s = mu + self.eta * (t - s).sqrt() * torch.randn(x.shape, generator=self.generator)
        self.taken[i] = x, mu, x_s
        return x_s


def noisy_mean(x: Tensor, v: Tensor, t: Tensor, s: Tensor, eta: float) -> Tensor:
    """mu of a step of the SDE from time t to s (module docstring); x, v (B, *S); gradient flows to both."""
    return leap(x, v + eta**2 / 2 * (x + (1 - t) * v) / t, t, s)


def advantages(reward: Tensor) -> Tensor:
    """A (B,) of rewards (B,): normalised within each group, 0 where all images of a group are equal."""
    groups = reward.reshape(-1, GROUP)
    centred = groups - groups.mean(1, keepdim=True)
    return (centred / (centred.square().mean(1, keepdim=True).sqrt() + 1e-8)).flatten()


class PolicyGradient(Trainer):
    """Groups of images, a noisy sampling run, and clipped updates; a subclass chooses eta and the timesteps."""

    eta: float

    @abstractmethod
    def timesteps(self) -> tuple[list[int], list[int]]:
        """The timesteps with noise, and those of them that are trained, of the sampling run of this iteration."""

    def step(self) -> dict[str, float]:
        """One sampling run and its updates; returns metrics."""
        start, task, groups = time.perf_counter(), self.task, self.config.batch_size // GROUP
        prompts = task.sample_conditions(groups, self.generator).repeat_interleave(GROUP, 0)
        x_T = task.noise(groups, self.generator).repeat_interleave(GROUP, 0)
        noisy, trained = self.timesteps()
        step = NoisyStep(len(task.times) - 1, noisy, self.eta, self.generator)
        x_0 = rollout(task.velocity(prompts), x_T, task.times, 0, step)[0]
        reward = task.reward(task.decode(x_0), prompts)
        advantage, losses = advantages(reward), []
        for rows in torch.arange(len(x_T)).chunk(UPDATES):
            for i in trained:
                loss = self.loss(i, [x[rows] for x in step.taken[i]], prompts[rows], advantage[rows]) / len(trained)
                loss.backward()
                losses.append(loss.item())
            norm = self.optimizer_step(sum(losses))
        self.progress.iteration += 1
        row = {"loss": sum(losses) / UPDATES, "reward": reward.mean().item(), "grad_norm": norm}
        return row | {"seconds": time.perf_counter() - start}

    def loss(self, i: int, taken: list[Tensor], prompts: Tensor, advantage: Tensor) -> Tensor:
        """L of one timestep (module docstring)."""
        (x_t, mu_old, x_s), t, s = taken, self.task.times[i], self.task.times[i - 1]
        mu = noisy_mean(x_t, self.task.velocity(prompts)(x_t, t), t, s, self.eta)
        square_old, square = ((x_s - m).square().flatten(1).sum(1) for m in (mu_old, mu))
        q = ((square_old - square) / (2 * self.eta**2 * (t - s))).exp()
        return -torch.minimum(q * advantage, q.clamp(1 - CLIP, 1 + CLIP) * advantage).mean()


class DanceGRPO(PolicyGradient):
    """Noise at every timestep but the last; a random 60 % of them are trained."""

    eta = 0.3

    def timesteps(self) -> tuple[list[int], list[int]]:
        noisy = list(range(len(self.task.times) - 1, 1, -1))
        drawn = torch.randperm(len(noisy), generator=self.generator)[: math.ceil(0.6 * len(noisy))]
        return noisy, [noisy[n] for n in drawn.tolist()]


class MixGRPO(PolicyGradient):
    """Noise and training in a window, which slides; from its last place it returns to the noise."""

    eta = 0.7
    interval = 25  # iterations after which the window moves by one timestep

    def timesteps(self) -> tuple[list[int], list[int]]:
        T = len(self.task.times) - 1
        size = max(1, round(4 * T / 25))
        first = T - self.progress.iteration // self.interval % (T - size)
        return (window := list(range(first, first - size, -1))), window


TRAINERS: dict[str, type[Trainer]] = {"dancegrpo": DanceGRPO, "mixgrpo": MixGRPO}
