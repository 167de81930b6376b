"""A meta-iteration as one CUDA graph: small kernels are launched by the device itself, as fast as it can run them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from maml.hardware import Execution
from maml.iteration import Iteration

# Iterations as usual, in front of the capture: libraries choose and allocate in their first calls.
_NUM_WARM_UP = 3
# Of the change that an iteration makes, by norm. Rounding turns the sign of an entry whose gradient is nothing else,
# and Adam makes a full step of it; another meta-batch changes theta by more than its whole length.
_TOLERANCE = 0.2
_log = logging.getLogger(__name__)

Outputs = TypeVar("Outputs")


def record(compute: Callable[[], Outputs]) -> tuple[Outputs, Callable[[], None]]:
    """Captures a computation on the GPU; returns tensors that hold its outputs, and what computes them anew."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    graph = torch.cuda.CUDAGraph()
    # Other threads may go on: with several GPUs, one watches over the communication.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        outputs = compute()
    return outputs, graph.replay


class Captured:
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
        self.is_given_up = False

    @property
    def execution(self) -> Execution:
        """How the computation is cut by now."""
        return replace(self.iterate.execution, cuda_graph=not self.is_given_up)

    def __call__(self, number: int) -> list[dict[str, Tensor]]:
        """Makes the meta-update of an iteration; the metrics returned are those of the newest from then on."""
        if self.replay is not None:
            self.number.fill_(number)
            self.replay()
            return self.metrics
        self.num_calls += 1
        if self.is_given_up or self.num_calls <= _NUM_WARM_UP:
            return self.iterate(number)
        return self._capture(number)

    def _capture(self, number: int) -> list[dict[str, Tensor]]:
        before = self._state()
        expected = self.iterate(number)
        after = self._state()
        self._restore(before)
        try:
            self.number.fill_(number)
            metrics, replay = record(lambda: self.iterate(self.number))
            replay()
            reason = self._difference(before, after, expected, metrics)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
        if reason:
            self._restore(after)
            self.is_given_up = True
            _log.warning("the iteration is not launched as one CUDA graph (%s): slower, with the same results", reason)
            return expected
        self.metrics, self.replay = metrics, replay
        return metrics

    def _difference(
        self,
        before: list[Tensor],
        after: list[Tensor],
        expected: list[dict[str, Tensor]],
        metrics: list[dict[str, Tensor]],
    ) -> str:
        """Returns in what the graph departs from the plain iteration; nothing if in rounding only."""
        for mine, theirs in zip(metrics, expected, strict=True):
            for name, value in theirs.items():
                if not torch.allclose(mine[name], value, rtol=1e-2, atol=1e-5):
                    return f"its {name} is {mine[name].item():.6g}, not {value.item():.6g}"
        error, length = 0.0, 0.0
        for now, then, start in zip(self._state(), after, before, strict=True):
            error += (now.double() - then.double()).square().sum().item()
            length += (then.double() - start.double()).square().sum().item()
        return "" if error <= _TOLERANCE**2 * length else "it moves theta elsewhere"

    def _tensors(self) -> list[Tensor]:
        states = [algorithm.state_dict() for algorithm in self.iterate.algorithms]
        return [value for state in states for group in state.values() for value in group.values()]

    def _state(self) -> list[Tensor]:
        return [value.clone() for value in self._tensors()]

    def _restore(self, saved: list[Tensor]) -> None:
        for value, its in zip(self._tensors(), saved, strict=True):
            value.copy_(its)
