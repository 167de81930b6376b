"""The state of a sweep, read from its files: what each job is, how far it is, and when all will be finished."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from maml.digest import digest
from maml.errors import MamlError
from maml.record.contents import CurveRecord, Report, StepRecord
from maml.record.heartbeat import looks_dead
from maml.record.index import read_run
from maml.record.labels import number_label
from maml.record.run_files import find_report, read_json
from maml.training.progress import duration

SWEEP = "sweep.json"  # what the process that started the sweep knows: its command, and the jobs that it plans


def job_overrides(overrides: Iterable[str]) -> list[str]:
    """Returns the overrides that identify a sweep or a job: all but the launcher."""
    return [override for override in overrides if not override.startswith("launcher=")]


def job_name(overrides: Iterable[str]) -> str:
    """Returns the name of a job's files in the folder ``jobs``, without the suffix."""
    return digest({"overrides": job_overrides(overrides)})


@dataclass(frozen=True)
class Job:
    """One job of a sweep; a job that trains several seeds at once counts as one for each seed.

    Attributes:
        overrides: the overrides of its config.
        report: the report of its run; None if the run is not finished.
        problem: why there is no report; empty if there is one.
        name: name of its files in the folder ``jobs``.
        state: ``finished``, ``running``, ``stopped``, ``failed`` or ``not started``.
        folder: folder of the report, or of the run if it is not finished; None if it has not started.
        iteration: number of iterations that are done, as far as is known.
        num_iterations: number of all iterations; 0 if it has not started.
        speed: iterations per second; None if unknown.
        heartbeat: seconds since its last heartbeat; None if it has none.
        host: the machine that it runs on; empty if it does not run.
        seconds: how long it took; None if it is not finished, or had begun before the sweep started.
    """

    overrides: tuple[str, ...]
    report: Report | None
    problem: str = ""
    name: str = ""
    state: str = "not started"
    folder: Path | None = field(default=None, compare=False)
    iteration: int = 0
    num_iterations: int = 0
    speed: float | None = None
    heartbeat: float | None = None
    host: str = ""
    seconds: float | None = None

    @property
    def settings(self) -> dict[str, str]:
        """The overrides by key."""
        return {key.lstrip("+"): value for key, _, value in (override.partition("=") for override in self.overrides)}

    @property
    def is_hopeless(self) -> bool:
        """Whether it would fail again: its training diverged, or its settings are not valid."""
        # A class that is not found may be there next time.
        is_invalid = "the config is not valid" in self.problem and "no such class" not in self.problem
        return self.state == "failed" and (is_invalid or "training has diverged" in self.problem)

    @property
    def time_left(self) -> float | None:
        """Seconds until its training is finished, at the speed that it has now; None if unknown."""
        return (self.num_iterations - self.iteration) / self.speed if self.speed else None

    @property
    def headline(self) -> tuple[float, float]:
        """Mean and half-width of the 95 % interval over test tasks; nan if adaptation diverged."""
        _, last = self._headline
        return (math.nan, math.nan) if last.mean is None or last.ci95 is None else (last.mean, last.ci95)

    @property
    def headline_label(self) -> str:
        """The name of the headline number: ``mse (K=10, step 10, n=600)``."""
        curve, last = self._headline
        assert self.report
        return number_label(curve.metric, curve.num_shots, last.step, self.report.measured_by, last.num_tasks)

    @property
    def _headline(self) -> tuple[CurveRecord, StepRecord]:
        assert self.report and self.report.headline_curve
        return self.report.headline_curve, self.report.headline_curve.steps[-1]


def varying_keys(jobs: Sequence[Job]) -> list[str]:
    """Returns the keys whose values are not the same in all jobs."""
    keys = dict.fromkeys(key for job in jobs for key in job.settings)
    return [key for key in keys if len({job.settings.get(key) for job in jobs}) > 1]


def describe(job: Job, keys: Sequence[str]) -> str:
    """Returns a job's values of some keys, ``key=value key=value``; all its overrides if it has none of the keys."""
    return " ".join(f"{key}={job.settings[key]}" for key in keys if key in job.settings) or " ".join(job.overrides)


class SweepReader:
    """Reads the state of a sweep. Finished jobs are read once, so that reading again and again costs little.

    Args:
        folder: folder of the sweep.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._finished: dict[str, list[Job]] = {}

    def jobs(self) -> list[Job]:
        """Returns all jobs that were planned or started. Work of an earlier start of the sweep does not count.

        Settings in files may have changed since, and a job that was finished counts as soon as it starts again.

        Raises:
            MamlError: if a file of the sweep is damaged.
        """
        sweep = read_json(self.folder / SWEEP) or {}
        planned = [tuple(overrides) for overrides in sweep.get("planned") or []]
        blanks = [Job(overrides, None, "not started", job_name(overrides)) for overrides in planned]
        jobs = {blank.name: [blank] for blank in blanks}
        for path in (self.folder / "jobs").glob("*.json"):
            if path.stem not in self._finished:
                try:
                    found = self._read(path, sweep.get("started"))
                except (KeyError, TypeError, AttributeError) as error:
                    raise MamlError(f"{path} is damaged ({error!r}); delete it, and start the sweep again") from error
                if not found:
                    continue
                if all(job.state == "finished" for job in found):
                    self._finished[path.stem] = found
                jobs[path.stem] = found
        return sorted((job for each in (jobs | self._finished).values() for job in each), key=lambda job: job.overrides)

    def _read(self, path: Path, started: float | None) -> list[Job]:
        record = read_json(path)
        if record is None or (started is not None and record.get("started", started) != started):
            return []
        blank = Job(tuple(record["overrides"]), None, name=path.stem)
        if record["error"] is not None:
            blank = replace(blank, state="failed", problem=record["error"])
        runs = record.get("runs")
        if not runs:
            problem = blank.problem or ("not started" if runs is not None else "recorded by an earlier version")
            return [replace(blank, problem=problem)]
        beat = read_json(path.with_suffix(".heartbeat"))
        jobs = []
        for run in runs:
            overrides = blank.overrides if len(runs) == 1 else (*blank.overrides, f"seed={run['seed']}")
            job = replace(blank, overrides=overrides, num_iterations=run["num_iterations"])
            jobs.append(self._read_run(job, record, run, beat))
        if record["error"] is not None and all(job.report for job in jobs):  # no seed's report is missing to explain it
            return [replace(job, report=None, state="failed", problem=record["error"]) for job in jobs]
        return jobs

    def _read_run(
        self, job: Job, record: Mapping[str, Any], run: Mapping[str, Any], beat: Mapping[str, Any] | None
    ) -> Job:
        folder = self.folder.parents[1] / run["folder"]  # relative to runs_dir, or absolute
        job = replace(job, folder=folder)
        try:
            found = find_report(folder, run["run_id"], run["evaluation"], unfinished=record["mode"] == "eval")
            if found:  # this seed was evaluated, so the error belongs to another seed
                report, where = Report.model_validate(found[0]), found[1]
                report.folder = where
                job = replace(job, report=report, problem="", folder=where, state="finished")
                return replace(job, iteration=report.iteration, seconds=record["seconds"])
            unfinished = read_run(folder)
            said_so = unfinished is not None and unfinished.record.status == "interrupted"  # and was not just killed
            if beat is not None and record["error"] is None and not (said_so and looks_dead(beat)):
                return self._read_beat(job, beat)
        except MamlError as reason:
            return replace(job, state="failed", problem=job.problem or str(reason))
        if unfinished is None:
            return replace(job, problem=job.problem or "not started")
        job = replace(job, iteration=unfinished.iteration)
        if record["error"] is not None:
            return job
        return replace(job, state="stopped", problem=f"{unfinished.status} at iteration {unfinished.iteration:,}")

    def _read_beat(self, job: Job, beat: Mapping[str, Any]) -> Job:
        iteration, age = beat.get("iteration", 0), max(0.0, time.time() - beat["time"])
        job = replace(job, iteration=iteration, heartbeat=age, host=beat["host"])
        reason = looks_dead(beat)
        if reason:
            return replace(job, state="stopped", problem=f"{reason}; at iteration {iteration:,}")
        where = f"at iteration {iteration:,} of {job.num_iterations:,}" if "iteration" in beat else "preparing"
        return replace(job, state="running", speed=beat.get("speed"), problem=f"running, {where}, on {beat['host']}")


def summary_line(jobs: Sequence[Job], num_jobs: int | None = None) -> str:
    """Returns how many jobs are in which state, and the time left: ``2 of 4 finished, 2 running, ETA 0:10:00``.

    Args:
        jobs: the jobs that were planned or started.
        num_jobs: number of all jobs, if it is known. Above the number of ``jobs``, it is an upper bound: a sweeper that
            chooses jobs one by one may choose the same one again.
    """
    total = max(len(jobs), num_jobs or 0)
    counts = {state: sum(job.state == state for job in jobs) for state in ("finished", "running", "failed", "stopped")}
    bound = "at most " * (total > len(jobs))
    parts = [f"{counts.pop('finished')} of {bound}{total} finished"]
    parts += [f"{count} {state}" for state, count in counts.items() if count]
    left = time_left(jobs, total)
    return ", ".join([*parts, *([f"ETA {duration(left)}"] if left is not None else [])])


def time_left(jobs: Sequence[Job], total: int) -> float | None:
    """Estimates the seconds until a sweep is finished; None if nothing runs, or too little is known.

    Jobs that have not started are assumed to take as long as those that are finished or run, and to run as many at
    once as now.
    """
    running = [job for job in jobs if job.state == "running"]
    durations = [job.seconds for job in jobs if job.seconds is not None]
    durations += [job.num_iterations / job.speed for job in running if job.speed]
    if not running or not durations:
        return None
    typical = statistics.median(durations)
    lefts = [typical if job.time_left is None else job.time_left for job in running]
    waiting = total - sum(job.state in ("finished", "failed", "running") for job in jobs)
    return max(*lefts, (sum(lefts) + waiting * typical) / len(running))


def find_sweeps(*runs_dirs: Path) -> list[Path]:
    """Returns the folders of all sweeps in folders of runs, the newest last."""
    folders = [path.parent for runs_dir in runs_dirs for path in runs_dir.glob("sweeps/*/jobs")]
    return sorted(folders, key=lambda folder: (folder / "jobs").stat().st_mtime)


def find_sweep(name: str, *runs_dirs: Path) -> Path:
    """Returns the folder of the sweep whose id begins with ``name``.

    Raises:
        MamlError: if there is no such sweep, or several.
    """
    matches = [folder for folder in find_sweeps(*runs_dirs) if folder.name.startswith(name)]
    if len(matches) == 1:
        return matches[0]
    if not matches:
        raise MamlError(f"there is no sweep {name} in {', '.join(map(str, runs_dirs))}; without an id, all are listed")
    raise MamlError(f"{name} matches {len(matches)} sweeps; give more of the id: {', '.join(f.name for f in matches)}")


def sweep_rows(folders: Sequence[Path]) -> list[dict[str, str]]:
    """Returns one row of text for each sweep: its id, when it was started last, its state and its command."""
    rows = []
    for folder in folders:
        when, command = "", ""
        try:
            sweep = read_json(folder / SWEEP) or {}
            if started := sweep.get("started"):
                when = time.strftime("%Y-%m-%d %H:%M", time.localtime(started))
            command = sweep.get("command", "")
            state = summary_line(SweepReader(folder).jobs(), sweep.get("num_jobs"))
        except (TypeError, ValueError, AttributeError) as error:
            state = f"damaged: {error}"
        rows.append({"sweep": folder.name, "started": when, "state": state, "command": command})
    return rows


def job_rows(jobs: Sequence[Job]) -> list[dict[str, str]]:
    """Returns one row of text for each job: its settings, its state and how far it is."""
    keys = varying_keys(jobs)
    return [
        {
            **{key: job.settings.get(key, "") for key in keys},
            "state": job.state,
            "iteration": f"{job.iteration:,} of {job.num_iterations:,}" if job.num_iterations else "",
            "it/s": f"{job.speed:,.3g}" if job.speed else "",
            "ETA": duration(job.time_left) if job.time_left is not None else "",
            "heartbeat": f"{job.heartbeat:,.0f} s ago" if job.heartbeat is not None else "",
            "host": job.host,
            "why": " ".join(job.problem.split()) if job.state in ("failed", "stopped") else "",
        }
        for job in jobs
    ]
