"""How a backward is run: one evaluation of a sharded model at a time, a slice of a batch, a leash's extra pass.

The leash.  A reward is a rough model of what people want, so training on it alone may carry v_theta far away from the
pre-trained v_ref, where the reward errs: samples lose diversity, then quality.  The hinge (Eq. M11) gives no gradient
to samples whose reward exceeds lambda.  The leash instead draws the velocity back, in proportion to the distance:

    L + beta R,    R = mean over samples and dimensions of  sg(w) sum_i l_i |v_theta(x_i, t_i) - sg(v_ref(x_i, t_i))|^2

The sum is over the differentiated evaluations of an endpoint. l_i = |d x_0 / d v_i| is the length of the leap that
starts there, times the factor of its gradient in a surrogate, and w the weight of the reward. The sum over a whole run
is the integral of the squared distance, which bounds the Wasserstein-2 distance between what the two models generate
(ORW-CFM-W2, arXiv 2502.06061), and which in Flow-GRPO (arXiv 2505.05470) is the KL divergence up to a factor. Without
hinge and nested gradient, dL/dv_i is l_i w dr/dx_0 a sample, so in D dimensions loss and leash balance where

    v_theta - v_ref = -D / (2 beta) dr/dx_0,    whatever l_i and w are.

So one beta should suit all methods; on a toy it does for the paper's (`python -m toy.laboratory leash`).

The gradient of R goes to theta alone: the leash does not move the states of the rollout.  (Through x, with v_ref
constant, training was the same at alpha = 0.3 and broke at alpha = 1.)
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from leap_align import Velocity, stop_gradient


def leaf(x: Tensor) -> Tensor:
    """The value of x as a leaf: a backward that reaches it ends there and leaves its gradient in .grad."""
    return x.detach().requires_grad_()


class BatchGenerator(torch.Generator):
    """A generator for a caller that holds only `rows` of a batch of `batch_size` samples.

    Draws per sample are made for the whole batch, then sliced; draws per batch are shared.  So N processes
    or N microbatches that start from the same state draw exactly what one process draws.
    """

    def __new__(cls, batch_size: int, rows: slice) -> "BatchGenerator":
        generator = super().__new__(cls)
        generator.batch_size, generator.rows = batch_size, rows
        return generator


def rows_of_rank(batch_size: int, microbatches: int, rank: int, world_size: int) -> list[slice]:
    """The rows of the batch that a rank works on, one slice per microbatch."""
    size, first = batch_size // (world_size * microbatches), rank * microbatches
    return [slice(i * size, (i + 1) * size) for i in range(first, first + microbatches)]


class Evaluation(NamedTuple):
    """One evaluation of the velocity, whose graph ends at the leaves x_in and v_out."""

    x: Tensor
    x_in: Tensor  # x as a leaf; x itself if that has no gradient
    t: Tensor
    v: Tensor | None  # with the graph from x_in; None: evaluate it again for the backward
    v_out: Tensor  # v as a leaf


class SplitVelocity:
    """v_theta whose graph ends at a leaf before and after every evaluation, for models that are sharded (FSDP2).

    In one backward through two leaps, such a model holds the unsharded gradients of both evaluations at once.  Here
    x_0 depends on theta through leaves, and `backward` passes through one evaluation after the other, from x_0 to x_k.
    The sum is the same gradient, whatever method made x_0.
    """

    def __init__(self, velocity: Velocity) -> None:
        self.velocity = velocity
        self.evaluations: list[Evaluation] = []

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        x_in = leaf(x) if x.requires_grad else x
        v = self.velocity(x_in, t)
        return self._record(Evaluation(x, x_in, t, v, leaf(v))) if v.requires_grad else v

    def recomputed(self, x: Tensor, t: Tensor) -> Tensor:
        """The same, but `backward` evaluates v again: the graph of one evaluation lives at a time."""
        with torch.no_grad():
            v = self.velocity(x, t)
        x_in = leaf(x) if x.requires_grad else x
        return self._record(Evaluation(x, x_in, t, None, leaf(v))) if torch.is_grad_enabled() else v

    def backward(
        self, x_0: Tensor, gradient: Tensor, weight: Tensor, before_last: Callable[[], None] | None = None
    ) -> dict[str, float]:
        """Adds the gradient of theta, given the loss's gradient in x_0 (B, *S); returns a leash's figures.

        Then it forgets the evaluations.  weight (B,) is the endpoint's.  before_last() is called once, before the last
        backward pass through the model.
        """
        ends, gradients = [x_0], [gradient]
        while self.evaluations:
            evaluation = self.evaluations.pop()
            # Only leaps lie between v_out and the ends.
            options = {"retain_graph": True, "materialize_grads": True}
            (dv,) = torch.autograd.grad(ends, evaluation.v_out, gradients, **options)
            if before_last and not self.evaluations:
                before_last()
            v = self.velocity(evaluation.x_in, evaluation.t) if evaluation.v is None else evaluation.v
            dx = self._backward_evaluation(evaluation.x_in, v, dv)
            if dx is not None:  # None if x is a constant, or v does not depend on it
                ends, gradients = [*ends, evaluation.x], [*gradients, dx]
        return {}

    def _record(self, evaluation: Evaluation) -> Tensor:
        self.evaluations.append(evaluation)
        return evaluation.v_out

    def _backward_evaluation(self, x_in: Tensor, v: Tensor, dv: Tensor) -> Tensor | None:
        """Adds the gradient of theta, given that of v; returns that of x_in."""
        v.backward(dv)
        return x_in.grad


class Leash(SplitVelocity):
    """v_theta on a leash to `reference`, the pre-trained v_ref: `backward` adds the gradient of beta R to the loss's.

    `backward` returns R as `leash`, and the mean of |v_theta| / |v_ref| as `v_norm`, of one endpoint's evaluations.
    microbatches: into how many the batch is divided, whose gradients are added.
    An evaluation whose x has a gradient takes a second backward, to x alone.
    """

    def __init__(self, velocity: Velocity, reference: Velocity, beta: float, microbatches: int = 1) -> None:
        super().__init__(velocity)
        self.reference, self.beta, self.microbatches = reference, beta, microbatches
        self.differences: list[Tensor] = []  # v_theta - v_ref of each evaluation
        self.ratios: list[Tensor] = []  # |v_theta| / |v_ref| of each evaluation, () each
        self.leash_gradients: list[Tensor] = []  # beta dR/dv of each evaluation, while `backward` runs

    def backward(
        self, x_0: Tensor, gradient: Tensor, weight: Tensor, before_last: Callable[[], None] | None = None
    ) -> dict[str, float]:
        """`SplitVelocity.backward`, with the gradient of beta R."""
        figures = {"leash": self._set_leash_gradients(x_0, weight), "v_norm": torch.stack(self.ratios).mean().item()}
        self.differences, self.ratios = [], []
        return figures | super().backward(x_0, gradient, weight, before_last)

    @torch.no_grad()
    def _record(self, evaluation: Evaluation) -> Tensor:
        v, v_ref = evaluation.v_out, self.reference(evaluation.x, evaluation.t)
        self.differences.append(v - v_ref)
        self.ratios.append((v.reshape(len(v), -1).norm(dim=1) / v_ref.reshape(len(v), -1).norm(dim=1)).mean())
        return super()._record(evaluation)

    def _set_leash_gradients(self, x_0: Tensor, weight: Tensor) -> float:
        """Finds beta dR/dv of every evaluation; returns R."""
        outputs, R = [evaluation.v_out for evaluation in self.evaluations], 0.0
        # Only leaps lie between an output and x_0, so this is -l_i, in every dimension.
        lengths = torch.autograd.grad(x_0, outputs, torch.ones_like(x_0), retain_graph=True, materialize_grads=True)
        w = stop_gradient(weight).reshape(-1, *[1] * (x_0.ndim - 1))
        for length, difference in zip(lengths, self.differences, strict=True):
            weighted = w * length.abs() * difference
            R += (weighted * difference).mean().item()
            self.leash_gradients.append(2 * self.beta / (difference.numel() * self.microbatches) * weighted)
        return R

    def _backward_evaluation(self, x_in: Tensor, v: Tensor, dv: Tensor) -> Tensor | None:
        """Gives theta the gradient of loss and leash, and x_in that of the loss alone."""
        dx = None
        if x_in.requires_grad:
            v.backward(dv, retain_graph=True, inputs=[x_in])
            dx, x_in.grad = x_in.grad, None
        v.backward(dv + self.leash_gradients.pop())
        return dx
