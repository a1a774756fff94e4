"""Each method's gradient compared with the true one: that of the reward through all T steps of the sampling run.

With fixed noise and prompts, a method's gradient is random through the timesteps that it draws.  Its mean is over every
distinct draw, or over many seeds.  The loss is -weight * reward: a hinge would hide the samples above it.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import combinations

import torch
from torch import Tensor

from leap_align import METHODS as PAPER_METHODS
from leap_align import leap_trajectory, objective, rollout, similarity_weight
from toy.laboratory.laboratory import Laboratory
from toy.laboratory.method_measurements import distinct_draws, evaluation_count, hyper_for
from toy.laboratory.train_run import fresh_task, make_trainer
from train_leap_align import METHODS

ALPHAS = (0.0, 0.1, 0.3, 0.5, 0.7, 1.0)
INPUT_SEED = 1_000_007  # of the fixed noise and prompts
TRAINING_LR = 1e-3  # of the training between two comparisons
Case = tuple[str, int, int]  # a task, its number of steps T, and the iterations of training before the comparison


class GradientSampler:
    """A task after some iterations of LeapAlign, with fixed noise and prompts: the gradient of any method and draw."""

    def __init__(self, task: str, T: int, batch_size: int, smoke: bool, iterations: int = 0) -> None:
        self.task, self.T = fresh_task(task, T, smoke), T
        trainer = make_trainer(self.task, "leap_align", TRAINING_LR, {}, ema_decay=0.0)
        for _ in range(iterations):
            trainer.step()
        self.sample_inputs(batch_size, INPUT_SEED)

    def sample_inputs(self, batch_size: int, seed: int) -> None:
        """Replaces noise and prompts."""
        generator = torch.Generator().manual_seed(seed)
        self.x_T = self.task.noise(batch_size, generator)
        self.prompts = self.task.sample_conditions(batch_size, generator)

    def gradient(self, method: str, seed: int, **changes: object) -> Tensor:
        """A method's gradient in all weights of the model, as one vector; changes: of the hyperparameters."""
        hyper, generator = replace(hyper_for(self.T, method), **changes), torch.Generator().manual_seed(seed)
        velocity = self.task.velocity(self.prompts)
        return self.gradient_of(METHODS[method](velocity, self.x_T, self.task.times, hyper, generator))

    def gradient_of(self, endpoints: Iterable[tuple[Tensor, Tensor, dict]]) -> Tensor:
        """The gradient of the objective of some endpoints (x_0, weight, log), as one vector."""
        for x_0, weight, _ in endpoints:
            reward = self.task.reward(self.task.decode(x_0), self.prompts)
            objective(reward, weight, None).backward()
        gradient = torch.cat([p.grad.flatten() for p in self.task.model.parameters()])
        self.task.model.zero_grad()
        return gradient

    def pair_gradients(self) -> Iterator[tuple[int, int, float, Tensor, Tensor]]:
        """Every pair i_k > i_j, its mean w_sim, LeapAlign's gradients at alpha = 0 and 1; states are recorded once."""
        velocity, times = self.task.velocity(self.prompts), self.task.times
        states = rollout(velocity, self.x_T, times)
        for i_j, i_k in combinations(range(1, len(times)), 2):
            leaps_0, leaps_1 = (leap_trajectory(velocity, states, times, i_k, i_j, alpha) for alpha in (0.0, 1.0))
            weight = similarity_weight(leaps_0, hyper_for(self.T).tau)
            gradient_0, gradient_1 = (self.gradient_of([(leaps.x_0, weight, {})]) for leaps in (leaps_0, leaps_1))
            yield i_k, i_j, weight.mean().item(), gradient_0, gradient_1


class Moments:
    """Mean and variance of random gradients, and their cosine to the true gradient."""

    def __init__(self, true: Tensor, gradients: Iterable[Tensor] = ()) -> None:
        self.true, self.sum, self.square, self.cosines, self.n = true, torch.zeros_like(true), 0.0, 0.0, 0
        for gradient in gradients:
            self.add(gradient)

    def add(self, gradient: Tensor) -> None:
        """Adds the gradient of one draw."""
        self.n += 1
        self.sum += gradient
        self.square += gradient.square().sum().item()
        self.cosines += torch.cosine_similarity(gradient, self.true, dim=0).item()

    def values(self) -> dict[str, float]:
        """Of the mean gradient: cosine to the true one, ratio of their norms.  Of a single draw: mean cosine, root mean
        square norm, variance over the squared norm of the mean gradient, number of draws.
        """
        mean, square = self.sum / self.n, self.square / self.n
        cosine, ratio = torch.cosine_similarity(mean, self.true, dim=0).item(), (mean.norm() / self.true.norm()).item()
        one = {"one_cosine": self.cosines / self.n, "one_norm": square**0.5}
        variance = square / mean.square().sum().item() - 1
        return {"cosine": cosine, "ratio": ratio} | one | {"variance": variance, "draws": self.n}


def compare_gradients(
    task: str, T: int, iterations: int, max_draws: int, batch_size: int, methods: list[str], smoke: bool = False
) -> dict:
    """The gradients of some methods and of LeapAlign compared with the true one, after some iterations of LeapAlign.

    Returns {"norm": of the true gradient, "methods": {name: Moments.values()}, "pairs": [[i_k, i_j, mean w_sim]]}.
    A method's column `every` is True if the mean is over all draws that exist.
    """
    sampler = GradientSampler(task, T, batch_size, smoke, iterations)
    true, compared = sampler.gradient("full_backprop", 0), {}
    for name in methods:
        seeds, every = distinct_draws(name, T, max_draws)
        compared[name] = Moments(true, (sampler.gradient(name, seed) for seed in seeds)).values() | {"every": every}
    pairs, by_alpha = [], {alpha: Moments(true) for alpha in ALPHAS}
    for i_k, i_j, weight, gradient_0, gradient_1 in sampler.pair_gradients():
        pairs.append([i_k, i_j, weight])
        for alpha, moments in by_alpha.items():
            moments.add(gradient_0 + alpha * (gradient_1 - gradient_0))  # affine in alpha (Eq. S18)
    compared |= {f"leap_align {alpha:g}": moments.values() | {"every": True} for alpha, moments in by_alpha.items()}
    return {"norm": true.norm().item(), "methods": compared, "pairs": pairs}


def gradient_comparisons(lab: Laboratory, cases: list[Case]) -> dict[Case, dict]:
    """compare_gradients for every case and every method."""
    methods = [name for name in PAPER_METHODS if name not in ("leap_align", "full_backprop")]
    shared = {"max_draws": lab.scale.max_draws, "batch_size": lab.scale.batch_size, "methods": methods}
    # The largest T, which take longest, come first, so that no worker runs alone at the end.
    cases = sorted(cases, key=lambda case: -case[1])
    settings = {case: shared | dict(zip(("task", "T", "iterations"), case)) for case in cases}
    return lab.results(compare_gradients, settings, "gradients")


def step_fidelity(
    task: str, method: str, T: int, hyper: dict, cost: int, draws: int, batch_size: int, smoke: bool = False
) -> dict:
    """A method's gradient before training: Moments.values() over its draws, on fixed noise and prompts.

    `step_cosine`: the mean cosine of a step on new noise and prompts, with as many samples as `cost` evaluations allow,
    to the true gradient over 16 batches.  hyper: in place of the method's own.
    """
    sampler, (seeds, _) = GradientSampler(task, T, batch_size, smoke), distinct_draws(method, T, draws)
    true = sampler.gradient("full_backprop", 0)
    moments = Moments(true, (sampler.gradient(method, seed, **hyper) for seed in seeds))
    sampler.sample_inputs(16 * batch_size, INPUT_SEED)
    steps = Moments(sampler.gradient("full_backprop", 0))
    evaluations = evaluation_count(method, T, draws, **hyper)["evaluations"]
    for seed in range(draws):
        sampler.sample_inputs(round(cost / evaluations), seed)
        steps.add(sampler.gradient(method, seed, **hyper))
    counts = {"evaluations": evaluations, "batch_size": round(cost / evaluations)}
    return counts | moments.values() | {"step_cosine": steps.values()["one_cosine"]}
