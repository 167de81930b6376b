"""Sweeps that never ran: their files, written directly."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from maml.record.contents import CurveRecord, Report
from maml.sweep.state import Job, job_name


def job(mean: float | None, *overrides: str, metric: str = "mse") -> Job:
    """Returns a finished job; adaptation diverged if ``mean`` is None."""
    last = {"step": 1, "mean": mean, "ci95": None if mean is None else 0.5, "num_tasks": 2}
    first = {"step": 0, "mean": 9.0, "ci95": 1.0, "num_tasks": 2}
    curve = {"metric": metric, "num_shots": 5, "steps": [first, last]}
    report = Report(
        run_id="a",
        experiment="sinusoid",
        seed=0,
        iteration=9,
        num_iterations=9,
        evaluation={},
        banks={5: "a"},
        headline_metric=metric,
        headline=mean,
        larger_is_better=metric != "mse",
        curves=[CurveRecord.model_validate(curve)],
    )
    return Job(overrides, report, state="finished")


def write_report(runs_dir: Path, run_id: str, values: Sequence[float]) -> None:
    """Writes the report of a finished run whose headline number has these values, one per task."""
    folder = runs_dir / "sinusoid" / run_id
    folder.mkdir(parents=True)
    report = job(sum(values) / len(values)).report
    assert report
    report.run_id = run_id
    (folder / "report.json").write_text(report.model_dump_json(exclude={"folder"}))
    lines = ["num_shots,metric,task,step_0,step_1", *(f"5,mse,{task},9,{value}" for task, value in enumerate(values))]
    (folder / "tasks.csv").write_text("\n".join(lines) + "\n")


def write_job(
    sweep: Path, *overrides: str, run_id: str = "", error: str | None = None, seconds: float | None = None
) -> Path:
    """Writes the record of a job; one with a run id has a run, and returns the record's path."""
    (sweep / "jobs").mkdir(parents=True, exist_ok=True)
    run = {"seed": 0, "folder": f"sinusoid/{run_id}", "run_id": run_id, "evaluation": {}, "num_iterations": 9}
    record = {"overrides": overrides, "error": error, "mode": "train", "seconds": seconds}
    path = sweep / "jobs" / f"{job_name(overrides)}.json"
    path.write_text(json.dumps({**record, "runs": [run] if run_id else []}))
    return path


def write_beat(record: Path, age: float = 0.0, **more: Any) -> None:
    """Writes the heartbeat of a job, of this process unless ``more`` says otherwise."""
    beat = {"time": time.time() - age, "host": platform.node(), "pid": os.getpid(), **more}
    record.with_suffix(".heartbeat").write_text(json.dumps(beat))
