"""LeapAlign (arXiv 2604.15311) as code: every equation of the method, in the paper's order and symbols.

The idea.  Sample an image without gradient.  Pick two of the visited timesteps, k > j.  Join the real states
x_k, x_j, x_0 by two one-step leaps whose *values* are replaced by the real states (connectors), so that the
reward sees the real image while its gradient reaches the network through two evaluations instead of T.

Time.  Noise is t = 1, the image is t = 0.  A grid `times` (T+1,) ascends from times[0] = 0 to times[T] = 1 and is
indexed by the paper's discrete timestep: state x[i] stands at times[i].  Grids may be uneven, so the length of a
leap is times[i_k] - times[i_j] and never (i_k - i_j)/T.  Shapes: a batch of states is (B, *S) for any sample shape
S; a time is a number, a () tensor or, with one time a sample, a (B,) tensor in the dtype of the states.

Symbols are the paper's: x_hat_j is x̂_{j|k}, x_hat_0 is x̂_{0|j}; i_k and i_j are the discrete timesteps t_k and t_j, k
and j their times; a_t and b_t are the path's alpha_t and beta_t; lam is lambda, hinge is L_raw, weight is w_sim.
Equations are numbered S in the supplement and M in the main text, and lines are those of Algorithm 1; README.md names
the proof of each.  A bad argument raises BadInput, a ValueError of one line.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Generator, Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]
"""v_theta: x (B, *S) and t, () or (B,), to (B, *S); its condition c is closed over.  States keep the dtype of x_T.  Use
float32 and return v in float32, whatever the network computes in; otherwise every step is rounded to v's precision."""
Step = Callable[[Tensor, Tensor, Tensor | float, Tensor | float], Tensor]
"""A solver's step of a sampling run: x, v, t, s to the state at time s.  `leap` is Euler's; others may remember v."""
Endpoints = Iterator[tuple[Tensor, Tensor, dict]]
"""What a method generates: x_0 (B, *S) with graph, weight (B,), log.  Run the backward of each before the next one."""


class BadInput(ValueError):
    """A wrong argument: one line that names it, its value and what is allowed."""


def require(condition: object, message: str) -> None:
    """Raises BadInput(message) unless the condition holds."""
    if not condition:
        raise BadInput(message)


# ----------------------------------------------------- Time grids ----------------------------------------------------
def uniform_times(T: int) -> Tensor:
    """The even grid: times[i] = i / T, shape (T+1,)."""
    require(isinstance(T, int) and T >= 1, f"T={T} must be a whole number, at least 1")
    return torch.linspace(0, 1, T + 1)


def shifted_times(T: int, shift: float) -> Tensor:
    """The grid of FLUX and SD3, s u / (1 + (s - 1) u) over the even u, (T+1,); s > 1 has more steps near the noise."""
    require(0 < shift < math.inf, f"shift={shift} must be positive and finite")
    u = uniform_times(T)
    return shift * u / (shift * u + (1 - u))  # so written, times[T] is exactly 1


def steps_of(times: Tensor) -> int:
    """T of a grid, which must ascend from 0 to 1."""
    is_row = torch.is_tensor(times) and times.ndim == 1 and len(times) > 1
    if is_row and times[0] == 0 and times[-1] == 1 and (times.diff() > 0).all():
        return len(times) - 1
    rule = "must be a tensor (T+1,) that ascends strictly from 0 (image) to 1 (noise); flip a schedule that descends"
    raise BadInput(f"times={' '.join(repr(times).split()):.60} {rule}")


def _over_batch(t: Tensor | float, x: Tensor) -> Tensor | float:
    """A time that broadcasts over x (B, *S): a number or () stays, (B,) becomes (B, 1, ..., 1)."""
    if not torch.is_tensor(t) or t.shape == ():
        return t
    require(t.shape == x.shape[:1], f"a time of shape {tuple(t.shape)} must be () or (B,) = {tuple(x.shape[:1])}")
    require(torch.result_type(t, x) == x.dtype, f"times of {t.dtype} would promote states of {x.dtype}: give one dtype")
    return t.reshape(-1, *[1] * (x.ndim - 1))


# ---------------------------------------------- Paths and leaps (S2-S9) ----------------------------------------------
def stop_gradient(x: Tensor) -> Tensor:
    """sg(x): the value of x, no gradient."""
    require(torch.is_tensor(x), f"the velocity gave a {type(x).__name__}: return its tensor, such as model(...)[0]")
    return x.detach()


def leap(x: Tensor, v: Tensor, t: Tensor | float, s: Tensor | float) -> Tensor:
    """One-step leap from time t to time s (Eq. S8, S9, M4):  x̂_{s|t} = x_t - (t - s) v.

    x, v (B, *S); t, s a number, () or (B,).  Gradient flows to x and v.  Over one interval: Euler's step.
    """
    require(torch.is_tensor(v), f"the velocity gave a {type(v).__name__}: return its tensor, such as model(...)[0]")
    require(v.shape == x.shape, f"the velocity's shape {tuple(v.shape)} must be the state's, {tuple(x.shape)}")
    return x - _over_batch(t - s, x) * v


class Path(NamedTuple):
    """A path x_t = a_t x_0 + b_t x_1 of image x_0 and noise x_1 (Eq. S2): functions of time and their derivatives."""

    a_t: Callable[[Tensor], Tensor]
    b_t: Callable[[Tensor], Tensor]
    da_t: Callable[[Tensor], Tensor]
    db_t: Callable[[Tensor], Tensor]


RECTIFIED = Path(a_t=lambda t: 1 - t, b_t=lambda t: t, da_t=lambda t: -torch.ones_like(t), db_t=torch.ones_like)


def interpolate(x_0: Tensor, x_1: Tensor, t: Tensor | float, path: Path = RECTIFIED) -> Tensor:
    """A point of the path (Eq. S2):  x_t = a_t x_0 + b_t x_1.  x_0, x_1 (B, *S); t as in `leap`."""
    require(x_0.shape == x_1.shape, f"x_0 of shape {tuple(x_0.shape)} and x_1 of shape {tuple(x_1.shape)} must agree")
    t = _over_batch(t if torch.is_tensor(t) else x_0.new_tensor(t), x_0)
    return path.a_t(t) * x_0 + path.b_t(t) * x_1


def leap_general(x: Tensor, v: Tensor, t: Tensor | float, s: Tensor | float, path: Path) -> Tensor:
    """One-step leap along any path (Eq. S7):  x̂_{s|t} = a_s x̂_{0|t} + b_s x̂_{1|t}.

    S5 is multiplied by a, S6 by b, which are 0 at one end.  Arguments and gradient as in `leap`, equal on RECTIFIED, on
    which all methods leap: a model of another path would need this in place of `leap`.
    """
    require(v.shape == x.shape, f"the velocity's shape {tuple(v.shape)} must be the state's, {tuple(x.shape)}")
    t, s = (_over_batch(t if torch.is_tensor(t) else x.new_tensor(t), x) for t in (t, s))
    a, b, da, db = (f(t) for f in path)
    x_hat_1 = (a * v - da * x) / (a * db - da * b)  # S5
    x_hat_0 = (db * x - b * v) / (a * db - da * b)  # S6
    return path.a_t(s) * x_hat_0 + path.b_t(s) * x_hat_1  # S7


# ---------------------------------------- Connectors and gradient discounting ----------------------------------------
def connect(x_hat: Tensor, x: Tensor) -> Tensor:
    """Latent connector (Eq. S11, S13, M5, M7):  the value of the real state x, the gradient of x̂ alone; (B, *S)."""
    require(x_hat.shape == x.shape, f"x_hat of shape {tuple(x_hat.shape)} and x of shape {tuple(x.shape)} must agree")
    # Exactly x in every dtype; the printed x̂ + sg(x - x̂), of equal gradient, is off by up to 1.6e-2 in bfloat16.
    return stop_gradient(x) + (x_hat - stop_gradient(x_hat))


def discount(x: Tensor, alpha: float) -> Tensor:
    """Gradient discounting (Eq. S17, M9), alpha x + (1 - alpha) sg(x):  the value of x, its gradient times alpha."""
    require(0 <= alpha <= 1, f"alpha={alpha} must lie in [0, 1]")
    return stop_gradient(x) + alpha * (x - stop_gradient(x))  # so written, exactly x


# ------------------------------------------- The leap trajectory (S10-S13) -------------------------------------------
@torch.no_grad()
def rollout(velocity: Velocity, x_T: Tensor, times: Tensor, i_end: int = 0, step: Step = leap) -> list[Tensor]:
    """Sampling from noise x_T (B, *S) down to timestep i_end, Euler's by default; T - i_end evaluations, no gradient.

    Returns the states in the order of the grid, [x_{i_end}, ..., x_T]: with i_end = 0, states[i] stands at times[i].
    """
    T = steps_of(times)
    require(0 <= i_end <= T, f"i_end={i_end} must lie in 0..T={T}")
    states = [stop_gradient(x_T)]
    for i in range(T, i_end, -1):
        x_t = states[-1]
        states.append(step(x_t, velocity(x_t, times[i]), times[i], times[i - 1]))
    return states[::-1]


class LeapTrajectory(NamedTuple):
    """A leap trajectory x_k -> x̂_{j|k} ⇢ x_j -> x̂_{0|j} ⇢ x_0.  All (B, *S).

    x_0 and x_j are connected: they have the values of the real states and the gradients of x_hat_0 and x_hat_j.
    """

    x_0: Tensor
    x_hat_0: Tensor
    x_j: Tensor
    x_hat_j: Tensor


def leap_trajectory(
    velocity: Velocity, states: list[Tensor], times: Tensor, i_k: int | Tensor, i_j: int | Tensor, alpha: float
) -> LeapTrajectory:
    """The two leaps between recorded states (Eq. S10-S13 with S17); two evaluations, both with gradient.

    states: what `rollout` returned, T+1 of (B, *S).  i_k > i_j >= 1: one pair for the batch (ints) or a pair a
    sample ((B,) integer tensors).  Gradient reaches theta through both evaluations; the states are constants.
    """
    T, n = steps_of(times), len(states)
    require(n == T + 1, f"{n} states do not fit {T + 1} times: record all of them with rollout()")
    _check_pair(i_k, i_j, T, len(states[0]))
    x_k, x_j, x_0 = stop_gradient(_at(states, i_k)), _at(states, i_j), states[0]
    k, j = times[i_k], times[i_j]
    x_hat_j = leap(x_k, velocity(x_k, k), k, j)  # S10
    x_j = connect(x_hat_j, x_j)  # S11
    x_hat_0 = leap(x_j, velocity(discount(x_j, alpha), j), j, 0)  # S12, S17: alpha scales the network's input alone
    return LeapTrajectory(connect(x_hat_0, x_0), x_hat_0, x_j, x_hat_j)  # S13


def leap_rollout(
    velocity: Velocity, x_T: Tensor, times: Tensor, i_k: int, i_j: int, alpha: float, step: Step = leap
) -> LeapTrajectory:
    """`rollout` and `leap_trajectory` in one pass (Algorithm 1): T evaluations, two of them with gradient.

    The rollout's own evaluations at k and j serve the leaps, so the batch shares one pair; same values and gradients.
    """
    T = steps_of(times)
    _check_pair(i_k, i_j, T)
    x_t = stop_gradient(x_T)
    for i in range(T, 0, -1):
        t = times[i]
        if i == i_k:
            v = velocity(x_t, t)
            x_hat_j = leap(x_t, v, t, times[i_j])  # S10, line 29
        elif i == i_j:
            x_j = connect(x_hat_j, x_t)  # S11, line 20
            v = velocity(discount(x_j, alpha), t)  # S17, line 21
            x_hat_0 = leap(x_j, v, t, 0)  # S12, line 31
        else:
            with torch.no_grad():
                v = velocity(x_t, t)
        # Only the value of v (lines 32, 33); otherwise every later state would carry the graph of v_k.
        x_t = step(x_t, stop_gradient(v), t, times[i - 1])
    return LeapTrajectory(connect(x_hat_0, x_t), x_hat_0, x_j, x_hat_j)  # S13, line 38


def _at(states: list[Tensor], i: int | Tensor) -> Tensor:
    """States x_i (B, *S) for one index, or for one index a sample."""
    return torch.stack(states)[i, torch.arange(len(i), device=i.device)] if torch.is_tensor(i) and i.ndim else states[i]


def _check_pair(i_k: int | Tensor, i_j: int | Tensor, T: int, B: int | None = None) -> None:
    """1 <= i_j < i_k <= T; two ints or, with B, two tensors of (B,)."""
    ks, js = torch.as_tensor(i_k), torch.as_tensor(i_j)
    fits = ks.shape == js.shape and ks.shape in ((), (B,)) and not (ks.is_floating_point() or js.is_floating_point())
    wanted = "two ints, one pair a batch" if B is None else f"two ints or two integer tensors of ({B},)"
    require(fits, f"i_k={ks.tolist()}, i_j={js.tolist()} must be {wanted}")
    for k, j in zip(ks.reshape(-1).tolist(), js.reshape(-1).tolist()):
        require(1 <= j < k <= T, f"i_k={k}, i_j={j} must satisfy 1 <= i_j < i_k <= T={T}")


# ---------------------------------------------- The objective (M11-M13) ----------------------------------------------
def differentiable(reward: Tensor, x_0: Tensor) -> Tensor:
    """The reward unchanged, if it can be trained on: a tensor (B,) for x_0 (B, *S), and both require grad."""
    B = tuple(x_0.shape[:1])
    require(torch.is_tensor(reward), f"a reward of type {type(reward).__name__} must be a tensor (B,) = {B}")
    require(reward.shape == B, f"reward of shape {tuple(reward.shape)} must be (B,) = {B}")
    require(x_0.requires_grad, "x_0 does not require grad: look for no_grad, detach or frozen weights in the velocity")
    require(reward.requires_grad, "the reward does not require grad, but x_0 does: look for no_grad, detach or PIL")
    return reward


def checked(reward: Tensor, x_0: Tensor) -> Tensor:
    """`differentiable`, and also finite: for a training loop that has no other protection against NaN."""
    bad = (~differentiable(reward, x_0).isfinite()).nonzero()[:, 0].tolist()
    require(not bad, f"the reward is not finite for samples {bad[:5]} of {len(reward)}: lower lr, or inspect them")
    return reward


def hinge(reward: Tensor, lam: float | None) -> Tensor:
    """L_raw (Eq. M11):  max(0, lambda - r), (B,) to (B,).  lam=None gives -r, as Algorithm 1 prints it."""
    require(reward.ndim == 1, f"reward of shape {tuple(reward.shape)} must be (B,): one number a sample")
    require(lam is None or math.isfinite(lam), f"lam={lam} must be a finite number, or None for no hinge")
    return -reward if lam is None else torch.relu(lam - reward)


def distances(trajectory: LeapTrajectory) -> tuple[Tensor, Tensor]:
    """d_j, d_0 (Eq. M12): mean |x - x̂| of each sample at the two connectors, both (B,), no gradient."""
    x_0, x_hat_0, x_j, x_hat_j = trajectory
    d_j = stop_gradient(x_j - x_hat_j).abs().reshape(len(x_0), -1).mean(1)
    d_0 = stop_gradient(x_0 - x_hat_0).abs().reshape(len(x_0), -1).mean(1)
    return d_j, d_0


def similarity_weight(trajectory: LeapTrajectory, tau: float) -> Tensor:
    """Trajectory-similarity weight (Eq. M12) of a trajectory's `distances`; (B,), no gradient."""
    return weight_of(*distances(trajectory), tau)


def weight_of(d_j: Tensor, d_0: Tensor, tau: float) -> Tensor:
    """w_sim (Eq. M12):  1 / (max(d_j, tau) + max(d_0, tau)), (B,); a perfect fit has weight 1 / (2 tau)."""
    require(0 < tau < math.inf, f"tau={tau} must be positive and finite")
    return 1 / (d_j.clamp(min=tau) + d_0.clamp(min=tau))


def objective(reward: Tensor, weight: Tensor, lam: float | None) -> Tensor:
    """The loss (Eq. M13):  mean over the batch of sg(w_sim) max(0, lambda - r); reward, weight (B,) to ()."""
    r, w = tuple(reward.shape), tuple(weight.shape)
    require(r == w, f"reward of shape {r} and weight of {w} must both be (B,)")
    return (stop_gradient(weight) * hinge(reward, lam)).mean()


# ------------------------------------- Algorithm 1: hyperparameters and methods -------------------------------------
@dataclass(frozen=True)
class Hyper:
    """The methods' hyperparameters, with the paper's values for HPSv2.1 on FLUX."""

    alpha: float = 0.3  # Discount of the nested gradient, in [0, 1] (alpha; leap_align).
    tau: float = 0.1  # Lower bound of the distances in the similarity weight (tau; leap_align).
    lam: float | None = 0.55  # Reward above which a sample gives no gradient (lambda; all methods); None: -reward.
    m: int = 11  # Early stop: the last timestep is drawn from 1..m (m; refl, drtune).
    K: int = 2  # Trained timesteps (K; drtune).
    n: int = 2  # Re-noised copies of the image (n; draft_lv).
    low: int = 1  # Least timestep of a pair (leap_align).
    high: int | None = None  # Greatest timestep of a pair, None for T (leap_align).

    def __post_init__(self) -> None:
        one = torch.ones(1)  # these functions check their hyperparameter
        discount(one, self.alpha), weight_of(one, one, self.tau), hinge(one, self.lam)
        for name, least in (("m", 1), ("K", 1), ("n", 0)):
            n = getattr(self, name)
            require(isinstance(n, int) and n >= least, f"{name}={n} must be a whole number, at least {least}")


# velocity: v_theta; x_T (B, *S): noise; times (T+1,): the grid; every draw comes from generator; step: the solver.
def refl(velocity, x_T, times, hyper, generator, step=leap) -> Endpoints:
    """ReFL: sample without gradient, stop early at t_min, leap to the image with gradient."""
    T, m = steps_of(times), hyper.m
    require(m <= T, f"m={m} must be at most T={T}")
    i_min = int(uniform_integers(1, m, generator))  # line 2
    x_t, t = rollout(velocity, x_T, times, i_min, step)[0], times[i_min]
    x_0 = leap(x_t, velocity(x_t, t), t, 0)  # line 25
    yield x_0, x_0.new_ones(len(x_0)), {"i_min": i_min}


def draft_lv(velocity, x_T, times, hyper, generator, step=leap) -> Endpoints:
    """DRaFT-LV: gradient through the last step, then through n more last steps from re-noised copies of the image."""
    x_1, t = rollout(velocity, x_T, times, 1, step)[0], times[1]
    x_0 = step(x_1, velocity(x_1, t), t, times[0])  # line 34
    weight, image = x_0.new_ones(len(x_0)), stop_gradient(x_0)
    yield x_0, weight, {}
    for _ in range(hyper.n):  # line 43
        x_1 = interpolate(image, _noise_like(image, generator), t)  # line 45
        yield leap(x_1, velocity(x_1, t), t, 0), weight, {}  # line 46, Euler's step


def drtune(velocity, x_T, times, hyper, generator, step=leap) -> Endpoints:
    """DRTune: gradient through the outputs of K evenly spaced timesteps, never through the input; early stop."""
    T, K = steps_of(times), hyper.K
    require(K <= T, f"K={K} must be at most T={T}")
    most = 1 + (K - 1) * (T // K)
    require(hyper.m <= most, f"m={hyper.m} must be at most 1 + (K-1)*floor(T/K) = {most}, or it may train no timestep")
    i_min = int(uniform_integers(1, hyper.m, generator))  # line 2
    s = int(uniform_integers(1, T - (K - 1) * (T // K), generator))  # line 4
    i_train = {s + i * (T // K) for i in range(K)}  # line 5
    x_t = stop_gradient(x_T)
    for i in range(T, i_min - 1, -1):
        with nullcontext() if i in i_train else torch.no_grad():
            v = velocity(stop_gradient(x_t), times[i])  # lines 16-18
        x_t = step(x_t, v, times[i], times[i - 1]) if i > i_min else leap(x_t, v, times[i], 0)  # line 34; 25 at t_min
    yield x_t, x_t.new_ones(len(x_t)), {"i_min": i_min, "s": s}


def leap_align(velocity, x_T, times, hyper, generator, step=leap) -> Endpoints:
    """LeapAlign: gradient through two leaps between states of the rollout; weight by how well they match it."""
    i_k, i_j = sample_pair(steps_of(times), generator, hyper.low, hyper.high)  # line 7
    trajectory = leap_rollout(velocity, x_T, times, i_k, i_j, hyper.alpha, step)
    d_j, d_0 = distances(trajectory)
    yield trajectory.x_0, weight_of(d_j, d_0, hyper.tau), {"i_k": i_k, "i_j": i_j, "d_j": d_j, "d_0": d_0}  # line 37


def full_backprop(velocity, x_T, times, hyper, generator, step=leap) -> Endpoints:
    """What the methods avoid: gradient through all T steps of the sampling run; memory holds T evaluations."""
    x_t = stop_gradient(x_T)
    for i in range(steps_of(times), 0, -1):
        x_t = step(x_t, velocity(x_t, times[i]), times[i], times[i - 1])
    yield x_t, x_t.new_ones(len(x_t)), {}


METHODS = {method.__name__: method for method in (leap_align, refl, draft_lv, drtune, full_backprop)}


# ---------------------------------------------------- Random draws ---------------------------------------------------
def sample_pair(T: int, generator: Generator, low: int = 1, high: int | None = None, size: int | None = None) -> tuple:
    """Timesteps (i_k, i_j), uniform over all pairs low <= i_j < i_k <= high (Algorithm 1, line 7).

    Two ints, or with a size two (size,) integer tensors.  i_j is never 0: the second leap would have no length.
    """
    high = T if high is None else high
    require(1 <= low < high <= T, f"low={low}, high={high} must satisfy 1 <= low < high <= T={T}")
    a, b = uniform_integers(low, high, generator, size), uniform_integers(low, high - 1, generator, size)
    b = b + (b >= a)  # skip a: all other indices are equally likely
    i_k, i_j = torch.maximum(a, b), torch.minimum(a, b)
    return (int(i_k), int(i_j)) if size is None else (i_k, i_j)


def uniform_integers(low: int, high: int, generator: Generator, size: int | None = None) -> Tensor:
    """Uniform integers, both ends included as in the paper; () or (size,)."""
    check_generator(generator)
    return torch.randint(low, high + 1, () if size is None else (size,), generator=generator, device=generator.device)


def _noise_like(x: Tensor, generator: Generator) -> Tensor:
    """Gaussian noise with the shape, dtype and device of x, drawn on the generator's device."""
    check_generator(generator)
    B, rows = batch_of(x, generator)
    return torch.randn(B, *x.shape[1:], generator=generator, dtype=x.dtype, device=generator.device)[rows].to(x.device)


def batch_of(x: Tensor, generator: Generator) -> tuple[int, slice]:
    """Size of the whole batch and the rows of x in it; runtime.backward.BatchGenerator holds both, else x is all."""
    return getattr(generator, "batch_size", len(x)), getattr(generator, "rows", slice(None))


def check_generator(generator: Generator) -> None:
    require(isinstance(generator, Generator), f"generator={generator} must be a torch.Generator: draws are seeded")
