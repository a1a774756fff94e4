"""full_scale/benchmark.py: its step at a tiny size, its predictions against counts, its table."""

# ruff: noqa: E402 (optional libraries are checked before they are imported)

from functools import partial

import pytest
import torch
from torch import nn

from full_scale.transformer import set_checkpointing
from leap_align import BadInput
from runtime.counters import flop_count
from runtime.run_dir import read_csv

for library in ("diffusers", "peft", "open_clip"):
    pytest.importorskip(library)

from full_scale import benchmark
from full_scale.architectures import ARCHITECTURES
from full_scale.benchmark import RECOMPUTED_FORWARDS, Case, RandomFlux


class SmallRandomFlux(RandomFlux):
    """Two blocks of each kind."""

    transformer_config = ARCHITECTURES["flux"]["transformer"] | {
        "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 4,
        "joint_attention_dim": 32, "pooled_projection_dim": 32, "axes_dims_rope": (4, 4, 8),
    }  # fmt: skip


@pytest.fixture
def process_group():
    """Destroys the process group that the last case leaves."""
    yield
    torch.distributed.destroy_process_group()


def test_the_step_runs_at_a_tiny_size(tmp_path, process_group):
    benchmark.write_tiny_pipeline(tmp_path)
    rows, counts = [], []
    for checkpointing in RECOMPUTED_FORWARDS:
        case = Case(checkpointing, False, 1, T=2, pixels=32, task_class=SmallRandomFlux)
        counts.append(flop_count(lambda case=case: rows.append(benchmark.measure(case, tmp_path))))
    assert all(row["s"] > 0 for row in rows), rows
    on, selective, off = counts  # selective computes two of four blocks again, one of each kind
    assert off < selective < on and selective - off == pytest.approx((on - off) / 2, rel=0.2)


def test_a_case_that_does_not_fit_says_why(tmp_path, monkeypatch):
    for error, shown in (BadInput("needs 24 GiB"), "needs 24 GiB"), (torch.OutOfMemoryError("..."), "out of memory"):

        def refuse(case, folder, error=error):
            raise error

        monkeypatch.setattr(benchmark, "step_cost", refuse)
        row = benchmark.measure(Case("on", False, 1), tmp_path)
        assert row["GiB"] == shown and row["s"] == ""


def test_a_skipped_step_is_not_measured(tmp_path, monkeypatch):
    class Skipping:
        def step(self):
            return {"skipped": 1.0, "seconds": 1.0}

    monkeypatch.setattr(benchmark, "start_trainer", lambda case, folder: Skipping())
    assert "not finite" in benchmark.measure(Case("on", False, 1), tmp_path)["GiB"]


def test_without_a_gpu_the_benchmark_is_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BadInput, match=r"^[^\n]*no CUDA device[^\n]*$"):
        benchmark.benchmark(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_table_has_a_row_for_each_combination(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(benchmark, "write_tiny_pipeline", lambda folder: None)
    monkeypatch.setattr(benchmark, "measure", lambda case, folder: {"batch": case.batch_size, "GiB": 1.0, **vars(case)})
    benchmark.benchmark(tmp_path)
    rows = read_csv(tmp_path / "gpu.csv")
    assert len({tuple(row.values()) for row in rows}) == len(rows) == 2 * 3 * 4


class FusedAttention(torch.autograd.Function):
    """What attention on a GPU keeps: its inputs, its output and a number a row."""

    @staticmethod
    def forward(ctx, query, key, value):
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out


def fused_attention(query, key, value, **options):
    return FusedAttention.apply(query, key, value)


def test_the_predictions_of_the_full_size_are_counted(monkeypatch):
    """Operations and kept bytes of FLUX.1-dev's own architecture with LoRA at 720 px, on the meta device."""
    from diffusers import FluxTransformer2DModel
    from peft import LoraConfig

    with torch.device("meta"):
        model = FluxTransformer2DModel.from_config(ARCHITECTURES["flux"]["transformer"]).requires_grad_(False)
        model.add_adapter(LoraConfig(r=64, target_modules=[*RandomFlux.Options.lora_targets]))
        model.to(torch.bfloat16)
        side = 720 // 16
        empty = partial(torch.empty, dtype=torch.bfloat16)
        inputs = {"hidden_states": empty(1, side**2, 64)}
        inputs |= {"encoder_hidden_states": empty(1, benchmark.TEXT_TOKENS, 4096)}
        inputs |= {"pooled_projections": empty(1, 768), "timestep": empty(1), "guidance": empty(1)}
        inputs |= {"img_ids": torch.empty(side**2, 3), "txt_ids": torch.empty(benchmark.TEXT_TOKENS, 3)}
    assert flop_count(lambda: model(**inputs)) == pytest.approx(benchmark.FORWARD_FLOP, rel=0.01)

    # `saved_bytes` tells storages apart by their address, and those on the meta device have none.
    weights, kept = {weight.untyped_storage()._cdata for weight in model.parameters()}, {}

    def keep(tensor):
        if tensor.untyped_storage()._cdata not in weights:
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", fused_attention)
    for mode in ("off", "on", "selective"):
        set_checkpointing(model, mode)
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(**inputs)
        gib = sum(storage.nbytes() for storage in kept.values()) / 2**30
        assert gib == pytest.approx(benchmark.ACTIVATIONS_GIB[mode], rel=0.01), mode
