"""What an algorithm is: how theta is learnt from a meta-batch, and how it adapts to a task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from maml.algorithm.best import init_best
from maml.domain.base import Domain, Metrics
from maml.errors import MamlError
from maml.inner.base import Inner
from maml.model.base import Model
from maml.outer.base import Objective, Outer, OuterState
from maml.seeding import Stream
from maml.types import MatrixVectorProduct, Params, Tasks, expand

# Names of groups of tensors in older checkpoints.
_RENAMED_GROUPS = {"carried": "buffers"}

MakeModel = Callable[[Sequence[int], int], Model]
"""Makes f_theta for inputs of a shape and a number of outputs."""


@dataclass(frozen=True)
class Parts:
    """What every algorithm is made of.

    Attributes:
        domain: where tasks and data come from.
        make_model: makes f_theta; an algorithm may want other inputs or outputs than the domain's.
        inner: adaptation.
        outer: the meta-update.
        stream: draws the initial parameters; theta lives on its device.
    """

    domain: Domain[Any]
    make_model: MakeModel
    inner: Inner
    outer: Outer
    stream: Stream


class Algorithm(ABC):
    """Learns theta; most subclasses say only what one task's loss is as a function of its parameters.

    An algorithm computes on T tasks at once. The parameters that it is given always have a leading task axis,
    ``(T, ...)``: one copy for each task. Which tasks are computed together, for how many seeds, on how many processes,
    and whether the computation is compiled is decided elsewhere (`maml.training.meta_gradient`).

    Class attributes:
        differentiates_adaptation: whether the loss is measured after adaptation and differentiated through it; then
            ``inner.order`` matters and step sizes can be learnt.
        trained_as: the class whose training, and whose runs, this one shares, if the two differ in meta-test only.
        learns_from_rollouts: whether it can learn from data that depend on theta, as rollouts do.
        sums_over_tasks: whether its meta-update follows from a sum over the tasks of a meta-batch. Then processes can
            share the tasks, and several seeds can be trained as one computation.

    Attributes:
        theta: what is meta-learnt: the model's parameters and those of the inner optimizer, without a task axis.
        buffers: other tensors that training changes (running statistics, an optimizer's state), by name.
        outer_state: of the outer optimizer.
        best: see `maml.algorithm.best`; empty where the last theta is evaluated.
    """

    differentiates_adaptation = False
    trained_as: str | None = None
    learns_from_rollouts = False
    sums_over_tasks = True

    def __init__(self, parts: Parts) -> None:
        self.domain, self.inner, self.outer = parts.domain, parts.inner, parts.outer
        self.stream = parts.stream
        if self.domain.on_policy and not self.learns_from_rollouts:
            raise MamlError(
                f"{type(self).__name__} learns from labelled examples, {type(self.domain).__name__} gives rollouts; "
                "choose algorithm=maml, pretrain, oracle, random_init or context_vector"
            )
        if self.outer.needs_policy and not self.domain.on_policy:
            raise MamlError(
                f"{type(self.outer).__name__} limits how far a policy moves, but {type(self.domain).__name__} has no "
                "policy; choose outer=adam, or an RL domain"
            )
        self.model = parts.make_model(self.domain.in_shape, self.domain.out_dim)
        self.set_initial(self.model.init(self.stream))

    @property
    def name(self) -> str:
        """What the console and ``run.json`` call it."""
        return type(self).__name__

    def set_initial(self, params: Params, buffers: Params | None = None) -> None:
        """Sets what training starts from.

        Args:
            params: of the model, without a task axis.
            buffers: other tensors that training changes.

        Raises:
            MamlError: if no parameter adapts, or step sizes would be learnt without a gradient.
        """
        self.inner.adapted_names(list(params))  # raises now what would otherwise be raised in the first step
        learnt = self.inner.init_learned(params)
        if learnt and not self.differentiates_adaptation:
            raise MamlError(
                f"{type(self).__name__} does not differentiate through adaptation, so it cannot learn "
                f"{next(iter(learnt))} and the like; choose inner=sgd, or algorithm=maml"
            )
        self.theta: Params = params | learnt
        self.buffers: Params = buffers or {}
        self.outer_state: OuterState = self.outer.init_state(self.theta)
        self.best: Params = init_best(self.theta) if self.domain.selected_by else {}

    def sample_tasks(self, count: int, stream: Stream) -> Tasks:
        """Draws what one meta-update learns from: a meta-batch of ``count`` tasks, a pure function of the stream."""
        return self.domain.sample_tasks(count, stream)

    @abstractmethod
    def task_losses(self, params: Params, tasks: Tasks) -> tuple[Tensor, Metrics]:
        """Returns the loss of each task, ``(T,)``, and further metrics, each ``(T,)``.

        The meta-gradient is the gradient of the mean loss with respect to theta.

        Args:
            params: theta and the buffers, name -> ``(T, ...)``.
            tasks: T tasks.

        Returns:
            A metric called ``loss`` is logged in place of the loss. A metric with the name of a buffer is its new
            value for each task, ``(T, ...)``; the mean over tasks is kept.
        """

    def collect(self, params: Params, tasks: Tasks) -> None:
        """Adds to a meta-batch of an on-policy domain the data that `task_losses` needs.

        Args:
            params: theta and the buffers, name -> ``(T, ...)``.
            tasks: T tasks; changed in place.
        """
        self.domain.collect(tasks, self.model, self.theta_of(params), 0)

    def curvature(self, params: Params, tasks: Tasks) -> MatrixVectorProduct:
        """Returns, per task, the Hessian of the KL divergence from the policy of ``params``, at ``params``.

        Args:
            params: theta and the buffers, name -> ``(T, ...)``.
            tasks: T tasks with their rollouts.

        Returns:
            A product that takes and gives vectors with a task axis, name -> ``(T, ...)``.
        """
        raise MamlError(f"{type(self).__name__} does not know how far a policy moves; choose outer=adam")

    def meta_update(self, objective: Objective, tasks: Tasks) -> dict[str, Tensor]:
        """Moves theta, the buffers and the outer optimizer's state in place.

        Args:
            objective: the meta-objective of a meta-batch.
            tasks: the meta-batch.

        Returns:
            Mean metrics, 0-dim tensors.
        """
        metrics = self.outer.step(objective, self.theta, self.outer_state)
        for name, value in self.buffers.items():
            value.copy_(metrics.pop(name))
        return metrics

    def adapt(
        self, params: Params, tasks: Tasks, num_steps: int, step_sizes: Sequence[float] | None = None
    ) -> Iterator[Params]:
        """Yields each task's parameters after 0, 1, ..., ``num_steps`` gradient steps on its support data.

        What the parameters of a step collect is added to the tasks before they are yielded.

        Args:
            params: theta and the buffers, name -> ``(T, ...)``.
            tasks: T tasks.
            num_steps: gradient steps.
            step_sizes: one per step; None is the inner optimizer's own.
        """
        for step, adapted in enumerate(self.inner_steps(params, tasks, num_steps, step_sizes, create_graph=False)):
            self.domain.collect(tasks, self.model, adapted, step)
            yield adapted

    def inner_steps(
        self, params: Params, tasks: Tasks, num_steps: int, step_sizes: Sequence[float] | None, create_graph: bool
    ) -> Iterator[Params]:
        """Yields what `adapt` does, from data that have been collected.

        Args:
            params: theta and the buffers, name -> ``(T, ...)``.
            tasks: T tasks.
            num_steps: gradient steps.
            step_sizes: one per step; None is the inner optimizer's own.
            create_graph: whether second derivatives with respect to ``params`` are wanted.
        """

        def support_loss(params: Params, step: int) -> Tensor:
            data = self.domain.data(tasks, "support", step)
            return self.domain.inner_loss(self.model, params, data)

        for adapted, _ in self.inner.adapt(support_loss, self.theta_of(params), num_steps, create_graph, step_sizes):
            yield adapted

    def params_per_task(self, num_tasks: int, theta: Params | None = None) -> Params:
        """Returns what a task starts from, once for each task: theta and the buffers, name -> ``(T, ...)``.

        Args:
            num_tasks: T.
            theta: without a task axis; None is the algorithm's own.
        """
        return expand((self.theta if theta is None else theta) | self.buffers, num_tasks)

    def theta_of(self, params: Params) -> Params:
        """Returns the part of ``params`` that is theta's, without the buffers."""
        return {name: params[name] for name in self.theta}

    def state_dict(self) -> dict[str, Params]:
        """Returns all that training changes."""
        groups = {"theta": self.theta, "outer": self.outer_state, "buffers": self.buffers, "best": self.best}
        return {name: tensors for name, tensors in groups.items() if tensors}

    def load_state_dict(self, state: Mapping[str, Params]) -> None:
        """Restores `state_dict` in place.

        Raises:
            MamlError: if it is the state of another algorithm or model.
        """
        mine = _flat(self.state_dict())
        groups = {_RENAMED_GROUPS.get(group, group): tensors for group, tensors in state.items()}
        saved = {self._renamed(name): value for name, value in _flat(groups).items()}
        if mine.keys() != saved.keys():
            raise MamlError(
                "the checkpoint does not fit this algorithm and model: it "
                f"lacks {sorted(mine.keys() - saved.keys()) or 'nothing'} and "
                f"has {sorted(saved.keys() - mine.keys()) or 'nothing'} besides; give the settings it was trained with"
            )
        for name, value in mine.items():
            if value.shape != saved[name].shape:
                raise MamlError(
                    f"the checkpoint's {name} has shape {tuple(saved[name].shape)}, but this model's has "
                    f"{tuple(value.shape)}: the inputs or outputs of the domain are others than those it was trained on"
                )
            value.copy_(saved[name])

    def _renamed(self, name: str) -> str:
        """Returns the present name of a saved tensor, which may end with a parameter's earlier name."""
        groups = name.split(".")
        endings = (".".join(groups[start:]) for start in range(1, len(groups)))
        present = ((ending, self.model.renamed(ending)) for ending in endings)
        return next((name.removesuffix(old) + new for old, new in present if old != new), name)


def _flat(state: Mapping[str, Params]) -> Params:
    return {f"{group}.{name}": value for group, tensors in state.items() for name, value in tensors.items()}
