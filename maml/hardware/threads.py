"""CPU threads: all of them share each operation, or each computes chunks of tasks of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Chunk = TypeVar("Chunk")
Computed = TypeVar("Computed")

_num_threads = 1
_pool: ThreadPoolExecutor | None = None


def use_threads(num_threads: int, thread_chunks: bool) -> None:
    """Sets how many CPU threads this process computes with, and how they divide the work.

    Args:
        num_threads: number of threads.
        thread_chunks: whether each thread computes chunks of its own (`map_chunks`), and each operation is computed by
            one thread; otherwise all threads share each operation.
    """
    global _num_threads, _pool
    if _pool is not None:
        _pool.shutdown(wait=False)
    _num_threads, _pool = num_threads, None
    torch.set_num_threads(1 if thread_chunks else num_threads)
    if thread_chunks and num_threads > 1:
        # torch keeps the number of threads for each thread; a new one would take all cores.
        _pool = ThreadPoolExecutor(num_threads, "chunk", initializer=torch.set_num_threads, initargs=(1,))


def num_threads() -> int:
    """Returns the number of CPU threads that this process computes with, for what divides its work by itself."""
    return _num_threads


def map_chunks(function: Callable[[Chunk], Computed], chunks: Iterable[Chunk]) -> Iterator[Computed]:
    """Yields the function's value for each chunk, in order; several are computed at once if `use_threads` says so.

    The values do not depend on the number of threads.

    Args:
        function: is called in several threads, so it may not change anything that another call reads.
        chunks: its arguments.
    """
    if _pool is None:
        return map(function, chunks)
    has_gradients = torch.is_grad_enabled()  # another setting that torch keeps for each thread

    def compute(chunk: Chunk) -> Computed:
        with torch.set_grad_enabled(has_gradients):
            return function(chunk)

    return _pool.map(compute, chunks)
