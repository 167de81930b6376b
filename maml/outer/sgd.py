"""Gradient descent as the outer optimizer; Reptile uses it with a step size that falls to zero."""

from __future__ import annotations

import torch
from torch import Tensor

from maml.outer.base import Objective, Outer, OuterState
from maml.types import Count, NonNegativeFloat, Params, PositiveFloat


class SGD(Outer):
    """theta <- theta - epsilon * gradient, where epsilon changes linearly with the iteration.

    Args:
        step_size: step size epsilon at the first update.
        final_step_size: step size after ``num_iterations`` updates; None keeps it constant.
        num_iterations: number of updates in which the step size goes from the first value to the final one.
    """

    def __init__(
        self, step_size: PositiveFloat, num_iterations: Count, final_step_size: NonNegativeFloat | None = None
    ) -> None:
        self.step_size, self.num_iterations = step_size, num_iterations
        self.final_step_size = step_size if final_step_size is None else final_step_size

    def init_state(self, theta: Params) -> OuterState:
        """Returns the step counter, zero. It is a tensor, so that a CUDA graph can update it."""
        return {"step": torch.zeros((), dtype=torch.float64, device=next(iter(theta.values())).device)}

    @torch.no_grad()
    def step(self, objective: Objective, theta: Params, state: OuterState) -> dict[str, Tensor]:
        """Updates theta and the state in place from one meta-gradient; returns the objective's metrics."""
        gradients, metrics = objective.gradient(theta)
        done = (state["step"] / self.num_iterations).clamp(max=1)
        rate = self.step_size + (self.final_step_size - self.step_size) * done
        state["step"].add_(1)
        values = list(theta.values())
        updates = torch._foreach_mul([gradients[name] for name in theta], rate.to(values[0].dtype))
        torch._foreach_sub_(values, updates)
        return metrics
