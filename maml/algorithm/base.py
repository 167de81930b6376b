"""What an algorithm is: how theta is learnt from a meta-batch, and how it adapts to a task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from maml.compiling import ChunkGradient
from maml.domain.base import Domain, Metrics
from maml.inner.sgd import SGD
from maml.model.base import Model
from maml.outer.base import Outer, OuterState
from maml.seeding import Stream
from maml.types import Params, Tasks, expand, num_tasks, take


class Algorithm(ABC):
    """Learns theta; a subclass says only what one task's loss is as a function of theta.

    Args:
        domain: where tasks and data come from.
        model: f_theta.
        inner: adaptation.
        outer: the meta-update.
        stream: draws the initial parameters; its device is where theta lives.
        task_chunk: how many tasks are batched at once; gradients of the chunks add up. None batches them all.
    """

    def __init__(
        self,
        domain: Domain[Any],
        model: Model,
        inner: SGD,
        outer: Outer,
        stream: Stream,
        task_chunk: int | None = None,
    ) -> None:
        self.domain, self.model, self.inner, self.outer = domain, model, inner, outer
        self.task_chunk = task_chunk
        self.theta: Params = model.init(stream)
        self.outer_state: OuterState = outer.init(self.theta)
        inner.adapted_names(list(self.theta))  # raises now what would otherwise be raised in the first step
        self.chunk_gradient: ChunkGradient = self._chunk_gradient

    @abstractmethod
    def task_losses(self, theta: Params, tasks: Tasks) -> tuple[Tensor, Metrics]:
        """Returns the loss of each task as a function of theta, ``(T,)``, and further metrics ``(T,)``."""

    def step(self, tasks: Tasks) -> dict[str, Tensor]:
        """Makes one meta-update on a meta-batch; returns its mean metrics as 0-dim tensors."""
        return self.outer.step(_Objective(self, tasks), self.theta, self.outer_state)

    def gradient(self, theta: Params, tasks: Tasks) -> tuple[Params, dict[str, Tensor]]:
        """Returns the gradient of the mean task loss with respect to theta, and the mean metrics.

        Args:
            theta: parameters without a task axis.
            tasks: a meta-batch.
        """
        count = num_tasks(tasks)
        chunk = self.task_chunk or count
        total: tuple[Tensor, ...] | list[Tensor] = []
        for start in range(0, count, chunk):
            part = self.chunk_gradient(theta, take(tasks, start, start + chunk))
            total = part if not total else torch._foreach_add(total, part)
        total = torch._foreach_div(total, count)
        names = list(theta)
        return dict(zip(names, total, strict=False)), dict(zip(self._metric_names, total[len(names) :], strict=True))

    def _chunk_gradient(self, theta: Params, tasks: Tasks) -> list[Tensor]:
        """Returns sums over tasks: the gradient, in theta's order, then the metrics."""
        theta = {name: value.detach().requires_grad_() for name, value in theta.items()}
        with torch.enable_grad():
            losses, metrics = self.task_losses(theta, tasks)
            gradients = torch.autograd.grad(losses.sum(), list(theta.values()), materialize_grads=True)
        self._metric_names = ["loss", *metrics]
        return [*gradients, losses.detach().sum(), *(value.detach().sum() for value in metrics.values())]

    def adapt(
        self, theta: Params, tasks: Tasks, num_steps: int, step_sizes: Sequence[float] | None = None
    ) -> Iterator[Params]:
        """Yields each task's parameters after 0, 1, ..., ``num_steps`` gradient steps on its support data."""
        return self._adapt(theta, tasks, num_steps, create_graph=False, step_sizes=step_sizes)

    def _adapt(
        self,
        theta: Params,
        tasks: Tasks,
        num_steps: int,
        create_graph: bool,
        step_sizes: Sequence[float] | None = None,
    ) -> Iterator[Params]:
        def support_loss(params: Params, step: int) -> Tensor:
            data = self.domain.collect(tasks, "support", self.model, params, step)
            return self.domain.inner_loss(self.model, params, data)

        return self.inner.adapt(
            support_loss, expand(theta, num_tasks(tasks)), num_steps, create_graph=create_graph, step_sizes=step_sizes
        )

    def state_dict(self) -> dict[str, Params]:
        """Returns all that training changes."""
        return {"theta": self.theta, "outer": self.outer_state}

    def load_state_dict(self, state: dict[str, Params]) -> None:
        """Restores `state_dict` in place."""
        for mine, saved in ((self.theta, state["theta"]), (self.outer_state, state["outer"])):
            for name, value in mine.items():
                value.copy_(saved[name])


class _Objective:
    """The meta-objective of one meta-batch."""

    def __init__(self, algorithm: Algorithm, tasks: Tasks) -> None:
        self.gradient = partial(algorithm.gradient, tasks=tasks)
