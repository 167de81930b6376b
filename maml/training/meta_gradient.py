"""The meta-gradient: the mean gradient of the task losses with respect to theta, however the work is cut."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from maml.algorithm.base import Algorithm
from maml.domain.base import Metrics
from maml.hardware import distributed
from maml.hardware.base import Execution
from maml.hardware.compile import CompiledFunction
from maml.hardware.memory import halve_chunk_on_oom, recompute_inner_steps
from maml.outer.base import Objective
from maml.types import MatrixVectorProduct, Params, Tasks, expand, num_tasks, take

Computed = TypeVar("Computed")


class MetaGradient:
    """Computes an algorithm's meta-gradient, and all else that is a mean over the tasks of a meta-batch.

    It alone knows how the work is cut: in chunks of tasks (halved where memory does not suffice), compiled or not,
    shared by the processes of a run, for one seed or for several at once. With ``num_seeds``, parameters have a
    leading seed axis, ``(seeds, ...)``, a meta-batch concatenates the seeds' tasks, and results have the seed axis.

    Args:
        algorithm: whose task losses are differentiated. With several seeds it stands for the others, which are alike.
        execution: how the work is cut; None is all tasks at once, not compiled.
        num_seeds: None is one seed, without a seed axis.
    """

    def __init__(self, algorithm: Algorithm, execution: Execution | None = None, num_seeds: int | None = None) -> None:
        self.algorithm, self.num_seeds = algorithm, num_seeds
        self._execution = execution or Execution(num_threads=1, task_chunk=None, compile=False)
        self._sums = CompiledFunction(self._chunk_sums) if self._execution.compile else self._chunk_sums
        self._each = CompiledFunction(self._chunk_gradients) if self._execution.compile else self._chunk_gradients

    @property
    def execution(self) -> Execution:
        """How the work is cut by now: memory, or the compiler, may have failed at what was chosen."""
        compiled = [function for function in (self._sums, self._each) if isinstance(function, CompiledFunction)]
        return replace(self._execution, compile=bool(compiled) and not any(each.failed for each in compiled))

    def gradient(self, params: Params, tasks: Tasks) -> tuple[Params, dict[str, Tensor]]:
        """Returns the gradient of the mean task loss with respect to theta, and the mean metrics.

        Args:
            params: theta and the buffers, without a task axis.
            tasks: a meta-batch; this process's share of it.

        Raises:
            MamlError: if memory does not suffice for a single task.
        """
        gradients, metrics = self._in_chunks(lambda chunk: self.sums(params, tasks, chunk), tasks)
        means = distributed.all_reduce_mean([*gradients.values(), *metrics.values()], self._count(tasks))
        return (
            dict(zip(gradients, means[: len(gradients)], strict=True)),
            dict(zip(metrics, means[len(gradients) :], strict=True)),
        )

    def sums(self, params: Params, tasks: Tasks, task_chunk: int) -> tuple[Params, Metrics]:
        """Returns sums over this process's tasks: of the gradient with respect to theta, and of the metrics.

        Args:
            params: theta and the buffers, without a task axis.
            tasks: of all seeds.
            task_chunk: number of tasks, of each seed, computed at once.
        """
        total: list[Tensor] = []
        for chunk in self._chunks(tasks, task_chunk):
            with recompute_inner_steps(self._execution.recompute):
                gradients, metrics = self._sums(params, chunk)
            part = [*gradients.values(), *metrics.values()]
            total = list(torch._foreach_add(total, part)) if total else part
        return (
            dict(zip(gradients, total[: len(gradients)], strict=True)),
            dict(zip(metrics, total[len(gradients) :], strict=True)),
        )

    def task_gradients(self, params: Params, tasks: Tasks) -> tuple[Params, Metrics]:
        """Returns the gradient of each task's loss with respect to the task's own parameters, and its metrics.

        Args:
            params: name -> ``(T, ...)``: every task has parameters of its own.
            tasks: T tasks.

        Returns:
            name -> ``(T, ...)``; metrics ``(T,)``.
        """

        def compute(task_chunk: int) -> tuple[Params, Metrics]:
            starts = range(0, num_tasks(tasks), task_chunk)
            parts = [
                self._each(*(take(group, start, start + task_chunk) for group in (params, tasks))) for start in starts
            ]
            if len(parts) == 1:
                return parts[0]
            gradients, metrics = zip(*parts, strict=True)
            return _concatenated(gradients), _concatenated(metrics)

        return self._in_chunks(compute, tasks)

    @torch.no_grad()
    def evaluate(self, params: Params, tasks: Tasks) -> dict[str, Tensor]:
        """Returns the mean metrics, without a gradient; arguments are as in `gradient`."""

        def compute(task_chunk: int) -> Metrics:
            sums = []
            for chunk in self._chunks(tasks, task_chunk):
                losses, metrics = self.algorithm.task_losses(self.per_task(params, num_tasks(chunk)), chunk)
                sums.append(self._summed({"loss": losses} | metrics))
            return {name: torch.stack([part[name] for part in sums]).sum(0) for name in sums[0]}

        own = self._in_chunks(compute, tasks)
        return dict(zip(own, distributed.all_reduce_mean(list(own.values()), self._count(tasks)), strict=True))

    def curvature(self, params: Params, tasks: Tasks, every: int = 1) -> MatrixVectorProduct:
        """Returns the Hessian of the mean KL divergence from the policies of theta, at theta.

        Args:
            params: theta and the buffers, without a task axis: the policies by which the tasks' data were collected.
            tasks: a meta-batch with its rollouts.
            every: 1 uses every timestep, n every n-th.
        """
        domain, theta = self.algorithm.domain, list(self.algorithm.theta)

        def compute(task_chunk: int) -> list[tuple[MatrixVectorProduct, int]]:
            chunks = list(self._chunks(tasks, task_chunk))
            counts = [num_tasks(chunk) for chunk in chunks]
            return [
                (
                    self.algorithm.curvature(self.per_task(params, count), domain.subsample_timesteps(chunk, every)),
                    count,
                )
                for chunk, count in zip(chunks, counts, strict=True)
            ]

        products = self._in_chunks(compute, tasks)

        def product(vector: Params) -> Params:
            own: Params = {}
            for part, count in products:
                added = {name: value.sum(0) for name, value in part(self.per_task(vector, count)).items()}
                own = {name: own[name] + value for name, value in added.items()} if own else added
            means = distributed.all_reduce_mean([own[name] for name in theta], self._count(tasks))
            return dict(zip(theta, means, strict=True))

        return product

    def per_task(self, params: Params, count: int) -> Params:
        """Returns the same parameters for each of ``count`` tasks; with a seed axis, those of the task's seed."""
        if self.num_seeds is None:
            return expand(params, count)
        each = (-1, count // self.num_seeds)
        return {
            name: value.unsqueeze(1).expand(*each, *value.shape[1:]).flatten(0, 1) for name, value in params.items()
        }

    def _chunk_sums(self, params: Params, tasks: Tasks) -> tuple[Params, Metrics]:
        """Returns `sums` of one chunk."""
        theta = {name: params[name].detach().requires_grad_() for name in self.algorithm.theta}
        with torch.enable_grad():
            losses, metrics = self.algorithm.task_losses(self.per_task(params | theta, num_tasks(tasks)), tasks)
            gradients = torch.autograd.grad(losses.sum(), list(theta.values()), materialize_grads=True)
        return dict(zip(theta, gradients, strict=True)), self._summed({"loss": losses} | metrics)

    def _chunk_gradients(self, params: Params, tasks: Tasks) -> tuple[Params, Metrics]:
        """Returns `task_gradients` of one chunk."""
        theta = {name: params[name].detach().requires_grad_() for name in self.algorithm.theta}
        with torch.enable_grad():
            losses, metrics = self.algorithm.task_losses(params | theta, tasks)
            gradients = torch.autograd.grad(losses.sum(), list(theta.values()), materialize_grads=True)
        metrics = {name: value.detach() for name, value in ({"loss": losses} | metrics).items()}
        return dict(zip(theta, gradients, strict=True)), metrics

    def _in_chunks(self, compute: Callable[[int], Computed], tasks: Tasks) -> Computed:
        """Returns what is computed in chunks; where they had to shrink, the run goes on with the smaller ones."""
        count = self._count(tasks)
        chunk = min(self._execution.task_chunk or count, count)
        computed, used = halve_chunk_on_oom(compute, chunk)
        if used < chunk:
            self._execution = replace(self._execution, task_chunk=used)
        return computed

    def _chunks(self, tasks: Tasks, task_chunk: int) -> Iterator[Tasks]:
        if self.num_seeds is None:
            for start in range(0, num_tasks(tasks), task_chunk):
                yield take(tasks, start, start + task_chunk)
            return
        each = {name: value.unflatten(0, (self.num_seeds, -1)) for name, value in tasks.items()}
        for start in range(0, self._count(tasks), task_chunk):
            yield {name: value[:, start : start + task_chunk].flatten(0, 1) for name, value in each.items()}

    def _count(self, tasks: Tasks) -> int:
        """Returns the number of tasks of one seed that this process has."""
        return num_tasks(tasks) // (self.num_seeds or 1)

    def _summed(self, metrics: Metrics) -> Metrics:
        """Returns sums over tasks, or over those of each seed."""
        if self.num_seeds is None:
            return {name: value.detach().sum(0) for name, value in metrics.items()}
        return {name: value.detach().unflatten(0, (self.num_seeds, -1)).sum(1) for name, value in metrics.items()}


def _concatenated(parts: Sequence[Params]) -> Params:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


class BatchObjective(Objective):
    """The meta-objective of one seed on one meta-batch, computed when it is asked for.

    Args:
        meta_gradient: of one seed.
        tasks: a meta-batch, with its rollouts if the domain is on-policy.
    """

    def __init__(self, meta_gradient: MetaGradient, tasks: Tasks) -> None:
        self.meta_gradient, self.tasks = meta_gradient, tasks

    def _params(self, theta: Params) -> Params:
        return theta | self.meta_gradient.algorithm.buffers

    def gradient(self, theta: Params) -> tuple[Params, dict[str, Tensor]]:
        return self.meta_gradient.gradient(self._params(theta), self.tasks)

    def evaluate(self, theta: Params) -> dict[str, Tensor]:
        return self.meta_gradient.evaluate(self._params(theta), self.tasks)

    def curvature(self, theta: Params, every: int = 1) -> MatrixVectorProduct:
        return self.meta_gradient.curvature(self._params(theta), self.tasks, every)

    def task_gradients(self, params: Params, tasks: Tasks) -> tuple[Params, Metrics]:
        return self.meta_gradient.task_gradients(params, tasks)


class PrecomputedGradient(Objective):
    """The meta-objective of one of several seeds, whose gradient has been computed with the others'."""

    def __init__(self, gradients: Params, metrics: dict[str, Tensor]) -> None:
        self.gradients, self.metrics = gradients, metrics

    def gradient(self, theta: Params) -> tuple[Params, dict[str, Tensor]]:
        return self.gradients, dict(self.metrics)

    def evaluate(self, theta: Params) -> dict[str, Tensor]:
        return dict(self.metrics)
