"""full_scale/benchmark.py: its step at a tiny size beside the plan's, its table."""

# ruff: noqa: E402 (optional libraries are checked before they are imported)

import pytest
import torch

from leap_align import BadInput
from runtime.counters import flop_count
from runtime.run_dir import read_csv

for library in ("diffusers", "peft", "open_clip"):
    pytest.importorskip(library)

from full_scale import benchmark
from full_scale.benchmark import CHECKPOINTING, Case
from full_scale.models import FAMILIES

WIDTHS = {"attention_head_dim": 16, "num_attention_heads": 4, "joint_attention_dim": 32}
SMALL = {
    "flux": {"num_layers": 2, "num_single_layers": 2, "pooled_projection_dim": 32, "axes_dims_rope": (4, 4, 8)},
    "sd3": {"num_layers": 4, "dual_attention_layers": [], "pooled_projection_dim": 32, "caption_projection_dim": 64},
    "klein": {"num_layers": 2, "num_single_layers": 2, "axes_dims_rope": (4, 4, 4, 4)},
}
pytestmark = pytest.mark.usefixtures("one_process")


def write(folder, task):
    """A pipeline whose transformer has four blocks, two of each kind."""
    config = FAMILIES[task].configs["transformer"] | WIDTHS | SMALL[task]
    benchmark.write_pipeline(folder, task, config)


@pytest.mark.parametrize(
    "task", ["flux", *(pytest.param(name, marks=pytest.mark.slow) for name in SMALL if name != "flux")]
)
def test_the_step_runs_at_a_tiny_size_and_costs_what_the_plan_says(tmp_path, task):
    write(tmp_path, task)
    counts, planned = [], []
    for checkpointing in CHECKPOINTING:
        case = Case(task, tmp_path, checkpointing, False, 1, T=2, pixels=32)
        row = benchmark.measure(case)
        assert row["s"], row
        operations = row["share of peak"] * row["s"] * benchmark.PEAK_FLOPS
        benchmark.release_memory()
        trainer = benchmark.start_trainer(case.flags())
        counts.append(flop_count(trainer.step))
        planned.append(row["planned GiB"])
        assert operations == pytest.approx(counts[-1], rel=1e-9)
    on, selective, off = counts  # selective computes two of four blocks again, one of each kind
    assert off < selective < on and selective - off == pytest.approx((on - off) / 2, rel=0.2)
    assert 0 < planned[0] < planned[1] < planned[2]


def test_a_case_that_does_not_fit_says_why(tmp_path, monkeypatch):
    write(tmp_path, "flux")
    for error, shown in (BadInput("needs 24 GiB"), "needs 24 GiB"), (torch.OutOfMemoryError("..."), "out of memory"):

        def refuse(case, error=error):
            raise error

        monkeypatch.setattr(benchmark, "step_cost", refuse)
        row = benchmark.measure(Case("flux", tmp_path, "on", False, 1, T=2, pixels=32))
        assert row["GiB"] == shown and row["s"] == "" and row["planned GiB"] > 0


def test_a_skipped_step_is_not_measured(tmp_path, monkeypatch):
    class Skipping:
        def step(self):
            return {"skipped": 1.0, "seconds": 1.0}

    monkeypatch.setattr(benchmark, "start_trainer", lambda flags: Skipping())
    with pytest.raises(BadInput, match="not finite"):
        benchmark.step_cost(Case("flux", tmp_path, "on", False, 1))


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
    monkeypatch.setattr(benchmark, "measure", lambda case: {"batch": case.batch_size, "GiB": 1.0, **vars(case)})
    benchmark.benchmark(out=tmp_path)
    rows = read_csv(tmp_path / "gpu.csv")
    assert len({tuple(row.values()) for row in rows}) == len(rows) == 2 * 3 * 4
