"""The run folder: what was run, from which commit, on which machine, and all that came of it."""

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
    """One run's folder. The id is a hash of what training depends on, so the same training is found, not repeated.

    Nothing is written before `open`.

    Args:
        config: the plain config.
        experiment: its name.
    """

    def __init__(self, config: Settings, experiment: str) -> None:
        self.config, self.experiment = config, experiment
        self.training_config = training_config(config)
        self.run_id = digest(self.training_config)
        self.path = self._find(config.run_dir, Path(config.runs_dir))
        self.checkpoint_path = self.path / "checkpoint.pt"
        self._lock: BaseFileLock | None = None
        self._metrics: IO[str] | None = None
        self._record: dict[str, Any] = {}
        self._is_trained = False

    def _find(self, given: str | None, runs_dir: Path) -> Path:
        """Returns the folder given, or of an experiment that trains the same thing, or one of its own."""
        own = runs_dir / self.experiment / self.run_id
        if given:
            return Path(given)
        others = (path.parent for path in sorted(runs_dir.glob(f"*/{self.run_id}/run.json")))
        return own if own.exists() else next(others, own)

    def open(self, hardware: Mapping[str, Any], command: str, algorithm: str) -> dict[str, Any] | None:
        """Makes or reopens the folder for training and returns the checkpoint to resume from, if there is one.

        Args:
            hardware: the machine of this stretch.
            command: that started it.
            algorithm: its name.

        Raises:
            MamlError: if the folder holds another run, another process is writing to it, or its checkpoint is damaged.
        """
        self.load_checkpoint()  # refuses before anything is written
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise MamlError(f"the run folder {self.path} cannot be made ({error.strerror}); change runs_dir") from error
        self._lock = self._acquire()
        for leftover in self.path.glob(".checkpoint*"):  # of a process that was killed while it wrote
            leftover.unlink()
        saved = self.load_checkpoint()  # the process that held the lock may have gone on meanwhile
        iteration = saved["iteration"] if saved else 0
        earlier = read_json(self.path / "run.json")
        self._is_trained = bool(saved and earlier and iteration >= self.config.num_iterations)
        if self._is_trained:  # what is left is an evaluation, perhaps of another experiment: the record stays as it is
            self._record = earlier or {}
            return saved
        self._write_config(self.path)
        self._record = earlier or {
            "experiment": self.experiment,
            "run_id": self.run_id,
            "seed": self.config.seed,
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
        """Makes sure, writing nothing, that no process is training here.

        Raises:
            MamlError: if one is.
        """
        if lock.is_held(self.path / "lock"):
            raise self._held()

    def _acquire(self) -> BaseFileLock:
        try:
            taken = lock.acquire(self.path / "lock", timeout=0.2)
        except OSError as error:
            raise MamlError(
                f"the run folder {self.path} cannot be written ({error.strerror}); change runs_dir"
            ) from error
        if taken is None:
            raise self._held()
        return taken

    def _held(self) -> MamlError:
        path = self.path / "lock"
        return MamlError(f"{lock.holder(path)} is training in {self.path}; {lock.advice(path)}")

    def load_checkpoint(self, path: Path | None = None) -> dict[str, Any] | None:
        """Reads the run's newest checkpoint, or the file given, and makes sure that it is this run's.

        Raises:
            MamlError: if it is damaged, or was trained with another config (the difference is shown).
        """
        found = path or checkpoint.newest(self.checkpoint_path)
        if found is None:
            self._refuse_foreign(read_json(self.path / "run.json"), self.path)
            return None
        saved = checkpoint.load(found)
        self._refuse_foreign(saved, found)
        return saved

    def _refuse_foreign(self, saved: Mapping[str, Any] | None, where: Path) -> None:
        if saved is not None and saved["training"] != self.training_config:
            raise MamlError(
                f"{where} belongs to another run ({saved['experiment']}):\n"
                f"{differences(self.training_config, saved['training'])}\n"
                "Give the command that it was trained with, or leave the folder to the run id"
            )

    def log(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """Appends one line of metrics; it holds nothing that a repetition would not give again."""
        try:
            if self._metrics is None:
                self._metrics = open(self.path / "metrics.jsonl", "a")  # noqa: SIM115 - held while the run is
            self._metrics.write(json.dumps({"iteration": iteration, **metrics}) + "\n")
            self._metrics.flush()
        except OSError as error:
            raise self._no_metrics(error) from error

    def _no_metrics(self, error: OSError) -> MamlError:
        return MamlError(
            f"{self.path / 'metrics.jsonl'} could not be written ({error.strerror}); the last checkpoint is intact. "
            "Free some space, then give the same command again"
        )

    def save_checkpoint(self, iteration: int, state: Mapping[str, Any], execution: Mapping[str, Any]) -> None:
        """Saves the training state after ``iteration`` meta-updates."""
        try:
            if self._metrics is not None:
                os.fsync(self._metrics.fileno())  # no checkpoint may know of a line that the disk does not
        except OSError as error:
            raise self._no_metrics(error) from error
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
        """Records how the run ended and lets go of the folder."""
        if self._metrics is not None:
            with suppress(OSError):  # a line that a full disk refused, and was reported, is tried once more
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

    def save_report(self, report: Mapping[str, Any], tasks: list[dict[str, Any]], beside: Path | None = None) -> Path:
        """Writes ``report.json`` and ``tasks.csv`` and returns their folder.

        Args:
            report: of an evaluation.
            tasks: its rows per task.
            beside: None is the evaluation at the end of training, which belongs to the run's own folder; any other goes
                to a folder of its own below the one given, so that no evaluation overwrites another.
        """
        settings = {"iteration": report["iteration"], **report["evaluation"]}
        first = read_json(self.path / "report.json")
        folder = self.path
        unfinished = report["iteration"] < report["num_iterations"]
        if beside is not None or unfinished or (first and first["evaluation"] != report["evaluation"]):
            folder = (beside or self.path) / "evaluations" / digest(settings)
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
        """Returns the report of this run and these evaluation settings, if training ended and it was made."""
        wanted = evaluation_config(self.config)
        for path in (self.path / "report.json", *sorted(self.path.glob("evaluations/*/report.json"))):
            report = read_json(path)
            complete = report is not None and report["iteration"] == report["num_iterations"]
            if report is not None and complete and report["evaluation"] == wanted and report["run_id"] == self.run_id:
                return report
        return None

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
        content = OmegaConf.to_yaml(self.config.as_dict()).encode()
        checkpoint.write_atomically(folder / "config.yaml", lambda file: file.write(content))

    def _write_record(self) -> None:
        content = (json.dumps(self._record, indent=2) + "\n").encode()
        checkpoint.write_atomically(self.path / "run.json", lambda file: file.write(content))

    def _truncate_metrics(self, iteration: int) -> None:
        """Drops lines that the checkpoint does not know of; they will be computed, and logged, again."""
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return
        kept = []
        for line in path.read_text(errors="replace").splitlines(keepends=True):
            try:
                if line.endswith("\n") and json.loads(line)["iteration"] <= iteration:
                    kept.append(line)
            except ValueError:
                break  # cut off in the middle of a write
        checkpoint.write_atomically(path, lambda file: file.write("".join(kept).encode()))


class NonWritingRunFolder(RunFolder):
    """The same folder in the other processes of a run, which leave all writing to the first."""

    def log(self, iteration: int, metrics: Mapping[str, float]) -> None: ...

    def save_checkpoint(self, iteration: int, state: Mapping[str, Any], execution: Mapping[str, Any]) -> None: ...

    def close(self, status: str) -> None: ...


def read_json(path: Path) -> dict[str, Any] | None:
    """Reads a JSON file; None if there is none.

    Raises:
        MamlError: if it is damaged.
    """
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise MamlError(f"{path} is damaged ({error}); move it away, or restore it, and try again") from error


def versions() -> dict[str, str]:
    """Returns the versions that numbers may depend on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    found["torch"] = torch.__version__
    return found


def command_line() -> str:
    """Returns the command that started this process, as one would type it."""
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
    """Returns the commit of the clone, and whether tracked files differ from it; None if this is no clone.

    A wheel, or a copy of the files, may lie inside another project's repository, whose commit says nothing of ours.
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
                ["status", "--porcelain", "--untracked-files=no", "--", ".", ":!results"],  # a run may live there
            )
        )
    except (OSError, subprocess.SubprocessError):
        return unknown
    if Path(top.rstrip("\n")).resolve() != ROOT:
        return unknown
    return {"commit": head.strip(), "dirty": bool(status.strip())}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
