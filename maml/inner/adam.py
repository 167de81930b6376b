"""Adaptation by Adam (Kingma and Ba 2015), which Reptile uses with beta1 = 0."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from maml.inner.base import Inner
from maml.types import Decay, NonNegativeInt, Params, PositiveFloat

_KINDS = ("mean", "square")


class Adam(Inner):
    """Adam steps, with one optimizer state per task, in TensorFlow's form (as `maml.outer.adam`).

    First order only: Adam divides by the root of squared gradients, whose derivative is infinite at a zero gradient.

    Args:
        step_size: Adam's step size.
        order: 1 treats the inner gradients as constants; nothing else is possible.
        betas: decay rates of the running means of the gradient and of its square.
        eps: added to the root of the mean square, so that nothing is divided by zero.
    """

    def __init__(
        self,
        step_size: PositiveFloat,
        num_steps: NonNegativeInt,
        order: Literal[1],
        adapt: list[str],
        betas: tuple[Decay, Decay] = (0.9, 0.999),
        eps: PositiveFloat = 1e-8,
    ) -> None:
        super().__init__(step_size, num_steps, order, adapt)
        self.betas, self.eps = betas, eps

    def init_state(self, params: Params) -> Params:
        means = {f"{kind}.{name}": torch.zeros_like(value) for kind in _KINDS for name, value in params.items()}
        first = next(iter(params.values()))
        return means | {"step": first.new_zeros(first.shape[:1], dtype=torch.float64)}

    def update(
        self, params: Params, losses: Tensor, gradients: Params, state: Params, step: int, step_size: float | None
    ) -> tuple[Params, Params]:
        beta1, beta2 = self.betas
        count = state["step"] + 1
        rate = (self.step_size if step_size is None else step_size) * torch.sqrt(1 - beta2**count) / (1 - beta1**count)
        adapted, new = {}, {"step": count}
        for name, gradient in gradients.items():
            mean = new[f"mean.{name}"] = torch.lerp(state[f"mean.{name}"], gradient, 1 - beta1)
            square = new[f"square.{name}"] = torch.lerp(state[f"square.{name}"], gradient.square(), 1 - beta2)
            task_rate = rate.to(gradient.dtype).reshape(-1, *[1] * (gradient.dim() - 1))
            adapted[name] = params[name] - task_rate * mean / (square.sqrt() + self.eps)
        return adapted, new
