"""Trust-region policy optimisation as the outer optimizer (Schulman et al. 2015; docs/protocol.md#trpo)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from maml.outer.base import Objective, Outer, OuterState, flatten, unflatten
from maml.types import Count, Decay, NonNegativeFloat, Params, PositiveFloat

_MAX_BACKTRACKS = 15
_CG_TOLERANCE = 1e-10  # conjugate gradients end when the squared residual is below this


class TRPO(Outer):
    """A natural gradient step to the border of a trust region, shortened until it lowers the loss within the region.

    Departure: the authors approximate Hessian-vector products by finite differences, with a step size of about
    1 / ||theta|| because of an argument in the wrong place (docs/protocol.md#trpo). Here the products are exact. With
    ReLU, the exact curvature ignores the kinks; the line search corrects a step that crosses some.

    Args:
        max_kl: size of the trust region: the largest mean KL divergence between the policies before and after a step.
        num_cg_steps: number of conjugate gradient steps.
        damping: number added to the diagonal of the curvature.
        backtrack: factor by which the line search shortens a step.
        curvature_every: 1 computes the curvature from every timestep, n from every n-th.
    """

    needs_policy = True

    def __init__(
        self,
        max_kl: PositiveFloat = 0.01,
        num_cg_steps: Count = 10,
        damping: NonNegativeFloat = 1e-5,
        backtrack: Decay = 0.8,
        curvature_every: Count = 1,
    ) -> None:
        self.max_kl, self.num_cg_steps, self.damping = max_kl, num_cg_steps, damping
        self.backtrack, self.curvature_every = backtrack, curvature_every

    def init_state(self, theta: Params) -> OuterState:
        """Returns an empty state: each step depends on its own meta-batch only."""
        return {}

    @torch.no_grad()
    def step(self, objective: Objective, theta: Params, state: OuterState) -> dict[str, Tensor]:
        """Updates theta in place, or leaves it unchanged if the line search accepts no step.

        Returns:
            The objective's metrics before the step; ``kl`` and ``loss_after``, measured after it; and
            ``step_fraction``, the fraction of the full step that was taken, 0 if none was.
        """
        gradients, metrics = objective.gradient(theta)
        gradient = flatten(gradients, theta)
        curvature = objective.curvature(theta, self.curvature_every)

        def damped_product(vector: Tensor) -> Tensor:
            return flatten(curvature(unflatten(vector, theta)), theta) + self.damping * vector

        direction, residual = conjugate_gradient(damped_product, gradient, self.num_cg_steps)
        direction_product = gradient - residual  # damped curvature @ direction, by the definition of the residual
        length = (2 * self.max_kl / (direction @ direction_product + 1e-8)).sqrt()
        step = direction * torch.where(length.isfinite(), length, 1.0)

        start = {name: value.clone() for name, value in theta.items()}
        kl, after, fraction = torch.zeros_like(metrics["loss"]), metrics["loss"], 0.0
        for number in range(_MAX_BACKTRACKS):
            for name, part in unflatten(self.backtrack**number * step, theta).items():
                theta[name].copy_(start[name] - part)
            tried = objective.evaluate(theta)
            if tried["loss"] < metrics["loss"] and tried["kl"] <= self.max_kl:  # a NaN is not accepted
                kl, after, fraction = tried["kl"], tried["loss"], self.backtrack**number
                break
        else:
            for name, value in theta.items():
                value.copy_(start[name])
        return metrics | {"kl": kl, "loss_after": after, "step_fraction": torch.full_like(kl, fraction)}


def conjugate_gradient(product: Callable[[Tensor], Tensor], vector: Tensor, num_steps: int) -> tuple[Tensor, Tensor]:
    """Solves A x = b for a positive definite A (Hestenes and Stiefel 1952); returns x and b - A x.

    Args:
        product: computes A x from x.
        vector: b.
        num_steps: largest number of steps; the method also ends when the squared residual is below 1e-10.
    """
    solution, residual, direction = torch.zeros_like(vector), vector.clone(), vector.clone()
    squared = residual @ residual
    for _ in range(num_steps):
        if squared < _CG_TOLERANCE:
            break
        direction_product = product(direction)
        rate = squared / (direction @ direction_product)
        solution += rate * direction
        residual -= rate * direction_product
        before, squared = squared, residual @ residual
        direction = residual + squared / before * direction
    return solution, residual
