"""What an algorithm is: how theta is learnt from a meta-batch, and how it adapts to a task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from maml.domain.base import Domain, Metrics
from maml.errors import MamlError
from maml.hardware import distributed
from maml.hardware.compile import ChunkGradient
from maml.hardware.memory import within_memory
from maml.inner.base import Inner
from maml.model.base import Model
from maml.outer.base import Objective, Outer, OuterState
from maml.seeding import Stream
from maml.types import Params, Product, Tasks, expand, num_tasks, take

# Beside the parameters in `Algorithm.best`: its score, and the scores of the last iterations.
_SCORE, _RECENT = "score", "recent"
_NUM_RECENT = 10

Computed = TypeVar("Computed")

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
        sums_over_tasks: whether its meta-update follows from a sum over the tasks of a meta-batch: processes can then
            share them, and several seeds go side by side.

    Attributes:
        theta: what is meta-learnt: the model's parameters and what the inner optimizer adds to them.
        carried: other tensors that training changes (running statistics, an optimizer's state), by name.
        best: the theta at which the metric ``domain.selected_by``, averaged over recent iterations, was best in
            training, and what is needed to go on choosing; else empty.
        chunk_gradient: `_chunk_gradient`, or its compiled form.
        num_seeds: None; or theta has a leading axis of so many seeds, and a meta-batch is theirs, one behind the other.
    """

    differentiates_adaptation = False
    trained_as: str | None = None
    learns_from_rollouts = False
    sums_over_tasks = True
    num_seeds: int | None = None

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
        summary = self._summary(tasks)
        if self.best:
            self._keep_best(summary)
        return self.update(_Objective(self, tasks)) | summary

    def update(self, objective: Objective) -> dict[str, Tensor]:
        """Moves theta, and what is carried, by the objective of a meta-batch; returns the metrics."""
        metrics = self.outer.step(objective, self.theta, self.outer_state)
        for name, value in self.carried.items():
            value.copy_(metrics.pop(name))
        return metrics

    def collect(self, tasks: Tasks) -> None:
        """Adds to a meta-batch the data that depend on theta, of an on-policy domain."""
        self.domain.collect(tasks, self.model, self.per_task(self.theta, num_tasks(tasks)), 0)

    def per_task(self, params: Params, count: int) -> Params:
        """Returns theta once for each of ``count`` tasks: every task starts at it, or at that of its seed."""
        if self.num_seeds is None:
            return expand(params, count)
        each = (-1, count // self.num_seeds)
        return {
            name: value.unsqueeze(1).expand(*each, *value.shape[1:]).flatten(0, 1) for name, value in params.items()
        }

    def _summary(self, tasks: Tasks) -> dict[str, Tensor]:
        means, counts = self.domain.rollout_metrics(tasks)
        if not means:
            return {}
        averages = distributed.all_reduce_mean([value.sum() for value in means.values()], num_tasks(tasks))
        sums = distributed.all_reduce_sum([value.sum() for value in counts.values()])
        return dict(zip((*means, *counts), (*averages, *sums), strict=True))

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
        gradients, metrics = self._within_memory(lambda chunk: self.gradient_sums(theta, tasks, chunk), tasks)
        means = distributed.all_reduce_mean([*gradients.values(), *metrics.values()], self._num_tasks(tasks))
        return (
            dict(zip(gradients, means[: len(gradients)], strict=True)),
            dict(zip(metrics, means[len(gradients) :], strict=True)),
        )

    def gradient_sums(self, theta: Params, tasks: Tasks, task_chunk: int) -> tuple[Params, Metrics]:
        """Returns sums over the tasks that this process has: of the gradient with respect to theta, and of metrics."""
        total: list[Tensor] = []
        for chunk in self._chunks(tasks, task_chunk):
            gradients, metrics = self.chunk_gradient(theta | self.carried, chunk)
            part = [*gradients.values(), *metrics.values()]
            total = list(torch._foreach_add(total, part)) if total else part
        return (
            dict(zip(gradients, total[: len(gradients)], strict=True)),
            dict(zip(metrics, total[len(gradients) :], strict=True)),
        )

    def _within_memory(self, compute: Callable[[int], Computed], tasks: Tasks) -> Computed:
        """Returns what is computed in chunks; where they had to shrink, the run goes on with the smaller ones."""
        chunk = self._chunk_of(tasks)
        computed, used = within_memory(compute, chunk)
        if used < chunk:
            self.task_chunk = used
        return computed

    @torch.no_grad()
    def evaluate(self, theta: Params, tasks: Tasks) -> dict[str, Tensor]:
        """Returns the mean metrics at theta, without its gradient."""

        def compute(task_chunk: int) -> Metrics:
            sums = []
            for chunk in self._chunks(tasks, task_chunk):
                losses, metrics = self.task_losses(theta | self.carried, chunk)
                sums.append(self._summed({"loss": losses} | metrics))
            return {name: torch.stack([part[name] for part in sums]).sum(0) for name in sums[0]}

        own = self._within_memory(compute, tasks)
        return dict(zip(own, distributed.all_reduce_mean(list(own.values()), self._num_tasks(tasks)), strict=True))

    def curvature(self, theta: Params, tasks: Tasks, every: int = 1) -> Product:
        """Returns the Hessian of the mean KL divergence from the policies of theta, at theta.

        Args:
            theta: parameters without a task axis; the policies by which the tasks' data were collected.
            tasks: a meta-batch with its rollouts.
            every: takes every so many-th timestep of them.
        """

        def compute(task_chunk: int) -> list[Product]:
            chunks = self._chunks(tasks, task_chunk)
            return [self.chunk_curvature(theta, self.domain.subsample_timesteps(chunk, every)) for chunk in chunks]

        products, count = self._within_memory(compute, tasks), self._num_tasks(tasks)

        def product(vector: Params) -> Params:
            own: Params = {}
            for part in products:
                added = part(vector)
                own = {name: own[name] + value for name, value in added.items()} if own else added
            return dict(zip(theta, distributed.all_reduce_mean([own[name] for name in theta], count), strict=True))

        return product

    def chunk_curvature(self, theta: Params, tasks: Tasks) -> Product:
        """Returns the same, summed over the tasks of a chunk."""
        raise MamlError(f"{type(self).__name__} does not know how far a policy moves; choose outer=adam")

    def _chunk_of(self, tasks: Tasks) -> int:
        """Returns how many tasks, of each seed, are batched at once."""
        count = self._num_tasks(tasks)
        return min(self.task_chunk or count, count)

    def _chunks(self, tasks: Tasks, task_chunk: int) -> Iterator[Tasks]:
        if self.num_seeds is None:
            for start in range(0, num_tasks(tasks), task_chunk):
                yield take(tasks, start, start + task_chunk)
            return
        each = {name: value.unflatten(0, (self.num_seeds, -1)) for name, value in tasks.items()}
        for start in range(0, self._num_tasks(tasks), task_chunk):
            yield {name: value[:, start : start + task_chunk].flatten(0, 1) for name, value in each.items()}

    def _num_tasks(self, tasks: Tasks) -> int:
        """Returns over how many tasks a gradient is a sum: all that this process has, or those of each seed."""
        return num_tasks(tasks) // (self.num_seeds or 1)

    def _chunk_gradient(self, params: Params, tasks: Tasks) -> tuple[Params, Metrics]:
        """Returns sums over tasks: of the gradient with respect to theta, and of the metrics."""
        theta = {name: params[name].detach().requires_grad_() for name in self.theta}
        with torch.enable_grad():
            losses, metrics = self.task_losses(params | theta, tasks)
            gradients = torch.autograd.grad(losses.sum(), list(theta.values()), materialize_grads=True)
        return dict(zip(theta, gradients, strict=True)), self._summed({"loss": losses} | metrics)

    def _summed(self, metrics: Metrics) -> Metrics:
        """Returns sums over tasks, or over those of each seed."""
        if self.num_seeds is None:
            return {name: value.detach().sum(0) for name, value in metrics.items()}
        return {name: value.detach().unflatten(0, (self.num_seeds, -1)).sum(1) for name, value in metrics.items()}

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

        start = self.per_task(theta, num_tasks(tasks))
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
        saved = {self._renamed(name): value for name, value in _flat(state).items()}
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
