"""The vocabulary of tensors that every part shares.

Axis legend, the same letters everywhere: T tasks in one batched computation, B tasks in a meta-batch (T <= B),
S support and Q query examples per task, N ways, K shots, D features, R rollouts, H horizon.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Annotated, NamedTuple

from annotated_types import Ge, Gt, Le, Lt
from pydantic import AfterValidator
from torch import Tensor

Params = dict[str, Tensor]
"""Parameters by name: as the model lists them, or with a leading task axis, ``(T, ...)``."""

MatrixVectorProduct = Callable[[Params], Params]
"""A matrix over parameters, as what it makes of a vector; with a task axis, one matrix per task."""

Tasks = dict[str, Tensor]
"""All that was drawn to define T tasks and their data, by name, each ``(T, ...)``: a task is a pure function of it."""

Count = Annotated[int, Ge(1)]
NonNegativeInt = Annotated[int, Ge(0)]
PositiveFloat = Annotated[float, Gt(0)]
NonNegativeFloat = Annotated[float, Ge(0)]
Decay = Annotated[float, Ge(0), Lt(1)]
Discount = Annotated[float, Ge(0), Le(1)]


def _ascending(interval: tuple[float, float]) -> tuple[float, float]:
    """The first below the second."""
    low, high = interval
    if not low < high:
        raise ValueError(f"a range goes from its lower to its upper end, but {low} is not below {high}; swap them")
    return interval


Interval = Annotated[tuple[float, float], AfterValidator(_ascending)]
"""Lower and upper end."""


class Examples(NamedTuple):
    """Labelled examples of T tasks.

    Attributes:
        x: inputs, ``(T, S, ...)``.
        y: targets, ``(T, S, D)`` for regression or ``(T, S)`` class labels.
        num_shots: K, by which the authors divide the summed classification loss.
    """

    x: Tensor
    y: Tensor
    num_shots: int


def take(tasks: Tasks, start: int, stop: int) -> Tasks:
    """Returns tasks ``start`` to ``stop`` (exclusive) of a batch."""
    return {name: value[start:stop] for name, value in tasks.items()}


def num_tasks(tasks: Tasks) -> int:
    """Returns T."""
    return next(iter(tasks.values())).shape[0]


def expand(params: Params, count: int) -> Params:
    """Returns ``count`` views of the same parameters, one per task: every task starts at theta."""
    return {name: value.expand(count, *value.shape) for name, value in params.items()}


def num_elements(sizes: Sequence[int]) -> int:
    """Returns the number of elements of a tensor of this shape."""
    return math.prod(sizes)
