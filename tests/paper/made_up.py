"""Run folders with made-up numbers, in the form that real ones have (test_demo.py compares with a real one)."""

import json
from pathlib import Path
from typing import Any

from maml.config import digest, evaluation_config, training_config
from maml.paper.cells import Source
from maml.paper.runs import composed

SINUSOID = Source("sinusoid_10shot", "mse", 5)


def make_run(
    root: Path,
    mean: float | None = 1.0,
    ci95: float = 0.1,
    seed: int = 0,
    done: int = 70_000,
    evaluated: bool = True,
    status: str = "finished",
    name: str | None = None,
    **training: Any,
) -> Path:
    """Makes a folder of sinusoid_10shot under ``root``; every mean of its report is ``mean``; returns the folder."""
    config = composed(SINUSOID.experiment)
    settings = training_config(config) | ({"seed": seed} if seed else {}) | training
    run_id = digest(settings)
    folder = root / "sinusoid_10shot" / (name or run_id)
    machine = {"device": "cpu", "cpu": "Abacus", "cores": 2}
    segment = {"last_iteration": done, "commit": "0123456789", "dirty": True, "hardware": machine}
    record = {"run_id": run_id, "seed": seed, "status": status, "training": settings, "segments": [segment]}
    write(folder / "run.json", record)
    if evaluated:
        steps = [{"step": step, "mean": mean, "ci95": ci95, "num_tasks": 600} for step in range(11)]
        report = {
            "run_id": run_id,
            "seed": seed,
            "iteration": done,
            "num_iterations": settings["num_iterations"],
            "evaluation": evaluation_config(config),
            "banks": {"5": "5a", "10": "10a", "20": "20a"},
            "larger_is_better": False,
            "curves": [{"num_shots": k, "metric": "mse", "steps": steps} for k in (5, 10, 20)],
        }
        complete = done == settings["num_iterations"]
        write(folder / ("report.json" if complete else "evaluations/0a/report.json"), report)
    return folder


def write(path: Path, content: Any) -> None:
    """Writes a JSON file and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def edit(path: Path, **changes: Any) -> None:
    """Changes keys of a JSON file."""
    write(path, json.loads(path.read_text()) | changes)
