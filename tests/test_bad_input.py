"""Invalid arguments raise BadInput: one line that names the argument and its value, before torch fails on it."""

import re
from functools import partial

import pytest
import torch

import leap_align as la
from beyond import SOLVERS, Hyper
from leap_align import RECTIFIED, BadInput
from runtime.command_line import check
from tests.problems import METHODS, B, T, grid, randn, run, seeded
from train_leap_align import Config

NAN, INF = float("nan"), float("inf")
UNIT, HALF = [-0.1, 1.1, NAN, INF], [0, -0.1, NAN, INF]
X, X_1, GRID = randn(B, 2), randn(B, 1), grid(T)
IMAGE, DRAWS = randn(B, 2).requires_grad_(), seeded()


def velocity(x, t):
    return torch.sin(x)


def two_passes(i_k, i_j, alpha=0.3, times=GRID, states=None):
    i_k, i_j = (torch.tensor(i) if isinstance(i, list) else i for i in (i_k, i_j))
    return la.leap_trajectory(velocity, states or [X] * len(times), times, i_k, i_j, alpha)


def one_pass(i_k, i_j, alpha=0.3, times=GRID):
    i_k, i_j = (torch.tensor(i) if isinstance(i, list) else i for i in (i_k, i_j))
    return la.leap_rollout(velocity, X, times, i_k, i_j, alpha)


def method(name, times=GRID, v=velocity, solver="euler", generator=DRAWS, **hyper):
    return run(name, v, X, times, Hyper(**{"m": 1, "K": 1, **hyper}), generator, solver)


def hyper(name, value):
    return Hyper(**{name: value})


# (words of the message in their order, function, arguments)
REFUSALS = [
    # Pairs of timesteps
    *(
        (f"i_k={k}, i_j={j} must satisfy 1 <= i_j < i_k <= T={T}", form, *arguments)
        for k, j in [(2, 2), (2, 4), (3, 0), (0, 3), (7, 2), (3, -1), (-1, -2)]
        for form, *arguments in [(one_pass, k, j), (two_passes, k, j), (two_passes, [3, k, 5], [1, j, 2])]
    ),
    *(
        (f"i_k={k}, i_j={j} must be ... ({B},)", two_passes, k, j)
        for k, j in [([3, 4], [1, 2]), ([3, 4, 5, 6], [1, 2, 3, 4]), ([3, 4, 5], [1, 2]), ([[3], [4], [5]], [[1]] * 3)]
    ),
    *(
        (f"i_k={k}, i_j={j} must be two ints", form, k, j)
        for k, j in [(4.5, 2), (4.0, 2.0), ([3.0, 4.0, 5.0], [1.0, 2.0, 2.0]), ([3, 4, 5], 2)]
        for form in (one_pass, two_passes)
    ),
    ("i_k=[3, 4, 5], i_j=[1, 2, 3] must be two ints, one pair a batch", one_pass, [3, 4, 5], [1, 2, 3]),
    *((f"i_end={end} must lie in 0..T={T}", la.rollout, velocity, X, GRID, end) for end in (-1, T + 1)),
    (f"{T} states do not fit {T + 1} times", two_passes, 4, 2, 0.3, GRID, [X] * T),
    *(
        (f"low={low}, high={high or T} must satisfy ... T={T}", call)
        for low, high in [(0, None), (-1, 3), (3, 3), (4, 2), (1, 7), (6, None)]
        for call in [
            partial(la.sample_pair, T, seeded(), low, high),
            *(partial(method, name, low=low, high=high) for name in ("leap_align", "leap_align_per_sample")),
        ]
    ),
    # Hyperparameters
    *(
        (f"alpha={value} must lie in [0, 1]", function, *arguments, value)
        for value in UNIT
        for function, *arguments in [(la.discount, X), (hyper, "alpha"), (two_passes, 4, 2), (one_pass, 4, 2)]
    ),
    *((f"{name}={value} must lie in", hyper, name, value) for name in ("rho", "node_discount") for value in UNIT),
    *((f"late_bias={value} must lie in", hyper, "late_bias", value) for value in (-1.0, NAN, INF)),
    *((f"tau={value} must be positive and finite", la.similarity_weight, two_passes(4, 2), value) for value in HALF),
    *((f"tau={value} must be positive and finite", hyper, "tau", value) for value in HALF),
    *((f"lam={value} must be", hyper, "lam", value) for value in (NAN, INF)),
    ("lam=nan must be", la.hinge, randn(B), NAN),
    *((f"{name}={value} must be ... at least", hyper, name, value) for name, value in dict(m=0, K=0, n=-1).items()),
    ("K=2.0 must be a whole number", hyper, "K", 2.0),
    (f"m=7 must be at most T={T}", partial(method, "refl", m=7)),
    ("m=5 must be at most ... = 4", partial(method, "drtune", m=5, K=2)),
    *(
        (f"K=9 must be at most T={T}", partial(method, name, K=9))
        for name in ("drtune", "sparse", "bridge", "stratified")
    ),
    ("T=2 must be at least 3", method, "lagrange", grid(2)),
    *((f"beta={value} must be at least 0", check, Config(beta=value), Hyper(), None, 1) for value in (-1.0, NAN, INF)),
    # Grids
    ("T=0 must be a whole number, at least 1", la.uniform_times, 0),
    ("T=2.5 must be a whole number", la.shifted_times, 2.5, 3),
    ("low=1, high=1 ... T=1", la.sample_pair, 1, seeded()),
    *((f"shift={value} must be", la.shifted_times, 5, value) for value in (0, -1, NAN, INF)),
    ("times=[0, 0.5, 1] must be a tensor", la.rollout, velocity, X, [0, 0.5, 1]),
    # Shapes and types: (3, 1) and (2,) would broadcast to the state's shape
    *(
        (f"the velocity's shape {shape} must be the state's, (3, 2)", function, X, randn(*shape), *ends)
        for shape in ((3, 1), (2,), (2, 3), (3, 2, 1))
        for function, *ends in [(la.leap, 1, 0), (la.leap_general, 1, 0, RECTIFIED)]
    ),
    *(
        ("the velocity's shape (3, 1) must be the state's", partial(method, name, v=lambda x, t: X_1, solver=solver))
        for name in METHODS
        for solver in SOLVERS
    ),
    *(
        ("the velocity gave a tuple: return its tensor", partial(method, name, v=lambda x, t: (X,), solver=solver))
        for name in METHODS
        for solver in SOLVERS
    ),
    *((f"a time of shape {shape} must be", la.leap, X, X, torch.ones(shape), 0) for shape in ((2,), (3, 1), (1,))),
    ("times of torch.float64 would promote states of torch.float32", la.leap, X.float(), X.float(), randn(B), 0),
    ("x_hat of shape (3, 1) and x of shape (3, 2) must agree", la.connect, X_1, X),
    ("x_0 of shape (3, 1) and x_1 of shape (3, 2) must agree", la.interpolate, X_1, X, 0.5),
    ("reward of shape (3, 1) must be (B,)", la.hinge, X_1, 0.5),
    ("reward of shape () must be (B,)", la.hinge, torch.tensor(1.0), 0.5),
    ("reward of shape (3, 1) must be (B,)", la.objective, X_1, X_1, 0.5),
    ("reward of shape (3, 1) and weight of (3,) must", la.objective, X_1, randn(B), 0.5),
    ("reward of shape (3,) and weight of (3, 1) must", la.objective, randn(B), X_1, 0.5),
    # Rewards that cannot be trained on
    *(
        (words, call, *arguments)
        for call in (la.checked, la.differentiable)
        for words, *arguments in [
            *(
                (f"a reward of type {type(bad).__name__} must be a tensor (B,) = (3,)", bad, IMAGE)
                for bad in ([0.1, 0.2, 0.3], None, 0.5, randn(B).numpy())
            ),
            ("reward of shape (3, 2) must be (B,) = (3,)", IMAGE, IMAGE),
            ("x_0 does not require grad ... velocity", IMAGE.sum(1), IMAGE.detach()),
            ("the reward does not require grad ... no_grad", IMAGE.detach().sum(1), IMAGE),
        ]
    ),
    ("the reward is not finite for samples [1] of 3", la.checked, IMAGE.sum(1) / torch.tensor([1.0, 0.0, 1.0]), IMAGE),
    # Draws without a generator
    *(
        ("generator=None must be a torch.Generator", partial(method, name, generator=None))
        for name in METHODS
        if name != "full_backprop"
    ),
]
BAD_GRIDS = [[1.0, 0.5, 0.0], [0.1, 0.5, 1.0], [0.0, 0.5, 0.9], [0.0, 500.0, 1000.0], [0.0, 0.5, 0.5, 1.0]]
BAD_GRIDS += [[0.0, 0.7, 0.3, 1.0], [0.0, NAN, 1.0], [0.0], [], [[0.0, 0.5, 1.0], [0.0, 0.5, 1.0]]]
for times in map(torch.tensor, BAD_GRIDS):
    words = "times=tensor( ... must be a tensor (T+1,) that ascends strictly from 0 (image) to 1 (noise)"
    calls = [(la.rollout, velocity, X, times), (two_passes, 2, 1, 0.3, times), (one_pass, 2, 1, 0.3, times)]
    REFUSALS += [(words, *call) for call in [*calls, *((method, name, times) for name in METHODS)]]


@pytest.mark.parametrize(("words", "call"), [pytest.param(row[0], row[1:], id=row[0]) for row in REFUSALS])
def test_an_invalid_argument_is_refused_in_one_line(words, call):
    function, *arguments = call
    with pytest.raises(BadInput, match="^" + ".*".join(map(re.escape, words.split(" ... ")))) as caught:
        function(*arguments)
    assert isinstance(caught.value, ValueError) and "\n" not in str(caught.value)


@pytest.mark.parametrize("call", [la.checked, la.differentiable])
def test_a_reward_that_can_be_trained_on_is_unchanged(call):
    assert torch.equal(call(IMAGE.sum(1), IMAGE), IMAGE.sum(1))
