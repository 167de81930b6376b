"""Plots of evaluation reports."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from maml.record.checkpoint import write_atomically


def plot_report(report: Mapping[str, Any], path: Path) -> Path:
    """Plots the headline metric against gradient steps, one line per K with its 95 % interval; returns the PNG."""
    from matplotlib.figure import Figure  # imported here because it takes half a second

    figure = Figure(figsize=(5, 3.6), layout="constrained")
    axes = figure.subplots()
    for curve in report["curves"]:
        if curve["metric"] != report["headline_metric"]:
            continue
        finite = [step for step in curve["steps"] if step["ci95"] is not None]  # None: adaptation diverged
        steps, means, bands = ([step[key] for step in finite] for key in ("step", "mean", "ci95"))
        axes.plot(steps, means, marker="o", markersize=3, label=f"K={curve['num_shots']}")
        low, high = ([mean + sign * band for mean, band in zip(means, bands, strict=True)] for sign in (-1, 1))
        axes.fill_between(steps, low, high, alpha=0.2)
    axes.set_xlabel("gradient steps")
    axes.set_ylabel(report["headline_metric"].replace("_", " "))
    axes.set_title(report["experiment"])
    axes.legend()
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=150))
    return path
