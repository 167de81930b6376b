"""Options and messages of the scripts that read all finished runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path


def add_runs_dir(parser: argparse.ArgumentParser, results: Path) -> None:
    """Adds ``--runs-dir``, folders of run folders: those in ``runs/`` and the committed ones, unless others are given.

    Args:
        parser: the script's parser.
        results: the folder ``results/`` of the script's clone.
    """
    parser.add_argument(
        "--runs-dir",
        type=Path,
        nargs="+",
        default=[Path("runs"), results / "runs"],
        help="folders of run folders; the first of several equal runs is used (default: runs, then results/runs)",
    )


def rendering_parser(description: str, results: Path) -> argparse.ArgumentParser:
    """Returns the parser of a script that renders finished runs: ``--runs-dir``, ``--out`` and ``--results``.

    Args:
        description: what the script does.
        results: the folder ``results/`` of the script's clone.
    """
    parser = argparse.ArgumentParser(description=description)
    add_runs_dir(parser, results)
    parser.add_argument("--out", type=Path, default=results, help="where to write (default: results)")
    parser.add_argument(
        "--results", type=Path, default=results, help="folder of cells.yaml and paper/ (default: results)"
    )
    return parser


def print_problems(left_out: Sequence[str], notes: Iterable[str] = ()) -> int:
    """Prints notes and what was left out on standard error; returns 1 if something was left out, else 0."""
    for note in notes:
        print(f"NOTE: {note}", file=sys.stderr)
    for problem in left_out:
        print(f"ERROR, left out: {problem}", file=sys.stderr)
    return int(bool(left_out))
