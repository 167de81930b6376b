"""The one outer loop: it knows neither domain nor algorithm; logging and checkpoints happen here only."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from maml.algorithm.base import Algorithm
from maml.errors import Interrupted, MamlError
from maml.hardware import Execution
from maml.logger.base import Logger
from maml.progress import Progress
from maml.run import RunFolder
from maml.seeding import Stream
from maml.types import Params


def train(
    algorithm: Algorithm,
    run: RunFolder,
    logger: Logger,
    execution: Execution,
    saved: Mapping[str, Any] | None,
    stream: Stream,
    num_iterations: int,
    meta_batch_size: int,
    log_every: int,
    checkpoint_every: int,
) -> None:
    """Meta-trains from the saved state, or from the start, to ``num_iterations``.

    What iteration t sees depends only on the stream and t.

    Args:
        algorithm: what learns; its state is updated in place.
        run: an open run folder.
        logger: a mirror of the metrics.
        execution: stored with the state.
        saved: the checkpoint to resume from, or None.
        stream: of the run's seed.
        num_iterations: meta-updates in all.
        meta_batch_size: B.
        log_every: iterations between two lines of metrics.
        checkpoint_every: iterations between two checkpoints.

    Raises:
        MamlError: if the loss is not finite or a file cannot be written; the last checkpoint is intact.
        Interrupted: on SIGTERM or SIGINT, after a checkpoint.
    """
    start = 0
    if saved is not None:
        algorithm.load_state_dict(saved["state"])
        start = saved["iteration"]
    elif num_iterations == 0:  # theta as it was drawn is all there is to keep
        run.save_checkpoint(0, algorithm.state_dict(), execution.as_dict())
    with Progress(run.experiment, num_iterations, start) as progress, _stop_signals() as stopped:
        for iteration in range(start + 1, num_iterations + 1):
            tasks = algorithm.sample_tasks(meta_batch_size, stream.child("train").child(iteration))
            metrics = algorithm.step(tasks)
            progress.update(iteration, lambda metrics=metrics: _floats(metrics))  # type: ignore[misc]
            last = iteration == num_iterations or bool(stopped)
            if iteration % log_every == 0 or last:
                values = _finite(metrics, iteration, run)
                if iteration % log_every == 0 or iteration == num_iterations:
                    run.log(iteration, values)
                    logger.log(values, iteration)
            if iteration % checkpoint_every == 0 or last:
                state = algorithm.state_dict()
                # The loss is that of theta before this update; a theta that has just diverged does not show in it.
                _finite(metrics | _largest(state), iteration, run)
                run.save_checkpoint(iteration, state, execution.as_dict())
            if stopped:
                raise Interrupted(
                    f"stopped by {signal.Signals(stopped[0]).name} after iteration {iteration} of {num_iterations}; "
                    f"saved in {run.path}: the same command resumes",
                    stopped[0],
                )


def _floats(metrics: Mapping[str, Tensor]) -> dict[str, float]:
    values = torch.stack(list(metrics.values())).tolist()  # one transfer from the device
    return dict(zip(metrics, values, strict=True))


def _largest(state: Mapping[str, Params]) -> dict[str, Tensor]:
    """Returns the largest absolute value of each group of tensors; NaN is larger than any."""
    return {
        group: torch.stack([value.abs().max().double() for value in tensors.values()]).max()
        for group, tensors in state.items()
        if tensors
    }


def _finite(metrics: Mapping[str, Tensor], iteration: int, run: RunFolder) -> dict[str, float]:
    values = _floats(metrics)
    wrong = [name for name, value in values.items() if not math.isfinite(value)]
    if wrong:
        raise MamlError(
            f"{', '.join(f'{name}={values[name]}' for name in wrong)} at iteration {iteration}: training has diverged. "
            f"Nothing of it was saved; a checkpoint in {run.path} is from before. "
            "Lower inner.step_size or outer.step_size, or clip the meta-gradient (outer.clip)"
        )
    return values


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Collects SIGTERM and SIGINT in the list it yields; a second one acts as it always does."""
    received: list[int] = []
    before: dict[int, Any] = {}

    def remember(number: int, frame: FrameType | None) -> None:
        received.append(number)
        signal.signal(number, before[number])

    try:
        for name in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):  # the latter from SLURM
            before[name] = signal.signal(name, remember)
    except ValueError:
        pass  # not the main thread, where signals cannot be handled and do not arrive
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
