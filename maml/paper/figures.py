"""The paper's figures with our curves over the ranges that the printed ones may have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maml.paper.cells import Curve, Figure
from maml.paper.runs import Evidence, Report, provenance


@dataclass(frozen=True)
class Drawn:
    """A curve as it is drawn.

    Attributes:
        curve: with the paper's ranges.
        label: of our line; says so when nothing, or not everything, was run.
        readings: our mean and half-width of its 95 % interval at each gradient step; empty if nothing was run.
    """

    curve: Curve
    label: str
    readings: list[tuple[float, float]]


def drawn(curve: Curve, evidence: Evidence) -> Drawn:
    """Returns a curve with what has been run of it."""
    note = ", ".join(filter(None, [evidence.state, evidence.progress]))
    label = f"{curve.row}, ours" if evidence.complete else f"{curve.row}, ours: {note}"
    return Drawn(curve, label, curve_readings(curve, evidence.evaluated[0][1]) if evidence.evaluated else [])


def curve_readings(curve: Curve, report: Report) -> list[tuple[float, float]]:
    """Returns mean and half-width of the 95 % interval at each gradient step."""
    return [report.reading(curve.source, step) for step in range(curve.num_steps + 1)]


def figure_rows(curve: Curve, evidence: Evidence) -> list[dict[str, Any]]:
    """Returns one row per gradient step, for the CSV."""
    readings: Sequence[tuple[Any, Any]] = drawn(curve, evidence).readings or [("", "")] * (curve.num_steps + 1)
    beside = {"state": evidence.state} | provenance(curve.source, evidence)
    rows = []
    for step, (ours, ci) in enumerate(readings):
        low, high = curve.levels.get(step, ("", ""))
        levels = {"paper_low": low, "paper_high": high}
        where = {"curve": curve.row, "num_shots": curve.source.num_shots, "grad_step": step}
        rows.append(where | levels | {"ours": ours, "ours_ci95": ci} | beside)
    return rows


def plot_figure(figure: Figure, curves: Sequence[Drawn], path: Path) -> Path:
    """Draws our curves with 95 % bands over bars for the paper's ranges, a panel for each K; returns the file."""
    from matplotlib.figure import Figure as Canvas  # here, because it takes half a second to import

    panels: dict[int, list[Drawn]] = {}
    for item in curves:
        panels.setdefault(item.curve.source.num_shots, []).append(item)
    canvas = Canvas(figsize=(5.5 * len(panels), 4.5), layout="constrained")
    grid = canvas.subplots(1, len(panels), squeeze=False, sharey=True)
    for axes, (num_shots, items) in zip(grid.flat, panels.items(), strict=True):
        axes.use_sticky_edges = False  # else the axis would end at the bottom of the lowest bar
        num_steps = max(item.curve.num_steps for item in items)
        for number, item in enumerate(items):
            colour = f"C{number}"
            low, high = zip(*item.curve.levels.values(), strict=True)
            heights = [top - bottom for bottom, top in zip(low, high, strict=True)]
            label = f"{item.curve.row}, paper's image"
            axes.bar(list(item.curve.levels), heights, 0.3, low, color=colour, edgecolor=colour, alpha=0.5, label=label)
            readings = item.readings if item.curve.num_steps else item.readings * (num_steps + 1)
            means = [mean for mean, _ in readings]
            axes.plot(range(len(means)), means, color=colour, marker="o", markersize=3, label=item.label)
            bottom, top = ([mean + sign * band for mean, band in readings] for sign in (-1, 1))
            axes.fill_between(range(len(means)), bottom, top, color=colour, alpha=0.2, lw=0)
        axes.set_xlabel("gradient steps")
        axes.set_title(f"K={num_shots}")
        axes.legend(fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.15))  # below, off all curves
    grid[0, 0].set_ylabel(figure.ylabel)
    canvas.suptitle(figure.title)
    canvas.savefig(path, dpi=150, metadata={"Software": None})  # equal bytes from equal numbers
    return path
