"""What a computation costs: its operations, the bytes it saves, and a step phase by phase, with its traffic."""

import sys
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from itertools import islice
from traceback import walk_stack
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_flop_count

aten = torch.ops.aten
HOST = "host memory"  # the kind of a storage that takes no GPU memory


def flop_count(action: Callable[[], object]) -> int:
    """Floating-point operations of action(): matrix products and convolutions; a multiply-add counts as two."""
    # FlopCounterMode does not know every fused attention kernel, so attention runs as plain matrix products.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        action()
    return counter.get_total_flops()


def saved_bytes(action: Callable[[], object], model: nn.Module | None = None) -> int:
    """Bytes that autograd saves for backward during action(), each storage once.

    Weights do not count: leaves that require grad, views of such leaves, and all parameters and buffers of the model.
    """
    weights = [*model.parameters(), *model.buffers()] if model else []
    weights = [weight.to_local() if isinstance(weight, DTensor) else weight for weight in weights]
    weight_pointers = {weight.untyped_storage().data_ptr() for weight in weights}
    # This keeps the storages alive.  Otherwise a new one could take a freed one's address, and both would count once.
    saved = {}

    def pack(tensor: Tensor) -> Tensor:
        base = tensor if tensor._base is None else tensor._base
        is_weight = base.is_leaf and base.requires_grad
        storage = tensor.untyped_storage()
        if not is_weight and storage.data_ptr() not in weight_pointers:
            saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        action()
    return sum(storage.nbytes() for storage in saved.values())


class Piece(NamedTuple):
    """Operations, and what is received meanwhile: FSDP2 gathers a block while the one before it computes."""

    flop: int = 0  # floating-point operations
    within: int = 0  # bytes received from ranks of this node
    between: int = 0  # bytes received from other nodes
    host: int = 0  # bytes copied between GPU and host memory


def total(pieces: Counter[Piece]) -> Piece:
    """The sum of all pieces, each as often as it occurs."""
    return Piece(*(sum(n * piece[i] for piece, n in pieces.items()) for i in range(4)))


@dataclass
class PhaseCost:
    """What one phase of a step costs on this rank."""

    peak: dict[str, int] = field(default_factory=dict)  # bytes alive at the phase's peak, by kind
    pieces: Counter[Piece] = field(default_factory=Counter)
    last: Piece = field(default_factory=Piece)  # not among them yet

    def add(self, *amounts: int) -> None:
        """Adds operations and bytes to the last piece; operations after traffic begin a new one."""
        if amounts[0] and any(self.last[1:]):
            self.counted()
        self.last = Piece(*map(sum, zip(self.last, Piece(*amounts))))

    def counted(self) -> Counter[Piece]:
        """All pieces until now; the next operation begins a new one."""
        if any(self.last):
            self.pieces[self.last] += 1
        self.last = Piece()
        return Counter(self.pieces)


class CostCounter(TorchDispatchMode):
    """Counts what is computed while it is active, on real or on fake tensors.

    phases: names of `record_function` ranges; the outermost one is the current phase, outside of them it is "".
    ranks_per_node: tells traffic within a node from that between nodes.
    A storage's kind is the one that `label` gave it, or "gathered weights" or "gradients" if FSDP2 made it, else
    "activations".  What a kernel allocates for itself (workspaces) is not seen.
    """

    def __init__(self, phases: Collection[str] = (), ranks_per_node: int = 1) -> None:
        super().__init__()
        self.names, self.ranks_per_node, self.gradient_shapes = phases, ranks_per_node, set()
        self.phases: dict[str, PhaseCost] = defaultdict(PhaseCost)
        self.ranges: list[str] = []
        self.sizes: dict[int, int] = {}
        self.kinds: dict[int, str] = {}
        self.alive: dict[str, int] = defaultdict(int)

    def __enter__(self) -> "CostCounter":
        # FSDP2 allocates and frees gathered weights by resizing their storage, which is no dispatched operation.
        self.resize = torch.UntypedStorage.resize_
        torch.UntypedStorage.resize_ = lambda storage, size: self._resize(storage, size)
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        torch.UntypedStorage.resize_ = self.resize
        super().__exit__(*error)

    def label(self, kind: str, tensors: Iterable[Tensor]) -> None:
        """The storages of these tensors are of this kind from now on."""
        for tensor in tensors:
            if is_traceable_wrapper_subclass(tensor) and not isinstance(tensor, DTensor):  # a quantised weight
                self.label(kind, [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]])
                continue
            storage = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).untyped_storage()
            self._track(storage, kind)
            self._set(storage._cdata, kind, 0 if kind == HOST else storage.nbytes())

    @property
    def phase(self) -> str:
        """The phase of the next operation."""
        return next((name for name in self.ranges if name in self.names), "")

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.ops.profiler._record_function_enter_new.default:
            self.ranges.append(args[0])
            self._update_peak()
        elif func is torch.ops.profiler._record_function_exit._RecordFunction:
            self.ranges.pop()
        out = self.execute(func, args, kwargs or {})
        cost = self.phases[self.phase]
        cost.add(flop(func, args, kwargs or {}, out))
        if func.namespace == "c10d":
            self._add_traffic(cost, func, args)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and not is_traceable_wrapper_subclass(tensor):
                self._track(tensor.untyped_storage(), None, func, tensor)
        return out

    def execute(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """Runs the operation."""
        return func(*args, **kwargs)

    # Bytes

    def _track(self, storage: torch.UntypedStorage, kind: str | None, func: Any = None, tensor: Any = None) -> None:
        if (key := storage._cdata) not in self.sizes:
            self.sizes[key], self.kinds[key] = 0, kind or self._kind(func, tensor)
            weakref.finalize(storage, self._forget, key)
            self._set(key, self.kinds[key], storage.nbytes())

    def _forget(self, key: int) -> None:
        self._set(key, self.kinds[key], 0)
        del self.sizes[key], self.kinds[key]

    def _resize(self, storage: torch.UntypedStorage, size: int) -> Any:
        if storage._cdata in self.sizes:
            self._set(storage._cdata, "gathered weights", size)
        return self.resize(storage, size)

    def _set(self, key: int, kind: str, size: int) -> None:
        self.alive[self.kinds[key]] -= self.sizes[key]
        self.alive[kind] += size
        self.kinds[key], self.sizes[key] = kind, size
        self._update_peak()

    def _update_peak(self) -> None:
        cost = self.phases[self.phase]
        if sum(self.alive.values()) > sum(cost.peak.values()):
            cost.peak = dict(self.alive)

    def _kind(self, func: Any, tensor: Tensor) -> str:
        is_buffer = func.namespace == "fsdp" or (func is aten.empty.memory_format and tensor.ndim == 1)
        if is_buffer and (functions := _fsdp_functions()):
            return "gradients" if any("reduce" in name for name in functions) else "gathered weights"
        is_gradient = self.phase == "backward" and tensor.shape in self.gradient_shapes
        return "gradients" if is_gradient else "activations"

    # Traffic

    def _add_traffic(self, cost: PhaseCost, func: Any, args: tuple) -> None:
        """A ring's: all-gather and reduce-scatter move all but the own part of the larger tensor, all-reduce twice."""
        group = next(arg for arg in args if isinstance(arg, torch.ScriptObject))
        ranks = dist.get_process_group_ranks(dist.ProcessGroup.unbox(group))
        largest = max((tensor.nbytes for tensor in tree_leaves(args[:2]) if isinstance(tensor, Tensor)), default=0)
        times = 2 if func is torch.ops.c10d.allreduce_.default else 1
        moved = times * largest * (len(ranks) - 1) // len(ranks)
        is_within = len({rank // self.ranks_per_node for rank in ranks}) == 1
        cost.add(0, *((moved, 0) if is_within else (0, moved)))


def flop(func: Any, args: tuple, kwargs: dict, out: Any) -> int:
    """Floating-point operations of one dispatched operation: matrix products and convolutions, as FlopCounterMode."""
    packet = func._overloadpacket
    if packet in flop_registry:
        return flop_registry[packet](*args, **kwargs, out_val=out)
    if packet is aten._scaled_dot_product_flash_attention_for_cpu:
        return sdpa_flop_count(*(tensor.shape for tensor in args[:3]))
    if packet is aten._scaled_dot_product_flash_attention_for_cpu_backward:
        return 2 * sdpa_flop_count(*(tensor.shape for tensor in args[1:4]))
    return 0


def _fsdp_functions() -> list[str]:
    """The functions of FSDP2 that are running now, innermost first; empty outside of FSDP2's own code."""
    codes = [frame.f_code for frame, _ in islice(walk_stack(sys._getframe(2)), 20)]
    return [code.co_name for code in codes if "_fully_shard" in code.co_filename]
