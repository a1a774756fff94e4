"""The transformer of a diffusers pipeline: build, shard (FSDP2), load, export; all weights or LoRA adapters."""

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from fnmatch import fnmatchcase
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from full_scale.components import (
    MAIN_FILES,
    REMEDY,
    check_finite,
    check_format,
    loading,
    read_config,
    weight_files,
    weight_shapes,
)
from full_scale.pipeline import Family
from leap_align import BadInput, require
from runtime.files import atomic_folder, disk_remedy, write_errors_named, write_json
from runtime.processes import (
    free_host_memory,
    full_value,
    one_line,
    rank,
    reshard,
    run_on_all_ranks,
    run_on_rank0,
    world_size,
)

EXPORT_FILE_BYTES = 2 * 10**9  # the most in a file of an export, unless a weight is larger; rank 0 holds one file
NF4_BLOCKS = 64, 16  # weights that share a scale, scales that share one: their product divides the size of every layer


# ------------------------------------------------------- Build -------------------------------------------------------
def empty_transformer(family: Family, folder: Path) -> nn.Module:
    """The transformer of the pipeline in a folder, on the meta device: architecture without memory."""
    kind, path = family.transformer_class, folder / "transformer" / "config.json"
    config = read_config(path.parent)
    with loading(f"{path} does not describe a {kind.__name__}"), torch.device("meta"):
        return kind.from_config(config).eval()


def check_lora(lora_rank: int, lora_alpha: float | None) -> None:
    """Refuses a rank or a scale of adapters that cannot work.  Rank 0: no adapters."""
    require(lora_rank >= 0, f"lora_rank={lora_rank} must be at least 0")
    if lora_alpha is not None:
        require(lora_rank, f"lora_alpha={lora_alpha} scales adapters, but there are none: give --lora-rank, too")
        require(0 < lora_alpha < math.inf, f"lora_alpha={lora_alpha} must be positive and finite")


def check_start(lora: Path | None, start: Path | None, lora_rank: int = 0) -> None:
    """Refuses paths to no adapters or transformer, names those of a run, and a transformer that would stay frozen."""
    for name, path in {"lora": lora, "transformer": start}.items():
        if path is None:
            continue
        fault = "does not exist" if not path.exists() else "is a file" if name != "lora" and path.is_file() else ""
        require(not fault, f"{name}={path} {fault}: give the folder {name}/ of a run")
        if path.is_dir() and not any(path.glob("*.safetensors")):
            check_format(path)
            known = [own for place in ("exports/*", "*", ".") for own in sorted(path.glob(f"{place}/{name}"))]
            raise BadInput(f"{name}={path} holds no weights: give {[f'the folder {name}/ of a run', *known][-1]}")
    remedy = "leave out --lora-rank, or put it into a pipeline for --model"
    require(start is None or not lora_rank, f"transformer={start} would stay frozen under LoRA: {remedy}")


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The layers of a model without adapters that may get one, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def chosen_layers(target: str, layers: Iterable[str]) -> set[str]:
    """The layers whose names end in one of --lora-targets, where * is any part of a name."""
    return {name for name in layers if fnmatchcase(f".{name}", f"*.{target}")}


def add_lora(
    model: nn.Module, lora_rank: int, lora_alpha: float | None, targets: Sequence[str], dtype: torch.dtype
) -> None:
    """Freezes the model in dtype and adds float32 adapters, W x + alpha / rank B A x, to some of its linear layers.

    lora_alpha: None for the rank.  targets: as in `chosen_layers`.
    """
    from peft import LoraConfig

    require(targets, "lora_targets is empty: name at least one linear layer")
    layers, chosen = linear_layers(model), set()
    for target in targets:
        matches = chosen_layers(target, layers)
        require(matches, f"lora_targets: no linear layer of {type(model).__name__} is called {target!r}")
        chosen.update(matches)
    width = min(min(layers[name].weight.shape) for name in chosen)
    too_large = f"lora_rank={lora_rank} must be at most {width}, the width of the narrowest target layer"
    require(lora_rank <= width, too_large)
    nn.Module.to(model.requires_grad_(False), dtype)  # diffusers' own `to` prints a warning that concerns other models
    model.add_adapter(LoraConfig(r=lora_rank, lora_alpha=lora_alpha or lora_rank, target_modules=sorted(chosen)))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def check_4bit(lora_rank: int, compiled: bool, cpu_offload: bool) -> None:
    """Refuses four-bit weights that would be trained, compiled or sharded, or that no library can make."""
    require(lora_rank, "load_in_4bit keeps frozen weights, but every weight is trained: give --lora-rank, too")
    require(not compiled, "load_in_4bit: torch cannot compile these weights: leave out --compile")
    require(not cpu_offload, "load_in_4bit keeps its weights on the GPU: leave out --cpu-offload")
    require(world_size() == 1, "load_in_4bit does not shard the weights: start one process, or leave it out")
    require(find_spec("torchao"), "load_in_4bit needs torchao: pip install torchao==0.18.0")


def quantize(model: nn.Module, device: torch.device) -> None:
    """Gives the frozen linear weights of the blocks four bits (NF4); whatever is loaded into them is then rounded.

    The gradient through a layer is that of its rounded weight.  No weight has its value yet.
    """
    from torchao.quantization import to_nf4

    for layer in [layer for block in repeated_blocks(model) for layer in block.modules()]:
        if isinstance(layer, nn.Linear) and not layer.weight.requires_grad:
            weight = torch.empty_like(layer.weight, device=device)  # torchao cannot quantise on the meta device
            layer.weight = nn.Parameter(to_nf4(weight, *NF4_BLOCKS), requires_grad=False)


def freeze(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model with every weight frozen and in dtype; buffers, such as SD3's position table, stay as they are."""
    for parameter in model.requires_grad_(False).parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def without_lora(model: nn.Module) -> Callable[..., Any]:
    """A function that runs the model with its adapters scaled to zero: the pre-trained model, without a second one."""
    from peft.helpers import rescale_adapter_scale

    def run(*inputs: Any, **named_inputs: Any) -> Any:
        with rescale_adapter_scale(model, 0):
            return model(*inputs, **named_inputs)

    return run


def has_lora(model: nn.Module) -> bool:
    """Whether adapters are trained, and nothing else."""
    return hasattr(model, "peft_config")


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The transformer's blocks, which diffusers never splits over devices; FSDP2's subclasses of them count."""
    names = set(model._no_split_modules)  # `_repeated_blocks` is empty for SD3
    return [module for module in model.modules() if names & {kind.__name__ for kind in type(module).__mro__}]


Checkpointing = Literal["on", "selective", "off"]


def set_checkpointing(model: nn.Module, mode: Checkpointing) -> None:
    """Which blocks the backward recomputes instead of keeping their activations: all, every second one, or none."""
    if mode == "off":
        return
    model.enable_gradient_checkpointing()
    checkpoint, kept = model._gradient_checkpointing_func, set(repeated_blocks(model)[1::2])

    def selective(block: nn.Module, *inputs: Any) -> Any:
        return block(*inputs) if block in kept else checkpoint(block, *inputs)

    if mode == "selective":
        model._gradient_checkpointing_func = selective


# ------------------------------------------------------- Shard -------------------------------------------------------
def check_memory(
    model: nn.Module,
    frozen: Sequence[nn.Module],
    device: torch.device,
    shards: int,
    in_4bit: bool = False,
    gathered: int = 0,
) -> None:
    """Refuses a GPU, or a computer without one, on which not even weights and optimizer fit.

    A trained parameter needs five times its size: float32 weight, gradient, two moments and average.
    model: on the meta device, to be divided by `shards`.  frozen: modules that every process holds in full.
    in_4bit: whether `quantize` will follow.  gathered: bytes of weights that stay gathered beside their shards.
    """
    moved = [p for module in frozen for p in module.parameters() if p.device.type != device.type]
    needed = gathered + sum(p.nbytes for p in moved)
    for p in model.parameters():
        needed += (5 * p.nbytes if p.requires_grad else p.numel() / 2 if in_4bit else p.nbytes) / shards
    free = _free_memory(device)
    on_cpu = "process on the CPU", "leave out --cpu-offload" if torch.cuda.is_available() else "use GPUs"
    where, remedy = ("GPU", "use more GPUs") if device.type == "cuda" else on_cpu
    fault = f"weights and optimizer need {needed / 2**30:.0f} GiB for each {where}, {free / 2**30:.0f} are free"
    remedy += ", --reshard-after-forward" if gathered else ""
    remedy += ", --lora-rank 64, or prompts from `python -m full_scale embed`, which need no text encoders"
    require(needed <= free, f"{fault}: {remedy}")


def _free_memory(device: torch.device) -> float:
    """Bytes that this process can still allocate."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_host_memory()


def shard(
    model: nn.Module, mesh: DeviceMesh, dtype: torch.dtype, reshard_after_forward: bool, cpu_offload: bool = False
) -> None:
    """Shards the model over the mesh (FSDP2), a block at a time; it computes in dtype, gradients stay float32.

    Unless reshard_after_forward, the weights are gathered by the first forward after a `reshard`, and stay so.
    cpu_offload: the shards, and so gradients and optimizer, are in host memory; buffers stay where the model computes.
    """
    # Blocks return views of one joint sequence; torch warns about in-place writes, which never happen.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)
    # The task casts the inputs: casting all of them would round SD3's times and the RoPE tables.
    policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    offload = CPUOffloadPolicy(torch.cuda.is_available()) if cpu_offload else OffloadPolicy()  # pinned for a GPU
    # On one rank nothing is sharded: frozen weights are used in place, and copies cast to dtype stay until a backward
    # or `reshard`.
    sharded = mesh.size() > 1 or cpu_offload
    reshards = sharded and reshard_after_forward
    in_place = set() if sharded else {p for p in model.parameters() if not p.requires_grad}
    settings = {"mesh": mesh, "mp_policy": policy, "offload_policy": offload, "reshard_after_forward": reshards}
    for module in [*repeated_blocks(model), model]:
        fully_shard(module, ignored_params=in_place, **settings)
    model.set_reshard_after_backward(reshards or not sharded)


# --------------------------------------------------- Load and save ---------------------------------------------------
def lora_scale(model: nn.Module) -> float:
    """alpha / rank, by which adapters are multiplied."""
    config = model.peft_config["default"]
    return config.lora_alpha / config.r


def scale_b(layers: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """The adapters with every B times scale."""
    return {name: value * scale if ".lora_B." in name else value for name, value in layers.items()}


def load_weights(model: nn.Module, folder: Path) -> None:
    """Loads a `transformer/` folder of safetensors; each rank reads its own shards.  LoRA adapters stay."""
    state = model.state_dict()
    state = {name.replace(".base_layer", ""): value for name, value in state.items() if ".lora_" not in name}
    run_on_all_ranks(lambda: check_weights(state, folder))
    reader = HuggingFaceStorageReader(folder)
    reader.fs.ls = lambda _: [str(file) for file in weight_files(folder)]  # it would read every file of the folder
    try:
        dcp.load(state, storage_reader=reader)
    except dcp.CheckpointException as error:
        causes = [cause for cause, _ in error.failures.values()]
        raise BadInput(f"cannot load the weights in {folder} ({one_line(causes[0])}): {REMEDY}") from causes[0]
    run_on_all_ranks(lambda: check_finite(state, folder))


def check_weights(state: dict[str, Tensor], folder: Path) -> None:
    """Refuses a folder of safetensors that is damaged, or holds other weights than the state dict."""
    expected, found = {name: tuple(value.shape) for name, value in state.items()}, weight_shapes(folder)
    names = sorted(expected.keys() | found.keys(), key=lambda name: (name in found, name))  # missing ones first
    for name in names:
        shape, other = (shapes.get(name, "absent") for shapes in (found, expected))
        difference = f"{name} is {shape}, but {other} in the model of its config.json"
        require(shape == other, f"{folder} holds the weights of another model, or not all ({difference}): {REMEDY}")


def reset_lora(model: nn.Module) -> None:
    """New adapters, equal on every rank: A as peft draws it, B zero, so that the model does not change yet.

    A model without adapters does not change.
    """
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.zeros(p.shape) for name, p in model.named_parameters() if ".lora_" in name}
    for name in state:
        if ".lora_A." in name:
            nn.init.kaiming_uniform_(state[name], a=5**0.5, generator=generator)
    if state:
        set_lora(model, state)


def set_lora(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Copies whole tensors, the same on every rank, into the adapters; all adapters must be named."""
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    require(state.keys() == names, f"adapters for {len(state)} layers do not fit the model's {len(names)}")
    reshard(model)
    set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True, strict=False))


def export(model: nn.Module, family: Family, empty: nn.Module, dtype: torch.dtype, folder: Path) -> None:
    """Writes `transformer/` or `lora/` into the folder, as diffusers reads them; every rank calls it."""
    path = folder / ("lora" if has_lora(model) else "transformer")
    with ExitStack() as stack:
        context = atomic_folder(path) if rank() == 0 else nullcontext(path)
        temporary = run_on_all_ranks(lambda: stack.enter_context(context))
        if has_lora(model):
            export_lora(model, family, temporary)
        else:
            export_transformer(model, empty, dtype, temporary)


def export_lora(model: nn.Module, family: Family, folder: Path) -> None:
    """Writes adapters as the pipeline's load_lora_weights reads them; every rank calls it, rank 0 writes.

    B holds alpha / rank, and alpha is the rank: a loader that ignores alpha is right, too.
    """
    from peft import get_peft_model_state_dict

    state_options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    trained = get_model_state_dict(model, options=state_options)  # on the CPU of rank 0, empty on the others
    if rank() == 0:
        layers = scale_b(get_peft_model_state_dict(model, state_dict=trained), lora_scale(model))
        metadata = model.peft_config["default"].to_dict() | {"lora_alpha": model.peft_config["default"].r}
        family.pipeline_class.save_lora_weights(folder, layers, transformer_lora_adapter_metadata=metadata)


def export_transformer(model: nn.Module, empty: nn.Module, dtype: torch.dtype, folder: Path) -> None:
    """Writes a transformer as its class's from_pretrained reads it; every rank calls it, rank 0 writes.

    empty: the same transformer on the meta device.  dtype: that of the computation, because rounding the weights now
    or at every use gives the same images.  One full weight at a time is on the device, one file's weights on rank 0's
    host.
    """
    files, state = export_files(empty, dtype), model.state_dict()
    run_on_rank0(lambda: empty.save_config(folder))
    for file, names in files.filename_to_tensors.items():
        weights = {}
        for name in names:
            weight = full_value(state[name].to(dtype))
            weights |= {name: weight.cpu()} if rank() == 0 else {}
        run_on_rank0(partial(_write_weights, weights, folder / file))
    if files.is_sharded:
        index = {"metadata": files.metadata, "weight_map": files.tensor_to_filename}
        run_on_rank0(lambda: write_json(folder / f"{MAIN_FILES['diffusers']}.index.json", index))


def _write_weights(weights: dict[str, Tensor], path: Path) -> None:
    try:
        with write_errors_named(path):
            save_file(weights, path, metadata={"format": "pt"})
    except OSError as error:
        remedy = f"{disk_remedy(one_line(error))}, then continue with --resume"
        raise BadInput(f"cannot write {path} ({one_line(error)}): {remedy}") from error


def export_files(empty: nn.Module, dtype: torch.dtype) -> Any:
    """Which weights an export of this transformer writes into which file, a StateDictSplit of huggingface_hub.

    metadata["total_size"]: their bytes.  empty: on the meta device.
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    weights = {name: value.to(dtype) for name, value in empty.state_dict().items()}
    pattern = MAIN_FILES["diffusers"].replace(".safetensors", "{suffix}.safetensors")
    return split_torch_state_dict_into_shards(weights, max_shard_size=EXPORT_FILE_BYTES, filename_pattern=pattern)
