"""Where the paper's single training lies among our runs, for the table's own reading of the paper and for others."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from maml.paper.cells import Cell, Reading, Table
from maml.paper.evidence import Evidence
from maml.paper.markdown import markdown_table
from maml.record.contents import Source
from maml.record.statistics import Statistics

OWN = "the table's own"
_HEADER = ("row", "column", "paper", "reading", "runs", "median", "range over runs", "the paper's number", "command")
_INTRODUCTION = (
    "The paper prints one number each, from one training as far as is known. Trainings differ by chance, so this page "
    "shows, for each number that we have run, the median and the range of our runs, and whether the paper's number "
    "lies inside that range. That needs at least two runs. Where the paper can be read in several ways, each reading "
    "has its own line, and the table's verdicts belong to the first. A range grows with the number of runs; it is no "
    "interval, and no run is picked from it."
)


@dataclass(frozen=True)
class Measured:
    """Our runs of one reading of a cell.

    Attributes:
        row: the printed name of the cell's row.
        column: the printed heading of its column.
        cell: the published cell.
        reading: the reading; the first one of a cell is the table's own.
        evidence: the runs.
        statistics: their means.
    """

    row: str
    column: str
    cell: Cell
    reading: Reading
    evidence: Evidence
    statistics: Statistics

    @property
    def place(self) -> str:
        """Where the printed number lies: ``inside`` the range of our runs, ``below`` or ``above`` it; or why not."""
        if not self.evidence.complete:
            return f"reduced budget: {self.evidence.progress}"
        if not self.cell.value:
            return "not printed"
        if self.statistics.num_runs == 1:
            return "one run"
        if math.isnan(self.statistics.mean):
            return "a run diverged"
        published = float(self.cell.value)
        if published < self.statistics.lowest:
            return "below"
        return "above" if published > self.statistics.highest else "inside"


def measured_readings(table: Table, find: Callable[[Source], Evidence]) -> Iterator[Measured]:
    """Yields every reading of a table's cells that has an evaluated run, cell by cell, the table's own first.

    Args:
        table: the table.
        find: returns the runs of a source.
    """
    row_names = {row: name for group in table.layout.groups for row, name in group.items()}
    for cell in table.cells:
        row, column = row_names[cell.row], ", ".join(table.layout.columns[cell.column])
        own = [Reading(OWN, cell.source, cell.step, cell.note)] if cell.source else []
        for reading in (*own, *cell.readings):
            evidence = find(reading.source)
            statistics = evidence.statistics(reading.source, reading.step)
            if statistics:
                yield Measured(row, column, cell, reading, evidence, statistics)


def readings_markdown(tables: Sequence[Table], find: Callable[[Source], Evidence]) -> str:
    """Returns the page of all readings.

    Args:
        tables: the tables, in the order of the page.
        find: returns the runs of a source.
    """
    measured = {table.title: list(measured_readings(table, find)) for table in tables}
    own = [one.place for group in measured.values() for one in group if one.reading.name == OWN]
    judged = [place for place in own if place in ("inside", "below", "above")]
    lines = ["# The paper's number among our runs", "", _INTRODUCTION, ""]
    lines += [
        f"Of {len(judged)} numbers with several runs, {judged.count('inside')} lie inside the range in the table's own "
        f"reading, {judged.count('below')} below it and {judged.count('above')} above it.",
        "",
    ]
    for title, group in measured.items():
        if group:
            lines += [f"## {title}", "", *markdown_table(_HEADER, map(_markdown_row, group)), ""]
    return "\n".join([*lines, "Made by `make paper-tables` from `results/cells.yaml`.", ""])


def _markdown_row(one: Measured) -> list[str]:
    found, decimals = one.statistics, one.cell.decimals
    median, lowest, highest = (
        "diverged" if math.isnan(value) else f"{value:.{decimals}f}"
        for value in (float(np.median(found.means)), found.lowest, found.highest)
    )
    name = f"[{one.reading.name}](notes.md#{one.reading.note})" if one.reading.note else one.reading.name
    seeds = sorted({report.seed for _, report in one.evidence.evaluated})
    return [
        one.row,
        one.column,
        one.cell.value,
        name,
        str(found.num_runs),
        median,
        f"{lowest} to {highest}" if found.num_runs > 1 else "",
        one.place,
        f"`{one.reading.source.command(seeds)}`",
    ]
