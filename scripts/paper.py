"""Runs all missing or interrupted runs of the paper's tables and figures, several at a time, and renders the results.

    python scripts/paper.py                               # everything
    python scripts/paper.py --only table2,figure3         # the runs of these; table2/MAML is one row
    python scripts/paper.py --plan                        # list the runs and their estimated times
    python scripts/paper.py --budget 8m                   # most valuable runs first; stops in time, all saved
    python scripts/paper.py --smoke                       # test everything in minutes; its numbers mean nothing

You can stop it at any time and in any way. The same command resumes from the last checkpoints.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.text import Text

from maml.cli.scripts import exit_with, print_problems
from maml.config.paths import RESULTS, ROOT
from maml.errors import MamlError
from maml.paper.plan import (
    WATERMARK,
    Job,
    estimate,
    list_needs,
    most_valuable_first,
    plan,
    select,
    write_smoke_cells,
)
from maml.record.atomic import remove_leftovers, write_text_atomically
from maml.record.index import Run, find_runs
from maml.record.lock import acquire, advice, holder
from maml.record.provenance import command_line
from maml.sweep.gpu_lease import visible_gpus
from maml.training.progress import LINE_SECONDS, REDRAW_SECONDS

OUT_OF_TIME = "OUT_OF_TIME"
MIN_BUDGET = 30  # seconds; starting a run takes up to ten
RENDERERS = {
    "paper_tables.py": "",
    "paper_figures.py": "",
    "report.py": "report.html",
}  # and the file that each writes in results/; "" is results/ itself


def main(arguments: Sequence[str] | None = None) -> int:
    """Plans, runs and renders.

    Returns:
        1 if a job failed or a damaged run was left out, 128 + n after signal n, else 0.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.jobs is not None and options.jobs < 1:
        parser.error("--jobs: give 1 or more")
    runs_dir, results, roots = options.runs_dir, options.results, [options.runs_dir, options.results / "runs"]
    if options.smoke:
        print(WATERMARK)
        runs_dir = runs_dir.with_name(f"{runs_dir.name}_smoke")
        results, roots = runs_dir / "results", [runs_dir]
        write_smoke_cells(options.results, results)
    needs = list_needs(results)
    if options.only:
        needs = select(needs, options.only)
    if options.plan:
        runs, damaged = find_runs(*roots)
        jobs = plan(needs, options.seeds, runs, runs_dir)
        print_plan(most_valuable_first(jobs, runs) if options.budget else jobs, runs)
        return print_problems(damaged)
    with _exclusive_lock(runs_dir):
        runs, damaged = find_runs(*roots)
        jobs = plan(needs, options.seeds, runs, runs_dir, options.wandb)
        if options.smoke:
            refuse_mixing(jobs, plan(list_needs(options.results), options.seeds, [], options.runs_dir))
        failed = print_problems(damaged)
        if options.budget:
            jobs = most_valuable_first(jobs, runs)
        stopped_by, all_succeeded = run_jobs(jobs, options.jobs, options.budget)
    if stopped_by:
        again = f"Run the same command again to continue: {command_line()}"
        if stopped_by == OUT_OF_TIME:
            print(f"the budget is used up. {again}\nNothing was rendered; make paper-tables shows what there is")
            return int(bool(failed) or not all_succeeded)
        print(f"stopped by {stopped_by}; all progress is saved. {again}")
        return 128 + signal.Signals[stopped_by]
    rendered = render(roots, results, options.smoke)
    return int(bool(failed) or not all_succeeded or not rendered)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", metavar="NAMES", type=_parse_names, help="cells to run, as artifact[/row[/column]], comma-separated"
    )
    parser.add_argument("--plan", action="store_true", help="only print the runs and their estimated times")
    parser.add_argument("--smoke", action="store_true", help="tiny runs in other folders; their numbers mean nothing")
    parser.add_argument(
        "--budget",
        type=_parse_budget,
        help="time for the runs, as 90s, 8m or 1h30m: those that complete most of the paper per hour come first, and "
        "unfinished ones are saved before it ends",
    )
    parser.add_argument("--wandb", action="store_true", help="mirror runs to Weights & Biases, grouped by table")
    parser.add_argument(
        "--jobs", type=int, help="most jobs at once (default: one per GPU; without GPU, as many as fit on the cores)"
    )
    parser.add_argument(
        "--seeds", type=_parse_seeds, default=[0], help="seeds of each experiment, comma-separated (default: 0)"
    )
    parser.add_argument(
        "--runs-dir", type=Path, default=Path("runs"), help="folder in which run folders are made (default: runs)"
    )
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="folder of cells.yaml, and of the output (default: results)"
    )
    return parser


def _parse_names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _parse_seeds(text: str) -> list[int]:
    return [int(seed) for seed in text.split(",")]


def _parse_budget(text: str) -> float:
    """Returns a time in seconds."""
    match = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text)
    parts = match.groups(default="0") if match else ("0", "0", "0")
    seconds = sum(int(part) * unit for part, unit in zip(parts, (3600, 60, 1), strict=True))
    if seconds < MIN_BUDGET:
        raise argparse.ArgumentTypeError(f"{text}: give a time of at least {MIN_BUDGET} s, as in 90s, 8m or 1h30m")
    return seconds


@contextmanager
def _exclusive_lock(runs_dir: Path) -> Iterator[None]:
    """Makes sure that only one process runs this script, because two would start the same jobs."""
    runs_dir.mkdir(parents=True, exist_ok=True)
    path = runs_dir / ".paper.lock"
    lock = acquire(path)
    if lock is None:
        raise MamlError(f"another `make paper` ({holder(path)}) is running in {runs_dir}; {advice(path)}")
    try:
        yield
    finally:
        lock.release()


def refuse_mixing(smoke: Sequence[Job], real: Sequence[Job]) -> None:
    """Checks that no smoke test has the run id of a real run.

    Raises:
        MamlError: if a smoke test has the training settings of a real experiment.
    """
    mixed = {job.run_id: job.name for job in smoke}.keys() & {job.run_id for job in real}
    if mixed:
        names = ", ".join(job.name for job in real if job.run_id in mixed)
        raise MamlError(
            f"a smoke test of {names} would have the settings of the real run; give the experiment more iterations "
            "than a smoke test"
        )


def print_plan(jobs: Sequence[Job], runs: Sequence[Run]) -> None:
    """Prints a table of all jobs, with their estimated times and sizes."""
    rows, hours, size, unknown = [], 0.0, 0, 0
    for job in jobs:
        expected = estimate(job, runs) if job.is_open else None
        if expected is not None:
            hours, size = hours + (expected.hours or 0), size + (expected.size or 0)
            unknown += expected.hours is None or expected.size is None
        rows.append(
            (
                job.name,
                job.state,
                f"{job.left:,}" if expected else "",
                _hours(expected.hours) + (f" (on {expected.machine})" if expected.machine else "") if expected else "",
                _megabytes(expected.size) if expected else "",
                ", ".join(job.artifacts),
            )
        )
    header = ("job", "state", "iterations left", "hours", "disk", "for")
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(5)]
    for row in [header, *rows]:
        print("  ".join([*(text.ljust(width) for text, width in zip(row, widths, strict=False)), row[-1]]).rstrip())
    print(f"\n{_counts(jobs)}")
    more = f", and {unknown} jobs of unknown length or size" if unknown else ""
    print(f"{_hours(hours)} hours one after another, {_megabytes(size)}{more}")
    for reason in dict.fromkeys(job.impossible for job in jobs if job.state == "cannot"):
        print(f"cannot run here: {reason}")


def _counts(jobs: Sequence[Job]) -> str:
    counts = Counter(job.state.partition(" ")[0] for job in jobs)
    return (
        f"{len(jobs)} job{'s' * (len(jobs) != 1)}: {', '.join(f'{count} {state}' for state, count in counts.items())}"
    )


def _hours(hours: float | None) -> str:
    return "unknown" if hours is None else f"{hours:.2f}" if hours < 10 else f"{hours:,.0f}"


def _megabytes(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 1e6:,.1f} MB"


class Worker:
    """A running job: its ``train.py`` processes run one after the other; their output goes to a log beside the folder.

    Args:
        job: the job to run.
        slot: number of the job among the jobs that run at once.
        overrides: what is added to its commands.
        environment: environment variables of the processes.
    """

    def __init__(self, job: Job, slot: int, overrides: Sequence[str], environment: dict[str, str]) -> None:
        self.job, self.slot, self.overrides, self.environment = job, slot, overrides, environment
        self.log = job.folder.with_suffix(".log")
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.commands = deque(job.commands)
        self.shown, self.shown_at = "", time.monotonic()
        self.start()

    def start(self) -> None:
        """Starts the next process."""
        self.arguments = [*self.commands.popleft(), *self.overrides]
        with open(self.log, "ab") as log:
            self.begin = log.tell()
            self.process = subprocess.Popen(
                [sys.executable, str(ROOT / "train.py"), *self.arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.environment,
                start_new_session=True,  # so that Ctrl-C in a terminal reaches it only once, passed on by this script
            )

    @property
    def lines(self) -> list[str]:
        """The output of the process so far, without empty lines."""
        with open(self.log, errors="replace") as log:
            log.seek(self.begin)
            return [line.strip() for line in log if line.strip()]


class Pool:
    """The jobs that run at once, those that wait for room, and what became of those that have ended.

    Args:
        jobs: all jobs of the plan.
        limit: most jobs at once; None is one per GPU, or, without a GPU, as many as fit on the cores.
        display: says what starts and ends.

    Attributes:
        waiting: jobs that have not started.
        workers: jobs that run.
        is_cut_off: whether a job was stopped before its end.
        failed: a message for each job that failed.
        impossible: why jobs cannot run here, by name.
    """

    def __init__(self, jobs: Sequence[Job], limit: int | None, display: _StatusDisplay) -> None:
        self.waiting = [job for job in jobs if job.is_open]
        self.workers: list[Worker] = []
        self.is_cut_off = False
        self.failed: list[str] = []
        self.impossible = {job.name: job.impossible for job in jobs if job.state == "cannot"}
        self._display, self._gpus, self._limit = display, visible_gpus(), limit
        self._room = limit or len(self._gpus) or os.cpu_count() or 1
        self._trained_elsewhere: set[str] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Stops the jobs if this program fails: nobody would wait for them, and they save what they have."""
        if kind is not None:
            self.send(signal.SIGTERM)

    def start_waiting(self) -> None:
        """Starts waiting jobs, in their order, while there is room."""
        for job in tuple(self.waiting):
            if sum(self._threads(worker.job) for worker in self.workers) + self._threads(job) > self._room:
                return
            if job.alive:  # perhaps started by a `make paper` that was killed; the job continues after it ends
                if job.name not in self._trained_elsewhere:
                    self._display.say(f"waiting for {job.name}: another process is training it")
                self._trained_elsewhere.add(job.name)
                continue
            self.waiting.remove(job)
            self._start(job)

    def _threads(self, job: Job) -> int:
        return 1 if self._limit or self._gpus else min(job.num_threads, self._room)

    def _start(self, job: Job) -> None:
        if job.committed and not job.folder.exists():
            self._display.say(
                f"{job.name} resumes from {job.committed}, copied to {job.folder}; the committed run does not change"
            )
        job.prepare()
        slot = min(set(range(self._room)) - {worker.slot for worker in self.workers})
        gpu = {"CUDA_VISIBLE_DEVICES": self._gpus[slot % len(self._gpus)]} if self._gpus else {}
        # Alone, a job takes all cores. Beside others, one thread for each is faster than all threads for all.
        has_all = self._gpus or job.num_threads > 1 or not (self.workers or self.waiting)
        self.workers.append(Worker(job, slot, [] if has_all else ["hardware.num_threads=1"], os.environ | gpu))
        self._display.say(f"started {job.name} ({job.state}); its output: {self.workers[-1].log}")

    def send(self, number: int) -> None:
        """Sends a signal to all running jobs."""
        for worker in self.workers:
            worker.process.send_signal(number)

    def kill(self) -> None:
        """Kills all running jobs."""
        for worker in self.workers:
            self._display.say(
                f"killed {worker.job.name}, which did not end in time: it goes on from its last checkpoint"
            )
            worker.process.kill()
            worker.process.wait()

    def collect(self, is_stopping: bool) -> None:
        """Takes the jobs out that have ended, or starts their next process, unless everything is to stop."""
        for worker in tuple(self.workers):
            status = worker.process.poll()
            if status is None:
                continue
            if status == 0 and worker.commands and not is_stopping:
                worker.start()
                continue
            self.workers.remove(worker)
            name, output = worker.job.name, worker.lines
            if status == 0 and not worker.commands:
                self._display.say(f"finished {name}")
            elif is_stopping:
                self.is_cut_off = True
                self._display.say(f"stopped {name}: {output[-1] if output else 'before it began'}")
            elif status == os.EX_UNAVAILABLE:
                self.impossible[name] = output[-1]
                self._display.say(f"cannot run here: {name}")
            else:
                self._display.say(f"FAILED {name}")
                command = shlex.join(["python", "train.py", *worker.arguments])
                lines = [f"FAILED {name} (status {status}): {command}", *output[-5:], f"log: {worker.log}"]
                self.failed.append("\n    ".join(lines))

    def print_problems(self) -> None:
        """Prints which jobs cannot run here, by reason, and which have failed."""
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.impossible.items():
            by_reason.setdefault(reason, []).append(name)
        for reason, names in by_reason.items():
            print(f"cannot run here: {', '.join(names)}: {reason}")
        for message in self.failed:
            print(message, file=sys.stderr)


def run_jobs(jobs: Sequence[Job], limit: int | None, budget: float | None = None) -> tuple[str, bool]:
    """Runs all unfinished jobs that can run here; a failed job does not stop the others.

    Args:
        jobs: all jobs of the plan.
        limit: as in `Pool`.
        budget: seconds until all jobs have to be saved and ended; None is unlimited.

    Returns:
        The name of the signal that stopped the jobs, or `OUT_OF_TIME`; empty if nothing did. And whether no job failed.
    """
    end = time.monotonic() + budget if budget else math.inf
    # Jobs save and end within this time. An iteration of reinforcement learning on a CPU takes up to half a minute.
    stop_at = end - min(60.0, (budget or 0.0) / 5)
    print(f"{_counts(jobs)}")
    with _signals() as received, _StatusDisplay() as display, Pool(jobs, limit, display) as pool:
        passed_on, is_late = 0, False
        while pool.workers or (pool.waiting and not received and not is_late):
            if not received and not is_late and time.monotonic() >= stop_at:
                is_late = True
                pool.send(signal.SIGTERM)
            if time.monotonic() >= end:
                pool.kill()
            is_stopping = bool(received) or is_late
            if not is_stopping:
                pool.start_waiting()
            for number in received[passed_on:]:
                passed_on += 1
                pool.send(number)
            pool.collect(is_stopping)
            display.show(pool.workers)
            time.sleep(REDRAW_SECONDS)
    pool.print_problems()
    if received:
        return signal.Signals(received[0]).name, not pool.failed
    return (OUT_OF_TIME if is_late and (pool.is_cut_off or pool.waiting) else ""), not pool.failed


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects signals to stop; SIGHUP, from a closed terminal, counts as SIGTERM."""
    received: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        received.append(signal.SIGTERM if number == signal.SIGHUP else number)

    before = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _StatusDisplay:
    """Shows one line per running job: updated live on a terminal, printed at intervals elsewhere."""

    def __init__(self) -> None:
        self.console = Console(soft_wrap=True, highlight=False, markup=False)
        self.live = Live(console=self.console, auto_refresh=False, transient=True)

    def __enter__(self) -> _StatusDisplay:
        if self.console.is_interactive:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.live.stop()

    def say(self, text: str) -> None:
        """Prints a line."""
        self.console.print(text)

    def show(self, workers: Sequence[Worker]) -> None:
        """Shows the last line of each job's output."""
        status = {worker: f"{worker.job.name}: {(worker.lines or ['starting'])[-1]}" for worker in workers}
        if self.console.is_interactive:
            self.live.update(Text("\n".join(status.values()), no_wrap=True, overflow="ellipsis"), refresh=True)
            return
        for worker, line in status.items():
            if line != worker.shown and time.monotonic() - worker.shown_at >= LINE_SECONDS:
                worker.shown, worker.shown_at = line, time.monotonic()
                self.say(line)


def render(roots: Sequence[Path], results: Path, smoke: bool) -> bool:
    """Renders tables, figures and the report; returns whether all renderers succeeded."""
    for folder in (results, *(path for path in results.rglob("*/") if not path.is_relative_to(results / "runs"))):
        remove_leftovers(folder)  # a killed renderer may have left some
    folders = ["--runs-dir", *(str(root) for root in roots if root.is_dir()), "--results", str(results)]
    statuses = [
        subprocess.run([sys.executable, str(ROOT / "scripts" / name), *folders, "--out", str(results / out)]).returncode
        for name, out in RENDERERS.items()
    ]
    for path in results.rglob("*.md") if smoke else ():
        text = path.read_text()
        if not text.startswith(mark := f"**{WATERMARK}**\n\n"):
            write_text_atomically(path, f"{mark}{text}")
    return not any(statuses)


if __name__ == "__main__":
    exit_with(main)
