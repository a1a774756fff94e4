"""guidance: LeapAlign with classifier-free guidance, whose branch without a prompt has a gradient or is detached."""

import copy
from itertools import product

import torch
from torch import Tensor, nn

from toy.laboratory.gradients import GradientSampler, Moments
from toy.laboratory.laboratory import Laboratory
from toy.laboratory.method_measurements import distinct_draws
from toy.laboratory.tables import summarize, tables
from toy.laboratory.train_run import T, make_trainer
from toy.nets import VelocityNet
from toy.pretrain import fit_flow
from toy.task import ToyTask

SCALE = 4.0  # of the guidance, that of FLUX.2-klein's pipeline
DROPPED = 0.1  # share of the data without its caption in pre-training
LR = 1e-3  # what `compare` chose for LeapAlign with the hinge
BRANCHES = {"with gradient": False, "detached": True}


class GuidedNet(nn.Module):
    """The velocity v + SCALE * (v(prompt) - v) of one network, which has a class more: no prompt."""

    def __init__(self, task: ToyTask) -> None:
        super().__init__()
        self.net, self.no_prompt = VelocityNet(task.shape, task.classes + 1, **task.network), task.classes
        self.detached = False  # whether v, without prompt, passes no gradient on

    def forward(self, x: Tensor, t: Tensor, prompt: Tensor) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.detached):
            v = self.net(x, t, torch.full_like(prompt, self.no_prompt))
        return v + SCALE * (self.net(x, t, prompt) - v)


def guided_task(task: ToyTask) -> ToyTask:
    """A toy task with a guided flow in place of its own, pre-trained on right captions, some of them dropped."""
    task, generator = copy.copy(task), torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        task.model = GuidedNet(task)
    dropped = torch.rand(len(task.truth), generator=generator) < DROPPED
    captions = task.truth.masked_fill(dropped, task.classes)
    fit_flow(task.model.net, task.data, captions, task.options.pretrain_steps, generator)
    return task


def compare_branches(
    task: str, max_draws: int, batch_size: int, evaluate_at: list[int], seeds: list[int], smoke: bool = False
) -> dict:
    """{branch: {"gradient": of LeapAlign against the true one, Moments.values(), "runs": of training, one a seed}}.

    The true gradient is that of full backpropagation, both branches with gradient.
    """
    sampler = GradientSampler(task, T, batch_size, smoke)
    sampler.task = guided = guided_task(sampler.task)
    pretrained, true, found = copy.deepcopy(guided.model.state_dict()), sampler.gradient("full_backprop", 0), {}
    draws, _ = distinct_draws("leap_align", T, max_draws)
    for branch, guided.model.detached in BRANCHES.items():
        gradient, runs = Moments(true, (sampler.gradient("leap_align", seed) for seed in draws)).values(), []
        for seed in seeds:
            guided.model.load_state_dict(pretrained)
            runs.append(training_run(guided, seed, evaluate_at))
        guided.model.load_state_dict(pretrained)
        found[branch] = {"gradient": gradient, "runs": runs}
    return found


def training_run(task: ToyTask, seed: int, evaluate_at: list[int]) -> list[dict[str, float]]:
    """The evaluators at each of these iterations of LeapAlign."""
    trainer, metrics = make_trainer(task, "leap_align", LR, {}, seed=seed), []
    for iteration in range(evaluate_at[-1] + 1):
        if iteration in evaluate_at:
            metrics.append(trainer.evaluate())
        trainer.step()
    return metrics


def run(lab: Laboratory) -> None:
    """Compares the branches on each task, and publishes."""
    scale, rows = lab.scale, []
    ends = [0, *scale.budgets.values()]
    shared = {"max_draws": scale.max_draws, "batch_size": scale.batch_size, "evaluate_at": ends}
    shared["seeds"] = list(scale.seeds)
    results = lab.results(compare_branches, {task: shared | {"task": task} for task in scale.tasks}, "guidance")
    for task, branch, (n, iterations) in product(scale.tasks, BRANCHES, enumerate(ends)):
        found = results[task][branch]
        row = {"task": task, "branch": branch, "iterations": iterations}
        row |= {name: found["gradient"][name] for name in ("cosine", "ratio")}
        row["diverged"] = sum(run[n]["reward"] < run[0]["reward"] for run in found["runs"])
        rows.append(row | summarize([run[n] for run in found["runs"]], task))
    title = "### {task} (n = {n}, mean ± standard error); cosine and ratio before training"
    columns = ["branch", "iterations", "cosine", "ratio", "diverged", "evaluators"]
    lab.publish("guidance", rows, tables(rows, ("task",), title, columns))
