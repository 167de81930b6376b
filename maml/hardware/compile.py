"""Compiles a meta-gradient, inner gradients included, into one fused program."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from maml.types import Params, Tasks

ChunkGradient = Callable[[Params, Tasks], tuple[Params, Params]]
"""Returns the gradients and the metrics of a chunk of tasks, by name."""
_log = logging.getLogger(__name__)


class CompiledFunction:
    """A function that is compiled on the first call with new shapes of its inputs.

    The function is traced with its derivatives, so the compiler has nothing to differentiate. If compiling fails, a
    warning says so and the function runs uncompiled.

    Args:
        function: the function to compile.

    Attributes:
        failed: whether the function runs uncompiled, because compiling has failed.
    """

    def __init__(self, function: ChunkGradient) -> None:
        self.function, self.failed = function, False
        self._programs: dict[tuple[torch.Size, ...], ChunkGradient] = {}

    def __call__(self, params: Params, tasks: Tasks) -> tuple[Params, Params]:
        shapes = tuple(value.shape for value in (*params.values(), *tasks.values()))
        if shapes not in self._programs:
            try:
                self._programs[shapes] = _compile(self.function, params, tasks)
            except torch.OutOfMemoryError:
                raise  # the caller tries smaller chunks
            except Exception as error:
                reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                _log.warning("compiling failed, so the run goes on without it (slower, same mathematics): %s", reason)
                self._programs[shapes], self.failed = self.function, True
        return self._programs[shapes](params, tasks)


def _compile(function: ChunkGradient, params: Params, tasks: Tasks) -> ChunkGradient:
    names, task_names = list(params), list(tasks)
    output_names: list[list[str]] = []

    def flat_function(*values: Tensor) -> list[Tensor]:
        outputs = function(
            dict(zip(names, values[: len(names)], strict=True)),
            dict(zip(task_names, values[len(names) :], strict=True)),
        )
        output_names[:] = [list(group) for group in outputs]
        return [value for group in outputs for value in group.values()]

    # Example inputs are copied, because a trace with inputs that share memory is wrong without an error.
    example: list[Any] = [value.detach().clone() for value in (*params.values(), *tasks.values())]
    program = torch._inductor.compile(make_fx(flat_function)(*example), example)
    with torch.no_grad():
        program(*example)
    gradients, metrics = output_names

    def run(params: Params, tasks: Tasks) -> tuple[Params, Params]:
        with torch.no_grad():
            values = program(*params.values(), *(value.contiguous() for value in tasks.values()))
        return (
            dict(zip(gradients, values[: len(gradients)], strict=True)),
            dict(zip(metrics, values[len(gradients) :], strict=True)),
        )

    return run
