"""Renders the paper's tables from all finished runs: results/tables.md, tables.tex, and a folder for each table.

    python scripts/paper_tables.py

Reads results/cells.yaml, results/paper/, the run folders and the committed runs in results/runs/; trains nothing.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from maml.paper.cells import Table, load_tables
from maml.paper.evidence import find_evidence
from maml.paper.latex import document, table_latex
from maml.paper.tables import STATUSES, Comparison, compare, headline_markdown, summary, table_markdown, table_rows
from maml.record.index import find_runs

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results"
SEEDS_NOTE = (
    "Number, interval (over test tasks) and status are those of the lowest seed. In brackets: the number of seeds and "
    "the range of their means."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes all tables and prints the summary; returns 1 if a damaged run folder was left out, else 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--runs-dir",
        type=Path,
        nargs="+",
        default=[Path("runs"), RESULTS / "runs"],
        help="folders of run folders; the first of several equal runs is used (default: runs, then results/runs)",
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="where to write (default: results)")
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="folder of cells.yaml and paper/ (default: results)"
    )
    options = parser.parse_args(arguments)
    runs, damaged = find_runs(*options.runs_dir)
    tables = load_tables(options.results)
    comparisons = compare(tables, cache(lambda source: find_evidence(source, runs)))
    counted, *other_counts = counts_of(tables, comparisons)
    cells = [comparison for group in comparisons.values() for comparison in group]
    overview = ["# The paper's tables", "", f"{counted}.", "", *(f"{line}.\n" for line in other_counts)]
    overview += [headline_markdown(cells, "notes.md"), "", SEEDS_NOTE, ""]
    overview += [f"**ERROR, left out:** {message}\n" for message in damaged]
    overview += ["| table | " + " | ".join(STATUSES) + " |", "| --- |" + " --- |" * len(STATUSES)]
    for table in tables:
        folder, group = options.out / table.name, comparisons[table.name]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{table.name}.md").write_text(table_markdown(table, group))
        (folder / f"{table.name}.tex").write_text(table_latex(table, group))
        with open(folder / f"{table.name}.csv", "w", newline="") as file:
            rows = table_rows(group)
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        counts = Counter(comparison.status for comparison in group)
        numbers = " | ".join(str(counts[status] or "") for status in STATUSES)
        overview.append(f"| [{table.title}]({table.name}/{table.name}.md) | {numbers} |")
    (options.out / "tables.tex").write_text(document(f"{counted}.", [table.name for table in tables]))
    (options.out / "tables.md").write_text("\n".join([*overview, "", "Made by `make paper-tables`.", ""]))
    for message in damaged:
        print(f"ERROR, left out: {message}", file=sys.stderr)
    print(*(line for line in (counted, *other_counts)), sep="\n")
    print(f"written to {options.out / 'tables.md'}")
    return 1 if damaged else 0


def counts_of(tables: Sequence[Table], comparisons: Mapping[str, Sequence[Comparison]]) -> list[str]:
    """Returns the summary of the paper's cells, and a separate one of later papers' cells."""
    of_paper, of_others = (
        [c for table in tables if table.in_paper == in_paper for c in comparisons[table.name]]
        for in_paper in (True, False)
    )
    return [summary(of_paper), f"Not in the paper, counted separately: {summary(of_others)}"]


if __name__ == "__main__":
    sys.exit(main())
