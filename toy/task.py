"""What the toy tasks share: a Task (runtime/task.py) with two small networks."""

import sys
from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from leap_align import Velocity, interpolate, leap, leap_trajectory, require, rollout, shifted_times, uniform_times
from runtime.task import EVALUATION_SEED, Task
from toy import nets, pretrain
from toy.nets import RewardNet, VelocityNet
from toy.pictures import save_samples

DRAWN = 64  # samples of an evaluation that keep their whole trajectory for the figures


@dataclass(frozen=True)
class ToyOptions:
    """Flags of the toy tasks."""

    shift: float = 1.0  # Shift s of the time grid; 1 is even, FLUX's own at 720 px is 2.22.
    pretrain_steps: int = 3000  # Iterations of flow matching before alignment.
    reward_steps: int = 1500  # Iterations of learning the reward.
    pretrain_seed: int = 0  # Seed of captions, choices and both networks; --seed does not affect these.
    evaluation_samples: int = 1024  # Samples of an evaluation, always from the same noise.
    evaluation_T: int = 25  # Euler steps of an evaluation's sampling runs, whatever T and the solver are in training.

    def __post_init__(self) -> None:
        bounds = {"pretrain_steps": 1, "reward_steps": 1, "pretrain_seed": 0, "evaluation_samples": 160}
        for name, bound in (bounds | {"evaluation_T": 2}).items():  # an evaluation's figures show two leaps
            require(getattr(self, name) >= bound, f"{name}={getattr(self, name)} must be at least {bound}")


class ToyTask(Task):
    """A flow pre-trained with half of its captions wrong, and a reward learned from simulated pairwise choices.

    A subclass gives the data, the utility behind the choices, the held-out evaluators, and the figures.
    """

    name: ClassVar[str]
    shape: ClassVar[tuple[int, ...]]
    classes: ClassVar[int]
    network: ClassVar[dict[str, int]]  # width and depth of the velocity network
    Options = ToyOptions

    def __init__(self, options: ToyOptions, T: int) -> None:
        # Matrices this small are not faster with a second thread, and much slower if another program uses its core.
        torch.set_num_threads(1)
        self.options = options
        self.times, self.evaluation_times = self.grid(T), self.grid(options.evaluation_T)
        self.generator = torch.Generator().manual_seed(options.pretrain_seed)
        self.load_data(options.pretrain_seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.pretrain_seed)
            self.model = VelocityNet(self.shape, self.classes, **self.network)
            self.reward_model = RewardNet(self.shape, self.classes)
        models = nn.ModuleDict({"flow": self.model, "reward": self.reward_model})
        modules = [sys.modules[type(self).__module__], sys.modules[__name__], pretrain, nets]
        settings = (options.pretrain_seed, options.pretrain_steps, options.reward_steps)
        pretrain.fit_or_load(self.name, [*modules, leap, rollout, interpolate], settings, models, self.pretrain)
        self.reward_model.requires_grad_(False)

    def grid(self, T: int) -> Tensor:
        """The grid (T+1,) of a sampling run in T steps."""
        return uniform_times(T) if self.options.shift == 1 else shifted_times(T, self.options.shift)

    # What a subclass gives

    @abstractmethod
    def load_data(self, seed: int) -> None:
        """Loads `data` (N, *S) and `truth` (N,), the class of each sample, and fits the evaluators."""

    @abstractmethod
    def utility(self, samples: Tensor) -> Tensor:
        """What the simulated people like, under every prompt: (N, *S) to (N, classes).  Training never sees it."""

    # Pre-training

    def pretrain(self) -> None:
        """Fits both networks, and makes the mean reward of real, rightly captioned data zero.

        Choices determine a Bradley-Terry reward only up to a constant.  With this constant, lambda = 0 means: as good
        as real data.
        """
        options, generator = self.options, self.generator
        wrong = torch.rand(len(self.truth), generator=generator) < 0.5
        other_class = self.truth + torch.randint(1, self.classes, self.truth.shape, generator=generator)
        captions = torch.where(wrong, other_class % self.classes, self.truth)
        pretrain.fit_flow(self.model, self.data, captions, options.pretrain_steps, generator)
        prompts = self.sample_conditions(len(self.data), generator)
        # Always on the same grid, so that every T and shift trains on the same reward.
        generated = rollout(self.velocity(prompts), self.noise(len(prompts), generator), uniform_times(25))[0]
        pool = torch.cat([self.data, generated])
        pretrain.fit_reward(self.reward_model, lambda: self.choices(pool), options.reward_steps)
        with torch.no_grad():
            self.reward_model.zero.copy_(self.reward(self.data, self.truth).mean())

    def choices(self, pool: Tensor, n: int = 512) -> tuple[Tensor, Tensor, Tensor]:
        """n simulated choices by the hidden utility: the chosen and the other sample (n, *S), the prompt (n,).

        People see real and generated samples, more or less corrupted, so that the reward also knows the region around
        the data that alignment may reach.  Half of the prompts name what the first sample shows.
        """
        generator = self.generator
        first, second = self.corrupt(pool, n), self.corrupt(pool, n)
        utility_first, utility_second = self.utility(first), self.utility(second)
        names_first = torch.rand(n, generator=generator) < 0.5
        prompt = torch.where(names_first, utility_first.argmax(1), self.sample_conditions(n, generator))
        lead = (utility_first - utility_second).gather(1, prompt[:, None])[:, 0]
        first_wins = torch.rand(n, generator=generator) < lead.sigmoid()
        first_wins = first_wins.reshape(-1, *[1] * len(self.shape))
        return torch.where(first_wins, first, second), torch.where(first_wins, second, first), prompt

    def corrupt(self, pool: Tensor, n: int) -> Tensor:
        """n samples of the pool, each blended with another one, rescaled, shifted and noised by random amounts."""
        one, other = (pool[torch.randint(len(pool), (n,), generator=self.generator)] for _ in range(2))
        amount = torch.rand(2, n, *[1] * len(self.shape), generator=self.generator)
        scale, shift = 0.3 * torch.randn(2, n, *[1] * len(self.shape), generator=self.generator)
        noise = torch.randn(one.shape, generator=self.generator)
        return torch.lerp(one, other, amount[0] / 2) * (1 + scale) + shift + amount[1].square() * noise

    # The members of every task

    @classmethod
    def defaults(cls, reward: str | None) -> dict[str, Any]:
        """Those of the toy tasks, which have one reward each."""
        return {"lam": 0.0}

    def noise(self, n: int, generator: torch.Generator) -> Tensor:
        """x_T (n, *S), standard normal."""
        return torch.randn(n, *self.shape, generator=generator)

    def sample_conditions(self, n: int, generator: torch.Generator) -> Tensor:
        """Prompts (n,), uniform over the classes."""
        return torch.randint(self.classes, (n,), generator=generator)

    def velocity_of(self, model: nn.Module, inputs: Tensor) -> Velocity:
        """The velocity of a network under these prompts."""
        return lambda x, t: model(x, t, inputs)

    def reward(self, sample: Tensor, condition: Tensor) -> Tensor:
        """The learned reward (B,), with gradient to the sample."""
        return self.reward_model(sample, condition)

    def evaluate(self, folder: Path | None, iteration: int) -> dict[str, float]:
        """Reward and held-out evaluators of samples from fixed noise; with a folder, saves what its figures need."""
        n = self.options.evaluation_samples
        x_T = self.noise(n, torch.Generator().manual_seed(EVALUATION_SEED))
        prompts = torch.arange(n) % self.classes
        states = rollout(self.velocity(prompts), x_T, self.evaluation_times)
        samples = self.decode(states[0])
        with torch.no_grad():
            reward = self.reward(samples, prompts).mean().item()
        leaps = self.leaps_to_draw(prompts[:DRAWN], [x[:DRAWN] for x in states])
        if folder is not None:
            save_samples(folder, iteration, prompt=prompts, samples=samples, **leaps)
        utility = self.utility(samples).gather(1, prompts[:, None]).mean().item()
        return {"reward": reward, "utility": utility, **self.evaluate_held_out(samples, prompts)}

    def leaps_to_draw(self, prompts: Tensor, states: list[Tensor]) -> dict[str, Any]:
        """The states of some rollouts, and the leaps of one pair over each."""
        T = len(states) - 1
        i_j = max(1, round(0.4 * T))
        i_k = max(i_j + 1, round(0.8 * T))
        with torch.no_grad():
            leaps = leap_trajectory(self.velocity(prompts), states, self.evaluation_times, i_k, i_j, alpha=0)
        return {"states": torch.stack(states), "x_hat_j": leaps.x_hat_j, "x_hat_0": leaps.x_hat_0, "pair": (i_k, i_j)}
