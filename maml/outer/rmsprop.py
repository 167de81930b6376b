"""RMSProp as the outer optimizer (Tieleman and Hinton 2012)."""

from __future__ import annotations

import torch
from torch import Tensor

from maml.outer.base import OuterState, flatten
from maml.outer.first_order import FirstOrder
from maml.outer.schedule import Schedule
from maml.types import Decay, NonNegativeFloat, Params, PositiveFloat


class RMSProp(FirstOrder):
    """Divides the meta-gradient by the root of a running mean of its square, as ``torch.optim.RMSprop``.

    Args:
        step_size: step size.
        decay: decay rate of the running mean.
        eps: added to the root, so that nothing is divided by zero.
        momentum: factor of the earlier updates; 0 has none.
    """

    def __init__(
        self,
        step_size: PositiveFloat = 0.001,
        decay: Decay = 0.99,
        eps: PositiveFloat = 1e-8,
        momentum: Decay = 0.0,
        clip: PositiveFloat | None = None,
        clip_norm: PositiveFloat | None = None,
        weight_decay: NonNegativeFloat = 0.0,
        schedule: Schedule | None = None,
    ) -> None:
        super().__init__(step_size, clip, clip_norm, weight_decay, schedule)
        self.decay, self.eps, self.momentum = decay, eps, momentum

    def init_state(self, theta: Params) -> OuterState:
        """Returns the step counter, the running mean of squares and, with momentum, the velocity, zero."""
        names = ["square", *(["velocity"] if self.momentum else [])]
        return super().init_state(theta) | {name: torch.zeros_like(flatten(theta, theta)) for name in names}

    def update(self, gradient: Tensor, state: OuterState, rate: Tensor | float) -> Tensor:
        square = state["square"].mul_(self.decay).addcmul_(gradient, gradient, value=1 - self.decay)
        direction = gradient / (square.sqrt() + self.eps)
        if self.momentum:
            direction = state["velocity"].mul_(self.momentum).add_(direction)
        return direction * (rate.to(square.dtype) if isinstance(rate, Tensor) else rate)
