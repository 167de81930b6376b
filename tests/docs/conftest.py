"""Shared fixtures of the tests of the pages."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.docs.pages import ROOT


@pytest.fixture
def clone(tmp_path: Path, cache_dir: Path) -> Path:
    """A copy of the files that a user gets by cloning."""
    path = tmp_path / "clone"
    for name in ("maml", "conf", "examples"):
        if (ROOT / name).exists():
            shutil.copytree(ROOT / name, path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "train.py", path)
    (path / ".cache").symlink_to(cache_dir)
    return path
