"""The meta-gradient: the gradient of the mean task loss with respect to theta, computed in chunks of tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from maml.algorithm.base import Algorithm
from maml.domain.base import Metrics
from maml.errors import MamlError
from maml.hardware import distributed
from maml.hardware.base import Execution
from maml.hardware.compile import CompiledFunction, with_names
from maml.hardware.memory import halve_chunk_on_oom, recompute_inner_steps
from maml.hardware.threads import map_chunks
from maml.model.functional import for_tasks
from maml.outer.base import Objective, OuterState, TaskStep
from maml.types import MatrixVectorProduct, Params, Tasks, concatenate, expand, form_of, num_tasks, take

Computed = TypeVar("Computed")


class MetaGradient:
    """Computes an algorithm's meta-gradient and all other means over the tasks of a meta-batch.

    Only this class knows how the work is divided: into chunks of tasks (halved when memory is short), compiled or not,
    between the processes of a run, for one seed or for several seeds at once.

    Args:
        algorithm: the algorithm whose task losses are differentiated. With several seeds, that of any seed; they are
            alike.
        execution: chunk size, compilation and recomputation; None computes all tasks at once, not compiled.
        num_seeds: number of seeds that are computed at once. If set, parameters and results have a leading seed axis,
            ``(num_seeds, ...)``, and the meta-batch concatenates the seeds' tasks. None is one seed without a seed
            axis.

    Attributes:
        latest: the gradient that was computed last, for `maml.training.diagnostics`; empty before the first.
    """

    def __init__(self, algorithm: Algorithm, execution: Execution | None = None, num_seeds: int | None = None) -> None:
        self.algorithm, self.num_seeds = algorithm, num_seeds
        self.latest: Params = {}
        self._execution = execution or Execution(num_threads=1, task_chunk=None, compile=False)
        compiles = self._execution.compile
        self._map = map if compiles else map_chunks
        self._compute_sums = CompiledFunction(self._chunk_sums) if compiles else self._chunk_sums
        self._compute_gradients = CompiledFunction(self._chunk_gradients) if compiles else self._chunk_gradients
        self._task_steps: dict[TaskStep, CompiledFunction] = {}

    @property
    def execution(self) -> Execution:
        """The execution in use now: chunks shrink when memory is short, and compiling may fail."""
        functions = self._compute_sums, self._compute_gradients, *self._task_steps.values()
        compiled = [function for function in functions if isinstance(function, CompiledFunction)]
        return replace(self._execution, compile=bool(compiled) and not any(function.failed for function in compiled))

    def set_task_chunk(self, task_chunk: int | None) -> None:
        """Sets the number of tasks of each seed that are computed at once from here on; None computes all at once."""
        self._execution = replace(self._execution, task_chunk=task_chunk)

    def gradient(self, params: Params, tasks: Tasks) -> tuple[Params, dict[str, Tensor]]:
        """Returns the gradient of the mean task loss with respect to theta, and the mean metrics.

        Args:
            params: theta and the buffers, without a task axis.
            tasks: this process's part of the meta-batch.

        Raises:
            MamlError: if a single task does not fit into memory.
        """
        gradients, metrics = self._in_chunks(lambda chunk: self.sums(params, tasks, chunk), self._tasks_per_seed(tasks))
        means = distributed.all_reduce_mean([*gradients.values(), *metrics.values()], self._tasks_per_seed(tasks))
        self.latest, metrics = with_names(means, gradients, metrics)
        return self.latest, metrics

    def kl_gradient(self, params: Params, tasks: Tasks, every: int = 1) -> Params:
        """Returns the gradient of the mean KL divergence from the policies that collected the rollouts.

        Args:
            params: theta and the buffers, without a task axis.
            tasks: this process's part of a meta-batch, with its rollouts.
            every: 1 uses every timestep, n uses every n-th.
        """

        def compute(task_chunk: int) -> Params:
            def chunk_sums(chunk: Tasks) -> Params:
                fewer = self.algorithm.domain.subsample_timesteps(chunk, every)
                return self._sum_over_tasks(self.algorithm.kl_gradients(self.per_task(params, num_tasks(chunk)), fewer))

            return _added(self._map(chunk_sums, self._chunks(tasks, task_chunk)))

        return self._mean_of_all(self._in_chunks(compute, self._tasks_per_seed(tasks)), tasks)

    def sums(self, params: Params, tasks: Tasks, task_chunk: int) -> tuple[Params, Metrics]:
        """Returns the sums of the gradients with respect to theta and of the metrics, over this process's tasks.

        Args:
            params: theta and the buffers, without a task axis.
            tasks: the tasks of all seeds.
            task_chunk: number of tasks of each seed that are computed at once.
        """
        total: list[Tensor] = []
        with recompute_inner_steps(self._execution.recompute):
            for gradients, metrics in self._map(partial(self._compute_sums, params), self._chunks(tasks, task_chunk)):
                part = [*gradients.values(), *metrics.values()]
                total = list(torch._foreach_add(total, part)) if total else part
        return with_names(total, gradients, metrics)

    def task_gradients(self, params: Params, tasks: Tasks) -> tuple[Params, Metrics]:
        """Returns the gradient of each task's loss with respect to the task's own parameters, and its metrics.

        Args:
            params: parameters of each task, name -> ``(T, ...)``.
            tasks: T tasks.

        Returns:
            The gradients, name -> ``(T, ...)``, and the metrics, name -> ``(T,)``.
        """

        def compute(task_chunk: int) -> tuple[Params, Metrics]:
            def part(start: int) -> tuple[Params, Metrics]:
                return self._compute_gradients(*(take(group, start, start + task_chunk) for group in (params, tasks)))

            parts = list(self._map(part, range(0, num_tasks(tasks), task_chunk)))
            if len(parts) == 1:
                return parts[0]
            gradients, metrics = zip(*parts, strict=True)
            return concatenate(gradients), concatenate(metrics)

        return self._in_chunks(compute, num_tasks(tasks))

    def task_step(self, step: TaskStep, params: Params, state: OuterState, tasks: Tasks) -> tuple[Params, OuterState]:
        """Makes a step on the parameters of single tasks; see `Objective.task_step`."""
        if not self._execution.compile:
            step(TaskGradients(self.task_gradients), params, state, tasks)
            return params, state
        if step not in self._task_steps:
            self._task_steps[step] = CompiledFunction(partial(_copying_step, step, self._chunk_gradients))
        both = {f"params.{name}": value for name, value in params.items()}
        both |= {f"state.{name}": value for name, value in state.items()}
        return self._task_steps[step](both, tasks)

    @torch.no_grad()
    def evaluate(self, params: Params, tasks: Tasks) -> dict[str, Tensor]:
        """Returns the mean metrics, without a gradient. The arguments are those of `gradient`."""

        def compute(task_chunk: int) -> Metrics:
            def chunk_sums(chunk: Tasks) -> Metrics:
                losses, metrics = self._task_losses(self.per_task(params, num_tasks(chunk)), chunk)
                return self._sum_over_tasks({"loss": losses} | metrics)

            sums = list(self._map(chunk_sums, self._chunks(tasks, task_chunk)))
            return {name: torch.stack([part[name] for part in sums]).sum(0) for name in sums[0]}

        return self._mean_of_all(self._in_chunks(compute, self._tasks_per_seed(tasks)), tasks)

    def curvature(self, params: Params, tasks: Tasks, every: int = 1) -> MatrixVectorProduct:
        """Returns the Hessian of the mean KL divergence from the policies of theta, at theta.

        Args:
            params: theta and the buffers, without a task axis. These policies must have collected the rollouts.
            tasks: this process's part of a meta-batch, with its rollouts.
            every: 1 uses every timestep, n uses every n-th.
        """
        domain, theta = self.algorithm.domain, list(self.algorithm.theta)

        def compute(task_chunk: int) -> list[tuple[MatrixVectorProduct, int]]:
            def part(chunk: Tasks) -> tuple[MatrixVectorProduct, int]:
                count, fewer = num_tasks(chunk), domain.subsample_timesteps(chunk, every)
                return self.algorithm.curvature(self.per_task(params, count), fewer), count

            return list(self._map(part, self._chunks(tasks, task_chunk)))

        products = self._in_chunks(compute, self._tasks_per_seed(tasks))

        def product(vector: Params) -> Params:
            def sums(part: tuple[MatrixVectorProduct, int]) -> Params:
                compute, count = part
                return {name: value.sum(0) for name, value in compute(self.per_task(vector, count)).items()}

            own = _added(self._map(sums, products))
            return self._mean_of_all({name: own[name] for name in theta}, tasks)

        return product

    def per_task(self, params: Params, count: int) -> Params:
        """Returns one copy of the parameters for each of ``count`` tasks; with a seed axis, that of the task's seed.

        If tasks share their weights, there is one copy for all of them, or for those of a seed.
        """
        if self.algorithm.shares_weights:
            return expand(params, 1) if self.num_seeds is None else params
        if self.num_seeds is None:
            return expand(params, count)
        return {name: for_tasks(value, count) for name, value in params.items()}

    def _chunk_sums(self, params: Params, tasks: Tasks) -> tuple[Params, Metrics]:
        """Returns `sums` of one chunk."""
        gradients, metrics = self._differentiate(params, tasks, lambda theta: self.per_task(theta, num_tasks(tasks)))
        return gradients, self._sum_over_tasks(metrics)

    def _chunk_gradients(self, params: Params, tasks: Tasks) -> tuple[Params, Metrics]:
        """Returns `task_gradients` of one chunk."""
        gradients, metrics = self._differentiate(params, tasks, lambda theta: theta)
        return gradients, {name: value.detach() for name, value in metrics.items()}

    def _differentiate(
        self, params: Params, tasks: Tasks, spread: Callable[[Params], Params]
    ) -> tuple[Params, Metrics]:
        """Returns the gradient of the sum of the task losses with respect to ``params``, the losses and the metrics.

        Args:
            params: parameters as they are given, with or without a task axis.
            tasks: one chunk.
            spread: gives them a task axis.
        """
        theta = {name: params[name].detach().requires_grad_() for name in self.algorithm.theta}
        with torch.enable_grad():
            losses, metrics = self._task_losses(spread(params | theta), tasks)
            if theta and not losses.requires_grad:
                raise MamlError(
                    f"the losses of {type(self.algorithm).__name__} on {type(self.algorithm.domain).__name__} do not "
                    "depend on theta, so nothing would be trained; they may be detached, or made of plain numbers"
                )
            gradients = torch.autograd.grad(losses.sum(), list(theta.values()), materialize_grads=True)
        return dict(zip(theta, gradients, strict=True)), {"loss": losses} | metrics

    def _task_losses(self, params: Params, tasks: Tasks) -> tuple[Tensor, Metrics]:
        """Returns `Algorithm.task_losses`; refuses losses of another shape than ``(T,)``, whose mean would be wrong."""
        algorithm, count = self.algorithm, num_tasks(tasks)
        returned = algorithm.task_losses(params, tasks)
        if not (isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[1], dict)):
            raise MamlError(
                f"{type(algorithm).__name__}.task_losses returns a {type(returned).__name__}, but has to return two "
                "values: the losses, a tensor (T,), and a dictionary of metrics, which may be empty"
            )
        losses, metrics = returned
        if losses.shape != (count,):
            raise MamlError(
                f"{type(algorithm).__name__} on {type(algorithm.domain).__name__} has losses of shape "
                f"{tuple(losses.shape)} for {count} tasks; task_losses, and the domain's loss, return one number per "
                "task, so do not average over tasks"
            )
        for name, value in metrics.items():
            if not isinstance(value, Tensor) or value.shape[:1] != (count,):
                raise MamlError(
                    f"{type(algorithm).__name__} on {type(algorithm.domain).__name__} has a metric {name!r} of "
                    f"{form_of(value)}, but a metric is a tensor with an entry for each of {count} tasks; do not "
                    "average over tasks"
                )
        if "loss" in metrics and algorithm.outer.needs_policy:
            raise MamlError(
                f"{type(algorithm).__name__}.task_losses returns a metric named loss, which would take the place of "
                f"the loss that {type(algorithm.outer).__name__} lowers; give it another name"
            )
        return losses, metrics

    def _in_chunks(self, compute: Callable[[int], Computed], count: int) -> Computed:
        """Calls ``compute`` with the chunk size for ``count`` tasks.

        If memory forces smaller chunks, later calls use them too.
        """
        chunk = min(self._execution.task_chunk or count, count)
        result, used_chunk = halve_chunk_on_oom(compute, chunk)
        if used_chunk < chunk:
            self.set_task_chunk(used_chunk)
        return result

    def _chunks(self, tasks: Tasks, task_chunk: int) -> Iterator[Tasks]:
        """Yields ``task_chunk`` tasks of each seed at a time."""
        if self.num_seeds is None:
            for start in range(0, num_tasks(tasks), task_chunk):
                yield take(tasks, start, start + task_chunk)
            return
        by_seed = {name: value.unflatten(0, (self.num_seeds, -1)) for name, value in tasks.items()}
        for start in range(0, self._tasks_per_seed(tasks), task_chunk):
            yield {name: value[:, start : start + task_chunk].flatten(0, 1) for name, value in by_seed.items()}

    def _tasks_per_seed(self, tasks: Tasks) -> int:
        """Returns this process's number of tasks of each seed."""
        return num_tasks(tasks) // (self.num_seeds or 1)

    def _mean_of_all(self, own_sums: Params, tasks: Tasks) -> Params:
        """Returns the means over the tasks of all processes, given the sums over this process's tasks."""
        means = distributed.all_reduce_mean(list(own_sums.values()), self._tasks_per_seed(tasks))
        return dict(zip(own_sums, means, strict=True))

    def _sum_over_tasks(self, metrics: Metrics) -> Metrics:
        """Returns the sums over the tasks; with a seed axis, over the tasks of each seed."""
        if self.num_seeds is None:
            return {name: value.detach().sum(0) for name, value in metrics.items()}
        return {name: value.detach().unflatten(0, (self.num_seeds, -1)).sum(1) for name, value in metrics.items()}


class TaskGradients(Objective):
    """An objective that has gradients of single tasks only.

    Args:
        compute: computes `Objective.task_gradients`.
    """

    def __init__(self, compute: Callable[[Params, Tasks], tuple[Params, Metrics]]) -> None:
        self._compute = compute

    def gradient(self, theta: Params) -> tuple[Params, dict[str, Tensor]]:
        raise MamlError("this objective has gradients of single tasks only; see Objective.task_gradients")

    def task_gradients(self, params: Params, tasks: Tasks) -> tuple[Params, Metrics]:
        return self._compute(params, tasks)


def _copying_step(
    step: TaskStep,
    compute: Callable[[Params, Tasks], tuple[Params, Metrics]],
    both: Params,
    tasks: Tasks,
) -> tuple[Params, OuterState]:
    """Makes a step on copies of the parameters and the state, and returns the copies."""
    params, state = (
        {name.removeprefix(group): value.clone() for name, value in both.items() if name.startswith(group)}
        for group in ("params.", "state.")
    )
    step(TaskGradients(compute), params, state, tasks)
    return params, state


def _added(parts: Iterable[Params]) -> Params:
    """Returns the sums of tensors of the same name, in the order of the parts."""
    total: Params = {}
    for part in parts:
        total = {name: total[name] + value for name, value in part.items()} if total else part
    return total


class BatchObjective(Objective):
    """The meta-objective of one seed on one meta-batch. Each method computes when it is called.

    Args:
        meta_gradient: computes for one seed. With several seeds, only `task_gradients` and `task_step` are possible.
        tasks: this process's part of a meta-batch, with its rollouts if the domain is on-policy.
    """

    def __init__(self, meta_gradient: MetaGradient, tasks: Tasks) -> None:
        self.meta_gradient, self.tasks = meta_gradient, tasks

    def _params(self, theta: Params) -> Params:
        return theta | self.meta_gradient.algorithm.buffers

    def gradient(self, theta: Params) -> tuple[Params, dict[str, Tensor]]:
        return self.meta_gradient.gradient(self._params(theta), self.tasks)

    def on(self, tasks: Tasks) -> BatchObjective:
        return BatchObjective(self.meta_gradient, tasks)

    def evaluate(self, theta: Params) -> dict[str, Tensor]:
        return self.meta_gradient.evaluate(self._params(theta), self.tasks)

    def kl_gradient(self, theta: Params, every: int = 1) -> Params:
        return self.meta_gradient.kl_gradient(self._params(theta), self.tasks, every)

    def curvature(self, theta: Params, every: int = 1) -> MatrixVectorProduct:
        return self.meta_gradient.curvature(self._params(theta), self.tasks, every)

    def task_gradients(self, params: Params, tasks: Tasks) -> tuple[Params, Metrics]:
        return self.meta_gradient.task_gradients(params, tasks)

    def task_step(self, step: TaskStep, params: Params, state: OuterState, tasks: Tasks) -> tuple[Params, OuterState]:
        return self.meta_gradient.task_step(step, params, state, tasks)


class PrecomputedGradient(Objective):
    """The meta-objective of one seed, whose gradient was computed together with those of the other seeds.

    Args:
        theta: where the gradient was computed.
        gradients: the gradient with respect to theta, without a task axis.
        metrics: mean metrics, 0-dim tensors.
    """

    def __init__(self, theta: Params, gradients: Params, metrics: dict[str, Tensor]) -> None:
        self.gradients, self.metrics = gradients, metrics
        self._computed_at = {name: (value, value._version) for name, value in theta.items()}

    def gradient(self, theta: Params) -> tuple[Params, dict[str, Tensor]]:
        self._check_unchanged(theta)
        return self.gradients, dict(self.metrics)

    def evaluate(self, theta: Params) -> dict[str, Tensor]:
        self._check_unchanged(theta)
        return dict(self.metrics)

    def _check_unchanged(self, theta: Params) -> None:
        """Refuses another theta than the one at which the gradient was computed, instead of returning wrong numbers."""
        for name, (value, version) in self._computed_at.items():
            if theta[name] is not value or value._version != version:  # torch counts changes in place
                raise MamlError(
                    "several seeds are trained as one computation, which has the meta-gradient at the present theta "
                    "only, but this outer optimizer or algorithm asks for it at another one; train the seeds one by "
                    "one, with -m seed=..."
                )
