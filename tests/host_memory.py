"""Peak host memory of a checkpoint, of its loading and of the export, above the live tensors:

    torchrun --nproc_per_node=2 -m tests.host_memory FOLDER --blocks 3

A random FLUX transformer, sharded over processes on the CPU.  Prints a JSON object: the bytes of the weights, of what a
checkpoint should take on the disk, of each file, and for save, load and export the largest peak of any process; also
the bytes of a T5, and those of them that a process which has loaded it does not share with the file.  Linux only.
"""

import argparse
import json
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import T5Config, T5EncoderModel

from full_scale import transformer
from full_scale.components import load_component
from full_scale.models import FAMILIES
from runtime import checkpoint
from runtime.checkpoint import LOGS, Progress
from runtime.ema import EMA
from runtime.processes import all_gather, barrier, device_mesh, rank

WIDTH = dict(attention_head_dim=128, num_attention_heads=16, joint_attention_dim=64, axes_dims_rope=(16, 56, 56))


def status(name):
    """In bytes, of this process: VmRSS, what it holds; VmHWM, its peak; RssAnon, what it holds that no file does."""
    return 1024 * int(Path("/proc/self/status").read_text().partition(f"{name}:")[2].split()[0])


def peak(action):
    """The most that an action holds above what the process holds before it; the largest of all processes."""
    barrier()
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far no longer counts
    before = status("VmRSS")
    action()
    return max(all_gather(status("VmHWM") - before))


def text_encoder(folder):
    """Bytes of a T5 in bfloat16, and how much of them a process holds for itself after it has loaded and used it."""
    config = T5Config(d_model=1024, d_ff=4096, num_layers=8, num_heads=16, feed_forward_proj="gated-gelu")
    with torch.device("meta"):
        model = T5EncoderModel(config)
    model.to(torch.bfloat16).to_empty(device="cpu")
    model.tie_weights()
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)  # what memory holds may be NaN, which is refused
    model.save_pretrained(folder)
    before = status("RssAnon")
    model = load_component(folder, T5EncoderModel, torch.bfloat16)
    model(torch.zeros(1, 8, dtype=torch.long))
    return sum(p.nbytes for p in model.parameters()), status("RssAnon") - before


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--blocks", type=int, default=3, help="three have 1.4 GB of weights")
    parser.add_argument("--file-bytes", type=int, help="limit of a file; those of a real run if not given")
    arguments = parser.parse_args()
    if arguments.file_bytes:
        checkpoint.FILE_BYTES = transformer.EXPORT_FILE_BYTES = arguments.file_bytes
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    family, folder, generator = FAMILIES["flux"], arguments.folder, torch.Generator()
    config = {"num_layers": 1, "num_single_layers": arguments.blocks, **WIDTH}
    with torch.device("meta"):
        empty, model = (family.transformer_class(**config) for _ in range(2))
    transformer.shard(model, device_mesh("cpu"), torch.float32, reshard_after_forward=True)
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
            (folder / name).write_text("{}")
    state = checkpoint.TrainingState(model, optimizer, ema, generator)
    result = {
        "weights": sum(p.numel() * p.itemsize for p in parameters),
        "checkpoint": checkpoint.checkpoint_bytes(parameters),
        "save": peak(lambda: checkpoint.Checkpoints(folder, state, 1).save(Progress(1))),
        "load": peak(lambda: checkpoint.load_checkpoint(folder, state, iterations=1)),
        "export": peak(lambda: transformer.export_transformer(model, empty, torch.bfloat16, folder / "transformer")),
    }
    result["files"] = {str(f.relative_to(folder)): f.stat().st_size for f in sorted(folder.rglob("*.safetensors"))}
    if rank() == 0:
        result["text_encoder"], result["text_encoder_private"] = text_encoder(folder / "text_encoder")
        print(json.dumps(result), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
