"""``maml.results()``: every number of every run, with the paper's cells, as one pandas DataFrame."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from maml.config.paths import DEFAULT_RUNS, NO_RUNS, RESULTS
from maml.errors import MamlError
from maml.paper.cells import load_tables
from maml.paper.evidence import find_evidence
from maml.record.frame import NUMBER, check_key, number_frame, task_frame
from maml.record.index import Run, find_runs


def results(
    runs_dir: str | Path | Sequence[str | Path] | None = None,
    *,
    per_task: bool = False,
    cells: bool = True,
    settings: str | Sequence[str] = (),
) -> pd.DataFrame:
    """Returns the numbers of all runs as a tidy DataFrame: one row per run, metric, K and gradient step.

    The columns are ``experiment``, ``run`` (its id), ``seed``, ``status``, one for each of ``settings``, ``iteration``
    (at which it was evaluated) and ``num_iterations``, ``metric``, ``num_shots`` (K), ``step``,
    ``measured_by`` (``gradient step``; by ``showing``, step s is showing s + 1 of a class), ``mean`` (over test
    tasks; missing if adaptation diverged), ``ci95`` (half-width of its 95 % interval over tasks), ``num_tasks``,
    ``seconds`` (of training), ``commit``, ``hardware``, ``evaluation`` (equal for equal evaluation settings) and
    ``folder`` (of the report). Superseded runs are left out, and damaged folders with a warning.

    Args:
        runs_dir: a folder of run folders, or several. None is ``runs``, and the committed runs in a clone.
        per_task: whether each row is split by test task: ``task`` and ``value`` replace ``mean``, ``ci95`` and
            ``num_tasks``. Task t is the same in all runs with equal evaluation settings on the same data.
        cells: whether to add ``cell``, the names of the paper's cells that the number counts for, separated by commas
            (empty if there are none), and ``paper`` and ``paper_ci95``, the published number in the unit of ``mean``.
            This takes some seconds.
        settings: keys of training settings that become columns, such as ``inner.step_size``.

    Raises:
        MamlError: if a folder of ``runs_dir`` does not exist, or no run has a key of ``settings``; with ``per_task``,
            if a ``tasks.csv`` is missing or damaged.
    """
    if runs_dir is None:
        folders = [*DEFAULT_RUNS]
    else:
        folders = [Path(folder) for folder in ([runs_dir] if isinstance(runs_dir, str | Path) else runs_dir)]
        for folder in folders:
            if not folder.is_dir():
                raise MamlError(NO_RUNS.format(folder))
    runs, problems = find_runs(*folders)
    for problem in problems:
        warnings.warn(f"left out: {problem}", stacklevel=2)
    settings = [settings] if isinstance(settings, str) else settings
    for key in settings:
        check_key(runs, key)
    numbers = number_frame(runs, settings)
    if cells:
        numbers = numbers.merge(_cells(runs), how="left", on=NUMBER).fillna({"cell": ""})
    if per_task:
        numbers = numbers.drop(columns=["mean", "ci95", "num_tasks"]).merge(task_frame(runs), on=NUMBER)
    return numbers


def _cells(runs: Sequence[Run]) -> pd.DataFrame:
    """Returns one row per number that counts for a cell of the paper."""
    tables = load_tables(RESULTS) if (RESULTS / "cells.yaml").exists() else []
    rows = []
    for cell in (cell for table in tables for cell in table.cells if cell.source):
        assert cell.source is not None
        source, value, interval = cell.source, cell.value, cell.ci
        for _, report in find_evidence(source, runs).evaluated:
            number = (str(report.folder), source.metric, source.num_shots, cell.step)
            row = dict(zip(NUMBER, number, strict=True)) | {"cell": cell.name}
            row["paper"] = float(value) / source.scale if value else None
            row["paper_ci95"] = float(interval) / source.scale if interval else None
            rows.append(row)
    found = pd.DataFrame(rows, columns=[*NUMBER, "cell", "paper", "paper_ci95"])
    found = found.astype({"paper": float, "paper_ci95": float})  # also if there are none
    return found.groupby(NUMBER, as_index=False).agg({"cell": ", ".join, "paper": "first", "paper_ci95": "first"})
