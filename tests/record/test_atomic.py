"""Files are written whole or not at all, and what a killed write leaves is removed."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import IO
from unittest.mock import Mock

import pytest

from maml.errors import MamlError
from maml.record.atomic import remove_leftovers, write_atomically


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.EROFS, "Make {} writable or choose another folder"),
        (errno.EACCES, "Make {} writable or choose another folder"),
        (errno.ENOSPC, "Free some disk space or choose another folder"),
        (errno.EDQUOT, "Free some disk space or choose another folder"),
        (errno.EIO, "Choose another folder"),
    ],
)
def test_remedy_fits_what_is_in_the_way(tmp_path: Path, number: int, remedy: str) -> None:
    def write(_: IO[bytes]) -> None:
        raise OSError(number, os.strerror(number))

    with pytest.raises(
        MamlError, match=rf"\({os.strerror(number)}\).* intact\. {remedy.format(tmp_path)}, then run the same command"
    ):
        write_atomically(tmp_path / "file", write)


def test_readers_see_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    write_atomically(path, lambda file: file.write(b"old"))

    def write(file: IO[bytes]) -> None:
        file.write(b"half")
        file.flush()
        assert path.read_bytes() == b"old"

    write_atomically(path, write)
    assert path.read_bytes() == b"half"
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]


def test_content_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Mock(fsync=Mock(wraps=os.fsync), replace=Mock(wraps=os.replace))
    monkeypatch.setattr(os, "fsync", calls.fsync)
    monkeypatch.setattr(os, "replace", calls.replace)
    write_atomically(tmp_path / "report.json", lambda file: file.write(b"new"))
    assert [name for name, *_ in calls.mock_calls] == ["fsync", "replace"], "a power failure would leave an empty file"


def test_write_that_is_interrupted_leaves_no_temporary_file(tmp_path: Path) -> None:
    def write(file: IO[bytes]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "report.json", write)
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_killed_processes_are_removed_and_nothing_else(tmp_path: Path) -> None:
    kept = {".hidden", ".report.json", "report.json.17", ".checkpoint.new.pt.x1"}
    for name in (*kept, ".report.json.17", ".checkpoint.new.pt.99999"):
        (tmp_path / name).touch()
    (tmp_path / ".folder.12").mkdir()
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*kept, ".folder.12"}


def test_file_that_is_being_written_is_no_leftover(tmp_path: Path) -> None:
    def write(file: IO[bytes]) -> None:
        file.write(b"new")
        remove_leftovers(tmp_path)  # as another process would

    write_atomically(tmp_path / "report.json", write)
    assert (tmp_path / "report.json").read_bytes() == b"new"
