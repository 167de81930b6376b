"""Locks: one holder at a time, a message that names the holder, and a marker file where there is no flock."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest
from filelock import SoftFileLock

from maml.errors import MamlError
from maml.record import lock
from maml.record.run_folder import RunFolder
from tests.runs import TinyRuns

ME = f"process {os.getpid()} on {platform.node()}"
WITHOUT = {"ENOSYS": errno.ENOSYS, "ENOTSUP": errno.ENOTSUP, "EINVAL": errno.EINVAL, "ENOLCK": errno.ENOLCK}
# Holds the lock at argv[1] until standard input is closed; with argv[2], as on a file system without flock.
HOLD = """
import errno, fcntl, sys
from pathlib import Path
from maml.record import lock

def flock(*_):
    raise OSError(errno.ENOSYS, "Function not implemented")

if len(sys.argv) > 2:
    fcntl.flock = flock
held = lock.acquire(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def refuse(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def flock(*_: object) -> NoReturn:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    lock._warn_no_flock.cache_clear()


@pytest.fixture(params=["flock", "no flock"])
def other(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[subprocess.Popen]:
    """A process that holds the lock, on a file system with and without flock."""
    words = [sys.executable, "-c", HOLD, str(tmp_path / "lock")]
    if request.param == "no flock":
        refuse(monkeypatch, errno.ENOSYS)
        words.append("no flock")
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdin
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_another_process_is_refused_and_told_by_whom(other: subprocess.Popen, tmp_path: Path) -> None:
    path = tmp_path / "lock"
    assert lock.acquire(path) is None
    assert lock.holder(path) == f"process {other.pid} on {platform.node()}"
    assert lock.advice(path).startswith("wait for it, or stop it")


def test_asking_leaves_the_lock_with_its_holder(other: subprocess.Popen, tmp_path: Path) -> None:
    path = tmp_path / "lock"
    assert lock.is_held(path)
    assert lock.is_held(path)
    assert lock.acquire(path) is None


def test_lock_of_a_killed_process_is_no_obstacle(other: subprocess.Popen, tmp_path: Path) -> None:
    path = tmp_path / "lock"
    other.kill()
    other.wait()
    assert not lock.is_held(path)
    mine = lock.acquire(path)
    assert mine
    assert lock.holder(path) == ME
    assert lock.is_held(path)
    mine.release()
    assert not lock.is_held(path)


def test_asking_about_no_lock_makes_none(tmp_path: Path) -> None:
    assert not lock.is_held(tmp_path / "lock")
    assert not (tmp_path / "lock").exists()
    assert lock.holder(tmp_path / "lock") == "another process"


@pytest.mark.parametrize("number", WITHOUT.values(), ids=WITHOUT)
def test_run_starts_where_flock_is_not_supported_and_says_so_once(
    number: int, tiny: TinyRuns, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    refuse(monkeypatch, number)
    run, second = (RunFolder(tiny.config(), "custom") for _ in range(2))
    with caplog.at_level(logging.WARNING):
        run.check_ready()
        run.open({"device": "cpu", "cpu": "Abacus"}, "", "MAML")
        with pytest.raises(MamlError, match=rf"{ME} is training in .*lock\.marker"):
            second.open({"device": "cpu", "cpu": "Abacus"}, "", "MAML")
        with pytest.raises(MamlError, match=rf"{ME} is training in"):
            second.check_ready()
        run.close("interrupted")
        second.open({"device": "cpu", "cpu": "Abacus"}, "", "MAML")
        second.close("finished")
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        f"The file system of {run.path} has no file locks (flock). A marker file that names the process replaces the "
        "lock. It protects a run on one machine only"
    ]
    assert not list(run.path.glob("*.marker"))


def test_marker_of_another_machine_is_an_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, errno.ENOSYS)
    path = tmp_path / "lock"
    (tmp_path / "lock.marker").write_text("1234567\nelsewhere\n")
    path.write_text("process 1234567 on elsewhere")
    assert lock.is_held(path)
    assert lock.acquire(path) is None
    assert SoftFileLock(tmp_path / "lock.marker").pid == 1234567
    assert lock.advice(path).endswith(f"if it has ended, delete {tmp_path / 'lock.marker'}")


def test_other_errors_are_no_matter_of_flock(tmp_path: Path) -> None:
    (tmp_path / "lock").mkdir()
    with pytest.raises(IsADirectoryError):
        lock.acquire(tmp_path / "lock")
