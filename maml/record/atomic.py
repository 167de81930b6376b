"""Writes files such that no reader, and no process after a kill, sees half of one."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from maml.errors import MamlError

_TEMPORARY = re.compile(r"\..+\.\d+")


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Writes a file under a temporary name, flushes it to disk and renames it, so that no reader sees half a file.

    Raises:
        MamlError: if the file cannot be written (a full disk, for example); an earlier file at ``path`` is unchanged.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with _locked_folder(path.parent, fcntl.LOCK_SH):  # shared: any number of processes write at once
            with open(temporary, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if not isinstance(error, OSError):
            raise
        remedy = "Choose another folder"
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            remedy = f"Make {path.parent} writable or choose another folder"
        elif error.errno in (errno.ENOSPC, errno.EDQUOT):
            remedy = "Free some disk space or choose another folder"
        raise MamlError(
            f"{path} could not be written ({error.strerror or error}); what was saved before is intact. "
            f"{remedy}, then run the same command again"
        ) from error


def write_bytes_atomically(path: Path, content: bytes) -> None:
    """Writes a file as `write_atomically` does, given its content."""
    write_atomically(path, lambda file: file.write(content))


def write_text_atomically(path: Path, text: str) -> None:
    """Writes a text file as `write_atomically` does."""
    write_bytes_atomically(path, text.encode())


def write_json_atomically(path: Path, content: Any) -> None:
    """Writes a JSON file as `write_atomically` does, indented and with a line end."""
    write_text_atomically(path, json.dumps(content, indent=2) + "\n")


def remove_leftovers(folder: Path) -> None:
    """Removes the temporary files of processes that were killed in `write_atomically`.

    Does nothing while a process writes in the folder, because the file that it writes is no leftover.
    """
    with suppress(BlockingIOError), _locked_folder(folder, fcntl.LOCK_EX | fcntl.LOCK_NB):
        for path in folder.glob(".*"):
            if is_temporary(path):
                path.unlink(missing_ok=True)


def is_temporary(path: Path) -> bool:
    """Returns whether a file has a name that `write_atomically` gives to a file before it is complete."""
    return _TEMPORARY.fullmatch(path.name) is not None and not path.is_dir()


@contextmanager
def _locked_folder(folder: Path, operation: int) -> Iterator[None]:
    """Holds a lock on a folder itself; without effect on file systems that cannot lock folders."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, operation)
        except BlockingIOError:
            raise
        except OSError:
            pass
        yield
    finally:
        os.close(descriptor)
