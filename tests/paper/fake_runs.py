"""Fake run folders: invented numbers in the files of real runs (test_demo.py compares them with a real run)."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from maml.config.compose import compose_experiment
from maml.config.identity import evaluation_config, training_config
from maml.digest import digest
from maml.experiment import build_algorithm
from maml.hardware.base import Hardware
from maml.record import checkpoint
from maml.record.contents import Source

SINUSOID = Source("sinusoid_10shot", "mse", 5)
POINT = Source("point_navigation_maml", "return", 40)


def make_run(
    root: Path,
    mean: float | None = 1.0,
    ci95: float = 0.1,
    seed: int = 0,
    done: int | None = None,
    evaluated: bool = True,
    status: str = "finished",
    name: str | None = None,
    source: Source = SINUSOID,
    cpu: str = "Abacus",
    **training: Any,
) -> Path:
    """Makes a run folder of the source's experiment under ``root`` and returns it.

    Every mean of its report is ``mean``. The values of the tasks are evenly spaced from ``mean - 1`` to ``mean + 1``.
    """
    config = compose_experiment(source.experiment, source.overrides)
    settings = training_config(config) | ({"seed": seed} if seed else {}) | training
    run_id, done = digest(settings), settings["num_iterations"] if done is None else done
    folder = root / source.experiment / (name or run_id)
    machine = {"device": "cpu", "cpu": cpu, "cores": 2}
    segment = {"started": "2026-01-01T00:00:00+00:00", "seconds": 50.0, "first_iteration": 0, "last_iteration": done}
    segment |= {"commit": "0123456789", "dirty": True, "hardware": machine}
    record = {"experiment": source.experiment, "run_id": run_id, "seed": seed, "status": status}
    record |= {"training": settings, "segments": [segment]}
    record |= {"seconds": 50.0}
    write(folder / "run.json", record)
    if evaluated:
        evaluation = config.evaluation
        num_steps, num_tasks = evaluation["num_steps"], evaluation["num_tasks"]
        every_k = evaluation["num_shots"] or [source.num_shots]
        steps = [{"step": step, "mean": mean, "ci95": ci95, "num_tasks": num_tasks} for step in range(num_steps + 1)]
        report = {
            "experiment": source.experiment,
            "run_id": run_id,
            "seed": seed,
            "iteration": done,
            "num_iterations": settings["num_iterations"],
            "evaluation": evaluation_config(config),
            "banks": {str(k): f"{k}a" for k in every_k},
            "headline_metric": source.metric,
            "headline": mean,
            "larger_is_better": source.metric == "return",
            "curves": [{"num_shots": k, "metric": source.metric, "steps": steps} for k in every_k],
        }
        complete = done == settings["num_iterations"]
        path = folder / ("report.json" if complete else "evaluations/0a/report.json")
        write(path, report)
        path.with_name("report.png").touch()
        with open(path.with_name("tasks.csv"), "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["num_shots", "metric", "task", *(f"step_{step}" for step in range(num_steps + 1))])
            for k in every_k:
                for task, offset in enumerate(np.linspace(-1, 1, num_tasks)):
                    value = float("nan") if mean is None else mean + offset
                    writer.writerow([k, source.metric, task, *([value] * (num_steps + 1))])
    return folder


def make_run_with_checkpoint(root: Path, **settings: Any) -> Path:
    """Makes a run folder as `make_run` does, with the checkpoint of an untrained algorithm."""
    folder, source = make_run(root, **settings), settings.get("source", SINUSOID)
    algorithm = build_algorithm(compose_experiment(source.experiment, source.overrides), Hardware("cpu"))
    record = json.loads((folder / "run.json").read_text())
    content = {key: record[key] for key in ("run_id", "experiment", "training")}
    content |= {"iteration": record["segments"][-1]["last_iteration"]}
    checkpoint.save(folder / "checkpoint.pt", content | {"state": algorithm.state_dict()})
    return folder


def write(path: Path, content: Any) -> None:
    """Writes a JSON file and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def add_evaluation(folder: Path, **changes: Any) -> Path:
    """Copies the report of a run's folder to an evaluation of its own, with changes; returns the copy's folder."""
    copied = folder / "evaluations" / "0b"
    copied.mkdir(parents=True)
    for name in ("report.json", "tasks.csv"):
        shutil.copy(folder / name, copied)
    edit(copied / "report.json", **changes)
    return copied


def edit(path: Path, **changes: Any) -> None:
    """Changes keys of a JSON file."""
    write(path, json.loads(path.read_text()) | changes)


def make_run_with_own_classes(root: Path, **training: Any) -> Path:
    """Makes a run whose algorithm and network are a user's, in a module that cannot be imported.

    Their arguments ``strength`` and ``width`` have the values in ``config.yaml``, and are recorded if in ``training``.
    """
    own = {"algorithm._target_": "away.Own", "model._target_": "maml.model.module.ModuleModel"}
    folder = make_run(root, **own | {"model.module._target_": "away.Net"} | training)
    config = compose_experiment(SINUSOID.experiment).as_dict()
    config["algorithm"] = {"_target_": "away.Own", "strength": training.get("algorithm.strength", 0.01)}
    module = {"_target_": "away.Net", "_partial_": True, "width": training.get("model.module.width", 8)}
    config["model"] = {"_target_": "maml.model.module.ModuleModel", "module": module}
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(config))
    return folder
