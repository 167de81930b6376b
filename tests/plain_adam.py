"""One step of Adam in TensorFlow's form (Kingma and Ba 2015, end of section 2), a reference for the tests."""

from __future__ import annotations

import math

from torch import Tensor

State = tuple[Tensor | float, Tensor | float, float]
"""The two running means and the number of steps so far."""

NEW: State = (0.0, 0.0, 0.0)


def step(
    value: Tensor,
    gradient: Tensor,
    state: State,
    step_size: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> tuple[Tensor, State]:
    """Takes one step; returns the new value and the new state."""
    mean = betas[0] * state[0] + (1 - betas[0]) * gradient
    square = betas[1] * state[1] + (1 - betas[1]) * gradient**2
    count = state[2] + 1
    rate = step_size * math.sqrt(1 - betas[1] ** count) / (1 - betas[0] ** count)
    return value - rate * mean / (square.sqrt() + eps), (mean, square, count)
