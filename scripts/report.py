"""Makes results/report.html: one page with every table, figure and departure, and the evidence for each number.

    python scripts/report.py

Reads results/cells.yaml, results/departures.yaml, results/notes.md, the rendered figures, the run folders and the
committed runs in results/runs/; trains nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from maml.cli.rendering import add_runs_dir, exit_with, print_problems
from maml.paper.report import render
from maml.record.checkpoint import write_text_atomically
from maml.record.index import find_runs

RESULTS = Path(__file__).resolve().parents[1] / "results"


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the page; returns 1 if a damaged run folder or file was left out, else 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_runs_dir(parser, RESULTS)
    parser.add_argument(
        "--out", type=Path, default=RESULTS / "report.html", help="the file to write (default: results/report.html)"
    )
    parser.add_argument(
        "--results",
        type=Path,
        default=RESULTS,
        help="folder of cells.yaml and of the rendered figures (default: results)",
    )
    options = parser.parse_args(arguments)
    page, problems = render(options.results, *find_runs(*options.runs_dir))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(options.out, page)
    status = print_problems(problems)
    print(f"written to {options.out}, {len(page.encode()) / 1e6:.1f} MB")
    return status


if __name__ == "__main__":
    exit_with(main)
