"""A meta-iteration as one CUDA graph: small kernels are launched by the device itself, as fast as it can run them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from maml.hardware import distributed
from maml.hardware.base import Execution
from maml.training.iteration import Iteration

# Iterations as usual, in front of the capture: libraries choose and allocate in their first calls.
_NUM_WARM_UP = 3
# Of the change that an iteration makes, by norm. Rounding turns the sign of an entry whose gradient is nothing else,
# and Adam makes a full step of it; another meta-batch changes theta by more than its whole length.
_TOLERANCE = 0.2
_log = logging.getLogger(__name__)

Outputs = TypeVar("Outputs")
State = dict[str, Tensor]
"""All numbers that an iteration changes, by group, float64."""


def capture(compute: Callable[[], Outputs]) -> tuple[Outputs, Callable[[], None]]:
    """Captures a computation on the GPU; returns tensors that hold its outputs, and what computes them anew."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        # Other threads may go on: with several GPUs, one watches over the communication.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            outputs = compute()
    finally:
        torch.cuda.set_stream(stream)  # which a capture that failed does not do
    return outputs, graph.replay


class CudaGraphIteration:
    """Does what an `Iteration` does, from a graph: tasks are drawn from the iteration's number, which the graph reads.

    It is used only if, once, it gave what the plain iteration gives; else a warning says why not, and the run goes on
    without.

    Args:
        iterate: to capture.
    """

    def __init__(self, iterate: Iteration) -> None:
        self.iterate = iterate
        device = iterate.streams[0].device
        self.number = torch.zeros((), dtype=torch.int64, device=device)
        self.metrics: list[dict[str, Tensor]] = []
        self.replay: Callable[[], None] | None = None
        self.num_calls = 0
        self.has_failed = False

    @property
    def execution(self) -> Execution:
        """How the computation is cut by now."""
        return replace(self.iterate.execution, cuda_graph=not self.has_failed)

    def __call__(self, number: int) -> list[dict[str, Tensor]]:
        """Makes the meta-update of an iteration; the metrics returned are those of the newest from then on."""
        if self.replay is not None:
            self.number.fill_(number)
            self.replay()
            return self.metrics
        self.num_calls += 1
        if self.has_failed or self.num_calls <= _NUM_WARM_UP:
            return self.iterate(number)
        return self._capture(number)

    def _capture(self, number: int) -> list[dict[str, Tensor]]:
        before = self._state()
        expected = self.iterate(number)
        after = self._state()
        self._restore(before)
        self.number.fill_(number)
        metrics, replay, reason = self._record()
        # All processes or none: in a graph, too, they wait for each other.
        if not distributed.all_reduce_max(bool(reason)):
            replay()
            reason = self._difference(before, after, expected, metrics)
        if distributed.all_reduce_max(bool(reason)):
            self._restore(after)
            self.has_failed = True
            _log.warning(
                "the iteration is not launched as one CUDA graph (%s): slower, with the same results",
                reason or "another process of this run cannot",
            )
            return expected
        self.metrics, self.replay = metrics, replay
        return metrics

    def _record(self) -> tuple[list[dict[str, Tensor]], Callable[[], None], str]:
        try:
            return *capture(lambda: self.iterate(self.number)), ""
        except RuntimeError as error:
            cause = error.__context__ or error  # what ends a capture fails too, where the capture has failed
            return [], lambda: None, str(cause).splitlines()[0]

    def _difference(
        self, before: State, after: State, expected: list[dict[str, Tensor]], metrics: list[dict[str, Tensor]]
    ) -> str:
        """Returns in what the graph departs from the plain iteration; nothing if in rounding only."""
        for mine, theirs in zip(metrics, expected, strict=True):
            for name, value in theirs.items():
                if not torch.allclose(mine[name], value, rtol=1e-2, atol=1e-5):
                    return f"its {name} is {mine[name].item():.6g}, not {value.item():.6g}"
        now = self._state()
        for name in now:
            change = (after[name].double() - before[name].double()).norm().item()
            error = (now[name].double() - after[name].double()).norm().item()
            if not error <= _TOLERANCE * change:
                return f"it moves {name} by {error:.2g} elsewhere, of {change:.2g}"
        return ""

    def _state(self) -> State:
        """Copies what an iteration changes: of each seed, each group of tensors as one vector of numbers."""
        return {name: torch.cat([value.flatten().double() for value in its]) for name, its in self._groups().items()}

    def _restore(self, saved: State) -> None:
        for name, values in self._groups().items():
            parts = saved[name].split([value.numel() for value in values])
            for value, part in zip(values, parts, strict=True):
                value.copy_(part.view_as(value))

    def _groups(self) -> dict[str, list[Tensor]]:
        return {
            f"{group} of seed {number}" if len(self.iterate.algorithms) > 1 else group: list(values.values())
            for number, algorithm in enumerate(self.iterate.algorithms)
            for group, values in algorithm.state_dict().items()
        }


def with_cuda_graph(iterate: Iteration) -> Iteration | CudaGraphIteration:
    """Returns what makes iterations in the way that was chosen; a meta-update that looks at its numbers is no graph."""
    return (
        CudaGraphIteration(iterate)
        if iterate.execution.cuda_graph and iterate.algorithms[0].sums_over_tasks
        else iterate
    )
