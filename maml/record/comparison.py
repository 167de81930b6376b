"""Methods that were tested on the same tasks, compared task by task."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from maml.config.identity import without_keys
from maml.digest import digest
from maml.errors import MamlError
from maml.record.contents import Report, Source
from maml.record.index import Run, samples
from maml.record.labels import in_percent, step_label
from maml.record.settings import experiment_settings, setting_texts

RESAMPLES = 10_000
# Settings of a domain that concern training alone, or whose effect on the tasks of a bank is in the bank's hash: in any
# domain, and in those of this package.
_NUMBERS = {"num_shots", "num_query", "num_ways"}
_NOT_OF_A_BANK = _NUMBERS | {
    *("split", "rotations", "augment", "distort"),
    *("oracle", "pooled", "num_goals", "goal_per", "discount"),
}


@dataclass(frozen=True)
class Tested:
    """One method on one frozen bank of tasks: equal runs that differ in the seed only.

    Attributes:
        runs: the runs, each with its report on this bank.
        metric: the headline metric.
        num_shots: K.
        step: the last gradient step.
        values: the value of each task, mean over runs, ``(tasks,)``.
    """

    runs: Sequence[tuple[Run, Report]]
    metric: str
    num_shots: int
    step: int
    values: np.ndarray

    @property
    def experiment(self) -> str:
        """The experiment in whose folder the runs are."""
        return self.runs[0][0].experiment

    @property
    def domain(self) -> str:
        """The name of the domain's class."""
        return str(self.runs[0][0].record.training["domain._target_"]).rpartition(".")[2]

    @property
    def tasks(self) -> str:
        """What the tasks are, in words."""
        run, report = self.runs[0]
        num_ways = report.evaluation.get("evaluation.num_ways") or run.record.training.get("domain.num_ways")
        ways = f"{num_ways}-way, " if num_ways else ""
        return f"{ways}K={self.num_shots}, {len(self.values)} tasks"

    @property
    def bank(self) -> str:
        """The hash of the bank."""
        return self.runs[0][1].banks[self.num_shots]

    @property
    def is_complete(self) -> bool:
        """Whether all runs were trained to the end."""
        return all(report.complete for _, report in self.runs)

    @property
    def larger_is_better(self) -> bool:
        """Whether a larger value is better."""
        return self.runs[0][1].larger_is_better

    @property
    def mean(self) -> float:
        """The mean over tasks."""
        return float(self.values.mean())

    @property
    def ci95(self) -> float:
        """The half-width of the 95 % interval over tasks, as in a report."""
        return float(1.96 * self.values.std() / np.sqrt(len(self.values)))

    def difference(self, other: Tested) -> tuple[float, float, float]:
        """Returns the mean of this method minus another, paired over tasks, and the ends of its 95 % interval."""
        low, high = paired_interval(other.values, self.values)
        return self.mean - other.mean, low, high


def data_of_bank(run: Run) -> str:
    """Returns a hash of what the numbers in a bank refer to: a bank holds indices of images or rows, or goals.

    Banks with equal hashes hold the same tasks if this is equal too. It covers the domain's class, the settings that
    choose its data or environment, such as a file, a horizon or a reward, and the content of the user's own files.
    """
    ignored = _NOT_OF_A_BANK if run.training["domain._target_"].startswith("maml.") else _NUMBERS
    settings = {
        key: value
        for key, value in run.training.items()
        if key.startswith("domain.") and key.removeprefix("domain.") not in ignored
    }
    # The user's own files may have other content under the same name.
    content = run.record.segments[-1].data if settings.keys() & {"domain.file", "domain.folder"} else None
    return digest({"settings": settings, "content": content})


def groups_on_the_same_tasks(runs: Iterable[Run]) -> list[list[Tested]]:
    """Returns the groups of two or more methods that were tested on the same tasks, each with the best method first.

    The tasks are the same if `data_of_bank`, K and the bank's hash are. A method is compared by the headline metric
    after the last step. Of several evaluations of a run on these tasks, one with its experiment's settings comes first,
    then the one of the latest iteration, then the one in the run's own folder. Runs that were evaluated in different
    ways are different methods. Methods that diverged or have no values per task are left out.

    Args:
        runs: the runs.
    """
    runs = [*runs]
    wanted = {name: experiment_settings(name)[1] for name in {run.experiment for run in runs}}  # 0.1 s for each
    banks: dict[tuple[str, int, str], dict[str, list[tuple[Run, Report]]]] = {}
    for run in runs:
        chosen: dict[tuple[str, int, str], Report] = {}
        evaluation, data = wanted[run.experiment], data_of_bank(run)
        for report in sorted(run.reports, key=lambda each: (each.evaluation != evaluation, -each.iteration)):
            for num_shots, bank in report.banks.items():
                chosen.setdefault((data, num_shots, bank), report)
        for place, report in chosen.items():
            banks.setdefault(place, {}).setdefault(settings_but_seed(run, report), []).append((run, report))
    groups = []
    for (_, num_shots, _), methods in banks.items():
        found = [tested for pairs in methods.values() if (tested := _tested(samples(pairs), num_shots))]
        if len(found) > 1:
            sign = -1 if found[0].larger_is_better else 1
            groups.append(sorted(found, key=lambda each: sign * each.mean))
    return groups


def method_rows(group: Sequence[Tested]) -> list[dict[str, str]]:
    """Returns a line for each method of a group, with its difference from the first one.

    Args:
        group: methods that were tested on the same tasks.
    """
    scale, mean = (100, "mean in percent") if in_percent(group[0].metric) else (1, "mean")
    rows = []
    for each, settings in zip(group, _distinct_settings(group), strict=True):
        difference, low, high = (scale * value for value in each.difference(group[0]))
        (run, report), *_ = each.runs
        budget = "" if each.is_complete else f", {report.iteration:,} of {report.num_iterations:,} iterations"
        rows.append(
            {
                "method": " ".join([f"{each.experiment} ({run.record.run_id[:6]}{budget})", *settings]),
                "runs": str(len(each.runs)),
                "metric": f"{each.metric}, {step_label(each.step, report.measured_by)}",
                f"{mean} ± 95 %": f"{scale * each.mean:.4g} ± {scale * each.ci95:.2g}",
                "minus best": "" if each is group[0] else f"{difference:+.4g}",
                "95 % interval": "" if each is group[0] else f"{low:+.4g} to {high:+.4g}",
            }
        )
    return rows


def _distinct_settings(group: Sequence[Tested]) -> list[list[str]]:
    """Returns, for each method, its settings that differ from its experiment's and from another of its methods."""
    texts = []
    for each in group:
        (run, report), *_ = each.runs
        training, evaluation = experiment_settings(each.experiment)
        texts.append(setting_texts(run.training | report.evaluation, training | evaluation))
    same = [[texts[i] for i, other in enumerate(group) if other.experiment == each.experiment] for each in group]
    return [
        [text for text in own if any(text not in other for other in others)]
        for own, others in zip(texts, same, strict=True)
    ]


def settings_but_seed(run: Run, report: Report) -> str:
    """Returns a hash that is equal for runs that differ in seed and hardware only, evaluated in the same way."""
    training = without_keys(run.record.training, "seed")
    return digest({"training": training, "evaluation": report.evaluation, "iteration": report.iteration})


def _tested(pairs: Sequence[tuple[Run, Report]], num_shots: int) -> Tested | None:
    metric = pairs[0][1].headline_metric
    curve = next((each for each in pairs[0][1].curves if (each.metric, each.num_shots) == (metric, num_shots)), None)
    if curve is None:
        return None
    step, source = curve.steps[-1].step, Source(pairs[0][0].experiment, metric, num_shots)
    try:
        values = np.mean([report.per_task(source, step) for _, report in pairs], axis=0)
    except MamlError:
        return None
    return Tested(pairs, metric, num_shots, step, values) if np.isfinite(values).all() else None


def paired_interval(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Returns the 95 % percentile bootstrap interval of the mean of b - a over tasks.

    Args:
        a: one value per task, ``(tasks,)``.
        b: another value per task, ``(tasks,)``, for the same tasks.
    """
    low, high = np.percentile(_resample_weights(len(a)) @ (b - a), (2.5, 97.5))
    return float(low), float(high)


@cache
def _resample_weights(count: int) -> np.ndarray:
    """Returns the weight of each task in each resample, ``(RESAMPLES, count)``."""
    return np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=RESAMPLES) / count
