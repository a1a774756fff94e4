"""Peak host memory of a checkpoint, of its loading and of the export, above the live tensors:

    torchrun --nproc_per_node=2 -m tests.host_memory FOLDER --blocks 8

A process per shard of a random FLUX transformer on the CPU; prints a JSON object with each phase's largest peak over
the processes, in bytes.  Linux only.
"""

import argparse
import json
from pathlib import Path

import torch
import torch.distributed as dist

from full_scale import transformer
from full_scale.pipeline import FAMILIES
from runtime.checkpoint import LOGS, Progress, load_checkpoint, save_checkpoint
from runtime.ema import EMA
from runtime.processes import all_gather, barrier, device_mesh, rank

WIDTH = {
    "attention_head_dim": 128,
    "num_attention_heads": 16,
    "joint_attention_dim": 64,
    "axes_dims_rope": (16, 56, 56),
}


def status(name):
    """VmRSS or VmHWM of this process, in bytes: what it holds now, and its peak."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return 1024 * int(line.split()[1])


def peak(action):
    """The most that an action holds above what the process holds before it; the largest of all processes."""
    barrier()
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far no longer counts
    before = status("VmRSS")
    action()
    return max(all_gather(status("VmHWM") - before))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--blocks", type=int, default=8)
    arguments = parser.parse_args()
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    family, folder, generator = FAMILIES["flux"], arguments.folder, torch.Generator()
    with torch.device("meta"):
        config = {"num_layers": 1, "num_single_layers": arguments.blocks, **WIDTH}
        empty, model = (family.transformer_class(**config) for _ in range(2))
    transformer.shard(model, device_mesh("cpu"), torch.float32)
    model.to_empty(device="cpu")
    parameters = list(model.parameters())
    optimizer, ema = torch.optim.AdamW(parameters, fused=True), EMA(parameters, 0.5)
    for number, parameter in enumerate(parameters):
        torch.nn.init.normal_(parameter.to_local(), generator=generator.manual_seed(number))
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    if rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("config.json", *LOGS):
            (folder / name).touch()
    state = model, optimizer, ema, generator
    result = {
        "weights": sum(p.numel() * p.itemsize for p in parameters),
        "save": peak(lambda: save_checkpoint(folder, *state, Progress(1), limit=1)),
        "load": peak(lambda: load_checkpoint(folder, *state, iterations=1)),
        "export": peak(lambda: transformer.save(model, folder, family, empty, torch.bfloat16)),
    }
    result["files"] = {str(f.relative_to(folder)): f.stat().st_size for f in sorted(folder.rglob("*.safetensors"))}
    if rank() == 0:
        print(json.dumps(result), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
