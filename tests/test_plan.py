"""full_scale/plan.py: its counter against the allocator, its simulation against a real step; and benchmark.py."""

import gc
import json
import re
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from tests import tiny_pipelines

# isort: split

from beyond import DEFAULTS, Hyper
from full_scale import benchmark, plan
from full_scale.components import network_from_config
from full_scale.models import FAMILIES
from full_scale.simulation import Simulation
from leap_align import BadInput
from runtime.cost_counter import CostCounter, PhaseCost, Piece, flop_count, total
from runtime.files import read_csv
from tests.tiny_pipelines import (
    TASKS,
    needs_torchao,
    options_of,
    read,
    refusal,
    slow,
    small_config,
    task_of,
    tool,
    train,
)
from train_leap_align import Config, Trainer

pytestmark = pytest.mark.usefixtures("one_process")

LORA = '{"precision": "bfloat16", "lora_rank": 4}'
FOUR_BITS = pytest.param("flux", LORA.replace("}", ', "load_in_4bit": true}'), marks=needs_torchao)
CASES = [("flux", '{"precision": "bfloat16"}'), slow("flux", LORA), slow("sd3", "{}"), slow("klein", LORA), FOUR_BITS]
STRATIFIED = slow("flux", '{"method": "stratified"}')  # evaluates earlier leaps again after the endpoint's backward


@cache
def measured(models, name, changes):
    """A real step: its counter, the bytes alive before it, the allocator's peak, FlopCounterMode's operations."""
    (models / "many.txt").write_text("".join(f"prompt {i}\n" for i in range(10_000)))  # none is drawn twice
    flags, counter = flags_of(models, name, json.loads(changes)), CostCounter(plan.PHASES)
    task = TASKS[name](replace(flags.task, prompts=models / "many.txt"), flags.run.T)
    task.parallelize(None)
    trainer = Trainer(flags.run, flags.method, task)
    trainer.step()  # creates the optimizer's moments
    plan.label(counter, trainer)
    before = sum(counter.alive.values())
    with counter:
        trainer.step()
    peak = max(sum(cost.peak.values()) for cost in counter.phases.values())
    gc.collect()  # what earlier tests left would otherwise be freed during the measurement
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        trainer.step()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = torch.tensor([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
    operations, allocated = flop_count(trainer.step), sizes.cumsum(0).max().item()
    torch.distributed.destroy_process_group()
    return SimpleNamespace(phases=counter.phases, peak=peak, before=before, allocated=allocated, operations=operations)


def flags_of(models, name, changes=None, batch_size=2, **machine):
    """Flags of a plan for the tiny pipeline and the tiny reward."""
    options = {"method": "leap_align", **(changes or {})}
    run = Config(task=name, method=options.pop("method"), batch_size=batch_size, T=4)
    hyper, machine = Hyper(lam=None, **DEFAULTS.get(run.method, {})), plan.Machine(**{"gpus": 1} | machine)
    return plan.PlanFlags(run, hyper, options_of(models, name, **options), machine)


@pytest.mark.parametrize(("name", "changes"), [*CASES, slow("sd3", '{"gradient_checkpointing": "off"}')])
def test_the_counter_agrees_with_the_allocator_within_3_percent(models, name, changes):
    step = measured(models, name, changes)
    print(f"{name} {changes}: counter / allocator = {(step.peak - step.before) / step.allocated:.3f}")  # pytest -s
    assert step.allocated > 1e6
    assert step.peak - step.before == pytest.approx(step.allocated, rel=0.03)


def test_the_counter_sees_storages_come_and_go():
    counter = CostCounter(["a", "b"])
    with counter:
        with record_function("a"):
            kept, gone = torch.zeros(1000), torch.zeros(5000)
            view = gone[:10]
            del gone, view
        with record_function("b"):
            kept += 1
    assert counter.phases["a"].peak == {"activations": 24_000}
    assert counter.phases["b"].peak["activations"] == 4_000
    counter.label("weights", [kept])
    assert counter.alive == {"activations": 0, "weights": 4_000}
    del kept
    assert sum(counter.alive.values()) == 0


@needs_torchao
def test_a_quantised_weight_counts_its_four_bits_and_no_alias_of_it():
    to_nf4 = pytest.importorskip("torchao.quantization").to_nf4
    weight, counter = to_nf4(torch.randn(64, 64), 64, 16), CostCounter()
    counter.label("weights", [weight])
    weights, scales, scales_of_scales, levels, mean = 64 * 64 // 2, 64, 4 * 4, 4 * 16, 4
    assert counter.alive["weights"] == weights + scales + scales_of_scales + levels + mean
    with counter:
        alias = weight.detach()
    assert alias is not weight and sum(counter.alive.values()) == counter.alive["weights"]


@pytest.mark.parametrize(("name", "changes"), [*CASES, STRATIFIED])
def test_a_simulated_step_costs_what_a_real_one_costs(models, name, changes):
    step, costs = measured(models, name, changes), plan.simulate(flags_of(models, name, json.loads(changes)), "")
    assert sum(total(pieces).flop for pieces in costs.pieces.values()) == step.operations
    assert costs.gib() * plan.GIB == pytest.approx(step.peak, rel=0.03)
    assert costs.peaks["backward"]["weights"] == step.phases["backward"].peak["weights"]


@pytest.mark.slow
@pytest.mark.parametrize(("steps", "reshard", "gathers"), [(1, True, 2 + 2 + 2), (3, False, 1)])  # rollout, leaps, back
def test_nodes_exchange_gradients_once_an_iteration_and_gather_weights_once_a_microbatch(
    models, steps, reshard, gathers
):
    flags = flags_of(models, "flux", {"reshard_after_forward": reshard}, batch_size=4 * steps, nodes=2, gpus=2)
    costs = plan.simulate(replace(flags, run=replace(flags.run, gradient_accumulation_steps=steps)), "")
    parameters = sum(p.nbytes for p in task_of(models).model.parameters())
    # Each GPU holds half of the float32 gradients; a ring of two moves them twice, half at a time.
    _, within, between, _ = total(sum(costs.pieces.values(), plan.Counter()))
    assert between == pytest.approx(parameters / 2, rel=0.02)
    assert within == pytest.approx(steps * (gathers + 2) * parameters / 2, rel=0.02)  # and two reduce-scatters
    assert 0 < costs.peaks["rollout"]["gathered weights"] < 3 * parameters
    assert costs.peaks["optimizer"]["gradients"] == pytest.approx(parameters / 2, rel=0.02)


@pytest.mark.slow
def test_a_backward_through_two_leaps_never_holds_the_unsharded_gradients_of_both(models, tmp_path):
    """On a transformer of FLUX.1-dev's width, so that its weights outweigh the tiny VAE's activations."""
    shutil.copytree(models / "flux", tmp_path / "flux")
    wide = {"num_single_layers": 6, "num_attention_heads": 24, "attention_head_dim": 128}
    path = tmp_path / "flux" / "transformer" / "config.json"
    path.write_text(json.dumps(config := read(path) | wide | {"axes_dims_rope": [16, 56, 56]}))
    changes = {"precision": "bfloat16", "model": str(tmp_path / "flux")}
    costs = plan.simulate(flags_of(models, "flux", changes, batch_size=8, gpus=8), "")
    weights = sum(p.numel() for p in network_from_config(config).parameters())
    assert costs.peaks["backward"]["gradients"] < 2.3 * weights  # 2.18; one graph through both: 2.44


@pytest.mark.parametrize(
    ("pieces", "tflops", "seconds"),
    [
        ({Piece(8e12, 3e9, 5e9): 1}, 4, 3 + 0.5),
        ({Piece(8e12, 3e9, 5e9): 1}, 2, 4 + 0.5),
        ({Piece(8e12, 3e9): 2, Piece(2e12, 3e9): 1, Piece(0, 3e9): 1}, 2, 2 * 4 + 3 + 3),  # block by block
    ],
)
def test_time_is_computing_or_traffic_in_the_node_and_then_traffic_between_nodes(pieces, tflops, seconds):
    assert plan.seconds(plan.Counter(pieces), plan.Machine(tflops=tflops, bandwidth=(1, 10))) == seconds


def test_operations_after_traffic_begin_a_new_piece():
    cost = PhaseCost()
    for amounts in [(0, 5, 0), (1, 0, 0), (2, 0, 0), (0, 6, 0), (0, 0, 7), (4, 0, 0)]:
        cost.add(*amounts)
    assert cost.counted() == {Piece(0, 5, 0): 1, Piece(3, 6, 7): 1, Piece(4, 0, 0): 1}


@pytest.mark.parametrize(
    ("more", "gb"), [("", 3 * 10), ("--async-checkpoints", 10), ("--export-every 50", 3 * 10 + 6 * 5)]
)
def test_the_hours_of_a_run_are_those_of_iterations_evaluations_checkpoints_and_start(more, gb):
    """An asynchronous checkpoint keeps no iteration waiting, but the end of the run."""
    flags = plan.read_flags(f"--gpus 8 --tflops 1 --disk 0.5 --evaluation-images 12 {more}".split())
    disk = {"read at the start": 4e9, "checkpoint": 10e9, "checkpoints at most": 30e9, "export": 5e9}
    disk |= {"exports along the way": 6 * 5e9} if "export" in more else {}
    pieces, image = {"rollout": plan.Counter({Piece(2e12): 3})}, plan.Counter({Piece(5e12): 1})
    shown = plan.numbers(flags, plan.Costs({"rollout": {"weights": plan.GIB}}, pieces, image, {}, disk))
    # 300 iterations of 6 s, 7 evaluations of two images a GPU, 3 checkpoints and the export.
    seconds = {"iterations": 300 * 6, "evaluations": 7 * 2 * 5, "checkpoints": (gb + 5) / 0.5, "start": 4 / 0.5}
    assert shown["hours"] == pytest.approx({name: value / 3600 for name, value in seconds.items()})
    assert shown["gpu_hours"] == pytest.approx(8 * sum(seconds.values()) / 3600)
    if not more:
        whole = "0.54 hours and 4.3 GPU-hours in all"  # 1948 s
        assert shown["summary"] == f"6.00 s an iteration, 1.0 GiB on a GPU, {whole}"


@pytest.mark.parametrize(
    ("iterations", "step", "written"), [(300, 10, 3), (300, 23, 6), (300, 1000, 150), (250, 1, 3), (0, 1, 0)]
)
def test_a_checkpoint_is_due_every_100_iterations_and_when_30_minutes_have_passed(iterations, step, written):
    assert plan.checkpoints(Config(iterations=iterations), step) == written


STEPS = "--gradient-accumulation-steps 8"
RESHARD = f"{STEPS} --reshard-after-forward"
STORED = f"{RESHARD} --stored-embeddings (prompts from `embed`, or at most 200)"
LORA_TOO = f"{STORED} --lora-rank 64 --lr 1e-4"
ON_ONE = LORA_TOO.replace(" --reshard-after-forward", "")
STILL = "does not fit; with all changes of flags it still needs 32.0 GiB: use more or larger GPUs"


@pytest.mark.parametrize(
    ("gpus", "package", "gib", "verdict"),
    [
        (2, "torchao", 79, "fits"),
        (2, "torchao", 73, f"does not fit; with {STEPS} it does (72.0 GiB)"),
        (2, "torchao", 53, f"does not fit; with {RESHARD} it does (52.0 GiB)"),
        (2, "torchao", 43, f"does not fit; with {STORED} it does (42.0 GiB)"),
        (2, "torchao", 33, f"does not fit; with {LORA_TOO} it does (32.0 GiB)"),
        (2, "torchao", 31, STILL),
        (1, "torchao", 31, f"does not fit; with {ON_ONE} --load-in-4bit it does (27.0 GiB)"),
        (1, None, 31, f"{STILL}, or install torchao and plan --load-in-4bit"),
    ],
)
def test_a_run_that_does_not_fit_is_told_the_cheapest_change_that_helps(
    models, monkeypatch, gpus, package, gib, verdict
):
    """Four bits are the last change, and one GPU's alone."""

    def simulate(flags, title=""):
        less = flags.run.gradient_accumulation_steps + 10 * flags.machine.stored_embeddings
        less += (10 if flags.task.lora_rank else 0) + 5 * flags.task.load_in_4bit
        gathered = 20 if flags.machine.gpus > 1 and not flags.task.reshard_after_forward else 0
        return plan.Costs({"backward": {"weights": (60 + gathered - less) * plan.GIB}}, {}, {}, {}, {})

    monkeypatch.setattr(plan, "simulate", simulate)
    monkeypatch.setattr(plan, "find_spec", lambda name: package)
    flags = flags_of(models, "flux", batch_size=8 * gpus, gpus=gpus, gpu_memory=gib + plan.RESERVED_GIB)
    assert plan.verdict(flags, simulate(flags)) == verdict


def test_the_plan_is_printed_and_written_and_a_run_knows_it(models, tmp_path, capsys):
    files = [*tiny_pipelines.files(models), "--reward-weights", models / "flux" / "reward"]
    sizes = "--height 64 --width 64 --T 3 --batch-size 2 --export-every 80 --evaluation-images 2".split()
    tool("plan", *files, *sizes, "--gpus", 1, "--json", tmp_path / "plan.json")
    printed, numbers = capsys.readouterr().out, read(tmp_path / "plan.json")
    assert all(phase in printed for phase in plan.PHASES) and "fits" in printed
    assert numbers["fits"] and numbers["verdict"] == "fits" and set(numbers["phases"]) == set(plan.PHASES)
    assert 0 < numbers["training_gib"] < numbers["peak_gib"] < 1 and numbers["tflop_per_step"] > 0
    assert numbers["host_gb"]["checkpoint"] == numbers["disk_gb"]["checkpoint"]
    assert numbers["disk_gb"]["checkpoint"] > numbers["host_gb"]["export"] == numbers["disk_gb"]["export"] > 0
    assert numbers["disk_gb"]["exports along the way"] == pytest.approx(3 * numbers["disk_gb"]["export"])
    share = 100 * numbers["hours"]["checkpoints"] / sum(numbers["hours"].values())
    assert float(re.search("checkpoints take (.*) % of", printed)[1]) == pytest.approx(share, abs=0.051)
    other = ["--iterations", 1, "--seed", 3, "--resume", "--plan", tmp_path / "plan.json"]
    train(tmp_path / "run", ["--task", "flux", *files, *sizes, *other])
    planned = f"{numbers['summary']}, with other settings: iterations was 300, is 1; seed was 0, is 3"
    assert f"\nPlanned: {planned}.\n" in capsys.readouterr().out


@pytest.mark.parametrize(("is_async", "nodes", "gb"), [(False, 1, 4.3), (False, 2, 4.3), (True, 1, 16), (True, 2, 8)])
def test_a_node_holds_a_file_of_each_process_or_its_part_of_an_asynchronous_checkpoint(is_async, nodes, gb):
    """A billion weights: they, two moments and the average are 16 GB."""
    transformer = torch.nn.Linear(2, 2, device="meta")
    task = Mock(
        frozen_modules=list,
        options=Mock(lora_rank=8, cpu_offload=False),
        dtype=torch.float32,
        empty_transformer=lambda: transformer,
    )
    weights, config = torch.nn.Parameter(torch.empty(10**9, device="meta")), Config(async_checkpoints=is_async)
    trainer = SimpleNamespace(task=task, parameters=[weights], config=config)
    host, disk = plan.host_and_disk(trainer, plan.Machine(gpus=8, nodes=nodes))
    assert host["checkpoint"] / 1e9 == pytest.approx(gb, rel=0.01) and disk["checkpoint"] == 16e9


@pytest.mark.parametrize("source", ["few", "many", "folder", "none"])
def test_few_prompts_and_stored_embeddings_need_no_text_encoders(source, tmp_path):
    (tmp_path / "few").write_text("a red cube\n")
    (tmp_path / "many").write_text("".join(f"prompt {i}\n" for i in range(300)))
    (tmp_path / "folder").mkdir()
    flags = plan.read_flags([] if source == "none" else ["--prompts", str(tmp_path / source)])
    assert flags.machine.stored_embeddings == (source in ("few", "folder"))


PAGE = (Path(__file__).parents[1] / "full_scale" / "README.md").read_text()
ROW = r"^\| (?:`(--[^`]*)`|no other) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+ (?:s|min)) \| ([\d.]+) \| ([\d.]+) \|$"
ROWS = re.findall(ROW, PAGE, re.M)
assert len(ROWS) == 12


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "training", "every", "step", "hours", "gpu_hours"), ROWS, ids=lambda value: value or "no other"
)
def test_the_page_shows_what_the_plan_computes(flags, training, every, step, hours, gpu_hours, tmp_path):
    gpus = 1 if "--gpus 1" in flags else 16 if "--nodes 2" in flags else 8
    tool("plan", *flags.split(), "--gradient-accumulation-steps", 64 // gpus, "--json", tmp_path / "plan.json")
    numbers, (time, unit) = read(tmp_path / "plan.json"), step.split()
    assert numbers["training_gib"] == pytest.approx(float(training), abs=0.06)
    assert numbers["peak_gib"] == pytest.approx(float(every), abs=0.06)
    rounding = 0.505 / 10 ** len(time.partition(".")[2])
    assert numbers["seconds_per_step"] / (60 if unit == "min" else 1) == pytest.approx(float(time), abs=rounding)
    for found, shown in (sum(numbers["hours"].values()), hours), (numbers["gpu_hours"], gpu_hours):
        assert found == pytest.approx(float(shown), abs=0.505 / 10 ** len(shown.partition(".")[2]))


@pytest.mark.parametrize(
    ("task", "name", "parameters"),
    [
        ("flux", "transformer", 11_901_408_320),
        ("klein", "transformer", 408 * 3072**2 + 8192 * 3072 + 60 * 128),  # by hand: squares, inputs and output, norms
        ("klein", "vae", 84_046_115),
        ("klein", "text_encoder", 4_022_468_096),
        # T5 by hand: the embeddings, which two modules share, 24 layers, relative positions, the last norm
        ("flux", "text_encoder_2", 32128 * 4096 + 24 * (4 * 4096**2 + 3 * 4096 * 10240 + 2 * 4096) + 32 * 64 + 4096),
    ],
)
def test_the_configs_have_the_numbers_of_weights_of_the_published_models(task, name, parameters):
    network = network_from_config(FAMILIES[task].configs[name])
    for each in (network, Simulation().empty(network, torch.bfloat16)):
        assert sum(p.numel() for p in each.parameters()) == parameters


def test_a_plan_offers_no_flag_that_does_not_matter_to_it_but_takes_a_command_of_the_training(capsys):
    with pytest.raises(SystemExit):
        plan.read_flags(["--help"])
    shown = capsys.readouterr().out
    assert "--task STR" in shown and "--lora-rank" in shown and "--gpus" in shown
    assert not re.search(r"--out|--resume|--tracker|toy|digits", shown)
    training = "--task sd3 --out runs/x --resume --allow-changed lr --lora-rank 8 --tracker wandb --seed 3".split()
    run = plan.read_flags(training).run
    assert (run.task, run.seed, run.out, run.resume) == ("sd3", 3, None, False)


def small_step(folder, task="flux", checkpointing="on"):
    """Flags of a step of a transformer with four blocks, two of each kind."""
    if not (folder / "transformer").exists():
        config = small_config(task)
        widths = {key: 32 for key in ("joint_attention_dim", "pooled_projection_dim") if key in config}
        benchmark.write_pipeline(folder, task, config | widths)
    return benchmark.step_flags(task, folder, checkpointing, False, 1, T=2, pixels=32)


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
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


SKIPPED = Mock(**{"step.return_value": {"skipped": 1.0, "seconds": 1.0}})


@pytest.mark.parametrize(
    "start, shown",
    [
        (BadInput("needs 24 GiB"), "needs 24 GiB"),
        (torch.OutOfMemoryError("..."), "out of memory"),
        ([SKIPPED], "not measured: a gradient was not finite, so a step was skipped"),
    ],
)
def test_a_step_that_does_not_fit_or_is_skipped_is_not_measured(tmp_path, monkeypatch, start, shown):
    monkeypatch.setattr(benchmark, "start_trainer", Mock(side_effect=start))
    costs = plan.Costs({"leaps": {"weights": 2 * plan.GIB}}, {}, plan.Counter(), {}, {})
    monkeypatch.setattr(benchmark, "simulate", lambda *_: costs)
    row = benchmark.measure(small_step(tmp_path))
    assert (row["GiB"], row["s"], row["planned GiB"]) == (shown, "", 2)


def test_the_table_has_a_row_for_each_combination(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(benchmark, "write_pipeline", lambda *_: None)
    monkeypatch.setattr(benchmark, "measure", lambda flags: {"GiB": 1.0, **vars(flags.run), **vars(flags.task)})
    benchmark.benchmark(out=tmp_path)
    rows = read_csv(tmp_path / "gpu.csv")
    assert len({tuple(row.values()) for row in rows}) == len(rows) == 2 * 3 * 4
    assert f"{tmp_path} was filled with other settings" in refusal(["benchmark", "--task", "sd3", "--out", tmp_path])
