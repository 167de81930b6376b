"""Renders the paper's figures from what has been run: results/figures.md, and a folder for each of them.

    python scripts/paper_figures.py

Reads results/cells.yaml, results/paper/, the run folders and the committed runs in results/runs/; trains nothing.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path

from maml.paper.cells import load_figures
from maml.paper.figures import drawn, figure_rows, plot_figure
from maml.paper.runs import find_evidence, find_runs

RESULTS = Path(__file__).resolve().parents[1] / "results"


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes all figures and prints how far each curve is; returns 1 if a damaged run folder had to be left out."""
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
    overview = ["# The paper's figures", ""] + [f"**ERROR, left out:** {message}\n" for message in damaged]
    for figure in load_figures(RESULTS):
        folder = options.out / figure.name
        folder.mkdir(parents=True, exist_ok=True)
        found = [(curve, find_evidence(curve.source, runs)) for curve in figure.curves]
        plot_figure(figure, [drawn(curve, evidence) for curve, evidence in found], folder / f"{figure.name}.png")
        rows = [row for curve, evidence in found for row in figure_rows(curve, evidence)]
        with open(folder / f"{figure.name}.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        overview += [f"## {figure.title}", "", f"![{figure.title}]({figure.name}/{figure.name}.png)", ""]
        overview += ["| curve | state | seeds | commit | hardware | command |", "|" + " --- |" * 6]
        for row in {row["curve"]: row for row in rows}.values():
            print(f"{figure.title}, {row['curve']}: {row['state']}")
            beside = [row[name] for name in ("curve", "state", "seeds", "commit", "hardware")]
            overview.append("| " + " | ".join([*beside, f"`{row['command']}`"]) + " |")
        overview.append("")
    (options.out / "figures.md").write_text("\n".join([*overview, "Made by `make paper-figures`.", ""]))
    for message in damaged:
        print(f"ERROR, left out: {message}", file=sys.stderr)
    print(f"written to {options.out / 'figures.md'}")
    return 1 if damaged else 0


if __name__ == "__main__":
    sys.exit(main())
