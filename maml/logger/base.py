"""What a logger is, and the one guard that keeps every mirror from stopping, slowing or corrupting a run."""

import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any, ClassVar

LOG = logging.getLogger(__name__)


class Logger:
    """Shows nothing beyond the local record; the interface of every logger.

    A run calls ``start`` once, ``log`` and ``report`` any number of times, ``finish`` once.
    """

    def start(self, run_dir: Path, experiment: str, run_id: str, config: Mapping[str, Any], resumed: bool) -> None:
        """Opens the mirror of one run.

        Args:
            run_dir: the run's folder; a mirror keeps its files below it.
            experiment: what is run, the name of a config file.
            run_id: which run of it; the same for every part of an interrupted run.
            config: the resolved config, plain dicts, lists and scalars.
            resumed: whether the local record already holds a part of this run.
        """

    def log(self, metrics: Mapping[str, float], iteration: int) -> None:
        """Adds the training metrics of one iteration."""

    def report(self, report: dict[str, Any], pictures: Mapping[str, Path]) -> None:
        """Adds the evaluation: the content of ``report.json`` with verdicts by cell (``cells``), and images by name."""

    def finish(self, status: str) -> None:
        """Closes the mirror; ``status`` is "finished", "interrupted" or "failed"."""


class Mirror(Logger, ABC):
    """A logger that depends on something that can be missing, break or hang.

    Every call is handed to one background thread and returns at once. The first call that fails gives one warning
    with its cause, and the mirror keeps still from then on. ``finish`` waits for at most ``patience`` seconds.
    Subclasses write ``_start``, ``_log``, ``_report`` and ``_finish``, which run in order in that thread and may raise.
    """

    name: ClassVar[str]
    patience: ClassVar[float] = 60.0
    _thread: threading.Thread | None = None

    def start(self, run_dir: Path, experiment: str, run_id: str, config: Mapping[str, Any], resumed: bool) -> None:
        """Starts the thread, and in it the mirror."""
        self._warned = False
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        # A daemon: a mirror that hangs must not keep the process from ending.
        self._thread = threading.Thread(target=self._work, args=[self._calls], name=f"{self.name} mirror", daemon=True)
        self._thread.start()
        self._submit(partial(self._start, run_dir, experiment, run_id, config, resumed))

    def log(self, metrics: Mapping[str, float], iteration: int) -> None:
        """Queues the metrics of one iteration."""
        self._submit(partial(self._log, dict(metrics), iteration))

    def report(self, report: dict[str, Any], pictures: Mapping[str, Path]) -> None:
        """Queues the evaluation."""
        self._submit(partial(self._report, report, dict(pictures)))

    def finish(self, status: str) -> None:
        """Closes the mirror once all that is queued went through, or leaves it when patience ends."""
        self._submit(partial(self._finish, status))
        self._submit(None)
        if self._thread is not None:
            self._thread.join(self.patience)
            if self._thread.is_alive():
                self._warn(f"{self.name} did not answer for {self.patience:.0f} seconds and was left behind")
            self._thread = None

    def _submit(self, call: Callable[[], None] | None) -> None:
        if self._thread is not None and self._thread.is_alive():
            self._calls.put(call)

    def _work(self, calls: "SimpleQueue[Callable[[], None] | None]") -> None:
        while (call := calls.get()) is not None:
            try:
                call()
            except BaseException as error:  # even a library's sys.exit is no reason to lose the warning
                self._warn(f"{self.name} stopped mirroring this run ({cause(error)})")
                return

    def _warn(self, what: str) -> None:
        """Says what the mirror lacks and why, in one line; only the first time in a run."""
        if not self._warned:
            self._warned = True
            LOG.warning("%s; the run goes on and its local record is complete.", what)

    @abstractmethod
    def _start(self, run_dir: Path, experiment: str, run_id: str, config: Mapping[str, Any], resumed: bool) -> None: ...

    @abstractmethod
    def _log(self, metrics: dict[str, float], iteration: int) -> None: ...

    @abstractmethod
    def _report(self, report: dict[str, Any], pictures: dict[str, Path]) -> None: ...

    @abstractmethod
    def _finish(self, status: str) -> None: ...


def cause(error: BaseException) -> str:
    """The kind of an error and the first line of what it says."""
    return ": ".join([type(error).__name__, *str(error).splitlines()[:1]])
