"""What the trainer asks of a task: a flow model, its prompts, a reward, evaluators.  A task knows no method."""

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from leap_align import Velocity


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

    def parallelize(self, mesh: DeviceMesh | None) -> None:
        """Moves the model to its device and shards it over the mesh (FSDP2); without a mesh there is one process."""

    def noise(self, n: int, generator: torch.Generator) -> Tensor:
        """x_T (n, *S)."""

    def sample_conditions(self, n: int, generator: torch.Generator) -> Any:
        """n random prompts in any form that can be sliced: conditions[rows] are those of some samples."""

    def velocity(self, condition: Any) -> Velocity:
        """v_theta under these prompts, with gradient to the model."""

    def decode(self, x_0: Tensor) -> Tensor:
        """The sample that the reward scores, with gradient to x_0 (B, *S)."""

    def step_metrics(self, sample: Tensor) -> dict[str, float]:
        """What a decoded sample adds to a row of metrics.csv."""

    def reward(self, sample: Tensor, condition: Any) -> Tensor:
        """(B,), with gradient to the sample."""

    def evaluate(self, folder: Path | None, iteration: int) -> dict[str, float]:
        """All evaluators, `reward` and those of held_out among them, always on the same noise and prompts.

        Every rank calls it.  Rank 0 passes the run's folder, where the task may write what its figures need; the
        others pass None.
        """

    def draw_figures(self, folder: Path) -> None:
        """Draws the figures of a finished run; rank 0 calls it."""

    def save(self, folder: Path) -> None:
        """Writes the model into the run's folder; every rank calls it."""

    def load(self, folder: Path) -> None:
        """Reads what `save` wrote."""
