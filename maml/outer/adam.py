"""Adam as the outer optimizer (Kingma and Ba 2015), in TensorFlow's form, which the authors used."""

from __future__ import annotations

import torch
from torch import Tensor

from maml.outer.base import Objective, Outer, OuterState, flatten, unflatten
from maml.types import Decay, Params, PositiveFloat


class Adam(Outer):
    """Adam on the meta-gradient.

    Departure from ``torch.optim.Adam``: epsilon is added before the bias correction, as in TensorFlow. The difference
    matters for entries whose gradient is rounding noise, such as a convolution's bias before batch normalisation.

    Args:
        step_size: Adam's step size, the paper's beta.
        clip: bound on the absolute value of each entry of the meta-gradient; None does not clip.
        betas: decay rates of the running means of the gradient and of its square.
        eps: added to the root of the mean square, so that nothing is divided by zero.
    """

    def __init__(
        self,
        step_size: PositiveFloat = 0.001,
        clip: PositiveFloat | None = None,
        betas: tuple[Decay, Decay] = (0.9, 0.999),
        eps: PositiveFloat = 1e-8,
    ) -> None:
        self.step_size = step_size
        self.clip = clip
        self.betas = betas
        self.eps = eps

    def init_state(self, theta: Params) -> OuterState:
        """Returns the running means, zero, over all parameters as one vector; and the step counter, zero.

        The counter is a tensor, so that a CUDA graph can update it.
        """
        flat = flatten(theta, theta)
        return {
            "step": torch.zeros((), dtype=torch.float64, device=flat.device),
            "mean": torch.zeros_like(flat),
            "square": torch.zeros_like(flat),
        }

    @torch.no_grad()
    def step(self, objective: Objective, theta: Params, state: OuterState) -> dict[str, Tensor]:
        """Updates theta and the state in place from one meta-gradient; returns the objective's metrics."""
        gradients, metrics = objective.gradient(theta)
        gradient = flatten(gradients, theta)
        if self.clip is not None:
            gradient = gradient.clamp(-self.clip, self.clip)
        beta1, beta2 = self.betas
        step = state["step"].add_(1)
        mean = state["mean"].lerp_(gradient, 1 - beta1)
        square = state["square"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        # Kingma and Ba 2015, end of section 2: the bias corrections are part of the step size.
        rate = self.step_size * torch.sqrt(1 - beta2**step) / (1 - beta1**step)
        update = mean / (square.sqrt() + self.eps) * rate.to(mean.dtype)
        torch._foreach_sub_(list(theta.values()), list(unflatten(update, theta).values()))
        return metrics
