"""One meta-iteration: drawing a meta-batch and moving theta by it, for one seed or for several side by side."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from maml.algorithm.base import Algorithm
from maml.algorithm.best import update_best
from maml.domain.base import Domain
from maml.errors import MamlError
from maml.hardware import distributed
from maml.hardware.base import Execution
from maml.seeding import Stream
from maml.training.meta_gradient import BatchObjective, MetaGradient, PrecomputedGradient
from maml.types import Params, Tasks, num_tasks


class Iteration:
    """Makes the meta-update of an iteration, which depends on nothing but theta and the iteration's number.

    Seeds side by side see the tasks, and have the initial parameters, that they would have alone. Their gradients are
    one computation, along one more axis; each has its own outer optimizer.

    Args:
        algorithms: one for each seed, otherwise alike.
        streams: one for each seed.
        meta_batch_size: B.
        execution: how the computation is cut.

    Attributes:
        meta_gradient: of all seeds.
    """

    def __init__(
        self, algorithms: Sequence[Algorithm], streams: Sequence[Stream], meta_batch_size: int, execution: Execution
    ) -> None:
        self.algorithms, self.meta_batch_size = list(algorithms), meta_batch_size
        self.streams = [stream.child("train") for stream in streams]
        num_seeds = len(algorithms) if len(algorithms) > 1 else None
        self.meta_gradient = MetaGradient(algorithms[0], execution, num_seeds)

    @property
    def execution(self) -> Execution:
        """How the computation is cut by now: memory, or the compiler, may have failed at what was chosen."""
        return self.meta_gradient.execution

    def __call__(self, number: int | Tensor) -> list[dict[str, Tensor]]:
        """Makes the meta-update of iteration ``number`` (from 1; a 0-dim tensor to be captured) of every seed.

        Returns:
            The mean metrics of each seed, 0-dim tensors.
        """
        tasks = self.sample_tasks(number)
        if len(self.algorithms) == 1:
            return [meta_update(self.algorithms[0], self.meta_gradient, tasks)]
        gradients, metrics = self.meta_gradient.gradient(self.params(), tasks)
        return [
            algorithm.meta_update(PrecomputedGradient(_at(gradients, seed), _at(metrics, seed)), tasks)
            for seed, algorithm in enumerate(self.algorithms)
        ]

    def params(self) -> Params:
        """Returns theta and the buffers; of several seeds, stacked along a leading seed axis."""
        each = [algorithm.theta | algorithm.buffers for algorithm in self.algorithms]
        return each[0] if len(each) == 1 else {name: torch.stack([its[name] for its in each]) for name in each[0]}

    def sample_tasks(self, number: int | Tensor) -> Tasks:
        """Draws the meta-batch of an iteration: this process's share of it, seed by seed."""
        batches = [
            distributed.shard(algorithm.sample_tasks(self.meta_batch_size, stream.child(number)))
            for algorithm, stream in zip(self.algorithms, self.streams, strict=True)
        ]
        return batches[0] if len(batches) == 1 else {name: torch.cat([b[name] for b in batches]) for name in batches[0]}


def meta_update(algorithm: Algorithm, meta_gradient: MetaGradient, tasks: Tasks) -> dict[str, Tensor]:
    """Makes one meta-update of one seed; returns its mean metrics, 0-dim tensors.

    Args:
        algorithm: changed in place.
        meta_gradient: of the algorithm.
        tasks: a meta-batch; rollouts are added to it.
    """
    if algorithm.domain.on_policy:
        algorithm.collect(algorithm.params_per_task(num_tasks(tasks)), tasks)
    summary = _summary(algorithm.domain, tasks)
    if algorithm.best:
        assert algorithm.domain.selected_by is not None
        update_best(algorithm.best, algorithm.theta, summary[algorithm.domain.selected_by])
    return algorithm.meta_update(BatchObjective(meta_gradient, tasks), tasks) | summary


def _summary(domain: Domain, tasks: Tasks) -> dict[str, Tensor]:
    """Returns what is logged of a meta-batch beside the losses, over the tasks of all processes."""
    means, counts = domain.rollout_metrics(tasks)
    if not means:
        return {}
    averages = distributed.all_reduce_mean([value.sum() for value in means.values()], num_tasks(tasks))
    sums = distributed.all_reduce_sum([value.sum() for value in counts.values()])
    return dict(zip((*means, *counts), (*averages, *sums), strict=True))


def check_parallelism(algorithm: Algorithm, num_seeds: int, meta_batch_size: int) -> None:
    """Makes sure, before anything is written, that processes can share a meta-batch and seeds go side by side.

    Raises:
        MamlError: if they cannot.
    """
    name, domain = type(algorithm).__name__, type(algorithm.domain).__name__
    num_processes = distributed.world_size()
    if num_processes > 1 and not algorithm.sums_over_tasks:
        raise MamlError(f"{name} makes no sum over tasks that processes could share; start it without torchrun")
    if num_processes > meta_batch_size:
        raise MamlError(
            f"meta_batch_size={meta_batch_size} cannot be shared by {num_processes} processes; raise it, or start fewer"
        )
    sums_up = type(algorithm.domain).rollout_metrics is not Domain.rollout_metrics or algorithm.domain.on_policy
    if num_seeds > 1 and (sums_up or not algorithm.sums_over_tasks):
        what = domain if sums_up else name
        raise MamlError(f"seeds={num_seeds}: {what} cannot run side by side; sweep instead, with -m seed=...")


def _at(params: Params, seed: int) -> Params:
    return {name: value[seed] for name, value in params.items()}
