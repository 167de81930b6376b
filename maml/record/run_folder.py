"""The run folder: settings, commit, machine, checkpoints, metrics and reports of one run."""

from __future__ import annotations

import csv
import importlib.metadata
import io
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import torch
from filelock import BaseFileLock
from omegaconf import OmegaConf

import maml
from maml.config.identity import differences, digest, evaluation_config, training_config
from maml.config.paths import IN_CLONE, ROOT
from maml.config.schema import Settings
from maml.errors import MamlError
from maml.hardware import distributed
from maml.record import checkpoint, lock

_PACKAGES = ("torch", "numpy", "hydra-core", "omegaconf", "gymnasium", "mujoco")


class RunFolder:
    """One run's folder. The run id is a hash of the training settings, so an equal run is found and not repeated.

    Nothing is written before `open`.

    Args:
        settings: the run's settings.
        experiment: name of the experiment.
    """

    def __init__(self, settings: Settings, experiment: str) -> None:
        self.settings, self.experiment = settings, experiment
        self.training_config = training_config(settings)
        self.run_id = digest(self.training_config)
        self.path = self._find(settings.run_dir, Path(settings.runs_dir))
        self.checkpoint_path = self.path / "checkpoint.pt"
        self._lock: BaseFileLock | None = None
        self._metrics: IO[str] | None = None
        self._record: dict[str, Any] = {}
        self._is_trained = False

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
            MamlError: if the folder holds another run, another process is writing to it, or its checkpoint is damaged.
        """
        self.load_checkpoint()  # raises its errors before anything is written
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise MamlError(
                f"the run folder {self.path} cannot be created ({error.strerror}); change runs_dir"
            ) from error
        self._lock = self._acquire()
        for leftover in self.path.glob(".checkpoint*"):  # temporary files of a process that was killed while writing
            leftover.unlink()
        saved = self.load_checkpoint()  # again: before we had the lock, another process may have saved a newer one
        iteration = saved["iteration"] if saved else 0
        earlier = read_json(self.path / "run.json")
        self._is_trained = bool(saved and earlier and iteration >= self.settings.num_iterations)
        if self._is_trained:  # only an evaluation follows, perhaps of another experiment: the record must not change
            self._record = earlier or {}
            return saved
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
            "maml": maml.__version__,
            **_commit(),
            "versions": versions(),
            "hardware": dict(hardware),
        }
        self._record |= {
            "algorithm": algorithm,
            "command": command,
            "status": "running",
            "training": self.training_config,
        }
        self._record["segments"].append(segment)
        self._write_record()
        self._truncate_metrics(iteration)
        self._clock = time.monotonic()
        return saved

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
                f"the run folder {self.path} cannot be written ({error.strerror}); change runs_dir"
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
        file = path or checkpoint.newest(self.checkpoint_path)
        if file is None:
            self._refuse_other_run(read_json(self.path / "run.json"), self.path)
            return None
        saved = checkpoint.load(file)
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

    def close(self, status: str) -> None:
        """Records the final status and releases the folder's lock."""
        if self._metrics is not None:
            with suppress(OSError):  # on a full disk, closing tries to write the last line again; `log` has reported it
                self._metrics.close()
            self._metrics = None
        if self._lock is not None:
            try:
                if not self._is_trained:
                    self._update_record(self._record["segments"][-1]["last_iteration"], status)
                elif self._record["status"] != "finished":
                    self._record["status"] = status
                    self._write_record()
            finally:
                self._lock.release()
                self._lock = None

    def save_report(self, report: Mapping[str, Any], tasks: list[dict[str, Any]], parent: Path | None = None) -> Path:
        """Writes ``report.json`` and ``tasks.csv`` and returns their folder.

        The first evaluation of the fully trained run is written to the run's folder. Every other one gets its own
        folder ``evaluations/<hash of its settings>``, so that no evaluation overwrites another.

        Args:
            report: the report of an evaluation.
            tasks: its rows of ``tasks.csv``, one per task and curve.
            parent: folder of ``evaluations/``, for an evaluation of a checkpoint file; None is the run's folder.
        """
        settings = {"iteration": report["iteration"], **report["evaluation"]}
        first = read_json(self.path / "report.json")
        folder = self.path
        unfinished = report["iteration"] < report["num_iterations"]
        if parent is not None or unfinished or (first and first["evaluation"] != report["evaluation"]):
            folder = (parent or self.path) / "evaluations" / digest(settings)
        folder.mkdir(parents=True, exist_ok=True)
        if folder != self.path:
            self._write_config(folder)
        table = io.StringIO()
        writer = csv.DictWriter(table, fieldnames=list(tasks[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(tasks)
        checkpoint.write_atomically(folder / "tasks.csv", lambda file: file.write(table.getvalue().encode()))
        checkpoint.write_atomically(
            folder / "report.json", lambda file: file.write((json.dumps(report, indent=2) + "\n").encode())
        )
        return folder

    def finished_report(self) -> dict[str, Any] | None:
        """Returns the report with these evaluation settings, or None if training or the evaluation is not complete."""
        report = find_report(self.path, self.run_id, evaluation_config(self.settings))
        return report[0] if report else None

    def _update_record(self, iteration: int, status: str) -> None:
        elapsed, self._clock = time.monotonic() - self._clock, time.monotonic()
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

    def _truncate_metrics(self, iteration: int) -> None:
        """Drops the lines after the checkpoint's iteration; training computes and logs them again."""
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return
        kept = []
        for line in path.read_text(errors="replace").splitlines(keepends=True):
            try:
                if line.endswith("\n") and json.loads(line)["iteration"] <= iteration:
                    kept.append(line)
            except ValueError:
                break  # the line was cut off in the middle of a write
        checkpoint.write_atomically(path, lambda file: file.write("".join(kept).encode()))


class NonWritingRunFolder(RunFolder):
    """The same folder in processes other than rank 0, which write nothing."""

    def log(self, iteration: int, metrics: Mapping[str, float]) -> None: ...

    def save_checkpoint(self, iteration: int, state: Mapping[str, Any], execution: Mapping[str, Any]) -> None: ...

    def close(self, status: str) -> None: ...


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
        report = read_json(path)
        if report is None or report["evaluation"] != evaluation or report["run_id"] != run_id:
            continue
        if report["iteration"] == report["num_iterations"]:
            return report, path.parent
        if unfinished:
            found.append((report, path.parent))
    return max(found, key=lambda entry: entry[0]["iteration"], default=None)


def read_json(path: Path) -> dict[str, Any] | None:
    """Reads a JSON file; returns None if it does not exist.

    Raises:
        MamlError: if the file is damaged.
    """
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise MamlError(f"{path} is damaged ({error}); move it away, or restore it, and try again") from error


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


def _commit() -> dict[str, Any]:
    """Returns the clone's commit and whether tracked files differ from it; both are None outside a clone.

    An installed wheel, or a copy of the files, may be inside another project's repository. That commit is not used.
    """
    unknown = {"commit": None, "dirty": None}
    if not IN_CLONE:
        return unknown
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
        return unknown
    if Path(top.rstrip("\n")).resolve() != ROOT:
        return unknown
    return {"commit": head.strip(), "dirty": bool(status.strip())}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
