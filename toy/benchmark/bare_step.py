"""The bare step: the model calls of a LeapAlign step in a loop, and nothing else.

It encodes the prompts, evaluates the velocity T times, two of them with gradient, decodes, computes the reward and runs
one backward, all in the shapes of the trainer's step.  It draws no noise and changes no weight.
"""

from typing import Any

import torch
from torch import Tensor

from runtime.task import Task


def bare_step(task: Task, condition: Any, x: Tensor) -> None:
    """One bare step from noise x (B, *S), with the pair in the middle; adds a gradient to every weight.

    The states only roughly follow a rollout: the endpoint carries the gradients, which are not LeapAlign's.
    """
    velocity, T = task.velocity(condition), len(task.times) - 1
    i_k = max(2, round(0.8 * T))
    i_j = max(1, i_k // 2)
    for i, interval in zip(range(T, 0, -1), task.times.diff().flip(0).tolist()):
        t = task.times[i]
        if i == i_k:
            v = velocity(x, t)
            with_graph = 1e-3 * v
        elif i == i_j:
            v = velocity(x + with_graph, t)
            with_graph = with_graph + 1e-3 * v
        else:
            with torch.no_grad():
                v = velocity(x, t)
        with torch.no_grad():
            x = x - interval * v
    task.reward(task.decode(x + with_graph), condition).mean().backward()
