"""The paper's tables with our numbers beside the printed ones, and a verdict on each cell."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from hydra.utils import get_class

from maml.config.compose import compose_experiment
from maml.paper.cells import Cell, Source, Table
from maml.record.index import Evidence, provenance

STATUSES = ("reproduced", "better", "worse", "measured", "reduced budget", "quoted", "running", "not run")
_ALWAYS_COUNTED = {"reproduced", "better", "worse", "reduced budget", "not run"}
# How they are marked in the paper's layout; the others are words.
SYMBOLS = {"reproduced": "=", "better": "△", "worse": "▽", "reduced budget": "○", "quoted": "†"}
NOTHING = "\N{EN DASH}"  # in a place where nothing is printed
NO_REASON = "no reason known yet"
REDUCED_BUDGET = "reduced-budget"  # the anchor of its section in results/notes.md

LEGEND = (
    "Below each row of the paper ours: mean ± half-width of the 95 % interval over test tasks, of the lowest seed; of "
    "several, below, their number and from where to where their means go. = reproduced: the paper's value lies in our "
    "interval or ours in the paper's; △ better; ▽ worse; ○ reduced budget: training has not ended, so this is no "
    "reproduction; † quoted by the paper from others. Bold, as in the paper: its own method, where nothing between the "
    "same two lines is better by more than the interval printed beside it."
)

_HEADER = ("row", "column", "paper", "ours", "status", "seeds", "inner order", "commit", "hardware", "command")
_NOTES = (
    "*measured*: nothing is published to compare with. A status that is a link leads to what is known of the reason.",
    "`+` behind a commit: with changes that were not committed. All numbers in full, the runs and their task banks:",
    "the CSV beside this file.",
)


class Judged(Protocol):
    """What has a status: a cell or a curve beside what has been run of it."""

    @property
    def status(self) -> str:
        """One of `STATUSES`."""


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

    @property
    def reason(self) -> str:
        """As `reason_for` has it."""
        return reason_for(self.status, self.cell.note)

    @property
    def decimals(self) -> int:
        """One more than printed, so that a verdict can be checked."""
        return len(self.cell.value.partition(".")[2]) + 1

    @property
    def spread_text(self) -> str:
        """The number of seeds and the spread of their means; empty if there are no two seeds."""
        if self.spread is None:
            return ""
        lowest, highest = self.spread
        return f"{len(self.by_seed)}: {lowest:.{self.decimals}f} to {highest:.{self.decimals}f}"


@dataclass(frozen=True)
class Row:
    """A row of the printed table.

    Attributes:
        row: its name in the paper's file.
        name: as printed.
        items: what stands in each column; None where nothing does.
    """

    row: str
    name: str
    items: Sequence[Comparison | None]

    @property
    def quoted(self) -> bool:
        """Whether the paper quotes it from others, so that there is nothing of ours."""
        return any(item.cell.quoted for item in self.items if item)

    @property
    def has_spread(self) -> bool:
        """Whether something in it was run with several seeds."""
        return any(item.spread for item in self.items if item)


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


def reason_for(status: str, note: str) -> str:
    """Returns why a number is missed: an anchor in ``results/notes.md``, or `NO_REASON`; empty if it is not missed."""
    if status == "reduced budget":
        return REDUCED_BUDGET
    return (note or NO_REASON) if status in ("better", "worse") else ""


def status_markdown(status: str, reason: str, notes: str) -> str:
    """Returns a status with the way to its reason; ``notes`` is where ``results/notes.md`` is for the reader."""
    if not reason:
        return status
    return f"{status}, {reason}" if reason == NO_REASON else f"[{status}]({notes}#{reason})"


def summary(judged: Iterable[Judged], things: str = "cells") -> str:
    """Returns one line that counts the cells, or other things, of each status."""
    counts = Counter(item.status for item in judged)
    shown = [f"{counts[name]} {name}" for name in STATUSES if counts[name] or name in _ALWAYS_COUNTED]
    return ", ".join([shown[0].replace(" ", f" of {counts.total()} {things} ", 1), *shown[1:]])


def bold_cells(table: Table) -> set[tuple[str, str]]:
    """Returns row and column of each number that the paper prints in bold.

    These are numbers of its own method than which none of the group is better, or not beyond the interval printed
    beside them: both of MiniImagenet's MAML are bold, and neither row is at the last step of Table 4.
    """
    if not table.layout.own:
        return set()
    source = next(cell.source for cell in table.cells if cell.source)
    domain: Any = get_class(compose_experiment(source.experiment, source.overrides).domain["_target_"])
    sign = 1 if domain.larger_is_better else -1
    bold = set()
    for group in table.layout.groups:
        for cell in table.cells:
            if cell.row in group and cell.row in table.layout.own:
                rivals = [o for o in table.cells if o.row in group and o.column == cell.column]
                ahead = max(sign * (float(rival.value) - float(cell.value)) for rival in rivals)
                if ahead <= (float(cell.ci or 0) if cell.ci_is_printed else 0):
                    bold.add((cell.row, cell.column))
    return bold


def table_rows(comparisons: Sequence[Comparison]) -> list[dict[str, Any]]:
    """Returns one row per cell, in full precision, for the CSV."""
    rows = []
    for comparison in comparisons:
        cell = comparison.cell
        ours, ours_ci = comparison.ours or ("", "")
        lowest, highest = comparison.spread or ("", "")
        row: dict[str, Any] = {"row": cell.row, "column": cell.column, "paper": cell.value, "paper_ci95": cell.ci}
        row |= {"ours": ours, "ours_ci95": ours_ci, "status": comparison.status, "reason": comparison.reason}
        row |= {"lowest_seed_mean": lowest, "highest_seed_mean": highest}
        rows.append(row | provenance(cell.source, comparison.evidence))
    return rows


def table_markdown(table: Table, comparisons: Sequence[Comparison]) -> str:
    """Returns the table in the paper's layout with ours below each row, and all that stands behind each cell."""
    lines = [f"# {table.title}", "", summary(comparisons) + ".", "", *_layout_markdown(table, comparisons), ""]
    lines += [LEGEND, "", "## Cell by cell", "", "| " + " | ".join(_HEADER) + " |"]
    lines += ["| " + " | ".join("---" for _ in _HEADER) + " |"]
    lines += ["| " + " | ".join(_markdown_row(comparison, "../notes.md")) + " |" for comparison in comparisons]
    return "\n".join([*lines, "", *_NOTES, ""])


def headline_markdown(comparisons: Iterable[Comparison], notes: str) -> str:
    """Returns the numbers that have been run, one line each even if two tables print it: what a visitor sees first.

    Args:
        comparisons: every cell's.
        notes: where ``results/notes.md`` is for the reader.
    """
    lines = ["| cell | paper | ours, 95 % interval | status | seeds | command |", "|" + " --- |" * 6]
    shown = set()
    for comparison in comparisons:
        number = comparison.cell.source, comparison.cell.step
        if comparison.ours and number not in shown:
            shown.add(number)
            row, column, paper, ours, status, seeds, *_, command = _markdown_row(comparison, notes)
            cell = f"{comparison.cell.table}/{row}/{column}"
            lines.append(f"| {cell} | {paper} | {ours} | {status} | {seeds} | {command} |")
    return "\n".join(lines)


def printed_value(cell: Cell) -> str:
    """Returns value and interval as the paper prints them."""
    return f"{cell.value} ± {cell.ci}" if cell.ci and cell.ci_is_printed else cell.value


def our_value(comparison: Comparison) -> str:
    """Returns our mean and interval with the verdict's symbol; without a number, what is the case."""
    if comparison.ours is None:
        return comparison.status
    text = reading_text(*comparison.ours, comparison.decimals)
    return f"{text} {SYMBOLS.get(comparison.status, '')}".strip()


def layout_rows(table: Table, comparisons: Sequence[Comparison]) -> list[list[Row]]:
    """Returns the rows of the printed table, in groups between two lines."""
    found = {(comparison.cell.row, comparison.cell.column): comparison for comparison in comparisons}
    return [
        [Row(row, name, [found.get((row, column)) for column in table.layout.columns]) for row, name in group.items()]
        for group in table.layout.groups
    ]


def _layout_markdown(table: Table, comparisons: Sequence[Comparison]) -> list[str]:
    layout, bold = table.layout, bold_cells(table)
    lines = [
        [layout.corner, *(" ".join(words) for words in layout.columns.values())],
        ["---"] * (len(layout.columns) + 1),
    ]
    for row in (row for group in layout_rows(table, comparisons) for row in group):
        printed = [printed_value(item.cell) or NOTHING if item else NOTHING for item in row.items]
        places = [(row.row, column) in bold for column in layout.columns]
        name = (
            f"**{row.name}**"
            if row.row in layout.own
            else f"{row.name} {SYMBOLS['quoted']}"
            if row.quoted
            else row.name
        )
        lines.append(
            [name, *(f"**{text}**" if is_bold else text for text, is_bold in zip(printed, places, strict=True))]
        )
        if not row.quoted:
            lines.append(["ours", *(our_value(item) if item else "" for item in row.items)])
        if row.has_spread:
            lines.append(["seeds", *(item.spread_text if item else "" for item in row.items)])
    return ["| " + " | ".join(line) + " |" for line in lines]


def _markdown_row(comparison: Comparison, notes: str) -> list[str]:
    cell, beside = comparison.cell, provenance(comparison.cell.source, comparison.evidence)
    seeds = beside["seeds"].replace(" ", ", ")
    if comparison.spread:
        seeds += f" ({comparison.spread_text})"
    so_far = comparison.evidence.progress
    ours = reading_text(*comparison.ours, comparison.decimals) if comparison.ours else ""
    if so_far:
        ours = f"{ours} ({so_far})" if ours else so_far
    command = f"`{beside['command']}`" if cell.source else "" if cell.quoted else "no experiment yet"
    return [
        cell.row,
        cell.column,
        f"{cell.value} ± {cell.ci}" if cell.ci else cell.value,
        ours,
        status_markdown(comparison.status, comparison.reason, notes),
        seeds,
        str(beside["inner_order"]),
        beside["commit"],
        beside["hardware"],
        command,
    ]
