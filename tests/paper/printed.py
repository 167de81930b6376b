"""The paper's tables without the rows that a reader of this project added, so that these tests hold in a fork too."""

import csv
from dataclasses import replace
from pathlib import Path

from maml.paper.cells import Table, load_tables
from maml.paper.plan import Need, list_needs

RESULTS = Path(__file__).parents[2] / "results"


def published(name: str) -> list[dict[str, str]]:
    """Returns the lines of a file with published numbers."""
    with open(RESULTS / "paper" / f"{name}.csv", newline="") as file:
        return list(csv.DictReader(file))


def printed_tables() -> list[Table]:
    """Returns the tables with the cells that a publication has."""
    return [replace(table, cells=table.cells[: len(published(table.name))]) for table in load_tables(RESULTS)]


def printed_needs() -> list[Need]:
    """Returns what the paper's tables, figures and pictures need to be run."""
    rows = {table.name: {cell.row for cell in table.cells} for table in printed_tables()}
    return [need for need in list_needs(RESULTS) if need.row in rows.get(need.artifact, {need.row})]


def num_added() -> int:
    """Returns the number of cells in added rows."""
    return sum(len(table.cells) for table in load_tables(RESULTS)) - sum(len(table.cells) for table in printed_tables())
