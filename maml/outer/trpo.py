"""Trust-region policy optimisation as the outer optimizer (Schulman et al. 2015; docs/protocol.md#trpo)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from maml.outer.base import Objective, Outer, OuterState
from maml.types import Count, Decay, NonNegativeFloat, Params, PositiveFloat

_MAX_BACKTRACKS = 15
_CG_TOLERANCE = 1e-10  # of the squared residual


class TRPO(Outer):
    """The natural gradient step to the border of a trust region, shortened until it keeps inside and improves.

    Departure: the authors approximate Hessian-vector products by finite differences, with a step that an argument in
    the wrong slot makes about 1 / ||theta|| (docs/protocol.md#trpo); here they are exact. With ReLU that is the
    curvature between kinks: the line search sees to those that a step crosses.

    Args:
        max_kl: the trust region: how far the mean KL divergence of the policies may go.
        num_cg_steps: conjugate gradient steps.
        damping: added to the diagonal of the curvature.
        backtrack: factor by which a step is shortened.
        curvature_every: the curvature is that of every so many-th timestep; 1 takes all of them.
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
        """Returns nothing: each step stands alone."""
        return {}

    @torch.no_grad()
    def step(self, objective: Objective, theta: Params, state: OuterState) -> dict[str, Tensor]:
        """Updates theta in place, or leaves it where no shortened step is acceptable.

        Returns:
            Of the objective its metrics before the step; ``kl``, ``loss_after`` and ``step_fraction``, the part of the
            full step that was taken: 0 if none was.
        """
        gradients, metrics = objective.gradient(theta)
        gradient = _flat(gradients, theta)
        product = objective.curvature(theta, self.curvature_every)

        def damped(vector: Tensor) -> Tensor:
            return _flat(product(_like(vector, theta)), theta) + self.damping * vector

        direction, residual = conjugate_gradient(damped, gradient, self.num_cg_steps)
        curved = gradient - residual  # what the damped curvature makes of the direction
        length = (2 * self.max_kl / (direction @ curved + 1e-8)).sqrt()
        step = direction * torch.where(length.isfinite(), length, 1.0)

        start = {name: value.clone() for name, value in theta.items()}
        kl, after, fraction = torch.zeros_like(metrics["loss"]), metrics["loss"], 0.0
        for number in range(_MAX_BACKTRACKS):
            for name, part in _like(self.backtrack**number * step, theta).items():
                theta[name].copy_(start[name] - part)
            tried = objective.evaluate(theta)
            if tried["loss"] < metrics["loss"] and tried["kl"] <= self.max_kl:  # false where it is not a number
                kl, after, fraction = tried["kl"], tried["loss"], self.backtrack**number
                break
        else:
            for name, value in theta.items():
                value.copy_(start[name])
        return metrics | {"kl": kl, "loss_after": after, "step_fraction": torch.full_like(kl, fraction)}


def conjugate_gradient(product: Callable[[Tensor], Tensor], vector: Tensor, num_steps: int) -> tuple[Tensor, Tensor]:
    """Solves A x = b for a positive definite A (Hestenes and Stiefel 1952); returns x and b - A x.

    Args:
        product: x -> A x.
        vector: b.
        num_steps: at most; it ends as well when the squared residual is below 1e-10.
    """
    solution, residual, direction = torch.zeros_like(vector), vector.clone(), vector.clone()
    squared = residual @ residual
    for _ in range(num_steps):
        if squared < _CG_TOLERANCE:
            break
        curved = product(direction)
        rate = squared / (direction @ curved)
        solution += rate * direction
        residual -= rate * curved
        before, squared = squared, residual @ residual
        direction = residual + squared / before * direction
    return solution, residual


def _flat(params: Params, theta: Params) -> Tensor:
    return torch.cat([params[name].flatten() for name in theta])


def _like(vector: Tensor, theta: Params) -> Params:
    """Cuts a flat vector into the names and shapes of theta."""
    parts = vector.split([value.numel() for value in theta.values()])
    return {name: part.view_as(value) for (name, value), part in zip(theta.items(), parts, strict=True)}
