"""What has been run: the index of run folders, and which of them belong to a cell or curve."""

from __future__ import annotations

import csv
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
from annotated_types import MinLen
from pydantic import BaseModel, FiniteFloat, ValidationError

from maml.config.compose import compose_experiment
from maml.config.identity import digest, evaluation_config, training_config
from maml.config.names import locate
from maml.config.paths import ROOT
from maml.config.schema import Settings
from maml.errors import MamlError
from maml.record.checkpoint import write_atomically
from maml.record.lock import is_held
from maml.record.run_folder import read_json

SUPERSEDED = "superseded.json"  # in a run's folder

# What evaluating the same parameters on another machine may change: one query image of 600 tasks is 1/3,000 or less.
_TOLERANCE = 1e-3

PROVENANCE = (
    "seeds",
    "iteration",
    "num_iterations",
    "inner_order",
    "commit",
    "hardware",
    "run_id",
    "task_bank",
    "command",
)

Content = TypeVar("Content", bound=BaseModel)


@dataclass(frozen=True)
class Source:
    """Where our number is found: one curve in the report of one experiment.

    Attributes:
        experiment: a file in ``conf/experiment/``.
        metric: a metric of its report.
        num_shots: K.
        scale: takes our unit to the paper's.
        overrides: what stands behind the experiment on the command line.
    """

    experiment: str
    metric: str
    num_shots: int
    scale: float = 1.0
    overrides: tuple[str, ...] = ()

    @property
    def arguments(self) -> list[str]:
        """What ``train.py`` is given."""
        return [f"+experiment={self.experiment}", *self.overrides]

    def command(self, seeds: Sequence[int]) -> str:
        """Returns the command that runs these seeds; none given is the default seed."""
        values = ",".join(map(str, seeds))
        words = ["python", "train.py", *(["-m"] if len(seeds) > 1 else []), *self.arguments]
        return shlex.join(words + ([f"seed={values}"] if values not in ("", "0") else []))


class StepRecord(BaseModel):
    """One gradient step of a curve in ``report.json``; where adaptation diverged, there are no numbers."""

    step: int
    mean: FiniteFloat | None
    ci95: FiniteFloat | None
    num_tasks: int

    def agrees_with(self, other: StepRecord, other_machine: bool) -> bool:
        """Whether both may come of the same training and tasks; on another machine its roundings grow."""
        if self.mean is None or other.mean is None:
            return self.mean is other.mean
        rounding = _TOLERANCE * (abs(self.mean) + (self.ci95 or 0))
        return abs(self.mean - other.mean) <= max(rounding, self.ci95 or 0 if other_machine else 0)


class CurveRecord(BaseModel):
    """One curve in ``report.json``."""

    num_shots: int
    metric: str
    steps: Annotated[list[StepRecord], MinLen(1)]


class Report(BaseModel):
    """What is read of a ``report.json``; step sizes, by K, are None where they were the inner optimizer's own."""

    folder: Path = Path()  # it was read from there, and holds its tasks.csv
    run_id: str
    seed: int
    iteration: int
    num_iterations: int
    evaluation: dict[str, Any]
    banks: dict[str, str]
    step_sizes: dict[str, list[float] | None] = {}  # the oldest reports do not have them: None throughout
    headline_metric: str
    headline: FiniteFloat | None
    larger_is_better: bool
    curves: Annotated[list[CurveRecord], MinLen(1)]

    @property
    def complete(self) -> bool:
        """Whether training had ended."""
        return self.iteration == self.num_iterations

    def reading(self, source: Source, step: int) -> tuple[float, float]:
        """Returns mean and half-width of the 95 % interval over tasks, in the paper's unit; nan if it diverged.

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
        """Returns the value of each task, in the paper's unit, whose mean `reading` gives.

        Raises:
            MamlError: if ``tasks.csv`` is missing, damaged or of another report.
        """
        path, curve = self.folder / "tasks.csv", (str(source.num_shots), source.metric)
        try:
            lines = [line for line in self.task_lines if (line["num_shots"], line["metric"]) == curve]
            if not lines:
                raise ValueError(f"it has no lines of {source.metric} at K={source.num_shots}")
            values = source.scale * np.array([float(line[f"step_{step}"]) for line in lines])
            mean, _ = self.reading(source, step)
            with np.errstate(over="ignore", invalid="ignore"):
                if math.isnan(mean):
                    is_mine = not math.isfinite(values.std())
                else:
                    is_mine = math.isclose(values.mean(), mean, rel_tol=0, abs_tol=1e-5 * np.abs(values).max())
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise MamlError(f"{path} is missing or damaged ({error}); restore it") from error
        if not is_mine:
            raise MamlError(f"{path} is not of the report beside it; restore it")
        return values

    @cached_property
    def task_lines(self) -> list[dict[str, str]]:
        """The lines of ``tasks.csv``, read once."""
        with open(self.folder / "tasks.csv", newline="") as file:
            return list(csv.DictReader(file))

    def disagreement(self, other: Report, other_machine: bool) -> str:
        """Says what is not as in another run of the same settings; empty if they agree.

        Args:
            other: its evaluation.
            other_machine: whether it was trained on another machine, so that only the intervals need to agree.
        """
        if self.banks != other.banks:
            return "its task banks are others"
        theirs = {(curve.metric, curve.num_shots, step.step): step for curve in other.curves for step in curve.steps}
        for curve in self.curves:
            for mine in curve.steps:
                its = theirs.get((curve.metric, curve.num_shots, mine.step), mine)
                if not mine.agrees_with(its, other_machine):
                    values = ["diverged" if mean is None else f"{mean:.5g}" for mean in (mine.mean, its.mean)]
                    return f"{curve.metric} at K={curve.num_shots}, step {mine.step}, is {', not '.join(values)}"
        return ""


class HardwareRecord(BaseModel):
    """The machine of a segment."""

    cpu: str
    gpu: str | None = None
    processes: int = 1


class Segment(BaseModel):
    """One stretch of a run between start and stop, in ``run.json``."""

    started: str
    seconds: float
    first_iteration: int
    last_iteration: int
    commit: str | None
    dirty: bool | None
    hardware: HardwareRecord

    @property
    def commit_name(self) -> str:
        """The commit, shortened; ``+`` marks one with changes that were not committed."""
        return f"{self.commit[:7]}{'+' if self.dirty else ''}" if self.commit else "?"

    @property
    def machine(self) -> str:
        """The device, and how many processes had one each."""
        name = self.hardware.gpu or f"CPU, {self.hardware.cpu}"
        return f"{self.hardware.processes} x {name}" if self.hardware.processes > 1 else name


class RunRecord(BaseModel):
    """What is read of a ``run.json``."""

    run_id: str
    seed: int
    status: str
    seconds: float
    training: dict[str, Any]
    segments: Annotated[list[Segment], MinLen(1)]


class Superseded(BaseModel):
    """What is read of a ``superseded.json``: somebody said that this run is no evidence any more."""

    by: str  # the folder of another run; empty if there is none
    reason: str

    def __str__(self) -> str:
        return ": ".join(filter(None, [f"superseded by {self.by}" if self.by else "superseded", self.reason]))


@dataclass(frozen=True)
class Run:
    """A run folder and all that was evaluated in it.

    Attributes:
        path: of the folder.
        record: of its training.
        reports: of its evaluations.
        alive: whether a process is training in it.
        superseded: why it is no evidence any more; None if it is.
        conflict: why it is none beside an equal run, whose numbers it does not have; empty if it is.
    """

    path: Path
    record: RunRecord
    reports: tuple[Report, ...]
    alive: bool
    superseded: Superseded | None = None
    conflict: str = ""

    @property
    def experiment(self) -> str:
        """The one whose folder it is in; others may train the same thing and share it."""
        return self.path.parent.name

    @property
    def status(self) -> str:
        """As recorded, but for what a record cannot know: it was killed, or its numbers are not used."""
        if self.superseded:
            return "superseded"
        if self.conflict:
            return "conflict"
        return "killed" if self.record.status == "running" and not self.alive else self.record.status

    @property
    def iteration(self) -> int:
        """The iterations that are saved."""
        return self.record.segments[-1].last_iteration

    @property
    def num_iterations(self) -> int:
        """The iterations that are planned."""
        return self.record.training["num_iterations"]

    @property
    def report(self) -> Report | None:
        """The evaluation of the furthest iteration, the run's own before others; None if nothing was evaluated."""
        return max(self.reports, key=lambda report: report.iteration, default=None)

    @property
    def headline(self) -> tuple[CurveRecord, StepRecord] | None:
        """The curve in its `report` that ends in the headline number, and that end."""
        report = self.report
        if report is None:
            return None
        ends = [(curve, curve.steps[-1]) for curve in report.curves if curve.metric == report.headline_metric]
        return next((end for end in ends if end[1].mean == report.headline), None)

    @property
    def commits(self) -> str:
        """The commits it was trained from."""
        return ", ".join(dict.fromkeys(part.commit_name for part in self.record.segments))

    @property
    def hardware(self) -> str:
        """The machines it was trained on."""
        return "; ".join(dict.fromkeys(part.machine for part in self.record.segments))


def find_runs(*roots: Path) -> tuple[list[Run], list[str]]:
    """Reads every run that can be evidence, from ``<root>/<experiment>/<run id>/``.

    Args:
        roots: in the order in which equal runs are preferred.

    Returns:
        The runs, and one message for each folder that is left out: because it is damaged, or because its numbers are
        not those of an equal run before it. Superseded ones are left out without a message.
    """
    runs, problems = read_runs(*roots)
    return [run for run in runs if not run.superseded and not run.conflict], problems


def read_runs(*roots: Path) -> tuple[list[Run], list[str]]:
    """Reads every run as `find_runs` does, but leaves out only those that are damaged."""
    runs, problems = [], []
    for folder in (folder for root in roots for folder in sorted(root.glob("*/*/"))):
        try:
            run = read_run(folder)
        except (MamlError, OSError) as error:
            problems.append(str(error))
        else:
            runs += [run] if run else []
    conflicts = _conflicts([run for run in runs if not run.superseded])
    runs = [replace(run, conflict=conflicts.get(run.path, "")) for run in runs]
    return runs, problems + list(dict.fromkeys(conflicts.values()))


def _conflicts(runs: Sequence[Run]) -> dict[Path, str]:
    """Returns by folder a message for every run that should have the numbers of one before it, and has not."""
    first: dict[str, tuple[Run, Report]] = {}
    messages = {}
    for run in runs:
        for report in run.reports:
            settings = {"training": run.record.training, "evaluation": report.evaluation}
            counting, its = first.setdefault(digest(settings | {"iteration": report.iteration}), (run, report))
            difference = report.disagreement(its, other_machine=run.hardware != counting.hardware)
            if difference:
                messages[run.path] = (
                    f"{run.path} has the settings and the seed of {counting.path}, which counts, but {difference}; see "
                    "`python scripts/runs.py compare` with both, and mark the wrong one with its `supersede`"
                )
    return messages


def read_run(folder: Path) -> Run | None:
    """Reads one run folder; None if nothing was recorded in it.

    Raises:
        MamlError: if it is damaged.
    """
    paths = [
        path for path in (folder / "report.json", *sorted(folder.glob("evaluations/*/report.json"))) if path.exists()
    ]
    record = _read(folder / "run.json", RunRecord)
    if record is None:
        if paths:
            raise MamlError(
                f"{folder} has a report but no run.json, so nothing tells what was run; restore it or delete both"
            )
        return None  # stopped before anything was recorded
    reports = []
    for path in paths:
        report = _read(path, Report)
        assert report is not None
        mine = record.run_id, record.seed, record.training.get("num_iterations")
        if (report.run_id, report.seed, report.num_iterations) != mine:
            raise MamlError(f"{path} is not of the run in {folder / 'run.json'}; evaluate again with mode=eval")
        report.folder = path.parent
        reports.append(report)
    # A process that was killed leaves its record as it was, but no lock.
    alive = record.status == "running" and is_held(folder / "lock")
    return Run(folder, record, tuple(reports), alive, _read(folder / SUPERSEDED, Superseded))


def supersede(run: Run, by: Run | None, reason: str) -> None:
    """Marks a run as no evidence any more, in its own folder.

    Args:
        run: it.
        by: the run that takes its place, if there is one.
        reason: why; may be empty.

    Raises:
        MamlError: if the mark cannot be written.
    """
    place = by.path.resolve() if by else Path()
    if place.is_relative_to(ROOT):  # it may be committed, and read on another machine
        place = place.relative_to(ROOT)
    content = Superseded(by=str(place) if by else "", reason=reason).model_dump_json(indent=2) + "\n"
    write_atomically(run.path / SUPERSEDED, lambda file: file.write(content.encode()))


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


@dataclass(frozen=True)
class Evidence:
    """What has been run of one source.

    Attributes:
        evaluated: runs with the source's settings and their reports. Complete ones, one per seed, lowest seed first;
            if there is none, only the one that is furthest.
        unevaluated: the furthest run without such a report, if none has one.
    """

    evaluated: tuple[tuple[Run, Report], ...] = ()
    unevaluated: Run | None = None

    @property
    def complete(self) -> bool:
        """Whether what is evaluated was trained to the end."""
        return bool(self.evaluated) and self.evaluated[0][1].complete

    @property
    def state(self) -> str:
        """How far the source has been run; ``finished`` is evaluated after all of training."""
        if self.evaluated:
            return "finished" if self.complete else "reduced budget"
        return "running" if self.unevaluated and self.unevaluated.alive else "not run"

    @property
    def progress(self) -> str:
        """The iterations done, where that is neither all nor none of them."""
        if self.complete:
            return ""
        if self.evaluated:
            run, report = self.evaluated[0]
            done = report.iteration
        elif self.unevaluated:
            run = self.unevaluated
            done = run.iteration
        else:
            return ""
        return f"{done:,} of {run.record.training['num_iterations']:,} iterations"


def find_evidence(source: Source, runs: Sequence[Run]) -> Evidence:
    """Picks the runs of one source: equal training settings but for the seed, and equal evaluation settings."""
    config = compose_experiment(source.experiment, source.overrides)
    training, evaluation = _without_seed(training_config(config)), evaluation_config(config)
    mine = [run for run in runs if _without_seed(run.record.training) == training]
    evaluated = [(run, report) for run in mine for report in run.reports if report.evaluation == evaluation]
    by_seed: dict[int, tuple[Run, Report]] = {}
    for run, report in evaluated:
        if report.complete:
            by_seed.setdefault(report.seed, (run, report))
    if by_seed:
        return Evidence(tuple(by_seed[seed] for seed in sorted(by_seed)))
    if evaluated:
        return Evidence((max(evaluated, key=lambda pair: pair[1].iteration),))
    return Evidence(unevaluated=max(mine, key=lambda run: (run.alive, run.iteration), default=None))


def _without_seed(training: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in training.items() if key != "seed"}


def _inner_order(config: Settings) -> int | str:
    """Returns the order of the meta-gradient; nothing for an algorithm that has none."""
    algorithm: Any = locate(config.algorithm["_target_"])
    return config.inner["order"] if algorithm.differentiates_adaptation else ""


def provenance(source: Source | None, evidence: Evidence) -> dict[str, Any]:
    """Returns all that stands beside a number, by the names in `PROVENANCE`; empty where there is nothing to say."""
    beside: dict[str, Any] = dict.fromkeys(PROVENANCE, "")
    if source is None:
        return beside
    seeds = [report.seed for _, report in evidence.evaluated]
    beside |= {
        "seeds": " ".join(map(str, seeds)),
        "inner_order": _inner_order(compose_experiment(source.experiment, source.overrides)),
        "command": source.command(seeds),
    }
    if evidence.evaluated:
        run, report = evidence.evaluated[0]
        beside |= {
            "iteration": report.iteration,
            "num_iterations": report.num_iterations,
            "commit": run.commits,
            "hardware": run.hardware,
            "run_id": report.run_id,
            "task_bank": report.banks[str(source.num_shots)],
        }
    return beside
