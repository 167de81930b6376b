"""Figures of what has been run, and of nothing."""

import csv
import runpy
from pathlib import Path

import pytest

from tests.paper.made_up import make_run

main = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "paper_figures.py"))["main"]


def render(tmp_path: Path) -> list[dict[str, str]]:
    assert main(["--runs-dir", str(tmp_path / "runs"), "--out", str(tmp_path)]) == 0
    assert (tmp_path / "figure3" / "figure3.png").read_bytes().startswith(b"\x89PNG")
    with open(tmp_path / "figure3" / "figure3.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_without_runs_figure_3_shows_the_papers_levels_and_says_not_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = render(tmp_path)
    assert "Figure 3: sinusoid, K=10, MAML: not run" in capsys.readouterr().out
    assert "| MAML | not run |" in (tmp_path / "figures.md").read_text()
    assert [row["grad_step"] for row in rows] == [str(step) for step in range(10)]
    assert {(row["ours"], row["state"]) for row in rows} == {("", "not run")}
    assert (rows[1]["paper_low"], rows[1]["paper_high"], rows[2]["paper_low"]) == ("0.3", "0.5", "")


def test_a_finished_run_is_drawn_and_the_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    render(tmp_path)
    picture = tmp_path / "figure3" / "figure3.png"
    without = picture.read_bytes()
    make_run(tmp_path / "runs", mean=0.5, ci95=0.1)
    assert {(row["ours"], row["ours_ci95"], row["state"]) for row in render(tmp_path)} == {("0.5", "0.1", "finished")}
    with_run = picture.read_bytes()
    render(tmp_path)
    assert without != with_run == picture.read_bytes()


def test_an_unfinished_run_is_reduced_budget(tmp_path: Path) -> None:
    make_run(tmp_path / "runs", done=30_000, status="interrupted")
    assert {(row["iteration"], row["state"]) for row in render(tmp_path)} == {("30000", "reduced budget")}


def test_a_damaged_run_is_named(tmp_path: Path) -> None:
    report = make_run(tmp_path / "runs") / "report.json"
    report.write_text("{")
    assert main(["--runs-dir", str(tmp_path / "runs"), "--out", str(tmp_path)]) == 1
    assert f"**ERROR, left out:** {report} is damaged" in (tmp_path / "figures.md").read_text()
