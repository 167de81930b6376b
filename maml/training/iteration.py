"""One meta-iteration: draws a meta-batch and makes a meta-update, for one seed or for several seeds at once."""

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
from maml.types import Params, Tasks, concatenate, num_tasks, select_entries


class Iteration:
    """Makes the meta-update of an iteration, which depends on theta and the iteration's number only.

    Several seeds can be trained at once. Each seed has the tasks and initial parameters that it has when it is trained
    alone, and its own outer optimizer. Their meta-gradients, or their meta-updates, are one batched computation.

    Args:
        algorithms: one algorithm for each seed; they differ in the seed only.
        streams: one random stream for each seed.
        meta_batch_size: B, tasks per seed.
        execution: chunk size, compilation and CUDA graph.
        first: number of the first iteration. All that follow have its order (`Inner.order_at`), because a compiled
            program or a CUDA graph keeps the order that it was made with.

    Attributes:
        meta_gradient: computes the meta-gradient of all seeds.
    """

    def __init__(
        self,
        algorithms: Sequence[Algorithm],
        streams: Sequence[Stream],
        meta_batch_size: int,
        execution: Execution,
        first: int = 1,
    ) -> None:
        self.algorithms, self.meta_batch_size = list(algorithms), meta_batch_size
        self.streams = [stream.child("train") for stream in streams]
        for algorithm in algorithms:
            algorithm.inner.begin(first)
        num_seeds = len(algorithms) if len(algorithms) > 1 else None
        self.meta_gradient = MetaGradient(algorithms[0], execution, num_seeds)

    @property
    def execution(self) -> Execution:
        """The execution in use now: chunks shrink when memory is short, and compiling may fail."""
        return self.meta_gradient.execution

    def __call__(self, number: int | Tensor) -> list[dict[str, Tensor]]:
        """Makes the meta-update of one iteration, for every seed.

        Args:
            number: the iteration's number, from 1; a 0-dim tensor within a CUDA graph.

        Returns:
            The mean metrics of each seed, 0-dim tensors.
        """
        inner = self.algorithms[0].inner
        assert isinstance(number, Tensor) or inner.order_at(number) == inner.present_order
        tasks = self.sample_tasks(number)
        if len(self.algorithms) == 1:
            return [meta_update(self.algorithms[0], self.meta_gradient, tasks)]
        if not self.algorithms[0].sums_over_tasks:
            return self.algorithms[0].meta_updates(self.algorithms, BatchObjective(self.meta_gradient, tasks), tasks)
        gradients, metrics = self.meta_gradient.gradient(self.params(), tasks)
        return [
            algorithm.meta_update(
                PrecomputedGradient(algorithm.theta, select_entries(gradients, index), select_entries(metrics, index)),
                tasks,
            )
            for index, algorithm in enumerate(self.algorithms)
        ]

    def params(self) -> Params:
        """Returns theta and the buffers. With several seeds they have a leading seed axis."""
        per_seed = [algorithm.theta | algorithm.buffers for algorithm in self.algorithms]
        if len(per_seed) == 1:
            return per_seed[0]
        return {name: torch.stack([params[name] for params in per_seed]) for name in per_seed[0]}

    def sample_tasks(self, number: int | Tensor) -> Tasks:
        """Draws this process's part of an iteration's meta-batch, concatenated over the seeds."""
        batches = [
            distributed.shard(algorithm.sample_tasks(self.meta_batch_size, stream.child(number)))
            for algorithm, stream in zip(self.algorithms, self.streams, strict=True)
        ]
        return batches[0] if len(batches) == 1 else concatenate(batches)


def meta_update(algorithm: Algorithm, meta_gradient: MetaGradient, tasks: Tasks) -> dict[str, Tensor]:
    """Makes one meta-update of one seed; returns its mean metrics, 0-dim tensors.

    Args:
        algorithm: the seed's algorithm; its state is changed in place.
        meta_gradient: computes the algorithm's meta-gradient.
        tasks: this process's part of the meta-batch; rollouts are added in place.
    """
    if algorithm.domain.on_policy:
        algorithm.collect(algorithm.params_per_task(num_tasks(tasks)), tasks)
    rollout_metrics = _reduce_rollout_metrics(algorithm.domain, tasks)
    if algorithm.domain.selected_by:
        update_best(algorithm.best, algorithm.theta, rollout_metrics[algorithm.domain.selected_by])
    return algorithm.meta_update(BatchObjective(meta_gradient, tasks), tasks) | rollout_metrics


def _reduce_rollout_metrics(domain: Domain, tasks: Tasks) -> dict[str, Tensor]:
    """Returns the domain's `rollout_metrics`, averaged or summed over the tasks of all processes, 0-dim tensors."""
    averaged, summed = domain.rollout_metrics(tasks)
    own_sums = [[value.sum() for value in metrics.values()] for metrics in (averaged, summed)]
    means = distributed.all_reduce_mean(own_sums[0], num_tasks(tasks)) if averaged else []
    sums = distributed.all_reduce_sum(own_sums[1])
    return dict(zip((*averaged, *summed), (*means, *sums), strict=True))


def check_parallelism(algorithm: Algorithm, num_seeds: int, meta_batch_size: int) -> None:
    """Checks that the processes can share a meta-batch and that several seeds can be trained at once.

    Args:
        algorithm: the algorithm of one seed.
        num_seeds: number of seeds that are trained at once.
        meta_batch_size: B.

    Raises:
        MamlError: if the algorithm or domain does not allow it, or there are more processes than tasks.
    """
    name, domain = type(algorithm).__name__, type(algorithm.domain).__name__
    num_processes = distributed.world_size()
    if num_processes > 1 and not algorithm.sums_over_tasks:
        raise MamlError(
            f"{name} cannot be trained by several processes, because its meta-update is not a sum over tasks; start it "
            "without torchrun"
        )
    if num_processes > meta_batch_size:
        raise MamlError(
            f"meta_batch_size={meta_batch_size} cannot be shared by {num_processes} processes; raise it, or start fewer"
        )
    has_rollouts = type(algorithm.domain).rollout_metrics is not Domain.rollout_metrics or algorithm.domain.on_policy
    is_joint = algorithm.sums_over_tasks or type(algorithm).meta_updates is not Algorithm.meta_updates
    if num_seeds > 1 and (has_rollouts or not is_joint):
        part = domain if has_rollouts else name
        raise MamlError(
            f"seeds={num_seeds}: {part} cannot train several seeds as one computation; sweep instead, with -m seed=..."
        )
