"""The runs behind a number of the paper, and all that stands beside the number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from maml.config.compose import compose_experiment
from maml.config.identity import evaluation_config, training_config
from maml.config.names import locate
from maml.config.schema import Settings
from maml.record.index import Report, Run, Source

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
        evaluated: runs with the source's settings, with their reports: the complete runs, one per seed, lowest seed
            first. If no run is complete, only the run with the most iterations.
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


def find_evidence(source: Source, runs: Sequence[Run]) -> Evidence:
    """Returns the runs of one source: those with its evaluation settings and, except for the seed, its training."""
    settings = compose_experiment(source.experiment, source.overrides)
    training, evaluation = _without_seed(training_config(settings)), evaluation_config(settings)
    trained = [run for run in runs if _without_seed(run.record.training) == training]
    evaluated = [(run, report) for run in trained for report in run.reports if report.evaluation == evaluation]
    by_seed: dict[int, tuple[Run, Report]] = {}
    for run, report in evaluated:
        if report.complete:
            by_seed.setdefault(report.seed, (run, report))
    if by_seed:
        return Evidence(tuple(by_seed[seed] for seed in sorted(by_seed)))
    if evaluated:
        return Evidence((max(evaluated, key=lambda pair: pair[1].iteration),))
    return Evidence(unevaluated=max(trained, key=lambda run: (run.alive, run.iteration), default=None))


def _without_seed(training: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in training.items() if key != "seed"}


def _inner_order(settings: Settings) -> int | str:
    """Returns the order of the meta-gradient, 1 or 2; empty for an algorithm without a meta-gradient."""
    algorithm: Any = locate(settings.algorithm["_target_"])
    return settings.inner["order"] if algorithm.differentiates_adaptation else ""


def provenance(source: Source | None, evidence: Evidence) -> dict[str, Any]:
    """Returns the provenance of a number, by the names in `PROVENANCE`; unknown values are empty strings."""
    values: dict[str, Any] = dict.fromkeys(PROVENANCE, "")
    if source is None:
        return values
    seeds = [report.seed for _, report in evidence.evaluated]
    values |= {
        "seeds": " ".join(map(str, seeds)),
        "inner_order": _inner_order(compose_experiment(source.experiment, source.overrides)),
        "command": source.command(seeds),
    }
    if evidence.evaluated:
        run, report = evidence.evaluated[0]
        values |= {
            "iteration": report.iteration,
            "num_iterations": report.num_iterations,
            "commit": run.commits,
            "hardware": run.hardware,
            "run_id": report.run_id,
            "task_bank": report.banks[str(source.num_shots)],
        }
    return values
