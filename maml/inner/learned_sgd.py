"""Adaptation by gradient descent with meta-learnt step sizes (section 2.2: "may be fixed or meta-learned")."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Ge
from torch import Tensor

from maml.inner.base import Inner
from maml.seeding import Stream
from maml.types import Params, PositiveFloat


class LearnedSGD(Inner):
    """theta' = theta - alpha_{n,s} * gradient: one step size per parameter tensor n and step s.

    The step sizes are part of theta, as ``inner.step_size.<parameter>``, ``(num_steps,)``. If evaluation takes more
    steps than training, the further steps use the last step size.

    Args:
        step_size: initial value of every step size.
    """

    def __init__(
        self,
        step_size: PositiveFloat,
        num_steps: Annotated[int, Ge(1)],
        order: Literal[1, 2],
        adapt: list[str],
        second_order_from: Annotated[int, Ge(2)] | None = None,
    ) -> None:
        super().__init__(step_size, num_steps, order, adapt, second_order_from)

    def init_learned(self, params: Params, stream: Stream) -> Params:
        return {
            f"inner.step_size.{name}": params[name].new_full((self.num_steps,), self.step_size)
            for name in self.adapted_names(list(params))
        }

    def update(
        self, params: Params, losses: Tensor, gradients: Params, state: Params, step: int, step_size: float | None
    ) -> tuple[Params, Params]:
        adapted = {}
        for name, gradient in gradients.items():
            if step_size is None:
                learnt = params[f"inner.step_size.{name}"][:, min(step, self.num_steps - 1)]
                size = learnt.reshape(-1, *[1] * (gradient.dim() - 1))
            adapted[name] = params[name] - (size if step_size is None else step_size) * gradient
        return adapted, state
