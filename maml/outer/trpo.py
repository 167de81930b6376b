"""Trust-region policy optimisation as the outer optimizer (Schulman et al. 2015; docs/protocol.md#trpo)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from maml.outer.base import Objective, Outer, OuterState, flatten, unflatten
from maml.types import Count, Decay, NonNegativeFloat, Params, PositiveFloat

Product = Callable[[Tensor], Tensor]
"""A matrix over theta, given as the function that multiplies it by a vector; both are flat, ``(P,)``."""

_CG_TOLERANCE = 1e-10  # conjugate gradients end when the squared residual is below this


class TRPO(Outer):
    """A natural gradient step to the border of a trust region, shortened until it lowers the loss within the region.

    The step's direction solves curvature @ direction = gradient by conjugate gradients. The curvature is the Hessian of
    the KL divergence at theta:

    - ``exact``: exact products. With ReLU, they ignore the kinks that a step crosses; the line search corrects it.
    - ``finite_difference``: symmetric differences of the KL divergence's gradient, as in the authors' code, with their
      step of 1 / ||theta|| (docs/protocol.md#trpo). They see kinks, and cost twice the time.

    Args:
        max_kl: size of the trust region: the largest mean KL divergence between the policies before and after a step.
        num_cg_steps: number of conjugate gradient steps.
        damping: number added to the diagonal of the curvature.
        curvature: how products with the curvature are computed.
        curvature_every: 1 computes the curvature from every timestep, n from every n-th.
        first_fraction: fraction of the full step that the line search tries first.
        backtrack: factor by which the line search shortens a step.
        num_tries: number of steps that the line search tries.
    """

    needs_policy = True

    def __init__(
        self,
        max_kl: PositiveFloat = 0.01,
        num_cg_steps: Count = 10,
        damping: NonNegativeFloat = 1e-5,
        backtrack: Decay = 0.8,
        curvature_every: Count = 1,
        curvature: Literal["exact", "finite_difference"] = "exact",
        first_fraction: PositiveFloat = 1.0,
        num_tries: Count = 15,
    ) -> None:
        self.max_kl, self.num_cg_steps, self.damping = max_kl, num_cg_steps, damping
        self.curvature, self.curvature_every = curvature, curvature_every
        self.first_fraction, self.backtrack, self.num_tries = first_fraction, backtrack, num_tries

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
        make_product, is_linear = _CURVATURES[self.curvature]
        curvature = make_product(objective, theta, self.curvature_every)

        def damped_product(vector: Tensor) -> Tensor:
            return curvature(vector) + self.damping * vector

        direction, residual = conjugate_gradient(damped_product, gradient, self.num_cg_steps)
        # The definition of the residual gives the direction's product, if products are linear.
        direction_product = gradient - residual if is_linear else damped_product(direction)
        length = (2 * self.max_kl / (direction @ direction_product + 1e-8)).sqrt()
        step = direction * torch.where(length.isfinite(), length, 1.0)

        start = {name: value.clone() for name, value in theta.items()}
        kl, after, fraction = torch.zeros_like(metrics["loss"]), metrics["loss"], 0.0
        for number in range(self.num_tries):
            tried_fraction = self.first_fraction * self.backtrack**number
            for name, part in unflatten(tried_fraction * step, theta).items():
                theta[name].copy_(start[name] - part)
            tried = objective.evaluate(theta)
            if tried["loss"] < metrics["loss"] and tried["kl"] <= self.max_kl:  # a NaN is not accepted
                kl, after, fraction = tried["kl"], tried["loss"], tried_fraction
                break
        else:
            for name, value in theta.items():
                value.copy_(start[name])
        return metrics | {"kl": kl, "loss_after": after, "step_fraction": torch.full_like(kl, fraction)}


def exact_product(objective: Objective, theta: Params, every: int) -> Product:
    """Returns the exact product with the Hessian of the mean KL divergence at theta.

    Args:
        objective: the meta-objective.
        theta: the parameters.
        every: 1 uses every timestep, n uses every n-th.
    """
    curvature = objective.curvature(theta, every)
    return lambda vector: flatten(curvature(unflatten(vector, theta)), theta)


def finite_difference_product(objective: Objective, theta: Params, every: int) -> Product:
    """Returns (g(theta + eps v) - g(theta - eps v)) / (2 eps), g the gradient of the mean KL divergence.

    As in the authors' code, v is not normalised, and eps = 1 / (||theta|| + 1e-8). They meant 1e-8 / ||theta||, but
    passed an argument in the wrong place (docs/protocol.md#trpo). The arguments are those of `exact_product`.
    """
    start = flatten(theta, theta)
    eps = 1 / (start.norm() + 1e-8)

    def product(vector: Tensor) -> Tensor:
        ahead, behind = (
            flatten(objective.kl_gradient(unflatten(start + move, theta), every), theta)
            for move in (eps * vector, -eps * vector)
        )
        return (ahead - behind) / (2 * eps)

    return product


# By name, the function that makes the products, and whether a product is linear in its vector.
_CURVATURES = {"exact": (exact_product, True), "finite_difference": (finite_difference_product, False)}


def conjugate_gradient(product: Product, vector: Tensor, num_steps: int) -> tuple[Tensor, Tensor]:
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
