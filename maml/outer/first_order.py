"""Outer optimizers that need the meta-gradient only: their clipping, weight decay, schedule and step."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from maml.outer.base import Objective, Outer, OuterState, flatten, unflatten
from maml.outer.schedule import Schedule
from maml.types import NonNegativeFloat, Params, PositiveFloat


class FirstOrder(Outer):
    """theta <- theta - update(meta-gradient) - rate * weight_decay * theta.

    Args:
        step_size: the rate, before the schedule.
        clip: bound on the absolute value of each entry of the meta-gradient; None does not clip.
        clip_norm: bound on the norm of the whole meta-gradient, applied after ``clip``; None does not clip.
        weight_decay: how fast theta decays, separately from the direction (Loshchilov and Hutter 2019).
        schedule: multiplies the step size; None keeps it constant.
    """

    def __init__(
        self,
        step_size: PositiveFloat,
        clip: PositiveFloat | None = None,
        clip_norm: PositiveFloat | None = None,
        weight_decay: NonNegativeFloat = 0.0,
        schedule: Schedule | None = None,
    ) -> None:
        self.step_size, self.clip, self.clip_norm = step_size, clip, clip_norm
        self.weight_decay, self.schedule = weight_decay, schedule

    @property
    def mixes_entries(self) -> bool:
        """Whether the norm of the whole meta-gradient is clipped."""
        return self.clip_norm is not None

    @property
    def changes_step_size(self) -> bool:
        return self.schedule is not None

    def init_state(self, theta: Params) -> OuterState:
        """Returns the step counter, zero. It is a tensor, so that a CUDA graph can update it."""
        return {"step": torch.zeros((), dtype=torch.float64, device=next(iter(theta.values())).device)}

    def rate(self, done: Tensor) -> Tensor | float:
        """Returns the step size after ``done`` updates, a 0-dim tensor."""
        return self.step_size if self.schedule is None else self.step_size * self.schedule.factor(done)

    @abstractmethod
    def update(self, gradient: Tensor, state: OuterState, rate: Tensor | float) -> Tensor:
        """Returns what is subtracted from theta, and updates the state; its step counter counts this update already.

        Args:
            gradient: the clipped meta-gradient, one vector in the order of theta.
            state: the optimizer's state.
            rate: the present step size.
        """

    @torch.no_grad()
    def step(self, objective: Objective, theta: Params, state: OuterState) -> dict[str, Tensor]:
        """Updates theta and the state in place from one meta-gradient; returns the objective's metrics."""
        gradients, metrics = objective.gradient(theta)
        gradient = flatten(gradients, theta)
        if self.clip is not None:
            gradient = gradient.clamp(-self.clip, self.clip)
        if self.clip_norm is not None:
            gradient = gradient * (self.clip_norm / gradient.norm()).clamp(max=1)
        rate = self.rate(state["step"])
        state["step"].add_(1)
        update = self.update(gradient, state, rate)
        if self.weight_decay:
            decay = rate * self.weight_decay
            update = update + flatten(theta, theta) * (decay.to(update.dtype) if isinstance(decay, Tensor) else decay)
        torch._foreach_sub_(list(theta.values()), list(unflatten(update, theta).values()))
        return metrics
