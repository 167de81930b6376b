"""The run folder: settings, commit, machine, checkpoints, metrics and reports of one run."""

from __future__ import annotations

import csv
import hashlib
import importlib.metadata
import io
import json
import logging
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import torch
import yaml
from filelock import BaseFileLock
from omegaconf import OmegaConf

import maml
from maml.config.identity import differences, digest, evaluation_config, training_config
from maml.config.paths import IN_CLONE, ROOT
from maml.config.schema import Settings
from maml.config.source import changed_code, code_hashes
from maml.errors import MamlError
from maml.hardware import distributed
from maml.pictures import Picture
from maml.record import checkpoint, lock
from maml.record.classes import TABLES
from maml.record.gallery import draw_pictures

LOG = logging.getLogger(__name__)

_PACKAGES = ("torch", "numpy", "hydra-core", "omegaconf", "gymnasium", "mujoco")
# The files of a run folder, and of a folder of another evaluation in it.
_RUN_FILES = ("run.json", "metrics.jsonl", "lock", "checkpoint.pt", "checkpoint.new.pt", "checkpoint.previous.pt")
_EVALUATION_FILES = ("config.yaml", "report.json", "tasks.csv", "report.png", *TABLES)
# The entries that are read, and their types.
_RECORD: dict[str, Any] = {
    "run_id": str,
    "experiment": str,
    "status": str,
    "seconds": float,
    "training": dict,
    "segments": list,
}
_SEGMENT: dict[str, Any] = {"seconds": float, "first_iteration": int, "last_iteration": int}
_REPORT: dict[str, Any] = {
    "run_id": str,
    "experiment": str,
    "iteration": int,
    "num_iterations": int,
    "evaluation": dict,
}
_REPORT |= {"headline": float | None, "headline_metric": str, "curves": list}
_CURVE: dict[str, Any] = {"metric": str, "num_shots": int, "steps": list}
_STEP: dict[str, Any] = {"step": int, "mean": float | None, "ci95": float | None, "num_tasks": int}
_CHECKPOINT: dict[str, Any] = {"experiment": str, "training": dict, "iteration": int, "execution": dict, "state": dict}
_CHECKPOINT |= {"run_id": str}
_BUNDLE: dict[str, Any] = {"commit": str, "files": dict}


class RunFolder:
    """One run's folder. The run id is a hash of the training settings, so an equal run is found and not repeated.

    Nothing is written before `open`. At the end of a run, ``tasks.csv``, ``report.json`` and ``report.png`` are written
    in this order; the logger gets the report; and only then does `close` record that the run is finished. After a kill
    between them, `missing` says what is left to do.

    Args:
        settings: the run's settings.
        experiment: name of the experiment.
        data_digest: a hash of the run's data set, which its record keeps; None if it has none.

    Attributes:
        run_id: hash of the training settings.
        path: the run's folder.
        checkpoint_path: the newest checkpoint.
        tables: the csv files that the evaluation writes.
        is_trained: whether only the evaluation, or its end, was left to do when the folder was opened.
    """

    def __init__(self, settings: Settings, experiment: str, data_digest: str | None = None) -> None:
        self.settings, self.experiment, self.data_digest = settings, experiment, data_digest
        self.training_config = training_config(settings)
        self.run_id = digest(self.training_config)
        self.path = self._find(settings.run_dir, Path(settings.runs_dir))
        self.checkpoint_path = self.path / "checkpoint.pt"
        self._lock: BaseFileLock | None = None
        self._metrics: IO[str] | None = None
        self._record: dict[str, Any] = {}
        self._report_folder = self.path
        self._ended: float | None = None
        self.tables = ("tasks.csv", *(TABLES if settings.evaluation.get("per_class") else ()))
        self.is_trained = False

    @property
    def _key(self) -> str:
        """The key that says where the folder is."""
        return "run_dir" if self.settings.run_dir else "runs_dir"

    def _find(self, run_dir: str | None, runs_dir: Path) -> Path:
        """Returns ``run_dir`` if it is set, or the folder of an equal run of any experiment, or a new folder."""
        default_path = runs_dir / self.experiment / self.run_id
        if run_dir:
            return Path(run_dir)
        others = (path.parent for path in sorted(runs_dir.glob(f"*/{self.run_id}/run.json")))
        return default_path if default_path.exists() else next(others, default_path)

    def open(self, hardware: Mapping[str, Any], command: str, algorithm: str) -> dict[str, Any] | None:
        """Creates or reopens the folder for training and returns the checkpoint to resume from, if there is one.

        Args:
            hardware: description of the machine that trains from here on.
            command: the command that started this process.
            algorithm: name of the algorithm.

        Raises:
            MamlError: if the folder holds another run, another process is writing to it, or one of its files is
                damaged. Nothing is written then.
        """
        self._inspect()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise MamlError(
                f"the run folder {self.path} cannot be created ({error.strerror}); change {self._key}"
            ) from error
        self._lock = self._acquire()
        try:
            for folder in (self.path, *self.path.glob("evaluations/*/")):
                checkpoint.remove_leftovers(folder)
            checkpoint.complete_save(self.checkpoint_path)
            # Again: before we had the lock, another process may have trained here.
            saved, earlier, metrics = self._inspect(warn=True)
            self._take_over(saved, earlier, metrics, hardware, command, algorithm)
        except BaseException:
            self._lock.release()
            self._lock = None
            raise
        return saved

    def _take_over(
        self,
        saved: Mapping[str, Any] | None,
        earlier: dict[str, Any] | None,
        metrics: bytes | None,
        hardware: Mapping[str, Any],
        command: str,
        algorithm: str,
    ) -> None:
        """Continues the record of a run, or begins it."""
        iteration = saved["iteration"] if saved else 0
        found = self._find_report()
        if found is not None:
            self._report_folder = found[1]
        is_evaluated = found is not None and not self._missing_tables(found[1])
        self.is_trained = bool(earlier) and (
            is_evaluated or (bool(saved) and iteration >= self.settings.num_iterations)
        )
        if earlier and saved:
            _catch_up(earlier, saved)
        if self.is_trained:  # only an evaluation follows, perhaps of another experiment: the record must not change
            self._record = earlier or {}
            return
        self._write_config(self.path)
        self._record = earlier or {
            "experiment": self.experiment,
            "run_id": self.run_id,
            "seed": self.settings.seed,
            "started": _now(),
            "seconds": 0.0,
            "segments": [],
        }
        segment = {
            "started": _now(),
            "seconds": 0.0,
            "first_iteration": iteration,
            "last_iteration": iteration,
            "log_every": self.settings.log_every,
            "maml": maml.__version__,
            **commit(),
            "versions": versions(),
            "hardware": dict(hardware),
        }
        if code := code_hashes(self.settings):
            segment["code"] = code
        if self.data_digest:
            segment["data"] = self.data_digest
        self._record |= {
            "algorithm": algorithm,
            "command": command,
            "status": "running",
            "training": self.training_config,
        }
        self._record["segments"].append(segment)
        self._write_record()
        if metrics is not None:  # without the lines after the checkpoint: training computes and logs them again
            checkpoint.write_atomically(self.path / "metrics.jsonl", lambda file: file.write(metrics))
        self._clock = time.monotonic()

    def _inspect(self, warn: bool = False) -> tuple[dict[str, Any] | None, dict[str, Any] | None, bytes | None]:
        """Reads and checks the run's files, without writing anything.

        Args:
            warn: whether to log a warning about lost lines of ``metrics.jsonl``.

        Returns:
            The newest checkpoint, the record, and the lines of ``metrics.jsonl`` up to the checkpoint; None for what
            does not exist.

        Raises:
            MamlError: if a file is damaged, belongs to another run, or cannot be made again from the others.
        """
        saved, record = self.load_checkpoint(), self._read_record()
        found = self._find_report()
        if saved is None and found is not None:
            _, folder = found
            if record is None:
                raise MamlError(
                    f"{folder} has a report, but {self.path} has neither run.json nor a checkpoint; restore one of "
                    "them, or delete the folder to train again"
                )
            if missing := self._missing_tables(folder):
                raise MamlError(
                    f"{folder / missing[0]} is missing, and {self.path} has no checkpoint to evaluate again; restore "
                    "one of them, or delete the folder to train again"
                )
            return saved, record, None
        return saved, record, self._check_metrics(saved["iteration"] if saved else 0, record, warn)

    def _missing_tables(self, folder: Path) -> list[str]:
        return [name for name in self.tables if not (folder / name).exists()]

    def missing(self) -> set[str]:
        """Returns what is left to do until the run is finished with these evaluation settings.

        Returns:
            Files of the evaluation that do not exist, and ``status`` if the run is not recorded as finished; empty if
            nothing is left to do. ``report.json`` alone, if training or the evaluation is not complete.

        Raises:
            MamlError: if a file is damaged.
        """
        _refuse_folders(self.path, (*_RUN_FILES, *_EVALUATION_FILES))
        record, found = self._read_record(), self._find_report()
        if found is None:
            return {"report.json"}
        _, folder = found
        # Another evaluation's config.yaml is written last.
        files = {*self.tables, "report.png"} | ({"config.yaml"} if folder != self.path else set())
        missing = {name for name in files if not (folder / name).exists()}
        return missing | ({"status"} if record is None or record["status"] != "finished" else set())

    def check_sources(self, checkpoint_file: Path | None = None) -> None:
        """Checks that data and the code of the user's own classes are those of the training. Writes nothing.

        Runs that were recorded without hashes of them pass, and those of other settings, which are refused where their
        checkpoint is read.

        Args:
            checkpoint_file: a checkpoint that is evaluated instead of the run's own; its folder has the record.

        Raises:
            MamlError: if one has changed and ``changed_sources`` is ``refuse``; with ``accept`` this is a warning.
        """
        folder = self.path if checkpoint_file is None else checkpoint_file.parent
        record = read_json(folder / "run.json")
        if record is not None and record.get("training") != self.training_config:
            return
        changes = " and ".join(changed_since(folder, self.settings, self.data_digest))
        if not changes:
            return
        if self.settings.changed_sources == "accept":
            LOG.warning("%s since %s was trained; changed_sources=accept uses it", changes, folder)
            return
        raise MamlError(
            f"{changes} since {folder} was trained, so its numbers belong to what was there before. To train anew, "
            "give another run_dir= or delete the folder; to go on, undo the change, or set changed_sources=accept if "
            "it does not change what is computed"
        )

    def check_free(self) -> None:
        """Checks, without writing anything, that no process is training in this folder.

        Raises:
            MamlError: if a process is.
        """
        if lock.is_held(self.path / "lock"):
            raise self._held()

    def _acquire(self) -> BaseFileLock:
        try:
            acquired = lock.acquire(self.path / "lock", timeout=0.2)
        except OSError as error:
            raise MamlError(
                f"the run folder {self.path} cannot be written ({error.strerror}); change {self._key}"
            ) from error
        if acquired is None:
            raise self._held()
        return acquired

    def _held(self) -> MamlError:
        path = self.path / "lock"
        return MamlError(f"{lock.holder(path)} is training in {self.path}; {lock.advice(path)}")

    def load_checkpoint(self, path: Path | None = None) -> dict[str, Any] | None:
        """Reads the run's newest checkpoint, or the file at ``path``, and checks that it belongs to this run.

        Raises:
            MamlError: if it is damaged, or was trained with other settings (the message lists the differences).
        """
        if path is None:
            _refuse_folders(self.path, (*_RUN_FILES, *_EVALUATION_FILES))
        file = path or checkpoint.newest(self.checkpoint_path)
        if file is None:
            self._refuse_other_run(self._read_record(), self.path)
            return None
        saved = read_checkpoint(file)
        self._refuse_other_run(saved, file)
        return saved

    def _refuse_other_run(self, saved: Mapping[str, Any] | None, where: Path) -> None:
        if saved is not None and saved["training"] != self.training_config:
            raise MamlError(
                f"{where} belongs to another run ({saved['experiment']}):\n"
                f"{differences(self.training_config, saved['training'])}\n"
                "Use the settings that it was trained with, or remove run_dir and checkpoint from the command"
            )

    def log(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """Appends one line to ``metrics.jsonl``. Lines hold no times, so a repeated run writes equal lines."""
        try:
            if self._metrics is None:
                self._metrics = open(self.path / "metrics.jsonl", "a")  # noqa: SIM115 - open until `close`
            self._metrics.write(json.dumps({"iteration": iteration, **metrics}) + "\n")
            self._metrics.flush()
        except OSError as error:
            raise self._metrics_error(error) from error

    def _metrics_error(self, error: OSError) -> MamlError:
        return MamlError(
            f"{self.path / 'metrics.jsonl'} could not be written ({error.strerror}); the last checkpoint is intact. "
            "Free some disk space, then run the same command again"
        )

    def save_checkpoint(self, iteration: int, state: Mapping[str, Any], execution: Mapping[str, Any]) -> None:
        """Saves the training state after ``iteration`` meta-updates."""
        try:
            if self._metrics is not None:
                os.fsync(self._metrics.fileno())  # all metrics before a checkpoint must be on disk before it
        except OSError as error:
            raise self._metrics_error(error) from error
        checkpoint.save(
            self.checkpoint_path,
            {
                "experiment": self.experiment,
                "run_id": self.run_id,
                "training": self.training_config,
                "iteration": iteration,
                "execution": dict(execution),
                "state": dict(state),
            },
        )
        self._record["segments"][-1]["execution"] = dict(execution)
        self._update_record(iteration, "running")

    def stop_clock(self) -> None:
        """Ends the time of this stretch of the run; what follows, such as waiting for a logger, is not counted."""
        self._ended = time.monotonic()

    def close(self, status: str) -> None:
        """Records the final status and releases the folder's lock."""
        if self._metrics is not None:
            with suppress(OSError):  # on a full disk, closing tries to write the last line again; `log` has reported it
                self._metrics.close()
            self._metrics = None
        if self._lock is not None:
            try:
                if status == "finished" and self._report_folder != self.path:
                    self._write_config(self._report_folder)
                if not self.is_trained:
                    self._update_record(self._record["segments"][-1]["last_iteration"], status)
                elif self._record["status"] != "finished":
                    self._record |= {"status": status, "finished": _now()}
                    self._write_record()
            finally:
                self._lock.release()
                self._lock = None

    def save_report(
        self,
        report: Mapping[str, Any],
        tasks: list[dict[str, Any]],
        parent: Path | None = None,
        more: Mapping[str, list[dict[str, Any]]] | None = None,
        pictures: Callable[[], Mapping[str, Picture]] = dict,
    ) -> Path:
        """Writes ``report.json``, ``tasks.csv`` and the algorithm's pictures, and returns their folder.

        The first evaluation of the fully trained run is written to the run's folder. Every other one gets its own
        folder ``evaluations/<hash of its settings>``, so that no evaluation overwrites another; its ``config.yaml``
        is written by `close`, or at once if the run is not open.

        Args:
            report: the report of an evaluation.
            tasks: its rows of ``tasks.csv``, one per task and curve.
            parent: folder of ``evaluations/``, for an evaluation of a checkpoint file; None is the run's folder.
            more: rows of other csv files, by name.
            pictures: returns the algorithm's pictures, by name.
        """
        settings = {"iteration": report["iteration"], **report["evaluation"]}
        first = None if parent is not None else _read_report(self.path / "report.json")
        folder = self.path
        unfinished = report["iteration"] < report["num_iterations"]
        if parent is not None or unfinished or (first and first["evaluation"] != report["evaluation"]):
            folder = (parent or self.path) / "evaluations" / digest(settings)
        _refuse_folders(folder, _EVALUATION_FILES)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise MamlError(
                f"the folder {folder} cannot be created ({error.strerror}); move away what is in its way"
            ) from error
        if parent is not None:
            checkpoint.remove_leftovers(folder)
            self._write_config(folder)
        self._report_folder = folder
        for name, rows in {**(more or {}), "tasks.csv": tasks}.items():
            _write_table(folder / name, rows)
        draw_pictures(pictures, folder)
        checkpoint.write_atomically(
            folder / "report.json", lambda file: file.write((json.dumps(report, indent=2) + "\n").encode())
        )
        return folder

    def finished_report(self) -> dict[str, Any] | None:
        """Returns the report with these evaluation settings, or None if training or the evaluation is not complete.

        Raises:
            MamlError: if a report is damaged.
        """
        found = self._find_report()
        return found[0] if found else None

    @property
    def report_folder(self) -> Path:
        """The folder of the report that was found when the run was opened, or saved since then."""
        return self._report_folder

    def _find_report(self) -> tuple[dict[str, Any], Path] | None:
        found = find_report(self.path, self.run_id, evaluation_config(self.settings))
        if found:
            _refuse_folders(found[1], _EVALUATION_FILES)
        return found

    def _read_record(self) -> dict[str, Any] | None:
        path = self.path / "run.json"
        record = read_json(path)
        if record is not None:
            _check_entries(path, record, _RECORD)
            _check_list(path, record["segments"], _SEGMENT, "segments")
        return record

    def _update_record(self, iteration: int, status: str) -> None:
        now = time.monotonic() if self._ended is None else self._ended
        elapsed, self._clock = now - self._clock, now
        segment = self._record["segments"][-1]
        segment["seconds"] += elapsed
        segment["last_iteration"] = iteration
        self._record["seconds"] += elapsed
        self._record |= {"status": status, "iteration": iteration}
        if status != "running":
            self._record["finished"] = _now()
        self._write_record()

    def _write_config(self, folder: Path) -> None:
        content = OmegaConf.to_yaml(self.settings.as_dict()).encode()
        checkpoint.write_atomically(folder / "config.yaml", lambda file: file.write(content))

    def _write_record(self) -> None:
        content = (json.dumps(self._record, indent=2) + "\n").encode()
        checkpoint.write_atomically(self.path / "run.json", lambda file: file.write(content))

    def _check_metrics(self, iteration: int, record: Mapping[str, Any] | None, warn: bool) -> bytes | None:
        """Returns the lines of ``metrics.jsonl`` up to the checkpoint's iteration; None if the file does not exist.

        Lines after the checkpoint may be cut off by a kill, or garbage after a power failure. Earlier ones cannot:
        they were flushed to disk before the checkpoint was written.

        Raises:
            MamlError: if there is garbage before the checkpoint's iteration.
        """
        path = self.path / "metrics.jsonl"
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        kept, iterations, last, unreadable = [], [0], 0, 0
        for number, line in enumerate(lines, start=1):
            logged = _logged_iteration(line)
            if logged is not None and logged <= iteration and (unreadable or logged <= last):
                raise _garbage(path, unreadable or number, iteration)
            if logged is None:
                unreadable = unreadable or number
                continue
            last = logged
            if logged <= iteration:
                kept.append(line)
                iterations.append(logged)
        lost = sorted(_expected_iterations(record, iteration, self.settings.num_iterations) - set(iterations))
        if lost and unreadable:
            raise _garbage(path, unreadable, iteration)
        if lost and warn:
            before = sum(logged < lost[0] for logged in iterations) - 1
            LOG.warning(
                "%s lacks iterations %d to %d%s. The run goes on without these lines, and no result depends on them. "
                "If you have a copy of the file, stop the run and restore it",
                path,
                lost[0],
                lost[-1],
                f", after line {before}" if before else "",
            )
        return b"".join(kept) if lines else None


class NonWritingRunFolder(RunFolder):
    """The same folder in processes other than rank 0, which write nothing."""

    def log(self, iteration: int, metrics: Mapping[str, float]) -> None: ...

    def save_checkpoint(self, iteration: int, state: Mapping[str, Any], execution: Mapping[str, Any]) -> None: ...

    def close(self, status: str) -> None: ...


def _write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    table = io.StringIO()
    writer = csv.DictWriter(table, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    checkpoint.write_atomically(path, lambda file: file.write(table.getvalue().encode()))


def changed_since(folder: Path, settings: Settings, data_digest: str | None = None) -> list[str]:
    """Says in words what has changed since a run was trained: the code of the user's classes, or the data set.

    Args:
        folder: the run's folder; without a record of its code by this version of Python, no code has changed.
        settings: the run's settings.
        data_digest: a hash of the data set; None does not compare it.

    Raises:
        MamlError: if ``run.json`` is damaged.
    """
    earlier: dict[str, str] = {}
    earlier_data = data_digest
    for segment in (read_json(folder / "run.json") or {}).get("segments", ()):
        earlier_data = segment.get("data", earlier_data)
        if _minor(segment.get("versions", {}).get("python", "")) == _minor(platform.python_version()):
            earlier |= segment.get("code", {})
    names = changed_code(earlier, code_hashes(settings)) if earlier else []
    changes = [f"the code of {', '.join(names)} has changed"] if names else []
    if data_digest and earlier_data != data_digest:
        changes.append(f"the data of {settings.domain['_target_']} have changed")
    return changes


def _minor(version: str) -> list[str]:
    """``3.11.7`` -> ``[3, 11]``."""
    return version.split(".")[:2]


def find_report(
    folder: Path, run_id: str, evaluation: Mapping[str, Any], unfinished: bool = False
) -> tuple[dict[str, Any], Path] | None:
    """Returns the report of an evaluation, and the folder that it and its ``tasks.csv`` are in; None if there is none.

    Args:
        folder: the run's folder.
        run_id: the run's id.
        evaluation: settings of the evaluation, see `evaluation_config`.
        unfinished: whether an evaluation of an unfinished training counts; the one of the latest iteration is returned.

    Raises:
        MamlError: if a report is damaged.
    """
    found = []
    for path in (folder / "report.json", *sorted(folder.glob("evaluations/*/report.json"))):
        report = _read_report(path)
        if report is None or report["evaluation"] != evaluation or report["run_id"] != run_id:
            continue
        if report["iteration"] == report["num_iterations"]:
            return report, path.parent
        if unfinished:
            found.append((report, path.parent))
    return max(found, key=lambda entry: entry[0]["iteration"], default=None)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Reads a run's checkpoint.

    Raises:
        MamlError: if it does not exist, is damaged, or lacks an entry.
    """
    saved = checkpoint.load(path)
    _check_entries(path, saved, _CHECKPOINT)
    return saved


def read_json(path: Path) -> dict[str, Any] | None:
    """Reads a JSON file with an object; returns None if it does not exist.

    Raises:
        MamlError: if the file is damaged, cannot be read, or does not hold an object.
    """
    try:
        content = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except IsADirectoryError as error:
        raise _in_the_way(path) from error
    except OSError as error:
        raise MamlError(f"{path} cannot be read ({error.strerror}); change its permissions, and try again") from error
    except ValueError as error:
        raise _damaged(path, str(error)) from error
    if not isinstance(content, dict):
        raise _damaged(path, f"it holds a {type(content).__name__}, not an object")
    return content


def read_config(path: Path) -> dict[str, Any]:
    """Reads a run's config as plain data: tags of Python objects are refused, interpolations stay texts.

    Raises:
        MamlError: if the file is no mapping of plain data.
    """
    try:
        config = yaml.safe_load(path.read_text())
        json.dumps(config)  # fails for dates, bytes and lists that contain themselves
    except (OSError, TypeError, ValueError, yaml.YAMLError) as error:
        raise MamlError(f"{path} is damaged, or no config of a run ({error}); restore it") from error
    if not isinstance(config, dict):
        raise MamlError(f"{path} is damaged: it is no mapping of settings; restore it")
    return config


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Reads a ``metrics.jsonl``, without a last line that is being written or was cut off.

    Returns:
        One dict per line; empty if the file does not exist, as after a run of no iterations.

    Raises:
        MamlError: if the file is damaged.
    """
    *lines, _ = path.read_text(errors="replace").split("\n") if path.exists() else [""]
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            record["iteration"] = int(record["iteration"])
        except (ValueError, TypeError, KeyError) as error:
            raise MamlError(f"{path} is damaged in line {number} ({error}); restore it, and try again") from error
        records.append(record)
    return records


def _damaged(path: Path, reason: str) -> MamlError:
    return MamlError(f"{path} is damaged ({reason}); move it away, or restore it, and try again")


def _in_the_way(path: Path) -> MamlError:
    return MamlError(f"{path} is a folder, but a file belongs there; move it away, and try again")


def _refuse_folders(folder: Path, names: Iterable[str]) -> None:
    for name in names:
        if (folder / name).is_dir():
            raise _in_the_way(folder / name)


def _check_entries(path: Path, content: Any, entries: Mapping[str, Any], where: str = "") -> None:
    """Checks that an object in a file has these entries.

    Args:
        path: the file.
        content: what was read.
        entries: type of each entry, by name; float allows int too.
        where: name of the object in the file; empty is the whole file.

    Raises:
        MamlError: if it is no object, or lacks an entry or has one of another type.
    """
    if not isinstance(content, dict):
        raise _damaged(path, f"{where} is not an object")
    for name, kind in entries.items():
        if name not in content:
            raise _damaged(path, f"{where}{'.' if where else ''}{name} is missing")
        value = content[name]
        if not isinstance(float(value) if type(value) is int and kind is not int else value, kind):
            raise _damaged(path, f"{where}{'.' if where else ''}{name} is a {type(value).__name__}")


def _check_list(path: Path, items: Sequence[Any], entries: Mapping[str, Any], where: str) -> None:
    if not items:
        raise _damaged(path, f"{where} is empty")
    for number, item in enumerate(items):
        _check_entries(path, item, entries, f"{where}[{number}]")


def _read_report(path: Path) -> dict[str, Any] | None:
    """Reads a ``report.json``; returns None if it does not exist.

    Raises:
        MamlError: if it is damaged.
    """
    report = read_json(path)
    if report is not None:
        _check_entries(path, report, _REPORT)
        _check_list(path, report["curves"], _CURVE, "curves")
        for number, curve in enumerate(report["curves"]):
            _check_list(path, curve["steps"], _STEP, f"curves[{number}].steps")
    return report


def _catch_up(record: dict[str, Any], saved: Mapping[str, Any]) -> None:
    """Brings the record of a run to its checkpoint: a kill can come after the checkpoint and before the record."""
    segment, iteration = record["segments"][-1], saved["iteration"]
    if iteration > segment["last_iteration"] or "iteration" not in record:
        segment |= {"last_iteration": iteration, "execution": dict(saved["execution"])}
        record["iteration"] = iteration


def _logged_iteration(line: bytes) -> int | None:
    """Returns the iteration of one line of ``metrics.jsonl``; None if the line is damaged or cut off."""
    try:
        content = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    logged = content.get("iteration") if isinstance(content, dict) else None
    return logged if isinstance(logged, int) else None


def _expected_iterations(record: Mapping[str, Any] | None, iteration: int, num_iterations: int) -> set[int]:
    """Returns the iterations up to a checkpoint that were logged, as far as the record knows how often that was."""
    expected: set[int] = set()
    end = iteration
    for segment in reversed(record["segments"] if record else []):
        numbers = range(segment["first_iteration"] + 1, end + 1)
        if every := segment.get("log_every"):
            expected |= {number for number in numbers if number % every == 0 or number == num_iterations}
        end = min(end, segment["first_iteration"])
    return expected


def _garbage(path: Path, line: int, iteration: int) -> MamlError:
    return MamlError(
        f"{path}, line {line}, is damaged or out of order, although it is older than the checkpoint of iteration "
        f"{iteration}. Restore the file, or delete this line (no result depends on it), and run the same command again"
    )


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages on which numbers may depend, by name."""
    packages = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            packages[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    packages["torch"] = torch.__version__
    return packages


def command_line() -> str:
    """Returns the command that started this process, in a form that can be copied to a shell."""
    script, arguments = Path(sys.argv[0]), sys.argv[1:]
    num_processes = distributed.local_world_size()
    torchrun = ["torchrun", f"--nproc-per-node={num_processes}"] if distributed.world_size() > 1 else []
    if script.name == "maml" or script.parts[-2:] == ("maml", "__main__.py"):  # the console script, see maml.cli
        start = ["maml"] if script.name == "maml" and not torchrun else [*(torchrun or ["python"]), "-m", "maml"]
        verb = "eval" if "mode=eval" in arguments else "train"
        return shlex.join([*start, verb, *(argument for argument in arguments if argument != "mode=eval")])
    script = script.resolve()
    shown = script.relative_to(ROOT) if script.is_relative_to(ROOT) else script.name
    return shlex.join([*(torchrun or ["python"]), str(shown), *arguments])


def commit() -> dict[str, Any]:
    """Returns the commit of the clone or bundle, and whether tracked files differ from it; both are None elsewhere.

    An installed wheel, or a copy of the files, may be inside another project's repository. That commit is not used.
    """
    if not IN_CLONE:
        return {"commit": None, "dirty": None}
    try:
        top, head, status = (
            subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True, timeout=20).stdout
            for words in (
                ["rev-parse", "--show-toplevel"],
                ["rev-parse", "HEAD"],
                # Without results/, because a run may write there.
                ["status", "--porcelain", "--untracked-files=no", "--", ".", ":!results"],
            )
        )
    except (OSError, subprocess.SubprocessError):
        return _bundled_commit()
    if Path(top.rstrip("\n")).resolve() != ROOT:
        return _bundled_commit()
    return {"commit": head.strip(), "dirty": bool(status.strip())}


def _bundled_commit() -> dict[str, Any]:
    """Does for the files of a bundle (scripts/bundle.py), by their hashes, what `commit` does for a clone."""
    bundle = read_json(ROOT / "bundle.json")
    if bundle is None:
        return {"commit": None, "dirty": None}
    _check_entries(ROOT / "bundle.json", bundle, _BUNDLE)
    dirty = any(_blob_hash(ROOT / name) != recorded for name, recorded in bundle["files"].items())
    return {"commit": bundle["commit"], "dirty": dirty}


def _blob_hash(path: Path) -> str:
    """Returns the hash that git gives to the content of a file; empty if it cannot be read."""
    try:
        content = path.read_bytes()
    except OSError:
        return ""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
