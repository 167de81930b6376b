"""Checkpoint files: written whole or not at all, the one before kept, and never read on trust."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any
from zipfile import BadZipFile, ZipFile

import torch

from maml.errors import MamlError

_FORMAT = "maml checkpoint 1"


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Writes a file under a temporary name, flushes it to the disk and renames it: readers see all of it or none.

    Raises:
        MamlError: if it cannot be written (a full disk, say); what stood at ``path`` is untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise MamlError(
            f"{path} could not be written ({error.strerror or error}); what was saved before is intact. "
            "Free some space or choose another runs_dir, then give the same command again"
        ) from error


def previous_path(path: Path) -> Path:
    """Returns where the checkpoint before the one at ``path`` is kept."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def save(path: Path, content: dict[str, Any]) -> None:
    """Saves a checkpoint and keeps the one before.

    Args:
        path: of the newest checkpoint.
        content: tensors, numbers, strings and containers of them.

    Raises:
        MamlError: if the disk is full or not writable.
    """
    fresh = path.with_name(f"{path.stem}.new{path.suffix}")

    def write(file: IO[bytes]) -> None:
        try:
            torch.save({"format": _FORMAT, **content}, file)
        except RuntimeError as error:  # torch reports a failing file this way
            raise OSError(str(error).splitlines()[0]) from error

    write_atomically(fresh, write)
    if path.exists():
        os.replace(path, previous_path(path))
    os.replace(fresh, path)


def load(path: Path) -> dict[str, Any]:
    """Reads a checkpoint.

    Args:
        path: of a checkpoint file.

    Raises:
        MamlError: if there is none, or the file is damaged or is something else.
    """
    try:
        with open(path, "rb") as file:
            damaged = ZipFile(file).testzip()  # torch writes check sums, but does not read them
            if damaged is not None:
                raise BadZipFile(f"the check sum of {damaged} is wrong")
            file.seek(0)
            content = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise MamlError(f"there is no checkpoint at {path}") from error
    except Exception as error:
        older = previous_path(path)
        advice = f"; the one before is {older}: rename it to {path.name} to go on from there" if older.exists() else ""
        raise MamlError(f"{path} is damaged or not a checkpoint ({_first_line(error)}){advice}") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise MamlError(f"{path} is not a checkpoint of this project (no mark {_FORMAT!r})")
    return content


def newest(path: Path) -> Path | None:
    """Returns the file to resume from: ``path``, or what a kill between two renames left of it, or None."""
    candidates = (path, path.with_name(f"{path.stem}.new{path.suffix}"), previous_path(path))
    return next((candidate for candidate in candidates if candidate.exists()), None)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
