"""The plot of a run: its adaptation at meta-test, and beside it its training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from maml.record.labels import metric_label
from maml.record.style import COMPLETE, REDUCED, count_steps, log_ticks, save, style
from maml.types import FIRST_STEP

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_NUM_POINTS = 200  # most points of a training curve


@style()
def plot_report(report: Mapping[str, Any], path: Path, metrics: Sequence[Mapping[str, Any]] = ()) -> Path:
    """Plots the headline metric against gradient steps or showings, one line per K with its 95 % interval.

    Args:
        report: the content of ``report.json``.
        path: path of the PNG.
        metrics: the lines of ``metrics.jsonl``; the training curve is left out if they give fewer than two points.

    Returns:
        The path of the PNG.
    """
    from matplotlib.figure import Figure  # imported here because it takes half a second

    name, points = training_curve(metrics, report["headline_metric"])
    is_trained = len(points) > 1
    figure = Figure(figsize=(6 if is_trained else 3.25, 2.6), layout="constrained")
    adaptation, *training = figure.subplots(1, 2 if is_trained else 1, squeeze=False)[0]
    is_complete = report["iteration"] == report["num_iterations"]
    measured_by = report.get("measured_by", "gradient step")
    line, suffix = (COMPLETE, "") if is_complete else (REDUCED, ", reduced budget")
    for curve in report["curves"]:
        if curve["metric"] != report["headline_metric"]:
            continue
        finite = [step for step in curve["steps"] if step["ci95"] is not None]  # None: adaptation diverged
        steps, means, bands = ([step[key] for step in finite] for key in ("step", "mean", "ci95"))
        steps = [FIRST_STEP[measured_by] + step for step in steps]
        adaptation.plot(steps, means, label=f"K={curve['num_shots']}{suffix}", **line)
        low, high = ([mean + sign * band for mean, band in zip(means, bands, strict=True)] for sign in (-1, 1))
        adaptation.fill_between(steps, low, high, alpha=0.2, lw=0)
    count_steps(adaptation, measured_by)
    adaptation.set_ylabel(metric_label(report["headline_metric"]))
    adaptation.set_title("meta-test, with 95 % intervals")
    adaptation.legend()
    for axes in training:
        _plot_training(axes, name, points)
    done = f"{report['iteration']:,} of {report['num_iterations']:,} iterations"
    figure.suptitle(report["experiment"] if is_complete else f"{report['experiment']}, {done}")
    save(figure, path)
    return path


def _plot_training(axes: Axes, name: str, points: Sequence[tuple[float, float]]) -> None:
    x, y = zip(*points, strict=True)
    is_log = name == "loss" and min(y) > 0
    axes.plot(x, y)
    axes.set_yscale("log" if is_log else "linear")
    if is_log:
        log_ticks(axes)
    axes.locator_params(axis="x", nbins=5, integer=True)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("iterations")
    axes.set_ylabel(f"{name} of the meta-batch" + (" (log axis)" if is_log else ""))
    axes.set_title("training")


def training_curve(metrics: Sequence[Mapping[str, Any]], metric: str) -> tuple[str, list[tuple[float, float]]]:
    """Returns the training's curve that is closest to a metric of meta-test.

    Args:
        metrics: the lines of ``metrics.jsonl``.
        metric: the metric of meta-test.

    Returns:
        The name of the quantity, which is the loss if the metric itself is not logged, and its points (iteration,
        value). Neighbouring points are averaged so that at most 200 are left.
    """
    known = metrics[0] if metrics else {}
    names = metric, metric.partition("_")[0]  # accuracy_transductive is logged as accuracy
    name = next((each for each in names if each in known), "loss")
    found = [(line["iteration"], line[name]) for line in metrics if line.get(name) is not None]
    width = math.ceil(len(found) / _NUM_POINTS) or 1
    groups = (np.array(found[start : start + width], float) for start in range(0, len(found), width))
    return name, [(float(x), float(y)) for x, y in (group.mean(0) for group in groups)]
