"""Runs, sweeps and scripts in processes that are killed at one of their file operations, see `tests.killer`."""

from __future__ import annotations

import atexit
import io
import itertools
import json
import multiprocessing
import os
import runpy
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
from maml.record.atomic import write_atomically
from tests.killer import Killer
from tests.runs import ROOT

# A process that is forked from the server has these modules already.
_PRELOADED = ["tests.kills", "maml.domain.sinusoid", "maml.domain.omniglot", "maml.domain.point_navigation"]
_PRELOADED += ["maml.paper.tables", "maml.paper.figures", "maml.paper.report", "matplotlib.figure"]


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


def script_killed(script: str, arguments: list[str], at: int) -> None:
    """Runs a script in this process, which is killed at a point; 0 is never."""
    os.chdir(ROOT)
    sys.argv = [str(ROOT / "scripts" / script), *arguments]
    sys.stdout = sys.stderr = io.open(os.devnull, "w")  # noqa: SIM115, UP020 - open until the process ends
    Killer(at, 0).install()
    runpy.run_path(sys.argv[0], run_name="__main__")


def _prepare(at: int, after_updates: int) -> None:
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = io.open(os.devnull, "w")  # noqa: SIM115, UP020 - open until the process ends
    maml.experiment.plot_report = _write_small_picture  # drawing takes longer than the run, and so does Git
    maml.record.run_folder.commit = lambda: {"commit": None, "dirty": None}
    Killer(at, after_updates).install()


def _write_small_picture(report: Mapping[str, Any], path: Path, metrics: object = ()) -> Path:
    write_atomically(path, lambda file: file.write(f"picture of {report['run_id']}".encode()))
    return path


def every_point(kill: Callable[[int], int | None], check: Callable[[], object], stride: int = 1) -> int:
    """Kills a run at each of its points in turn; returns a number that is not below that of the points.

    Args:
        kill: starts the run anew, kills it at the point with this number, and returns its exit status.
        check: called after each kill.
        stride: 1 kills at each point, n at each n-th.
    """
    for at in itertools.count(1, stride):
        status = kill(at)
        if status == 0:  # there is no such point
            return at - 1
        assert status == -signal.SIGKILL, status
        check()
    raise AssertionError
