"""Memory of large tensors: kept by the process once they are freed, and not asked of the system anew."""

from __future__ import annotations

import contextlib
import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc
_NEVER = 2**31 - 1


def keep_freed_memory() -> None:
    """Tells glibc's malloc to reuse what was freed, of any size.

    By default it returns tensors above 32 MiB to the system at once, which hands every page of the next one out with a
    fault: with images of 84x84 that is up to half of the time. The peak stays what it is; another C library, or none
    to be found, is left alone.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # no C library, no such function, no handle to it
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, _NEVER)
        mallopt(_M_TRIM_THRESHOLD, _NEVER)
