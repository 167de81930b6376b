"""The job of a sweep that this process runs: its record, its heartbeat, its output, and its files on other disks."""

from __future__ import annotations

import json
import os
import platform
import signal
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from omegaconf import DictConfig

from maml.config.compose import experiment_name, plain_overrides, settings_of
from maml.config.identity import evaluation_config
from maml.errors import MamlError
from maml.record.atomic import write_bytes_atomically
from maml.record.heartbeat import Heartbeat, looks_dead
from maml.record.run_files import find_report, read_json
from maml.record.run_folder import RunFolder
from maml.sweep.output import OutputFile
from maml.sweep.state import job_name, job_overrides

_POLL_SECONDS = 0.1
_running: RunningJob | None = None  # the job that this process runs
_stopped = False  # whether this process was asked to stop


class Post(Protocol):
    """The way to the disk of the process that started the sweep. Paths are absolute, or relative to its runs_dir."""

    def read(self, folder: str) -> dict[str, bytes]:
        """Returns the files of a run's folder, by their paths in it."""

    def write(self, files: Mapping[str, bytes | None]) -> None:
        """Writes files, the last one last, and deletes those that are None. Returns when this is done."""


class RunningJob:
    """Writes the job's files in the sweep's folder: ``jobs/<name>.json``, ``.heartbeat`` and perhaps ``.log``.

    Args:
        folder: folder of the sweep, on this machine.
        config: the job's config, with ``hydra``.
        to_file: whether the job's output goes to a file.
        post: the way to the disk of the process that started the sweep; None if this machine sees that disk.
        with_checkpoints: whether checkpoints are sent there too, so that the run can go on on another machine.
        command: process id of the sweep's command.
        started: the start of the sweep that the job belongs to, as in `sweep.json`; None if it is not known.
    """

    def __init__(
        self,
        folder: Path,
        config: DictConfig,
        to_file: bool = False,
        post: Post | None = None,
        with_checkpoints: bool = False,
        command: int = 0,
        started: float | None = None,
    ) -> None:
        global _running
        self._command = command
        self._jobs, self._post, self._with_checkpoints = folder / "jobs", post, with_checkpoints
        self._jobs.mkdir(parents=True, exist_ok=True)
        overrides = job_overrides(plain_overrides(config.hydra))
        self.name = job_name(overrides)
        self._record: dict[str, Any] = {"overrides": overrides, "error": None, "mode": "train", "seconds": None}
        if started is not None:
            self._record["started"] = started
        self._config = config
        self._runs: dict[str, RunFolder] = {}  # by the path that the process that started the sweep knows
        self._sent: dict[Path, int] = {}  # when a file was changed that has been sent
        self._find_runs()
        self._fetch()
        self._was_finished = bool(self._runs) and all(map(_is_finished, self._runs.values()))
        # The time of the rest of a training says nothing about that of others.
        self._resumes = self._record["mode"] == "train" and any(run.has_begun() for run in self._runs.values())
        self._started = time.monotonic()
        self._write(".json", self._record)
        self._output = OutputFile(self._jobs / f"{self.name}.log") if to_file else None
        self._heartbeat = Heartbeat(self._beat)
        _running = self

    def _find_runs(self) -> None:
        """Finds the folders of the job's runs, and records them."""
        try:
            settings = settings_of(self._config)
        except MamlError:
            pass  # the job itself reports it
        else:
            hydra = self._config.hydra
            experiment = experiment_name(hydra.runtime.choices)
            seeds = range(settings.seed, settings.seed + settings.seeds)
            runs = [RunFolder(settings.for_seed(seed), experiment) for seed in seeds]
            runs_dir = self._jobs.parents[2]
            self._runs = {_address(run, hydra.runtime.cwd, runs_dir): run for run in runs}
            self._record["mode"] = settings.mode
        self._record["runs"] = [
            {
                "seed": run.settings.seed,
                "folder": address,
                "run_id": run.run_id,
                "evaluation": evaluation_config(run.settings),
                "num_iterations": run.settings.num_iterations,
            }
            for address, run in self._runs.items()
        ]

    def stop(self) -> None:
        """Ends the heartbeat: this process no longer works on the job."""
        self._heartbeat.stop()
        (self._jobs / f"{self.name}.heartbeat").unlink(missing_ok=True)
        if self._post is not None:
            self._post.write({f"{self._place}/{self.name}.heartbeat": None})

    def end(self, error: str | None) -> None:
        """Records the end of the job.

        Args:
            error: why it failed; None if it did not.
        """
        self._heartbeat.stop()
        if error is None and not (self._was_finished or self._resumes):
            self._record["seconds"] = time.monotonic() - self._started
        self._record["error"] = error
        self._find_runs()  # again: another job may have made the run's folder since, under another experiment's name
        if self._output is not None:
            self._output.close()
        if self._post is not None:
            log = self._jobs / f"{self.name}.log"
            if log.exists():
                self._post.write({f"{self._place}/{log.name}": log.read_bytes()})
            self._send_runs()
        self._write(".json", self._record)
        self.stop()
        global _running
        _running = None

    @property
    def _place(self) -> str:
        return f"sweeps/{self._jobs.parent.name}/jobs"

    def _write(self, suffix: str, content: Mapping[str, Any]) -> None:
        text = (json.dumps(content, indent=2) + "\n").encode()
        write_bytes_atomically(self._jobs / f"{self.name}{suffix}", text)
        if self._post is not None:
            self._post.write({f"{self._place}/{self.name}{suffix}": text})

    def _beat(self, beat: Mapping[str, Any]) -> None:
        self._write(".heartbeat", {**beat, "command": self._command})
        self._send_runs()

    def _fetch(self) -> None:
        """Gets the runs' folders from the process that started the sweep, if this machine does not have them."""
        if self._post is None:
            return
        for address, run in self._runs.items():
            if run.path.exists():
                continue
            for name, content in self._post.read(address).items():
                path = run.path / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
                self._sent[path] = path.stat().st_mtime_ns

    def _send_runs(self) -> None:
        """Sends the files of the runs that have changed since they were last sent."""
        if self._post is None:
            return
        for address, run in self._runs.items():
            files: dict[str, bytes | None] = {}
            times: dict[Path, int] = {}
            for path in run_files(run.path, self._with_checkpoints):
                changed = path.stat().st_mtime_ns
                if self._sent.get(path) != changed:
                    files[f"{address}/{path.relative_to(run.path)}"] = path.read_bytes()
                    times[path] = changed
            if files:
                self._post.write(files)
                self._sent |= times


def stop_process() -> bool:
    """Notes that this process was asked to stop: its job has ended, and it takes no other one.

    Returns:
        Whether it runs a job.
    """
    global _stopped
    _stopped = True
    if _running is not None:
        _running.stop()
    return _running is not None


def is_stopped() -> bool:
    """Returns whether this process was asked to stop."""
    return _stopped


def stop_jobs(folder: Path, command: int, seconds: float) -> None:
    """Asks the jobs of a command that run in other processes of this machine to save and end, and waits for that.

    Args:
        folder: folder of the sweep.
        command: process id of the command.
        seconds: how long to wait at most.
    """
    end = time.monotonic() + seconds
    asked: set[tuple[Path, int]] = set()
    while (jobs := _jobs_here(folder, command)) and time.monotonic() < end:
        for _, process in jobs - asked:  # only once: a second signal could meet a job while it writes its last files
            with suppress(OSError):
                os.kill(process, signal.SIGTERM)
        asked |= jobs
        time.sleep(_POLL_SECONDS)


def _jobs_here(folder: Path, command: int) -> set[tuple[Path, int]]:
    """Returns the heartbeat and the process of each such job."""
    return {
        (path, beat["pid"])
        for path, beat in live_jobs(folder).items()
        if (beat["host"], beat.get("command")) == (platform.node(), command) and beat["pid"] != os.getpid()
    }


def live_jobs(folder: Path) -> dict[Path, dict[str, Any]]:
    """Returns the heartbeats of the jobs of a sweep that run."""
    found = {}
    for path in (folder / "jobs").glob("*.heartbeat"):
        with suppress(MamlError):
            beat = read_json(path)
            if beat is not None and not looks_dead(beat):
                found[path] = beat
    return found


def _is_finished(run: RunFolder) -> bool:
    try:
        return find_report(run.path, run.run_id, evaluation_config(run.settings)) is not None
    except MamlError:
        return False  # a report is damaged; the job itself reports it


def run_files(folder: Path, with_checkpoints: bool) -> list[Path]:
    """Returns the files of a run's folder that are worth sending; those that make the run finished come last."""
    paths = [path for pattern in ("*", "evaluations/*/*") for path in sorted(folder.glob(pattern)) if path.is_file()]
    return sorted(
        (
            path
            for path in paths
            if not path.name.startswith((".", "lock")) and (with_checkpoints or path.suffix != ".pt")
        ),
        key=lambda path: (path.suffix != ".pt", path.name in ("run.json", "report.json")),
    )


def _address(run: RunFolder, cwd: str, runs_dir: Path) -> str:
    """Returns the folder that the run's report is in: relative to the sweep's runs_dir, or absolute if not in it."""
    settings = run.settings
    if settings.checkpoint or settings.run_dir or Path(cwd, settings.runs_dir).resolve() != runs_dir.resolve():
        return os.path.join(cwd, run.trained_in)
    return run.path.relative_to(settings.runs_dir).as_posix()
