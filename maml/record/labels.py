"""Names of numbers for the reader: metrics, steps of a curve, and the axis that a curve is over."""

from __future__ import annotations

from maml.types import FIRST_STEP, MeasuredBy

AXIS: dict[MeasuredBy, str] = {"gradient step": "gradient steps", "showing": "showing of a class"}
_METRICS = {"mse": "mean squared error", "return": "average return"}


def metric_label(metric: str) -> str:
    """Returns the name of a metric of meta-test for the reader."""
    return _METRICS.get(metric, metric.replace("_", " "))


def in_percent(metric: str) -> bool:
    """Returns whether the metric is a share, which the paper and our pages print in percent."""
    return metric.startswith("accuracy")


def step_label(step: int, measured_by: MeasuredBy, width: int = 1) -> str:
    """Returns the name of a step of a curve for the reader: ``step 1``; by showing, ``showing 2``.

    Args:
        step: its number in a report, from 0.
        measured_by: what the curve is over.
        width: least number of characters of the number.
    """
    return f"{measured_by.split()[-1]} {FIRST_STEP[measured_by] + step:{width}d}"


def number_label(metric: str, num_shots: int, step: int, measured_by: MeasuredBy, num_tasks: int) -> str:
    """Returns the name of a number, with all that its meaning depends on: ``mse (K=10, step 10, n=600)``.

    Args:
        metric: its metric.
        num_shots: K, the number of examples in adaptation.
        step: its step in the report, from 0.
        measured_by: what the curve is over.
        num_tasks: the number of test tasks.
    """
    return f"{metric} (K={num_shots}, {step_label(step, measured_by)}, n={num_tasks})"
