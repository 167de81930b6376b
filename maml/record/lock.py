"""Lock files: one process at a time can hold a lock, and the lock is free again when the process dies."""

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

# Error codes of file systems without flock, as on some network and cluster file systems.
_NO_FLOCK = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOLCK}


def acquire(path: Path, timeout: float = 0.0) -> BaseFileLock | None:
    """Acquires a lock and writes the process and its machine into the lock file.

    On a file system without ``flock``, the lock is a second file, ``<name>.marker``, that names the process. The
    marker of a dead process on this machine is taken over. The marker of another machine must be deleted by hand.

    Args:
        path: the lock file; it is not deleted when the lock is released.
        timeout: seconds to keep trying; `is_held` in another process may hold the lock for an instant.

    Returns:
        The lock, held until its ``release`` or the end of the process; None if another process holds it.

    Raises:
        OSError: if the file cannot be written.
    """
    lock: BaseFileLock = FileLock(path, thread_local=False, fallback_to_soft=False)
    try:
        try:
            lock.acquire(timeout=timeout)
        except OSError as error:
            if error.errno not in _NO_FLOCK:
                raise
            _warn_no_flock(path.parent)
            lock = SoftFileLock(_marker(path), thread_local=False)
            lock.acquire(timeout=max(timeout, 0.2))  # the first attempt may only remove the marker of a dead process
    except Timeout:
        return None
    path.write_text(f"process {os.getpid()} on {platform.node()}")
    return lock


def is_held(path: Path) -> bool:
    """Returns whether a process holds a lock, without changing the lock."""
    try:
        with open(path) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared, so that two processes can check at once
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
    """Returns the current or last holder of a lock: ``process PID on HOST``, or ``another process`` if unknown."""
    try:
        return path.read_text() or "another process"
    except OSError:
        return "another process"


def advice(path: Path) -> str:
    """Returns advice for a user whose lock another process holds."""
    marker = _marker(path)
    return f"wait for it, or stop it{f'; if it has ended, delete {marker}' if marker.exists() else ''}"


def _marker(path: Path) -> Path:
    return path.with_name(f"{path.name}.marker")


def _is_dead(name: str) -> bool:
    """Returns whether a lock's holder is known to have ended: a process of this machine that no longer exists."""
    words = name.split(" ", 3)
    if len(words) != 4 or words[3] != platform.node() or not words[1].isdigit():
        return False
    return not process_exists(int(words[1]))


def process_exists(pid: int) -> bool:
    """Returns whether this machine has a process with this number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it belongs to another user
        return True
    return True


@cache
def _warn_no_flock(folder: Path) -> None:
    LOG.warning(
        "The file system of %s has no file locks (flock). A marker file that names the process replaces the lock. It "
        "protects a run on one machine only: do not start the same run on two machines.",
        folder,
    )
