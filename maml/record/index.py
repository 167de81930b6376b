"""The index of all run folders: their records and reports, and which of them contradict each other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations, product
from pathlib import Path
from typing import Any

from maml.config.identity import own_parts, with_own_defaults
from maml.config.paths import ROOT
from maml.errors import MamlError
from maml.record.atomic import write_text_atomically
from maml.record.contents import Content, CurveRecord, Report, RunRecord, StepRecord
from maml.record.lock import is_held
from maml.record.run_files import read, read_config, report_paths

SUPERSEDED = "superseded.json"  # the file in a run's folder that marks the run as superseded


class Superseded(Content):
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

    @cached_property
    def training(self) -> dict[str, Any]:
        """The recorded training settings, and the arguments of a user's own classes that have their default.

        The latter come from ``config.yaml``; they are left out if it is missing or damaged.
        """
        config: dict[str, Any] = {}
        if own_parts(self.record.training):  # reading a config takes some milliseconds
            with suppress(MamlError):
                config = read_config(self.path / "config.yaml")
        return with_own_defaults(self.record.training, config)

    @property
    def report(self) -> Report | None:
        """The report of the last evaluated iteration; None if nothing was evaluated.

        If several reports have this iteration, the one in the run's own folder is returned.
        """
        return max(self.reports, key=lambda report: report.iteration, default=None)

    @property
    def headline(self) -> tuple[CurveRecord, StepRecord] | None:
        """The curve in `report` whose last step is the headline number, and that step."""
        curve = self.report.headline_curve if self.report else None
        return (curve, curve.steps[-1]) if curve else None

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


def samples(evaluated: Iterable[tuple[Run, Report]]) -> list[tuple[Run, Report]]:
    """Returns runs with equal settings in the order of their seeds, without copies.

    A seed that was run on several machines counts several times. Two runs with equal numbers count once: one is a copy
    of the other, or training has no randomness.
    """
    by_seed: dict[int, list[tuple[Run, Report]]] = {}
    for run, report in evaluated:
        same_seed = by_seed.setdefault(report.seed, [])
        if all(report.difference(other) for _, other in same_seed):
            same_seed.append((run, report))
    return [pair for seed in sorted(by_seed) for pair in by_seed[seed]]


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
    record = read(folder / "run.json", RunRecord)
    if record is None:
        if paths:
            raise MamlError(
                f"{folder} has a report but no run.json, so it is unknown what was run; restore run.json, or delete "
                "the folder"
            )
        return None  # the run was stopped before anything was recorded
    reports = []
    for path in paths:
        report = read(path, Report)
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
    return Run(folder, record, tuple(reports), alive, read(folder / SUPERSEDED, Superseded))


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
