"""The schema of a run's files: what it accepts, and what it tells of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from maml.errors import MamlError
from maml.record.contents import Report, RunRecord, SavedTraining, Segment
from maml.record.index import read_run
from maml.record.run_files import read, read_json, validated
from tests.paper.fake_runs import SINUSOID, edit, make_run
from tests.runs import ROOT


def test_committed_records_and_reports_fulfil_the_schema() -> None:
    folders = [path.parent for path in (ROOT / "results" / "runs").glob("*/*/run.json")]
    assert len(folders) > 30
    for folder in folders:
        assert read(folder / "run.json", RunRecord) is not None
        for path in folder.rglob("report.json"):
            assert read(path, Report) is not None


def test_entries_that_are_not_named_are_kept_for_the_run_that_goes_on(tmp_path: Path) -> None:
    path = make_run(tmp_path) / "run.json"
    edit(path, of_a_later_version=[1])
    assert read_json(path, RunRecord) == json.loads(path.read_text())
    record = read(path, RunRecord)
    assert record
    assert record.segments[0].hardware.model_dump(exclude_unset=True) == {"device": "cpu", "cpu": "Abacus", "cores": 2}


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("run.json", {"segments": []}, "segments is empty"),
        ("run.json", {"segments": [{"seconds": True}]}, r"segments\[0\]\.seconds is a bool"),
        ("run.json", {"seed": "3"}, "seed is a str"),
        ("report.json", {"step_sizes": {"5": [0.1, "0.2"]}}, r"step_sizes\.5\[1\] is a str"),
        ("report.json", {"headline": float("nan")}, "headline: Input should be a finite number"),
        ("report.json", {"measured_by": "hour"}, "measured_by: Input should be 'gradient step'"),
    ],
)
def test_a_wrong_entry_is_named_and_not_converted(
    tmp_path: Path, name: str, changes: dict[str, Any], reason: str
) -> None:
    path = make_run(tmp_path) / name
    edit(path, **changes)
    with pytest.raises(MamlError, match=rf"{name} is damaged \({reason}.*\); move it away, or restore it"):
        read(path, RunRecord if name == "run.json" else Report)


def test_a_checkpoint_without_its_state_is_refused() -> None:
    content = {"experiment": "a", "training": {}, "iteration": 3, "execution": {}, "run_id": "0a"}
    with pytest.raises(MamlError, match=r"c\.pt is damaged \(state is missing\)"):
        validated(Path("c.pt"), content, SavedTraining)


def test_tasks_that_are_slightly_off_the_mean_of_the_report_are_refused(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    tasks = pd.read_csv(folder / "tasks.csv")
    tasks.loc[:, "step_0":] += 1e-3
    tasks.to_csv(folder / "tasks.csv", index=False)
    run = read_run(folder)
    assert run
    with pytest.raises(MamlError, match=r"tasks\.csv does not belong to the report\.json"):
        run.reports[0].per_task(SINUSOID, 1)


def test_the_machine_of_a_segment_counts_its_processes(tmp_path: Path) -> None:
    (segment,) = json.loads((make_run(tmp_path) / "run.json").read_text())["segments"]
    assert Segment(**segment).machine == "CPU, Abacus"
    assert Segment(**segment | {"hardware": {"cpu": "Abacus", "gpu": "Loom", "processes": 2}}).machine == "2 x Loom"
    assert Segment(**segment).commit_name == "0123456+"
    assert Segment(**segment | {"commit": None, "dirty": None}).commit_name == "?"
