"""Options, messages and exit status that scripts share."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NoReturn

from maml.config.paths import DEFAULT_RUNS, NO_RUNS, RESULTS
from maml.errors import Interrupted, MamlError


def add_runs_dir(parser: argparse.ArgumentParser) -> None:
    """Adds ``--runs-dir``, folders of run folders: by default those in ``runs/`` and the committed ones."""
    parser.add_argument(
        "--runs-dir",
        type=existing_folder,
        nargs="+",
        default=[*DEFAULT_RUNS],
        help="folders of run folders; the first of several equal runs is used (default: runs, then results/runs)",
    )


def rendering_parser(description: str, out: Path = RESULTS) -> argparse.ArgumentParser:
    """Returns the parser of a script that renders finished runs: ``--runs-dir``, ``--out`` and ``--results``.

    Args:
        description: what the script does.
        out: the default of ``--out``, in ``results/``.
    """
    parser = argparse.ArgumentParser(description=description)
    add_runs_dir(parser)
    default = out.relative_to(RESULTS.parent)
    parser.add_argument("--out", type=Path, default=out, help=f"where to write (default: {default})")
    parser.add_argument(
        "--results", type=_results_folder, default=RESULTS, help="folder of cells.yaml and paper/ (default: results)"
    )
    return parser


def existing_folder(text: str) -> Path:
    """Returns the folder that a user names; a misspelt one would look like one without runs.

    Raises:
        ArgumentTypeError: if there is no such folder.
    """
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(NO_RUNS.format(text))
    return Path(text)


def _results_folder(text: str) -> Path:
    if not (Path(text) / "cells.yaml").is_file():
        raise argparse.ArgumentTypeError(f"{text} has no cells.yaml; give the folder results/ of a clone")
    return Path(text)


def print_problems(left_out: Sequence[str], notes: Iterable[str] = ()) -> int:
    """Prints notes and what was left out on standard error; returns 1 if something was left out, else 0."""
    for note in notes:
        print(f"NOTE: {note}", file=sys.stderr)
    for problem in left_out:
        print(f"ERROR, left out: {problem}", file=sys.stderr)
    return int(bool(left_out))


def end_without_reader() -> NoReturn:
    """Ends a program whose reader, such as ``head``, has enough."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it flushes at the end
    sys.exit(1)


def exit_with(main: Callable[[], int | None]) -> NoReturn:
    """Runs a script and ends the process with its status; a known error is one message and status 1.

    Known are each `MamlError`, and each `OSError` that names a file. After `Interrupted`, the status is 128 + the
    signal's number.
    """
    try:
        status = main()
        sys.stdout.flush()
        sys.exit(status)
    except BrokenPipeError:
        end_without_reader()
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        sys.exit(128 + stop.signal_number)
    except MamlError as error:
        sys.exit(str(error))
    except OSError as error:
        if error.filename is None:
            raise
        sys.exit(f"{error.filename}: {error.strerror}")
