"""Exact counters of what a computation costs: floating-point operations, and bytes saved for backward."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def flop_count(action: Callable[[], object]) -> int:
    """Floating-point operations of action(): matrix products and convolutions, a multiply-add counts as two.

    Attention counts as its matrix products.
    """
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
