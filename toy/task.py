"""What the toy tasks share: the task interface of train_leap_align.py, met with two small networks."""

import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from leap_align import (
    BadInput,
    Velocity,
    interpolate,
    leap,
    leap_trajectory,
    rollout,
    shifted_times,
    uniform_times,
)
from toy import learn, nets
from toy.nets import RewardNet, VelocityNet

EVALUATION_SEED = 1_000_003
DRAWN = 64
"""Samples of an evaluation whose whole trajectory is kept for the pictures."""


@dataclass(frozen=True)
class ToyOptions:
    """Flags of the toy tasks."""

    shift: float = 1.0
    """Shift s of the time grid; 1 is even, FLUX's own at 720 px is 2.22."""
    pretrain_steps: int = 3000
    """Steps of flow matching before alignment."""
    reward_steps: int = 1500
    """Steps of learning the reward."""
    pretrain_seed: int = 0
    """Seed of captions, choices and both networks; --seed leaves these alone."""
    evaluation_samples: int = 1024
    """Samples that an evaluation draws, always from the same noise."""

    def __post_init__(self) -> None:
        least_of = {"pretrain_steps": 1, "reward_steps": 1, "pretrain_seed": 0, "evaluation_samples": 160}
        for name, least in least_of.items():
            if getattr(self, name) < least:
                raise BadInput(f"{name}={getattr(self, name)} must be at least {least}")


class ToyTask(ABC):
    """A flow pre-trained with half of its captions wrong, and a reward learned from simulated pairwise choices.

    A subclass gives the data, the choices, the evaluators that training never sees, and the pictures.
    """

    name: ClassVar[str]
    shape: ClassVar[tuple[int, ...]]
    classes: ClassVar[int]
    size: ClassVar[dict[str, int]] = {"width": 128, "depth": 3}
    """Width and depth of the velocity network."""
    settings: ClassVar[dict] = {}
    """Values of the run's configuration that suit this task better than the general ones."""
    measured: ClassVar[dict[str, float]] = {}
    how: ClassVar[frozenset[str]] = frozenset()
    held_out: ClassVar[dict[str, float]]
    """Evaluators that training never sees, each with the change for the worse that is worth a warning (signed)."""
    Options = ToyOptions

    def __init__(self, options: ToyOptions, T: int) -> None:
        # Matrices this small gain nothing from a second thread, and lose all where another program keeps it busy.
        torch.set_num_threads(1)
        self.options = options
        self.times = uniform_times(T) if options.shift == 1 else shifted_times(T, options.shift)
        self.generator = torch.Generator().manual_seed(options.pretrain_seed)
        self.prepare(options.pretrain_seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.pretrain_seed)
            self.model = VelocityNet(self.shape, self.classes, **self.size)
            self.reward_model = RewardNet(self.shape, self.classes)
        models = nn.ModuleDict({"flow": self.model, "reward": self.reward_model})
        made_by = [sys.modules[type(self).__module__], sys.modules[__name__], learn, nets, leap, rollout, interpolate]
        settings = (options.pretrain_seed, options.pretrain_steps, options.reward_steps)
        learn.cached(self.name, made_by, settings, models, self.pretrain)
        self.reward_model.requires_grad_(False)

    # What a subclass gives

    @abstractmethod
    def prepare(self, seed: int) -> None:
        """Loads `data` (N, *S), in which `truth` (N,) says what each shows, and fits the evaluators."""

    @abstractmethod
    def utility(self, samples: Tensor) -> Tensor:
        """What the simulated people like, under every prompt: (N, *S) to (N, classes).  The training never sees it."""

    @abstractmethod
    def judge(self, samples: Tensor, prompt: Tensor) -> dict[str, float]:
        """The held-out evaluators of samples (N, *S) under prompts (N,)."""

    @abstractmethod
    def draw(self, folder: Path) -> None:
        """Draws the run's pictures from what its evaluations left in the folder."""

    # Pre-training

    def pretrain(self) -> None:
        """Fits both networks and puts the reward's zero at the mean of real, rightly captioned data.

        Choices fix a Bradley-Terry reward only up to a constant.  With this one, lambda = 0 says: as good as real.
        """
        options, generator = self.options, self.generator
        wrong = torch.rand(len(self.truth), generator=generator) < 0.5
        another = self.truth + torch.randint(1, self.classes, self.truth.shape, generator=generator)
        captions = torch.where(wrong, another % self.classes, self.truth)
        learn.fit_flow(self.model, self.data, captions, options.pretrain_steps, generator)
        prompts = self.conditions(len(self.data), generator)
        # On a grid of its own, so that every T and shift meets the same reward.
        generated = rollout(self.velocity(prompts), self.noise(len(prompts), generator), uniform_times(25))[0]
        pool = torch.cat([self.data, generated])
        learn.fit_reward(self.reward_model, lambda: self.choices(pool), options.reward_steps)
        with torch.no_grad():
            self.reward_model.zero.copy_(self.reward(self.data, self.truth).mean())

    def choices(self, pool: Tensor, n: int = 512) -> tuple[Tensor, Tensor, Tensor]:
        """n simulated choices by the hidden utility: the chosen and the other sample (n, *S), the prompt (n,).

        People are shown real and generated samples, spoilt more or less, so that the reward knows its way back from
        where an alignment may lead.  Half of the time they are asked for what the first sample shows.
        """
        generator = self.generator
        first, second = self.spoil(pool, n), self.spoil(pool, n)
        like_first, like_second = self.utility(first), self.utility(second)
        asked = torch.rand(n, generator=generator) < 0.5
        prompt = torch.where(asked, like_first.argmax(1), self.conditions(n, generator))
        lead = (like_first - like_second).gather(1, prompt[:, None])[:, 0]
        first_wins = torch.rand(n, generator=generator) < lead.sigmoid()
        first_wins = first_wins.reshape(-1, *[1] * len(self.shape))
        return torch.where(first_wins, first, second), torch.where(first_wins, second, first), prompt

    def spoil(self, pool: Tensor, n: int) -> Tensor:
        """n samples of the pool, each blended with another, faded, and blurred, all to a random degree."""
        one, other = (pool[torch.randint(len(pool), (n,), generator=self.generator)] for _ in range(2))
        degree = torch.rand(2, n, *[1] * len(self.shape), generator=self.generator)
        scale, shift = 0.3 * torch.randn(2, n, *[1] * len(self.shape), generator=self.generator)
        noise = torch.randn(one.shape, generator=self.generator)
        return torch.lerp(one, other, degree[0] / 2) * (1 + scale) + shift + degree[1].square() * noise

    # The task interface

    @classmethod
    def defaults(cls, reward: str | None) -> dict[str, Any]:
        """The task's settings; its reward is always its own."""
        return cls.settings

    def place(self, mesh: DeviceMesh | None) -> None:
        """Shards the velocity network over several processes (FSDP2)."""
        if mesh is not None:
            self.model.register_forward_hook(lambda model, inputs, v: v.clone())  # FSDP2 cannot hook a view
            # Resharding after each forward: an evaluation has no backward that would, and then swaps the weights.
            fully_shard(self.model, mesh=mesh, reshard_after_forward=True)

    def noise(self, n: int, generator: torch.Generator) -> Tensor:
        """x_T (n, *S), standard normal."""
        return torch.randn(n, *self.shape, generator=generator)

    def conditions(self, n: int, generator: torch.Generator) -> Tensor:
        """Prompts (n,), uniform over the classes."""
        return torch.randint(self.classes, (n,), generator=generator)

    def velocity(self, condition: Tensor) -> Velocity:
        """v_theta under these prompts."""
        return lambda x, t: self.model(x, t, condition)

    def decode(self, x_0: Tensor) -> Tensor:
        """The sample that the reward sees; here the state itself."""
        return x_0

    def reward(self, sample: Tensor, condition: Tensor) -> Tensor:
        """The learned reward (B,), with gradient to the sample."""
        return self.reward_model(sample, condition)

    def evaluate(self, folder: Path | None, iteration: int) -> dict[str, float]:
        """Reward and held-out evaluators of samples from fixed noise; with a folder, what its pictures need."""
        n = self.options.evaluation_samples
        x_T = self.noise(n, torch.Generator().manual_seed(EVALUATION_SEED))
        prompt = torch.arange(n) % self.classes
        states = rollout(self.velocity(prompt), x_T, self.times)
        samples = self.decode(states[0])
        with torch.no_grad():
            reward = self.reward(samples, prompt).mean().item()
        shown = self.shown(prompt[:DRAWN], [x[:DRAWN] for x in states])
        if folder is not None:
            (folder / "samples").mkdir(exist_ok=True)
            for later in (folder / "samples").glob("*.npz"):
                if int(later.stem) > iteration:  # of a run that was stopped, and went on from an earlier checkpoint
                    later.unlink()
            np.savez(folder / "samples" / f"{iteration:06d}.npz", prompt=prompt, samples=samples, **shown)
        utility = self.utility(samples).gather(1, prompt[:, None]).mean().item()
        return {"reward": reward, "utility": utility, **self.judge(samples, prompt)}

    def save(self, folder: Path) -> None:
        """Writes the velocity network; every process calls it, the first one writes."""
        weights = get_model_state_dict(self.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if weights:
            learn.write(weights, folder / "model" / "velocity.pt")

    def load(self, folder: Path) -> None:
        """Reads what `save` wrote."""
        self.model.load_state_dict(torch.load(folder / "model" / "velocity.pt", weights_only=True))

    def shown(self, prompt: Tensor, states: list[Tensor]) -> dict[str, Tensor | tuple]:
        """What the pictures show of some rollouts: their states, and a leap trajectory over each."""
        T = len(states) - 1
        i_j = max(1, round(0.4 * T))
        i_k = max(i_j + 1, round(0.8 * T))
        with torch.no_grad():
            leaps = leap_trajectory(self.velocity(prompt), states, self.times, i_k, i_j, alpha=0)
        return {"states": torch.stack(states), "x_hat_j": leaps.x_hat_j, "x_hat_0": leaps.x_hat_0, "pair": (i_k, i_j)}
