"""Kills a process at one of its file operations: before or after each open, write, fsync, rename and removal."""

from __future__ import annotations

import atexit
import builtins
import io
import itertools
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

import maml.experiment
import maml.record.run_folder
from maml.cli.train import main
from maml.config.schema import Settings
from maml.errors import MamlError
from maml.experiment import run_experiment
from maml.logger.base import Logger
from maml.record.checkpoint import write_atomically
from maml.training.iteration import Iteration
from tests.runs import ROOT

# A process that is forked from the server has these modules already.
_PRELOADED = ["tests.kills", "maml.domain.sinusoid", "maml.domain.omniglot", "maml.domain.point_navigation"]
_WRITES = (1, 4)  # which writes to a file are points: a checkpoint has a hundred


class Killer:
    """Counts the file operations of this process and kills it at one of them.

    Args:
        at: number of the point at which the process dies, from 1; 0 is never.
        after_updates: number of meta-updates before the count begins.
    """

    def __init__(self, at: int, after_updates: int) -> None:
        self.at, self.left, self.count = at, after_updates, 0

    def point(self) -> None:
        """Marks a point."""
        if self.left <= 0:
            self.count += 1
            if self.count == self.at:
                os.kill(os.getpid(), signal.SIGKILL)

    def install(self) -> None:
        """Replaces this process's file operations, until it ends."""
        for name in ("replace", "rename", "unlink", "mkdir"):
            setattr(os, name, self._around(getattr(os, name)))
        os.fsync = self._around(lambda _: None)  # a kill is no power failure, so nothing has to reach the disk
        builtins.open = io.open = self._open(io.open)
        update = Iteration.__call__

        def counted(iterate: Iteration, number: Any) -> Any:
            self.left -= 1
            return update(iterate, number)

        Iteration.__call__ = counted  # type: ignore[assignment, method-assign]

    def _around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def replacement(*arguments: Any, **options: Any) -> Any:
            self.point()
            result = call(*arguments, **options)
            self.point()
            return result

        return replacement

    def _open(self, original: Callable[..., Any]) -> Callable[..., Any]:
        point = self.point

        class HalfWritten(io.BufferedWriter):
            """A file whose first writes arrive in two halves, with a point between them."""

            writes = 0

            def write(self, content: Any) -> int:
                self.writes += 1
                if self.writes not in _WRITES or len(content) < 2:
                    return super().write(content)
                half = len(content) // 2
                super().write(content[:half])
                self.flush()
                point()
                return half + super().write(content[half:])

        def replacement(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
            if isinstance(file, int) or not set(mode) & set("wax"):
                return original(file, mode, *arguments, **options)
            point()
            binary = HalfWritten(io.FileIO(file, mode.replace("b", "").replace("t", "")))
            point()
            return binary if "b" in mode else io.TextIOWrapper(binary, encoding="utf-8")

        return replacement


class Delivering(Logger):
    """A logger that delivers the report to a file when it is closed, as a service on a network does."""

    def start(self, run_dir: Path, *_: Any) -> None:
        self.path = run_dir / "delivered.json"

    def report(self, report: dict[str, Any], pictures: Mapping[str, Path]) -> None:
        self.content = {"headline": report["headline"], "pictures": [path.name for path in pictures.values()]}

    def finish(self, status: str) -> None:
        if status == "finished":
            self.path.write_text(json.dumps(self.content))


def start_process(target: Callable[..., object], *arguments: Any) -> BaseProcess:
    """Starts a function of this module in a process that is forked from one that has imported all that is slow."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    process = context.Process(target=target, args=arguments, daemon=True)
    process.start()
    return process


def run_killed(config: Settings, at: int, after_updates: int, environment: Mapping[str, str] | None = None) -> None:
    """Runs an experiment in this process, which is killed at a point.

    Args:
        config: the settings.
        at: the point; 0 is never.
        after_updates: number of meta-updates before points are counted.
        environment: environment variables, for one of several processes.
    """
    os.environ |= environment or {}
    sys.argv = [str(ROOT / "train.py")]
    _prepare(at, after_updates)
    try:
        run_experiment(config, "custom")
    except MamlError:  # the other of two processes was killed
        sys.exit(1)


def sweep_killed(arguments: list[str], at: int, after_updates: int) -> None:
    """Runs ``train.py`` in this process, which is killed at a point; see `run_killed`."""
    os.chdir(ROOT)
    sys.argv = [str(ROOT / "train.py"), *arguments]
    _prepare(at, after_updates)
    main()
    atexit._run_exitfuncs()  # a sweep writes its summary at exit, which multiprocessing leaves out


def _prepare(at: int, after_updates: int) -> None:
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = io.open(os.devnull, "w")  # noqa: SIM115, UP020 - open until the process ends
    maml.experiment.plot_report = _write_small_picture  # drawing takes longer than the run, and so does Git
    maml.record.run_folder._commit = lambda: {"commit": None, "dirty": None}
    Killer(at, after_updates).install()


def _write_small_picture(report: Mapping[str, Any], path: Path) -> Path:
    write_atomically(path, lambda file: file.write(f"picture of {report['run_id']}".encode()))
    return path


def every_point(kill: Callable[[int], int | None], check: Callable[[], object]) -> int:
    """Kills a run at each of its points in turn; returns the number of points.

    Args:
        kill: starts the run anew, kills it at the point with this number, and returns its exit status.
        check: called after each kill.
    """
    for at in itertools.count(1):
        status = kill(at)
        if status == 0:  # there is no such point
            return at - 1
        assert status == -signal.SIGKILL, status
        check()
    raise AssertionError
