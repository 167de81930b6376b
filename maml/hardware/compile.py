"""Compiles a meta-gradient, inner gradients included, into one fused program."""

from __future__ import annotations

import logging
import os
import re
import signal
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from maml.errors import first_line
from maml.status import about, announce
from maml.types import Params, Tasks

ChunkGradient = Callable[[Params, Tasks], tuple[Params, Params]]
"""Returns the gradients and the metrics of a chunk of tasks, by name."""
_log = logging.getLogger(__name__)
# Seconds that compiling takes the first time, measured on two cores: a constant part, and one for each operation of the
# traced program.
_SECONDS_TO_COMPILE, _SECONDS_PER_OPERATION = 20.0, 0.05
_is_compiling = False


def is_compiling() -> bool:
    """Returns whether a function is being compiled. Meanwhile nothing is computed that a stopped run would lose."""
    return _is_compiling


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
                self._programs[shapes] = _compile_with_sound_cache(self.function, params, tasks)
            except torch.OutOfMemoryError:
                raise  # the caller tries smaller chunks
            except Exception as error:
                message = "compiling failed, so the run goes on without it (slower, same mathematics): %s"
                _log.warning(message, first_line(error))
                self._programs[shapes], self.failed = self.function, True
        return self._programs[shapes](params, tasks)


def _compile_with_sound_cache(function: ChunkGradient, params: Params, tasks: Tasks) -> ChunkGradient:
    """Compiles, and once more if the compiler's cache has a library that a killed process left half-written."""
    try:
        return _compile(function, params, tasks)
    except Exception as error:
        from torch._inductor.runtime.cache_dir_utils import cache_dir  # takes more than a second to import

        found = re.search(r"(/\S+\.so): (file too short|invalid ELF header)", str(error))
        library = Path(found[1]) if found else None
        if library is None or not library.is_relative_to(cache_dir()):
            raise
        library.unlink(missing_ok=True)
    return _compile(function, params, tasks)


def _compile(function: ChunkGradient, params: Params, tasks: Tasks) -> ChunkGradient:
    names, task_names = list(params), list(tasks)
    output_names: list[list[str]] = []

    def flat_function(*values: Tensor) -> list[Tensor]:
        outputs = function(*with_names(values, names, task_names))
        output_names[:] = [list(group) for group in outputs]
        return [value for group in outputs for value in group.values()]

    # Example inputs are copied, because a trace with inputs that share memory is wrong without an error.
    example: list[Any] = [value.detach().clone() for value in (*params.values(), *tasks.values())]
    with _compiling():
        traced = make_fx(flat_function)(*example)
        seconds = _SECONDS_TO_COMPILE + _SECONDS_PER_OPERATION * len(traced.graph.nodes)
        announce(f"compiling, {about(seconds)} the first time, then mostly from a cache")
        program = torch._inductor.compile(traced, example)
        with torch.no_grad():
            program(*example)
    gradients, metrics = output_names

    def run(params: Params, tasks: Tasks) -> tuple[Params, Params]:
        with torch.no_grad():
            values = program(*params.values(), *(value.contiguous() for value in tasks.values()))
        return with_names(values, gradients, metrics)

    return run


def with_names(values: Sequence[Tensor], first: Collection[str], second: Collection[str]) -> tuple[Params, Params]:
    """Gives tensors in a row their names: those of a first group, then those of a second one."""
    return (
        dict(zip(first, values[: len(first)], strict=True)),
        dict(zip(second, values[len(first) :], strict=True)),
    )


@contextmanager
def _compiling() -> Iterator[None]:
    """Marks the time of a compilation. An interrupted one leaves no compiler behind."""
    global _is_compiling
    before, _is_compiling = _child_processes(), True
    try:
        yield
    except KeyboardInterrupt:
        _stop_compilers(_child_processes() - before)
        raise
    finally:
        _is_compiling = False


def _stop_compilers(processes: set[int]) -> None:
    """Ends compilers and forgets what they have not begun; Python would wait for all of it when the process exits."""
    from torch._inductor.async_compile import AsyncCompile

    with suppress(AttributeError):  # the threads that wait for compilers are no public part of torch
        if AsyncCompile.pool.cache_info().currsize:
            AsyncCompile.pool().shutdown(wait=False, cancel_futures=True)
            AsyncCompile.pool.cache_clear()
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGTERM)


def _child_processes() -> set[int]:
    """Returns the ids of all processes below this one; none on a system without ``/proc``."""
    found, parents = set[int](), [os.getpid()]
    while parents:
        for children in Path(f"/proc/{parents.pop()}/task").glob("*/children"):
            with suppress(OSError):  # it has ended
                new = {int(child) for child in children.read_text().split()} - found
                found |= new
                parents += new
    return found
