"""toy/laboratory/cost.py: its counts against hand calculations, its times, and its page."""

from ast import literal_eval
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from beyond import DEFAULTS, Hyper
from leap_align import METHODS, uniform_times
from runtime.backward import Leash, SplitVelocity
from runtime.cost_counter import flop_count
from runtime.files import read_csv
from tests.problems import seeded
from toy.laboratory import cost
from toy.laboratory.cost import SHARES, SMOKE, bare_step, floor_flop_count, method_cost, representative_seeds

RESULTS = Path(cost.__file__).parent / "results"
B, IN, HIDDEN, T = 3, 4, 5, 6
FORWARD = 2 * B * IN * HIDDEN + 2 * B * HIDDEN * IN  # a product and a sum for each entry of two matrices
BACKWARD = FORWARD + 2 * B * HIDDEN * IN  # the gradients of both weights and of the hidden layer
BACKWARD_X, FLOOR = FORWARD + FORWARD, 6 * 240 + 360 + 480  # also the gradient of the input; LeapAlign's floor
COSTS = {
    "leap_align": (FLOOR, 6, 2),
    "two passes": (FLOOR + 2 * 240, 8, 2),
    "full_backprop": (6 * 240 + 360 + 5 * 480, 6, 6),
    "draft_lv": ((6 + 2) * 240 + 3 * 360, 8, 3),
    "sparse": (6 * 240 + 3 * 360, 6, 3),  # three states, all constants
    "bridge": (6 * 240 + 4 * 360 + 480, 6, 5),  # five states, of which x_j has a gradient
    "lagrange": (6 * 240 + 3 * 360 + 480, 6, 4),  # two nodes a leap, of which x_j has a gradient
    "leap_align_per_sample": (FLOOR + 2 * 240, 8, 2),
    "stratified": ((6 + 2) * 240 + 360 + 2 * 480, 8, 3),  # two of three leaps are evaluated again; one starts from x_k
}
"""Operations of each method, its evaluations, and those with gradient: what it must evaluate and differentiate."""


@pytest.fixture
def task():
    """The smallest possible task; its reward costs no matrix product."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(IN, HIDDEN, bias=False), nn.Linear(HIDDEN, IN, bias=False))
    velocity, reward = lambda condition: lambda x, t: net(x), lambda sample, condition: sample.sum(1)
    return SimpleNamespace(model=net, times=uniform_times(T), velocity=velocity, decode=lambda x: x, reward=reward)


@pytest.mark.parametrize("name", COSTS)
def test_the_cost_of_a_method_is_that_counted_by_hand(task, name):
    """An evaluation saves its state and its hidden layer, but `stratified` only the state of those to repeat."""
    (operations, evaluations, with_gradient), hyper = COSTS[name], Hyper(**DEFAULTS.get(name, {}))
    found = method_cost({**cost.METHODS, **cost.TWO_PASSES}[name], task, None, torch.randn(B, IN), hyper)
    states, layers = {"draft_lv": (1, 1), "stratified": (3, 1)}.get(name, (with_gradient, with_gradient))
    assert 0 <= found.pop("MiB") * 2**20 - 4 * B * (states * IN + layers * HIDDEN) <= 32  # lengths of leaps, times
    assert found == {"evaluations": evaluations, "with gradient": with_gradient, "operations": operations}


@pytest.mark.parametrize(("name", "number"), [("refl", 1), ("drtune", 13), ("leap_align", 1)])
def test_representative_draws_cost_the_mean_of_all_draws(task, name, number):
    """Over i_min = 1..11 and s = 1..13: 26 - i_min forwards; a backward at s if it is run, and at s + 12 always."""
    task.times = uniform_times(25)
    draws = [(i_min, s) for i_min in range(1, 12) for s in range(1, 14)]
    operations = {
        "refl": sum((26 - i_min) * FORWARD + BACKWARD for i_min, _ in draws) / len(draws),
        "drtune": sum((26 - i_min) * FORWARD + (1 + (s >= i_min)) * BACKWARD for i_min, s in draws) / len(draws),
        "leap_align": 25 * FORWARD + BACKWARD + BACKWARD_X,
    }
    found = method_cost(METHODS[name], task, None, torch.randn(B, IN), Hyper())
    assert len(representative_seeds(METHODS[name], task.times, Hyper())) == number
    assert found["operations"] == pytest.approx(operations[name], rel=1e-12)


@pytest.mark.parametrize("name", METHODS)
def test_a_leash_costs_a_forward_for_each_differentiated_evaluation_and_a_backward_to_x(task, name):
    """The backward of this network to its input alone is FORWARD: a product for each of its two matrices."""
    asked, nested, net = [], [], task.model

    def v_theta(x, t):
        nested.append(x.requires_grad)
        return net(x)

    def step(velocity):
        nested.clear()
        for x_0, weight, _ in METHODS[name](velocity, torch.randn(B, IN), task.times, Hyper(m=4), seeded()):
            velocity.backward(x_0, torch.ones_like(x_0), weight)

    def v_ref(x, t):
        asked.append(torch.is_grad_enabled())
        return net(x)

    leashed = flop_count(lambda: step(Leash(v_theta, v_ref, beta=1.0)))
    free = flop_count(lambda: step(SplitVelocity(v_theta)))
    assert not any(asked)
    assert len(asked) == {"leap_align": 2, "refl": 1, "draft_lv": 3, "full_backprop": T}.get(name, len(asked)) >= 1
    assert sum(nested) == {"leap_align": 1, "full_backprop": T - 1}.get(name, 0)
    assert leashed - free == (len(asked) + sum(nested)) * FORWARD


def test_the_bare_step_reaches_the_floor_and_every_weight(task):
    with_graph, net = [], task.model
    assert (FORWARD, BACKWARD, BACKWARD_X) == (240, 360, 480) and FLOOR == 2280
    assert floor_flop_count(task, None, torch.randn(B, IN)) == FLOOR
    task.velocity = lambda condition: lambda x, t: with_graph.append(torch.is_grad_enabled()) or net(x)
    assert flop_count(lambda: bare_step(task, None, torch.randn(B, IN))) == FLOOR
    assert len(with_graph) == T and sum(with_graph) == 2
    assert all(p.grad.abs().sum() > 0 for p in net.parameters())


@pytest.mark.parametrize("name", ["toy", pytest.param("tiny flux", marks=pytest.mark.slow)])
def test_a_step_of_the_trainer_costs_the_bare_step_and_leap_align_the_floor(name, one_process):
    flags = SMOKE
    if name == "tiny flux":
        pytest.importorskip("diffusers"), pytest.importorskip("open_clip")
        flags = ("--T", "3", "--batch-size", "1", "--gradient-checkpointing", "off")
    trainer, condition, x_T = cost.start_trainer(name, *flags)
    trainer.backward(condition, x_T, trainer.generator)  # the reward encodes each prompt once a run
    step = flop_count(lambda: trainer.backward(condition, x_T, trainer.generator))
    assert step == flop_count(lambda: bare_step(trainer.task, condition, x_T)) > 0
    operations = method_cost(METHODS["leap_align"], trainer.task, condition, x_T, Hyper())["operations"]
    assert operations <= 1.01 * floor_flop_count(trainer.task, condition, x_T)


def test_median_ratio_by_hand():
    """Ratios 1, 1.1, 1.5: neither their mean nor the ratio of the mean times; two slow neighbours do not count."""
    ratio, error = cost.median_ratio([1.0, 22.0, 1.5], [1.0, 20.0, 1.0])
    assert ratio == pytest.approx(1.1)
    assert error == pytest.approx(1.2533 * (0.5 / 1.349) / 3**0.5)  # of a median, with the spread of the quartiles


def test_timing_the_shares_does_not_change_a_step(monkeypatch):
    rows, ticks = [], iter(range(10**6))
    monkeypatch.setattr(cost, "now", lambda: next(ticks))  # a phase lasts one tick
    for timed in (False, True):
        trainer, *_ = cost.start_trainer("toy", *SMOKE)
        shares = cost.step_shares(trainer, 1) if timed else trainer.step()
        rows.append(trainer.step())
    assert {**rows[0], "seconds": 0} == {**rows[1], "seconds": 0}
    assert tuple(shares) == SHARES and sum(shares.values()) == pytest.approx(1)
    assert min(shares.values()) > 0 and shares["rollout"] / shares["leaps"] == pytest.approx(23 / 2)


def test_without_diffusers_the_tiny_pipelines_are_left_out(monkeypatch, capsys):
    full, small = (SimpleNamespace(scale=SimpleNamespace(tasks=("toy", "digits"), smoke=smoke)) for smoke in (0, 1))
    for installed, tiny in ((True, ["tiny flux", "tiny sd3"]), (None, [])):
        monkeypatch.setattr(cost, "find_spec", lambda _, installed=installed: installed)
        assert cost.tasks_to_measure(full) == ["toy", "digits", *tiny]
        assert cost.tasks_to_measure(small) == ["toy", "digits"]
    assert "tiny flux, tiny sd3: left out" in capsys.readouterr().out


def test_the_tables_of_the_page_are_those_of_the_committed_results():
    found = (read_csv(RESULTS / name) for name in ("cost.csv", "cost-time.csv"))
    number = lambda text: literal_eval(text) if text[:1].isdigit() else text  # noqa: E731
    rows, times = ([{key: number(value) for key, value in row.items()} for row in rows] for rows in found)
    assert len(rows) >= 44 and len(times) == 4
    page = (RESULTS.parent / "cost.md").read_text()
    assert all(table in page for table in cost.tables(rows, times).split("\n\n"))
