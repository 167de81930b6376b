"""The paper's figures: our curves over the published curves, or over ranges that were read off the printed ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from maml.paper.cells import Curve, Figure, Source
from maml.paper.evidence import Evidence, provenance
from maml.paper.tables import Comparison, reason_for, status_markdown, verdict
from maml.record.checkpoint import write_atomically
from maml.record.statistics import Statistics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

_RESAMPLES = 5000  # the number in the authors' plots


@dataclass(frozen=True)
class DrawnCurve:
    """A curve with our numbers, ready to draw.

    Attributes:
        curve: the published curve.
        label: label of our line, which also tells if runs are missing or incomplete.
        readings: our mean over runs and the half-width of its 95 % interval, at each gradient step; empty if nothing
            was run.
        intervals: the 68 % interval of our mean over test tasks, at each gradient step, if exact means are published;
            else empty.
    """

    curve: Curve
    label: str
    readings: Sequence[tuple[float, float]]
    intervals: Sequence[tuple[float, float]] = ()

    @property
    def means(self) -> list[float]:
        """Our mean at each gradient step."""
        return [mean for mean, _ in self.readings]

    @property
    def bands(self) -> list[tuple[float, float]]:
        """The lower and upper end of our band at each gradient step."""
        return list(self.intervals) or [(mean - ci, mean + ci) for mean, ci in self.readings]


@dataclass(frozen=True)
class CurveComparison:
    """A published curve and our runs of it."""

    curve: Curve
    evidence: Evidence

    @property
    def steps(self) -> list[str]:
        """The status at each gradient step; ``measured`` if the printed value could not be read off the image."""
        return [self._at(step) for step in range(self.curve.num_steps + 1)]

    @property
    def status(self) -> str:
        """``reproduced`` if all judged steps are; else the status of the last step that is not reproduced."""
        judged = [status for status in self.steps if status != "measured"]
        return next((status for status in reversed(judged) if status != "reproduced"), "reproduced")

    @property
    def reason(self) -> str:
        """The result of `reason_for`."""
        return reason_for(self.status, self.curve.note)

    @property
    def text(self) -> str:
        """The status in Markdown; if not all steps are reproduced, with the number of those that are."""
        text = status_markdown(self.status, self.reason, "notes.md")
        if self.status not in ("better", "worse"):
            return text
        judged = [status for status in self.steps if status != "measured"]
        return f"{text} ({judged.count('reproduced')} of {len(judged)} steps reproduced)"

    def _at(self, step: int) -> str:
        if self.curve.cells:
            return Comparison(self.curve.cells[step], self.evidence).status
        if not self.evidence.complete:
            return self.evidence.state
        if step not in self.curve.levels:
            return "measured"
        (low, high), found = self.curve.levels[step], self.evidence.statistics(self.curve.source, step)
        assert found is not None
        larger_is_better = self.evidence.evaluated[0][1].larger_is_better
        # The printed mean may lie anywhere in the range, so it is enough that the intervals overlap.
        return verdict(found.mean, found.ci95 + (high - low) / 2, (low + high) / 2, 0.0, larger_is_better)


def prepare_curve(curve: Curve, evidence: Evidence) -> DrawnCurve:
    """Joins a published curve with our numbers.

    Raises:
        MamlError: if ``tasks.csv`` is needed for 68 % intervals, but is missing or damaged.
    """
    note = ", ".join(filter(None, [evidence.state, evidence.progress]))
    if not evidence.evaluated:
        return DrawnCurve(curve, f"{curve.row}, ours: {note}", [])
    found = curve_statistics(curve, evidence)
    if evidence.complete:
        note = f"{found[0].num_runs} runs" if found[0].num_runs > 1 else ""
    intervals = [bootstrap_interval(_mean_per_task(curve.source, cell.step, evidence)) for cell in curve.cells]
    readings = [(each.mean, each.ci95) for each in found]
    return DrawnCurve(curve, ": ".join(filter(None, [f"{curve.row}, ours", note])), readings, intervals)


def curve_statistics(curve: Curve, evidence: Evidence) -> list[Statistics]:
    """Returns our mean over runs and its intervals at each gradient step; empty if nothing was evaluated."""
    every = (evidence.statistics(curve.source, step) for step in range(curve.num_steps + 1))
    return [found for found in every if found is not None]


def _mean_per_task(source: Source, step: int, evidence: Evidence) -> np.ndarray:
    """Returns the mean over runs of each task's value, ``(tasks,)``.

    Raises:
        MamlError: if the values of a run are missing or damaged.
    """
    values = evidence.per_task(source, step)
    if values is None:  # on different tasks: the first run stands for all
        return evidence.evaluated[0][1].per_task(source, step)
    return values.mean(0)


def bootstrap_interval(values: np.ndarray) -> tuple[float, float]:
    """Returns the mean's 68 % bootstrap interval, as in the paper's bands (docs/protocol.md#figures-4-and-5)."""
    indices = np.random.default_rng(0).integers(len(values), size=(_RESAMPLES, len(values)))
    low, high = np.percentile(values[indices].mean(1), (16, 84))
    return float(low), float(high)


def figure_rows(curve: Curve, evidence: Evidence) -> list[dict[str, Any]]:
    """Returns one row per gradient step, for the CSV."""
    item, nothing = prepare_curve(curve, evidence), [(None, None)] * (curve.num_steps + 1)
    origin, found = provenance(curve.source, evidence), curve_statistics(curve, evidence)
    rows, statuses = [], CurveComparison(curve, evidence).steps
    for step, (ours, ci) in enumerate(item.readings or nothing):
        low, high = curve.levels.get(step, (None, None))
        row: dict[str, Any] = {"curve": curve.row, "num_shots": curve.source.num_shots, "grad_step": step}
        if curve.cells:
            cell, (our_low, our_high) = curve.cells[step], (item.intervals or nothing)[step]
            row = {"panel": curve.panel} | row
            row |= {"paper": cell.value, "paper_ci95": cell.ci, "paper_low68": low, "paper_high68": high}
            row |= {"plotted_in_paper": "yes" if curve.is_plotted else "no"}
            row |= {"ours": ours, "ours_ci95": ci, "ours_low68": our_low, "ours_high68": our_high}
        else:
            row |= {"paper_low": low, "paper_high": high, "ours": ours, "ours_ci95": ci}
        row |= {"status": statuses[step], "num_runs": found[step].num_runs if found else 0}
        row |= {"lowest_run": found[step].lowest if found else None}
        row |= {"highest_run": found[step].highest if found else None}
        rows.append(row | origin)
    return rows


def plot_figure(figure: Figure, curves: Sequence[DrawnCurve], path: Path) -> Path:
    """Plots our curves and bands over the published ones, panel by panel; writes a PNG and a PDF, returns the PNG."""
    from matplotlib.figure import Figure as Canvas  # imported here because it takes half a second

    panels: dict[str, list[DrawnCurve]] = {}
    for item in curves:
        panels.setdefault(item.curve.panel, []).append(item)
    num_columns = 2 if len(panels) > 3 else len(panels)
    num_rows = math.ceil(len(panels) / num_columns)
    canvas = Canvas(figsize=(5.5 * num_columns, 4.5 * num_rows), layout="constrained")
    # Panels with exact numbers show different environments, whose returns have different ranges.
    grid = canvas.subplots(num_rows, num_columns, squeeze=False, sharey=not any(item.curve.cells for item in curves))
    for axes, (title, items) in zip(grid.flat, panels.items(), strict=True):
        axes.use_sticky_edges = False  # otherwise the axis would end at the bottom of the lowest bar
        num_steps = max(item.curve.num_steps for item in items)
        for number, item in enumerate(items):
            if item.curve.is_plotted:
                _plot_curve(axes, item, num_steps, f"C{number}")
        _set_axes(axes, figure.axes)
        axes.set_xlabel("gradient steps")
        axes.set_title(title)
        axes.legend(fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.15))  # below the curves
    for axes in grid[:, 0]:
        axes.set_ylabel(figure.ylabel)
    canvas.suptitle(figure.title)
    return save(canvas, path)


def save(canvas: Canvas, path: Path) -> Path:
    """Writes a PNG and a PDF, without a date so that equal numbers give equal bytes. Returns the PNG's path."""
    pdf = path.with_suffix(".pdf"), {"CreationDate": None, "Creator": None, "Producer": None}
    for file, metadata in ((path, {"Software": None}), pdf):
        drawn = partial(canvas.savefig, format=file.suffix[1:], dpi=150, metadata=metadata)
        write_atomically(file, drawn)
    return path


def _plot_curve(axes: Axes, item: DrawnCurve, num_steps: int, colour: str) -> None:
    # A method that does not adapt has one value, which is repeated to give a flat line.
    curve, times = item.curve, 1 if item.curve.num_steps else num_steps + 1
    if curve.cells:
        published = [float(cell.value) for cell in curve.cells]
        _plot_line(
            axes,
            published * times,
            [*curve.levels.values()] * times,
            color=colour,
            ls="--",
            label=f"{curve.row}, paper",
        )
    else:
        low, high = zip(*curve.levels.values(), strict=True)
        heights = [top - bottom for bottom, top in zip(low, high, strict=True)]
        label = f"{curve.row}, paper's image"
        axes.bar(list(curve.levels), heights, 0.3, low, color=colour, edgecolor=colour, alpha=0.5, label=label)
    _plot_line(axes, item.means * times, item.bands * times, color=colour, marker="o", markersize=3, label=item.label)


def _plot_line(axes: Axes, means: Sequence[float], bands: Sequence[tuple[float, float]], **style: Any) -> None:
    steps = range(len(means))
    axes.plot(steps, means, **style)
    bottom, top = ([band[side] for band in bands] for side in (0, 1))
    axes.fill_between(steps, bottom, top, color=style["color"], alpha=0.2, lw=0)


def _set_axes(axes: Axes, settings: Mapping[str, Any]) -> None:
    """Applies the figure's axes settings; the limits are widened if a curve exceeds them."""
    axes.set(**settings)
    if "ylim" in settings:
        lowest, highest = settings["ylim"]
        axes.set_ylim(min(lowest, axes.dataLim.ymin), max(highest, axes.dataLim.ymax))
    if axes.get_yscale() == "symlog":
        from matplotlib.ticker import SymmetricalLogLocator

        axes.yaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=2, subs=[1, 2, 5]))
        axes.yaxis.set_major_formatter("{x:g}")
