"""Shared code of the benchmarks: conditions, clocks, timing in turns, ratios and bars, and result files."""

from __future__ import annotations

import argparse
import contextlib
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

import pandas as pd
import torch

from maml.hardware.base import Hardware
from maml.record.checkpoint import write_text_atomically
from maml.record.run_folder import versions

ROOT = Path(__file__).resolve().parents[1]
PEERS = ("learn2learn", "higher", "torchopt", "jax")
MIN_TURN_SECONDS = 0.2  # shortest duration of a turn, which repeats the computation

Clock = Callable[[], float]


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
    folder = ROOT / "results" / "benchmarks"
    options.add_argument("--out", type=Path, default=folder, help="folder (default results/benchmarks)")
    options.add_argument("--suffix", default="", help=f"suffix of the file names {name}.md and {name}.csv")
    options.set_defaults(name=name)
    return options


def describe_conditions(device: torch.device, num_threads: int) -> dict[str, str]:
    """Returns the conditions that a reader needs to judge or repeat the numbers."""
    packages = versions()
    for peer in PEERS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            packages[peer] = importlib.metadata.version(peer)
    # Without results/: the benchmark itself rewrites files there.
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
        "versions": ", ".join(f"{package} {version}" for package, version in packages.items()),
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
        return time.process_time, "CPU time of all threads of the process, which other load disturbs less"
    return time.perf_counter, "wall clock"


def seconds_per_call(run: Callable[[], object], clock: Clock, min_seconds: float = MIN_TURN_SECONDS) -> float:
    """Returns the seconds per call in one turn, which calls ``run`` until ``min_seconds`` have passed."""
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
    """Times functions in turns; returns seconds per call by name, one number per round.

    Numbers of the same round were measured one after the other, so their ratio is hardly disturbed by other load.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            seconds[name].append(seconds_per_call(run, clock, min_seconds))
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


# Writing.


def markdown_table(rows: Sequence[Mapping[str, object]]) -> list[str]:
    """Returns the lines of a Markdown table; all rows have the same columns."""
    lines: list[list[object]] = [list(rows[0]), ["---", *["---:"] * (len(rows[0]) - 1)]]
    lines += ([*row.values()] for row in rows)
    return ["", *(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines), ""]


def output_path(options: argparse.Namespace, kind: str = "md") -> Path:
    """Returns the path of the benchmark's file of a kind: ``md``, ``csv`` or ``png``."""
    return options.out / f"{options.name}{options.suffix}.{kind}"


def write_results(
    options: argparse.Namespace,
    title: str,
    conditions: Mapping[str, str],
    text: Sequence[str],
    rows: Sequence[Mapping[str, Any]],
) -> None:
    """Writes the Markdown page, and the CSV, which has the conditions in every row."""
    options.out.mkdir(parents=True, exist_ok=True)
    lines = [f"# {title}", "", *(f"- {key}: {value}" for key, value in conditions.items()), "", *text]
    write_text_atomically(output_path(options), "\n".join(lines).rstrip() + "\n")
    columns = dict.fromkeys(key for row in rows for key in (*row, *conditions))
    frame = pd.DataFrame([{**row, **conditions} for row in rows], columns=list(columns), dtype=object)
    write_text_atomically(output_path(options, "csv"), frame.to_csv(index=False))
