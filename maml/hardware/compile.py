"""Compiles a meta-gradient: the whole of it, inner gradients included, traced once into one fused program."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from maml.types import Params, Tasks

ChunkGradient = Callable[[Params, Tasks], tuple[Params, Params]]
"""Sums over tasks, by name: of the gradient, and of the metrics."""
_log = logging.getLogger(__name__)


class CompiledFunction:
    """A function, compiled for each shape of its inputs on first use.

    The trace already holds the derivatives, so the compiler sees a plain function and differentiates nothing. Where
    compiling fails, a warning says so and the function runs as it is.

    Args:
        function: to compile.

    Attributes:
        failed: whether it runs as it is.
    """

    def __init__(self, function: ChunkGradient) -> None:
        self.function, self.failed = function, False
        self._programs: dict[tuple[torch.Size, ...], ChunkGradient] = {}

    def __call__(self, theta: Params, tasks: Tasks) -> tuple[Params, Params]:
        shapes = tuple(value.shape for value in (*theta.values(), *tasks.values()))
        if shapes not in self._programs:
            try:
                self._programs[shapes] = _compile(self.function, theta, tasks)
            except torch.OutOfMemoryError:
                raise  # smaller chunks may do
            except Exception as error:
                reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                _log.warning("compiling failed, so the run goes on without it (slower, same mathematics): %s", reason)
                self._programs[shapes], self.failed = self.function, True
        return self._programs[shapes](theta, tasks)


def _compile(function: ChunkGradient, theta: Params, tasks: Tasks) -> ChunkGradient:
    names, task_names = list(theta), list(tasks)
    returned: list[list[str]] = []

    def flat(*values: Tensor) -> list[Tensor]:
        sums = function(
            dict(zip(names, values[: len(names)], strict=True)),
            dict(zip(task_names, values[len(names) :], strict=True)),
        )
        returned[:] = [list(group) for group in sums]
        return [value for group in sums for value in group.values()]

    # Copies, because example inputs that share memory give a silently wrong trace.
    example: list[Any] = [value.detach().clone() for value in (*theta.values(), *tasks.values())]
    program = torch._inductor.compile(make_fx(flat)(*example), example)
    with torch.no_grad():
        program(*example)
    gradients, metrics = returned

    def run(theta: Params, tasks: Tasks) -> tuple[Params, Params]:
        with torch.no_grad():
            values = program(*theta.values(), *(value.contiguous() for value in tasks.values()))
        return (
            dict(zip(gradients, values[: len(gradients)], strict=True)),
            dict(zip(metrics, values[len(gradients) :], strict=True)),
        )

    return run
