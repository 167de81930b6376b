"""The mean over runs, with a 95 % interval that covers the choice of test tasks and the luck of training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# 97.5 % quantiles of Student's t for 2, 3, ... 30 degrees of freedom.
_STUDENT_T = (
    4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
    2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
_NORMAL = 1.96
MIN_RUNS = 3  # fewer say too little about how much trainings differ


@dataclass(frozen=True)
class Statistics:
    """A number measured in one or several runs.

    Attributes:
        mean: mean over runs; nan if adaptation diverged in one of them.
        ci95: half-width of the 95 % interval. From `MIN_RUNS` runs on it covers test tasks and trainings, before that
            test tasks alone.
        tasks_ci95: half-width of the 95 % interval over test tasks alone.
        means: the mean of each run.
    """

    mean: float
    ci95: float
    tasks_ci95: float
    means: tuple[float, ...]

    @property
    def num_runs(self) -> int:
        """The number of runs."""
        return len(self.means)

    @property
    def lowest(self) -> float:
        """The lowest mean of a run; nan if one diverged."""
        return float(np.min(self.means))

    @property
    def highest(self) -> float:
        """The highest mean of a run; nan if one diverged."""
        return float(np.max(self.means))


def combine(readings: Sequence[tuple[float, float]], values: np.ndarray | None = None) -> Statistics:
    """Combines the same number from several runs, which are evaluated on the same test tasks.

    The variance of the mean has two parts: that over tasks, of each task's mean over runs, divided by the number of
    tasks, as in the authors' code; and that over runs, of each run's mean, divided by the number of runs. The second
    part also has the noise of single values, which the first has already, so it is taken out. The interval is
    sqrt((1.96 s_tasks)^2 + (t s_runs)^2), where t is the quantile of Student's t for the number of runs.

    Args:
        readings: the mean of each run and the half-width of its 95 % interval over tasks.
        values: the value of each run and task, ``(runs, tasks)``. None if it is unknown which values belong to the
            same task, because the runs have different tasks or a file is missing; the interval
            then covers both kinds of chance, but is too wide.
    """
    means, intervals = (np.array(column, dtype=float) for column in zip(*readings, strict=True))
    num_runs, mean = len(means), float(means.mean())
    if num_runs == 1:
        return Statistics(mean, float(intervals[0]), float(intervals[0]), (mean,))
    noise = 0.0
    with np.errstate(invalid="ignore", over="ignore"):  # some runs may have diverged
        if values is None:
            tasks = float((intervals**2).mean())
        else:
            num_tasks = values.shape[1]
            tasks = float(_NORMAL**2 * values.mean(0).var() / num_tasks)
            residuals = values - values.mean(0) - values.mean(1, keepdims=True) + values.mean()
            noise = float((residuals**2).sum() / ((num_runs - 1) * (num_tasks - 1)) / (num_runs * num_tasks))
        trainings = 0.0
        if num_runs >= MIN_RUNS:
            trainings = student_t(num_runs - 1) ** 2 * max(0.0, float(means.var(ddof=1)) / num_runs - noise)
    return Statistics(mean, float(np.sqrt(tasks + trainings)), float(np.sqrt(tasks)), tuple(means.tolist()))


def student_t(degrees: int) -> float:
    """Returns the 97.5 % quantile of Student's t distribution, to 0.001, for two or more degrees of freedom."""
    index = degrees - 2
    return _STUDENT_T[index] if index < len(_STUDENT_T) else _NORMAL + 2.46 / degrees
