"""What a domain is: a distribution over tasks, how a task's data is collected, and its losses."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Generic, Literal, Self, TypeVar

import torch
from torch import Tensor

from maml.hardware.workload import Workload
from maml.model.base import Model
from maml.seeding import Stream
from maml.types import Examples, Params, Split, Tasks

Role = Literal["support", "query"]
Metrics = dict[str, Tensor]
"""Per-task numbers by name, each ``(T,)``."""

Data = TypeVar("Data")


class Domain(ABC, Generic[Data]):
    """A distribution over tasks. Algorithms see tasks, data and losses, never what kind they are.

    ``Data`` is what `data` returns for T tasks: labelled examples, or rollouts.

    Class attributes:
        headline: the metric that a report leads with.
        larger_is_better: whether a larger headline is better.
        on_policy: whether data depends on the parameters that collect it, so that `collect` has work to do.
        selected_by: the entry of `rollout_metrics`, larger is better, by which training keeps its best theta; None
            keeps the last one only.

    Attributes:
        in_shape: shape of one input of the model.
        out_dim: number of outputs of the model.
        num_shots: K, support examples (per class, in classification; rollouts, in reinforcement learning).
        num_query: query examples (per class) in training; None is as many as support examples.
        workload: how tasks load a machine.
    """

    in_shape: tuple[int, ...]
    out_dim: int
    num_shots: int
    num_query: int | None = None
    headline: str
    larger_is_better: bool
    on_policy = False
    selected_by: str | None = None

    @classmethod
    def without_data(cls, **options: Any) -> Self:
        """Builds the domain as its constructor does, but reads no data set.

        Its model, shapes and `workload` are those of the full domain, and it can adapt to data that a caller gives. It
        cannot draw tasks. A domain that reads a data set overrides this.

        Args:
            options: those of the constructor.
        """
        return cls(**options)

    def check_available(self) -> None:
        """Checks at a glance that a data set is there, without reading or downloading it; also `without_data`.

        Raises:
            Unavailable: if it is missing and cannot be downloaded.
        """

    @property
    def workload(self) -> Workload:
        """How the tasks of this domain load a machine."""
        return Workload()

    def to(self, device: torch.device) -> None:
        """Moves whatever the domain holds to the device."""

    def sample_tasks(
        self,
        num_tasks: int,
        stream: Stream,
        split: Split = "train",
        num_shots: int | None = None,
        num_query: int | None = None,
    ) -> Tasks:
        """Draws tasks and everything random about their data. A subclass says how in `draw_tasks`.

        Args:
            num_tasks: T.
            stream: the source of randomness; tasks are a pure function of it and lie on its device.
            split: which tasks.
            num_shots: K; None is the domain's.
            num_query: query examples (per class, in classification); None is the domain's or, at a K that is given,
                K.

        Raises:
            MamlError: if there is too little data.
        """
        if num_query is None:
            num_query = (self.num_query if num_shots is None else num_shots) or self.num_shots
        return self.draw_tasks(num_tasks, stream.child(split), split, num_shots or self.num_shots, num_query)

    @abstractmethod
    def draw_tasks(self, num_tasks: int, stream: Stream, split: Split, num_shots: int, num_query: int) -> Tasks:
        """Draws tasks for `sample_tasks`, which fills in the defaults.

        Task i must not depend on ``num_tasks``: the first three of five tasks are those of a draw of three.

        Args:
            num_tasks: T.
            stream: the source of randomness, another one for each split.
            split: which tasks.
            num_shots: K.
            num_query: query examples (per class, in classification).

        Returns:
            Tensors ``(T, ...)`` by name: all that was drawn, from which `data` makes the examples.
        """

    def collect(self, tasks: Tasks, model: Model, params: Params, step: int) -> None:
        """Adds rollouts to the tasks, collected with the parameters ``params`` of gradient step ``step``.

        A domain of labelled examples adds nothing: its data is in the tasks from the start.
        """

    @abstractmethod
    def data(self, tasks: Tasks, role: Role, step: int = 0) -> Data:
        """Returns the support or query data of T tasks, a function of the tasks alone.

        Args:
            tasks: as drawn, and with what `collect` added.
            role: support or query.
            step: the gradient step whose rollouts are wanted; labelled examples are the same in all.
        """

    def subsample_timesteps(self, tasks: Tasks, every: int) -> Tasks:
        """Returns the tasks with every ``every``-th timestep of their rollouts; other data stays as it is."""
        return tasks

    def rollout_metrics(self, tasks: Tasks) -> tuple[Metrics, Metrics]:
        """Returns what is logged about the rollouts of a meta-batch, beside the losses.

        Returns:
            Numbers of which the mean over tasks is logged, and numbers of which the sum is, each ``(T,)`` by name.
        """
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
