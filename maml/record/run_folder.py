"""The run folder: settings, commit, machine, checkpoints, metrics and reports of one run."""

from __future__ import annotations

import csv
import io
import json
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from filelock import BaseFileLock
from omegaconf import OmegaConf

import maml
from maml.config.identity import differences, evaluation_config, training_config
from maml.config.schema import Settings
from maml.config.source import code_hashes
from maml.digest import digest
from maml.errors import MamlError
from maml.pictures import Picture
from maml.record import checkpoint, lock
from maml.record.atomic import remove_leftovers, write_bytes_atomically, write_json_atomically, write_text_atomically
from maml.record.classes import TABLES
from maml.record.contents import Report, RunRecord, Segment
from maml.record.gallery import draw_pictures, report_pictures
from maml.record.provenance import changed_since, commit, versions
from maml.record.run_files import (
    EVALUATION_FILES,
    RUN_FILES,
    evaluation_folder,
    find_report,
    lines_until,
    read_checkpoint,
    read_json,
    refuse_folders,
    report_paths,
)
from maml.status import announce

LOG = logging.getLogger(__name__)


class RunFolder:
    """One run's folder. The run id is a hash of the training settings, so an equal run is found and not repeated.

    A run is in one of four states, each proved by a file: training (``run.json``), trained (a checkpoint of the last
    iteration), evaluated (``report.json``), finished (the status in ``run.json``). Evaluations that another experiment
    asks of a finished run are in ``evaluations/``; they never change ``run.json``.

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
        trained_in: the folder of the training whose state is used: that of the file ``checkpoint=``, if it is set, or
            ``path``.
        tables: the csv files that the evaluation writes.
        is_trained: whether only the evaluation, or its end, was left to do when the folder was opened.
    """

    def __init__(self, settings: Settings, experiment: str, data_digest: str | None = None) -> None:
        self.settings, self.experiment, self.data_digest = settings, experiment, data_digest
        self.training_config = training_config(settings)
        self.run_id = digest(self.training_config)
        self.path = self._find(settings.run_dir, Path(settings.runs_dir))
        self.checkpoint_path = self.path / "checkpoint.pt"
        given = Path(settings.checkpoint) if settings.checkpoint else None
        self._given_checkpoint = given / "checkpoint.pt" if given and given.is_dir() else given
        self.trained_in = self._given_checkpoint.parent if self._given_checkpoint else self.path
        self._lock: BaseFileLock | None = None
        self._metrics: IO[str] | None = None
        self._record: dict[str, Any] = {}
        self.report_folder = self.path  # where the report is that was found at opening, or saved since then
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
        if checkpoint.newest(default_path / "checkpoint.pt") or (default_path / "run.json").exists():
            return default_path
        # Also if the default folder is there: a run that was killed at its very start leaves one without a state.
        others = (path.parent for path in sorted(runs_dir.glob(f"*/{self.run_id}/run.json")))
        return next(others, default_path)

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
                remove_leftovers(folder)
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
            self.report_folder = found[1]
        is_evaluated = found is not None and not self._missing_tables(found[1])
        self.is_trained = bool(earlier) and (
            is_evaluated or (bool(saved) and iteration >= self.settings.num_iterations)
        )
        if earlier and saved:
            _catch_up(earlier, saved)
        if self.is_trained:  # only an evaluation follows, perhaps of another experiment: the record must not change
            self._record = earlier or {}
            return
        recorded = earlier.get("iteration", 0) if earlier else iteration
        if recorded > iteration:
            LOG.warning(
                "%s says that iteration %s was saved, but %s: a file is missing, and what it had is computed again",
                *(self.path / "run.json", f"{recorded:,}"),
                f"the newest checkpoint is of iteration {iteration:,}" if saved else "there is no checkpoint",
            )
        self._write_config(self.path)
        self._record = earlier or {
            "experiment": self.experiment,
            "run_id": self.run_id,
            "seed": self.settings.seed,
            "started": _now(),
            "seconds": 0.0,
            "segments": [],
        }
        self._record |= {
            "algorithm": algorithm,
            "command": command,
            "status": "running",
            "training": self.training_config,
        }
        self._record["segments"].append(self._new_segment(iteration, hardware))
        if saved and not earlier:
            LOG.warning(
                "%s is missing: from here on nothing says when and where iterations 1 to %s were computed",
                *(self.path / "run.json", f"{iteration:,}"),
            )
        elif saved:
            before, now = (Segment.model_validate(part).commit_name for part in self._record["segments"][-2:])
            if before != now:
                announce(f"goes on from iteration {iteration:,}, trained at commit {before}; the code is now at {now}")
        self._write_record()
        if metrics is not None:  # without the lines after the checkpoint: training computes and logs them again
            write_bytes_atomically(self.path / "metrics.jsonl", metrics)
        self._clock = time.monotonic()

    def _new_segment(self, iteration: int, hardware: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the record of the stretch of training that begins after ``iteration`` meta-updates."""
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
        return segment

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
        saved, record = self.load_checkpoint(), read_json(self.path / "run.json", RunRecord)
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
        if saved is None and (reports := [path for path in report_paths(self.path) if path.exists()]):
            raise MamlError(
                f"{reports[0]} is of another evaluation, and {self.path} has no checkpoint to evaluate again; restore "
                "it, or delete the folder to train again"
            )
        iteration, path = saved["iteration"] if saved else 0, self.path / "metrics.jsonl"
        return saved, record, lines_until(iteration, path, record, self.settings.num_iterations, warn)

    def _missing_tables(self, folder: Path) -> list[str]:
        return [name for name in self.tables if not (folder / name).exists()]

    def has_begun(self) -> bool:
        """Returns whether its training was started at some time."""
        return (self.path / "run.json").exists() or self.checkpoint_path.exists()

    def missing(self) -> set[str]:
        """Returns what is left to do until the run is finished with these evaluation settings.

        Returns:
            Files of the evaluation that do not exist, and ``status`` if the run is not recorded as finished; empty if
            nothing is left to do. ``report.json`` alone, if training or the evaluation is not complete.

        Raises:
            MamlError: if a file is damaged.
        """
        refuse_folders(self.path, (*RUN_FILES, *EVALUATION_FILES))
        record, found = read_json(self.path / "run.json", RunRecord), self._find_report()
        if found is None:
            return {"report.json"}
        _, folder = found
        # Another evaluation's config.yaml is written last.
        files = {*self.tables, "report.png"} | ({"config.yaml"} if folder != self.path else set())
        missing = {name for name in files if not (folder / name).exists()}
        return missing | ({"status"} if record is None or record["status"] != "finished" else set())

    def check_sources(self) -> None:
        """Checks that data and the code of the user's own classes are those of the training. Writes nothing.

        A run that was recorded without hashes passes. So does a run of other settings: `load_checkpoint` refuses it.

        Raises:
            MamlError: if one has changed and ``changed_sources`` is ``refuse``; with ``accept`` this is a warning.
        """
        folder = self.trained_in
        record = read_json(folder / "run.json", RunRecord)
        if record is not None and record["training"] != self.training_config:
            return
        saved = self._given_checkpoint or checkpoint.newest(folder / "checkpoint.pt")
        if saved is None and not any(map(Path.exists, report_paths(folder))):
            return  # it failed before anything was trained
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

    def check_ready(self) -> None:
        """Checks, without writing anything, that no process is training in this folder and that it can be opened.

        Raises:
            MamlError: if a process is, or as `open`.
        """
        if lock.is_held(self.path / "lock"):
            raise self._held()
        self._inspect()

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

    def load_checkpoint(self) -> dict[str, Any] | None:
        """Reads the file ``checkpoint=``, or the run's newest checkpoint, and checks that it belongs to this run.

        Raises:
            MamlError: if it is damaged, or was trained with other settings (the message lists the differences).
        """
        if self._given_checkpoint is None:
            refuse_folders(self.path, (*RUN_FILES, *EVALUATION_FILES))
        file = self._given_checkpoint or checkpoint.newest(self.checkpoint_path)
        if file is None:
            self._refuse_other_run(read_json(self.path / "run.json", RunRecord), self.path)
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
                if status == "finished" and self.report_folder != self.path:
                    self._write_config(self.report_folder)
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
        more: Mapping[str, list[dict[str, Any]]] | None = None,
        pictures: Callable[[], Mapping[str, Picture]] = dict,
    ) -> Path:
        """Writes ``report.json``, ``tasks.csv`` and the algorithm's pictures, and returns their folder.

        The first evaluation of the fully trained run is written to the run's folder, unless ``mode=eval`` asked for it.
        Every other one gets its own folder ``evaluations/<hash of its settings>``, so that no evaluation overwrites
        another; its ``config.yaml`` is written by `close`, or at once if the run is not open.

        Args:
            report: the report of an evaluation.
            tasks: its rows of ``tasks.csv``, one per task and curve.
            more: rows of other csv files, by name.
            pictures: returns the algorithm's pictures, by name.
        """
        apart = self.settings.mode == "eval"
        first = None if apart else read_json(self.path / "report.json", Report)
        folder = self.path
        unfinished = report["iteration"] < report["num_iterations"]
        if apart or unfinished or (first and first["evaluation"] != report["evaluation"]):
            folder = evaluation_folder(self.trained_in, report["iteration"], report["evaluation"])
        refuse_folders(folder, EVALUATION_FILES)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            remedy = (
                "move away what is in its way"
                if isinstance(error, FileExistsError | NotADirectoryError)
                else "make the folder above it writable, or evaluate a copy of the run with runs_dir="
            )
            raise MamlError(f"the folder {folder} cannot be created ({error.strerror}); {remedy}") from error
        if apart:
            remove_leftovers(folder)
            self._write_config(folder)
        self.report_folder = folder
        if folder == self.path and first is None:  # left by an evaluation that was killed before its report
            tables = (folder / name for name in ("tasks.csv", *TABLES))
            for path in (*tables, *report_pictures(folder).values()):
                path.unlink(missing_ok=True)
        for name, rows in {**(more or {}), "tasks.csv": tasks}.items():
            _write_table(folder / name, rows, TABLES.get(name) or [*rows[0]])
        draw_pictures(pictures, folder)
        write_json_atomically(folder / "report.json", report)
        return folder

    def finished_report(self) -> dict[str, Any] | None:
        """Returns the report with these evaluation settings, or None if training or the evaluation is not complete.

        Raises:
            MamlError: if a report is damaged.
        """
        found = self._find_report()
        return found[0] if found else None

    def _find_report(self) -> tuple[dict[str, Any], Path] | None:
        found = find_report(self.path, self.run_id, evaluation_config(self.settings))
        if found:
            refuse_folders(found[1], EVALUATION_FILES)
        return found

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
        write_text_atomically(folder / "config.yaml", OmegaConf.to_yaml(self.settings.as_dict()))

    def _write_record(self) -> None:
        write_json_atomically(self.path / "run.json", self._record)


class NonWritingRunFolder(RunFolder):
    """The same folder in processes other than rank 0, which write nothing."""

    def log(self, iteration: int, metrics: Mapping[str, float]) -> None: ...

    def save_checkpoint(self, iteration: int, state: Mapping[str, Any], execution: Mapping[str, Any]) -> None: ...

    def close(self, status: str) -> None: ...


def _write_table(path: Path, rows: list[dict[str, Any]], columns: Sequence[str]) -> None:
    table = io.StringIO()
    writer = csv.DictWriter(table, fieldnames=columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text_atomically(path, table.getvalue())


def _catch_up(record: dict[str, Any], saved: Mapping[str, Any]) -> None:
    """Brings the record of a run to its checkpoint: a kill can come after the checkpoint and before the record."""
    segment, iteration = record["segments"][-1], saved["iteration"]
    if iteration > segment["last_iteration"] or "iteration" not in record:
        segment |= {"last_iteration": iteration, "execution": dict(saved["execution"])}
        record["iteration"] = iteration


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
