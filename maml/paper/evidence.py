"""The runs behind a number of the paper, and all that stands beside the number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from maml.config.compose import compose_experiment
from maml.config.identity import evaluation_config, training_config, without_keys
from maml.config.names import locate
from maml.config.schema import Settings
from maml.errors import MamlError
from maml.record.contents import Report, Source
from maml.record.index import Run, conflicts_among, samples
from maml.record.statistics import Statistics, combine
from maml.types import MeasuredBy

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


@dataclass(frozen=True)
class Evidence:
    """The runs that belong to one source.

    Attributes:
        evaluated: runs with the source's settings, with their reports, in the order of their seeds. These are the
            complete runs. A seed that was run on several machines, with different numbers, has several runs. If no
            run is complete, only the run with the most iterations.
        unevaluated: if no run was evaluated, the run in progress or the one with the most iterations; else None.
    """

    evaluated: tuple[tuple[Run, Report], ...] = ()
    unevaluated: Run | None = None

    @property
    def complete(self) -> bool:
        """Whether the evaluated runs were trained to the end."""
        return bool(self.evaluated) and self.evaluated[0][1].complete

    @property
    def state(self) -> str:
        """The progress of the source's runs; ``finished`` means trained to the end and evaluated."""
        if self.evaluated:
            return "finished" if self.complete else "reduced budget"
        return "running" if self.unevaluated and self.unevaluated.alive else "not run"

    @property
    def progress(self) -> str:
        """The number of iterations done, as text; empty if training is complete or has not begun."""
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

    @property
    def conflicts(self) -> list[str]:
        """One message for every two of the runs that contradict each other."""
        return conflicts_among([run for run, _ in self.evaluated])

    def statistics(self, source: Source, step: int) -> Statistics | None:
        """Returns the mean over runs after ``step`` gradient steps, in the paper's unit; None if nothing was run."""
        if not self.evaluated:
            return None
        if (source, step) not in self._statistics:
            readings = [report.reading(source, step) for _, report in self.evaluated]
            try:
                values = self.per_task(source, step) if len(readings) > 1 else None
            except MamlError:  # `missing_values` names it
                values = None
            self._statistics[source, step] = combine(readings, values)
        return self._statistics[source, step]

    def missing_values(self, source: Source, step: int) -> str:
        """Returns what is wrong with the values per task that `statistics` needs; empty if nothing is."""
        try:
            if len(self.evaluated) > 1:
                self.per_task(source, step)
        except MamlError as error:
            return f"{error}. Until then the interval over runs is too wide"
        return ""

    @cached_property
    def _statistics(self) -> dict[tuple[Source, int], Statistics]:
        return {}

    def per_task(self, source: Source, step: int) -> np.ndarray | None:
        """Returns the value of each run and task, ``(runs, tasks)``, in the paper's unit.

        None if the runs were evaluated on different tasks.

        Raises:
            MamlError: if the values of a run are missing or damaged.
        """
        if len({report.banks[source.num_shots] for _, report in self.evaluated}) != 1:
            return None
        return np.stack([report.per_task(source, step) for _, report in self.evaluated])

    def per_task_or_first(self, source: Source, step: int) -> np.ndarray:
        """Returns the same as `per_task`; of runs on different tasks, the first alone stands for all.

        Raises:
            MamlError: if the values of a run are missing or damaged.
        """
        values = self.per_task(source, step)
        return self.evaluated[0][1].per_task(source, step)[None] if values is None else values


def find_evidence(source: Source, runs: Sequence[Run]) -> Evidence:
    """Returns the runs of one source: those with its evaluation settings and, except for the seed, its training."""
    settings = compose_experiment(source.experiment, source.overrides)
    training, evaluation = without_keys(training_config(settings), "seed"), evaluation_config(settings)
    trained = [run for run in runs if without_keys(run.record.training, "seed") == training]
    # An evaluation that was repeated is no second sample either: the first report counts, which is the run's own.
    found = ((run, [each for each in run.reports if each.evaluation == evaluation]) for run in trained)
    evaluated = [(run, max(reports, key=lambda each: each.iteration)) for run, reports in found if reports]
    if complete := samples([pair for pair in evaluated if pair[1].complete]):
        return Evidence(tuple(complete))
    if evaluated:
        return Evidence((max(evaluated, key=lambda pair: pair[1].iteration),))
    return Evidence(unevaluated=max(trained, key=lambda run: (run.alive, run.iteration), default=None))


def _inner_order(settings: Settings) -> int | str:
    """Returns the order of the meta-gradient, 1 or 2; empty for an algorithm without a meta-gradient."""
    algorithm: Any = locate(settings.algorithm["_target_"])
    return settings.inner["order"] if algorithm.differentiates_adaptation else ""


def measured_by(source: Source) -> MeasuredBy:
    """Returns what the curves of a source are over, whether it was run or not."""
    domain: Any = locate(compose_experiment(source.experiment, source.overrides).domain["_target_"])
    kind: MeasuredBy = domain.measured_by
    return kind


def provenance(source: Source | None, evidence: Evidence) -> dict[str, Any]:
    """Returns the provenance of a number, by the names in `PROVENANCE`; unknown values are empty strings."""
    values: dict[str, Any] = dict.fromkeys(PROVENANCE, "")
    if source is None:
        return values
    reports = [report for _, report in evidence.evaluated]
    runs = [run for run, _ in evidence.evaluated]
    seeds = sorted({report.seed for report in reports})
    values |= {
        "seeds": " ".join(map(str, seeds)),
        "inner_order": _inner_order(compose_experiment(source.experiment, source.overrides)),
        "command": source.command(seeds),
    }
    if reports:
        values |= {
            "iteration": reports[0].iteration,
            "num_iterations": reports[0].num_iterations,
            "commit": ", ".join(dict.fromkeys(part.commit_name for run in runs for part in run.record.segments)),
            "hardware": "; ".join(dict.fromkeys(part.machine for run in runs for part in run.record.segments)),
            "run_id": " ".join(dict.fromkeys(report.run_id for report in reports)),
            "task_bank": " ".join(dict.fromkeys(report.banks[source.num_shots] for report in reports)),
        }
    return values
