"""Types that all parts share, and the letters of tensor axes.

Axis legend, the same letters everywhere: T tasks in one batched computation, B tasks in a meta-batch (T <= B),
S support and Q query examples per task, N ways, K shots, D features, R rollouts, H horizon.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Annotated, Literal, NamedTuple

from annotated_types import Ge, Gt, Le, Lt
from pydantic import AfterValidator
from torch import Tensor

Params = dict[str, Tensor]
"""Parameters by name, in the shapes of the model, or with a leading task axis, ``(T, ...)``."""

MatrixVectorProduct = Callable[[Params], Params]
"""A matrix over parameters, given as the function that multiplies it by a vector; with a task axis, one per task."""

Tasks = dict[str, Tensor]
"""The random draws that define T tasks and their data, by name, each ``(T, ...)``; rollouts are added to them."""

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
"""The lower and upper end of a range."""


Split = Literal["train", "val", "test"]
"""Which classes or goals tasks are drawn from."""


class Examples(NamedTuple):
    """Labelled examples of T tasks.

    Attributes:
        x: inputs, ``(T, S, ...)``.
        y: targets, ``(T, S, D)`` for regression or ``(T, S)`` class labels.
        num_shots: K, which the classification loss is divided by, as in the authors' code.
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
    """Returns ``count`` views of the same parameters along a leading task axis, ``(count, ...)``."""
    return {name: value.expand(count, *value.shape) for name, value in params.items()}


def num_elements(sizes: Sequence[int]) -> int:
    """Returns the number of elements of a tensor of this shape."""
    return math.prod(sizes)
