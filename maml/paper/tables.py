"""The paper's tables with our numbers beside the printed ones, and a verdict on each cell."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from maml.paper.cells import Cell, Source, Table
from maml.paper.runs import Evidence, provenance

STATUSES = ("reproduced", "better", "worse", "measured", "reduced budget", "running", "not run", "quoted")

_HEADER = ("row", "column", "paper", "ours", "status", "seeds", "inner order", "commit", "hardware", "command")
_NOTES = (
    "Mean ± half-width of the 95 % interval over test tasks. With several seeds it is that of the lowest; in brackets,",
    "their number and from where to where their means go. *reproduced*: the paper's value lies in our interval or ours",
    "in the paper's. *measured*: nothing is published to compare it with. *reduced budget*: training has not ended, so",
    "this is no reproduction. `+` behind a commit: with changes that were not committed. All numbers in full, the runs",
    "and their task banks: the CSV beside this file.",
)


@dataclass(frozen=True)
class Comparison:
    """A cell beside what has been run of it."""

    cell: Cell
    evidence: Evidence

    @property
    def ours(self) -> tuple[float, float] | None:
        """Our mean and half-width of its 95 % interval over tasks, from the lowest seed; None if there is none."""
        return self.by_seed[0] if self.by_seed else None

    @property
    def by_seed(self) -> list[tuple[float, float]]:
        """The same for every evaluated seed."""
        source = self.cell.source
        return [report.reading(source, self.cell.step) for _, report in self.evidence.evaluated] if source else []

    @property
    def spread(self) -> tuple[float, float] | None:
        """The lowest and the highest mean over seeds, nan if one diverged; None if there are no two seeds."""
        means = [mean for mean, _ in self.by_seed]
        return (float(np.min(means)), float(np.max(means))) if len(means) > 1 else None

    @property
    def status(self) -> str:
        """One of `STATUSES`."""
        if self.cell.quoted:
            return "quoted"
        if self.ours is None:
            return self.evidence.state
        if not self.evidence.complete:
            return "reduced budget"
        if not self.cell.value:
            return "measured"
        published, ci = float(self.cell.value), float(self.cell.ci or 0)
        return verdict(*self.ours, published, ci, self.evidence.evaluated[0][1].larger_is_better)


def verdict(ours: float, ours_ci: float, published: float, published_ci: float, larger_is_better: bool) -> str:
    """Judges a number that was trained to the end.

    Args:
        ours: our mean; nan, if adaptation diverged, is worse than anything.
        ours_ci: half-width of our 95 % interval.
        published: the printed value.
        published_ci: half-width of its interval; 0 if none is printed.
        larger_is_better: the metric's direction.

    Returns:
        ``reproduced`` if the printed value lies in our interval or ours in the printed one; else ``better``, ``worse``.
    """
    if abs(ours - published) <= max(ours_ci, published_ci):
        return "reproduced"
    return "better" if not math.isnan(ours) and (ours > published) == larger_is_better else "worse"


def reading_text(mean: float, ci95: float, decimals: int) -> str:
    """Returns mean and interval as they are printed."""
    return "diverged" if math.isnan(mean) else f"{mean:.{decimals}f} ± {ci95:.{decimals}f}"


def compare(tables: Sequence[Table], find: Callable[[Source], Evidence]) -> dict[str, list[Comparison]]:
    """Looks up every cell; returns the comparisons by table name."""
    return {
        table.name: [Comparison(cell, find(cell.source) if cell.source else Evidence()) for cell in table.cells]
        for table in tables
    }


def summary(comparisons: Iterable[Comparison]) -> str:
    """Returns one line that counts the cells of each status."""
    counts = Counter(comparison.status for comparison in comparisons)
    reproduced, *others = (f"{counts[status]} {status}" for status in STATUSES)
    return ", ".join([reproduced.replace(" ", f" of {counts.total()} cells "), *others])


def table_rows(comparisons: Sequence[Comparison]) -> list[dict[str, Any]]:
    """Returns one row per cell, in full precision, for the CSV."""
    rows = []
    for comparison in comparisons:
        cell = comparison.cell
        ours, ours_ci = comparison.ours or ("", "")
        lowest, highest = comparison.spread or ("", "")
        row: dict[str, Any] = {"row": cell.row, "column": cell.column, "paper": cell.value, "paper_ci95": cell.ci}
        row |= {"ours": ours, "ours_ci95": ours_ci, "status": comparison.status}
        row |= {"lowest_seed_mean": lowest, "highest_seed_mean": highest}
        rows.append(row | provenance(cell.source, comparison.evidence))
    return rows


def table_markdown(title: str, comparisons: Sequence[Comparison]) -> str:
    """Returns the table as Markdown."""
    lines = [f"# {title}", "", summary(comparisons) + ".", "", "| " + " | ".join(_HEADER) + " |"]
    lines += ["| " + " | ".join("---" for _ in _HEADER) + " |"]
    lines += ["| " + " | ".join(_markdown_row(comparison)) + " |" for comparison in comparisons]
    return "\n".join([*lines, "", *_NOTES, ""])


def headline_markdown(comparisons: Iterable[Comparison]) -> str:
    """Returns the numbers that have been run, one line each even if two tables print it: what a visitor sees first."""
    lines = ["| cell | paper | ours, 95 % interval | status | seeds | command |", "|" + " --- |" * 6]
    shown = set()
    for comparison in comparisons:
        number = comparison.cell.source, comparison.cell.step
        if comparison.ours and number not in shown:
            shown.add(number)
            row, column, paper, ours, status, seeds, *_, command = _markdown_row(comparison)
            cell = f"{comparison.cell.table}/{row}/{column}"
            lines.append(f"| {cell} | {paper} | {ours} | {status} | {seeds} | {command} |")
    return "\n".join(lines)


def _markdown_row(comparison: Comparison) -> list[str]:
    cell, beside = comparison.cell, provenance(comparison.cell.source, comparison.evidence)
    decimals = len(cell.value.partition(".")[2]) + 1  # one more than printed, so that a verdict can be checked
    seeds = beside["seeds"].replace(" ", ", ")
    if comparison.spread:
        lowest, highest = comparison.spread
        seeds += f" ({len(comparison.by_seed)}: {lowest:.{decimals}f} to {highest:.{decimals}f})"
    so_far = comparison.evidence.progress
    ours = reading_text(*comparison.ours, decimals) if comparison.ours else ""
    if so_far:
        ours = f"{ours} ({so_far})" if ours else so_far
    command = f"`{beside['command']}`" if cell.source else "" if cell.quoted else "no experiment yet"
    return [
        cell.row,
        cell.column,
        f"{cell.value} ± {cell.ci}" if cell.ci else cell.value,
        ours,
        comparison.status,
        seeds,
        str(beside["inner_order"]),
        beside["commit"],
        beside["hardware"],
        command,
    ]
