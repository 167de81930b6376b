"""The interface of an outer optimizer: it evaluates the meta-objective at theta and updates theta."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from maml.errors import MamlError
from maml.types import MatrixVectorProduct, Params, Tasks, select_entries

OuterState = dict[str, Tensor]
"""Everything that an outer optimizer keeps from one iteration to the next, as named tensors; checkpoints hold it."""


TaskStep = Callable[["Objective", Params, OuterState, Tasks], None]
"""Changes parameters of single tasks and the state in place; the objective has `Objective.task_gradients` only."""


class Objective(ABC):
    """The meta-objective on one meta-batch as a function of theta; the data is fixed.

    An outer optimizer asks it for gradients. In `maml.training.meta_gradient`, ``BatchObjective`` computes them when it
    is asked, for one seed; ``PrecomputedGradient`` has one seed's part of a gradient that was computed for several.
    """

    @abstractmethod
    def gradient(self, theta: Params) -> tuple[Params, dict[str, Tensor]]:
        """Returns the gradient at ``theta``, by name, and the mean metrics of the meta-batch, 0-dim tensors."""

    def on(self, tasks: Tasks) -> Objective:
        """Returns the same meta-objective on other tasks, for a meta-update that makes several steps.

        An algorithm draws in `Algorithm.sample_tasks` what all of its steps need, cuts the tasks of one step from it,
        and may add to them what the steps before have left.

        Args:
            tasks: T tasks.
        """
        raise _missing("computation on other tasks")

    def kl_gradient(self, theta: Params, every: int = 1) -> Params:
        """Returns the gradient at ``theta`` of the mean KL divergence from the policies that collected the rollouts.

        Args:
            theta: the parameters of the new policies.
            every: 1 uses every timestep, n uses every n-th.
        """
        raise _missing("gradient of a KL divergence")

    def evaluate(self, theta: Params) -> dict[str, Tensor]:
        """Returns the mean metrics at ``theta``, 0-dim tensors.

        They include ``loss`` and, for policies, ``kl``: the mean KL divergence from the policies that collected the
        rollouts.
        """
        raise _missing("mean metrics without a gradient")

    def task_gradients(self, params: Params, tasks: Tasks) -> tuple[Params, dict[str, Tensor]]:
        """Returns the gradient of each task's loss with respect to the task's own parameters, and its metrics.

        Args:
            params: parameters of each task, name -> ``(T, ...)``.
            tasks: T tasks.

        Returns:
            The gradients, name -> ``(T, ...)``, and the metrics, name -> ``(T,)``.
        """
        raise _missing("gradients of single tasks")

    def task_step(self, step: TaskStep, params: Params, state: OuterState, tasks: Tasks) -> tuple[Params, OuterState]:
        """Makes a step on the parameters of single tasks, as one compiled program if the run compiles.

        Args:
            step: the step. It is compiled once, so it may depend on its arguments only.
            params: parameters of each task, name -> ``(T, ...)``.
            state: the state of the outer optimizer.
            tasks: T tasks.

        Returns:
            The parameters and the state after the step. The step may overwrite its arguments.
        """
        raise _missing("steps on single tasks")

    def curvature(self, theta: Params, every: int = 1) -> MatrixVectorProduct:
        """Returns the Hessian of the mean KL divergence from the policies of ``theta``, at ``theta``.

        Args:
            theta: the parameters of the policies.
            every: 1 uses every timestep, n uses every n-th.
        """
        raise _missing("curvature")


def _missing(what: str) -> MamlError:
    return MamlError(
        f"this meta-objective has no {what}, but the outer optimizer or the algorithm asks for it; choose another "
        "outer optimizer, or train the seeds one by one with -m seed=..."
    )


def flatten(params: Params, theta: Params) -> Tensor:
    """Returns parameters as one vector, in the order of theta's names."""
    return torch.cat([params[name].flatten() for name in theta])


def unflatten(vector: Tensor, theta: Params) -> Params:
    """Splits a vector into parameters with the names and shapes of theta."""
    parts = vector.split([value.numel() for value in theta.values()])
    return {name: part.view_as(value) for (name, value), part in zip(theta.items(), parts, strict=True)}


class Outer(ABC):
    """The meta-update theta <- theta - beta * ... (Algorithm 1, line 8).

    Class attributes:
        needs_policy: whether the meta-update needs the KL divergence between policies, which only RL domains have.
    """

    needs_policy = False

    @property
    def mixes_entries(self) -> bool:
        """Whether the update of one entry of theta depends on the gradient of other entries."""
        return False

    @property
    def changes_step_size(self) -> bool:
        """Whether the step size is a function of the number of updates."""
        return False

    @abstractmethod
    def init_state(self, theta: Params) -> OuterState:
        """Returns the optimizer's state before the first update."""

    def select_state(self, state: OuterState, theta: Params, which: Tensor) -> OuterState:
        """Returns the state for some entries of theta's leading axis, which are independent of each other.

        A tensor with one number for each of theta's is taken to be in the order of `flatten`, as Adam's means are;
        other tensors, such as a step counter, are kept.

        Args:
            state: the state.
            theta: the parameters it belongs to, ``(T, ...)``.
            which: indices of the entries, or a mask ``(T,)``.
        """
        size = sum(value.numel() for value in theta.values())
        selected: OuterState = {}
        for name, value in state.items():
            if value.shape == (size,):
                entries = select_entries(unflatten(value, theta), which)
                value = flatten(entries, theta)
            selected[name] = value.clone()
        return selected

    @abstractmethod
    def step(self, objective: Objective, theta: Params, state: OuterState) -> dict[str, Tensor]:
        """Updates ``theta`` and ``state`` in place; returns metrics as 0-dim tensors."""
