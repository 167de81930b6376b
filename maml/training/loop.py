"""The one outer loop: it knows neither domain nor algorithm; logging and checkpoints happen here only."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from maml.errors import Interrupted, MamlError
from maml.hardware import distributed
from maml.hardware.base import Execution
from maml.record import checkpoint
from maml.record.run_folder import RunFolder
from maml.training.cuda_graph import with_cuda_graph
from maml.training.iteration import Iteration
from maml.training.learner import Learner
from maml.training.progress import Progress
from maml.types import Params


def train(
    learners: Sequence[Learner],
    execution: Execution,
    num_iterations: int,
    meta_batch_size: int,
    log_every: int,
    checkpoint_every: int,
) -> Execution:
    """Meta-trains to ``num_iterations``; what iteration t sees depends only on the stream and t.

    Several seeds go side by side. Seeds that are behind train alone until they have caught up.

    Args:
        learners: one for each seed.
        execution: how the computation is cut; stored with the state.
        num_iterations: meta-updates in all.
        meta_batch_size: B.
        log_every: iterations between two lines of metrics.
        checkpoint_every: iterations between two checkpoints.

    Returns:
        How the computation was cut in the end: memory, or the compiler, may have failed at what was chosen.

    Raises:
        MamlError: if the loss is not finite or a file cannot be written; the last checkpoint is intact.
        Interrupted: on SIGTERM or SIGINT, after a checkpoint.
    """
    starts = sorted({learner.start for learner in learners} | {num_iterations})
    if num_iterations == 0:  # theta as it was drawn is all there is to keep
        for learner in learners:
            if checkpoint.newest(learner.folder.checkpoint_path) is None:
                learner.folder.save_checkpoint(0, learner.algorithm.state_dict(), execution.as_dict())
    console = Console(quiet=True) if distributed.rank() else None
    title = learners[0].title if len(learners) == 1 else f"{learners[0].folder.experiment}, {len(learners)} seeds"
    with Progress(title, num_iterations, starts[0], console) as progress, _stop_signals() as stopped:
        for start, end in pairwise(starts):
            together = [learner for learner in learners if learner.start <= start]
            algorithms, streams = [each.algorithm for each in together], [each.stream for each in together]
            iterate = with_cuda_graph(Iteration(algorithms, streams, meta_batch_size, execution))
            pending = PendingMetrics(together)
            for number in range(start + 1, end + 1):
                metrics = iterate(number)
                signal_number = distributed.all_reduce_max(stopped[0] if stopped else 0)
                if distributed.rank() == 0:  # it waits for the device, now and then
                    progress.update(number, lambda metrics=metrics: _floats(metrics[0]))  # type: ignore[misc]
                last = number == end or bool(signal_number)
                if number % log_every == 0 or number == num_iterations:
                    pending.add(number, metrics)
                if number % checkpoint_every == 0 or last:
                    pending.write()
                    for learner, its in zip(together, metrics, strict=True):
                        state = learner.algorithm.state_dict()
                        # The loss is that of theta before this update; a theta that has just diverged does not show
                        # in it.
                        _finite(_floats(its | _largest(state)), number, learner.folder)
                        learner.folder.save_checkpoint(number, state, iterate.execution.as_dict())
                pending.write(if_ready=True)
                if signal_number:
                    raise Interrupted(
                        f"stopped by {signal.Signals(signal_number).name} after iteration {number} of "
                        f"{num_iterations}; saved in {', '.join(str(each.folder.path) for each in together)}: "
                        "the same command resumes",
                        signal_number,
                    )
            execution = iterate.execution
    return execution


class PendingMetrics:
    """Asynchronous copies of metrics from the device to the logs; training never blocks on them."""

    def __init__(self, learners: Sequence[Learner]) -> None:
        self.learners = learners
        self.due: list[tuple[int, list[str], Tensor, torch.cuda.Event | None]] = []

    def add(self, number: int, metrics: Sequence[Mapping[str, Tensor]]) -> None:
        """Sends for the metrics of an iteration, of each learner; `write` logs what has arrived."""
        values = torch.stack([torch.stack(list(its.values())) for its in metrics])
        arrived = None
        if values.is_cuda:
            values = torch.empty_like(values, device="cpu", pin_memory=True).copy_(values, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        self.due.append((number, list(metrics[0]), values, arrived))

    def write(self, if_ready: bool = False) -> None:
        """Logs all that was sent for, or as far as it has arrived.

        Raises:
            MamlError: if a number is not finite.
        """
        while self.due:
            number, names, values, arrived = self.due[0]
            if arrived is not None:
                if if_ready and not arrived.query():
                    return
                arrived.synchronize()
            del self.due[0]
            for learner, its in zip(self.learners, values.tolist(), strict=True):
                found = _finite(dict(zip(names, its, strict=True)), number, learner.folder)
                learner.folder.log(number, found)
                learner.logger.log(found, number)


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


def _finite(values: dict[str, float], iteration: int, run: RunFolder) -> dict[str, float]:
    wrong = [name for name, value in values.items() if not math.isfinite(value)]
    if wrong:
        raise MamlError(
            f"{', '.join(f'{name}={values[name]}' for name in wrong)} at iteration {iteration}: training has diverged. "
            f"Nothing of it was saved; what is in {run.path} is from before. "
            "Lower inner.step_size or outer.step_size, or clip the meta-gradient (outer.clip)"
        )
    return values


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Collects the signals that stop a run in the list it yields; a second Ctrl-C acts as it always does."""
    received: list[int] = []
    before: dict[int, Any] = {}

    def remember(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if number == signal.SIGINT:  # others may come twice, to a process and to its group, and nobody is impatient
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
