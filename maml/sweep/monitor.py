"""Shows how far parallel jobs are: a line when a job ends, and one line about all of them that stands below."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from maml.errors import MamlError
from maml.sweep.state import Job, SweepReader, describe, summary_line, varying_keys

_POLL_SECONDS = 2.0
_LINE_SECONDS = 30.0  # between two lines about all jobs, where the output is not a terminal
_PLAIN: dict[str, Any] = {"markup": False, "highlight": False, "soft_wrap": True}


class Monitor:
    """A thread that watches the files of a sweep and prints what happens, until `stop`.

    Args:
        folder: folder of the sweep.
        num_jobs: number of all jobs, if known.
        console: the console to print on; None is standard error.
        seconds: time between two looks at the files.
    """

    def __init__(
        self,
        folder: Path,
        num_jobs: int | None,
        console: Console | None = None,
        seconds: float = _POLL_SECONDS,
    ) -> None:
        self._folder, self._num_jobs, self._seconds = folder, num_jobs, seconds
        self._console = console or Console(stderr=True)
        self._reader = SweepReader(folder)
        self._ended: set[tuple[str, ...]] | None = None
        self._next_line = 0.0
        self._live: Live | None = None
        if self._console.is_interactive:
            self._live = Live(Text("starting"), console=self._console, auto_refresh=False)
            self._live.start()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sweep monitor", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Looks a last time, and ends the thread."""
        self._stopped.set()
        self._thread.join()
        if self._live:
            self._live.stop()

    def _run(self) -> None:
        while True:
            last = self._stopped.is_set()
            started = time.monotonic()
            with suppress(MamlError, OSError):  # the summary at the end says what is damaged
                self._show(self._reader.jobs())
            if last:
                return
            self._stopped.wait(max(self._seconds, 20 * (time.monotonic() - started)))  # at most 5 % of a core

    def _show(self, jobs: list[Job]) -> None:
        ended = {job.overrides for job in jobs if job.state in ("finished", "failed")}
        if self._ended is None:
            self._ended = ended  # in an earlier start of this sweep
            self._console.print(f"the output of each job is in {self._folder / 'jobs'}/*.log", **_PLAIN)
        keys = varying_keys(jobs)
        for job in jobs:
            if job.overrides in ended - self._ended:
                self._console.print(_news(job, keys), **_PLAIN)
        self._ended = ended
        line = summary_line(jobs, self._num_jobs)
        if self._live:
            self._live.update(Text(line), refresh=True)
        elif time.monotonic() >= self._next_line or self._stopped.is_set():
            self._next_line = time.monotonic() + _LINE_SECONDS
            self._console.print(line, **_PLAIN)


def _news(job: Job, keys: list[str]) -> str:
    if not job.report:
        return f"failed: {describe(job, keys)}: {' '.join(job.problem.split())}"  # one line
    mean, ci95 = job.headline
    return f"finished: {describe(job, keys)}: {job.headline_label} {mean:.4g} +- {ci95:.2g}"
