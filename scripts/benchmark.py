"""Shared code of the benchmarks: conditions, timing in turns, ratios and bars, and a folder of results by processor."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from clocks import MIN_TURN_SECONDS, Clock, choose_clock, seconds_per_call

from maml.hardware.base import Hardware
from maml.record.atomic import write_text_atomically
from maml.record.provenance import commit, versions

ROOT = Path(__file__).resolve().parents[1]
PEERS = ("learn2learn", "higher", "torchopt", "jax")
RESULTS = "results/benchmarks"
# Help of the options that select experiments.
REPLACES = "the new table has only these, so give a trial another --out (default: all)"
OVERVIEW = """
# Benchmarks

Every kind of processor and GPU has a folder. A cell is the commit that was measured.
""".strip()

Turn = Callable[[], float]
"""Times one turn, and returns the seconds per call."""


class Unavailable(Exception):
    """An implementation cannot be measured here; the message says why and is shown in place of the number."""


# Conditions.


def argument_parser(
    description: str | None, name: str, rounds: int, only_one_core: bool = False
) -> argparse.ArgumentParser:
    """Returns a parser with the options of all benchmarks; ``only_one_core`` leaves out device and threads."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument(
        "--rounds", type=int, default=rounds, help="turns of each implementation (default %(default)s)"
    )
    if not only_one_core:
        options.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
        options.add_argument("--threads", type=int, default=1, help="CPU threads (default %(default)s; bars need 1)")
    else:
        options.set_defaults(device="cpu")
    out = f"folder of the folders of all processors (default {RESULTS})"
    options.add_argument("--out", type=Path, default=ROOT / RESULTS, help=out)
    options.set_defaults(name=name)
    return options


def hardware_slug(name: str) -> str:
    """Returns the name of a processor or GPU as the name of a folder, such as ``amd_epyc_family_26_model_2``.

    It leaves out what the same processor may have or not: trademarks, the number of cores and the clock rate.
    """
    short = re.sub(r"\((R|TM)\)|@[^(]*|\b(CPU|Processor|\d+-Core)\b", " ", name, flags=re.IGNORECASE)
    return re.sub(r"[^a-z0-9]+", "_", short.lower()).strip("_") or "unknown"


def hardware_folder(device: str) -> str:
    """Returns the name of the folder of this machine's GPU if ``device`` is ``cuda``, otherwise of its processor."""
    described = Hardware("cuda" if device == "cuda" else "cpu").describe()
    return hardware_slug(described.get("gpu", described["cpu"]))


def describe_conditions(device: torch.device, num_threads: int) -> dict[str, str]:
    """Returns the conditions that a reader needs to judge or repeat the numbers."""
    packages = versions()
    for peer in PEERS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            packages[peer] = importlib.metadata.version(peer)
    recorded = commit()
    hardware = Hardware("cuda" if device.type == "cuda" else "cpu").describe()
    return {
        "command": shlex.join(["python", "scripts/" + Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": (recorded["commit"] or "unknown") + "-dirty" * bool(recorded["dirty"]),
        "hardware": ", ".join(f"{key} {value}" for key, value in hardware.items()),
        "threads": str(num_threads),
        "clock": choose_clock(device, num_threads)[1],
        "versions": ", ".join(f"{package} {version}" for package, version in packages.items()),
    }


def git(*arguments: str) -> str:
    """Returns what git prints about this clone; empty if it fails or is not installed."""
    with contextlib.suppress(OSError):
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""
    return ""


# Time and memory.


def time_in_turns(
    runs: Mapping[str, Callable[[], object]],
    rounds: int,
    clock: Clock,
    min_seconds: float = MIN_TURN_SECONDS,
    elsewhere: Mapping[str, Turn] | None = None,
    title: str = "turns",
) -> dict[str, list[float]]:
    """Times functions in turns; returns seconds per call by name, one number per round.

    Numbers of the same round were measured one after the other, so their ratio is hardly disturbed by other load. Each
    round is printed at once, so that an interrupted run leaves its numbers.

    Args:
        runs: the functions.
        rounds: number of turns of each function.
        clock: the clock.
        min_seconds: shortest duration of a turn, in seconds.
        elsewhere: functions that are timed in other processes; they come first in each round.
        title: what is measured, for the printed lines.
    """
    turns: dict[str, Turn] = dict(elsewhere or {})
    for name, run in runs.items():
        turns[name] = partial(seconds_per_call, run, clock, min_seconds)
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for number in range(1, rounds + 1):
        for name, turn in turns.items():
            seconds[name].append(turn())
        measured = ", ".join(f"{name} {1e3 * values[-1]:.4g} ms" for name, values in seconds.items())
        print(f"{title}, round {number} of {rounds}: {measured}", flush=True)
    return seconds


def resident_mib(field: str) -> float:
    """Returns this process's resident memory (``VmRSS``) or its highest value so far (``VmHWM``), in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 2**10 for line in lines if line.startswith(f"{field}:"))


# Ratios and bars.


class Spread(NamedTuple):
    """The median, lowest and highest of some numbers."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread | None:
        """Summarises numbers; returns None if there are none."""
        numbers = list(values)
        return cls(statistics.median(numbers), min(numbers), max(numbers)) if numbers else None

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.low:.3g} to {self.high:.3g})"


def times_as_fast(seconds: Sequence[float], other: Sequence[float]) -> Spread | None:
    """Returns how many times as fast the first implementation is as the other, over the rounds."""
    return Spread.of(slower / faster for faster, slower in zip(seconds, other, strict=False))


def verdict(value: float, bar: float | None, unit: str = "", at_most: bool = False) -> str:
    """Returns whether a number meets its bar, as text; empty if there is no bar."""
    if bar is None:
        return ""
    met = value <= bar if at_most else value >= bar
    return f"{'met' if met else 'missed'} ({'<=' if at_most else '>='} {bar:,g}{unit})"


def judged(ratio: Spread | None, bar: float | None) -> str:
    """Returns a ratio and whether it meets its bar, as text; empty without a ratio."""
    return f"{ratio} {verdict(ratio.median, bar)}".rstrip() if ratio else ""


# Writing.


def csv_cells(name: str, spread: Spread | None) -> dict[str, Any]:
    """Returns the three columns of a spread in a CSV; without one, they are empty."""
    median, low, high = spread or ("", "", "")
    return {name: median, f"{name}_min": low, f"{name}_max": high}


def markdown_table(rows: Sequence[Mapping[str, object]]) -> list[str]:
    """Returns the lines of a Markdown table; all rows have the same columns."""
    lines: list[list[object]] = [list(rows[0]), ["---", *["---:"] * (len(rows[0]) - 1)]]
    lines += ([*row.values()] for row in rows)
    return ["", *(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines), ""]


def output_path(options: argparse.Namespace, kind: str = "md") -> Path:
    """Returns the path of the benchmark's file of a kind, ``md``, ``csv`` or ``png``, in this processor's folder."""
    return Path(options.out) / hardware_folder(options.device) / f"{options.name}.{kind}"


def write_results(
    options: argparse.Namespace,
    title: str,
    conditions: Mapping[str, str],
    text: Sequence[str],
    rows: Sequence[Mapping[str, Any]],
) -> None:
    """Writes the Markdown page, the CSV, which has the conditions in every row, and the overview of all processors."""
    output_path(options).parent.mkdir(parents=True, exist_ok=True)
    lines = [f"# {title}", "", *(f"- {key}: {value}" for key, value in conditions.items()), "", *text]
    write_text_atomically(output_path(options), "\n".join(lines).rstrip() + "\n")
    columns = dict.fromkeys(key for row in rows for key in (*row, *conditions))
    frame = pd.DataFrame([{**row, **conditions} for row in rows], columns=list(columns), dtype=object)
    write_text_atomically(output_path(options, "csv"), frame.to_csv(index=False))
    write_text_atomically(options.out / "README.md", overview(options.out))


def read_conditions(page: str) -> dict[str, str]:
    """Returns the conditions at the top of a benchmark's Markdown page."""
    return dict(line[2:].split(": ", 1) for line in page.splitlines() if re.match(r"- \w+: ", line))


def short_commit(conditions: Mapping[str, str]) -> str:
    """Returns the first seven digits of the measured commit, with ``-dirty`` if it has that."""
    digits, *dirty = conditions["commit"].split("-")
    return "-".join([digits[:7], *dirty])


def overview(folder: Path) -> str:
    """Returns a page with one table: which processor has which benchmark, and at which commit."""
    pages = {path: read_conditions(path.read_text()) for path in sorted(folder.glob("*/*.md"))}
    names = sorted({path.stem for path in pages})
    rows: dict[str, dict[str, str]] = {}
    for path, conditions in pages.items():
        row = rows.setdefault(path.parent.name, {"folder": path.parent.name} | dict.fromkeys(names, ""))
        row[path.stem] = f"[{short_commit(conditions)}]({path.parent.name}/{path.name})"
    return "\n".join([OVERVIEW, *markdown_table([*rows.values()])])
