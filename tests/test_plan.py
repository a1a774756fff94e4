"""full_scale/plan.py: its counter against the allocator, its simulation against a real step, its judgement."""

import gc
import json
import re
import shutil
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from tests.tiny_pipelines import options_of, read, task_of, tool  # first: skips without the libraries

# isort: split

from beyond import Hyper
from full_scale import plan
from full_scale.components import network_from_config
from full_scale.models import FAMILIES
from full_scale.simulation import Simulation
from runtime.backward import CutVelocity
from runtime.cost_counter import BETWEEN, FLOP, WITHIN, CostCounter, flop_count
from train_leap_align import METHODS, Config, Trainer

pytestmark = pytest.mark.usefixtures("one_process")

FULL = '{"precision": "bfloat16"}'
LORA = '{"precision": "bfloat16", "lora_rank": 4}'
FOUR_BITS = '{"precision": "bfloat16", "lora_rank": 4, "load_in_4bit": true}'
needs_torchao = pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed")
CASES = [("flux", FULL), ("flux", LORA), ("sd3", "{}"), ("klein", LORA)]
CASES += [pytest.param("flux", FOUR_BITS, marks=needs_torchao)]
MORE_CASES = [*CASES, ("flux", "{}"), ("sd3", '{"gradient_checkpointing": "off"}')]


def trainer_of(models, name, changes):
    """A real trainer after its first step, which creates the optimizer's moments."""
    (models / "many.txt").write_text("".join(f"prompt {i}\n" for i in range(10_000)))  # none is drawn twice
    task = task_of(models, name, prompts=models / "many.txt", **changes)
    trainer = Trainer(Config(task=name, batch_size=2, T=4), Hyper(lam=None), task)
    trainer.step()
    return trainer


@cache
def measured(models, name, changes):
    """A real step: its counter, the bytes alive before it, the allocator's peak, FlopCounterMode's operations."""
    trainer, counter = trainer_of(models, name, json.loads(changes)), CostCounter(plan.PHASES)
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


def flags_of(models, name, changes, **machine):
    """Flags of a plan for the tiny pipeline and the tiny reward."""
    run, machine = Config(task=name, batch_size=2, T=4), plan.Machine(**{"gpus": 1} | machine)
    return plan.PlanFlags(run, Hyper(lam=None), options_of(models, name, **changes), machine)


@pytest.mark.parametrize(("name", "changes"), MORE_CASES)
def test_the_counter_agrees_with_the_allocator_within_3_percent(models, name, changes):
    step = measured(models, name, changes)
    print(f"{name} {changes}: counter / allocator = {(step.peak - step.before) / step.allocated:.3f}")  # pytest -s
    assert step.allocated > 1e6
    assert step.peak - step.before == pytest.approx(step.allocated, rel=0.03)


def test_the_counter_sees_storages_come_and_go():
    counter = CostCounter(["a", "b"])
    with counter:
        with record_function("a"):
            kept = torch.zeros(1000)
            gone = torch.zeros(5000)
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


@pytest.mark.parametrize(("name", "changes"), CASES)
def test_a_simulated_step_costs_what_a_real_one_costs(models, name, changes):
    step, costs = measured(models, name, changes), plan.simulate(flags_of(models, name, json.loads(changes)), "")
    assert sum(counts[FLOP] for counts in costs.counts.values()) == step.operations
    assert costs.gib() * plan.GIB == pytest.approx(step.peak, rel=0.03)
    assert costs.peaks["backward"]["weights"] == step.phases["backward"].peak["weights"]


@pytest.mark.parametrize("steps", [1, 3])
def test_two_nodes_exchange_their_gradients_once_an_iteration(models, steps):
    flags = flags_of(models, "flux", {}, nodes=2, gpus=2)
    run = replace(flags.run, batch_size=4 * steps, gradient_accumulation_steps=steps)
    costs = plan.simulate(replace(flags, run=run), "")
    parameters = sum(p.nbytes for p in task_of(models).model.parameters())
    # Each GPU holds half of the float32 gradients; a ring of two moves them twice, half at a time.
    between = sum(counts[BETWEEN] for counts in costs.counts.values())
    assert between == pytest.approx(parameters / 2, rel=0.02)
    assert 0 < costs.peaks["rollout"]["gathered weights"] < 3 * parameters
    assert costs.peaks["optimizer"]["gradients"] == pytest.approx(parameters / 2, rel=0.02)
    assert costs.counts["rollout"][WITHIN] == pytest.approx(2 * steps * parameters / 2, rel=0.02)


def test_a_joint_backward_needs_the_unsharded_gradients_of_both_leaps(models, monkeypatch, tmp_path):
    """On a transformer of FLUX.1-dev's width, so that its weights outweigh the tiny VAE's activations."""
    shutil.copytree(models / "flux", tmp_path / "flux")
    wide = {"num_single_layers": 6, "num_attention_heads": 24, "attention_head_dim": 128}
    path = tmp_path / "flux" / "transformer" / "config.json"
    path.write_text(json.dumps(config := read(path) | wide | {"axes_dims_rope": [16, 56, 56]}))
    flags = flags_of(models, "flux", {"precision": "bfloat16", "model": str(tmp_path / "flux")}, gpus=8)
    flags = replace(flags, run=replace(flags.run, batch_size=8))
    cut = plan.simulate(flags, "")

    class Joint(CutVelocity):
        def __call__(self, x, t):
            return self.velocity(x, t)

        def backward(self, x_0, gradient, weight, before_last=None):
            before_last()
            x_0.backward(gradient)
            return {}

    monkeypatch.setattr("train_leap_align.CutVelocity", Joint)
    joint = plan.simulate(flags, "")
    assert joint.counts["backward"][FLOP] == cut.counts["backward"][FLOP]
    weights = sum(p.numel() for p in network_from_config(config).parameters())
    assert (joint.gib() - cut.gib()) * plan.GIB > 0.3 * 2 * weights  # bfloat16


def test_every_operation_of_every_phase_is_counted(models):
    """`stratified` evaluates earlier leaps again after the endpoint's backward."""
    trainer = trainer_of(models, "flux", {})
    trainer.method, trainer.hyper = METHODS["stratified"], Hyper(lam=None, K=3, alpha=1.0)
    operations = flop_count(trainer.step)
    torch.distributed.destroy_process_group()
    flags = flags_of(models, "flux", {})
    run, hyper = replace(flags.run, method="stratified"), replace(flags.method, K=3, alpha=1.0)
    costs = plan.simulate(replace(flags, run=run, method=hyper), "")
    assert sum(counts[FLOP] for counts in costs.counts.values()) == operations


def test_time_is_computing_or_traffic_in_the_node_and_then_traffic_between_nodes():
    counts = plan.Counter({FLOP: 8e12, WITHIN: 3e9, BETWEEN: 5e9})
    assert plan.seconds(counts, plan.Machine(tflops=4, bandwidth=(1, 10))) == 3.5
    assert plan.seconds(counts, plan.Machine(tflops=2, bandwidth=(1, 10))) == 4.5


def costs_of(gib):
    return plan.Costs({"backward": {"weights": gib * plan.GIB}}, {}, {}, {})


def test_a_run_that_does_not_fit_is_told_the_cheapest_change_that_helps(models, monkeypatch):
    run, machine = Config(task="flux", batch_size=16), plan.Machine(gpus=2)
    flags = plan.PlanFlags(run, Hyper(), options_of(models, "flux"), machine)

    def simulate(flags, title=""):
        gib = 60 - flags.run.gradient_accumulation_steps - 10 * flags.machine.stored_embeddings
        gib -= 10 if flags.task.lora_rank else 0
        return costs_of(gib)

    monkeypatch.setattr(plan, "simulate", simulate)

    def verdict(gib):
        machine = replace(flags.machine, gpu_memory=gib + plan.RESERVED_GIB)
        return plan.verdict(replace(flags, machine=machine), simulate(flags))

    stored = "--stored-embeddings (prompts from `embed`, or at most 200)"
    steps = "--gradient-accumulation-steps 8"
    assert verdict(59) == "fits"
    assert verdict(53) == f"does not fit; with {steps} it does (52.0 GiB)"
    assert verdict(43) == f"does not fit; with {steps} {stored} it does (42.0 GiB)"
    assert verdict(33) == f"does not fit; with {steps} {stored} --lora-rank 64 --lr 1e-4 it does (32.0 GiB)"
    assert verdict(31).endswith("it still needs 32.0 GiB: use more or larger GPUs")


@pytest.mark.parametrize("gpus, package, offered", [(1, "torchao", True), (2, "torchao", False), (1, None, False)])
def test_four_bits_are_the_last_change_and_one_gpus_alone(models, monkeypatch, gpus, package, offered):
    monkeypatch.setattr(plan, "find_spec", lambda name: package)
    flags = plan.PlanFlags(Config(task="flux"), Hyper(), options_of(models, "flux"), plan.Machine(gpus=gpus))
    *_, (change, changed) = plan.remedies(flags)
    assert changed.task.load_in_4bit == change.endswith(" --lora-rank 64 --lr 1e-4 --load-in-4bit") == offered
    monkeypatch.setattr(plan, "simulate", lambda *_: costs_of(100))
    advice = plan.verdict(flags, costs_of(100)).partition("GiB: ")[2]
    install = ", or install torchao and plan --load-in-4bit" if gpus == 1 and not package else ""
    assert advice == f"use more or larger GPUs{install}"


def test_the_plan_is_printed_and_written(models, tmp_path, capsys):
    files = ["--model", models / "flux", "--reward-weights", models / "flux" / "reward"]
    arguments = [*files, "--gpus", 1, "--height", 64, "--width", 64, "--T", 3, "--batch-size", 2]
    tool("plan", *arguments, "--json", tmp_path / "plan.json")
    printed = capsys.readouterr().out
    assert all(phase in printed for phase in plan.PHASES) and "fits" in printed
    numbers = read(tmp_path / "plan.json")
    assert numbers["fits"] and 0 < numbers["training_gib"] < numbers["peak_gib"] < 1
    assert numbers["host_gb"]["checkpoint"] == 3 * numbers["disk_gb"]["checkpoint"]
    assert numbers["disk_gb"]["checkpoint"] > numbers["host_gb"]["export"] == numbers["disk_gb"]["export"] > 0
    assert numbers["verdict"] == "fits"
    assert numbers["tflop_per_step"] > 0 and set(numbers["phases"]) == set(plan.PHASES)


@pytest.mark.parametrize("source", ["few", "many", "folder", "none"])
def test_few_prompts_and_stored_embeddings_need_no_text_encoders(source, tmp_path):
    (tmp_path / "few").write_text("a red cube\n")
    (tmp_path / "many").write_text("".join(f"prompt {i}\n" for i in range(300)))
    (tmp_path / "folder").mkdir()
    flags = plan.read_flags([] if source == "none" else ["--prompts", str(tmp_path / source)])
    assert flags.machine.stored_embeddings == (source in ("few", "folder"))


PAGE = (Path(__file__).parents[1] / "full_scale" / "README.md").read_text()
ROWS = re.findall(r"^\| (?:`(--[^`]*)`|no other) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+ (?:s|min)) \|$", PAGE, re.M)
assert len(ROWS) == 12


@pytest.mark.slow
@pytest.mark.parametrize(("flags", "training", "every", "step"), ROWS, ids=lambda value: value or "no other")
def test_the_page_shows_what_the_plan_computes(flags, training, every, step, tmp_path):
    gpus = 1 if "--gpus 1" in flags else 16 if "--nodes 2" in flags else 8
    tool("plan", *flags.split(), "--gradient-accumulation-steps", 64 // gpus, "--json", tmp_path / "plan.json")
    numbers = read(tmp_path / "plan.json")
    assert numbers["training_gib"] == pytest.approx(float(training), abs=0.06)
    assert numbers["peak_gib"] == pytest.approx(float(every), abs=0.06)
    number, unit = step.split()
    minutes_or_seconds = numbers["seconds_per_step"] / (60 if unit == "min" else 1)
    rounding = 0.505 / 10 ** len(number.partition(".")[2])
    assert minutes_or_seconds == pytest.approx(float(number), abs=rounding)


@pytest.mark.slow
@pytest.mark.parametrize(("task", "verdict"), [("klein", "fits"), ("flux", "does not fit; with all changes of flags")])
def test_klein_fits_on_24_gb_and_flux_does_not(task, verdict, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "find_spec", lambda name: None)  # no four bits
    arguments = "--gpus 1 --lora-rank 64 --stored-embeddings --gradient-accumulation-steps 64 --gpu-memory 24".split()
    tool("plan", "--task", task, *arguments, "--json", tmp_path / "plan.json")
    assert read(tmp_path / "plan.json")["verdict"].startswith(verdict)


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
