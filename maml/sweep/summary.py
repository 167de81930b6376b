"""The summary of a sweep: a table over its axes, and the jobs that are not finished."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from maml.errors import MamlError
from maml.record.atomic import write_text_atomically
from maml.record.contents import Report, Source
from maml.record.provenance import command_line
from maml.record.statistics import combine
from maml.sweep.state import Job, SweepReader, describe, varying_keys

if TYPE_CHECKING:
    import pandas as pd

LOG = logging.getLogger(__name__)
_NUMBERS = ("mean", "ci95", "lowest", "highest")


def tabulate(jobs: Sequence[Job]) -> pd.DataFrame:
    """Returns one row per combination of the values that differ between jobs, other than the seed; best row first.

    Columns: the axes; ``metric``, as in ``mse (K=10, step 10, n=600)``; ``mean`` over seeds and ``ci95``, the
    half-width of its 95 % interval (see `maml.record.statistics.combine`); ``lowest`` and ``highest`` mean of a seed;
    ``seeds``, as in ``2 of 3``. Numbers are nan if adaptation diverged or no seed is finished.
    """
    import pandas as pd  # takes a third of a second

    axes = [key for key in varying_keys(jobs) if key != "seed"]
    names = [f"axis {axis}" for axis in axes]  # an axis may have the name of another column
    frame = pd.DataFrame(
        [(*(job.settings.get(axis, "") for axis in axes), job, bool(job.report)) for job in jobs],
        columns=[*names, "job", "finished"],
    )
    keys = [frame[name] for name in names] or [pd.Series("", index=frame.index)]  # without axes, all are one group
    rows = []
    for point, group in frame.groupby(keys, sort=False):
        # A seed that two jobs have counts once; the finished ones come last.
        ordered = group.sort_values("finished", kind="stable")["job"]
        by_seed = {job.settings.get("seed"): job for job in ordered}
        finished = [job for job in by_seed.values() if job.report]
        rows.append(dict(zip(names, point, strict=False)) | _row(finished, len(by_seed)))
    columns = ["metric", *_NUMBERS, "seeds"]
    table = pd.DataFrame(rows, columns=[*names, *columns, "unfinished", "kind", "badness"])
    table = table.sort_values(["unfinished", "kind", "badness"], na_position="last", ignore_index=True)
    return table[[*names, *columns]].set_axis([*axes, *columns], axis=1)


def _row(finished: Sequence[Job], num_seeds: int) -> dict[str, Any]:
    """Returns the row of jobs that differ in seed only.

    Args:
        finished: the finished jobs, one for each seed.
        num_seeds: number of the seeds of all jobs.
    """
    row = {
        "metric": "",
        "seeds": f"{len(finished)} of {num_seeds}",
        "unfinished": not finished,
        "kind": "",
        "badness": math.nan,
    }
    if not finished:
        return row
    reports = [job.report for job in finished if job.report]
    found = combine([job.headline for job in finished], _values(reports))
    named = next((job for job in finished if job.report and job.report.headline is not None), finished[0])
    return row | {
        "metric": named.headline_label,  # where adaptation diverged, all curves may end alike
        "kind": reports[0].headline_metric,
        **{name: getattr(found, name) for name in _NUMBERS},
        "badness": -found.mean if reports[0].larger_is_better else found.mean,
    }


def _values(reports: Sequence[Report]) -> np.ndarray | None:
    """Returns the headline number of each run and task, ``(runs, tasks)``; None if it is not known for all."""
    if len(reports) < 2 or any(report.banks != reports[0].banks for report in reports):
        return None
    values = []
    for report in reports:
        curve = report.headline_curve
        assert curve
        try:
            source = Source(report.experiment, curve.metric, curve.num_shots)
            values.append(report.per_task(source, curve.steps[-1].step))
        except MamlError as error:  # the interval is then made from those of the reports
            LOG.warning("%s. Until then ci95 is too wide", error)
            return None
    return np.array(values) if len({len(each) for each in values}) == 1 else None


def submitted_jobs(folder: Path) -> set[Path]:
    """Returns the files of the jobs that SLURM or its local form has accepted, from all sweeps beside this one."""
    return set(folder.parent.glob(".submitit/*/*_submitted.pkl"))


def summarise(folder: Path, jobs_outlive_command: bool = False, earlier_jobs: Set[Path] = frozenset()) -> None:
    """Prints the table of a sweep and its unfinished jobs, and writes ``summary.md`` and ``summary.csv``.

    Args:
        folder: folder of the sweep.
        jobs_outlive_command: whether SLURM may still run or queue the jobs that have not failed.
        earlier_jobs: those of `submitted_jobs` before the sweep started.
    """
    jobs = SweepReader(folder).jobs()
    table = tabulate(jobs)
    lines = _markdown(table) if len(table) else []
    missing = [job for job in jobs if not job.report]
    lines += ["", f"{len(jobs) - len(missing)} of {len(jobs)} jobs are finished"]
    named = varying_keys(jobs)
    for job in missing:
        log = folder / "jobs" / f"{job.name}.log"
        lines.append(f"- {describe(job, named)}: {job.problem}{f' (its output: {log})' if log.exists() else ''}")
    submitted = bool(submitted_jobs(folder) - earlier_jobs)
    hopeless = sum(job.is_hopeless for job in missing)
    if hopeless:
        who = "These" if hopeless == len(missing) else f"{hopeless} of these"
        lines += ["", f"{who} would fail again in the same way: change their settings, or leave them out"]
    if hopeless < len(missing):
        which = "the others" if hopeless else "these"
        wait, run = "", "Run"
        may_run = sum(job.state != "failed" for job in missing) if jobs_outlive_command and submitted else 0
        if may_run:
            who = "these jobs" if may_run == len(missing) else "those jobs that have not failed"
            wait = f"SLURM still runs or queues {who} unless you cancelled them. When squeue shows none of them, "
            run = "run"
        lines += ["", f"{wait}{run} the same command again to continue with {which}: `{command_line()}`"]
    if submitted:
        lines.append(f"What SLURM says about the jobs is in {folder.parent / '.submitit'}")
    text = "\n".join(lines).strip() + "\n"
    print(f"\n{text}", end="", flush=True)  # first, because writing may fail, on a full disk for example
    write_text_atomically(folder / "summary.md", text)
    write_text_atomically(folder / "summary.csv", table.to_csv(index=False, lineterminator="\n"))
    print(f"written to {folder}")


def _markdown(table: pd.DataFrame) -> list[str]:
    cells = [list(table.columns), *([_format_value(value) for value in row] for row in table.itertuples(index=False))]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    return [f"| {' | '.join(text.ljust(width) for text, width in zip(row, widths, strict=True))} |" for row in cells]


def _format_value(value: Any) -> str:
    return value if isinstance(value, str) else "" if math.isnan(value) else f"{value:.4f}"
