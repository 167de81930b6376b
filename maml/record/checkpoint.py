"""Checkpoint files: written atomically, with the previous one kept, and verified when read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any
from zipfile import BadZipFile, ZipFile

import torch

from maml.errors import MamlError, first_line
from maml.record.atomic import write_atomically

_FORMAT = "maml checkpoint 1"
# Names of groups of tensors in older files, and their names today.
_RENAMED_GROUPS = {"carried": "buffers"}


def previous_path(path: Path) -> Path:
    """Returns the path of the checkpoint that was saved before the one at ``path``."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def _fresh_path(path: Path) -> Path:
    return path.with_name(f"{path.stem}.new{path.suffix}")


def save(path: Path, content: dict[str, Any]) -> None:
    """Saves a checkpoint and keeps the previous one.

    Args:
        path: path of the newest checkpoint.
        content: tensors, numbers, strings and containers of them.

    Raises:
        MamlError: if the disk is full or not writable.
    """
    fresh = _fresh_path(path)

    def write(file: IO[bytes]) -> None:
        try:
            torch.save({"format": _FORMAT, **content}, file)
        except RuntimeError as error:  # torch raises this when writing to the file fails, after the error that says why
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise OSError(first_line(error)) from error

    write_atomically(fresh, write)
    complete_save(path)


def complete_save(path: Path) -> None:
    """Makes a checkpoint that is written and flushed the newest one, also for a process that was killed before this.

    Args:
        path: path of the newest checkpoint. No other process may save there.
    """
    fresh = _fresh_path(path)
    if fresh.exists():
        if path.exists():
            os.replace(path, previous_path(path))
        os.replace(fresh, path)


def load(path: Path) -> dict[str, Any]:
    """Reads a checkpoint.

    Args:
        path: path of a checkpoint file.

    Raises:
        MamlError: if the file does not exist, is damaged, or is not a checkpoint.
    """
    try:
        with open(path, "rb") as file:
            damaged = ZipFile(file).testzip()  # torch writes checksums, but does not verify them
            if damaged is not None:
                raise BadZipFile(f"the checksum of {damaged} is wrong")
            file.seek(0)
            content = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise MamlError(f"there is no checkpoint at {path}") from error
    except Exception as error:
        raise MamlError(f"{path} is damaged or not a checkpoint ({first_line(error)}){_advice(path)}") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise MamlError(f"{path} is not a checkpoint of this project: its format is not {_FORMAT!r}")
    state = content.get("state", {})
    groups = state.values() if isinstance(state, dict) else [None]
    if not all(isinstance(group, dict) and all(map(torch.is_tensor, group.values())) for group in groups):
        raise MamlError(f"{path} is damaged (its state is not made of groups of tensors); restore it")
    return content | {"state": rename_groups(state)} if "state" in content else content


def _advice(damaged: Path) -> str:
    """Returns what to do about a damaged checkpoint; empty without a previous one."""
    older = previous_path(damaged)
    if not older.exists():
        return ""
    try:
        load(older)
    except MamlError:
        return f"; so is the previous one, {older}: restore one of them, or delete both to train anew"
    return f"; the previous one is {older}: rename it to {damaged.name} to resume from it"


def rename_groups(state: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the groups of a saved state under the names that they have today."""
    return {_RENAMED_GROUPS.get(group, group): tensors for group, tensors in state.items()}


def newest(path: Path) -> Path | None:
    """Returns the newest checkpoint file, or None.

    It has another name than ``path`` if the process was killed before one of the two renames of `save`.
    """
    candidates = (_fresh_path(path), path, previous_path(path))
    return next((candidate for candidate in candidates if candidate.exists()), None)
