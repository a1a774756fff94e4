"""Beyond the paper: what came after LeapAlign, in its form and symbols.

The leash.  A reward is a rough model of what people want, so training on it alone may carry v_theta far away from the
pre-trained v_ref, where the reward errs: samples lose diversity, then quality.  The hinge (Eq. M11) stops samples that
score well.  The leash instead pulls the velocity back, in proportion to its gap:

    L + beta R,    R = mean over samples and dimensions of  sg(w) sum_i h_i |v_theta(x_i, t_i) - sg(v_ref(x_i, t_i))|^2

The sum is over the differentiated evaluations of an endpoint.  h_i = |d x_0 / d v_i| is the length of the leap that
starts there, and w the weight of the reward.  The sum over a whole run is the integral of the squared gap, which bounds
the Wasserstein-2 distance between what the two models generate (ORW-CFM-W2, arXiv 2502.06061), and which in Flow-GRPO
(arXiv 2505.05470) is the KL divergence up to a factor.  Without hinge and nested gradient, dL/dv_i is h_i w dr/dx_0 a
sample, so loss and leash balance where v_theta - v_ref = - D / (2 beta) dr/dx_0 (D dimensions), whatever h_i and w are.
One beta therefore suits all methods; with the plain mean over evaluations, DRaFT-LV needed a far smaller one.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

import leap_align
from leap_align import BadInput, CutVelocity, Velocity, stop_gradient


@dataclass(frozen=True)
class Hyper(leap_align.Hyper):
    """The paper's hyperparameters, then those of this file."""

    beta: float = 0.0
    """Weight of the leash to the pre-trained model (beta; every method); 0 for no leash."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.beta < math.inf:
            raise BadInput(f"beta={self.beta} must be at least 0 and finite; 0 is no leash")


class Leash(CutVelocity):
    """v_theta on a leash to `reference`, the pre-trained v_ref: `pull` adds beta R to the loss of an endpoint.

    The gradient of R goes to theta alone: states are where a rollout has been, not what the leash moves.  (Through x,
    with v_ref constant, training was the same at alpha = 0.3 and broke at alpha = 1.)  An evaluation whose x has a
    gradient therefore takes a second backward, to x alone.
    microbatches: into how many the batch is divided, whose gradients are added.  Without a reference nothing is added.
    """

    def __init__(
        self, velocity: Velocity, reference: Velocity | None = None, beta: float = 0.0, microbatches: int = 1
    ) -> None:
        super().__init__(velocity)
        self.reference, self.beta, self.microbatches = reference, beta, microbatches
        self.gaps, self.norms, self.pulls = [], [], []

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        v = super().__call__(x, t)
        if self.reference is not None and v.requires_grad:
            with torch.no_grad():
                v_ref = self.reference(x, t)
                self.gaps.append(v - v_ref)
                self.norms.append((_norm(v) / _norm(v_ref)).mean())
        return v

    def pull(self, x_0: Tensor, weight: Tensor) -> dict[str, float]:
        """Adds beta R to the loss of the endpoint x_0 (B, *S) of weight (B,), for the `backward` that comes next.

        Returns R as `leash`, and the mean of |v_theta| / |v_ref| as `v_norm`.
        """
        if not self.gaps:
            return {}
        outputs = [v_out for *_, v_out in self.evaluations]
        # Only leaps lie between an output and x_0, so this is -h_i, in every dimension.
        lengths = torch.autograd.grad(x_0, outputs, torch.ones_like(x_0), retain_graph=True, materialize_grads=True)
        w, R = stop_gradient(weight).reshape(-1, *[1] * (x_0.ndim - 1)), 0.0
        for h, gap in zip(lengths, self.gaps, strict=True):
            pull = w * h.abs() * gap
            R += (pull * gap).mean().item()
            self.pulls.append(2 * self.beta / (gap.numel() * self.microbatches) * pull)  # beta dR/dv
        v_norm = torch.stack(self.norms).mean().item()
        self.gaps, self.norms = [], []
        return {"leash": R, "v_norm": v_norm}

    def backward_evaluation(self, v: Tensor, x_in: Tensor, dv: Tensor) -> None:
        """Gives theta the gradient of loss and leash, and x_in that of the loss alone."""
        if not self.pulls:
            return super().backward_evaluation(v, x_in, dv)
        if x_in.requires_grad:
            v.backward(dv, retain_graph=True, inputs=[x_in])
        dx, x_in.grad = x_in.grad, None
        super().backward_evaluation(v, x_in, dv + self.pulls.pop())
        x_in.grad = dx


def _norm(v: Tensor) -> Tensor:
    """|v| of each sample, (B,)."""
    return v.flatten(1).norm(dim=1)
