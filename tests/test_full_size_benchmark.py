"""full_scale/benchmark.py: its step at a tiny size beside the plan's, its table."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch

from tests import tiny_pipelines  # noqa: F401 (first: skips without the libraries)

# isort: split

from full_scale import benchmark
from full_scale.models import FAMILIES
from leap_align import BadInput
from runtime.cost_counter import flop_count
from runtime.run_dir import read_csv

WIDTHS = {"attention_head_dim": 16, "num_attention_heads": 4, "joint_attention_dim": 32}
SMALL = {
    "flux": {"num_layers": 2, "num_single_layers": 2, "pooled_projection_dim": 32, "axes_dims_rope": (4, 4, 8)},
    "sd3": {"num_layers": 4, "dual_attention_layers": [], "pooled_projection_dim": 32, "caption_projection_dim": 64},
    "klein": {"num_layers": 2, "num_single_layers": 2, "axes_dims_rope": (4, 4, 4, 4)},
}
pytestmark = pytest.mark.usefixtures("one_process")


def small_step(folder, task="flux", checkpointing="on"):
    """Flags of a step of a transformer with four blocks, two of each kind."""
    if not (folder / "transformer").exists():
        benchmark.write_pipeline(folder, task, FAMILIES[task].configs["transformer"] | WIDTHS | SMALL[task])
    return benchmark.step_flags(task, folder, checkpointing, False, 1, T=2, pixels=32)


@pytest.mark.parametrize(
    "task", ["flux", *(pytest.param(name, marks=pytest.mark.slow) for name in SMALL if name != "flux")]
)
def test_the_step_runs_at_a_tiny_size_and_costs_what_the_plan_says(tmp_path, task):
    counts, planned = [], []
    for checkpointing in benchmark.CHECKPOINTING:
        flags = small_step(tmp_path, task, checkpointing)
        row = benchmark.measure(flags)
        assert row["s"], row
        benchmark.release_memory()
        counts.append(flop_count(benchmark.start_trainer(flags).step))
        planned.append(row["planned GiB"])
        assert row["share of peak"] * row["s"] * benchmark.PEAK_FLOPS == pytest.approx(counts[-1], rel=1e-9)
    on, selective, off = counts  # selective computes two of four blocks again, one of each kind
    assert off < selective < on and selective - off == pytest.approx((on - off) / 2, rel=0.2)
    assert 0 < planned[0] < planned[1] < planned[2]


def test_a_step_that_does_not_fit_or_is_skipped_is_not_measured(tmp_path, monkeypatch):
    def start(error, flags):
        if error:
            raise error
        return SimpleNamespace(step=lambda: {"skipped": 1.0, "seconds": 1.0})

    for error, shown in (
        (BadInput("needs 24 GiB"), "needs 24 GiB"),
        (torch.OutOfMemoryError("..."), "out of memory"),
        (None, "not measured: a gradient was not finite, so a step was skipped"),
    ):
        monkeypatch.setattr(benchmark, "start_trainer", partial(start, error))
        row = benchmark.measure(small_step(tmp_path))
        assert row["GiB"] == shown and row["s"] == "" and row["planned GiB"] > 0


def test_without_a_gpu_the_benchmark_is_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BadInput, match=r"^[^\n]*no CUDA device[^\n]*$"):
        benchmark.benchmark(out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(BadInput, match="task=toy: benchmark knows flux, sd3, klein"):
        benchmark.benchmark("toy", tmp_path / "out")


def test_the_table_has_a_row_for_each_combination(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(benchmark, "write_pipeline", lambda *_: None)
    monkeypatch.setattr(benchmark, "measure", lambda flags: {"GiB": 1.0, **vars(flags.run), **vars(flags.task)})
    benchmark.benchmark(out=tmp_path)
    rows = read_csv(tmp_path / "gpu.csv")
    assert len({tuple(row.values()) for row in rows}) == len(rows) == 2 * 3 * 4
