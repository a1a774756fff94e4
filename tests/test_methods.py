"""The contract of a method, of the paper's and of those beyond it: endpoints, draws, evaluations, weights, memory."""

import copy
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from beyond import SOLVERS, Hyper
from leap_align import objective
from runtime.backward import BatchGenerator, SplitVelocity
from tests.oracles import bumpy, flowbp_nodes, mean_reward
from tests.problems import HYPERS, METHODS, B, Net, Recorder, T, close, gradient, grid, problem, randn, run, seeded

pytestmark = pytest.mark.usefixtures("float64")

LOGS = {name: {"i_k", "i_j", "d_j", "d_0"} for name in ("leap_align", "leap_align_per_sample", "lagrange")}
LOGS |= {"refl": {"i_min"}, "drtune": {"i_min", "s"}, "draft_lv": set(), "full_backprop": set()}
LOGS |= {"sparse": {"timesteps"}, "bridge": {"i_j", "timesteps"}, "stratified": {"timesteps"}}
STOPPED = ("refl", "drtune")
PARTS_OF_WEIGHT = {"leap_align": 2, "leap_align_per_sample": 2, "lagrange": 2, "stratified": 3}
"""Distances whose sum a weight is the inverse of; the other methods have weight 1."""


# Endpoints
@pytest.mark.parametrize("shape", [(), (3,), (2, 4, 4)], ids=str)
def test_an_endpoint_is_an_image_with_graph_a_weight_and_a_complete_log(name, solver, shape):
    """The first image is the solver's, or a leap from the state at an early stop."""
    net, x_T, times, states = problem(shape, solver=solver)
    theta, logs, images = net.leaf(), [], []
    arguments = net.velocity(theta), x_T, times, HYPERS[name], seeded(1), SOLVERS[solver]()
    for x_0, weight, log in METHODS[name](*arguments):
        assert x_0.shape == (B, *shape) and x_0.requires_grad
        assert weight.shape == (B,) and not weight.requires_grad and (weight > 0).all()
        logs.append((log, copy.deepcopy(log)))
        images.append(x_0.detach())
        theta.grad = None
        mean_reward(x_0, weight).backward()
        assert theta.grad.abs().max() > 0
    assert all(log.keys() == LOGS[name] and str(log) == str(then) for log, then in logs)
    assert len(images) == (3 if name == "draft_lv" else 1)
    i = logs[0][0].get("i_min", 0)
    assert close(images[0], states[i] - times[i] * net(net.theta, states[i], times[i]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_states_keep_their_dtype_and_device(name, dtype, device):
    if name == "leap_align_per_sample":
        device = "cpu"  # a time a sample must be on the device of the states
    x_T = randn(B, 3, dtype=dtype).to(device)
    theta = torch.ones((), dtype=dtype, device=device, requires_grad=True)
    times = grid(T, 2.2243, dtype if name == "leap_align_per_sample" else torch.float64)
    endpoints, _ = run(name, lambda x, t: theta * torch.sin(x), x_T, times, HYPERS[name], seeded(), "ab2", mean_reward)
    for result in (theta.grad, *(x for endpoint in endpoints for x in endpoint)):
        assert result.dtype == dtype and result.device.type == device


def test_no_gradient_reaches_the_noise(name):
    """On the shortest grids, x_k, or the state at an early stop, is x_T itself in some draws."""
    steps = 3 if name == "lagrange" else 2
    for seed in range(5):
        net, x_T, theta = Net(), randn(B, 3).requires_grad_(), Net().leaf()
        hyper = replace(HYPERS[name], m=2, K=2)
        run(name, net.velocity(theta), x_T, grid(steps, 2.2243), hyper, seeded(seed), loss=mean_reward)
        assert x_T.grad is None and theta.grad.abs().max() > 0


# Random draws
def test_methods_draw_only_from_their_generator(name):
    net, x_T, times, _ = problem()
    before = torch.get_rng_state()
    drawn = lambda seed: str(run(name, net.velocity(net.theta), x_T, times, HYPERS[name], seeded(seed)))  # noqa: E731
    one, other, *others = map(drawn, (0, 0, 1, 2))
    assert torch.equal(torch.get_rng_state(), before) and one == other
    if name != "full_backprop":
        assert {one} != set(others)


def test_two_half_batches_draw_the_same_as_the_full_batch(name):
    net, x_T, times, whole, halves = Net(), randn(6, 3, seed=1), grid(T, 2.2243), Net().leaf(), Net().leaf()
    loss = lambda x_0, weight: (weight * bumpy(x_0)).sum()  # noqa: E731
    full, drawn = run(name, net.velocity(whole), x_T, times, HYPERS[name], seeded(5), loss=loss)
    parts = []
    for rows in (slice(0, 3), slice(3, 6)):
        generator = BatchGenerator(6, rows)
        generator.manual_seed(5)
        parts.append(run(name, net.velocity(halves), x_T[rows], times, HYPERS[name], generator, loss=loss))
    for together, *apart in zip(full, *(endpoints for endpoints, _ in parts), strict=True):
        for tensor, *pieces in zip(together, *apart, strict=True):
            assert torch.allclose(torch.cat(pieces), tensor, rtol=1e-12, atol=1e-13)
    for key, value in drawn.items():
        values = [log[key] for _, log in parts]
        is_same = torch.is_tensor(value) and torch.allclose(torch.cat(values), value, rtol=0, atol=1e-13)
        assert is_same or values == [value, value]
    assert torch.allclose(halves.grad, whole.grad, rtol=1e-10, atol=1e-12)


# Bug: j drawn from 0..k-1; at j = 0 the second leap has no length and trains nothing.
@pytest.mark.parametrize("name", ["leap_align", "leap_align_per_sample"])
@pytest.mark.parametrize("low, high", [(1, None), (2, 4)])
def test_leap_align_draws_every_pair_of_its_window(name, low, high):
    net, reached = Net(hidden=1), set()
    for seed in range(60):
        _, log = run(name, net.velocity(net.theta), randn(B, 3), grid(5), Hyper(low=low, high=high), seeded(seed))
        reached |= set(zip(*(torch.as_tensor(log[i]).ravel().tolist() for i in ("i_k", "i_j"))))
    assert reached == {(i_k, i_j) for i_j, i_k in combinations(range(low, (high or 5) + 1), 2)}


def test_early_stop_and_drtunes_s_cover_their_ranges():
    net, x_T, times = Net(hidden=1), randn(1, 3), grid(7)
    velocity, hyper = net.velocity(net.theta), Hyper(m=4, K=2)
    refl, drtune = ([run(name, velocity, x_T, times, hyper, seeded(i))[1] for i in range(60)] for name in STOPPED)
    assert {log["i_min"] for log in refl} == {1, 2, 3, 4} == {log["i_min"] for log in drtune}
    assert {log["s"] for log in drtune} == {1, 2, 3, 4}  # 7 - (2 - 1) * floor(7 / 2)


# Bug: an early stop above every trained timestep, so that the step has no gradient.
@pytest.mark.parametrize("steps, K", [(T, K) for T in range(1, 8) for K in range(1, T + 1)])
def test_drtune_always_runs_a_trained_timestep(steps, K):
    m, drawn, seed = 1 + (K - 1) * (steps // K), None, 0
    net, x_T, times = Net(hidden=1), randn(1, 3), grid(steps, 3)
    while drawn != {"i_min": m, "s": 1}:  # the tightest draw: only the first of the trained timesteps is run
        [(x_0, _)], drawn = run("drtune", net.velocity(net.leaf()), x_T, times, Hyper(m=m, K=K), seeded(seed))
        assert x_0.requires_grad and seed < 300, "no graph, or the draw never comes"
        seed += 1


# Evaluations
def evaluations(name, log, hyper, steps):
    """Timesteps in the order of evaluation; those with gradient; those whose state has a graph as well."""
    every, strata = list(range(steps, 0, -1)), list(log.get("timesteps", ()))
    k, j, stop, s = (log.get(key) for key in ("i_k", "i_j", "i_min", "s"))
    if name in STOPPED:
        spaced = [s + n * (steps // hyper.K) for n in reversed(range(hyper.K))] if s else [stop]
        return list(range(steps, stop - 1, -1)), [i for i in spaced if i >= stop], []
    if name == "draft_lv":
        again = [1] * hyper.n
        return every + again, [1, *again], []
    if name == "stratified":  # its leaps but the last again, in the backward
        again = strata[-2::-1]
        return every + again, strata + again, strata[1:] + again[:-1]
    active = {"full_backprop": every}.get(name, strata or [k, j])
    if name == "lagrange":
        active = [i for ends in ((k, j), (j, 0)) for i in flowbp_nodes(steps, *ends)[:2]]
    return every, active, {"full_backprop": every[1:], "sparse": []}.get(name, [j] if len(active) > 1 else [])


# Bugs: gradient enabled in the rollout; v_k with its graph in the Euler step; ReFL at the time of the last step.
@pytest.mark.parametrize("name", [name for name in METHODS if name != "leap_align_per_sample"])
@pytest.mark.parametrize("K", [1, 2, 4, None])
def test_the_evaluations_of_a_method_and_those_with_gradient(name, seed, K):
    steps = 8
    net, x_T, times, _ = problem(steps=steps)
    hyper = replace(HYPERS[name], m=1 if K == 1 else 3, K=3 if name == "drtune" else K or HYPERS[name].K)
    recorder, on_grid = Recorder(net.velocity(net.leaf())), times.tolist()
    _, log = run(name, recorder, x_T, times, hyper, seeded(seed), loss=mean_reward)
    visited, trained, through = evaluations(name, log, hyper, steps)
    assert [on_grid.index(t) for t in recorder.times] == visited
    assert [on_grid.index(t) for t in recorder.graph_times()] == trained
    assert [on_grid.index(t) for t, on in zip(recorder.times, recorder.state_has_graph) if on] == through
    if name in ("sparse", "stratified"):
        assert len(log["timesteps"]) == hyper.K and sorted(set(log["timesteps"]), reverse=True) == [*log["timesteps"]]


class Alive:
    """A velocity that counts the evaluations whose intermediate values autograd keeps at one time."""

    def __init__(self, theta):
        self.theta, self.kept, self.peak = theta, [], 0

    def __call__(self, x, t):
        inner = torch.tanh(self.theta * x)  # saved for the backward
        self.kept = [kept for kept in self.kept if not kept.expired()]
        if inner.requires_grad:
            self.kept.append(StorageWeakRef(inner.untyped_storage()))
        self.peak = max(self.peak, len(self.kept))
        return inner + t


@pytest.mark.parametrize("K", [2, 4, 8])
@pytest.mark.parametrize("backward", ["joint", "cut"])
def test_the_evaluations_that_memory_holds_at_one_time(name, K, backward):
    """draft_lv and stratified train many evaluations, and hold one."""
    steps = 8
    velocity = Alive(torch.ones((), requires_grad=True))
    run_it = velocity if backward == "joint" else SplitVelocity(velocity)
    hyper = replace(HYPERS[name], K=K, n=K, m=1)
    for x_0, weight, log in METHODS[name](run_it, randn(B, 3), grid(steps), hyper, seeded()):
        if backward == "joint":
            x_0.sum().backward()
        else:
            run_it.backward(x_0, torch.ones_like(x_0), weight)
        trained = evaluations(name, log, hyper, steps)[1]
    assert velocity.peak == (1 if name in ("draft_lv", "stratified") else len(trained)) and trained


# Weights.  Bug: tau in the weights of methods that have no similarity weight, or no tau in LeapAlign's weight.
@pytest.mark.parametrize("tau", [0.1, 1e9])
def test_tau_bounds_the_similarity_weight_and_affects_no_other(name, tau):
    net, x_T, times, _ = problem()
    endpoints, _ = run(name, net.velocity(net.theta), x_T, times, replace(HYPERS[name], tau=tau), seeded())
    most = 1 / (PARTS_OF_WEIGHT[name] * tau) if name in PARTS_OF_WEIGHT else 1.0
    for _, weight in endpoints:
        assert (weight <= most).all()
        if tau > 1 or name not in PARTS_OF_WEIGHT:
            assert torch.allclose(weight, torch.full((B,), most), rtol=1e-12, atol=0)


# Bug: a hinge in some methods only, or one that cannot be switched off although Algorithm 1 has none.
def test_the_hinge_is_one_switch_for_all_methods(name):
    arguments = name, *problem()[:3], HYPERS[name]
    found = lambda lam: gradient(*arguments, loss=lambda x_0, w: objective(bumpy(x_0), w, lam))[0]  # noqa: E731
    without, above, below = map(found, (None, 100, -100))
    assert torch.equal(above, without) and torch.equal(below, torch.zeros_like(without))
    assert torch.equal(without, gradient(*arguments)[0])
    assert without.abs().max() > 1e-3
