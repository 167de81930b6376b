"""What an outer optimizer is: it sees the meta-objective as functions of theta, and moves theta."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from maml.types import MatrixVectorProduct, Params, Tasks

OuterState = dict[str, Tensor]
"""All that an optimizer carries from one iteration to the next, as named tensors; it is saved and restored whole."""


class Objective(ABC):
    """The meta-objective of one meta-batch, whose data is fixed: it can be evaluated at any theta."""

    @abstractmethod
    def gradient(self, theta: Params) -> tuple[Params, dict[str, Tensor]]:
        """Returns the gradient at theta, by name, and the batch's mean metrics (0-dim tensors)."""

    def evaluate(self, theta: Params) -> dict[str, Tensor]:
        """Returns the batch's mean metrics at theta: ``loss``, and how far the policies moved, ``kl``."""
        raise NotImplementedError

    def task_gradients(self, params: Params, tasks: Tasks) -> tuple[Params, dict[str, Tensor]]:
        """Returns the gradient of each task's loss with respect to its own parameters, and its metrics.

        Args:
            params: name -> ``(T, ...)``.
            tasks: T tasks.

        Returns:
            name -> ``(T, ...)``; metrics ``(T,)``.
        """
        raise NotImplementedError

    def curvature(self, theta: Params, every: int = 1) -> MatrixVectorProduct:
        """Returns the Hessian of the mean KL from the policies of ``theta``, at it; from every so many-th timestep."""
        raise NotImplementedError


class Outer(ABC):
    """The meta-update theta <- theta - beta * ... (Algorithm 1, line 8).

    Class attributes:
        needs_policy: whether it asks how far a policy moves, which only RL domains can say.
    """

    needs_policy = False

    @abstractmethod
    def init_state(self, theta: Params) -> OuterState:
        """Returns the state before the first update."""

    @abstractmethod
    def step(self, objective: Objective, theta: Params, state: OuterState) -> dict[str, Tensor]:
        """Updates ``theta`` and ``state`` in place; returns metrics as 0-dim tensors."""
