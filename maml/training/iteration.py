"""One meta-iteration: drawing a meta-batch and moving theta by it; of one seed, or of several side by side."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from maml.algorithm.base import Algorithm
from maml.domain.base import Domain
from maml.errors import MamlError
from maml.hardware import distributed
from maml.hardware.base import Execution
from maml.hardware.compile import Compiled
from maml.outer.base import Objective
from maml.seeding import Stream
from maml.types import Params, Tasks


class Iteration:
    """Makes the meta-update of an iteration, which depends on nothing but theta and the iteration's number.

    Seeds side by side see the tasks, and have the initial parameters, that they would have alone. Their gradients are
    one computation, along one more axis; each has its own outer optimizer.

    Args:
        algorithms: of one seed each, otherwise alike.
        streams: of the seeds.
        meta_batch_size: B.
        execution: how the computation is cut.

    Attributes:
        computing: the algorithm that computes the gradient: the one there is, or one that stands for all.
    """

    def __init__(
        self, algorithms: Sequence[Algorithm], streams: Sequence[Stream], meta_batch_size: int, execution: Execution
    ) -> None:
        self.algorithms, self.meta_batch_size = list(algorithms), meta_batch_size
        self.streams = [stream.child("train") for stream in streams]
        self.computing = algorithms[0]
        if len(algorithms) > 1:
            self.computing = copy.copy(algorithms[0])
            self.computing.num_seeds = len(algorithms)
            self.computing.chunk_gradient = self.computing._chunk_gradient
        self._execution = execution
        self.computing.task_chunk = execution.task_chunk
        self.computing.inner.recompute = execution.recompute
        if execution.compile and not isinstance(self.computing.chunk_gradient, Compiled):
            self.computing.chunk_gradient = Compiled(self.computing.chunk_gradient)

    @property
    def execution(self) -> Execution:
        """How the computation is cut by now: memory, or the compiler, may have failed at what was chosen."""
        function = self.computing.chunk_gradient
        compiles = isinstance(function, Compiled) and not function.failed
        return replace(self._execution, task_chunk=self.computing.task_chunk, compile=compiles)

    def __call__(self, number: int | Tensor) -> list[dict[str, Tensor]]:
        """Makes the meta-update of iteration ``number`` (from 1; a 0-dim tensor to be captured) of every seed.

        Returns:
            Of each seed the mean metrics, 0-dim tensors.
        """
        tasks = self.sample_tasks(number)
        if len(self.algorithms) == 1:
            return [self.computing.step(tasks)]
        gradients, metrics = self.computing.gradient(self.theta(), tasks)
        return [
            algorithm.update(_Given(_at(gradients, seed), _at(metrics, seed)))
            for seed, algorithm in enumerate(self.algorithms)
        ]

    def theta(self) -> Params:
        """Returns theta as the computation takes it: of several seeds, stacked, with what is carried beside it."""
        if len(self.algorithms) == 1:
            return self.computing.theta
        self.computing.carried = _stack([algorithm.carried for algorithm in self.algorithms])
        return _stack([algorithm.theta for algorithm in self.algorithms])

    def sample_tasks(self, number: int | Tensor) -> Tasks:
        """Draws the meta-batch of an iteration, this process's share of it; seed by seed."""
        batches = [
            distributed.share(algorithm.sample_tasks(self.meta_batch_size, stream.child(number)))
            for algorithm, stream in zip(self.algorithms, self.streams, strict=True)
        ]
        return batches[0] if len(batches) == 1 else {name: torch.cat([b[name] for b in batches]) for name in batches[0]}


def check_shared(algorithm: Algorithm, num_seeds: int, meta_batch_size: int) -> None:
    """Makes sure, before anything is written, that processes can share a meta-batch and seeds go side by side.

    Raises:
        MamlError: if they cannot.
    """
    name, domain = type(algorithm).__name__, type(algorithm.domain).__name__
    if distributed.world_size() > 1 and not algorithm.sums_over_tasks:
        raise MamlError(f"{name} makes no sum over tasks that processes could share; start it without torchrun")
    if distributed.world_size() > meta_batch_size:
        raise MamlError(
            f"meta_batch_size={meta_batch_size} cannot be shared by {distributed.world_size()} processes; raise it, or "
            "start fewer"
        )
    sums_up = type(algorithm.domain).rollout_metrics is not Domain.rollout_metrics or algorithm.domain.on_policy
    if num_seeds > 1 and (sums_up or not algorithm.sums_over_tasks):
        what = domain if sums_up else name
        raise MamlError(f"seeds={num_seeds}: {what} cannot run side by side; sweep instead, with -m seed=...")


class _Given(Objective):
    """The meta-objective of one seed, whose gradient is there already."""

    def __init__(self, gradients: Params, metrics: dict[str, Tensor]) -> None:
        self.gradients, self.metrics = gradients, metrics

    def gradient(self, theta: Params) -> tuple[Params, dict[str, Tensor]]:
        return self.gradients, dict(self.metrics)

    def evaluate(self, theta: Params) -> dict[str, Tensor]:
        return dict(self.metrics)


def _stack(each: Sequence[Params]) -> Params:
    return {name: torch.stack([params[name] for params in each]) for name in each[0]}


def _at(params: Params, seed: int) -> Params:
    return {name: value[seed] for name, value in params.items()}
