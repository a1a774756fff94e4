"""A full-size run without weights, memory or GPUs: the run's own code on tensors that have only shapes.

Fake tensors (torch.FakeTensor) know their shape, dtype and storage's size, and compute nothing.  A fake process group
answers at once for all ranks.  So the real adapter, trainer and reward execute every operation of one rank.
"""

import os
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.profiler import record_function
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._pytree import tree_leaves

from full_scale.components import network_from_config
from full_scale.pipeline import config_alone
from full_scale.rewards.hpsv2 import HPSv2
from leap_align import Velocity
from runtime.cost_counter import HOST, CostCounter
from runtime.files import read_json

aten = torch.ops.aten
FACTORIES = {
    aten.empty.memory_format, aten.empty_strided.default, aten.zeros.default, aten.ones.default, aten.full.default,
    aten.rand.default, aten.randn.default, aten.randn.generator,
}  # fmt: skip
SIMULATED_REWARD = "hpsv2.1"
STAND_IN = 0.5  # the value of every number that the code reads from a fake tensor


class Simulation(CostCounter):
    """Counts costs, and executes every operation with a fake tensor or a new one without computing it."""

    def __init__(self, phases: Collection[str] = (), ranks_per_node: int = 1) -> None:
        super().__init__(phases, ranks_per_node)
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)

    def execute(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """Runs the operation, on shapes alone where it must."""
        is_fake = any(isinstance(leaf, FakeTensor) for leaf in tree_leaves((args, kwargs)))
        if func is aten._local_scalar_dense.default and is_fake:
            return STAND_IN if args[0].is_floating_point() else 1
        # New tensors of integers are real: the code reads indices and messages between ranks.
        is_new = func in FACTORIES and (kwargs.get("dtype") or torch.float32).is_floating_point
        is_new |= func is aten.empty_like.default and args[0].is_meta
        if is_fake or is_new:
            with self.fake:
                return func(*args, **kwargs)
        return func(*args, **kwargs)

    def empty(self, network: nn.Module, dtype: torch.dtype) -> nn.Module:
        """A network from the meta device with fake weights of this dtype."""
        with self:
            network.to(dtype).to_empty(device="cpu").eval()
        if hasattr(network, "tie_weights"):
            network.tie_weights()  # to_empty gave every use of a weight its own
        network._apply = lambda *_: network  # torch cannot move fake weights, and they are everywhere
        return network


@contextmanager
def counted_host_copies(simulation: Simulation) -> Iterator[None]:
    """Counts what FSDP2 copies between GPU and host memory, which are one device here: shards of weights, gradients."""
    plain = Tensor.to

    def to(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if "non_blocking" in kwargs:
            simulation.label(HOST, [tensor])
            simulation.phases[simulation.phase].add(0, 0, 0, tensor.nbytes)
        return plain(tensor, *args, **kwargs)

    with patch.object(Tensor, "to", to):
        yield


@contextmanager
def simulated_cluster(nodes: int, gpus: int) -> Iterator[None]:
    """A process group of nodes x gpus ranks, of which this process is rank 0."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=nodes * gpus)
    try:
        with patch.dict(os.environ, {"LOCAL_WORLD_SIZE": str(gpus)}):
            yield
    finally:
        dist.destroy_process_group()


class WithoutWeights:
    """What a simulated task does instead of reading files; `simulated` puts it in front of the task's own class."""

    configs: ClassVar[dict[str, dict[str, Any]]]
    simulation: ClassVar[Simulation]
    stored_embeddings: ClassVar[bool]

    @classmethod
    def choose_device(cls) -> torch.device:
        """The CPU, where fake tensors are."""
        return torch.device("cpu")

    def load_reward(self) -> nn.Module:
        """HPSv2.1 with the shapes of its weights, or of those in a local folder."""
        folders = [Path(path) for path in self.options.reward_weights if Path(path).is_dir()]
        return self.simulation.empty(HPSv2.empty(*folders[:1]), torch.float32)

    def load_evaluators(self) -> nn.ModuleList:
        """None: in training they are in host memory."""
        return nn.ModuleList()

    def open_pipeline(self, text: bool) -> Any:
        """The pipeline, whose tokenizers know few words; without text encoders if embeddings are stored."""
        import diffusers

        text, kind, empty = not self.stored_embeddings, self.family.pipeline_class, self.simulation.empty
        components: dict[str, Any] = dict.fromkeys(kind.__init__.__annotations__)
        components["scheduler"] = diffusers.FlowMatchEulerDiscreteScheduler.from_config(self.configs["scheduler"])
        names = [name for name in self.configs if name == "vae" or (text and name.startswith("text_encoder"))]
        components |= {name: empty(network_from_config(self.configs[name]), self.dtype) for name in names}
        tokenizers = self.family.tiny().components.items() if text else ()
        opened = kind(**components | {name: part for name, part in tokenizers if name.startswith("tokenizer")})
        opened.transformer = config_alone(self.configs["transformer"])
        return opened

    def empty_transformer(self) -> nn.Module:
        """The architecture, on the meta device."""
        return network_from_config(self.configs["transformer"]).eval()

    def check_memory(self, shards: int) -> None:
        """Nothing: a simulated weight takes no memory."""

    def quantize(self, model: nn.Module) -> None:
        """The task's own, on shapes alone, integers included."""
        with self.simulation.fake:
            super().quantize(model)

    def load_pretrained(self, model: nn.Module) -> None:
        """Nothing: a simulated weight has no value."""

    def encode(self, prompts: list[str]) -> dict[str, Tensor]:
        """The text inputs, computed or as if read from files."""
        if not self.stored_embeddings:
            return super().encode(prompts)
        shapes = self.family.text_shapes(self.configs["transformer"], self.options.max_sequence_length)
        with self.simulation.fake:
            return {name: torch.empty(len(prompts), *shape, dtype=self.dtype) for name, shape in shapes.items()}

    def velocity_of(self, model: Any, inputs: dict[str, Any]) -> Velocity:
        """The task's own, but equal evaluations without gradient are executed once."""
        return Repeated(super().velocity_of(model, inputs), self.simulation)


class Repeated:
    """A velocity that executes two evaluations without gradient, and counts the second's cost for each further one.

    The first may differ: it gathers or casts the weights.
    """

    def __init__(self, velocity: Velocity, simulation: Simulation) -> None:
        self.velocity, self.simulation, self.calls, self.cost = velocity, simulation, 0, Counter()

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            with record_function("leaps"):
                return self.velocity(x, t)
        with record_function("rollout"):
            self.calls += 1
            phase = self.simulation.phases[self.simulation.phase]
            if self.calls > 2:
                phase.pieces.update(self.cost)
                return torch.empty_like(x)
            before = phase.counted()
            v = self.velocity(x, t)
            self.cost = phase.counted() - before
            return v


def simulated(kind: type, model: str, simulation: Simulation, stored_embeddings: bool) -> type:
    """The class of a task whose networks have shapes alone; it reads no file but its prompts, and a model's configs.

    model: a local pipeline's folder; the configs of any other model are those that its authors publish.
    """
    configs, folder = kind.family.configs, Path(model)
    if (folder / "model_index.json").is_file():
        files = dict.fromkeys(configs, "config.json") | {"scheduler": "scheduler_config.json"}
        index = read_json(folder / "model_index.json")  # may say that a text encoder is left out
        files = {name: file for name, file in files.items() if index.get(name) != [None, None]}
        configs = {name: read_json(folder / name / file) for name, file in files.items()}
    members = {"configs": configs, "simulation": simulation}
    return type(kind.__name__, (WithoutWeights, kind), members | {"stored_embeddings": stored_embeddings})
