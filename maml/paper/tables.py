"""The paper's tables with our numbers beside the printed ones, and a verdict for each cell."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from maml.config.compose import compose_experiment
from maml.config.names import locate
from maml.paper.cells import Cell, Table
from maml.paper.evidence import Evidence, provenance
from maml.paper.markdown import markdown_table
from maml.record.contents import Source
from maml.record.statistics import MIN_RUNS, Statistics

VERDICTS = ("reproduced", "better", "worse", "measured", "reduced budget", "quoted", "running", "not run")
_ALWAYS_COUNTED = {"reproduced", "better", "worse", "reduced budget", "not run"}
# Marks of a verdict in the paper's layout; other verdicts are written as words.
SYMBOLS = {"reproduced": "=", "better": "△", "worse": "▽", "reduced budget": "○", "quoted": "†"}
CONFLICT = "‡"  # marks a number in which two runs contradict each other
NOTHING = "\N{EN DASH}"  # printed where the paper has no number
NO_REASON = "no reason known yet"
REDUCED_BUDGET = "reduced-budget"  # the anchor of its section in results/notes.md

TRANSDUCTIVE = (
    "Image accuracies of MAML are transductive, as in the paper: batch normalisation sees all query images of a task. "
    "Inductive ones use the statistics of the support images alone and are lower, such as 95.33 ± 0.75 instead of "
    "99.13 ± 0.35 for Omniglot 5-way 1-shot"
)
BOLD = (
    "Bold as in the paper: numbers of its own method, if no number between the same two lines is better by more than "
    "the interval printed beside it"
)
QUOTED = f"{SYMBOLS['quoted']} quoted by the paper from other authors"
UNPRINTED = (
    "MAML's intervals in Tables 4 and 5 are not printed; they are computed from the authors' files of Figures 4 and 5 "
    "and count for the verdict."
)
COUNTED_TWICE = "A seed that ran on two processors counts twice."
LEGEND = (
    "Below each row of the paper is ours: the mean over our runs ± the half-width of its 95 % interval. The interval "
    f"covers test tasks and, if there are at least {MIN_RUNS} runs, trainings. If there are several runs, the row "
    "below gives their number, the range of their means and, in brackets, the interval over test tasks alone. "
    "= reproduced: the paper's value lies in our interval or ours in the paper's, and not beyond all our runs; "
    "△ better; ▽ worse; ○ reduced budget: "
    f"training is not complete, so this is not a reproduction; {QUOTED}; "
    f"{CONFLICT} equal runs on equal hardware gave different numbers, and all are counted. {BOLD}. {TRANSDUCTIVE} "
    "(results/notes.md)."
)

_HEADER = ("row", "column", "paper", "ours", "verdict", "runs", "inner order", "commit", "hardware", "command")
_NOTES = (
    "*measured*: no number is published to compare with. A verdict that is a link leads to the reason, as far as it is",
    "known. `+` after a commit: with uncommitted changes. The CSV beside this file has all numbers in full precision,",
    "the runs and their task banks.",
    COUNTED_TWICE,
    UNPRINTED,
)


class Judged(Protocol):
    """Anything with a verdict: a cell or a curve, compared with our runs."""

    @property
    def verdict(self) -> str:
        """One of `VERDICTS`."""


@dataclass(frozen=True)
class Comparison:
    """A published cell and our runs of it."""

    cell: Cell
    evidence: Evidence

    @cached_property
    def statistics(self) -> Statistics | None:
        """Our mean over runs, its intervals, and the mean of each run; None if nothing was evaluated."""
        source = self.cell.source
        return self.evidence.statistics(source, self.cell.step) if source else None

    @property
    def ours(self) -> tuple[float, float] | None:
        """Our mean over runs and the half-width of its 95 % interval; None if nothing was evaluated."""
        return (self.statistics.mean, self.statistics.ci95) if self.statistics else None

    @property
    def larger_is_better(self) -> bool:
        """Whether a larger value of the evaluated metric is better."""
        return self.evidence.evaluated[0][1].larger_is_better

    @property
    def verdict(self) -> str:
        """One of `VERDICTS`."""
        if self.cell.quoted and self.cell.source is None:
            return "quoted"
        if self.ours is None:
            return self.evidence.state
        if not self.evidence.complete:
            return "reduced budget"
        if not self.cell.value:
            return "measured"
        published, ci = float(self.cell.value), float(self.cell.ci or 0)
        assert self.statistics is not None
        return judge_runs(self.statistics, published, ci, self.larger_is_better)

    @property
    def reason(self) -> str:
        """The result of `reason_for`."""
        return reason_for(self.verdict, self.cell.note)

    @property
    def runs_text(self) -> str:
        """The number of runs, the range of their means, and the interval over tasks alone; empty for a single run."""
        found = self.statistics
        if found is None or found.num_runs == 1:
            return ""
        if math.isnan(found.mean):
            return f"{sum(map(math.isnan, found.means))} of {found.num_runs} diverged"
        lowest, highest, tasks = (
            f"{x:.{self.cell.decimals}f}" for x in (found.lowest, found.highest, found.tasks_ci95)
        )
        return f"{found.num_runs}: {lowest} to {highest} (± {tasks})"

    @property
    def place_text(self) -> str:
        """Where the paper's number, which is from one training, lies among our runs; empty for a single run."""
        found = self.statistics
        if found is None or found.num_runs == 1 or not self.cell.value or math.isnan(found.mean):
            return ""
        published = float(self.cell.value)
        beaten = sum((published > mean) == self.larger_is_better and published != mean for mean in found.means)
        quantity = {0: "none", found.num_runs: "all"}.get(beaten, str(beaten))
        return f"the paper's value is better than {quantity} of them"


@dataclass(frozen=True)
class Row:
    """A row of the printed table.

    Attributes:
        row: its name in the paper's file.
        name: its printed name.
        items: the comparison in each column; None if the column is empty.
    """

    row: str
    name: str
    items: Sequence[Comparison | None]

    @property
    def quoted(self) -> bool:
        """Whether the paper quotes the row from other authors."""
        return any(item.cell.quoted for item in self.items if item)

    @property
    def is_ours(self) -> bool:
        """Whether numbers of ours belong below the row: we have an experiment for it, or ought to have one."""
        return not self.quoted or any(item.cell.source for item in self.items if item)

    @property
    def has_runs(self) -> bool:
        """Whether a cell of the row has several runs."""
        return any(item.runs_text for item in self.items if item)


def judge(ours: float, ours_ci: float, published: float, published_ci: float, larger_is_better: bool) -> str:
    """Judges a number from complete training.

    Args:
        ours: our mean; nan if adaptation diverged, which counts as worse.
        ours_ci: half-width of our 95 % interval.
        published: the printed value.
        published_ci: half-width of the printed interval; 0 if none is printed.
        larger_is_better: whether a larger value of the metric is better.

    Returns:
        ``reproduced`` if the printed value lies in our interval or ours in the printed one; else ``better`` or
        ``worse``.
    """
    if abs(ours - published) <= max(ours_ci, published_ci):
        return "reproduced"
    return "better" if not math.isnan(ours) and (ours > published) == larger_is_better else "worse"


def judge_runs(found: Statistics, published: float, published_ci: float, larger_is_better: bool) -> str:
    """Judges the mean of our runs, which must not agree only because some trainings failed.

    One failed training makes the interval over trainings so wide that it holds almost any number. So the printed value,
    which is from one training, also has to lie within the interval over test tasks of the range of our runs.

    Args:
        found: our runs.
        published: the printed value.
        published_ci: half-width of the printed interval; 0 if none is printed.
        larger_is_better: whether a larger value of the metric is better.

    Returns:
        The result of `judge`, for the mean; if only its interval over trainings agrees, for the nearest run.
    """
    verdict = judge(found.mean, found.ci95, published, published_ci, larger_is_better)
    if verdict != "reproduced" or found.lowest <= published <= found.highest:
        return verdict
    nearest = min(found.means, key=lambda mean: abs(mean - published))
    return judge(nearest, found.tasks_ci95, published, published_ci, larger_is_better)


def reading_text(mean: float, ci95: float, decimals: int) -> str:
    """Formats a mean and the half-width of its interval; nan becomes ``diverged``."""
    return "diverged" if math.isnan(mean) else f"{mean:.{decimals}f} ± {ci95:.{decimals}f}"


def compare(tables: Sequence[Table], find: Callable[[Source], Evidence]) -> dict[str, list[Comparison]]:
    """Looks up our runs of every cell; returns the comparisons by table name."""
    return {
        table.name: [Comparison(cell, find(cell.source) if cell.source else Evidence()) for cell in table.cells]
        for table in tables
    }


def reason_for(verdict: str, note: str) -> str:
    """Returns why a number differs from the paper's: an anchor in ``results/notes.md``, or `NO_REASON`.

    Empty for a verdict that needs no reason.
    """
    if verdict == "reduced budget":
        return REDUCED_BUDGET
    return (note or NO_REASON) if verdict in ("better", "worse") else ""


def verdict_markdown(verdict: str, reason: str, notes: str) -> str:
    """Returns a verdict with a link to its reason; ``notes`` is the path of ``results/notes.md`` for the reader."""
    if not reason:
        return verdict
    return f"{verdict}, {reason}" if reason == NO_REASON else f"[{verdict}]({notes}#{reason})"


def summary(judged: Iterable[Judged], things: str = "cells") -> str:
    """Returns one line with the number of cells (or other ``things``) of each verdict."""
    counts = Counter(item.verdict for item in judged)
    shown = [f"{counts[name]} {name}" for name in VERDICTS if counts[name] or name in _ALWAYS_COUNTED]
    return ", ".join([shown[0].replace(" ", f" of {counts.total()} {things} ", 1), *shown[1:]])


def bold_cells(table: Table) -> set[tuple[str, str]]:
    """Returns row and column of each number that the paper prints in bold.

    A number of the paper's own method is bold if no number of its group is better by more than the interval printed
    beside it. So both MAML rows of MiniImagenet are bold, and no row is bold at the last step of Table 4.
    """
    if not table.layout.own:
        return set()
    source = next(cell.source for cell in table.cells if cell.source)
    domain: Any = locate(compose_experiment(source.experiment, source.overrides).domain["_target_"])
    sign = 1 if domain.larger_is_better else -1
    bold = set()
    for group in table.layout.groups:
        for cell in table.cells:
            if cell.row in group and cell.row in table.layout.own:
                rivals = [o for o in table.cells if o.row in group and o.column == cell.column and o.value]
                ahead = max(sign * (float(rival.value) - float(cell.value)) for rival in rivals)
                if ahead <= (float(cell.ci or 0) if cell.ci_is_printed else 0):
                    bold.add((cell.row, cell.column))
    return bold


def table_rows(comparisons: Sequence[Comparison]) -> list[dict[str, Any]]:
    """Returns the rows of the CSV, one per cell, in full precision; None where there is no number."""
    rows = []
    for comparison in comparisons:
        cell = comparison.cell
        found = comparison.statistics
        row: dict[str, Any] = {"row": cell.row, "column": cell.column, "paper": cell.value, "paper_ci95": cell.ci}
        row |= {"ours": found.mean if found else None, "ours_ci95": found.ci95 if found else None}
        row |= {"verdict": comparison.verdict, "reason": comparison.reason}
        row |= {"num_runs": found.num_runs if found else 0, "tasks_ci95": found.tasks_ci95 if found else None}
        row |= {"lowest_run": found.lowest if found else None, "highest_run": found.highest if found else None}
        row |= {"conflict": "; ".join(comparison.evidence.conflicts)}
        rows.append(row | provenance(cell.source, comparison.evidence))
    return rows


def table_markdown(table: Table, comparisons: Sequence[Comparison]) -> str:
    """Returns the table in the paper's layout with our numbers below each row, and a list with details of each cell."""
    lines = [f"# {table.title}", "", f"{summary(comparisons)}. {table.note}".strip(), ""]
    lines += [*_layout_markdown(table, comparisons), ""]
    lines += [f"{LEGEND} [Both accuracies](../notes.md#{REDUCED_BUDGET}).", "", "## Cell by cell", ""]
    lines += markdown_table(_HEADER, (_markdown_row(comparison, "../notes.md") for comparison in comparisons))
    return "\n".join([*lines, "", *_NOTES, ""])


def headline_markdown(comparisons: Iterable[Comparison]) -> str:
    """Returns a table of all numbers that have been run, for ``results/tables.md``.

    A number that two tables print has one line.

    Args:
        comparisons: the comparisons of all cells.
    """
    rows, shown = [], set()
    for comparison in comparisons:
        number = comparison.cell.source, comparison.cell.step
        if comparison.ours and number not in shown:
            shown.add(number)
            _, _, paper, ours, verdict, runs, *_, command = _markdown_row(comparison, "notes.md")
            rows.append((comparison.cell.name, paper, ours, verdict, runs, command))
    header = ("cell", "paper", "ours, 95 % interval", "verdict", "runs", "command")
    return "\n".join(markdown_table(header, rows))


def printed_value(cell: Cell) -> str:
    """Returns the value and its interval as the paper prints them."""
    return f"{cell.value} ± {cell.ci}" if cell.ci and cell.ci_is_printed else cell.value


def judged_value(cell: Cell) -> str:
    """Returns the value with the interval that counts for the verdict, whether the paper prints the interval or not."""
    if not cell.ci or cell.ci_is_printed:
        return printed_value(cell)
    return f"{cell.value} ± {float(cell.ci):.{cell.decimals - 1}f}"


def our_value(comparison: Comparison) -> str:
    """Returns our mean and interval with the symbol of the verdict, or the verdict alone if there is no number."""
    if comparison.ours is None:
        return comparison.verdict
    text = reading_text(*comparison.ours, comparison.cell.decimals)
    mark = CONFLICT if comparison.evidence.conflicts else ""
    return f"{text} {SYMBOLS.get(comparison.verdict, '')}{mark}".strip()


def layout_rows(table: Table, comparisons: Sequence[Comparison]) -> list[list[Row]]:
    """Returns the rows of the printed table, in the groups that its lines separate."""
    by_cell = {(comparison.cell.row, comparison.cell.column): comparison for comparison in comparisons}
    return [
        [Row(row, name, [by_cell.get((row, column)) for column in table.layout.columns]) for row, name in group.items()]
        for group in table.layout.groups
    ]


def _layout_markdown(table: Table, comparisons: Sequence[Comparison]) -> list[str]:
    layout, bold = table.layout, bold_cells(table)
    lines = []
    for row in (row for group in layout_rows(table, comparisons) for row in group):
        printed = [printed_value(item.cell) or NOTHING if item else NOTHING for item in row.items]
        is_bold = [(row.row, column) in bold for column in layout.columns]
        name = (
            f"**{row.name}**"
            if row.row in layout.own
            else f"{row.name} {SYMBOLS['quoted']}"
            if row.quoted
            else row.name
        )
        lines.append(
            [name, *(f"**{text}**" if strong else text for text, strong in zip(printed, is_bold, strict=True))]
        )
        if row.is_ours:
            lines.append(["ours", *(our_value(item) if item else "" for item in row.items)])
        if row.has_runs:
            lines.append(["runs", *(item.runs_text if item else "" for item in row.items)])
    return markdown_table([layout.corner, *(" ".join(words) for words in layout.columns.values())], lines)


def _markdown_row(comparison: Comparison, notes: str) -> list[str]:
    cell, origin = comparison.cell, provenance(comparison.cell.source, comparison.evidence)
    runs = "; ".join(filter(None, [comparison.runs_text, comparison.place_text]))
    if origin["seeds"]:
        seeds = origin["seeds"].split()
        runs = "; ".join(filter(None, [runs or "1", f"seed{'s' * (len(seeds) > 1)} {', '.join(seeds)}"]))
    if comparison.evidence.conflicts:
        runs = f"{CONFLICT} {runs}"
    progress = comparison.evidence.progress
    ours = reading_text(*comparison.ours, comparison.cell.decimals) if comparison.ours else ""
    if progress:
        ours = f"{ours} ({progress})" if ours else progress
    command = f"`{origin['command']}`" if cell.source else "" if cell.quoted else "no experiment yet"
    return [
        cell.row,
        cell.column,
        judged_value(cell),
        ours,
        verdict_markdown(comparison.verdict, comparison.reason, notes),
        runs,
        str(origin["inner_order"]),
        origin["commit"],
        origin["hardware"],
        command,
    ]
