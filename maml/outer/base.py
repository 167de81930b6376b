"""What an outer optimizer is: it sees the meta-objective as functions of theta, and moves theta."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol

from torch import Tensor

from maml.types import Params

OuterState = dict[str, Tensor]
"""All that an optimizer carries from one iteration to the next, as named tensors; it is saved and restored whole."""


class Objective(Protocol):
    """The meta-objective of one meta-batch. An optimizer that needs more than the gradient asks for more methods."""

    def gradient(self, theta: Params) -> tuple[Params, dict[str, Tensor]]:
        """Returns the gradient at theta, by name, and the batch's mean metrics (0-dim tensors)."""
        ...


class Outer(ABC):
    """The meta-update theta <- theta - beta * ... (Algorithm 1, line 8)."""

    @abstractmethod
    def init(self, theta: Params) -> OuterState:
        """Returns the state before the first update."""

    @abstractmethod
    def step(self, objective: Objective, theta: Params, state: OuterState) -> dict[str, Tensor]:
        """Updates ``theta`` and ``state`` in place; returns metrics as 0-dim tensors."""
