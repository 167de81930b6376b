"""Adam as the outer optimizer (Kingma and Ba 2015), in TensorFlow's form, which the authors used."""

from __future__ import annotations

import torch
from torch import Tensor

from maml.outer.base import OuterState, flatten
from maml.outer.first_order import FirstOrder
from maml.outer.schedule import Schedule
from maml.types import Decay, NonNegativeFloat, Params, PositiveFloat


class Adam(FirstOrder):
    """Adam on the meta-gradient; AdamW with ``weight_decay``.

    Departure from ``torch.optim.Adam``: epsilon is added before the bias correction, as in TensorFlow. The difference
    matters for entries whose gradient is rounding noise, such as a convolution's bias before batch normalisation.

    Args:
        step_size: Adam's step size, the paper's beta.
        betas: decay rates of the running means of the gradient and of its square.
        eps: added to the root of the mean square, so that nothing is divided by zero.
    """

    def __init__(
        self,
        step_size: PositiveFloat = 0.001,
        clip: PositiveFloat | None = None,
        betas: tuple[Decay, Decay] = (0.9, 0.999),
        eps: PositiveFloat = 1e-8,
        clip_norm: PositiveFloat | None = None,
        weight_decay: NonNegativeFloat = 0.0,
        schedule: Schedule | None = None,
    ) -> None:
        super().__init__(step_size, clip, clip_norm, weight_decay, schedule)
        self.betas, self.eps = betas, eps

    def init_state(self, theta: Params) -> OuterState:
        """Returns the step counter and the running means, zero; the means are over all parameters as one vector."""
        flat = flatten(theta, theta)
        return super().init_state(theta) | {"mean": torch.zeros_like(flat), "square": torch.zeros_like(flat)}

    def update(self, gradient: Tensor, state: OuterState, rate: Tensor | float) -> Tensor:
        beta1, beta2 = self.betas
        step = state["step"]
        mean = state["mean"].lerp_(gradient, 1 - beta1)
        square = state["square"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        # Kingma and Ba 2015, end of section 2: the bias corrections are part of the step size.
        corrected = rate * torch.sqrt(1 - beta2**step) / (1 - beta1**step)
        return mean / (square.sqrt() + self.eps) * corrected.to(mean.dtype)
