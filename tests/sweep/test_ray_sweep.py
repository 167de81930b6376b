"""The way back from Ray's machines; a sweep on Ray itself is in test_callback.py."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from maml.sweep.ray_sweep import Disk, RayPost, RaySweep


class RemoteMethod:
    """Ray's form of a method."""

    def __init__(self, method: Any) -> None:
        self.method = method

    def remote(self, *arguments: Any) -> Any:
        return self.method(*pickle.loads(pickle.dumps(arguments)))


@pytest.fixture
def post(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RayPost:
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(get=lambda answer: answer))
    disk = Disk(tmp_path)
    return RayPost(SimpleNamespace(read=RemoteMethod(disk.read), write=RemoteMethod(disk.write)))


def test_files_are_written_deleted_and_read(post: RayPost, tmp_path: Path) -> None:
    post.write({"a/run/report.json": b"1", "a/run/evaluations/x/report.json": b"2", "a/run/gone": b"3"})
    post.write({"a/run/gone": None, "a/run/lock": b"", "a/run/.hidden": b""})
    assert (tmp_path / "a" / "run" / "report.json").read_bytes() == b"1"
    assert post.read("a/run") == {"report.json": b"1", "evaluations/x/report.json": b"2"}
    assert post.read("a/other") == {}


def test_run_outside_of_runs_dir_has_an_absolute_path(post: RayPost, tmp_path: Path) -> None:
    elsewhere = tmp_path.parent / f"{tmp_path.name}_elsewhere"
    post.write({f"{elsewhere}/report.json": b"1"})
    assert (elsewhere / "report.json").read_bytes() == b"1"


def test_callback_travels_to_other_processes() -> None:
    sweep = pickle.loads(pickle.dumps(RaySweep(return_checkpoints=True)))
    assert sweep.return_checkpoints
