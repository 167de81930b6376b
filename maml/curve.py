"""The curve of a metric over gradient steps: its statistics for a report, and its rows of ``tasks.csv``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from maml.domain.base import Predictions
from maml.types import MeasuredBy


@dataclass(frozen=True)
class Curve:
    """One metric over gradient steps, or over showings, at one K.

    Attributes:
        num_shots: K.
        metric: the metric's name.
        values: the metric for each step and task, ``(num_steps + 1, tasks)``, float64. By showing, step s is showing
            s + 1, and the value is NaN in a task that has no such showing.
        predictions: what the query examples were taken for after the last step; only with ``per_class``, for the
            headline metric, and if adaptation diverged on no task.
        measured_by: what the curve is over.
    """

    num_shots: int
    metric: str
    values: Tensor
    predictions: Predictions | None = None
    measured_by: MeasuredBy = "gradient step"

    def summary(self) -> dict[str, Any]:
        """Returns the mean and the 95 % interval over tasks for each step, as a report holds them.

        The interval is mean +- 1.96 population std / sqrt(tasks), as in the authors' code. A mean or interval is None
        if it is not finite, because adaptation diverged on some task. By showing, the tasks that have no such showing
        are left out, and the mean is None if no task has it.
        """
        return {
            "num_shots": self.num_shots,
            "metric": self.metric,
            "steps": [
                {"step": step, "mean": _none_unless_finite(mean), "ci95": _none_unless_finite(ci95), "num_tasks": count}
                for step, (mean, ci95, count) in enumerate(zip(*self._statistics(), strict=True))
            ],
        }

    def _statistics(self) -> tuple[list[float], list[float], list[int]]:
        """Returns the mean, the half-width of its interval and the number of tasks for each step."""
        num_steps, count = self.values.shape
        if self.measured_by == "gradient step":
            half_width = 1.96 * self.values.std(1, correction=0) / math.sqrt(count)
            return self.values.mean(1).tolist(), half_width.tolist(), [count] * num_steps
        counts, means = (~self.values.isnan()).sum(1), self.values.nanmean(1)
        std = (self.values - means.unsqueeze(1)).square().nanmean(1).sqrt()
        return means.tolist(), (1.96 * std / counts.sqrt()).tolist(), counts.tolist()


def _none_unless_finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def per_task_rows(curves: list[Curve]) -> list[dict[str, Any]]:
    """Returns the rows of ``tasks.csv``: one per K, metric and task, with one column per gradient step, to 7 digits.

    By showing, the column ``step_1`` holds the 2nd showing. A task has no value at a showing that it lacks, or that
    only a larger K has.
    """
    rows, num_columns = [], max(len(curve.values) for curve in curves)
    for curve in curves:
        is_by_showing = curve.measured_by == "showing"
        for task, values in enumerate(curve.values.T.tolist()):
            columns: dict[str, float | None] = {f"step_{step}": None for step in range(num_columns)}
            columns |= {
                f"step_{step}": None if is_by_showing and math.isnan(value) else float(f"{value:.7g}")
                for step, value in enumerate(values)
            }
            rows.append({"num_shots": curve.num_shots, "metric": curve.metric, "task": task} | columns)
    return rows
