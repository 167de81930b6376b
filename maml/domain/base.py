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

    ``Data`` is what `data` returns for T tasks: labelled examples, or rollouts.

    Class attributes:
        headline: the metric that a report leads with; larger is better if `larger_is_better`.
        on_policy: whether data depends on the parameters that collect it: whether `collect` does anything.
        selected_by: the entry of `summary`, larger better, by which the best theta of training is kept; None keeps the
            last one only.
    """

    in_shape: tuple[int, ...]
    out_dim: int
    num_shots: int
    num_query: int | None = None
    """Query examples (per class) in training; None is as many as support examples."""
    headline: str
    larger_is_better: bool
    on_policy = False
    selected_by: str | None = None

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

    def collect(self, tasks: Tasks, model: Model, params: Params, step: int) -> None:
        """Adds to the tasks what ``params``, of gradient step ``step``, find in them: rollouts.

        Supervised data is in the tasks from the start, whatever the parameters.
        """

    @abstractmethod
    def data(self, tasks: Tasks, role: Role, step: int = 0) -> Data:
        """Returns the support or query data of T tasks; of gradient step ``step``, where that matters.

        They are a function of the tasks alone: a loss on them can be evaluated again and again.
        """

    def thin(self, tasks: Tasks, every: int) -> Tasks:
        """Returns the tasks with every so many-th timestep of their rollouts."""
        return tasks

    def summary(self, tasks: Tasks) -> tuple[Metrics, Metrics]:
        """Returns what is logged of a meta-batch beside the losses: numbers whose mean is, and whose sum."""
        return {}, {}

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
