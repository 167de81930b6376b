"""What the benchmarks share: the conditions they state, the clock, taking turns, ratios and bars, and their files."""

from __future__ import annotations

import argparse
import contextlib
import csv
import gc
import importlib.metadata
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from maml.hardware.base import Hardware
from maml.record.run_folder import versions

ROOT = Path(__file__).resolve().parents[1]
PEERS = ("learn2learn", "higher", "torchopt", "jax")
MIN_TURN_SECONDS = 0.2  # a turn repeats the computation for at least this long

Clock = Callable[[], float]


class Unavailable(Exception):
    """Something cannot be measured here; the message says why, and stands where the number would."""


# Conditions.


def argument_parser(
    description: str | None, name: str, rounds: int, only_one_core: bool = False
) -> argparse.ArgumentParser:
    """Returns a parser of what every benchmark can be told; without a choice of device if there is none."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=rounds, help="turns of each (default %(default)s)")
    if not only_one_core:
        options.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
        options.add_argument("--threads", type=int, default=1, help="CPU threads (default %(default)s; bars need 1)")
    folder = ROOT / "results" / "benchmarks"
    options.add_argument("--out", type=Path, default=folder, help="folder (default results/benchmarks)")
    options.add_argument("--suffix", default="", help=f"of the files in it, {name}.md and .csv")
    options.set_defaults(name=name)
    return options


def describe_conditions(device: torch.device, num_threads: int) -> dict[str, str]:
    """Returns what a reader needs to judge or repeat the numbers."""
    found = versions()
    for peer in PEERS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[peer] = importlib.metadata.version(peer)
    # What was measured is the code, not the tables that a benchmark has just rewritten.
    git = ["git", "-C", str(ROOT)]
    commit = _output([*git, "rev-parse", "HEAD"]) or "unknown"
    changed = _output([*git, "status", "--porcelain", "--untracked-files=no", "--", ".", ":!results"])
    hardware = Hardware("cuda" if device.type == "cuda" else "cpu").describe()
    return {
        "command": shlex.join(["python", "scripts/" + Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": commit + "-dirty" * bool(changed),
        "hardware": ", ".join(f"{key} {value}" for key, value in hardware.items()),
        "threads": str(num_threads),
        "clock": choose_clock(device, num_threads)[1],
        "versions": ", ".join(f"{package} {version}" for package, version in found.items()),
    }


def _output(command: Sequence[str]) -> str:
    with contextlib.suppress(OSError):
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return ""


# Time and memory.


def choose_clock(device: torch.device, num_threads: int) -> tuple[Clock, str]:
    """Returns the clock and its description."""
    if device.type == "cuda":

        def synchronized() -> float:
            torch.cuda.synchronize()
            return time.perf_counter()

        return synchronized, "wall clock, synchronised with the GPU"
    if num_threads == 1:
        return time.process_time, "CPU time of the process, all its threads: other load on the machine disturbs it less"
    return time.perf_counter, "wall clock"


def seconds_per_call(run: Callable[[], object], clock: Clock, min_seconds: float = MIN_TURN_SECONDS) -> float:
    """Times one turn: as many calls as take so many seconds at least."""
    gc.collect()
    calls, start, elapsed = 0, clock(), 0.0
    while elapsed < min_seconds or not calls:
        run()
        calls += 1
        elapsed = clock() - start
    return elapsed / calls


def time_in_turns(
    runs: Mapping[str, Callable[[], object]], rounds: int, clock: Clock, min_seconds: float = MIN_TURN_SECONDS
) -> dict[str, list[float]]:
    """Returns seconds per call by name, one number per round: within a round, neighbours in time."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            seconds[name].append(seconds_per_call(run, clock, min_seconds))
    return seconds


def resident_mib(field: str) -> float:
    """Returns ``VmRSS``, what of this process is in memory, or ``VmHWM``, the most that ever was."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 2**10 for line in lines if line.startswith(f"{field}:"))


# Ratios and bars.


class Spread(NamedTuple):
    """Some numbers in short."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread | None:
        """Returns None of no numbers."""
        numbers = list(values)
        return cls(statistics.median(numbers), min(numbers), max(numbers)) if numbers else None

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.low:.3g} to {self.high:.3g})"


def times_as_fast(seconds: Sequence[float], other: Sequence[float]) -> Spread | None:
    """Returns how many times as fast the first is as the other, over the rounds."""
    return Spread.of(theirs / mine for mine, theirs in zip(seconds, other, strict=False))


def verdict(value: float, bar: float | None, unit: str = "", at_most: bool = False) -> str:
    """Says whether a number meets its bar; nothing without one."""
    if bar is None:
        return ""
    met = value <= bar if at_most else value >= bar
    return f"{'met' if met else 'missed'} ({'<=' if at_most else '>='} {bar:,g}{unit})"


# Writing.


def markdown_table(rows: Sequence[Mapping[str, object]]) -> list[str]:
    """Returns the lines of a table; each row has the same columns."""
    lines: list[list[object]] = [list(rows[0]), ["---", *["---:"] * (len(rows[0]) - 1)]]
    lines += ([*row.values()] for row in rows)
    return ["", *(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines), ""]


def output_path(options: argparse.Namespace, kind: str = "md") -> Path:
    """Returns the benchmark's file of one kind: ``md``, ``csv`` or ``png``."""
    return options.out / f"{options.name}{options.suffix}.{kind}"


def write_results(
    options: argparse.Namespace,
    title: str,
    conditions: Mapping[str, str],
    text: Sequence[str],
    rows: Sequence[Mapping[str, Any]],
) -> None:
    """Writes the page, and the numbers with the conditions in every row."""
    options.out.mkdir(parents=True, exist_ok=True)
    lines = [f"# {title}", "", *(f"- {key}: {value}" for key, value in conditions.items()), "", *text]
    output_path(options).write_text("\n".join(lines).rstrip() + "\n")
    with output_path(options, "csv").open("w", newline="") as file:
        columns = dict.fromkeys(key for row in rows for key in (*row, *conditions))
        writer = csv.DictWriter(file, list(columns), lineterminator="\n")
        writer.writeheader()
        writer.writerows({**row, **conditions} for row in rows)
