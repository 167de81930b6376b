"""The demo: the path of train.py, a comparison with the paper, and nothing written outside the run folder."""

import json
import runpy
from dataclasses import replace
from pathlib import Path

import pytest

from maml.paper.evidence import find_evidence
from maml.record.index import find_runs
from tests.paper.fake_runs import SINUSOID, make_run

ROOT = Path(__file__).parents[2]
main = runpy.run_path(str(ROOT / "scripts" / "demo.py"))["main"]


def test_demo_runs_compares_and_shows_the_same_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    results = {path: path.stat().st_mtime_ns for path in (ROOT / "results").rglob("*")}
    main(["--smoke"])
    first = capsys.readouterr().out
    (folder,) = (tmp_path / "runs").glob("*/*/")
    assert {path.name for path in folder.iterdir()} >= {"run.json", "report.json", "figure3.png", "comparison.md"}
    table = (folder / "comparison.md").read_text()
    assert table in first
    steps = [line.split(" | ")[:2] + line.split(" | ")[3:] for line in table.splitlines()[2:]]
    assert steps[1] == ["| 5", "1", "0.67", "Table 2", "smoke test |"]
    assert len(steps) == 8, "at K=20 nothing could be read off"
    for name in ("figure3.png", "comparison.md", folder.name):
        assert name in first

    report = (folder / "report.json").stat().st_mtime_ns
    main(["--smoke"])
    again = capsys.readouterr().out
    assert "already finished" in again
    assert again[again.index("\n| K |") :] == first[first.index("\n| K |") :]
    assert (folder / "report.json").stat().st_mtime_ns == report
    assert results == {path: path.stat().st_mtime_ns for path in (ROOT / "results").rglob("*")}

    # A real run folder has every key of the fake ones, with which the index is tested.
    runs, damaged = find_runs(tmp_path / "runs")
    assert damaged == []
    found = find_evidence(replace(SINUSOID, overrides=("+debug=smoke",)), runs)
    assert (found.state, [run.record.status for run, _ in found.evaluated]) == ("finished", ["finished"])
    assert find_evidence(SINUSOID, runs).state == "not run"
    made_up = make_run(tmp_path / "made_up")
    for name in ("run.json", "report.json"):
        assert keys(made_up / name) <= keys(folder / name)


def keys(path: Path) -> set[str]:
    return set(json.loads(path.read_text()))
