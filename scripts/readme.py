"""Writes the results table of README.md from the committed runs in results/runs/.

    python scripts/readme.py
    python scripts/readme.py --check

It does not read a user's own runs, so the table is the same on every machine.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from maml.cli.scripts import exit_with
from maml.config.paths import RESULTS, ROOT
from maml.errors import MamlError
from maml.paper.cells import load_tables
from maml.paper.evidence import find_evidence, provenance
from maml.paper.tables import Comparison, printed_value, reading_text, verdict_markdown
from maml.record.atomic import write_text_atomically
from maml.record.index import find_runs

BEGIN, END = "<!-- table: made by make readme -->\n", "<!-- end of table -->\n"

# The cells that the README shows, with a description for the reader.
SHOWN = {
    "table2_multitask/MAML/K5_gradsteps_1": "Sinusoid, 5 points, 1 gradient step: mean squared error",
    "table2_multitask/MAML/K5_gradsteps_10": "the same after 10 steps",
    "table2_multitask/pretrain_all_tasks/K5_gradsteps_10": "the same, pretrained instead of MAML",
    "table1_omniglot/MAML_noconv/5way_1shot": "Omniglot 5-way 1-shot, no convolutions: accuracy, %",
    "table1_omniglot/MAML_conv/5way_1shot": "Omniglot 5-way 1-shot, convolutions: accuracy, %",
    "table4_pointmass/MAML/gradsteps_1": "2D navigation, 1 gradient step: average return",
    "table4_pointmass/MAML/gradsteps_2": "the same after 2 steps",
    "table5_cheetah_dir/MAML/gradsteps_1": "Half-cheetah forward/backward, 1 gradient step: average return",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the table, or, with ``--check``, returns 1 if the table does not agree with the committed runs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the table is out of date")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help="the file (default: README.md)")
    options = parser.parse_args(arguments)
    before = options.readme.read_text()
    if BEGIN not in before or END not in before:
        print(f"{options.readme} lacks the lines {BEGIN.strip()} and {END.strip()}; put them back", file=sys.stderr)
        return 1
    head, _, rest = before.partition(BEGIN)
    after = f"{head}{BEGIN}{results_table()}{END}{rest.partition(END)[2]}"
    if options.check:
        if after != before:
            print(f"the table of {options.readme} is out of date; run make readme", file=sys.stderr)
        return int(after != before)
    write_text_atomically(options.readme, after)
    print(f"written to {options.readme}")
    return 0


def results_table() -> str:
    """Returns the table as Markdown.

    Raises:
        MamlError: if a cell in `SHOWN` does not exist or was not run.
    """
    runs, problems = find_runs(RESULTS / "runs")
    if problems:
        raise MamlError("\n".join(problems))
    cells = {cell.name: cell for table in load_tables(RESULTS) for cell in table.cells}
    lines = ["| | paper | ours | verdict | runs | command |", "| --- | --- | --- | --- | --- | --- |"]
    for name, words in SHOWN.items():
        source = cells[name].source if name in cells else None
        comparison = Comparison(cells[name], find_evidence(source, runs)) if source else None
        if comparison is None or comparison.ours is None:
            raise MamlError(f"{name} has no committed number; take it out of SHOWN in scripts/readme.py")
        lines.append(f"| {words} | {' | '.join(_row(comparison))} |")
    return "\n".join([*lines, ""])


def _row(comparison: Comparison) -> list[str]:
    """Returns the paper's number, our mean over runs with its interval, the verdict, the runs, and the command."""
    cell, evidence = comparison.cell, comparison.evidence
    assert cell.source is not None
    assert comparison.ours is not None
    runs = comparison.runs_text or "1"
    if evidence.progress:
        runs += f", stopped at {evidence.progress}"
    command = f"`{provenance(cell.source, evidence)['command']}`"
    ours = reading_text(*comparison.ours, cell.decimals)
    judged = verdict_markdown(comparison.verdict, comparison.reason, "results/notes.md")
    return [printed_value(cell), ours, judged, runs, command]


if __name__ == "__main__":
    exit_with(main)
