"""The logger interface, and the base class that keeps a failing or slow service from affecting the run."""

import hashlib
import json
import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any, ClassVar

from maml.errors import cause

LOG = logging.getLogger(__name__)


class Logger:
    """The interface of every logger; this class itself sends nothing.

    A run calls ``start`` once, ``log`` and ``report`` any number of times, and ``finish`` once.

    Class attributes:
        wants_diagnostics: whether ``log`` also gets the numbers that ``metrics.jsonl`` does not hold
            (`maml.training.diagnostics`).

    Attributes:
        is_complete: after ``finish``, whether the service, or its files on this machine, got everything.
    """

    wants_diagnostics: ClassVar[bool] = False
    is_complete = True

    def check_seeds(self, num_seeds: int) -> None:
        """Checks, before anything is written, that the service can take the runs of all seeds of this process.

        Raises:
            MamlError: if it cannot.
        """

    def replay_into(self, files_dir: Path) -> None:
        """Says, before `start`, that the run has ended already and is replayed from its folder (`maml.logger.mirror`).

        Args:
            files_dir: the folder below which a mirror writes its files.
        """

    def start(self, run_dir: Path, experiment: str, run_id: str, config: Mapping[str, Any], resumed: bool) -> None:
        """Opens the mirror of one run.

        Args:
            run_dir: the run's folder; a mirror writes its files below it.
            experiment: name of the experiment, a file in ``conf/experiment/``.
            run_id: id of the run; it stays the same when an interrupted run resumes.
            config: the resolved config and the entries of `maml.logger.mirror.described`: plain dicts, lists, scalars.
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

    def alert(self, title: str, text: str) -> None:
        """Tells the user at once that something went wrong, if the service can send messages."""

    def finish(self, status: str) -> None:
        """Closes the mirror; ``status`` is ``finished``, ``interrupted`` or ``failed``."""

    def has_part(self, files_dir: Path, experiment: str, run_id: str, config: Mapping[str, Any]) -> bool:
        """Returns whether an earlier part of a run was given to the service from this machine."""
        return True

    def has(
        self, files_dir: Path, experiment: str, run_id: str, config: Mapping[str, Any], report: Mapping[str, Any]
    ) -> bool:
        """Returns whether the whole of a run, up to this report, was given to the service from this machine before.

        Args:
            files_dir: the folder below which the mirror writes its files.
            experiment: as for `start`.
            run_id: as for `start`.
            config: as for `start`.
            report: the content of a ``report.json``.
        """
        return True


class Mirror(Logger, ABC):
    """A logger that depends on a library or service that can be missing, fail or hang.

    Every call returns at once and is executed by one background thread, in order. The first call that fails causes
    one warning, and the mirror then does nothing more. ``finish`` waits for at most ``patience`` seconds. If that is
    not enough, the service hangs: it is abandoned, and later runs of this process are not mirrored.
    Subclasses implement ``_start``, ``_log``, ``_report`` and ``_finish``, which run in that thread and may raise.

    Class attributes:
        name: the service's name in messages.
        folder: name of the folder below ``files_dir`` that has the mirror's files; there it also notes what it got.
            None has no files, and nothing is noted.
        abandoned: whether the service was abandoned in this process.

    Attributes:
        destination: where in the service runs go. A run counts as sent only for the destination that it was sent to.
        patience: longest time that ``finish`` waits, in seconds.
        files_dir: the folder below which the mirror writes its files.
        replayed: whether the run ended earlier and is replayed from its folder.
    """

    name: ClassVar[str]
    folder: ClassVar[str | None] = None
    patience: float = 60.0
    abandoned: ClassVar[bool] = False
    wants_diagnostics = True
    destination: Mapping[str, Any] = {}
    files_dir: Path
    replayed = False
    _replay_dir: Path | None = None
    _thread: threading.Thread | None = None
    _marker: Path | None = None
    _part: Path | None = None
    _lacks_earlier_part = False

    def replay_into(self, files_dir: Path) -> None:
        """Makes the next `start` write below another folder, and leave out what is true of the present only."""
        self._replay_dir = files_dir

    def start(self, run_dir: Path, experiment: str, run_id: str, config: Mapping[str, Any], resumed: bool) -> None:
        """Starts the background thread, which opens the mirror."""
        self._warned, self._marker, self._thread, self.is_complete = False, None, None, False
        self._part, self._lacks_earlier_part = None, False
        if self.abandoned:
            return
        self.replayed = self._replay_dir is not None
        self.files_dir, self._replay_dir = self._replay_dir or run_dir, None
        self._marker_of = partial(self._find_marker, self.files_dir, experiment, run_id, config)
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        # A daemon thread: a mirror that hangs must not keep the process from exiting.
        self._thread = threading.Thread(target=self._work, args=[self._calls], name=f"{self.name} mirror", daemon=True)
        self._thread.start()
        self._submit(partial(self._start, run_dir, experiment, run_id, config, resumed))
        if self.folder is not None:
            name = self._id(self.files_dir, experiment, run_id, config)
            self._submit(partial(self._begin_part, self.files_dir / self.folder / f"{name}.open", resumed))

    def log(self, metrics: Mapping[str, float], iteration: int) -> None:
        """Queues the metrics of one iteration."""
        self._submit(partial(self._log, dict(metrics), iteration))

    def report(self, report: dict[str, Any], pictures: Mapping[str, Path]) -> None:
        """Queues an evaluation, unless the service has it: the process was killed after that, before the run's end."""
        if self._thread is not None:
            self._marker = self._marker_of(report)
            if self._marker is not None and self._marker.exists():
                return
        self._submit(partial(self._report, report, dict(pictures)))

    def alert(self, title: str, text: str) -> None:
        """Queues a message to the user."""
        self._submit(partial(self._alert, title, text))

    def finish(self, status: str) -> None:
        """Waits for all queued calls and closes the mirror; gives up after ``patience`` seconds."""
        self._submit(partial(self._finish, status))
        self._submit(self._complete)
        self._submit(None)
        if self._thread is None:
            return
        thread, self._thread = self._thread, None
        try:
            thread.join(0 if self.abandoned else self.patience)
        except BaseException:  # the user does not want to wait
            self._abandon()
            raise
        if thread.is_alive() and not self.abandoned:
            self._warn(f"{self.name} did not finish within {self.patience:.0f} seconds and was abandoned")
            self._abandon()

    def has_part(self, files_dir: Path, experiment: str, run_id: str, config: Mapping[str, Any]) -> bool:
        """Returns whether the mirror has files of the run."""
        return self.folder is None or (files_dir / self.folder).is_dir()

    def has(
        self, files_dir: Path, experiment: str, run_id: str, config: Mapping[str, Any], report: Mapping[str, Any]
    ) -> bool:
        """Returns whether `finish` was reached after this report, which leaves a mark among the mirror's files."""
        marker = self._find_marker(files_dir, experiment, run_id, config, report)
        return marker is not None and marker.exists()

    def _find_marker(
        self, files_dir: Path, experiment: str, run_id: str, config: Mapping[str, Any], report: Mapping[str, Any]
    ) -> Path | None:
        """Returns the file that exists if the service got the run up to this report."""
        if self.folder is None:
            return None
        content = {**{key: report.get(key) for key in ("iteration", "evaluation", "headline")}, **self.destination}
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
        name = self._id(files_dir, experiment, run_id, config)
        return files_dir / self.folder / f"{name}.{digest}.mirrored"

    def _id(self, files_dir: Path, experiment: str, run_id: str, config: Mapping[str, Any]) -> str:
        """Returns the run's id in the service: the same for every part and every repetition of a run."""
        return "-".join([experiment, run_id, *([files_dir.name] if config.get("mode") == "eval" else [])])

    def _begin_part(self, path: Path, resumed: bool) -> None:
        """Notes that a part has begun. If an earlier one never ended, the service may lack what it had in memory."""
        self._part, self._lacks_earlier_part = path, resumed and path.exists()
        if path.parent.is_dir():  # a disabled service writes no files
            path.touch()

    def _complete(self) -> None:
        self.is_complete = True
        if self._part is None or self._lacks_earlier_part or not self._part.parent.is_dir():
            return
        self._part.unlink(missing_ok=True)
        if self._marker is not None:
            self._marker.touch()

    def _submit(self, call: Callable[[], None] | None) -> None:
        if self._thread is not None and self._thread.is_alive():
            self._calls.put(call)

    def _work(self, calls: "SimpleQueue[Callable[[], None] | None]") -> None:
        while (call := calls.get()) is not None and not self.abandoned:
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

    def _abandon(self) -> None:
        """Gives the service up for the rest of this process. Whatever the background thread reports is not shown."""
        type(self).abandoned = self._warned = True

    @abstractmethod
    def _start(self, run_dir: Path, experiment: str, run_id: str, config: Mapping[str, Any], resumed: bool) -> None: ...

    @abstractmethod
    def _log(self, metrics: dict[str, float], iteration: int) -> None: ...

    @abstractmethod
    def _report(self, report: dict[str, Any], pictures: dict[str, Path]) -> None: ...

    def _alert(self, title: str, text: str) -> None:
        """Does nothing, for services that send no messages."""

    @abstractmethod
    def _finish(self, status: str) -> None: ...


def curve_name(curve: Mapping[str, Any]) -> str:
    """Returns the name under which a service shows a curve of a report, such as ``accuracy_5shot``."""
    return f"{curve['metric']}_{curve['num_shots']}shot"
