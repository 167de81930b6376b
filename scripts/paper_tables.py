"""Renders the paper's tables from what has been run: results/tables.md, and a folder for each of them.

    python scripts/paper_tables.py

Reads results/cells.yaml, results/paper/, the run folders and the committed runs in results/runs/; trains nothing.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from maml.paper.cells import load_tables
from maml.paper.runs import find_evidence, find_runs
from maml.paper.tables import STATUSES, compare, headline_markdown, summary, table_markdown, table_rows

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results"
SEEDS_NOTE = (
    "Number, interval (over test tasks) and status are those of the lowest seed; in brackets, the number of seeds and "
    "from where to where their means go."
)
BEGIN, END = "<!-- headline: made by make paper-tables -->\n", "\n<!-- end of headline -->"


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes all tables and prints the summary; returns 1 if a damaged run folder had to be left out, else 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--runs-dir",
        type=Path,
        nargs="+",
        default=[Path("runs"), RESULTS / "runs"],
        help="where run folders are; of equal runs the first counts (default: runs, then results/runs)",
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="where to write (default: results)")
    options = parser.parse_args(arguments)
    runs, damaged = find_runs(*options.runs_dir)
    tables = load_tables(RESULTS)
    comparisons = compare(tables, cache(lambda source: find_evidence(source, runs)))
    cells = [comparison for group in comparisons.values() for comparison in group]
    counted, headline = summary(cells), f"{headline_markdown(cells)}\n\n{SEEDS_NOTE}"
    if options.out == RESULTS:
        before, _, rest = (ROOT / "README.md").read_text().partition(BEGIN)
        (ROOT / "README.md").write_text(f"{before}{BEGIN}{headline}{END}{rest.partition(END)[2]}")
    overview = ["# The paper's tables", "", f"{counted}.", "", headline, ""]
    overview += [f"**ERROR, left out:** {message}\n" for message in damaged]
    overview += ["| table | " + " | ".join(STATUSES) + " |", "| --- |" + " --- |" * len(STATUSES)]
    for table in tables:
        folder, group = options.out / table.name, comparisons[table.name]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{table.name}.md").write_text(table_markdown(table.title, group))
        with open(folder / f"{table.name}.csv", "w", newline="") as file:
            rows = table_rows(group)
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        counts = Counter(comparison.status for comparison in group)
        numbers = " | ".join(str(counts[status] or "") for status in STATUSES)
        overview.append(f"| [{table.title}]({table.name}/{table.name}.md) | {numbers} |")
    (options.out / "tables.md").write_text("\n".join([*overview, "", "Made by `make paper-tables`.", ""]))
    for message in damaged:
        print(f"ERROR, left out: {message}", file=sys.stderr)
    print(f"{counted}\nwritten to {options.out / 'tables.md'}")
    return 1 if damaged else 0


if __name__ == "__main__":
    sys.exit(main())
