"""Beyond the paper: other backward trajectories over the same sampling run, a second solver, and our own methods.

The idea.  A connector gives an estimate of a state the value of the real state.  The estimate therefore decides about
the gradient alone, and any solver with any number of steps may have made the real states.

FlowBP (arXiv 2606.11075, commit 93b220a) estimates x_b from x_a by a *surrogate*, a sum over nodes i of the piece
a -> b of the run.  Active nodes (A) have gradient, the other nodes are constants:

    x̂_b = x_a - sum_i w_i v_i, the gradient of v_i multiplied by g_i                        surrogate
    gamma(A) = 1 + rho (sum_i |w_i| / sum_{i in A} |w_i| - 1)                               compensation

    method       pieces        nodes of a piece                    g_i of active nodes      source
    sparse       T -> 0        all, w_i = h_i                      gamma                    FlowBP
    bridge       T -> j -> 0   all, w_i = h_i                      gamma                    FlowBP
    lagrange     k -> j -> 0   up to three, Lagrange's weights     gamma, delta gamma       FlowBP
    stratified   K leaps       the start, w = length of the leap   1                        ours

LeapAlign has two leaps from any pair, `stratified` one from each of K equal parts; `leap_align_per_sample`, ours, has a
pair for each sample.
The length of a step is h_i = times[i] - times[i-1].  Weights w_i belong to a surrogate, not to the solver of the run.
Shapes, grids, symbols and the contract of a method are those of leap_align.py; these symbols are new:

    FlowBP   here    code            meaning
    rho      rho     rho             share of the constant nodes' weight that the active nodes take over
    b        b       late_bias       exponent of the preference for timesteps near the image
    beta     delta   node_discount   discount of the second node's gradient; beta is the leash's (runtime/backward.py)
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor
from torch.utils.checkpoint import checkpoint

import leap_align
from leap_align import (
    Endpoints,
    LeapTrajectory,
    Step,
    Velocity,
    batch_of,
    check_generator,
    connect,
    discount,
    distances,
    leap,
    leap_trajectory,
    require,
    rollout,
    sample_pair,
    steps_of,
    stop_gradient,
    uniform_integers,
    weight_of,
)


# ------------------------------------------------------ Solvers ------------------------------------------------------
class AdamsBashforth2:
    """A second-order step that remembers the velocity before:  x_{i-1} = x_i - h_i [(1 + r/2) v_i - (r/2) v_{i+1}].

    r = h_i / h_{i+1}, so the grid may be uneven; the first step is Euler's.  One evaluation a step, as Euler.  A `Step`
    for one run: arguments, shapes, gradient and errors are those of `leap`, and gradient also reaches v_{i+1}.
    """

    def __init__(self) -> None:
        self.before: tuple[Tensor, Tensor | float] | None = None

    def __call__(self, x: Tensor, v: Tensor, t: Tensor | float, s: Tensor | float) -> Tensor:
        slope = v
        if self.before is not None:
            v_before, t_before = self.before
            r = (t - s) / (t_before - t)
            slope = v + r / 2 * (v - v_before)
        self.before = v, t
        return leap(x, slope, t, s)


SOLVERS: dict[str, Callable[[], Step]] = {"euler": lambda: leap, "ab2": AdamsBashforth2}
"""What makes the step of a new sampling run, by name."""


# -------------------------------------------------- Hyperparameters --------------------------------------------------
@dataclass(frozen=True)
class Hyper(leap_align.Hyper):
    """The hyperparameters of all methods; a method ignores those that do not name it."""

    alpha: float = 0.3  # Discount of the nested gradient, in [0, 1] (alpha; leap_align*, stratified, bridge, lagrange).
    tau: float = 0.1  # Lower bound of distances in the similarity weight (tau; leap_align*, stratified, lagrange).
    K: int = 2  # Trained timesteps (K; drtune, sparse, bridge), or leaps (stratified).
    rho: float = 1.0  # Share of the other timesteps' weight that trained ones take over, in [0, 1] (rho; FlowBP's).
    late_bias: float = 2.0  # Preference for timesteps near the image, 0 for none (b; sparse, bridge).
    node_discount: float = 0.25  # Discount of the second node's gradient, in [0, 1] (delta; lagrange).

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, most in (("rho", 1), ("node_discount", 1), ("late_bias", 100)):
            value = getattr(self, name)
            require(0 <= value <= most, f"{name}={value} must lie in [0, {most}]")


# ----------------------------------------------------- Surrogates ----------------------------------------------------
class Piece(NamedTuple):
    """A piece of the run, from timestep i_a down to i_b, and how its surrogate is made."""

    i_a: int
    i_b: int
    weights: dict[int, float]  # w_i of each node i, here and below of other pieces, too.
    gains: dict[int, float]  # g_i of each active node i: the factor of its velocity's gradient.


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """The value of x, its gradient times any factor: sg(x) + factor (x - sg(x)); `discount` takes those in [0, 1]."""
    return stop_gradient(x) + factor * (x - stop_gradient(x))


def surrogate(
    velocity: Velocity, x: Tensor, times: Tensor, piece: Piece, alpha: float, step: Step
) -> tuple[Tensor, Tensor]:
    """A piece of the run, and in the same pass its surrogate  x̂_b = x_a - sum_i w_i v_i  (g_i scales v_i's gradient).

    x: x_a (B, *S); its gradient reaches x̂_b directly and, discounted by alpha, through v_a.  Other nodes see sg(x_i).
    Returns x̂_b, and x_b with x̂_b's gradient.  i_a - i_b evaluations, those at active nodes with gradient.
    """
    x_hat, x_t = x, stop_gradient(x)
    for i in range(piece.i_a, piece.i_b, -1):
        gain = piece.gains.get(i, 0)
        with nullcontext() if gain else torch.no_grad():
            v = velocity(discount(x, alpha) if i == piece.i_a else x_t, times[i])
        x_t = step(x_t, stop_gradient(v), times[i], times[i - 1])
        x_hat = x_hat - piece.weights.get(i, 0) * scale_gradient(v, gain)
    return x_hat, connect(x_hat, x_t)


def compensation(weights: dict[int, float], active: list[int], rho: float) -> float:
    """gamma(A) = 1 + rho (sum_i |w_i| / sum_{i in A} |w_i| - 1): with rho = 1 the active nodes stand for all nodes."""
    return 1 + rho * (sum(map(abs, weights.values())) / sum(abs(weights[i]) for i in active) - 1)


def sum_run(times: Tensor, active: list[int], rho: float) -> tuple[dict[int, float], dict[int, float]]:
    """Every timestep of the run is a node, w_i = h_i; active ones have g_i = gamma.  Returns all w_i, and all g_i."""
    weights = dict(enumerate(times.diff().tolist(), 1))
    return weights, dict.fromkeys(active, compensation(weights, active, rho))


def lagrange_piece(times: Tensor, i_a: int, i_b: int, rho: float, node_discount: float) -> Piece:
    """Three nodes from i_a to i_b + 1, as evenly as indices allow (all, if there are fewer), with Lagrange's weights.

    Between two indices the second node is that with even T - i, as in FlowBP, which counts from the noise.  g is gamma
    at the first node and delta gamma at the second; the third is a constant, and x_b itself is no node.
    """
    t, T = times.tolist(), steps_of(times)
    nodes = sorted({i_a, T - round(T - (i_a + i_b + 1) / 2), i_b + 1}, reverse=True)
    weights = dict(zip(nodes, lagrange_weights([t[i] for i in nodes], t[i_a], t[i_b])))
    gamma = compensation(weights, nodes[:2], rho)
    return Piece(i_a, i_b, weights, dict(zip(nodes, (gamma, node_discount * gamma))))


def lagrange_weights(nodes: list[float], t: float, s: float) -> list[float]:
    """w_i = integral from s to t of the basis polynomial that is 1 at node i and 0 at the others.

    nodes: up to three times.  Simpson's rule is exact here: it integrates polynomials of degree three.
    """

    def basis(node: float, u: float) -> float:
        return math.prod((u - other) / (node - other) for other in nodes if other != node)

    return [(t - s) / 6 * (basis(node, t) + 4 * basis(node, (t + s) / 2) + basis(node, s)) for node in nodes]


# ---------------------------------------------------- Random draws ---------------------------------------------------
def late_draw(i_a: int, i_b: int, n: int, late_bias: float, generator: Generator) -> list[int]:
    """n distinct timesteps of i_a .. i_b + 1, descending, each drawn with probability ~ (i_a - i + 1)^late_bias."""
    check_generator(generator)
    if n == 0:
        return []
    odds = torch.arange(1.0, i_a - i_b + 1, device=generator.device) ** late_bias
    drawn = torch.multinomial(odds / odds.max(), n, replacement=False, generator=generator)
    return sorted((i_a - f for f in drawn.tolist()), reverse=True)


def sample_thirds(T: int, generator: Generator) -> tuple[int, int]:
    """(i_k, i_j) from three lengths of about T Dirichlet(2.5, 6, 2), each at least 1, the first next to the image.

    i_j = 1 + first, i_k = 1 + first + second.  Gamma(a) is half a sum of 2a squared normals, so 5, 12 and 4 of them.
    """
    check_generator(generator)
    require(T >= 3, f"T={T} must be at least 3: lagrange splits the run in three")
    squares = torch.randn(21, generator=generator, device=generator.device).square()
    share = [part.sum().item() / squares.sum().item() for part in squares.split([5, 12, 4])]
    first = min(max(round(T * share[0]), 1), T - 2)
    second = min(max(round(T * share[1]), 1), T - 1 - first)
    return 1 + first + second, 1 + first


def sample_strata(T: int, K: int, generator: Generator) -> list[int]:
    """One timestep of each of K parts of 1..T, as equal as indices allow; descending."""
    return [int(uniform_integers(n * T // K + 1, (n + 1) * T // K, generator)) for n in reversed(range(K))]


# ---------------------------------------------------- The methods ----------------------------------------------------
def sparse(velocity, x_T, times, hyper, generator, step=leap) -> Endpoints:
    """FlowBP's Sparse: K timesteps of the whole run, gradient to theta alone; T evaluations, weight 1.

    dx_0/dtheta = -gamma sum_{i in A} h_i dv_i/dtheta.  Late timesteps are drawn more often, and their probabilities
    are not divided out.
    """
    T = _check_K(times, hyper)
    active = late_draw(T, 0, hyper.K, hyper.late_bias, generator)
    piece = Piece(T, 0, *sum_run(times, active, hyper.rho))
    _, x_0 = surrogate(velocity, stop_gradient(x_T), times, piece, 0, step)
    yield x_0, x_0.new_ones(len(x_0)), {"timesteps": tuple(active)}


def bridge(velocity, x_T, times, hyper, generator, step=leap) -> Endpoints:
    """FlowBP's Bridge: K timesteps around a state x_j that passes gradient on; T evaluations, weight 1.

    dx_0/dtheta = -gamma S + alpha gamma^2 h_j dv_j/dx_j S_j, where S = sum h_i dv_i/dtheta over the active timesteps,
    and S_j is its part before j.  j, the lower index of a pair, is one of the K; the others are shared by the pieces
    T -> j and j -> 0, by their lengths, the first of which has at least one if K > 1.
    """
    T, K, b = _check_K(times, hyper), hyper.K, hyper.late_bias
    _, i_j = sample_pair(T, generator)
    n = min(max(round(K * (T - i_j) / T), 1), T - i_j, K - 1)
    active = [*late_draw(T, i_j, n, b, generator), i_j]
    active += late_draw(i_j - 1, 0, min(K - n, i_j) - 1, b, generator)
    x, nodes = stop_gradient(x_T), sum_run(times, active, hyper.rho)
    for i_a, i_b in ((T, i_j), (i_j, 0)):
        _, x = surrogate(velocity, x, times, Piece(i_a, i_b, *nodes), hyper.alpha, step)
    yield x, x.new_ones(len(x)), {"i_j": i_j, "timesteps": tuple(active)}


def lagrange(velocity, x_T, times, hyper, generator, step=leap) -> Endpoints:
    """FlowBP's Lagrange: two leaps k -> j -> 0 of up to three nodes each; T evaluations, weight as LeapAlign's.

    dx_0/dtheta = G_j + G_0 - alpha gamma_0 w_j dv_j/dx_j G_j.  Over a leap, G = -gamma (w_a dv_a + delta w_m dv_m) with
    start a and second node m.  On an even grid a leap over two steps gives its start the weight 0.
    """
    i_k, i_j = sample_thirds(steps_of(times), generator)
    x_k = rollout(velocity, x_T, times, i_k, step)[0]
    to_j, to_0 = (lagrange_piece(times, *ends, hyper.rho, hyper.node_discount) for ends in ((i_k, i_j), (i_j, 0)))
    x_hat_j, x_j = surrogate(velocity, x_k, times, to_j, hyper.alpha, step)
    x_hat_0, x_0 = surrogate(velocity, x_j, times, to_0, hyper.alpha, step)
    d_j, d_0 = distances(LeapTrajectory(x_0, x_hat_0, x_j, x_hat_j))
    yield x_0, weight_of(d_j, d_0, hyper.tau), {"i_k": i_k, "i_j": i_j, "d_j": d_j, "d_0": d_0}


def stratified(velocity, x_T, times, hyper, generator, step=leap) -> Endpoints:
    """Ours: LeapAlign with K leaps, from one timestep of each of K equal parts of the run.

    w = 1 / sum over the leaps of max(d, tau).  K = T and alpha = 1 give the exact gradient of an Euler run.  The
    backward evaluates every leap but the last again: one graph at a time for any K.  T + K - 1 evaluations.
    """
    T, gap = _check_K(times, hyper), 0
    indices = sample_strata(T, hyper.K, generator)
    x = rollout(velocity, x_T, times, indices[0], step)[0]
    for i_a, i_b in pairwise([*indices, 0]):
        piece = Piece(i_a, i_b, {i_a: (times[i_a] - times[i_b]).item()}, {i_a: 1})
        x_hat, x = surrogate(recomputed(velocity) if i_b else velocity, x, times, piece, hyper.alpha, step)
        gap = gap + stop_gradient(x - x_hat).abs().reshape(len(x), -1).mean(1).clamp(min=hyper.tau)
    yield x, 1 / gap, {"timesteps": tuple(indices)}


def leap_align_per_sample(velocity, x_T, times, hyper, generator, step=leap) -> Endpoints:
    """Ours: LeapAlign with a pair of timesteps a sample instead of one a batch; T + 2 evaluations."""
    B, rows = batch_of(x_T, generator)
    i_k, i_j = (i[rows] for i in sample_pair(steps_of(times), generator, hyper.low, hyper.high, B))
    states = rollout(velocity, x_T, times, 0, step)
    trajectory = leap_trajectory(velocity, states, times, i_k, i_j, hyper.alpha)
    d_j, d_0 = distances(trajectory)
    yield trajectory.x_0, weight_of(d_j, d_0, hyper.tau), {"i_k": i_k, "i_j": i_j, "d_j": d_j, "d_0": d_0}


def recomputed(velocity: Velocity) -> Velocity:
    """The velocity, evaluated again in the backward: the graph of one evaluation lives at a time.

    A velocity that runs its own backward (runtime/backward.py) has such a form of its own.
    """
    checkpointed = partial(checkpoint, velocity, use_reentrant=False, preserve_rng_state=False)
    return getattr(velocity, "recomputed", checkpointed)


def _check_K(times: Tensor, hyper: Hyper) -> int:
    """T of the grid; refuses a K larger than T."""
    T = steps_of(times)
    require(hyper.K <= T, f"K={hyper.K} must be at most T={T}")
    return T


METHODS = {method.__name__: method for method in (sparse, bridge, lagrange, stratified, leap_align_per_sample)}
DEFAULTS: dict[str, dict[str, Any]] = {
    "sparse": {"K": 3, "late_bias": 2.0, "rho": 1.0},
    "bridge": {"K": 5, "late_bias": 2.0, "rho": 1.0, "alpha": 0.1},
    "lagrange": {"alpha": 0.1, "tau": 0.2, "rho": 0.5, "node_discount": 0.25},
    "stratified": {"K": 3, "alpha": 1.0},
}
"""Each method's own hyperparameters: FlowBP's for FLUX.1, and ours."""
