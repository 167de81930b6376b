"""Memory: where it does not suffice for a chunk of tasks, and how what was freed is kept for the next one."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

from maml.errors import MamlError

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc
_NEVER = 2**31 - 1

Computed = TypeVar("Computed")
_log = logging.getLogger(__name__)
_recomputes = False


@contextlib.contextmanager
def recompute_inner_steps(enabled: bool) -> Iterator[None]:
    """Sets whether inner steps are computed again for the meta-gradient, rather than kept in memory."""
    global _recomputes
    before, _recomputes = _recomputes, enabled
    try:
        yield
    finally:
        _recomputes = before


def recompute_enabled() -> bool:
    """Returns what `recompute_inner_steps` has set."""
    return _recomputes


def halve_chunk_on_oom(compute: Callable[[int], Computed], chunk: int) -> tuple[Computed, int]:
    """Returns what is computed in chunks of tasks, and their size: ``chunk``, halved as often as was needed.

    Args:
        compute: a function of the chunk's size, whose result does not depend on it but for rounding.
        chunk: tasks batched at once.

    Raises:
        MamlError: if one is too much.
    """
    while True:
        try:
            return compute(chunk), chunk
        except torch.OutOfMemoryError as error:
            said = str(error).splitlines()[0]
        # Outside the handler, which would keep alive all that the failed computation holds.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if chunk == 1:
            raise MamlError(
                f"one task alone does not fit into memory ({said}). Choose hardware.recompute=true, precision=bf16, a "
                "smaller model, fewer gradient steps or seeds, or less support and query data per task"
            )
        chunk //= 2
        _log.warning("memory does not suffice (%s): going on with hardware.task_chunk=%d", said, chunk)


def keep_freed_memory() -> None:
    """Tells glibc's malloc to reuse what was freed, of any size.

    By default it returns tensors above 32 MiB to the system at once, which hands every page of the next one out with a
    fault: with images of 84x84 that is up to half of the time. Another C library, or none to be found, is left alone.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # no C library, no such function, no handle to it
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, _NEVER)
        mallopt(_M_TRIM_THRESHOLD, _NEVER)
