"""The page on the Python API: its example on own drawings runs as printed and is right."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs.pages import ROOT, blocks


@pytest.mark.filterwarnings("ignore:.* was trained for .* iterations:UserWarning")
def test_own_drawings_are_told_apart_as_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ((_, code),) = blocks(ROOT / "docs" / "python.md", "python")
    monkeypatch.chdir(ROOT)
    exec(compile(code, "docs/python.md", "exec"), {})
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    right = [Path(file).parent.name == label for file, label in lines]
    assert len(right) == 13
    assert sum(right) >= 12


def test_example_drawings_are_small() -> None:
    sizes = [path.stat().st_size for path in (ROOT / "examples").rglob("*.*")]
    assert sum(sizes) < 100_000
