"""The provenance of a run: its command and its commit."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from maml.record import provenance


def test_command_is_as_one_would_type_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/a/b/train.py", "+experiment=x", "inner.adapt=[*, '!b']"])
    assert provenance.command_line() == """python train.py +experiment=x 'inner.adapt=[*, '"'"'!b'"'"']'"""


def test_commit_is_that_of_the_clone_and_of_no_repository_around_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], [*identity, "commit", "-q", "--allow-empty", "-m", "one"]):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    assert len(provenance.commit()["commit"]) == 40
    (tmp_path / "inside").mkdir()
    monkeypatch.setattr(provenance, "ROOT", tmp_path / "inside")
    assert provenance.commit() == {"commit": None, "dirty": None}
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    monkeypatch.setattr(provenance, "IN_CLONE", False)
    assert provenance.commit() == {"commit": None, "dirty": None}
