"""Runs as pandas DataFrames: one row per run, per number, or per test task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from inspect import Parameter, signature
from typing import Any

import pandas as pd

from maml.config.hints import near_miss
from maml.config.names import locate
from maml.config.schema import Settings
from maml.digest import digest
from maml.errors import MamlError
from maml.record.contents import Report, damaged_tasks
from maml.record.index import Run

UNKNOWN = Parameter.empty
NUMBER = ["folder", "metric", "num_shots", "step"]
"""The columns that identify a number."""
_NUMBER_COLUMNS = (
    *("experiment", "run", "seed", "status", "iteration", "num_iterations", "metric", "num_shots", "step"),
    "measured_by",
    *("mean", "ci95", "num_tasks", "seconds", "commit", "hardware", "evaluation", "folder"),
)


def run_frame(runs: Sequence[Run]) -> pd.DataFrame:
    """Returns one row per run, with its headline number if it was evaluated."""
    return pd.DataFrame([_run_row(run) for run in runs], dtype=object)


def number_frame(runs: Sequence[Run], settings: Sequence[str] = ()) -> pd.DataFrame:
    """Returns one row per number: the mean over test tasks of a metric at one K after one gradient step.

    Where ``measured_by`` is ``showing``, the number of step s is that of showing s + 1.

    Args:
        runs: the runs.
        settings: keys of training settings, such as ``inner.step_size``, each of which becomes a column.
    """
    rows = []
    for run in runs:
        about: dict[str, Any] = {"experiment": run.experiment, "run": run.record.run_id, "seed": run.record.seed}
        about |= {"status": run.status}
        about |= {key: _groupable(setting(run.training, key)) for key in settings}
        origin = {"seconds": run.record.seconds, "commit": run.commits, "hardware": run.hardware}
        for report in run.reports:
            about |= {"iteration": report.iteration, "num_iterations": report.num_iterations}
            origin |= {"evaluation": digest(report.evaluation), "folder": str(report.folder)}
            rows += [
                about
                | {"metric": curve.metric, "num_shots": curve.num_shots, "step": step.step}
                | {"measured_by": report.measured_by}
                | {"mean": step.mean, "ci95": step.ci95, "num_tasks": step.num_tasks}
                | origin
                for curve in report.curves
                for step in curve.steps
            ]
    return pd.DataFrame(rows, columns=None if rows else [*_NUMBER_COLUMNS, *settings])


def task_frame(runs: Sequence[Run]) -> pd.DataFrame:
    """Returns one row per number and test task: the columns of `NUMBER` and ``task`` and ``value``.

    Raises:
        MamlError: if a ``tasks.csv`` is missing or damaged.
    """
    parts = [_tasks(report) for run in runs for report in run.reports]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=[*NUMBER, "task", "value"])


def _tasks(report: Report) -> pd.DataFrame:
    try:
        long = report.task_table.melt(["num_shots", "metric", "task"], var_name="step", value_name="value")
        long["step"] = long["step"].str.removeprefix("step_").astype(int)
    except (OSError, KeyError, ValueError) as error:
        raise damaged_tasks(report.folder / "tasks.csv", error) from error
    long["folder"] = str(report.folder)
    return long[[*NUMBER, "task", "value"]]


def _run_row(run: Run) -> dict[str, Any]:
    columns = ("evaluated_at", "metric", "num_shots", "step", "measured_by", "mean", "ci95", "num_tasks")
    numbers = dict.fromkeys(columns)
    if run.report and run.headline:
        curve, last = run.headline
        numbers |= {"evaluated_at": run.report.iteration, "metric": curve.metric, "num_shots": curve.num_shots}
        numbers |= {"step": last.step, "measured_by": run.report.measured_by}
        numbers |= {"mean": last.mean, "ci95": last.ci95, "num_tasks": last.num_tasks}
    return {
        "run": run.record.run_id,
        "experiment": run.experiment,
        "seed": run.record.seed,
        "iteration": run.iteration,
        "num_iterations": run.num_iterations,
        "status": run.status,
        **numbers,
        "seconds": run.record.seconds,
        "commit": run.commits,
        "hardware": run.hardware,
        "folder": str(run.path),
    }


def setting(settings: Mapping[str, Any], key: str) -> Any:
    """Returns a setting, or the constructor's default if it is not recorded; `UNKNOWN` if there is no default."""
    if key in settings:
        return settings[key]
    part, _, name = key.rpartition(".")
    target = settings.get(f"{part}._target_") if part else f"{Settings.__module__}.{Settings.__name__}"
    return _default(target, name) if target else UNKNOWN


def check_key(runs: Sequence[Run], key: str) -> None:
    """Checks that a key is a setting of some run, if there are runs.

    Raises:
        MamlError: if no run was trained with it. The message names a key that is nearly the same.
    """
    if runs and all(setting(run.training, key) is UNKNOWN for run in runs):
        known = sorted({name for run in runs for name in run.training})
        raise MamlError(f"no run was trained with {key}{near_miss(key, known)}")


@cache
def _default(target: str, name: str) -> Any:
    if not target.startswith("maml."):  # a run folder may come from anybody, so it must not make us import a module
        return UNKNOWN
    try:
        parameter = signature(locate(target)).parameters.get(name)
    except (ImportError, ValueError):  # the run used a class that was renamed since
        return UNKNOWN
    return parameter.default if parameter else UNKNOWN


def _groupable(value: Any) -> Any:
    """Returns a setting in a form by which pandas can group: a list as a tuple, an unknown value as None."""
    if isinstance(value, list):
        return tuple(map(_groupable, value))
    return None if value is UNKNOWN else value
