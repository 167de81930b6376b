"""What the tests of the pages share."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.docs.pages import ROOT


@pytest.fixture
def clone(tmp_path: Path, cache_dir: Path) -> Path:
    """A copy of what a user runs in."""
    path = tmp_path / "clone"
    for name in ("maml", "conf"):
        if (ROOT / name).exists():
            shutil.copytree(ROOT / name, path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "train.py", path)
    (path / ".cache").symlink_to(cache_dir)
    return path
