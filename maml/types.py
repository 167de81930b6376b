"""Types that all parts share, and the letters of tensor axes.

Axis legend, the same letters everywhere: T tasks in one batched computation, B tasks in a meta-batch (T <= B),
S support and Q query examples per task, N ways, K shots, D features, R rollouts, H horizon.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Annotated, Literal, NamedTuple

import torch
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
Seed = Annotated[int, Ge(0), Le(2**63 - 1)]
"""A random seed. Streams count modulo 2^64, so a larger or negative seed would draw the numbers of another one."""

# Limits of Linux and macOS, in bytes. A run folder adds up to about 150 bytes to the path that a user gives.
_LONGEST_NAME, _LONGEST_PATH = 255, 3900


def _ascending(interval: tuple[float, float]) -> tuple[float, float]:
    """The first below the second."""
    low, high = interval
    if not low < high:
        raise ValueError(f"a range goes from its lower to its upper end, but {low} is not below {high}; swap them")
    return interval


Interval = Annotated[tuple[float, float], AfterValidator(_ascending)]
"""The lower and upper end of a range."""


def _not_empty(text: str) -> str:
    """Not empty."""
    if not text.strip():
        raise ValueError("it is empty")
    return text


Text = Annotated[str, AfterValidator(_not_empty)]
"""A text that is not empty."""


def _storable(path: str) -> str:
    """Not empty."""
    if not path.strip():
        raise ValueError("a path cannot be empty; the current folder is '.'")
    if "\0" in path:
        raise ValueError("a path cannot have a zero byte")
    longest = max(len(os.fsencode(name)) for name in path.split("/"))
    if longest > _LONGEST_NAME:
        raise ValueError(f"a name in it has {longest} bytes, but file systems take {_LONGEST_NAME}; shorten it")
    if len(os.fsencode(path)) > _LONGEST_PATH:
        raise ValueError(f"it has {len(os.fsencode(path))} bytes; a path has at most {_LONGEST_PATH} here")
    return path


FilePath = Annotated[str, AfterValidator(_storable)]
"""The path of a file or folder, which need not exist."""


Split = Literal["train", "val", "test"]
"""Which classes or goals tasks are drawn from."""


MeasuredBy = Literal["gradient step", "showing"]
"""What a curve of meta-test is over: gradient steps from 0, or showings of a class from the 1st."""

FIRST_STEP: dict[MeasuredBy, int] = {"gradient step": 0, "showing": 1}
"""The number that the first value of a curve, step 0 of a report, has for the reader."""


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


def form_of(value: object) -> str:
    """Returns what a value is, for an error about what a user's class returns: ``shape (2, 3)`` or ``type float``."""
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"type {type(value).__name__}"


def take(tasks: Tasks, start: int, stop: int) -> Tasks:
    """Returns tasks ``start`` to ``stop`` (exclusive) of a batch."""
    return {name: value[start:stop] for name, value in tasks.items()}


def num_tasks(tasks: Tasks) -> int:
    """Returns T."""
    return next(iter(tasks.values())).shape[0]


def expand(params: Params, count: int) -> Params:
    """Returns ``count`` views of the same parameters along a leading task axis, ``(count, ...)``."""
    return {name: _expand(value, count) for name, value in params.items()}


def _expand(value: Tensor, count: int) -> Tensor:
    if value.is_contiguous():
        return value.expand(count, *value.shape)
    # Its gradient is a sum over the copies, several times as fast if their axes are in the order of memory.
    order = sorted(range(value.dim()), key=value.stride, reverse=True)
    rows = value.permute(order)
    return rows.expand(count, *rows.shape).permute(0, *(1 + order.index(axis) for axis in range(value.dim())))


def without_copies(params: Params) -> Params:
    """Undoes `expand`: a parameter that is one tensor seen T times gets a leading axis of 1."""
    return {name: value[:1] if value.stride(0) == 0 else value for name, value in params.items()}


def concatenate(parts: Sequence[Params]) -> Params:
    """Returns tensors of the same name as one, along their leading axis."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def select_entries(params: Params, which: Tensor | int) -> Params:
    """Returns the entries of the leading axis with these indices, at this one, or where a mask is true."""
    return {name: value[which] for name, value in params.items()}
