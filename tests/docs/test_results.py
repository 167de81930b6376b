"""The Python examples of the page on results run as printed."""

from pathlib import Path

import pytest

from tests.docs.pages import ROOT, blocks

EXAMPLES = [code for _, code in blocks(ROOT / "docs" / "results.md", "python")]


def test_examples_run_as_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "results").symlink_to(ROOT / "results")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    for code in EXAMPLES:
        exec(code, {})
    assert (tmp_path / "adaptation.png").stat().st_size > 5000
    described = dict(line.split() for line in capsys.readouterr().out.splitlines()[:-1])
    assert float(described["count"]) == 600
    assert float(described["mean"]) == pytest.approx(2.354 - 0.346, abs=0.01)  # the difference of the two cells
