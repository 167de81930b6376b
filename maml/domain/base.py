"""What a domain is: a distribution over tasks, how a task's data is collected, and its losses."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Generic, Literal, TypeVar

import torch
from torch import Tensor

from maml.model.base import Model
from maml.seeding import Stream
from maml.types import Examples, Params, Tasks

Split = Literal["train", "val", "test"]
Role = Literal["support", "query"]
Metrics = dict[str, Tensor]
"""Per-task numbers by name, each ``(T,)``."""

Data = TypeVar("Data")


class Domain(ABC, Generic[Data]):
    """A distribution over tasks. Algorithms see tasks, data and losses, never what kind they are.

    ``Data`` is what `collect` returns for T tasks: labelled examples, or rollouts.
    """

    in_shape: tuple[int, ...]
    out_dim: int
    num_shots: int
    num_query: int | None = None
    """Query examples (per class) in training; None is as many as support examples."""
    headline: str
    """The metric that a report leads with; larger is better if `larger_is_better`."""
    larger_is_better: bool

    def to(self, device: torch.device) -> None:
        """Moves whatever the domain holds to the device."""

    @abstractmethod
    def sample_tasks(
        self,
        num_tasks: int,
        stream: Stream,
        split: Split = "train",
        num_shots: int | None = None,
        num_query: int | None = None,
    ) -> Tasks:
        """Draws tasks and everything random about their data.

        Args:
            num_tasks: T.
            stream: the source of randomness; tasks are a pure function of it and lie on its device.
            split: which tasks.
            num_shots: K; None is the domain's.
            num_query: query examples (per class, in classification); None is the domain's.
        """

    @abstractmethod
    def collect(self, tasks: Tasks, role: Role, model: Model, params: Params, step: int = 0) -> Data:
        """Returns the support or query data of T tasks at gradient step ``step``.

        Supervised data depends on neither parameters nor step; rollouts are made with ``model`` and ``params``.
        """

    @abstractmethod
    def inner_loss(self, model: Model, params: Params, data: Data) -> Tensor:
        """Returns what adaptation descends, per task: ``(T,)``."""

    @abstractmethod
    def outer_loss(self, model: Model, params: Params, data: Data) -> tuple[Tensor, Metrics]:
        """Returns the meta-objective per task, ``(T,)``, and further metrics of the same forward pass."""

    @abstractmethod
    def measure(self, model: Model, params: Params, support: Data, query: Data, step: int) -> Metrics:
        """Returns the evaluation metrics per task after ``step`` gradient steps."""


class SupervisedDomain(Domain[Examples]):
    """A domain of labelled examples: one loss for adaptation and for the meta-objective."""

    @abstractmethod
    def loss(self, outputs: Tensor, data: Examples) -> tuple[Tensor, Metrics]:
        """Returns the loss per task, ``(T,)``, and further metrics, from the model's outputs ``(T, S, out_dim)``."""

    def inner_loss(self, model: Model, params: Params, data: Examples) -> Tensor:
        return self.loss(model(params, data.x), data)[0]

    def outer_loss(self, model: Model, params: Params, data: Examples) -> tuple[Tensor, Metrics]:
        return self.loss(model(params, data.x), data)
