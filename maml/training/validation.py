"""Validation during training: the headline metric on validation tasks, which are always the same."""

from __future__ import annotations

import torch

from maml.algorithm.base import Algorithm
from maml.algorithm.best import update_best
from maml.hardware import distributed
from maml.hardware.memory import halve_chunk_on_oom
from maml.seeding import Stream
from maml.types import num_tasks, take

NUM_TASKS = 100  # on which the best theta is chosen


@torch.no_grad()
def validation_score(algorithm: Algorithm, count: int, task_chunk: int | None) -> float:
    """Returns the mean headline metric after adaptation to validation tasks, with as many steps as in training.

    By showing, it is the mean over showings.

    Args:
        algorithm: the algorithm; its state is not changed.
        count: number of tasks.
        task_chunk: number of tasks that are adapted at once; None adapts all.
    """
    domain, num_steps = algorithm.domain, algorithm.adaptation_steps
    bank = domain.sample_tasks(count, Stream(0, algorithm.stream.device).child("validation"), "val")

    def total(chunk: int) -> float:
        values = []
        for start in range(0, count, chunk):
            tasks = take(bank, start, start + chunk)
            *_, adapted = algorithm.adapt(algorithm.params_per_task(num_tasks(tasks)), tasks, num_steps)
            measured = algorithm.measure(adapted, tasks, num_steps)[domain.headline]
            values.append(measured.nanmean(1) if domain.measured_by == "showing" else measured)
        return torch.cat(values).sum().item()

    summed, _ = halve_chunk_on_oom(total, task_chunk or count)
    return summed / count


def update_best_on_validation(algorithm: Algorithm, task_chunk: int | None) -> float:
    """Measures theta on validation tasks and keeps it if it is the best so far; returns the headline metric.

    Args:
        algorithm: the algorithm, after `Algorithm.keep_best_of_validation`; its record of the best theta is changed.
        task_chunk: as in `validation_score`.
    """
    # On rank 0 only, so that rounding cannot make the processes keep different thetas.
    score = distributed.on_rank_zero(lambda: validation_score(algorithm, NUM_TASKS, task_chunk))
    sign = 1.0 if algorithm.domain.larger_is_better else -1.0
    recorded = next(iter(algorithm.best.values()))
    update_best(algorithm.best, algorithm.theta | algorithm.buffers, recorded.new_tensor(sign * score))
    return score
