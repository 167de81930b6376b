"""The logger interface, and the base class that keeps a failing or slow service from affecting the run."""

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
    """The interface of every logger; this class itself sends nothing.

    A run calls ``start`` once, ``log`` and ``report`` any number of times, and ``finish`` once.
    """

    def start(self, run_dir: Path, experiment: str, run_id: str, config: Mapping[str, Any], resumed: bool) -> None:
        """Opens the mirror of one run.

        Args:
            run_dir: the run's folder; a mirror writes its files below it.
            experiment: name of the experiment, a file in ``conf/experiment/``.
            run_id: id of the run; it stays the same when an interrupted run resumes.
            config: the resolved config, made of plain dicts, lists and scalars.
            resumed: whether the run folder already contains an earlier part of this run.
        """

    def log(self, metrics: Mapping[str, float], iteration: int) -> None:
        """Adds the training metrics of one iteration."""

    def report(self, report: dict[str, Any], pictures: Mapping[str, Path]) -> None:
        """Adds an evaluation.

        Args:
            report: the content of ``report.json``, plus verdicts by cell (``cells``).
            pictures: image files, by name.
        """

    def finish(self, status: str) -> None:
        """Closes the mirror; ``status`` is ``finished``, ``interrupted`` or ``failed``."""


class Mirror(Logger, ABC):
    """A logger that depends on a library or service that can be missing, fail or hang.

    Every call returns at once and is executed by one background thread, in order. The first call that fails causes
    one warning, and the mirror then does nothing more. ``finish`` waits for at most ``patience`` seconds.
    Subclasses implement ``_start``, ``_log``, ``_report`` and ``_finish``, which run in that thread and may raise.
    """

    name: ClassVar[str]
    patience: ClassVar[float] = 60.0
    _thread: threading.Thread | None = None

    def start(self, run_dir: Path, experiment: str, run_id: str, config: Mapping[str, Any], resumed: bool) -> None:
        """Starts the background thread, which opens the mirror."""
        self._warned = False
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        # A daemon thread: a mirror that hangs must not keep the process from exiting.
        self._thread = threading.Thread(target=self._work, args=[self._calls], name=f"{self.name} mirror", daemon=True)
        self._thread.start()
        self._submit(partial(self._start, run_dir, experiment, run_id, config, resumed))

    def log(self, metrics: Mapping[str, float], iteration: int) -> None:
        """Queues the metrics of one iteration."""
        self._submit(partial(self._log, dict(metrics), iteration))

    def report(self, report: dict[str, Any], pictures: Mapping[str, Path]) -> None:
        """Queues an evaluation."""
        self._submit(partial(self._report, report, dict(pictures)))

    def finish(self, status: str) -> None:
        """Waits for all queued calls and closes the mirror; gives up after ``patience`` seconds."""
        self._submit(partial(self._finish, status))
        self._submit(None)
        if self._thread is not None:
            self._thread.join(self.patience)
            if self._thread.is_alive():
                self._warn(f"{self.name} did not finish within {self.patience:.0f} seconds and was abandoned")
            self._thread = None

    def _submit(self, call: Callable[[], None] | None) -> None:
        if self._thread is not None and self._thread.is_alive():
            self._calls.put(call)

    def _work(self, calls: "SimpleQueue[Callable[[], None] | None]") -> None:
        while (call := calls.get()) is not None:
            try:
                call()
            except BaseException as error:  # also a library's sys.exit, so that the warning is given
                self._warn(f"{self.name} stopped mirroring this run ({cause(error)})")
                return

    def _warn(self, what: str) -> None:
        """Logs a one-line warning; only the first one of a run is shown."""
        if not self._warned:
            self._warned = True
            LOG.warning("%s; the run continues, and its run folder is complete.", what)

    @abstractmethod
    def _start(self, run_dir: Path, experiment: str, run_id: str, config: Mapping[str, Any], resumed: bool) -> None: ...

    @abstractmethod
    def _log(self, metrics: dict[str, float], iteration: int) -> None: ...

    @abstractmethod
    def _report(self, report: dict[str, Any], pictures: dict[str, Path]) -> None: ...

    @abstractmethod
    def _finish(self, status: str) -> None: ...


def cause(error: BaseException) -> str:
    """Returns an error's class and the first line of its message."""
    return ": ".join([type(error).__name__, *str(error).splitlines()[:1]])
