"""Renders the tables from all finished runs: tables.md, readings.md, methods.md, tables.tex, a folder for each table.

    python scripts/paper_tables.py

Reads results/cells.yaml, results/paper/, the run folders and the committed runs in results/runs/; trains nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache

import pandas as pd

from maml.cli.scripts import exit_with, print_problems, rendering_parser
from maml.paper.cells import Table, load_tables
from maml.paper.evidence import find_evidence
from maml.paper.latex import document, table_latex
from maml.paper.markdown import markdown_table
from maml.paper.methods import methods_markdown
from maml.paper.readings import readings_markdown
from maml.paper.tables import (
    CONFLICT,
    COUNTED_TWICE,
    REDUCED_BUDGET,
    TRANSDUCTIVE,
    UNPRINTED,
    VERDICTS,
    Comparison,
    compare,
    headline_markdown,
    summary,
    table_markdown,
    table_rows,
)
from maml.record.atomic import write_text_atomically
from maml.record.comparison import groups_on_the_same_tasks
from maml.record.index import conflicts_among, find_runs
from maml.record.statistics import MIN_RUNS

RUNS_NOTE = (
    "A number is the mean over runs; the interval covers test tasks and, if there are at least "
    f"{MIN_RUNS} runs, trainings. *Runs* gives their number, the range of their means and, in brackets, the interval "
    f"over test tasks alone. {COUNTED_TWICE} The paper's number is from one training, as far as is known. "
    f"{UNPRINTED}\n\n"
    f"{TRANSDUCTIVE}. [Both accuracies](notes.md#{REDUCED_BUDGET})."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes all tables and prints the summary; returns 1 if a damaged run folder was left out, else 0.

    Each file is written whole or not at all.
    """
    options = rendering_parser(__doc__.splitlines()[0]).parse_args(arguments)
    runs, damaged = find_runs(*options.runs_dir)
    conflicts = conflicts_among(runs)
    tables = load_tables(options.results)
    find = cache(lambda source: find_evidence(source, runs))
    comparisons = compare(tables, find)
    counted, *other_counts = counts_of(tables, comparisons)
    cells = [comparison for group in comparisons.values() for comparison in group]
    overview = ["# The paper's tables", "", f"{counted}.", "", *(f"{line}.\n" for line in other_counts)]
    overview += [headline_markdown(cells), "", RUNS_NOTE, ""]
    overview += [f"**ERROR, left out:** {message}\n" for message in damaged]
    overview += [f"**{CONFLICT}** {message}\n" for message in conflicts]
    latex, counts_by_table = [], []
    for table in tables:
        folder, group = options.out / table.name, comparisons[table.name]
        folder.mkdir(parents=True, exist_ok=True)
        rows = pd.DataFrame(table_rows(group), dtype=object)
        write_text_atomically(folder / f"{table.name}.md", table_markdown(table, group))
        latex.append(table_latex(table, group))
        write_text_atomically(folder / f"{table.name}.tex", latex[-1])
        write_text_atomically(folder / f"{table.name}.csv", rows.to_csv(index=False))
        counts = Counter(comparison.verdict for comparison in group)
        link = f"[{table.title}]({table.name}/{table.name}.md)"
        counts_by_table.append([link, *(str(counts[verdict] or "") for verdict in VERDICTS)])
    overview += markdown_table(["table", *VERDICTS], counts_by_table)
    overview += ["", "[Where the paper's number lies among our runs, and other readings of the paper](readings.md)"]
    overview += ["", "[Methods that were tested on the same tasks, compared task by task](methods.md)"]
    write_text_atomically(options.out / "readings.md", readings_markdown(tables, find))
    write_text_atomically(options.out / "methods.md", methods_markdown(groups_on_the_same_tasks(runs)))
    write_text_atomically(options.out / "tables.tex", document(f"{counted}.", latex))
    write_text_atomically(options.out / "tables.md", "\n".join([*overview, "", "Made by `make paper-tables`.", ""]))
    incomplete = [c.evidence.missing_values(c.cell.source, c.cell.step) for c in cells if c.cell.source]
    status = print_problems(damaged, [*conflicts, *dict.fromkeys(filter(None, incomplete))])
    print(counted, *other_counts, sep="\n")
    print(f"written to {options.out / 'tables.md'}")
    return status


def counts_of(tables: Sequence[Table], comparisons: Mapping[str, Sequence[Comparison]]) -> list[str]:
    """Returns the summary of the paper's cells, and a separate one of all other cells."""
    of_paper, of_others = (
        [c for table in tables for c in comparisons[table.name] if c.cell.is_of_paper == wanted]
        for wanted in (True, False)
    )
    return [summary(of_paper), f"Not in the paper, counted separately: {summary(of_others)}"]


if __name__ == "__main__":
    exit_with(main)
