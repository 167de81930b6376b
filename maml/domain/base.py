"""The interface of a domain: a distribution over tasks, how a task's data is collected, and its losses."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from numbers import Integral
from typing import Generic, Literal, NamedTuple, Self, TypeVar

import torch
from torch import Tensor

from maml.errors import MamlError
from maml.hardware.workload import Workload
from maml.model.base import Model
from maml.seeding import Stream
from maml.types import Examples, MeasuredBy, Params, Split, Tasks, form_of

Role = Literal["support", "query"]
_ROLES: tuple[Role, ...] = ("support", "query")
Metrics = dict[str, Tensor]
"""Per-task numbers by name, each ``(T,)``; with `Domain.measured_by` showing, those of meta-test are ``(T, M)``."""

Data = TypeVar("Data")


class Predictions(NamedTuple):
    """The predicted classes of T tasks, as numbers of the data set's classes.

    Attributes:
        classes: the class of each query example, ``(T, Q)``.
        taken_for: the predicted class, ``(T, Q)``.
        choices: the classes that can be predicted in the task, ``(T, N)``.
    """

    classes: Tensor
    taken_for: Tensor
    choices: Tensor


_reads_data = ContextVar("reads_data", default=True)


def reads_data() -> bool:
    """Returns whether a domain under construction reads its data set: not within `without_data`."""
    return _reads_data.get()


@contextmanager
def without_data() -> Iterator[None]:
    """Domains that are built within this context read no data set.

    They have the shapes and the `Domain.workload` of the full domain, and algorithms can adapt to data that a caller
    gives. They cannot draw tasks. The constructor of a domain with a data set asks `reads_data` before it reads.
    """
    before = _reads_data.set(False)
    try:
        yield
    finally:
        _reads_data.reset(before)


class Domain(ABC, Generic[Data]):
    """A distribution over tasks. Algorithms use tasks, data and losses without knowing their kind.

    ``Data`` is what `data` returns for T tasks: labelled examples, or rollouts.

    Class attributes:
        headline: the metric of a report's headline number.
        larger_is_better: whether a larger headline is better.
        measured_by: what a curve of meta-test is over. By ``gradient step``, `measure` is called after each step. By
            ``showing``, nothing adapts by gradient steps, and `measure` is called once: it returns the metrics at the
            1st, 2nd, ... showing of a class, after none, one, ... labelled examples of it.
        draws_classes: whether each task draws its own classes and numbers them anew, so that an output of the network
            means another class in every task.
        on_policy: whether data depends on the parameters that collect it. Only then `collect` adds data.
        selected_by: the entry of `rollout_metrics` by which training keeps its best theta; larger is better. With
            None, only ``validate_every`` makes training keep a best theta.

    Attributes:
        in_shape: shape of one input of the model.
        out_dim: number of outputs of the model.
        num_shots: K, support examples (per class, in classification; rollouts, in reinforcement learning).
        num_query: query examples (per class) in training; None is as many as support examples.
        workload: how tasks load a machine.
        class_names: names of the data set's classes; empty if `predict_classes` is not defined.
        data_digest: a hash of the data set and its splits, which a run records; None if no data set was read.
    """

    in_shape: tuple[int, ...]
    out_dim: int
    num_shots: int
    num_query: int | None = None
    class_names: Sequence[str] = ()
    headline: str
    larger_is_better: bool
    measured_by: MeasuredBy = "gradient step"
    draws_classes = False
    on_policy = False
    selected_by: str | None = None
    data_digest: str | None = None

    def check_available(self) -> None:
        """Checks that the data set's files exist, without reading or downloading them, also within `without_data`.

        Raises:
            Unavailable: if files are missing and cannot be downloaded.
        """

    def check_sizes(self) -> None:
        """Checks that ``in_shape`` and ``out_dim`` are sizes.

        Raises:
            MamlError: if not.
        """
        in_shape, out_dim = getattr(self, "in_shape", None), getattr(self, "out_dim", None)
        sizes = (*in_shape, out_dim) if isinstance(in_shape, Sequence) else ()
        if not sizes or not all(isinstance(size, Integral) and int(size) > 0 for size in sizes):
            raise MamlError(
                f"{type(self).__name__} has in_shape={in_shape!r} and out_dim={out_dim!r}, but in_shape is a tuple of "
                "sizes and out_dim a size: integers above 0"
            )

    @property
    def workload(self) -> Workload:
        """How the tasks of this domain load a machine."""
        return Workload()

    @property
    def has_validation(self) -> bool:
        """Whether the split ``val`` holds other data than ``train``, so that it shows what training does not."""
        return False

    def least_elements(self, num_shots: int, num_query: int) -> int:
        """Returns a lower bound on the numbers that one task holds in memory, by which impossible runs are refused.

        Args:
            num_shots: K.
            num_query: query examples (per class, in classification).
        """
        return num_shots + num_query

    def check_adaptation(self, algorithm: str) -> None:
        """Checks that training gives each task data of its own, so that an algorithm can adapt to it.

        Args:
            algorithm: name of the algorithm that adapts in training.

        Raises:
            MamlError: if not.
        """

    def check_model(self, model: Model) -> None:
        """Checks that the losses can take the model's outputs.

        Raises:
            MamlError: if not.
        """

    def to(self, device: torch.device) -> None:
        """Moves the domain's tensors to the device."""

    def with_ways(self, num_ways: int) -> Self:
        """Returns this domain with another number of classes in a task, on the same data; ``out_dim`` stays.

        Meta-test uses it, so that its tasks can have other ways than those of training. A domain whose tasks draw their
        own classes overrides it.

        Args:
            num_ways: N.

        Raises:
            MamlError: if the tasks of this domain do not draw classes.
        """
        raise MamlError(
            f"evaluation.num_ways={num_ways} is for tasks that draw their own classes, and those of "
            f"{type(self).__name__} do not; set evaluation.num_ways=null"
        )

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
            num_shots: K; None is the domain's own.
            num_query: query examples (per class, in classification). None is ``num_shots`` if that is given, else the
                domain's own number.

        Raises:
            MamlError: if there is too little data.
        """
        if num_query is None:
            num_query = (self.num_query if num_shots is None else num_shots) or self.num_shots
        tasks = self.draw_tasks(num_tasks, stream.child(split), split, num_shots or self.num_shots, num_query)
        self._check_drawn(tasks, num_tasks)
        return tasks

    def _check_drawn(self, tasks: object, num_tasks: int) -> None:
        values = tasks if isinstance(tasks, dict) else {}
        fit = (isinstance(value, Tensor) and value.shape[:1] == (num_tasks,) for value in values.values())
        if not values or not all(fit):
            shown = ", ".join(f"{name} of {form_of(value)}" for name, value in values.items())
            raise MamlError(
                f"{type(self).__name__} has to draw tasks as a dictionary of tensors, with {num_tasks} tasks as their "
                f"first axis, but draws {shown or type(tasks).__name__}"
            )

    def check_tasks(self, tasks: Tasks) -> None:
        """Checks, before any training, that the evaluation can measure its tasks; a subclass may say how.

        Args:
            tasks: all tasks of reinforcement learning, on the CPU; in other domains, one task on the domain's device.

        Raises:
            MamlError: if one of them is impossible, or its inputs do not have the shape that the model is built for.
        """

    @abstractmethod
    def draw_tasks(self, num_tasks: int, stream: Stream, split: Split, num_shots: int, num_query: int) -> Tasks:
        """Draws tasks for `sample_tasks`, which fills in the defaults.

        Task i must not depend on ``num_tasks``: the first three of five tasks are those of a draw of three.

        Args:
            num_tasks: T.
            stream: the source of randomness; each split has its own.
            split: which tasks.
            num_shots: K.
            num_query: query examples (per class, in classification).

        Returns:
            Tensors ``(T, ...)`` by name, from which `data` makes the examples.
        """

    def authors_test_tasks(self, num_tasks: int, num_shots: int) -> Tasks:
        """Returns the paper's own meta-test tasks, in the form of `draw_tasks`, on the CPU.

        Args:
            num_tasks: T; the first T of them are returned.
            num_shots: K, for support and query data.

        Raises:
            MamlError: if they cannot be rebuilt, or there are fewer.
        """
        raise MamlError(
            f"{type(self).__name__} has no bank that is rebuilt from the authors' code (in reinforcement learning, the "
            "test goals are the authors' without it); set evaluation.bank=seeded"
        )

    def collect(self, tasks: Tasks, model: Model, params: Params, step: int) -> None:
        """Adds rollouts to the tasks, collected with the parameters ``params`` of gradient step ``step``.

        A domain of labelled examples adds nothing, because the tasks already hold its data.
        """

    @abstractmethod
    def data(self, tasks: Tasks, role: Role, step: int = 0) -> Data:
        """Returns the support or query data of T tasks. It depends on the tasks only.

        Args:
            tasks: T tasks, with their rollouts if the domain is on-policy.
            role: support or query.
            step: the gradient step whose rollouts are returned; labelled examples are the same at every step.
        """

    def subsample_timesteps(self, tasks: Tasks, every: int) -> Tasks:
        """Returns the tasks with every ``every``-th timestep of their rollouts; other data stays as it is."""
        return tasks

    def rollout_metrics(self, tasks: Tasks) -> tuple[Metrics, Metrics]:
        """Returns metrics of a meta-batch's rollouts, which are logged with the losses.

        Returns:
            Metrics that are averaged over the tasks, and metrics that are summed over them, by name, each ``(T,)``.
        """
        return {}, {}

    @abstractmethod
    def inner_loss(self, model: Model, params: Params, data: Data) -> Tensor:
        """Returns the loss that adaptation minimises, per task, ``(T,)``."""

    @abstractmethod
    def outer_loss(self, model: Model, params: Params, data: Data) -> tuple[Tensor, Metrics]:
        """Returns the meta-objective per task, ``(T,)``, and further metrics of the same forward pass."""

    @abstractmethod
    def measure(self, model: Model, params: Params, support: Data, query: Data, step: int) -> Metrics:
        """Returns the evaluation metrics per task after ``step`` gradient steps, ``(T,)``.

        In a domain that measures by showing, they are ``(T, M)`` for M showings; NaN where a task has no such showing.
        """

    def predict_classes(self, model: Model, params: Params, tasks: Tasks) -> Predictions:
        """Returns the predictions that the headline metric counts; only in domains that have ``class_names``."""
        raise NotImplementedError


class SupervisedDomain(Domain[Examples]):
    """A domain of labelled examples. Adaptation and the meta-objective have the same loss."""

    @property
    def element_domain(self) -> SupervisedDomain | None:
        """The domain of single elements, if a network reads the elements of a sequence and their labels; else None.

        A user gives elements and labels to a trained network, and `join` makes sequences of them.
        """
        return None

    def join(self, elements: Tensor, labels: Tensor) -> Tensor:
        """Joins elements and labels to sequences, the model's inputs; only in domains with an `element_domain`.

        Args:
            elements: inputs of `element_domain`, ``(T, L, *in_shape)``.
            labels: the class number of every element but the last, ``(T, L - 1)``.
        """
        raise NotImplementedError

    def check_tasks(self, tasks: Tasks) -> None:
        for role in _ROLES:
            data: object = self.data(tasks, role)
            if not isinstance(data, Examples):
                raise MamlError(f"{type(self).__name__}.data has to return Examples, but returns {type(data).__name__}")
            if data.x.shape[2:] != tuple(self.in_shape):
                raise MamlError(
                    f"{type(self).__name__}.data has to return inputs (T, S, *in_shape), and its in_shape is "
                    f"{tuple(self.in_shape)}, but it returns {tuple(data.x.shape)}"
                )

    @abstractmethod
    def loss(self, outputs: Tensor, data: Examples) -> tuple[Tensor, Metrics]:
        """Returns the loss per task, ``(T,)``, and further metrics, from the model's outputs ``(T, S, out_dim)``."""

    def inner_loss(self, model: Model, params: Params, data: Examples) -> Tensor:
        return self.outer_loss(model, params, data)[0]

    def outer_loss(self, model: Model, params: Params, data: Examples) -> tuple[Tensor, Metrics]:
        returned = self.loss(self._outputs(model, params, data), data)
        kinds = [type(part) for part in returned] if isinstance(returned, tuple) else [type(returned)]
        if len(kinds) != 2 or not issubclass(kinds[0], Tensor) or not issubclass(kinds[1], dict):
            raise MamlError(
                f"{type(self).__name__}.loss has to return two values, the losses, a tensor (T,), and a dictionary of "
                f"metrics, which may be empty; it returns {' and '.join(kind.__name__ for kind in kinds)}"
            )
        return returned

    def _outputs(self, model: Model, params: Params, data: Examples) -> Tensor:
        outputs = model(params, data.x)
        if not isinstance(outputs, Tensor):
            raise MamlError(f"{type(model).__name__} has to return a tensor, but returns {type(outputs).__name__}")
        if outputs.shape[:2] != data.x.shape[:2]:  # broadcasting would hide it, as below
            raise MamlError(
                f"{type(model).__name__} has to return outputs (T, S, out_dim) for inputs {tuple(data.x.shape)}, but "
                f"returns {tuple(outputs.shape)}"
            )
        if data.y.is_floating_point() and outputs.shape[-1] != self.out_dim:
            raise MamlError(
                f"{type(model).__name__} gives {outputs.shape[-1]} numbers for each example, but the domain has "
                f"out_dim={self.out_dim}; give the last layer as many outputs as the constructor's out_dim says"
            )
        return outputs
