"""Lock files that one process at a time can hold, and that a process which has died does not keep."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import platform
from functools import cache
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

LOG = logging.getLogger(__name__)

# What file systems without flock answer; some network and cluster file systems are mounted so.
_NO_FLOCK = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOLCK}


def acquire(path: Path, patience: float = 0.0) -> BaseFileLock | None:
    """Takes a lock and writes into its file who holds it.

    Where the file system has no ``flock``, the lock is a second file, ``<name>.marker``, that names its process. A
    marker whose process is gone is taken over; the marker of another machine's process has to be deleted by hand.

    Args:
        path: the lock's file, which stays when the lock is released.
        patience: seconds to try for; `is_held` may have the lock for an instant.

    Returns:
        The lock, held until its ``release`` or the end of the process; None if another process holds it.

    Raises:
        OSError: if the file cannot be written.
    """
    lock: BaseFileLock = FileLock(path, thread_local=False, fallback_to_soft=False)
    try:
        try:
            lock.acquire(timeout=patience)
        except OSError as error:
            if error.errno not in _NO_FLOCK:
                raise
            _say_that_there_is_no_flock(path.parent)
            lock = SoftFileLock(_marker(path), thread_local=False)
            lock.acquire(
                timeout=max(patience, 0.2)
            )  # one attempt may do no more than clear away a dead process' marker
    except Timeout:
        return None
    path.write_text(f"process {os.getpid()} on {platform.node()}")
    return lock


def is_held(path: Path) -> bool:
    """Tells whether a process holds a lock, and leaves it as it is."""
    try:
        with open(path) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: two processes may ask at the same time
    except (FileNotFoundError, NotADirectoryError):
        return False
    except BlockingIOError:
        return True
    except OSError as error:
        if error.errno not in _NO_FLOCK:
            raise
        return _marker(path).exists() and not _is_dead(holder(path))
    return False


def holder(path: Path) -> str:
    """Returns who holds a lock, or held it last: ``process PID on HOST``; ``another process`` if that is not known."""
    try:
        return path.read_text() or "another process"
    except OSError:
        return "another process"


def advice(path: Path) -> str:
    """Returns what to do about a lock that another process holds."""
    marker = _marker(path)
    return f"wait for it, or stop it{f'; if it is gone, delete {marker}' if marker.exists() else ''}"


def _marker(path: Path) -> Path:
    return path.with_name(f"{path.name}.marker")


def _is_dead(name: str) -> bool:
    """Tells whether a holder is known to be gone: a process of this machine that is not there."""
    words = name.split(" ", 3)
    if len(words) != 4 or words[3] != platform.node() or not words[1].isdigit():
        return False
    try:
        os.kill(int(words[1]), 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # somebody else's
        return False
    return False


@cache
def _say_that_there_is_no_flock(folder: Path) -> None:
    LOG.warning(
        "The file system of %s has no file locks (flock): a file that names the process stands in. It does its work "
        "on one machine; take care not to start the same run on two.",
        folder,
    )
