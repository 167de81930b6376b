"""The contents of ``run.json``, ``report.json`` and checkpoints: the one schema for resumed runs and for tables.

Only the entries that are used are named; others are allowed.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from annotated_types import MinLen
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

from maml.errors import MamlError
from maml.record.labels import step_label
from maml.types import MeasuredBy

if TYPE_CHECKING:
    import pandas as pd

# Largest relative difference of two means that count as the same number. One query image more or less in 600 tasks,
# which rounding can cause, changes an accuracy by at most 1/3,000.
_TOLERANCE = 1e-3

# K as a key of a JSON object, where it is a text.
ShotsKey = Annotated[int, Field(strict=False)]


class Content(BaseModel):
    """An object in a file; a value of another type is refused, not converted."""

    model_config = ConfigDict(strict=True)


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


class StepRecord(Content):
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


class CurveRecord(Content):
    """One curve in ``report.json``."""

    num_shots: int
    metric: str
    steps: Annotated[list[StepRecord], MinLen(1)]


class Report(Content):
    """The parts of a ``report.json`` that are used; step sizes, by K, are None if the inner optimizer's own apply."""

    folder: Path = Path()  # the folder that the report was read from; tasks.csv is in it too
    run_id: str
    experiment: str
    seed: int
    iteration: int
    num_iterations: int
    evaluation: dict[str, Any]
    banks: dict[ShotsKey, str]
    step_sizes: dict[ShotsKey, list[float] | None] = {}  # the oldest reports have no step sizes, which means None
    headline_metric: str
    headline: FiniteFloat | None
    headline_num_shots: int | None = None  # earlier reports do not say it
    larger_is_better: bool
    measured_by: MeasuredBy = "gradient step"  # only reports by showing say it
    curves: Annotated[list[CurveRecord], MinLen(1)]

    @property
    def complete(self) -> bool:
        """Whether the run was trained to its last iteration when it was evaluated."""
        return self.iteration == self.num_iterations

    @property
    def headline_curve(self) -> CurveRecord | None:
        """The curve whose last step is the headline number; None if no curve has it."""
        equal = [
            curve
            for curve in self.curves
            if curve.metric == self.headline_metric and curve.steps[-1].mean == self.headline
        ]
        return next((curve for curve in equal if curve.num_shots == self.headline_num_shots), next(iter(equal), None))

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
            raise damaged_tasks(path, error) from error
        if not matches:
            raise MamlError(f"{path} does not belong to the report.json beside it; restore it")
        return values

    def check_tasks(self) -> None:
        """Checks that the numbers of this report are the means of those in ``tasks.csv``.

        Raises:
            MamlError: if the file is missing, damaged, or belongs to another report.
        """
        for curve in self.curves:
            for record in curve.steps:
                self.per_task(Source(self.experiment, curve.metric, curve.num_shots), record.step)

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


def damaged_tasks(path: Path, error: Exception) -> MamlError:
    """Returns the error about a ``tasks.csv`` that cannot be read."""
    return MamlError(f"{path} is missing or damaged ({error}); delete it, and the run's command makes it again")


class HardwareRecord(Content):
    """The machine on which a segment of a run was trained; entries that are not named are kept."""

    model_config = ConfigDict(extra="allow")

    cpu: str
    gpu: str | None = None
    processes: int = 1


class Segment(Content):
    """The part of a run between one start and the next stop, in ``run.json``."""

    seconds: float
    first_iteration: int
    last_iteration: int
    started: str
    commit: str | None
    dirty: bool | None
    hardware: HardwareRecord
    versions: dict[str, str] = {}
    execution: dict[str, Any] = {}  # the oldest records have none
    code: dict[str, str] = {}  # hashes of the user's own classes
    data: str | None = None  # a hash of the data set, if it has one

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


class RunRecord(Content):
    """The parts of a ``run.json`` that are used."""

    run_id: str
    experiment: str
    seed: int
    status: str
    seconds: float
    training: dict[str, Any]
    segments: Annotated[list[Segment], MinLen(1)]


class SavedTraining(Content):
    """The content of a ``checkpoint.pt``."""

    experiment: str
    training: dict[str, Any]
    iteration: int
    execution: dict[str, Any]
    state: dict[str, Any]
    run_id: str
