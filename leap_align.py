"""LeapAlign (arXiv 2604.15311) as code: every equation of the method, in the paper's order and symbols.

The idea.  Sample an image without gradient.  Pick two of the visited timesteps, k > j.  Join the real states
x_k, x_j, x_0 by two one-step leaps whose *values* are replaced by the real states (connectors), so that the
reward sees the real image while its gradient reaches the network through two evaluations instead of T.

Time.  Noise is t = 1, the image is t = 0.  A grid `times` (T+1,) ascends from times[0] = 0 to times[T] = 1 and is
indexed by the paper's discrete timestep: state x[i] stands at times[i].  Grids may be uneven, so the length of a
leap is times[i_k] - times[i_j] and never (i_k - i_j)/T.  Shapes: a batch of states is (B, *S) for any sample shape
S; a time is a number, a () tensor or, with one time a sample, a (B,) tensor in the dtype of the states.

    paper             code                 paper                 code
    x_T x_k x_j x_0   x_T x_k x_j x_0      alpha (discount)      alpha
    x̂_{j|k} x̂_{0|j}   x_hat_j x_hat_0      alpha_t beta_t (path) a_t b_t
    k j (times)       k j                  lambda tau            lam tau
    t_k t_j (indices) i_k i_j              r L_raw               reward hinge
    v_theta sg        velocity             d_j d_0 w_sim         d_j d_0 weight
                      stop_gradient        t_min m s K n         i_min m s K n

    equation (S: the supplement, M: the main text)                  here
    S2        x_t = a_t x_0 + b_t x_1, the path                     Path, RECTIFIED, COSINE, interpolate
    S5-S7     leap along any path                                   leap_general
    S8, S9    x̂_{j|k} = x_k - (k - j) v(x_k)               (M4)     leap
    S11, S13  x = x̂ + sg(x - x̂), the connectors        (M5, M7)     connect
    S17       v(alpha x + (1 - alpha) sg(x))               (M9)     discount
    S10-S13   the leap trajectory, from recorded states  (M4-M7)    leap_trajectory
    Alg. 1    the same in one pass over the timesteps               leap_rollout
    M11       L_raw = max(0, lambda - r)                            hinge
    M12       w = 1 / (max(d_j, tau) + max(d_0, tau))               distances, similarity_weight
    M13       L = sg(w) L_raw                                       objective (differentiable, checked: its reward)
    Alg. 1    the direct-gradient methods                           refl, draft_lv, drtune, leap_align
    S16, S18  the gradient that follows                             proven in tests/test_gradient.py
              the same gradient, one evaluation at a time           cut, CutVelocity
"""

import math
from collections.abc import Callable, Generator, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import wraps
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]
"""v_theta: x (B, *S) and t, () or (B,), to (B, *S); its condition c is closed over.  States keep the dtype of x_T.  Use
float32 and return v in float32, whatever the network computes in; otherwise every step is rounded to v's precision."""
Step = Callable[[Tensor, Tensor, Tensor | float, Tensor | float], Tensor]
"""A solver's step of a sampling run: x, v, t, s to the state at time s.  `leap` is Euler's; others may remember v."""


class BadInput(ValueError):
    """A wrong argument: one line that names it, its value and what is allowed."""


def require(condition: object, message: str) -> None:
    """Raises BadInput(message) unless the condition holds."""
    if not condition:
        raise BadInput(message)


def _check_hyper(alpha: float = 0, tau: float = 1, lam: float | None = None) -> None:
    if not 0 <= alpha <= 1:
        raise BadInput(f"alpha={alpha} must lie in [0, 1]")
    if not 0 < tau < math.inf:
        raise BadInput(f"tau={tau} must be positive and finite")
    if lam is not None and not math.isfinite(lam):
        raise BadInput(f"lam={lam} must be a finite number, or None for no hinge")


# ---------------------------------------------------------------------------------------------------------------------
# Time
# ---------------------------------------------------------------------------------------------------------------------


def uniform_times(T: int) -> Tensor:
    """The even grid: times[i] = i / T, shape (T+1,)."""
    if T < 1:
        raise BadInput(f"T={T} must be at least 1")
    return torch.linspace(0, 1, T + 1)


def shifted_times(T: int, shift: float) -> Tensor:
    """The grid of FLUX and SD3: s u / (1 + (s - 1) u) over the even grid u, shape (T+1,).

    A shift s > 1 spends more steps near the noise.  The denominator is written s u + (1 - u), which is the same
    number, so that times[T] is exactly 1.
    """
    if not 0 < shift < math.inf:
        raise BadInput(f"shift={shift} must be positive and finite")
    u = uniform_times(T)
    return shift * u / (shift * u + (1 - u))


def _steps(times: Tensor) -> int:
    """T of a grid, which must ascend from 0 to 1."""
    if not torch.is_tensor(times):
        raise BadInput(f"times={times!r:.40} must be a tensor (T+1,), as from uniform_times")
    if times.ndim != 1 or len(times) < 2 or times[0] != 0 or times[-1] != 1 or not (times.diff() > 0).all():
        shown = ", ".join(f"{t:g}" for t in times.flatten()[:3].tolist())
        raise BadInput(
            f"times=[{shown}, ...] of shape {tuple(times.shape)} must ascend strictly from 0 (image) to 1 (noise); "
            "flip a schedule that descends"
        )
    return len(times) - 1


def _over_batch(t: Tensor | float, x: Tensor) -> Tensor | float:
    """A time that broadcasts over x (B, *S): a number or () stays, (B,) becomes (B, 1, ..., 1)."""
    if not torch.is_tensor(t):
        return t
    if t.shape not in ((), x.shape[:1]):
        raise BadInput(f"a time of shape {tuple(t.shape)} must be () or (B,) = {tuple(x.shape[:1])}")
    if t.ndim and torch.promote_types(t.dtype, x.dtype) != x.dtype:
        raise BadInput(f"times of {t.dtype} would promote states of {x.dtype}: give both one dtype")
    return t.reshape(-1, *[1] * (x.ndim - 1)) if t.ndim else t


# ---------------------------------------------------------------------------------------------------------------------
# Leaps
# ---------------------------------------------------------------------------------------------------------------------


def stop_gradient(x: Tensor) -> Tensor:
    """sg(x): the value of x, no gradient."""
    return x.detach()


def leap(x: Tensor, v: Tensor, t: Tensor | float, s: Tensor | float) -> Tensor:
    """One-step leap from time t to time s (Eq. S8, S9, M4):  x̂_{s|t} = x_t - (t - s) v.

    x, v (B, *S); t, s a number, () or (B,).  Gradient flows to x and v.  Over one interval of the grid a leap
    is the Euler step.  Raises BadInput if the shapes differ.
    """
    if v.shape != x.shape:
        raise BadInput(f"the velocity's shape {tuple(v.shape)} must be the state's, {tuple(x.shape)}")
    return x - (_over_batch(t, x) - _over_batch(s, x)) * v


class Path(NamedTuple):
    """A path x_t = a_t x_0 + b_t x_1 between image x_0 and noise x_1 (Eq. S2): four functions of a time tensor."""

    a_t: Callable[[Tensor], Tensor]
    b_t: Callable[[Tensor], Tensor]
    da_t: Callable[[Tensor], Tensor]
    db_t: Callable[[Tensor], Tensor]


RECTIFIED = Path(
    a_t=lambda t: 1 - t,
    b_t=lambda t: t,
    da_t=lambda t: -torch.ones_like(t),
    db_t=lambda t: torch.ones_like(t),
)
COSINE = Path(
    a_t=lambda t: torch.cos(t * math.pi / 2),
    b_t=lambda t: torch.sin(t * math.pi / 2),
    da_t=lambda t: -math.pi / 2 * torch.sin(t * math.pi / 2),
    db_t=lambda t: math.pi / 2 * torch.cos(t * math.pi / 2),
)


def interpolate(x_0: Tensor, x_1: Tensor, t: Tensor | float, path: Path = RECTIFIED) -> Tensor:
    """A point of the path (Eq. S2):  x_t = a_t x_0 + b_t x_1.  x_0, x_1 (B, *S); t as in `leap`."""
    if x_0.shape != x_1.shape:
        raise BadInput(f"x_0 of shape {tuple(x_0.shape)} and x_1 of shape {tuple(x_1.shape)} must agree")
    t = _over_batch(t if torch.is_tensor(t) else x_0.new_tensor(t), x_0)
    return path.a_t(t) * x_0 + path.b_t(t) * x_1


def leap_general(x: Tensor, v: Tensor, t: Tensor | float, s: Tensor | float, path: Path) -> Tensor:
    """One-step leap along any path (Eq. S7):  x̂_{s|t} = a_s x̂_{0|t} + b_s x̂_{1|t}.

    Eq. S5 and S6 are multiplied out: they divide by a ḃ - ȧ b, not by a or b, which are 0 at one end of the path.
    For RECTIFIED this is `leap`, with the same arguments, gradient and errors.
    """
    if v.shape != x.shape:
        raise BadInput(f"the velocity's shape {tuple(v.shape)} must be the state's, {tuple(x.shape)}")
    t, s = (_over_batch(t if torch.is_tensor(t) else x.new_tensor(t), x) for t in (t, s))
    a, b, da, db = (f(t) for f in path)
    x_hat_1 = (a * v - da * x) / (a * db - da * b)  # S5
    x_hat_0 = (db * x - b * v) / (a * db - da * b)  # S6
    return path.a_t(s) * x_hat_0 + path.b_t(s) * x_hat_1  # S7


def connect(x_hat: Tensor, x: Tensor) -> Tensor:
    """Latent connector (Eq. S11, S13, M5, M7):  the value of the real state x, the gradient of x̂.

    The paper's x̂ + sg(x - x̂) has a rounding error (up to 1.6e-2 in bfloat16).  Written as sg(x) + (x̂ - sg(x̂)),
    it has the same gradient and is exactly x in every dtype.  Shapes (B, *S); x receives no gradient.
    """
    if x_hat.shape != x.shape:
        raise BadInput(f"x_hat of shape {tuple(x_hat.shape)} and x of shape {tuple(x.shape)} must agree")
    return stop_gradient(x) + (x_hat - stop_gradient(x_hat))


def discount(x: Tensor, alpha: float) -> Tensor:
    """Gradient discounting (Eq. S17, M9):  the value of x, its gradient scaled by alpha in [0, 1].

    The paper's alpha x + (1 - alpha) sg(x), written as sg(x) + alpha (x - sg(x)), so that the value is exactly x.
    """
    _check_hyper(alpha=alpha)
    return stop_gradient(x) + alpha * (x - stop_gradient(x))


# ---------------------------------------------------------------------------------------------------------------------
# The leap trajectory
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def rollout(velocity: Velocity, x_T: Tensor, times: Tensor, i_end: int = 0, step: Step = leap) -> list[Tensor]:
    """Sampling from noise x_T (B, *S) down to timestep i_end, Euler's by default; T - i_end evaluations, no gradient.

    Returns the states in the order of the grid, [x_{i_end}, ..., x_T]: with i_end = 0, states[i] stands at times[i].
    """
    T = _steps(times)
    if not 0 <= i_end <= T:
        raise BadInput(f"i_end={i_end} must lie in 0..T={T}")
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
    if len(states) != _steps(times) + 1:
        raise BadInput(f"{len(states)} states do not fit {len(times)} times: record all of them with rollout()")
    _check_pair(i_k, i_j, len(times) - 1, len(states[0]))
    x_k, x_j, x_0 = stop_gradient(_at(states, i_k)), _at(states, i_j), states[0]
    k, j = times[i_k], times[i_j]

    x_hat_j = leap(x_k, velocity(x_k, k), k, j)  # S10
    x_j = connect(x_hat_j, x_j)  # S11
    x_hat_0 = leap(x_j, velocity(discount(x_j, alpha), j), j, 0)  # S12, S17: alpha scales the network's input alone
    x_0 = connect(x_hat_0, x_0)  # S13
    return LeapTrajectory(x_0, x_hat_0, x_j, x_hat_j)


def leap_rollout(
    velocity: Velocity, x_T: Tensor, times: Tensor, i_k: int, i_j: int, alpha: float, step: Step = leap
) -> LeapTrajectory:
    """`rollout` and `leap_trajectory` in one pass (Algorithm 1): T evaluations, two of them with gradient.

    The rollout's own evaluations at k and j serve the leaps, which saves two; so the batch shares one pair (ints).
    Values and gradients are those of the two-pass form.
    """
    T = _steps(times)
    _check_pair(i_k, i_j, T)
    j = times[i_j]
    x_t = stop_gradient(x_T)
    for i in range(T, 0, -1):
        t = times[i]
        if i == i_k:
            v = velocity(x_t, t)
            x_hat_j = leap(x_t, v, t, j)  # S10
        elif i == i_j:
            x_j = connect(x_hat_j, x_t)  # S11
            v = velocity(discount(x_j, alpha), t)
            x_hat_0 = leap(x_j, v, t, 0)  # S12, S17
        else:
            with torch.no_grad():
                v = velocity(x_t, t)
        # The step uses only the value of v; otherwise every later state would carry the graph of v_k.
        x_t = step(x_t, stop_gradient(v), t, times[i - 1])
    return LeapTrajectory(connect(x_hat_0, x_t), x_hat_0, x_j, x_hat_j)  # S13


def _at(states: list[Tensor], i: int | Tensor) -> Tensor:
    """States x_i (B, *S) for one index, or for one index a sample."""
    return torch.stack(states)[i, torch.arange(len(i), device=i.device)] if torch.is_tensor(i) and i.ndim else states[i]


def _check_pair(i_k: int | Tensor, i_j: int | Tensor, T: int, B: int | None = None) -> None:
    """1 <= i_j < i_k <= T; two ints or, with B, two tensors of (B,)."""
    ks, js = torch.as_tensor(i_k), torch.as_tensor(i_j)
    if ks.shape != js.shape or ks.shape not in ((), (B,)) or ks.is_floating_point() or js.is_floating_point():
        wanted = "two ints, one pair a batch" if B is None else f"two ints or two integer tensors of ({B},)"
        raise BadInput(f"i_k={ks.tolist()}, i_j={js.tolist()} must be {wanted}")
    for k, j in zip(ks.reshape(-1).tolist(), js.reshape(-1).tolist()):
        if not 1 <= j < k <= T:
            raise BadInput(f"i_k={k}, i_j={j} must satisfy 1 <= i_j < i_k <= T={T}")


# ---------------------------------------------------------------------------------------------------------------------
# The objective
# ---------------------------------------------------------------------------------------------------------------------


def differentiable(reward: Tensor, x_0: Tensor) -> Tensor:
    """The reward unchanged, if it can be trained on: a tensor (B,) for x_0 (B, *S), and both require grad."""
    if not torch.is_tensor(reward):
        raise BadInput(f"a reward of type {type(reward).__name__} must be a tensor (B,) = {tuple(x_0.shape[:1])}")
    if reward.shape != x_0.shape[:1]:
        raise BadInput(f"reward of shape {tuple(reward.shape)} must be (B,) = {tuple(x_0.shape[:1])}")
    if not x_0.requires_grad:
        raise BadInput("x_0 does not require grad: look for no_grad or detach in the velocity, and for frozen weights")
    if not reward.requires_grad:
        raise BadInput("the reward does not require grad though its sample does: look for no_grad, detach or PIL in it")
    return reward


def checked(reward: Tensor, x_0: Tensor) -> Tensor:
    """`differentiable`, and also finite: for a training loop that has no other protection against NaN."""
    if not differentiable(reward, x_0).isfinite().all():
        bad = (~reward.isfinite()).nonzero()[:, 0].tolist()
        raise BadInput(f"the reward is not finite for samples {bad[:5]} of {len(reward)}: lower lr, or inspect them")
    return reward


def hinge(reward: Tensor, lam: float | None) -> Tensor:
    """L_raw (Eq. M11):  max(0, lambda - r).  reward (B,) to (B,); gradient -1 below lambda, 0 above.

    lam=None drops the hinge and gives -r, as Algorithm 1 prints it.
    """
    if reward.ndim != 1:
        raise BadInput(f"reward of shape {tuple(reward.shape)} must be (B,): one number a sample")
    _check_hyper(lam=lam)
    return -reward if lam is None else torch.relu(lam - reward)


def distances(trajectory: LeapTrajectory) -> tuple[Tensor, Tensor]:
    """d_j, d_0 (Eq. M12): mean |x - x̂| of each sample at the two connectors, both (B,), no gradient."""
    x_0, x_hat_0, x_j, x_hat_j = (stop_gradient(x) for x in trajectory)
    d_j = (x_j - x_hat_j).abs().reshape(len(x_0), -1).mean(1)
    d_0 = (x_0 - x_hat_0).abs().reshape(len(x_0), -1).mean(1)
    return d_j, d_0


def similarity_weight(trajectory: LeapTrajectory, tau: float) -> Tensor:
    """Trajectory-similarity weight (Eq. M12):  w_sim = 1 / (max(d_j, tau) + max(d_0, tau)).

    (B,), no gradient, in (0, 1/(2 tau)].  tau > 0 bounds the weight of a leap that happens to fit perfectly.
    """
    _check_hyper(tau=tau)
    d_j, d_0 = distances(trajectory)
    return 1 / (d_j.clamp(min=tau) + d_0.clamp(min=tau))


def objective(reward: Tensor, weight: Tensor, lam: float | None) -> Tensor:
    """The loss (Eq. M13):  mean over the batch of sg(w_sim) max(0, lambda - r).

    reward, weight (B,) to ().  Gradient flows to the reward only.
    """
    if weight.shape != reward.shape:
        raise BadInput(f"reward of shape {tuple(reward.shape)} and weight of {tuple(weight.shape)} must both be (B,)")
    return (stop_gradient(weight) * hinge(reward, lam)).mean()


# ---------------------------------------------------------------------------------------------------------------------
# One evaluation's backward at a time
# ---------------------------------------------------------------------------------------------------------------------


def cut(x: Tensor) -> Tensor:
    """The value of x as a leaf: a backward that reaches it ends there and leaves its gradient in .grad."""
    return stop_gradient(x).requires_grad_()


class CutVelocity:
    """v_theta with the graph cut before and after every evaluation, for models that are sharded (FSDP2).

    In one backward through two leaps, such a model holds the unsharded gradients of both evaluations at once.  Here
    x_0 depends on theta through leaves, and `backward` passes through one evaluation after the other, from x_0 to x_k.
    The sum is the same gradient, whatever method made x_0.  A state that the method itself `cut` gets its .grad.
    """

    def __init__(self, velocity: Velocity) -> None:
        self.velocity, self.evaluations = velocity, []

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        x_in = cut(x) if x.requires_grad else x
        v = self.velocity(x_in, t)
        if not v.requires_grad:
            return v
        v_out = cut(v)
        self.evaluations.append((x, x_in, v, v_out))
        return v_out

    def backward(self, x_0: Tensor, gradient: Tensor, before_last: Callable[[], None] | None = None) -> None:
        """Adds the gradient of theta, given the loss's gradient in x_0 (B, *S); then forgets the evaluations.

        before_last() is called ahead of the last pass through the model.
        """
        ends, gradients = [x_0], [gradient]
        while self.evaluations:
            x, x_in, v, v_out = self.evaluations.pop()
            # Only leaps lie between v_out and the ends.
            (dv,) = torch.autograd.grad(ends, v_out, gradients, retain_graph=True, materialize_grads=True)
            if before_last and not self.evaluations:
                before_last()
            self.backward_evaluation(v, x_in, dv)
            if x.requires_grad and x_in.grad is not None:  # None if v does not depend on x
                ends, gradients = [*ends, x], [*gradients, x_in.grad]
        torch.autograd.backward(ends, gradients)  # to the states that the method cut

    def backward_evaluation(self, v: Tensor, x_in: Tensor, dv: Tensor) -> None:
        """Adds the gradient of theta, given that of v; leaves the one of x_in, if it requires one, in x_in.grad."""
        v.backward(dv)


# ---------------------------------------------------------------------------------------------------------------------
# Random draws
# ---------------------------------------------------------------------------------------------------------------------


def sample_pair(
    T: int, generator: torch.Generator, low: int = 1, high: int | None = None, size: int | None = None
) -> tuple:
    """Timesteps (i_k, i_j), uniform over all pairs low <= i_j < i_k <= high (Algorithm 1, line 7).

    Two ints, or with a size two (size,) integer tensors.  high=None means T.  i_j = 0 is never drawn, because the
    second leap would then have no length.
    """
    high = T if high is None else high
    if not 1 <= low < high <= T:
        raise BadInput(f"low={low}, high={high} must satisfy 1 <= low < high <= T={T}")
    a = _randint(low, high, generator, size)
    b = _randint(low, high - 1, generator, size)
    b = b + (b >= a)  # skip a: all other indices are equally likely
    i_k, i_j = torch.maximum(a, b), torch.minimum(a, b)
    return (int(i_k), int(i_j)) if size is None else (i_k, i_j)


class BatchGenerator(torch.Generator):
    """A generator for a caller that holds only `rows` of a batch of `batch_size` samples.

    Draws per sample are made for the whole batch and cut to these rows; draws per batch are shared.  So N processes
    or N microbatches that start from the same state draw exactly what one process draws.
    """

    def __new__(cls, batch_size: int, rows: slice) -> "BatchGenerator":
        generator = super().__new__(cls)
        generator.batch_size, generator.rows = batch_size, rows
        return generator


def _batch(x: Tensor, generator: torch.Generator) -> tuple[int, slice]:
    """The number of samples to draw for, and the rows that belong to x: all of them without a BatchGenerator."""
    _check_generator(generator)
    if isinstance(generator, BatchGenerator):
        return generator.batch_size, generator.rows
    return len(x), slice(None)


def _check_generator(generator: torch.Generator) -> None:
    if not isinstance(generator, torch.Generator):
        raise BadInput(f"generator={generator} must be a torch.Generator: draws are seeded, never global")


def _randint(low: int, high: int, generator: torch.Generator, size: int | None = None) -> Tensor:
    """Uniform integers, both ends included as in the paper; () or (size,)."""
    _check_generator(generator)
    shape = () if size is None else (size,)
    return torch.randint(low, high + 1, shape, generator=generator, device=generator.device)


# ---------------------------------------------------------------------------------------------------------------------
# The methods of Algorithm 1
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Hyper:
    """The methods' hyperparameters, with the paper's values for HPSv2.1 on FLUX."""

    alpha: float = 0.3
    """Discount of the nested gradient, in [0, 1] (alpha; leap_align)."""
    tau: float = 0.1
    """Lower bound of the distances in the similarity weight (tau; leap_align)."""
    lam: float | None = 0.55
    """Reward above which a sample gives no gradient (lambda; every method); None trains on -reward."""
    m: int = 11
    """Early stop: the last timestep is drawn from 1..m (m; refl, drtune)."""
    K: int = 2
    """Trained timesteps (K; drtune)."""
    n: int = 2
    """Re-noised copies of the image (n; draft_lv)."""
    low: int = 1
    """Least timestep of a pair (leap_align)."""
    high: int | None = None
    """Greatest timestep of a pair, None for T (leap_align)."""
    pairs: Literal["batch", "sample"] = "batch"
    """One pair (k, j) a batch, as in the paper, or a pair a sample, for two more evaluations (leap_align)."""

    def __post_init__(self) -> None:
        _check_hyper(self.alpha, self.tau, self.lam)
        for name, least in (("m", 1), ("K", 1), ("n", 0)):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < least:
                raise BadInput(f"{name}={getattr(self, name)} must be a whole number, at least {least}")
        if self.pairs not in ("batch", "sample"):
            raise BadInput(f"pairs={self.pairs!r} must be 'batch' or 'sample'")

    def step(self) -> Step:
        """The solver of one sampling run: Euler's."""
        return leap


class Endpoints(Iterator[tuple[Tensor, Tensor]]):
    """What a method returns: an iterator over pairs (x_0 with its graph (B, *S), weight (B,)).

    Each pair takes one loss and one backward before the next is requested, so that one graph lives at a time.  Iterate
    to the end: a method may finish the last backward there.  Then `log` holds what it drew and measured, such as i_k,
    i_j, d_j, d_0.
    """

    def __init__(self, pairs: Generator[tuple[Tensor, Tensor], None, dict]) -> None:
        self.pairs, self.log = pairs, {}

    def __next__(self) -> tuple[Tensor, Tensor]:
        try:
            return next(self.pairs)
        except StopIteration as end:
            self.log = end.value or self.log
            raise


def method(pairs: Callable[..., Generator[tuple[Tensor, Tensor], None, dict]]) -> Callable[..., Endpoints]:
    """Decorates a generator function, which yields the pairs and returns the log, so that it returns Endpoints."""

    @wraps(pairs)
    def endpoints(*arguments, **keywords) -> Endpoints:
        return Endpoints(pairs(*arguments, **keywords))

    return endpoints


@method
def refl(velocity: Velocity, x_T: Tensor, times: Tensor, hyper: Hyper, generator: torch.Generator) -> Endpoints:
    """ReFL: sample without gradient, stop early at t_min, leap to the image with gradient."""
    i_min = _draw_stop(times, hyper, generator)  # line 2
    x_t = rollout(velocity, x_T, times, i_min, hyper.step())[0]
    t = times[i_min]
    x_0 = leap(x_t, velocity(x_t, t), t, 0)  # line 25
    yield x_0, x_0.new_ones(len(x_0))
    return {"i_min": i_min}


@method
def draft_lv(velocity: Velocity, x_T: Tensor, times: Tensor, hyper: Hyper, generator: torch.Generator) -> Endpoints:
    """DRaFT-LV: gradient through the last step, then through n more last steps from re-noised copies of the image."""
    (size, rows), step = _batch(x_T, generator), hyper.step()
    x_1 = rollout(velocity, x_T, times, 1, step)[0]
    t = times[1]
    x_0 = step(x_1, velocity(x_1, t), t, times[0])  # line 34
    weight = x_0.new_ones(len(x_0))
    yield x_0, weight
    image = stop_gradient(x_0)
    for _ in range(hyper.n):  # line 43
        eps = _randn(size, image, generator)[rows]
        x_1 = interpolate(image, eps, t)  # line 45
        yield leap(x_1, velocity(x_1, t), t, 0), weight  # line 46
    return {}


@method
def drtune(velocity: Velocity, x_T: Tensor, times: Tensor, hyper: Hyper, generator: torch.Generator) -> Endpoints:
    """DRTune: gradient through the outputs of K evenly spaced timesteps, never through the input; early stop."""
    T, K = _steps(times), hyper.K
    if K > T:
        raise BadInput(f"K={K} must be at most T={T}")
    if hyper.m > (most := 1 + (K - 1) * (T // K)):
        raise BadInput(f"m={hyper.m} must be at most 1 + (K-1)*floor(T/K) = {most}, or a run may train no step")
    i_min = _draw_stop(times, hyper, generator)  # line 2
    s = int(_randint(1, T - (K - 1) * (T // K), generator))  # line 4
    i_train = {s + i * (T // K) for i in range(K)}  # line 5
    x_t, step = stop_gradient(x_T), hyper.step()
    for i in range(T, i_min - 1, -1):
        with nullcontext() if i in i_train else torch.no_grad():
            v = velocity(stop_gradient(x_t), times[i])  # lines 16-18
        x_t = step(x_t, v, times[i], times[i - 1]) if i > i_min else leap(x_t, v, times[i], 0)  # line 34; 25 at t_min
    yield x_t, x_t.new_ones(len(x_t))
    return {"i_min": i_min, "s": s}


@method
def leap_align(velocity: Velocity, x_T: Tensor, times: Tensor, hyper: Hyper, generator: torch.Generator) -> Endpoints:
    """LeapAlign: gradient through two leaps between states of the rollout; weight by how well they match it."""
    T, alpha = _steps(times), hyper.alpha
    if hyper.pairs == "batch":
        i_k, i_j = sample_pair(T, generator, hyper.low, hyper.high)  # line 7
        trajectory = leap_rollout(velocity, x_T, times, i_k, i_j, alpha, hyper.step())
    else:
        size, rows = _batch(x_T, generator)
        i_k, i_j = (i[rows] for i in sample_pair(T, generator, hyper.low, hyper.high, size))
        states = rollout(velocity, x_T, times, 0, hyper.step())
        trajectory = leap_trajectory(velocity, states, times, i_k, i_j, alpha)
    d_j, d_0 = distances(trajectory)
    yield trajectory.x_0, similarity_weight(trajectory, hyper.tau)  # lines 37, 38
    return {"i_k": i_k, "i_j": i_j, "d_j": d_j, "d_0": d_0}


@method
def full_backprop(
    velocity: Velocity, x_T: Tensor, times: Tensor, hyper: Hyper, generator: torch.Generator
) -> Endpoints:
    """What the methods avoid: gradient through all T steps of the sampling run, with T times the memory."""
    x_t, step = stop_gradient(x_T), hyper.step()
    for i in range(_steps(times), 0, -1):
        x_t = step(x_t, velocity(x_t, times[i]), times[i], times[i - 1])
    yield x_t, x_t.new_ones(len(x_t))
    return {}


METHODS: dict[str, Callable[..., Endpoints]] = {
    "leap_align": leap_align,
    "refl": refl,
    "draft_lv": draft_lv,
    "drtune": drtune,
    "full_backprop": full_backprop,
}


def _draw_stop(times: Tensor, hyper: Hyper, generator: torch.Generator) -> int:
    """The early stop t_min, uniform over 1..m (Algorithm 1, line 2)."""
    if hyper.m > (T := _steps(times)):
        raise BadInput(f"m={hyper.m} must be at most T={T}")
    return int(_randint(1, hyper.m, generator))


def _randn(size: int, x: Tensor, generator: torch.Generator) -> Tensor:
    """Gaussian noise with the sample shape, dtype and device of x, drawn on the generator's device."""
    noise = torch.randn(size, *x.shape[1:], generator=generator, dtype=x.dtype, device=generator.device)
    return noise.to(x.device)
