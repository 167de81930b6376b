"""The paper's figures: our curves over the published curves, or over ranges that were read off the printed ones."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from maml.paper.cells import METHODS, Curve, Figure
from maml.paper.evidence import Evidence, measured_by, provenance
from maml.paper.plan import WATERMARK
from maml.paper.tables import Comparison, judge_runs, reason_for, verdict_markdown
from maml.record.statistics import MIN_RUNS, Statistics
from maml.record.style import COLUMN, COMPLETE, GRAY, PAGE, REDUCED, count_steps, save, style
from maml.types import FIRST_STEP

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

NOTE = (
    "Curves are means over runs. Bands are 95 % intervals unless stated otherwise; they cover test tasks and, if there "
    f"are at least {MIN_RUNS} runs, trainings. Figures 2, 4 (bottom) and 7 show single tasks after the first training. "
    "A curve is reproduced if all steps with a published value are; otherwise it has the verdict of the last step that "
    "is not."
)

_SUFFIXES = (".png", ".pdf", ".svg")  # each picture is written as each of these
_RESAMPLES = 5000  # the number in the authors' plots
_LINEAR_WITHIN = 2  # a symlog axis is linear between minus this and this
_PAPER: dict[str, Any] = {"ls": (0, (1, 1.2))}  # colours stand for methods, line styles for whose curve it is
_POINTS: dict[str, Any] = {"ls": "", "marker": "D", "markerfacecolor": "none", "markersize": 6, "zorder": 3}


@dataclass(frozen=True)
class DrawnCurve:
    """A curve with our numbers, ready to draw.

    Attributes:
        curve: the published curve.
        readings: our mean over runs and the half-width of its 95 % interval, at each gradient step; empty if nothing
            was run.
        intervals: the 68 % interval of our mean over test tasks, at each gradient step, if exact means are published;
            else empty.
        num_runs: the number of runs behind the readings.
        missing: what our line lacks, as text: the state without readings, or the iterations done of a reduced budget.
            Empty if training is complete.
    """

    curve: Curve
    readings: Sequence[tuple[float, float]]
    intervals: Sequence[tuple[float, float]] = ()
    num_runs: int = 1
    missing: str = ""

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
        """The verdict at each gradient step; ``measured`` if the printed value could not be read off the image."""
        return [self._at(step) for step in range(self.curve.num_steps + 1)]

    @property
    def verdict(self) -> str:
        """``reproduced`` if all judged steps are; else the verdict of the last step that is not reproduced.

        ``measured`` if no step could be judged.
        """
        judged = [verdict for verdict in self.steps if verdict != "measured"]
        if not judged:
            return "measured"
        return next((verdict for verdict in reversed(judged) if verdict != "reproduced"), "reproduced")

    @property
    def reason(self) -> str:
        """The result of `reason_for`."""
        return reason_for(self.verdict, self.curve.note)

    @property
    def text(self) -> str:
        """The verdict in Markdown; if not all steps are reproduced, with the number of those that are."""
        text = verdict_markdown(self.verdict, self.reason, "notes.md")
        if self.verdict not in ("better", "worse"):
            return text
        judged = [verdict for verdict in self.steps if verdict != "measured"]
        return f"{text} ({judged.count('reproduced')} of {len(judged)} steps reproduced)"

    def _at(self, step: int) -> str:
        if self.curve.cells:
            return Comparison(self.curve.cells[step], self.evidence).verdict
        if not self.evidence.complete:
            return self.evidence.state
        if step not in self.curve.levels:
            return "measured"
        (low, high), found = self.curve.levels[step], self.evidence.statistics(self.curve.source, step)
        assert found is not None
        larger_is_better = self.evidence.evaluated[0][1].larger_is_better
        # The printed mean may lie anywhere in the range, so it is enough that the intervals overlap.
        half = (high - low) / 2
        wider = replace(found, ci95=found.ci95 + half, tasks_ci95=found.tasks_ci95 + half)
        return judge_runs(wider, (low + high) / 2, 0.0, larger_is_better)


def prepare_curve(curve: Curve, evidence: Evidence) -> DrawnCurve:
    """Joins a published curve with our numbers.

    Raises:
        MamlError: if ``tasks.csv`` is needed for 68 % intervals, but is missing or damaged.
    """
    if not evidence.evaluated:
        return DrawnCurve(curve, [], missing=evidence.state)
    found = curve_statistics(curve, evidence)
    intervals = [
        bootstrap_interval(evidence.per_task_or_first(curve.source, cell.step).mean(0)) for cell in curve.cells
    ]
    readings = [(each.mean, each.ci95) for each in found]
    return DrawnCurve(curve, readings, intervals, found[0].num_runs, evidence.progress)


def curve_statistics(curve: Curve, evidence: Evidence) -> list[Statistics]:
    """Returns our mean over runs and its intervals at each gradient step; empty if nothing was evaluated."""
    every = (evidence.statistics(curve.source, step) for step in range(curve.num_steps + 1))
    return [found for found in every if found is not None]


def bootstrap_interval(values: np.ndarray) -> tuple[float, float]:
    """Returns the mean's 68 % bootstrap interval, as in the paper's bands (docs/protocol.md#figures-4-and-5)."""
    indices = np.random.default_rng(0).integers(len(values), size=(_RESAMPLES, len(values)))
    low, high = np.percentile(values[indices].mean(1), (16, 84))
    return float(low), float(high)


def figure_rows(curve: Curve, evidence: Evidence, item: DrawnCurve) -> list[dict[str, Any]]:
    """Returns one row per gradient step or showing, for the CSV; ``item`` is what `prepare_curve` returned."""
    nothing = [(None, None)] * (curve.num_steps + 1)
    origin, found = provenance(curve.source, evidence), curve_statistics(curve, evidence)
    rows, verdicts, kind = [], CurveComparison(curve, evidence).steps, measured_by(curve.source)
    place = "showing" if kind == "showing" else "grad_step"
    for step, (ours, ci) in enumerate(item.readings or nothing):
        low, high = curve.levels.get(step, (None, None))
        row: dict[str, Any] = {"curve": curve.row, "num_shots": curve.source.num_shots, place: FIRST_STEP[kind] + step}
        if curve.cells:
            cell, (our_low, our_high) = curve.cells[step], (item.intervals or nothing)[step]
            row = {"panel": curve.panel} | row
            row |= {"paper": cell.value, "paper_ci95": cell.ci, "paper_low68": low, "paper_high68": high}
            row |= {"plotted_in_paper": "yes" if curve.is_plotted else "no"}
            row |= {"ours": ours, "ours_ci95": ci, "ours_low68": our_low, "ours_high68": our_high}
        else:
            row |= {"paper_low": low, "paper_high": high, "ours": ours, "ours_ci95": ci}
        row |= {"verdict": verdicts[step], "num_runs": found[step].num_runs if found else 0}
        row |= {"lowest_run": found[step].lowest if found else None}
        row |= {"highest_run": found[step].highest if found else None}
        rows.append(row | origin)
    return rows


@style()
def plot_figure(figure: Figure, curves: Sequence[DrawnCurve], path: Path) -> Path:
    """Plots our curves and bands over the published ones, panel by panel; returns the PNG.

    The panels stand in one row, and one legend below them names what is drawn. A curve that lacks runs or iterations
    is named below its panel.

    Args:
        figure: the figure.
        curves: its curves.
        path: path of the PNG; the PDF and the SVG are written beside it.
    """
    from matplotlib.figure import Figure as Canvas  # imported here because it takes half a second

    panels: dict[str, list[DrawnCurve]] = {}
    for item in curves:
        if item.curve.is_plotted:
            panels.setdefault(item.curve.panel, []).append(item)
    has_numbers = any(item.curve.cells for item in curves)
    canvas = Canvas(figsize=(COLUMN, 2.5) if len(panels) == 1 else (PAGE, 2.35), layout="constrained")
    # Panels with exact numbers show different environments, whose returns have different ranges.
    (grid,) = canvas.subplots(1, len(panels), squeeze=False, sharey=not has_numbers)
    shown = [item.curve.name for items in panels.values() for item in items]
    colours = {name: f"C{number}" for number, name in enumerate(dict.fromkeys([*METHODS.values(), *shown]))}
    for axes, (title, items) in zip(grid, panels.items(), strict=True):
        axes.use_sticky_edges = False  # otherwise the axis would end at the bottom of the lowest bar
        num_steps = max(item.curve.num_steps for item in items)
        for item in items:
            _plot_curve(axes, item, num_steps, colours[item.curve.name], FIRST_STEP[figure.measured_by])
        _set_axes(axes, figure.axes)
        count_steps(axes, figure.measured_by)
        if len(panels) > 3:  # narrow panels
            axes.set_title(title.replace(", ", ",\n", 1), fontsize=7)
        else:
            axes.set_title(title)
        _explain_missing(axes, items)
        if has_numbers or axes is grid[0]:
            axes.set_ylabel(f"{figure.ylabel} (symlog axis)" if axes.get_yscale() == "symlog" else figure.ylabel)
    handles = legend_handles([item for items in panels.values() for item in items], colours)
    canvas.legend(handles=handles, loc="outside lower center", ncols=2 if len(panels) == 1 else len(handles))
    save_figure(canvas, figure.title, path)
    return path


def save_figure(canvas: Canvas, title: str, path: Path) -> None:
    """Writes a figure as PNG, PDF and SVG. A smoke test has its warning above the picture.

    Args:
        canvas: the picture.
        title: title of the figure, which is left to the caption.
        path: path of the PNG.
    """
    if title.startswith(WATERMARK):
        canvas.suptitle(WATERMARK)
    save(canvas, *(path.with_suffix(suffix) for suffix in _SUFFIXES))


def legend_handles(curves: Iterable[DrawnCurve], colours: Mapping[str, str]) -> list[Artist]:
    """Returns the entries of a figure's legend: the methods by colour, then whose curve a line is.

    Nothing is named that is not drawn. A method's entry has its number of runs if that is more than one.
    """
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    curves, handles = list(curves), list[Any]()
    for name, colour in colours.items():
        of_method = [item for item in curves if item.curve.name == name]
        if any(item.readings or item.curve.levels for item in of_method):
            counts = [item.num_runs for item in of_method if item.readings] or [0]
            least, most = min(counts), max(counts)
            runs = "" if most < 2 else f" ({most} runs)" if least == most else f" ({least} to {most} runs)"
            handles.append(Line2D([], [], color=colour, lw=3, solid_capstyle="butt", label=f"{name}{runs}"))
    if any(item.curve.cells for item in curves):
        handles.append(Line2D([], [], color=GRAY, label="paper", **_PAPER))
    elif any(item.curve.points for item in curves):
        handles.append(Line2D([], [], color=GRAY, label="published", **_POINTS))
    elif any(item.curve.levels for item in curves):
        handles.append(Patch(facecolor=GRAY, alpha=0.5, label="paper, read off its image"))
    for label, reduced, line in (("ours", False, COMPLETE), ("ours, reduced budget", True, REDUCED)):
        if any(item.readings and bool(item.missing) == reduced for item in curves):
            handles.append(Line2D([], [], color=GRAY, label=label, **line))
    return handles


def _explain_missing(axes: Axes, items: Sequence[DrawnCurve]) -> None:
    """Names below a panel the curves of ours that are missing or have a reduced budget."""
    lines = [f"{item.curve.name}: {item.missing}" for item in items if item.readings and item.missing]
    absent: dict[str, list[str]] = {}
    for item in items:
        if not item.readings:
            absent.setdefault(item.missing, []).append(item.curve.name)
    for state, names in absent.items():
        text = f"ours {state}" + ("" if len(names) == len(items) else f": {', '.join(names)}")
        lines += textwrap.wrap(text, 30)
    place: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points", "ha": "center", "va": "top"}
    axes.annotate("\n".join(lines), (0.5, 0), (0, -25), fontsize=6, color=GRAY, **place)


def _plot_curve(axes: Axes, item: DrawnCurve, num_steps: int, colour: str, first: int) -> None:
    # A method that does not adapt has one value, which is repeated to give a flat line.
    curve, times = item.curve, 1 if item.curve.num_steps else num_steps + 1
    if curve.cells:
        published = [float(cell.value) for cell in curve.cells]
        bands = [*curve.levels.values()]
        _plot_line(axes, first, published * times, bands * times, color=colour, label=f"{curve.name}, paper", **_PAPER)
    elif curve.points:
        places, values = [first + step for step in curve.points], [float(value) for value in curve.points.values()]
        axes.plot(places, values, color=colour, label=f"{curve.name}, paper", **_POINTS)
    elif curve.levels:
        low, high = zip(*curve.levels.values(), strict=True)
        heights = [top - bottom for bottom, top in zip(low, high, strict=True)]
        axes.bar(list(curve.levels), heights, 0.3, low, color=colour, edgecolor=colour, alpha=0.5)
    if item.readings:
        line = REDUCED if item.missing else COMPLETE
        label = f"{curve.name}, ours"
        _plot_line(axes, first, item.means * times, item.bands * times, color=colour, label=label, **line)


def _plot_line(
    axes: Axes, first: int, means: Sequence[float], bands: Sequence[tuple[float, float]], **line: Any
) -> None:
    steps = range(first, first + len(means))
    axes.plot(steps, means, **line)
    bottom, top = ([band[side] for band in bands] for side in (0, 1))
    axes.fill_between(steps, bottom, top, color=line["color"], alpha=0.18, lw=0)


def _set_axes(axes: Axes, settings: Mapping[str, Any]) -> None:
    """Applies the figure's axes settings; the limits are widened if a curve exceeds them."""
    settings = {"yscale": "linear", **settings}
    scale = settings.pop("yscale")
    axes.set_yscale(scale, **({"linthresh": _LINEAR_WITHIN} if scale == "symlog" else {}))
    axes.set(**settings)
    if "ylim" in settings:
        lowest, highest = settings["ylim"]
        axes.set_ylim(min(lowest, axes.dataLim.ymin), max(highest, axes.dataLim.ymax))
    if scale == "symlog":
        from matplotlib.ticker import NullLocator, SymmetricalLogLocator

        axes.yaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=_LINEAR_WITHIN, subs=[1, 2, 5]))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter("{x:g}")
