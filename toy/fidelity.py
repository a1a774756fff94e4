"""How near each method's gradient comes to the true one: that of the reward through all T steps of the sampling run.

For fixed noise and prompts a method's gradient is random through the timesteps that it draws.  Its expectation is taken
over every distinct draw, or over many seeds where draws are too many or continuous.  All gradients are those of
-weight * reward, without a hinge, which would hide the samples above it.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations

import torch
from torch import Tensor

from leap_align import METHODS, leap_trajectory, objective, rollout, similarity_weight
from toy.benchmark import saved_bytes
from toy.probe import draws, finish, hyper_for, seeded
from toy.trial import advance, fresh

ALPHAS = (0.0, 0.1, 0.3, 0.5, 0.7, 1.0)
NOISE_SEED = 1_000_007


class Bench:
    """A task at some stage of its training, with fixed noise and prompts: any method's gradient for any draw."""

    def __init__(self, task: str, T: int, iterations: int, lr: float, batch: int, smoke: bool) -> None:
        self.task, self.hyper = fresh(task, T, smoke), hyper_for(T)
        advance(self.task, iterations, lr)
        self.draw(batch, NOISE_SEED)

    def draw(self, batch: int, seed: int) -> None:
        """Other noise and prompts."""
        generator = seeded(seed)
        self.x_T, self.prompt = self.task.noise(batch, generator), self.task.conditions(batch, generator)

    def gradient(self, name: str, seed: int, **changes: object) -> Tensor:
        """A method's gradient in all weights of the model, as one vector."""
        velocity, hyper = self.task.velocity(self.prompt), replace(self.hyper, **changes)
        return self.slope(finish(METHODS[name](velocity, self.x_T, self.task.times, hyper, seeded(seed)))[0])

    def slope(self, endpoints: list[tuple[Tensor, Tensor]]) -> Tensor:
        """The gradient of the objective of some endpoints, as one vector."""
        losses = [objective(self.task.reward(self.task.decode(x_0), self.prompt), w, None) for x_0, w in endpoints]
        parts = torch.autograd.grad(sum(losses), list(self.task.model.parameters()))
        return torch.cat([part.flatten() for part in parts])

    def pairs(self) -> Iterator[tuple[int, int, float, Tensor, Tensor]]:
        """Every pair i_k > i_j, its mean weight w_sim, and LeapAlign's gradients at alpha = 0 and 1.

        Between states that are recorded once, which gives what `leap_align` gives (a test says so), in less time.
        """
        velocity, times = self.task.velocity(self.prompt), self.task.times
        states = rollout(velocity, self.x_T, times)
        for i_j, i_k in combinations(range(1, len(times)), 2):
            leaps = [leap_trajectory(velocity, states, times, i_k, i_j, alpha) for alpha in (0.0, 1.0)]
            weight = similarity_weight(leaps[0], self.hyper.tau)
            yield i_k, i_j, weight.mean().item(), *(self.slope([(leap.x_0, weight)]) for leap in leaps)


class Moments:
    """Mean and scatter of random gradients, and how they lie to the true one."""

    def __init__(self, true: Tensor) -> None:
        self.true, self.sum, self.square, self.cosines, self.n = true, torch.zeros_like(true), 0.0, 0.0, 0

    def add(self, g: Tensor) -> None:
        self.n += 1
        self.sum += g
        self.square += g.square().sum().item()
        self.cosines += torch.cosine_similarity(g, self.true, dim=0).item()

    def figures(self) -> dict[str, float]:
        """cosine and ratio (of lengths) of the mean to the true gradient; of one draw the mean cosine to it, the length
        (root mean square) and the variance, over the squared length of the mean."""
        mean, square = self.sum / self.n, self.square / self.n
        return {
            "cosine": torch.cosine_similarity(mean, self.true, dim=0).item(),
            "ratio": (mean.norm() / self.true.norm()).item(),
            "one_cosine": self.cosines / self.n,
            "one_norm": square**0.5,
            "variance": square / mean.square().sum().item() - 1,
            "draws": self.n,
        }


# Cells


def against_truth(task: str, T: int, iterations: int, lr: float, most: int, batch: int, smoke: bool = False) -> dict:
    """Each method's gradient beside the true one, after that many iterations of LeapAlign.

    {"norm": of the true gradient, "methods": {name: figures}, "pairs": [[i_k, i_j, mean w_sim], ...]}.
    """
    bench = Bench(task, T, iterations, lr, batch, smoke)
    true = bench.gradient("full_backprop", 0)
    methods = {}
    for name in ("drtune", "refl", "draft_lv"):
        seeds, every = draws(name, T, most)
        moments = Moments(true)
        for seed in seeds:
            moments.add(bench.gradient(name, seed))
        methods[name] = moments.figures() | {"every": every}
    pairs, by_alpha = [], {alpha: Moments(true) for alpha in ALPHAS}
    for i_k, i_j, weight, g_0, g_1 in bench.pairs():
        pairs.append([i_k, i_j, weight])
        for alpha, moments in by_alpha.items():
            moments.add(g_0 + alpha * (g_1 - g_0))  # affine in alpha (Eq. S18)
    methods |= {f"leap_align {alpha:g}": moments.figures() | {"every": True} for alpha, moments in by_alpha.items()}
    return {"norm": true.norm().item(), "methods": methods, "pairs": pairs}


def scatter(task: str, most: int, batch: int, smoke: bool = False) -> dict:
    """LeapAlign's gradient at one pair a batch and at a pair a sample: {"batch timesteps": figures, ...}.

    Scatter over the timesteps alone, for fixed noise and prompts, and over everything that a step draws.
    """
    bench, figures = Bench(task, 25, 0, 0.0, batch, smoke), {}
    true = bench.gradient("full_backprop", 0)
    for pairs in ("batch", "sample"):
        for drawn in ("timesteps", "everything"):
            moments = Moments(true)
            for seed in range(most):
                bench.draw(batch, NOISE_SEED if drawn == "timesteps" else seed)
                moments.add(bench.gradient("leap_align", seed, pairs=pairs))
            figures[f"{pairs} {drawn}"] = moments.figures()
    return figures


def saved(task: str, T: int, batch: int, smoke: bool = False) -> dict:
    """Bytes that one step keeps for backward, by LeapAlign and by full backpropagation; the weights not counted."""
    bench = Bench(task, T, 0, 0.0, batch, smoke)
    return {
        f"bytes, {name}": saved_bytes(lambda name=name: bench.gradient(name, 0), bench.task.model)
        for name in ("leap_align", "full_backprop")
    }
