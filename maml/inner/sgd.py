"""Adaptation by plain gradient descent, as in the paper (eq. 1)."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Ge
from torch import Tensor

from maml.inner.base import Inner
from maml.types import NonNegativeInt, Params, PositiveFloat


class SGD(Inner):
    """theta' = theta - alpha * gradient, on the full support set.

    Args:
        step_size: step size of every step, the paper's alpha.
    """

    is_plain_sgd = True

    def __init__(
        self,
        step_size: PositiveFloat,
        num_steps: NonNegativeInt,
        order: Literal[1, 2],
        adapt: list[str],
        second_order_from: Annotated[int, Ge(2)] | None = None,
    ) -> None:
        super().__init__(step_size, num_steps, order, adapt, second_order_from)

    def update(
        self, params: Params, losses: Tensor, gradients: Params, state: Params, step: int, step_size: float | None
    ) -> tuple[Params, Params]:
        size = self.step_size if step_size is None else step_size
        return {name: params[name] - size * gradient for name, gradient in gradients.items()}, state
