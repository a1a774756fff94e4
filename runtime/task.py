"""A task: a flow model, its prompts, a reward, evaluators.  It knows no method, and the trainer knows no model.

A task of your own inherits from Task and gives a model, noise, prompts, a velocity, a reward and evaluators; the base
class has defaults for the rest.  The functions below refuse a task that does not, in one line.
"""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from leap_align import BadInput, Velocity, require, rollout
from runtime.files import atomic_file
from runtime.processes import RaisedOnAllRanks, reshard, world_size

EVALUATION_SEED = 1_000_003
WEIGHTS = "model/weights.safetensors"


@dataclass(frozen=True)
class NoOptions:
    """A task without flags of its own."""


class Task(ABC):
    """Base class of all tasks.  Task(options, T) builds one whose sampling runs have T steps."""

    Options: ClassVar[type] = NoOptions  # a dataclass of the task's own flags
    changeable_on_resume: ClassVar[frozenset[str]] = frozenset()  # options that affect speed or memory, never results
    paths: ClassVar[frozenset[str]] = frozenset()  # options that lead to files, of which only `contents` counts
    start_paths: ClassVar[frozenset[str]] = frozenset()  # those of them that a resumed run does not read: it gets None
    held_out: ClassVar[dict[str, float]] = {}
    """Evaluators that training never sees, with the drop that brings a warning; negative where lower is better."""
    step_metric_names: ClassVar[tuple[str, ...]] = ()  # the columns that step_metrics adds to metrics.csv
    next_commands: ClassVar[tuple[str, ...]] = ("python train_leap_align.py --help",)
    """What to try after a run: one command, or one each after a run with a hinge, without a hinge, on a leash."""
    evaluation_samples: ClassVar[int] = 1024
    device = torch.device("cpu")  # where the model computes
    model: nn.Module  # what is trained; its trained parameters are float32
    times: Tensor  # the grid (T+1,)
    reference: Any = None  # the pre-trained model, with --beta

    @classmethod
    def choose_device(cls) -> torch.device:
        """Where this process computes."""
        return cls.device

    # What every task gives; its __init__ sets model and times

    @abstractmethod
    def noise(self, n: int, generator: Generator) -> Tensor:
        """x_T (n, *S)."""

    @abstractmethod
    def sample_conditions(self, n: int, generator: Generator) -> Any:
        """n random prompts in any form that can be sliced: conditions[rows] are those of some samples."""

    @abstractmethod
    def velocity_of(self, model: Callable[..., Any], inputs: Any) -> Velocity:
        """The velocity of a model, the trained or the pre-trained one, with these `inputs`."""

    @abstractmethod
    def reward(self, sample: Tensor, condition: Any) -> Tensor:
        """(B,), with gradient to the sample."""

    # The defaults

    @classmethod
    def evaluators(cls, options: Any) -> dict[str, float]:
        """`held_out`, and the evaluators that these flags add."""
        return cls.held_out

    def reward_and_terms(self, sample: Tensor, condition: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """`reward`, and the terms (B,) of a reward that is a sum; step_metric_names names them, too."""
        return self.reward(sample, condition), {}

    def evaluate_held_out(self, samples: Tensor, condition: Any) -> dict[str, float]:
        """The evaluators of `held_out`, and others if you like, of samples under their prompts."""
        return {}

    @classmethod
    def defaults(cls, reward: str | None) -> dict[str, Any]:
        """Fields of Config and Hyper that this task sets differently, given the flag --reward."""
        return {}

    def contents(self) -> dict[str, str]:
        """A digest of each file that the task reads, by name; a resumed run must find them unchanged."""
        return {}

    def inputs(self, condition: Any) -> Any:
        """What velocity_of reads for these prompts, such as their embeddings; the prompts themselves."""
        return condition

    def velocity(self, condition: Any) -> Velocity:
        """v_theta under these prompts, with gradient to the model."""
        reshard(self.model)
        return self.velocity_of(self.model, self.inputs(condition))

    def velocity_and_reference(self, condition: Any) -> tuple[Velocity, Velocity]:
        """v_theta as above, and v_ref, the velocity of the pre-trained model, which gets no gradient."""
        reshard(self.model)
        inputs = self.inputs(condition)
        return self.velocity_of(self.model, inputs), self.velocity_of(self.reference, inputs)

    def keep_reference(self) -> None:
        """Keeps the pre-trained model as `reference`; called before parallelize, with --beta."""
        self.reference = copy.deepcopy(self.model).requires_grad_(False)

    def parallelize(self, mesh: DeviceMesh | None) -> None:
        """Moves the model to its device and shards it over the mesh (FSDP2); without a mesh there is one process."""
        self.model.to(self.device)
        if isinstance(self.reference, nn.Module):
            self.reference.to(self.device)
        if mesh is not None:
            self.model.register_forward_hook(lambda model, inputs, v: v.clone())  # FSDP2 cannot hook a view
            # Reshard after each forward: an evaluation has no backward that does it before the weights are swapped.
            fully_shard(self.model, mesh=mesh, reshard_after_forward=True)

    def decode(self, x_0: Tensor) -> Tensor:
        """The sample that the reward scores, with gradient to x_0 (B, *S); the state itself."""
        return x_0

    def step_metrics(self, sample: Tensor) -> dict[str, float]:
        """What a decoded sample adds to a row of metrics.csv."""
        return {}

    def evaluate(self, folder: Path | None, iteration: int) -> dict[str, float]:
        """`reward` and evaluate_held_out, always on the same noise and prompts.

        Every rank calls it.  Rank 0 passes the run's folder, where the task may write what its figures need; the
        others pass None.  A tracker shows samples/ITERATION.png, six digits, if the task writes it.
        """
        generator, n = Generator().manual_seed(EVALUATION_SEED), self.evaluation_samples
        x_T, condition = self.noise(n, generator), self.sample_conditions(n, generator)
        samples = self.decode(rollout(self.velocity(condition), x_T.to(self.device), self.times)[0])
        with torch.no_grad():
            reward = self.reward(samples, condition)
        require(torch.is_tensor(reward), f"a reward of type {type(reward).__name__} must be a tensor (B,) = ({n},)")
        return {"reward": reward.mean().item(), **self.evaluate_held_out(samples, condition)}

    def draw_figures(self, folder: Path) -> None:
        """Draws figures of a finished run beside curves.png; rank 0 calls it."""
        return

    def save(self, folder: Path) -> None:
        """Writes the model into the run's folder; every rank calls it, rank 0 writes."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        if weights := get_model_state_dict(self.model, options=options):  # empty on all ranks but the first
            with atomic_file(folder / WEIGHTS) as temporary:
                save_file({name: value.contiguous() for name, value in weights.items()}, temporary)

    def load(self, folder: Path) -> None:
        """Reads what `save` wrote."""
        self.model.load_state_dict(load_file(folder / WEIGHTS))


def check_task_class(name: str, task_class: type) -> None:
    """Refuses a class that is no complete Task, before anything is built."""
    known = isinstance(task_class, type) and issubclass(task_class, Task)
    require(known, f"task {name}: {task_class!r:.60} must inherit from Task in runtime/task.py")
    missing = ", ".join(sorted(task_class.__abstractmethods__))
    require(not missing, f"task {name} lacks {missing}: see the class Task in runtime/task.py")


def check_task(name: str, task: Task) -> None:
    """Refuses a task that was built without model or times."""
    missing = ", ".join(member for member in ("model", "times") if not hasattr(task, member))
    require(not missing, f"task {name} lacks {missing}: see the class Task in runtime/task.py")


def trained_parameters(name: str, model: nn.Module) -> list[nn.Parameter]:
    """What the optimizer updates; refuses a model that cannot be trained, or that is not sharded over the ranks."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters or any(p.dtype.itemsize < 4 for p in parameters):
        raise RaisedOnAllRanks("trained parameters must exist and be float32: bfloat16 loses steps of 1e-5")
    if world_size() > 1 and not all(isinstance(p, DTensor) for p in parameters):
        remedy = "its parallelize(mesh) must call fully_shard(model, mesh=mesh), or every rank trains its own model"
        raise RaisedOnAllRanks(f"task {name} has trained parameters that are not sharded: {remedy}")
    return parameters


def check_gradient(name: str, member: str, result: Tensor) -> Tensor:
    """The result of a task's member unchanged, if it has gradient."""
    if not torch.is_tensor(result) or not result.requires_grad:
        remedy = "look for no_grad or detach in it, and for weights that do not require grad"
        raise BadInput(f"task {name}: {member} must give a tensor with gradient: {remedy}")
    return result


def check_step_metrics(name: str, task: Task, values: dict[str, float]) -> dict[str, float]:
    """What a task's step_metrics returned, if it has exactly the entries of step_metric_names."""
    names = list(task.step_metric_names)
    if values.keys() != set(names):
        raise BadInput(f"task {name}: step_metrics gave {list(values)}, but step_metric_names are {names}")
    return values


def check_evaluation(name: str, task: Task, values: dict[str, float], iteration: int) -> None:
    """Refuses what a task's evaluate() returned unless it is finite numbers by name: `reward`, and all of held_out."""
    expected = ["reward", *task.held_out]
    is_dict = isinstance(values, dict) and all(isinstance(value, int | float) for value in values.values())
    require(is_dict, f"task {name}: evaluate must return a dict of numbers, {', '.join(expected)} among them")
    missing = ", ".join(key for key in expected if key not in values)
    require(not missing, f"task {name}: evaluate returns no {missing}: give `reward` and all of held_out")
    if broken := [name for name, value in values.items() if not math.isfinite(value)]:
        remedy = "start again with a lower --lr" if iteration else "check the reward and the task's flags"
        raise RaisedOnAllRanks(f"{', '.join(broken)} not finite at iteration {iteration}: {remedy}")
