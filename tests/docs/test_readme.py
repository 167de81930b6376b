"""The README: its table is up to date, and its commands and Python code run as printed."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from tests.docs.pages import ROOT, blocks, run_in_order, trainings

README = ROOT / "README.md"
SPEC = importlib.util.spec_from_file_location("readme_script", ROOT / "scripts" / "readme.py")
assert SPEC and SPEC.loader
readme = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(readme)


def test_readme_is_one_short_page_with_a_short_table() -> None:
    text = README.read_text()
    assert len(text.splitlines()) <= 125
    table = text.partition(readme.BEGIN)[2].partition(readme.END)[0].splitlines()
    assert 2 < len(table) <= 2 + 8


def test_readme_table_is_what_the_committed_runs_give(capsys: pytest.CaptureFixture[str]) -> None:
    assert readme.main(["--check"]) == 0, capsys.readouterr().err


def test_check_finds_an_outdated_table_and_writing_mends_it(tmp_path: Path) -> None:
    copy = tmp_path / "README.md"
    copy.write_text(README.read_text().replace("| 0.67 |", "| 0.66 |"))
    assert readme.main(["--check", "--readme", str(copy)]) == 1
    assert "0.66 |" in copy.read_text()
    assert readme.main(["--readme", str(copy)]) == 0
    assert copy.read_text() == README.read_text()


def test_readme_without_the_markers_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "README.md"
    copy.write_text("# mine\n")
    assert readme.main(["--readme", str(copy)]) == 1
    assert copy.read_text() == "# mine\n"
    assert "put them back" in capsys.readouterr().err


def test_readme_commands_run_in_order(clone: Path) -> None:
    runs = trainings(README)
    assert len(runs) >= 4
    run_in_order(clone, runs)
    assert len(list(clone.glob("runs/sinusoid_10shot/*/report.json"))) == 4  # three seeds and another step size


def test_readme_python_predicts_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    ((_, code),) = blocks(README, "python")
    exec(compile(code, "README.md", "exec"), {})
    (predicted,) = re.findall(r"-?\d+\.\d+", capsys.readouterr().out)
    (promised,) = re.findall(r"the true value is (-?\d+\.\d+)", code)
    assert float(predicted) == pytest.approx(float(promised), abs=0.3)
