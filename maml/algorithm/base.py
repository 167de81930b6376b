"""What an algorithm is: how theta is learnt from a meta-batch, and how it adapts to a task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from maml.compiling import ChunkGradient
from maml.domain.base import Domain, Metrics
from maml.errors import MamlError
from maml.inner.base import Inner
from maml.model.base import Model
from maml.outer.base import Objective, Outer, OuterState
from maml.seeding import Stream
from maml.types import Params, Product, Tasks, expand, num_tasks, take

# Beside the parameters in `Algorithm.best`: its score, and the scores of the last iterations.
_SCORE, _RECENT = "score", "recent"
_NUM_RECENT = 10

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
        stream: draws the initial parameters; its device is where theta lives.
        task_chunk: how many tasks are batched at once; gradients of the chunks add up. None batches them all.
    """

    domain: Domain[Any]
    make_model: MakeModel
    inner: Inner
    outer: Outer
    stream: Stream
    task_chunk: int | None = None


class Algorithm(ABC):
    """Learns theta; most subclasses say only what one task's loss is as a function of theta.

    Class attributes:
        differentiates_adaptation: whether the loss is one after adaptation, as a function of what came before, so that
            ``inner.order`` matters and step sizes can be learnt.
        trained_as: the class that this one is in training, where it differs in meta-test only; their runs are shared.
        learns_from_rollouts: whether it knows data that depends on theta, as RL's do.

    Attributes:
        theta: what is meta-learnt: the model's parameters and what the inner optimizer adds to them.
        carried: other tensors that training changes (running statistics, an optimizer's state), by name.
        best: the theta at which the metric ``domain.selected_by``, averaged over recent iterations, was best in
            training, and what is needed to go on choosing; else empty.
        chunk_gradient: `_chunk_gradient`, or its compiled form.
    """

    differentiates_adaptation = False
    trained_as: str | None = None
    learns_from_rollouts = False

    def __init__(self, parts: Parts) -> None:
        self.domain, self.inner, self.outer = parts.domain, parts.inner, parts.outer
        self.stream, self.task_chunk = parts.stream, parts.task_chunk
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
        self._begin(self.model.init(self.stream))

    def _begin(self, params: Params, carried: Params | None = None) -> None:
        """Sets what training starts from."""
        self.inner.adapted_names(list(params))  # raises now what would otherwise be raised in the first step
        learnt = self.inner.init(params)
        if learnt and not self.differentiates_adaptation:
            raise MamlError(
                f"{type(self).__name__} does not differentiate through adaptation, so it cannot learn "
                f"{next(iter(learnt))} and the like; choose inner=sgd, or algorithm=maml"
            )
        self.theta: Params = params | learnt
        self.carried: Params = carried or {}
        self.outer_state: OuterState = self.outer.init(self.theta)
        self.best: Params = {}
        if self.domain.selected_by:
            lowest = torch.full((_NUM_RECENT,), -torch.inf, device=self.stream.device)
            self.best = {name: value.clone() for name, value in self.theta.items()}
            self.best |= {_SCORE: lowest[0].clone(), _RECENT: lowest}
        self.chunk_gradient: ChunkGradient = self._chunk_gradient

    def sample_tasks(self, count: int, stream: Stream) -> Tasks:
        """Draws what one meta-update learns from: a meta-batch of ``count`` tasks, a pure function of the stream."""
        return self.domain.sample_tasks(count, stream)

    @abstractmethod
    def task_losses(self, params: Params, tasks: Tasks) -> tuple[Tensor, Metrics]:
        """Returns the loss of each task as a function of theta, ``(T,)``, and further metrics ``(T,)``.

        Args:
            params: theta and what is carried, without a task axis.
            tasks: T tasks.

        Returns:
            A metric called ``loss`` is logged in place of the loss; one with the name of a carried tensor is that
            tensor's new value, ``(T, ...)``, of which the mean over tasks is taken.
        """

    def step(self, tasks: Tasks) -> dict[str, Tensor]:
        """Makes one meta-update on a meta-batch; returns its mean metrics as 0-dim tensors."""
        if self.domain.on_policy:
            self.collect(tasks)
        summary = self.domain.summary(tasks)
        if self.best:
            self._keep_best(summary)
        metrics = self._update(tasks)
        for name, value in self.carried.items():
            value.copy_(metrics.pop(name))
        return metrics | summary

    def _update(self, tasks: Tasks) -> dict[str, Tensor]:
        """Moves theta, by a meta-batch that has all its data; returns the metrics."""
        return self.outer.step(_Objective(self, tasks), self.theta, self.outer_state)

    def collect(self, tasks: Tasks) -> None:
        """Adds to a meta-batch the data that depend on theta, of an on-policy domain."""
        self.domain.collect(tasks, self.model, expand(self.theta, num_tasks(tasks)), 0)

    def _keep_best(self, summary: dict[str, Tensor]) -> None:
        """Section 5.3: the evaluated policy is the one with the best average training return.

        Averaged over ten iterations: in a single one the luck of its few goals outweighs what theta has learnt since.
        """
        assert self.domain.selected_by is not None
        value, recent = summary[self.domain.selected_by], self.best[_RECENT]
        recent.copy_(torch.where(recent.isneginf(), value, torch.cat([recent[1:], value.reshape(1)])))
        score = recent.mean()
        if score > self.best[_SCORE]:
            self.best[_SCORE].copy_(score)
            for name, value in self.theta.items():
                self.best[name].copy_(value)

    def gradient(self, theta: Params, tasks: Tasks) -> tuple[Params, dict[str, Tensor]]:
        """Returns the gradient of the mean task loss with respect to theta, and the mean metrics.

        Args:
            theta: parameters without a task axis.
            tasks: a meta-batch.
        """
        total: list[Tensor] = []
        for chunk in self._chunks(tasks):
            gradients, metrics = self.chunk_gradient(theta | self.carried, chunk)
            part = [*gradients.values(), *metrics.values()]
            total = list(torch._foreach_add(total, part)) if total else part
        means = torch._foreach_div(total, num_tasks(tasks))
        return (
            dict(zip(gradients, means[: len(gradients)], strict=True)),
            dict(zip(metrics, means[len(gradients) :], strict=True)),
        )

    @torch.no_grad()
    def evaluate(self, theta: Params, tasks: Tasks) -> dict[str, Tensor]:
        """Returns the mean metrics at theta, without its gradient."""
        sums = []
        for chunk in self._chunks(tasks):
            losses, metrics = self.task_losses(theta | self.carried, chunk)
            sums.append(_summed({"loss": losses} | metrics))
        return {name: torch.stack([part[name] for part in sums]).sum(0) / num_tasks(tasks) for name in sums[0]}

    def curvature(self, theta: Params, tasks: Tasks, every: int = 1) -> Product:
        """Returns the Hessian of the mean KL divergence from the policies of theta, at theta.

        Args:
            theta: parameters without a task axis; the policies by which the tasks' data were collected.
            tasks: a meta-batch with its rollouts.
            every: takes every so many-th timestep of them.
        """
        products = [self.chunk_curvature(theta, self.domain.thin(chunk, every)) for chunk in self._chunks(tasks)]
        count = num_tasks(tasks)

        def product(vector: Params) -> Params:
            total: Params = {}
            for part in products:
                added = part(vector)
                total = {name: total[name] + value for name, value in added.items()} if total else added
            return {name: total[name] / count for name in theta}

        return product

    def chunk_curvature(self, theta: Params, tasks: Tasks) -> Product:
        """Returns the same, summed over the tasks of a chunk."""
        raise MamlError(f"{type(self).__name__} does not know how far a policy moves; choose outer=adam")

    def _chunks(self, tasks: Tasks) -> Iterator[Tasks]:
        count = num_tasks(tasks)
        chunk = self.task_chunk or count
        for start in range(0, count, chunk):
            yield take(tasks, start, start + chunk)

    def _chunk_gradient(self, params: Params, tasks: Tasks) -> tuple[Params, Metrics]:
        """Returns sums over tasks: of the gradient with respect to theta, and of the metrics."""
        theta = {name: params[name].detach().requires_grad_() for name in self.theta}
        with torch.enable_grad():
            losses, metrics = self.task_losses(params | theta, tasks)
            gradients = torch.autograd.grad(losses.sum(), list(theta.values()), materialize_grads=True)
        return dict(zip(theta, gradients, strict=True)), _summed({"loss": losses} | metrics)

    def adapt(
        self, theta: Params, tasks: Tasks, num_steps: int, step_sizes: Sequence[float] | None = None
    ) -> Iterator[Params]:
        """Yields each task's parameters after 0, 1, ..., ``num_steps`` gradient steps on its support data.

        What the parameters of a step collect is added to the tasks before they are yielded.
        """
        for step, params in enumerate(self._adapt(theta, tasks, num_steps, step_sizes, create_graph=False)):
            self.domain.collect(tasks, self.model, params, step)
            yield params

    def _adapt(
        self, theta: Params, tasks: Tasks, num_steps: int, step_sizes: Sequence[float] | None, create_graph: bool
    ) -> Iterator[Params]:
        def support_loss(params: Params, step: int) -> Tensor:
            data = self.domain.data(tasks, "support", step)
            return self.domain.inner_loss(self.model, params, data)

        start = expand(theta, num_tasks(tasks))
        for params, _ in self.inner.adapt(support_loss, start, num_steps, create_graph, step_sizes):
            yield params

    def state_dict(self) -> dict[str, Params]:
        """Returns all that training changes."""
        groups = {"theta": self.theta, "outer": self.outer_state, "carried": self.carried, "best": self.best}
        return {name: tensors for name, tensors in groups.items() if tensors}

    def load_state_dict(self, state: Mapping[str, Params]) -> None:
        """Restores `state_dict` in place.

        Raises:
            MamlError: if it is the state of another algorithm or model.
        """
        mine = _flat(self.state_dict())
        saved = _flat(state)
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


def _summed(metrics: Metrics) -> Metrics:
    return {name: value.detach().sum(0) for name, value in metrics.items()}


def _flat(state: Mapping[str, Params]) -> Params:
    return {f"{group}.{name}": value for group, tensors in state.items() for name, value in tensors.items()}


class _Objective(Objective):
    """The meta-objective of one meta-batch."""

    def __init__(self, algorithm: Algorithm, tasks: Tasks) -> None:
        self.algorithm, self.tasks = algorithm, tasks

    def gradient(self, theta: Params) -> tuple[Params, dict[str, Tensor]]:
        return self.algorithm.gradient(theta, self.tasks)

    def evaluate(self, theta: Params) -> dict[str, Tensor]:
        return self.algorithm.evaluate(theta, self.tasks)

    def curvature(self, theta: Params, every: int = 1) -> Product:
        return self.algorithm.curvature(theta, self.tasks, every)
