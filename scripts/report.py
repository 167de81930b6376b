"""Makes results/report.html: one page with every table, figure and departure, and the evidence for each number.

    python scripts/report.py

Reads results/cells.yaml, results/departures.yaml, results/notes.md, the rendered figures, the run folders and the
committed runs in results/runs/; trains nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from maml.cli.scripts import exit_with, print_problems, rendering_parser
from maml.config.paths import RESULTS
from maml.paper.report import render
from maml.record.atomic import write_text_atomically
from maml.record.index import find_runs


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the page; returns 1 if a damaged run folder or file was left out, else 0."""
    parser = rendering_parser(__doc__.splitlines()[0], out=RESULTS / "report.html")
    options = parser.parse_args(arguments)
    page, problems = render(options.results, *find_runs(*options.runs_dir))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(options.out, page)
    status = print_problems(problems)
    print(f"written to {options.out}, {len(page.encode()) / 1e6:.1f} MB")
    return status


if __name__ == "__main__":
    exit_with(main)
