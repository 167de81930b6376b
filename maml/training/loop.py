"""The outer training loop, the same for all domains and algorithms; it logs metrics and saves checkpoints."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import pairwise
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from maml.errors import EnvironmentFailed, Interrupted, MamlError
from maml.hardware import distributed
from maml.hardware.base import Execution
from maml.hardware.compile import is_compiling
from maml.record import checkpoint
from maml.record.heartbeat import report_iteration
from maml.training.cuda_graph import CudaGraphIteration, release_graph, with_cuda_graph
from maml.training.diagnostics import Diagnostics
from maml.training.iteration import Iteration
from maml.training.learner import Learner
from maml.training.progress import Progress
from maml.training.validation import update_best_on_validation
from maml.types import Params


def train(learners: Sequence[Learner], execution: Execution) -> Execution:
    """Meta-trains to the settings' ``num_iterations``. The tasks of iteration t depend on the seed and t only.

    Several seeds are trained at once. Seeds that are behind train alone until they have caught up. When the order of
    the meta-gradient changes, the iteration is compiled or captured again.

    Args:
        learners: one learner for each seed; their settings differ in the seed only.
        execution: chunk size, compilation and CUDA graph; saved in the checkpoints.

    Returns:
        The execution in use at the end: chunks shrink when memory is short, and compiling may fail.

    Raises:
        MamlError: if the loss is not finite or a file cannot be written; the last checkpoint is intact.
        Interrupted: on SIGTERM or SIGINT, after a checkpoint.
    """
    settings = learners[0].settings
    num_iterations = settings.num_iterations
    if num_iterations == 0:  # the loop below does not run, so the initial theta is saved here
        for learner in learners:
            if checkpoint.newest(learner.folder.checkpoint_path) is None:
                learner.folder.save_checkpoint(0, learner.algorithm.state_dict(), execution.as_dict())
    title = learners[0].title if len(learners) == 1 else f"{learners[0].folder.experiment}, {len(learners)} seeds"
    boundaries = _boundaries(learners, num_iterations)
    iterate: Iteration | CudaGraphIteration | None = None
    with (
        ExitStack() as at_end,
        Progress(title, num_iterations, boundaries[0]) as progress,
        _stop_signals() as stopped,
    ):
        at_end.callback(lambda: release_graph(iterate))  # also on an error, whose traceback keeps the graph alive
        for start, end in pairwise(boundaries):
            active = [learner for learner in learners if learner.start <= start]
            algorithms, streams = [each.algorithm for each in active], [each.stream for each in active]
            iteration = Iteration(algorithms, streams, settings.meta_batch_size, execution, start + 1)
            iterate = with_cuda_graph(iteration)
            diagnostics = Diagnostics(active, iteration, start)
            _make_iterations(range(start + 1, end + 1), iterate, active, diagnostics, progress, stopped)
            execution = iterate.execution
        # It may have come while the last theta was validated or saved.
        if signal_number := distributed.all_reduce_max(stopped[0] if stopped else 0):
            raise _interrupted(signal_number, num_iterations, num_iterations, learners)
    return execution


def _make_iterations(
    numbers: range,
    iterate: Iteration | CudaGraphIteration,
    active: Sequence[Learner],
    diagnostics: Diagnostics,
    progress: Progress,
    stopped: Sequence[int],
) -> None:
    """Makes iterations; logs, validates and saves.

    Args:
        numbers: the numbers of the iterations.
        iterate: makes an iteration.
        active: the learners that it trains.
        diagnostics: measures what is logged beside the metrics.
        progress: the display.
        stopped: the numbers of the signals that have come.

    Raises:
        Interrupted: if one has come, after a checkpoint.
    """
    settings = active[0].settings
    pending, metrics = PendingMetrics(active), list[dict[str, Tensor]]()
    for number in numbers:
        is_last = number == settings.num_iterations
        is_logged = number % settings.log_every == 0 or is_last
        if is_logged:
            diagnostics.before()
        metrics = _make_iteration(iterate, number, metrics, pending, active)
        report_iteration(number)
        signal_number = distributed.all_reduce_max(stopped[0] if stopped else 0)
        if distributed.rank() == 0:  # the display reads metrics from the device, which blocks for a moment
            progress.update(number, lambda metrics=metrics: _to_floats(metrics[0]))  # type: ignore[misc]
        if settings.validate_every and (number % settings.validate_every == 0 or is_last):
            _validate(active, number, iterate.execution)
        if is_logged:
            pending.add(number, metrics, diagnostics.after(number))
        if number % settings.checkpoint_every == 0 or number == numbers[-1] or signal_number:
            pending.write()
            _save_checkpoint(active, number, metrics, iterate.execution)
            if not signal_number:
                _log_validation(active, number, diagnostics.validate())
        # Other ranks check at checkpoints only, so that all ranks find an error at the same iteration.
        if distributed.rank() == 0:
            pending.write(if_ready=True)
        if signal_number:
            raise _interrupted(signal_number, number, settings.num_iterations, active)


def _boundaries(learners: Sequence[Learner], num_iterations: int) -> list[int]:
    """Returns the iterations between which neither the active learners nor the order of the meta-gradient change."""
    boundaries = {learner.start for learner in learners} | {num_iterations}
    switch = (learners[0].algorithm.inner.second_order_from or 1) - 1
    if min(boundaries) < switch < num_iterations:
        boundaries.add(switch)
    return sorted(boundaries)


def _make_iteration(
    iterate: Iteration | CudaGraphIteration,
    number: int,
    before: list[dict[str, Tensor]],
    pending: PendingMetrics,
    active: Sequence[Learner],
) -> list[dict[str, Tensor]]:
    """Makes an iteration. If an environment fails, saves the state after the iteration before.

    ``before`` has the metrics of the iteration before; it is empty if ``number`` is the first since the start.
    """
    try:
        return iterate(number)
    except EnvironmentFailed:  # in a rollout, before the state of the last iteration has changed
        if before:
            pending.write()
            _save_checkpoint(active, number - 1, before, iterate.execution)
        raise


def _interrupted(signal_number: int, number: int, num_iterations: int, active: Sequence[Learner]) -> Interrupted:
    folders = ", ".join(str(learner.folder.path) for learner in active)
    return Interrupted(
        f"stopped by {signal.Signals(signal_number).name} after iteration {number} of {num_iterations}; saved in "
        f"{folders}: the same command resumes",
        signal_number,
    )


def _validate(active: Sequence[Learner], number: int, execution: Execution) -> None:
    """Measures theta on validation tasks, keeps it if it is the best, and logs the measurement."""
    for learner in active:
        score = update_best_on_validation(learner.algorithm, execution.task_chunk)
        learner.logger.log({f"validation_{learner.algorithm.domain.headline}": score}, number)


def _save_checkpoint(
    active: Sequence[Learner], number: int, metrics: Sequence[Mapping[str, Tensor]], execution: Execution
) -> None:
    """Saves the states after iteration ``number``, unless one is not finite."""
    for learner, seed_metrics in zip(active, metrics, strict=True):
        state = learner.algorithm.state_dict()
        # The loss belongs to theta before this update. If this update made theta diverge, only the state shows it.
        _check_finite(_to_floats({**seed_metrics, **_largest_entries(state)}), number, learner)
        learner.folder.save_checkpoint(number, state, execution.as_dict())


def _log_validation(active: Sequence[Learner], number: int, measured: Sequence[Mapping[str, float]]) -> None:
    for learner, numbers in zip(active, measured, strict=True):
        if numbers:
            learner.logger.log(numbers, number)


class PendingMetrics:
    """Asynchronous copies of metrics from the device to the logs; training never blocks on them.

    Args:
        learners: the learners whose metrics are logged, one for each seed.
    """

    def __init__(self, learners: Sequence[Learner]) -> None:
        self.learners = learners
        self._queue: list[tuple[int, list[str], list[str], Tensor, torch.cuda.Event | None]] = []

    def add(
        self, number: int, metrics: Sequence[Mapping[str, Tensor]], diagnostics: Sequence[Mapping[str, Tensor]]
    ) -> None:
        """Starts to copy the metrics of one iteration.

        Args:
            number: the iteration's number.
            metrics: for each learner, 0-dim tensors by name.
            diagnostics: further numbers, in the same form, for the loggers only.
        """
        both = [[*recorded.values(), *more.values()] for recorded, more in zip(metrics, diagnostics, strict=True)]
        values = torch.stack([torch.stack(seed_values) for seed_values in both])
        copied = None
        if values.is_cuda:
            values = torch.empty_like(values, device="cpu", pin_memory=True).copy_(values, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        self._queue.append((number, list(metrics[0]), list(diagnostics[0]), values, copied))

    def write(self, if_ready: bool = False) -> None:
        """Logs the metrics that were added.

        Args:
            if_ready: log only what has been copied already, instead of waiting for the rest.

        Raises:
            MamlError: if a number is not finite.
        """
        while self._queue:
            number, recorded, more, values, copied = self._queue[0]
            if copied is not None:
                if if_ready and not copied.query():
                    return
                copied.synchronize()
            del self._queue[0]
            for learner, seed_values in zip(self.learners, values.tolist(), strict=True):
                metrics = dict(zip([*recorded, *more], seed_values, strict=True))
                diagnostics = {name: metrics.pop(name) for name in more}
                _check_finite(metrics, number, learner)
                learner.folder.log(number, metrics)
                learner.logger.log(metrics | diagnostics, number)


def _to_floats(metrics: Mapping[str, Tensor]) -> dict[str, float]:
    values = torch.stack(list(metrics.values())).tolist()  # one transfer from the device
    return dict(zip(metrics, values, strict=True))


def _largest_entries(state: Mapping[str, Params]) -> dict[str, Tensor]:
    """Returns the largest absolute value in each group of tensors; NaN if the group holds a NaN.

    The record of the best theta is left out: it is a copy, and its score is -inf before the first measurement.
    """
    return {
        group: torch.stack([value.abs().max().double() for value in tensors.values() if value.numel()]).max()
        for group, tensors in state.items()
        if any(value.numel() for value in tensors.values()) and group != "best"
    }


def _check_finite(values: dict[str, float], iteration: int, learner: Learner) -> None:
    not_finite = [f"{name}={value}" for name, value in values.items() if not math.isfinite(value)]
    if not_finite:
        last = checkpoint.newest(learner.folder.checkpoint_path)
        problem = (
            f"{', '.join(not_finite)} at iteration {iteration}: training has diverged. The diverged state was not saved"
            f"{f'; the last checkpoint in {learner.folder.path} is from before' if last else ''}. "
            "Lower inner.step_size or outer.step_size, or clip the meta-gradient (outer.clip)"
        )
        learner.logger.alert("Training diverged", problem)
        raise MamlError(problem)


def stop_at_once(number: int, frame: FrameType | None = None) -> None:
    """Stops the process at once; a signal handler for times when nothing has to be saved first.

    Raises:
        KeyboardInterrupt: on SIGINT.
        Interrupted: on another signal.
    """
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise Interrupted(
        f"stopped by {signal.Signals(number).name}; the same command goes on from the newest checkpoint, if there is "
        "one",
        number,
    )


def _answer() -> None:
    """Says that the run stops, from within a signal handler, on rank 0 only."""
    if distributed.rank() == 0:
        # Not with `print`, which fails if the signal has interrupted another `print`. A terminal's cursor stands behind
        # the bar.
        with suppress(OSError):  # the terminal may be gone
            os.write(2, b"\n" * os.isatty(2) + b"stopping after this iteration; press Ctrl-C again to drop it\n")


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Yields a list to which the numbers of stop signals are added.

    The process stops at once on a second Ctrl-C, and on any stop signal while it compiles.
    """
    received: list[int] = []
    before: dict[int, Any] = {}

    def remember(number: int, frame: FrameType | None) -> None:
        if is_compiling():
            stop_at_once(number, frame)
        received.append(number)
        # A second Ctrl-C stops at once. Other signals may come twice from one request: to the process and to its group.
        if number == signal.SIGINT:
            signal.signal(number, before[number])
            _answer()

    try:
        for stop_signal in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):  # the last two: from SLURM
            before[stop_signal] = signal.signal(stop_signal, remember)
    except ValueError:
        pass  # not the main thread, where signals cannot be handled and do not arrive
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
