"""Runs a meta-iteration as one CUDA graph, so that launching many small kernels costs no time on the CPU."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from maml.errors import first_line
from maml.hardware import distributed
from maml.hardware.base import Execution
from maml.hardware.memory import release_failed_memory
from maml.status import announce
from maml.training.iteration import Iteration

# Number of plain iterations before the capture: libraries choose algorithms and allocate memory in their first calls.
_NUM_WARM_UP = 3
# Tolerance, relative to the norm of one update. Entries whose gradient is rounding noise may flip sign, and Adam turns
# that into a full step. A wrong meta-batch would give an error above 1.
_TOLERANCE = 0.2
_log = logging.getLogger(__name__)

Outputs = TypeVar("Outputs")
State = dict[str, Tensor]
"""Everything that an iteration changes: one float64 vector for each group of tensors (and seed), by name."""


def capture(compute: Callable[[], Outputs]) -> tuple[Outputs, Callable[[], None]]:
    """Captures a computation on the GPU as a graph.

    Returns:
        The computation's outputs, tensors that every replay overwrites; and the function that replays the graph.
    """
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        # Other threads may use CUDA meanwhile: with several GPUs, NCCL has a thread that watches the communication.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            outputs = compute()
    finally:
        torch.cuda.set_stream(stream)  # a failed capture does not restore it
    return outputs, graph.replay


def cause_of(error: RuntimeError) -> tuple[str, bool]:
    """Returns why a capture failed, and whether memory ran out. Ending it raises another error after the first."""
    cause = error.__context__ or error
    return first_line(cause), isinstance(cause, torch.OutOfMemoryError)


class CudaGraphIteration:
    """An `Iteration` that is captured as a CUDA graph after a few plain iterations, then replayed.

    The graph reads the iteration's number from a tensor and draws the tasks from it. The first replay is compared with
    the plain iteration. If they differ, or the capture fails, a warning gives the reason and the run continues with
    plain iterations.

    Args:
        iterate: the iteration to capture.

    Attributes:
        has_failed: whether the run continues with plain iterations.
    """

    def __init__(self, iterate: Iteration) -> None:
        self.iterate = iterate
        device = iterate.streams[0].device
        self.number = torch.zeros((), dtype=torch.int64, device=device)
        self.metrics: list[dict[str, Tensor]] = []
        self.replay: Callable[[], None] | None = None
        # Ends of the last two replays, by parity of the iteration.
        self._ends = [torch.cuda.Event(), torch.cuda.Event()] if device.type == "cuda" else []
        self.num_calls = 0
        self.has_failed = False

    @property
    def execution(self) -> Execution:
        """The execution in use now: without the graph, if it has failed."""
        return replace(self.iterate.execution, cuda_graph=not self.has_failed)

    def __call__(self, number: int) -> list[dict[str, Tensor]]:
        """Makes the meta-update of iteration ``number``.

        Returns:
            The mean metrics of each seed, 0-dim tensors. The next replay overwrites them.
        """
        if self.replay is not None:
            end = self._ends[number % 2] if self._ends else None
            if end is not None:
                end.synchronize()  # at most two replays are under way, so a signal stops the run within two iterations
            self.number.fill_(number)
            self.replay()
            if end is not None:
                end.record()
            return self.metrics
        self.num_calls += 1
        if self.has_failed or self.num_calls <= _NUM_WARM_UP:
            return self.iterate(number)
        return self._capture_and_compare(number)

    def release(self) -> None:
        """Gives up the graph; what it has computed stays.

        With several GPUs, leaving them at the end of the program waits until no graph uses the connection any more.
        """
        self.replay, self.metrics = None, []

    def _capture_and_compare(self, number: int) -> list[dict[str, Tensor]]:
        announce("capturing the iteration as a CUDA graph, a few seconds")
        before = self._state()
        expected = self.iterate(number)
        after = self._state()
        self._restore(before)
        self.number.fill_(number)
        metrics, replay, reason = self._try_capture()
        # All processes replay or none does, because the graph waits for the other processes.
        if not distributed.all_reduce_max(bool(reason)):
            replay()
            reason = self._difference(before, after, expected, metrics)
        if distributed.all_reduce_max(bool(reason)):
            self._restore(after)
            self.has_failed = True
            _log.warning(
                "the iteration does not run as a CUDA graph (%s); the run continues without it: slower, same results",
                reason or "it failed in another process of this run",
            )
            return expected
        self.metrics, self.replay = metrics, replay
        return metrics

    def _try_capture(self) -> tuple[list[dict[str, Tensor]], Callable[[], None], str]:
        """Returns the metrics and the replay function of `capture`, and the reason of a failure; empty if it worked.

        A graph has memory of its own. If that runs out, smaller chunks of tasks are tried.
        """
        planned = self.iterate.execution.task_chunk
        largest = chunk = planned or -(-self.iterate.meta_batch_size // distributed.world_size())
        while True:
            try:
                if chunk < largest:  # the plain iterations had chunks of another size
                    tasks = self.iterate.sample_tasks(self.number)
                    self.iterate.meta_gradient.sums(self.iterate.params(), tasks, chunk)
                return *capture(lambda: self.iterate(self.number)), ""
            except RuntimeError as error:
                reason, is_out_of_memory = cause_of(error)
            release_failed_memory()
            if not is_out_of_memory or chunk == 1:
                self.iterate.meta_gradient.set_task_chunk(planned)
                return [], lambda: None, reason
            chunk //= 2
            _log.warning("no memory for the CUDA graph (%s): trying it with hardware.task_chunk=%d", reason, chunk)
            self.iterate.meta_gradient.set_task_chunk(chunk)

    def _difference(
        self, before: State, after: State, expected: list[dict[str, Tensor]], metrics: list[dict[str, Tensor]]
    ) -> str:
        """Says how the graph differs from the plain iteration; empty if only by rounding.

        Args:
            before: the state before the iteration.
            after: the state after the plain iteration.
            expected: the plain iteration's metrics.
            metrics: the graph's metrics.
        """
        for graph_metrics, plain_metrics in zip(metrics, expected, strict=True):
            for name, value in plain_metrics.items():
                if not torch.allclose(graph_metrics[name], value, rtol=1e-2, atol=1e-5):
                    return f"its {name} is {graph_metrics[name].item():.6g}, not {value.item():.6g}"
        replayed = self._state()
        for name in replayed:
            change = (after[name] - before[name]).norm().item()
            error = (replayed[name] - after[name]).norm().item()
            if not error <= _TOLERANCE * change:
                return f"its change of {name} is off by {error:.2g}, at a norm of {change:.2g}"
        return ""

    def _state(self) -> State:
        """Returns a copy of everything that an iteration changes."""
        return {
            name: torch.cat([value.flatten().double() for value in values]) for name, values in self._groups().items()
        }

    def _restore(self, saved: State) -> None:
        for name, values in self._groups().items():
            parts = saved[name].split([value.numel() for value in values])
            for value, part in zip(values, parts, strict=True):
                value.copy_(part.view_as(value))

    def _groups(self) -> dict[str, list[Tensor]]:
        """Returns the tensors that an iteration changes, by seed and group; validation changes the best theta."""
        return {
            f"{group} of seed {number}" if len(self.iterate.algorithms) > 1 else group: list(values.values())
            for number, algorithm in enumerate(self.iterate.algorithms)
            for group, values in algorithm.state_dict().items()
            if group != "best"
        }


def release_graph(iterate: Iteration | CudaGraphIteration | None) -> None:
    """Gives up the graph of an iteration, if it has one."""
    if isinstance(iterate, CudaGraphIteration):
        iterate.release()


def with_cuda_graph(iterate: Iteration) -> Iteration | CudaGraphIteration:
    """Returns the iteration as a CUDA graph if the execution asks for one and the algorithm allows it.

    A meta-update whose course depends on computed numbers cannot be captured. Algorithms that do not sum over tasks
    may have such a meta-update.
    """
    if iterate.execution.cuda_graph and iterate.algorithms[0].sums_over_tasks:
        return CudaGraphIteration(iterate)
    return iterate
