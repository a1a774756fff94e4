"""What the trainer asks of a task: a flow model, its prompts, a reward, evaluators.  A task knows no method.

The functions below refuse a task that does not keep the protocol, in one line that names the task and its member.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from leap_align import BadInput, Velocity


class Task(Protocol):
    """A class with these members is a task; it need not inherit anything."""

    Options: type
    """A dataclass of the task's own flags; Task(options, T) builds the task on a grid of T steps."""
    changeable_on_resume: frozenset[str]
    """Options that affect speed or memory, never results; they may change on --resume."""
    held_out: dict[str, float]
    """Evaluators that training never sees, each with the change for the worse that deserves a warning."""
    step_metric_names: tuple[str, ...]
    """The columns that step_metrics adds to metrics.csv."""
    model: nn.Module
    """The network to train; its trained parameters are float32."""
    times: Tensor
    """The grid (T+1,)."""
    device: torch.device
    """Where the model computes."""

    @classmethod
    def defaults(cls, reward: str | None) -> dict[str, Any]:
        """Fields of Config and Hyper that this task sets differently, given the flag --reward."""

    def contents(self) -> dict[str, str]:
        """A digest of everything that the task reads from files, by name; a resumed run must find them unchanged."""

    def parallelize(self, mesh: DeviceMesh | None) -> None:
        """Moves the model to its device and shards it over the mesh (FSDP2); without a mesh there is one process."""

    def noise(self, n: int, generator: torch.Generator) -> Tensor:
        """x_T (n, *S)."""

    def sample_conditions(self, n: int, generator: torch.Generator) -> Any:
        """n random prompts in any form that can be sliced: conditions[rows] are those of some samples."""

    def velocity(self, condition: Any) -> Velocity:
        """v_theta under these prompts, with gradient to the model."""

    def keep_reference(self) -> None:
        """Keeps what velocity_and_reference needs of the pre-trained model; called before parallelize, or never."""

    def velocity_and_reference(self, condition: Any) -> tuple[Velocity, Velocity]:
        """v_theta as above, and v_ref, the velocity of the pre-trained model, which gets no gradient."""

    def decode(self, x_0: Tensor) -> Tensor:
        """The sample that the reward scores, with gradient to x_0 (B, *S)."""

    def step_metrics(self, sample: Tensor) -> dict[str, float]:
        """What a decoded sample adds to a row of metrics.csv."""

    def reward(self, sample: Tensor, condition: Any) -> Tensor:
        """(B,), with gradient to the sample."""

    def evaluate(self, folder: Path | None, iteration: int) -> dict[str, float]:
        """All evaluators, `reward` and those of held_out among them, always on the same noise and prompts.

        Every rank calls it.  Rank 0 passes the run's folder, where the task may write what its figures need; the
        others pass None.  A tracker shows samples/ITERATION.png, six digits, if the task writes it.
        """

    def draw_figures(self, folder: Path) -> None:
        """Draws the figures of a finished run; rank 0 calls it."""

    def save(self, folder: Path) -> None:
        """Writes the model into the run's folder; every rank calls it."""

    def load(self, folder: Path) -> None:
        """Reads what `save` wrote."""


SET_BY_INIT = ("model", "times", "device")
"""Members that a task's class may leave to __init__."""


def check_task_class(name: str, task_class: type) -> None:
    """Refuses a class without all other members of Task, before anything is built."""
    members = [*Task.__annotations__, *(member for member in vars(Task) if not member.startswith("_"))]
    _check_members(name, task_class, [member for member in members if member not in SET_BY_INIT])


def check_task(name: str, task: Task) -> None:
    """Refuses a task that was built without model, times and device."""
    _check_members(name, task, SET_BY_INIT)


def _check_members(name: str, owner: Any, members: Iterable[str]) -> None:
    if missing := [member for member in members if not hasattr(owner, member)]:
        raise BadInput(f"task {name} lacks {', '.join(missing)}: see the class Task in runtime/task.py")


def check_gradient(name: str, member: str, result: Tensor) -> Tensor:
    """The result of a task's member unchanged, if it has gradient."""
    if not torch.is_tensor(result) or not result.requires_grad:
        remedy = "look for no_grad or detach in it, and for weights that do not require grad"
        raise BadInput(f"task {name}: {member} must give a tensor with gradient: {remedy}")
    return result


def check_evaluation(name: str, task: Task, values: dict[str, float]) -> dict[str, float]:
    """What a task's evaluate() returned, if it is a dict of numbers with `reward` and all of held_out."""
    expected = ["reward", *task.held_out]
    if not isinstance(values, dict) or not all(isinstance(value, int | float) for value in values.values()):
        raise BadInput(f"task {name}: evaluate must return a dict of numbers, {', '.join(expected)} among them")
    if missing := [key for key in expected if key not in values]:
        raise BadInput(f"task {name}: evaluate returns no {', '.join(missing)}: give `reward` and all of held_out")
    return values
