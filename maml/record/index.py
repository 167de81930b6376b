"""The index of all run folders: their records and reports, and which of them contradict each other."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations, product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import numpy as np
from annotated_types import MinLen
from pydantic import BaseModel, FiniteFloat, ValidationError

from maml.config.paths import ROOT
from maml.errors import MamlError
from maml.record.checkpoint import write_text_atomically
from maml.record.lock import is_held
from maml.record.run_files import read_json, report_paths
from maml.record.style import step_label
from maml.types import MeasuredBy

if TYPE_CHECKING:
    import pandas as pd

SUPERSEDED = "superseded.json"  # the file in a run's folder that marks the run as superseded

# Largest relative difference of two means that count as the same number. One query image more or less in 600 tasks,
# which rounding can cause, changes an accuracy by at most 1/3,000.
_TOLERANCE = 1e-3

Content = TypeVar("Content", bound=BaseModel)


@dataclass(frozen=True)
class Source:
    """The source of a number of ours: one curve in the report of one experiment.

    Attributes:
        experiment: name of a file in ``conf/experiment/``.
        metric: a metric of the experiment's report.
        num_shots: K.
        scale: factor from our unit to the paper's.
        overrides: overrides that follow the experiment on the command line.
    """

    experiment: str
    metric: str
    num_shots: int
    scale: float = 1.0
    overrides: tuple[str, ...] = ()

    @property
    def arguments(self) -> list[str]:
        """The arguments of ``train.py``."""
        return [f"+experiment={self.experiment}", *self.overrides]

    def command(self, seeds: Sequence[int]) -> str:
        """Returns the command that runs these seeds; an empty list stands for the default seed."""
        values = ",".join(map(str, seeds))
        words = ["python", "train.py", *(["-m"] if len(seeds) > 1 else []), *self.arguments]
        return shlex.join(words + ([f"seed={values}"] if values not in ("", "0") else []))


class StepRecord(BaseModel):
    """One gradient step of a curve in ``report.json``; the mean and interval are None if adaptation diverged.

    By showing, it is showing ``step + 1``, of the tasks that have it.
    """

    step: int
    mean: FiniteFloat | None
    ci95: FiniteFloat | None
    num_tasks: int

    def equals(self, other: StepRecord) -> bool:
        """Returns whether both are the same number, up to rounding."""
        if self.mean is None or other.mean is None:
            return self.mean is other.mean
        return abs(self.mean - other.mean) <= _TOLERANCE * (abs(self.mean) + (self.ci95 or 0))


class CurveRecord(BaseModel):
    """One curve in ``report.json``."""

    num_shots: int
    metric: str
    steps: Annotated[list[StepRecord], MinLen(1)]


class Report(BaseModel):
    """The parts of a ``report.json`` that are used; step sizes, by K, are None if the inner optimizer's own apply."""

    folder: Path = Path()  # the folder that the report was read from; tasks.csv is in it too
    run_id: str
    seed: int
    iteration: int
    num_iterations: int
    evaluation: dict[str, Any]
    banks: dict[str, str]
    step_sizes: dict[str, list[float] | None] = {}  # the oldest reports have no step sizes, which means None
    headline_metric: str
    headline: FiniteFloat | None
    larger_is_better: bool
    measured_by: MeasuredBy = "gradient step"  # only reports by showing say it
    curves: Annotated[list[CurveRecord], MinLen(1)]

    @property
    def complete(self) -> bool:
        """Whether the run was trained to its last iteration when it was evaluated."""
        return self.iteration == self.num_iterations

    def reading(self, source: Source, step: int) -> tuple[float, float]:
        """Returns the mean and the half-width of its 95 % interval over tasks, in the paper's unit.

        Both are nan if adaptation diverged.

        Raises:
            MamlError: if the report has no such curve or step.
        """
        for curve in self.curves:
            for record in curve.steps:
                if (curve.metric, curve.num_shots, record.step) == (source.metric, source.num_shots, step):
                    if record.mean is None or record.ci95 is None:
                        return math.nan, math.nan
                    return record.mean * source.scale, record.ci95 * source.scale
        raise MamlError(
            f"results/cells.yaml asks {source.experiment} for {source.metric} at K={source.num_shots}, step {step}, "
            f"but its report has {', '.join(f'{curve.metric} at K={curve.num_shots}' for curve in self.curves)}, "
            f"steps 0 to {len(self.curves[0].steps) - 1}"
        )

    def per_task(self, source: Source, step: int) -> np.ndarray:
        """Returns the value of each task, ``(tasks,)``, in the paper's unit; `reading` returns their mean.

        By showing, tasks that have no such showing are left out: they are the same ones for every run on a bank.

        Raises:
            MamlError: if ``tasks.csv`` is missing, damaged, or belongs to another report.
        """
        path = self.folder / "tasks.csv"
        try:
            curve = self._task_values.get((source.num_shots, source.metric))
            if curve is None:
                raise ValueError(f"it has no lines for {source.metric} at K={source.num_shots}")
            values = source.scale * curve[:, step]
            if self.measured_by == "showing":
                values = values[~np.isnan(values)]
            mean, _ = self.reading(source, step)
            with np.errstate(over="ignore", invalid="ignore"):
                if not len(values):
                    matches = math.isnan(mean)
                elif math.isnan(mean):
                    matches = not math.isfinite(values.std())
                else:
                    matches = math.isclose(values.mean(), mean, rel_tol=0, abs_tol=1e-5 * np.abs(values).max())
        except (OSError, KeyError, IndexError, TypeError, ValueError) as error:
            raise MamlError(f"{path} is missing or damaged ({error}); the run's command makes it again") from error
        if not matches:
            raise MamlError(f"{path} does not belong to the report.json beside it; restore it")
        return values

    @cached_property
    def task_table(self) -> pd.DataFrame:
        """The content of ``tasks.csv``, with one row per K, metric and task; the file is read once."""
        import pandas as pd  # imported here because it takes a third of a second

        return pd.read_csv(self.folder / "tasks.csv")

    @cached_property
    def _task_values(self) -> dict[Any, np.ndarray]:
        """The values in `task_table` by K and metric, ``(tasks, steps)``."""
        table = self.task_table
        values = table.iloc[:, 3:].to_numpy(dtype=float)
        curves = list(zip(table["num_shots"].tolist(), table["metric"].tolist(), strict=True))
        # The lines of a curve follow each other, which is many times faster to use than a grouping.
        starts = [row for row in range(len(curves)) if row == 0 or curves[row] != curves[row - 1]]
        ends = [*starts[1:], len(curves)]
        return {curves[start]: values[start:end] for start, end in zip(starts, ends, strict=True)}

    def difference(self, other: Report) -> str:
        """Describes the first number that differs from another report by more than rounding; empty if none does."""
        if self.banks != other.banks:
            return "its task banks are different"
        expected_steps = {
            (curve.metric, curve.num_shots, step.step): step for curve in other.curves for step in curve.steps
        }
        for curve in self.curves:
            for step in curve.steps:
                expected = expected_steps.get((curve.metric, curve.num_shots, step.step), step)
                if not step.equals(expected):
                    values = ["diverged" if mean is None else f"{mean:.5g}" for mean in (step.mean, expected.mean)]
                    place = step_label(step.step, self.measured_by)
                    return f"{curve.metric} at K={curve.num_shots}, {place}, is {', not '.join(values)}"
        return ""


class HardwareRecord(BaseModel):
    """The machine on which a segment of a run was trained."""

    cpu: str
    gpu: str | None = None
    processes: int = 1


class Segment(BaseModel):
    """The part of a run between one start and the next stop, in ``run.json``."""

    started: str
    seconds: float
    first_iteration: int
    last_iteration: int
    commit: str | None
    dirty: bool | None
    hardware: HardwareRecord
    versions: dict[str, str] = {}
    execution: dict[str, Any] = {}  # the oldest records have none

    @property
    def commit_name(self) -> str:
        """The shortened commit hash; ``+`` marks uncommitted changes."""
        return f"{self.commit[:7]}{'+' if self.dirty else ''}" if self.commit else "?"

    @property
    def machine(self) -> str:
        """The name of the device, with the number of processes if there were several, each with its own device."""
        name = self.hardware.gpu or f"CPU, {self.hardware.cpu}"
        return f"{self.hardware.processes} x {name}" if self.hardware.processes > 1 else name

    @property
    def environment(self) -> tuple[Any, ...]:
        """All that has to be equal for the same computation to give the same bits."""
        return self.machine, sorted(self.versions.items()), sorted(self.execution.items())


class RunRecord(BaseModel):
    """The parts of a ``run.json`` that are used."""

    run_id: str
    seed: int
    status: str
    seconds: float
    training: dict[str, Any]
    segments: Annotated[list[Segment], MinLen(1)]


class Superseded(BaseModel):
    """The content of a ``superseded.json``, with which a user marks that a run is no longer evidence."""

    by: str  # folder of the run that replaces it; empty if there is none
    reason: str

    def __str__(self) -> str:
        return ": ".join(filter(None, [f"superseded by {self.by}" if self.by else "superseded", self.reason]))


@dataclass(frozen=True)
class Run:
    """A run folder and its evaluations.

    Attributes:
        path: path of the folder.
        record: the record of its training.
        reports: the reports of its evaluations.
        alive: whether a process is training in it.
        superseded: the mark that this run is no longer evidence; None if there is no mark.
        conflict: how its numbers contradict those of an equal run; empty if they do not.
    """

    path: Path
    record: RunRecord
    reports: tuple[Report, ...]
    alive: bool
    superseded: Superseded | None = None
    conflict: str = ""

    @property
    def experiment(self) -> str:
        """The experiment whose folder it is in; other experiments with the same training settings share the run."""
        return self.path.parent.name

    @property
    def status(self) -> str:
        """The recorded status, or ``superseded``, ``conflict`` or ``killed``, which the record cannot know."""
        if self.superseded:
            return "superseded"
        if self.conflict:
            return "conflict"
        if not self.alive and self.report is not None and self.report.complete:
            return "finished"  # also if it was killed before it could record that
        return "killed" if self.record.status == "running" and not self.alive else self.record.status

    @property
    def iteration(self) -> int:
        """The number of iterations of the newest checkpoint."""
        return self.record.segments[-1].last_iteration

    @property
    def num_iterations(self) -> int:
        """The number of iterations of the complete training."""
        return self.record.training["num_iterations"]

    @property
    def report(self) -> Report | None:
        """The report of the last evaluated iteration; None if nothing was evaluated.

        If several reports have this iteration, the one in the run's own folder is returned.
        """
        return max(self.reports, key=lambda report: report.iteration, default=None)

    @property
    def headline(self) -> tuple[CurveRecord, StepRecord] | None:
        """The curve in `report` whose last step is the headline number, and that step."""
        report = self.report
        if report is None:
            return None
        ends = [(curve, curve.steps[-1]) for curve in report.curves if curve.metric == report.headline_metric]
        return next((end for end in ends if end[1].mean == report.headline), None)

    @property
    def commits(self) -> str:
        """The commits with which it was trained."""
        return ", ".join(dict.fromkeys(part.commit_name for part in self.record.segments))

    @property
    def hardware(self) -> str:
        """The machines it was trained on."""
        return "; ".join(dict.fromkeys(part.machine for part in self.record.segments))

    @property
    def environment(self) -> tuple[Any, ...] | None:
        """The environment of all its segments; None if they have different ones."""
        first, *others = (part.environment for part in self.record.segments)
        return first if all(other == first for other in others) else None


def find_runs(*roots: Path) -> tuple[list[Run], list[str]]:
    """Reads every run that can be evidence, from ``<root>/<experiment>/<run id>/``.

    Args:
        roots: folders of run folders; of two equal runs, the one in the earlier root is preferred.

    Returns:
        The runs, and one message for each folder that is left out because it is damaged. Superseded runs are left out
        without a message.
    """
    runs, problems = read_runs(*roots)
    return [run for run in runs if not run.superseded], problems


def read_runs(*roots: Path) -> tuple[list[Run], list[str]]:
    """Reads every run as `find_runs` does, but also returns superseded runs."""
    runs, problems = [], []
    distinct: dict[Path, Path] = {}
    for root in roots:
        distinct.setdefault(root.resolve(), root)  # a root that is given twice has no more runs
    for folder in (folder for root in distinct.values() for folder in sorted(root.glob("*/*/"))):
        try:
            run = read_run(folder)
        except (MamlError, OSError) as error:
            problems.append(str(error))
        else:
            runs += [run] if run else []
    conflicts = _conflicts([run for run in runs if not run.superseded])
    return [replace(run, conflict=conflicts.get(run.path, "")) for run in runs], problems


def _conflicts(runs: Sequence[Run]) -> dict[Path, str]:
    """Returns a message, by folder, for every two runs that should have given the same numbers and did not.

    These are runs with equal settings, seed, hardware, versions and execution (threads, chunks, compilation).
    Otherwise training may end at other numbers, because rounding errors grow.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        if run.reports:  # on other settings, no two reports can be compared
            groups.setdefault(run.record.run_id, []).append(run)
    messages: dict[Path, str] = {}
    for equal in groups.values():
        for first, second in combinations(equal, 2):
            if first.environment is None or first.environment != second.environment:
                continue
            for a, b in product(first.reports, second.reports):
                same = (a.evaluation, a.iteration) == (b.evaluation, b.iteration)
                difference = b.difference(a) if same else ""
                if difference:
                    text = (
                        f"{second.path} has the settings, the seed, the hardware and the versions of {first.path}, but "
                        f"{difference}. Both are counted. Look at them with `python scripts/runs.py compare`, and mark "
                        "a wrong one with `python scripts/runs.py supersede`"
                    )
                    messages.setdefault(first.path, text)
                    messages.setdefault(second.path, text)
    return messages


def conflicts_among(runs: Sequence[Run]) -> list[str]:
    """Returns one message for every two of the runs that contradict each other."""
    return list(dict.fromkeys(run.conflict for run in runs if run.conflict))


def read_run(folder: Path) -> Run | None:
    """Reads one run folder; returns None if nothing was recorded in it.

    Raises:
        MamlError: if the folder is damaged.
    """
    paths = [path for path in report_paths(folder) if path.exists()]
    record = _read(folder / "run.json", RunRecord)
    if record is None:
        if paths:
            raise MamlError(
                f"{folder} has a report but no run.json, so it is unknown what was run; restore run.json, or delete "
                "the folder"
            )
        return None  # the run was stopped before anything was recorded
    reports = []
    for path in paths:
        report = _read(path, Report)
        assert report is not None
        recorded = record.run_id, record.seed, record.training.get("num_iterations")
        if (report.run_id, report.seed, report.num_iterations) != recorded:
            raise MamlError(
                f"{path} does not belong to the run in {folder / 'run.json'}; evaluate again with mode=eval"
            )
        report.folder = path.parent
        reports.append(report)
    # A killed process leaves the status "running" in its record, but no longer holds the lock.
    alive = record.status == "running" and is_held(folder / "lock")
    return Run(folder, record, tuple(reports), alive, _read(folder / SUPERSEDED, Superseded))


def supersede(run: Run, by: Run | None, reason: str) -> None:
    """Writes into a run's folder that the run is no longer evidence.

    Args:
        run: the run to mark.
        by: the run that replaces it, if there is one.
        reason: why the run is no longer evidence; may be empty.

    Raises:
        MamlError: if the mark cannot be written.
    """
    replacement = by.path.resolve() if by else Path()
    if replacement.is_relative_to(ROOT):  # relative, because the mark may be committed and read on another machine
        replacement = replacement.relative_to(ROOT)
    content = Superseded(by=str(replacement) if by else "", reason=reason).model_dump_json(indent=2) + "\n"
    write_text_atomically(run.path / SUPERSEDED, content)


def _read(path: Path, schema: type[Content]) -> Content | None:
    content = read_json(path)
    if content is None:
        return None
    try:
        return schema.model_validate(content, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "content"
        raise MamlError(
            f"{path} is damaged ({where}: {first['msg']}); move it away, or restore it, and try again"
        ) from error
