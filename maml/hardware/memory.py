"""Memory: smaller chunks of tasks when it runs out, recomputation to save it, and reuse of freed memory."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import torch

from maml.errors import MamlError, TooLarge, first_line

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # malloc.h of glibc
_NEVER = 2**31 - 1
_CONTAINER_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")

Computed = TypeVar("Computed")
_log = logging.getLogger(__name__)
_recompute = False


@contextlib.contextmanager
def recompute_inner_steps(enabled: bool) -> Iterator[None]:
    """Sets whether the backward pass computes inner steps again instead of keeping them in memory."""
    global _recompute
    before, _recompute = _recompute, enabled
    try:
        yield
    finally:
        _recompute = before


def recompute_enabled() -> bool:
    """Returns whether `recompute_inner_steps` is on."""
    return _recompute


@functools.cache
def machine_memory() -> int:
    """Returns the bytes of main memory: the machine's, or those of its container if that has fewer."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for limit in _CONTAINER_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # no such file, or no limit ("max")
            total = min(total, int(Path(limit).read_text()))
    return total


def check_memory(num_bytes: int, what: str) -> None:
    """Refuses, before it is computed, what cannot fit into the machine's main memory.

    Args:
        num_bytes: a lower bound on what it takes.
        what: what takes it, the beginning of a sentence.

    Raises:
        TooLarge: if it is more than the machine has.
    """
    if num_bytes > machine_memory():
        raise TooLarge(f"{what} takes at least {_in_gib(num_bytes)}, but this machine has {_in_gib(machine_memory())}")


def _in_gib(num_bytes: int) -> str:
    return f"{num_bytes // 2**30:,} GiB"


def halve_chunk_on_oom(compute: Callable[[int], Computed], chunk: int) -> tuple[Computed, int]:
    """Calls ``compute`` with a chunk size, and with half of it whenever memory runs out.

    Args:
        compute: takes the number of tasks that are batched at once. Its result depends on it by rounding only.
        chunk: the first number to try.

    Returns:
        The result, and the number of tasks with which it was computed.

    Raises:
        MamlError: if a single task does not fit into memory.
        torch.OutOfMemoryError: if memory runs out while a CUDA graph is captured, which has to begin again then.
    """
    while True:
        try:
            return compute(chunk), chunk
        except RuntimeError as error:
            if not is_out_of_memory(error) or is_capturing():
                raise
            reason = first_line(error)
        release_failed_memory()
        if chunk == 1:
            raise MamlError(
                f"one task alone does not fit into memory ({reason}). Choose hardware.recompute=true, precision=bf16, "
                "a smaller model, fewer gradient steps or seeds, or less support and query data per task"
            )
        chunk //= 2
        _log.warning("out of memory (%s): continuing with hardware.task_chunk=%d", reason, chunk)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Returns whether memory ran out, on a GPU or a CPU, for which torch has no class of errors."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def release_failed_memory() -> None:
    """Frees what a computation that ran out of memory has left.

    Call it outside the handler: within it, the exception keeps the failed computation's tensors alive.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def is_capturing() -> bool:
    """Returns whether what is computed now is captured as a CUDA graph."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def keep_freed_memory() -> None:
    """Tells glibc's malloc to keep freed memory for the next allocation, at any size.

    By default, malloc returns blocks above 32 MiB to the system at once, and the system gives the next block out page
    by page, with a page fault each. With images of 84x84 this takes up to half of the time. With another C library
    this function does nothing.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # not glibc, or the C library cannot be opened
        mallopt = ctypes.CDLL(None).mallopt
        if not mallopt(_M_MMAP_THRESHOLD, _NEVER):  # an older glibc allows at most 32 MiB
            mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, _NEVER)
