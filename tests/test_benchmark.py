"""toy/benchmark/: its counts against hand calculations, its command, times and tables."""

import runpy
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from beyond import DEFAULTS, Hyper, Leash
from leap_align import METHODS, BadInput, method, uniform_times
from runtime.counters import flop_count
from runtime.run_dir import read_csv
from tests.problems import seeded
from toy import pretrain
from toy.benchmark import __main__ as benchmark
from toy.benchmark import operations
from toy.benchmark.bare_step import bare_step
from toy.benchmark.main_job import PHASES, measure_main_job
from toy.benchmark.operations import (
    METHODS_AND_TWO_PASSES,
    floor_flop_count,
    network_flop_count,
    representative_seeds,
)
from toy.benchmark.step_time import SHARES, median_ratio, step_shares, steps_to_compare
from toy.benchmark.stopwatch import Stopwatch
from toy.benchmark.tasks import make_tiny_pipelines, run_module, start_trainer
from toy.nets import VelocityNet

B, IN, HIDDEN, T = 3, 4, 5, 6
FORWARD = 2 * B * IN * HIDDEN + 2 * B * HIDDEN * IN  # 240: a product and a sum for each entry of two matrices
BACKWARD = FORWARD + 2 * B * HIDDEN * IN  # 360: the gradients of both weights and of the hidden layer
BACKWARD_X = FORWARD + FORWARD  # 480: also that of the input
FLOOR = 6 * 240 + 360 + 480
COSTS = {
    "leap_align": FLOOR,
    "two passes": FLOOR + 2 * 240,
    "full_backprop": 6 * 240 + 360 + 5 * 480,
    "sparse": 6 * 240 + 3 * 360,  # three states, all constants
    "bridge": 6 * 240 + 4 * 360 + 480,  # five states, of which x_j has a gradient
    "lagrange": 6 * 240 + 3 * 360 + 480,  # two nodes a leap, of which x_j has a gradient
    "stratified": (6 + 2) * 240 + 360 + 2 * 480,  # two of three leaps are evaluated again; the first starts from x_k
}
"""The floor of each method: what it must evaluate and differentiate, apart from the two passes."""


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(IN, HIDDEN, bias=False), nn.Linear(HIDDEN, IN, bias=False))


@pytest.fixture
def task(net):
    """The smallest possible task; its reward costs no matrix product."""
    return SimpleNamespace(
        times=uniform_times(T),
        velocity=lambda condition: lambda x, t: net(x),
        decode=lambda x: x,
        reward=lambda sample, condition: sample.sum(1),
    )


@pytest.fixture
def random_networks(monkeypatch):
    """No pre-training: random networks cost as much as trained ones."""
    monkeypatch.setattr(pretrain, "fit_or_load", lambda *_: None)


# Operations


def test_the_constants_are_those_of_the_comments():
    assert (FORWARD, BACKWARD, BACKWARD_X, FLOOR) == (240, 360, 480, 2280)


def test_the_floor_of_a_known_network(task):
    assert floor_flop_count(task.velocity(None), torch.randn(B, IN), task.times) == FLOOR


@pytest.mark.parametrize("name", COSTS)
def test_the_operations_of_a_method_equal_those_counted_by_hand(task, name):
    velocity, x_T, hyper = task.velocity(None), torch.randn(B, IN), Hyper(**DEFAULTS.get(name, {}))
    assert network_flop_count(METHODS_AND_TWO_PASSES[name], velocity, x_T, task.times, hyper, seed=0) == COSTS[name]


def test_the_two_pass_form_has_the_gradient_of_leap_align(task, net):
    gradients, x_T = [], torch.randn(B, IN)
    for name in ("leap_align", "two passes"):
        generator = torch.Generator().manual_seed(0)
        for x_0, _ in METHODS_AND_TWO_PASSES[name](task.velocity(None), x_T, task.times, Hyper(), generator):
            gradients.append(torch.autograd.grad(x_0.sum(), list(net.parameters())))
    torch.testing.assert_close(*gradients)


def test_representative_draws_cost_the_mean_of_all_draws(task):
    """Over i_min = 1..11 and s = 1..13: 26 - i_min forwards; a backward at s if it is run, and at s + 12 always."""
    velocity, x_T, times, hyper = task.velocity(None), torch.randn(B, IN), uniform_times(25), Hyper()
    draws = [(i_min, s) for i_min in range(1, 12) for s in range(1, 14)]
    mean = {
        "refl": sum((26 - i_min) * FORWARD + BACKWARD for i_min, _ in draws) / len(draws),
        "drtune": sum((26 - i_min) * FORWARD + (1 + (s >= i_min)) * BACKWARD for i_min, s in draws) / len(draws),
    }
    for name, number in (("refl", 1), ("drtune", 13)):
        seeds = representative_seeds(METHODS[name], times, hyper)
        counts = [network_flop_count(METHODS[name], velocity, x_T, times, hyper, seed) for seed in seeds]
        assert len(seeds) == number and sum(counts) / number == pytest.approx(mean[name], rel=1e-12)
    assert len(representative_seeds(METHODS["leap_align"], times, hyper)) == 1


def test_leap_align_reaches_the_floor_on_the_network_of_the_toy():
    net, x_T, times = VelocityNet((2,), 8, width=16, depth=2), torch.randn(8, 2), uniform_times(25)
    velocity = lambda x, t: net(x, t, torch.zeros(8, dtype=torch.long))  # noqa: E731
    count = network_flop_count(METHODS["leap_align"], velocity, x_T, times, Hyper(), seed=3)
    assert count <= 1.01 * floor_flop_count(velocity, x_T, times)


@pytest.mark.parametrize("name", METHODS)
def test_a_leash_costs_a_forward_for_each_differentiated_evaluation_and_a_backward_to_x(task, net, name):
    """The backward of this network to its input alone is FORWARD: a product for each of its two matrices."""
    counts, asked, nested = [], [], []
    for reference in (None, lambda x, t: asked.append(t) or net(x)):
        velocity = Leash(lambda x, t: nested.append(x.requires_grad) or net(x), reference, beta=1.0)

        def step(velocity=velocity):
            endpoints = METHODS[name](velocity, torch.randn(B, IN), task.times, Hyper(m=4), seeded())
            for x_0, weight in endpoints:
                velocity.weight = weight
                velocity.backward(x_0, torch.ones_like(x_0))

        counts.append(flop_count(step))
        to_x = sum(nested)
        nested.clear()
    assert len(asked) == {"leap_align": 2, "refl": 1, "draft_lv": 3, "full_backprop": T}.get(name, len(asked)) >= 1
    assert to_x == {"leap_align": 1, "full_backprop": T - 1}.get(name, 0)
    assert counts[1] - counts[0] == (len(asked) + to_x) * FORWARD


def test_the_bare_step_reaches_the_floor_and_every_weight(task, net):
    assert flop_count(lambda: bare_step(task, None, torch.randn(B, IN))) == FLOOR
    assert all(p.grad.abs().sum() > 0 for p in net.parameters())
    with_graph = []

    def velocity(x, t):
        with_graph.append(torch.is_grad_enabled())
        return net(x)

    task.velocity = lambda condition: velocity
    bare_step(task, None, torch.randn(B, IN))
    assert len(with_graph) == T and sum(with_graph) == 2


# The command


def test_a_short_benchmark_writes_tables_and_a_figure(tmp_path, monkeypatch, capsys, random_networks):
    few = {name: METHODS[name] for name in ("leap_align", "full_backprop")}
    monkeypatch.setattr(operations, "METHODS_AND_TWO_PASSES", few)
    parts = ("flops", "memory", "time")
    benchmark.main(benchmark.Options(out=tmp_path, tasks=("toy",), parts=parts, seconds=0.1))
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"flops.csv", "memory.csv", "time.csv", "shares.csv", "benchmark.png", "settings.json", ".lock"}
    assert "| toy | leap_align | 1.000 | 1.000 |" in capsys.readouterr().out
    (row,) = read_csv(tmp_path / "shares.csv")
    shares = {phase: float(share) for phase, share in row.items() if phase != "task"}
    assert tuple(shares) == SHARES and sum(shares.values()) == pytest.approx(1)
    assert all(share > 0 for share in shares.values())
    assert max(shares, key=shares.get) == "rollout"  # 23 of the 25 evaluations


@pytest.mark.parametrize(
    "wrong", [{"tasks": ("toy", "mnist")}, {"parts": ("flop",)}, {"seconds": 0.0}, {"seconds": float("nan")}]
)
def test_wrong_flags_are_refused_in_one_line(wrong):
    with pytest.raises(BadInput, match=r"^[^\n]+$"):
        benchmark.check(benchmark.Options(**wrong))


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
def test_the_command_ends_with_the_refusal_as_one_line(monkeypatch):
    monkeypatch.setattr("sys.argv", ["toy.benchmark", "--seconds", "0"])
    with pytest.raises(SystemExit) as refusal:
        runpy.run_module("toy.benchmark", run_name="__main__")
    assert refusal.value.code == "error: seconds=0.0 must be positive"


def test_the_benchmark_measures_again_in_its_own_folder_and_refuses_another(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "measure_memory", lambda name, folder: [{"task": name, "T": 10}])
    monkeypatch.setattr(benchmark, "plot", lambda tables, out: None)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "memory.csv").write_text("mine")
    options = partial(benchmark.Options, tasks=("toy",), parts=("memory",))
    for _ in range(2):
        benchmark.main(options(out=tmp_path / "own"))
    assert (tmp_path / "own" / "memory.csv").exists()
    with pytest.raises(BadInput, match=r"toy.benchmark did not fill it: choose another folder$"):
        benchmark.main(options(out=tmp_path / "mine"))
    assert (tmp_path / "mine" / "memory.csv").read_text() == "mine"


def test_a_method_of_your_own_is_measured_whatever_it_logs():
    """representative_seeds looks for draws at the middle of the early stop."""

    @method
    def mine(velocity, x_T, times, hyper, generator):
        yield x_T, x_T.new_ones(len(x_T))
        return {"i_min": 1}

    assert representative_seeds(mine, uniform_times(T), Hyper()) == [0]


def test_without_diffusers_flux_and_sd3_are_left_out(monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "find_spec", lambda name: None)
    assert benchmark.check(benchmark.Options()) == ["toy", "digits"]
    assert "flux, sd3: left out" in capsys.readouterr().out


# Time


def test_median_ratio_by_hand():
    """Ratios 1, 1.1, 1.2: the median is not the ratio of the mean times, and two slow neighbours do not count."""
    ratio, error, quartiles = median_ratio([1.0, 22.0, 1.2], [1.0, 20.0, 1.0])
    assert ratio == pytest.approx(1.1) and quartiles == "1.000-1.200"
    assert error == pytest.approx(1.2533 * (0.2 / 1.349) / 3**0.5)  # of a median, with the spread of the quartiles


def test_the_stopwatch_adds_up_phases_as_context_and_as_decorator(monkeypatch):
    clock = iter([0.0, 1.0, 10.0, 12.0, 20.0, 23.0])
    monkeypatch.setattr("toy.benchmark.stopwatch.now", lambda: next(clock))
    stopwatch = Stopwatch()
    with stopwatch.phase("a"):
        pass
    timed = stopwatch.phase("b")(lambda x: x + 1)
    assert (timed(1), timed(2)) == (2, 3)
    assert stopwatch.seconds == {"a": 1.0, "b": 5.0}


def test_timing_the_shares_does_not_change_a_step(tmp_path, random_networks):
    rows = []
    for timed in (False, True):
        torch.manual_seed(0)
        trainer = start_trainer("toy", tmp_path, "--T", "4", "--batch-size", "8")
        if timed:
            step_shares(trainer, 1)
        else:
            trainer.step()
        rows.append(trainer.step())
    assert {**rows[0], "seconds": 0} == {**rows[1], "seconds": 0}


def test_the_bare_step_without_fsdp_does_the_same_work(tmp_path):
    for library in ("diffusers", "open_clip"):
        pytest.importorskip(library)
    make_tiny_pipelines(["flux"], tmp_path)
    trainer = start_trainer("flux", tmp_path, "--T", "3", "--batch-size", "1")
    try:
        steps = steps_to_compare(trainer)
        steps["bare"]()  # the reward encodes each prompt once a run
        trainer.optimizer.zero_grad()
        operations = flop_count(steps["unwrapped"])
        assert all(p.grad is None for p in trainer.parameters)
        assert operations == flop_count(steps["bare"]) > 0
        assert all(p.grad is not None for p in trainer.parameters)
    finally:
        torch.distributed.destroy_process_group()


# The main job

SHORT_JOB = "--iterations 2 --batch-size 4 --pretrain-steps 1 --reward-steps 1 --evaluation-samples 160".split()


def test_the_phases_of_the_main_job_add_up_and_the_second_run_uses_the_cache(tmp_path):
    first, second = measure_main_job("toy", tmp_path, *SHORT_JOB)
    for row in (first, second):
        assert row["seconds"] == pytest.approx(sum(row[phase] for phase in PHASES))
        assert all(row[phase] > 0 for phase in PHASES if phase != "pre-training")
    assert first["pre-training"] > 0 == second["pre-training"]


def test_a_module_that_does_not_exist_is_refused_in_one_line():
    with pytest.raises(BadInput, match=r"^`python -m toy.nothing` failed: [^\n]*No module named toy.nothing$"):
        run_module("toy.nothing")
