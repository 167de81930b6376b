"""Gradient descent as the outer optimizer; Reptile uses it with a step size that falls to zero."""

from __future__ import annotations

import torch
from torch import Tensor

from maml.errors import MamlError
from maml.outer.base import OuterState, flatten
from maml.outer.first_order import FirstOrder
from maml.outer.schedule import Schedule
from maml.types import Decay, NonNegativeFloat, NonNegativeInt, Params, PositiveFloat


class SGD(FirstOrder):
    """theta <- theta - epsilon * gradient, where epsilon changes linearly with the iteration.

    Args:
        step_size: step size epsilon at the first update.
        final_step_size: step size after ``num_iterations`` updates; None keeps it constant.
        num_iterations: number of updates in which the step size goes from the first value to the final one.
        momentum: factor of the earlier updates, as in ``torch.optim.SGD``.
        schedule: multiplies the step size, instead of ``final_step_size``; None is the linear change to that.

    Raises:
        MamlError: if there are both a schedule and a final step size.
    """

    def __init__(
        self,
        step_size: PositiveFloat,
        num_iterations: NonNegativeInt,
        final_step_size: NonNegativeFloat | None = None,
        momentum: Decay = 0.0,
        clip: PositiveFloat | None = None,
        clip_norm: PositiveFloat | None = None,
        weight_decay: NonNegativeFloat = 0.0,
        schedule: Schedule | None = None,
    ) -> None:
        if schedule is not None and final_step_size is not None:
            raise MamlError(
                f"outer.schedule and outer.final_step_size={final_step_size} both change the step size; set "
                "outer.final_step_size=null, or leave out the schedule"
            )
        super().__init__(step_size, clip, clip_norm, weight_decay, schedule)
        self.num_iterations, self.momentum = num_iterations, momentum
        self.final_step_size = step_size if final_step_size is None else final_step_size

    @property
    def changes_step_size(self) -> bool:
        return super().changes_step_size or self.final_step_size != self.step_size

    def init_state(self, theta: Params) -> OuterState:
        """Returns the step counter and, with momentum, the velocity, zero."""
        state = super().init_state(theta)
        return state | {"velocity": torch.zeros_like(flatten(theta, theta))} if self.momentum else state

    def rate(self, done: Tensor) -> Tensor | float:
        """Returns the step size after ``done`` updates, a 0-dim tensor."""
        if self.schedule is not None:
            return super().rate(done)
        share = (done / max(1, self.num_iterations)).clamp(max=1)
        return self.step_size + (self.final_step_size - self.step_size) * share

    def update(self, gradient: Tensor, state: OuterState, rate: Tensor | float) -> Tensor:
        direction = state["velocity"].mul_(self.momentum).add_(gradient) if self.momentum else gradient
        return direction * (rate.to(direction.dtype) if isinstance(rate, Tensor) else rate)
