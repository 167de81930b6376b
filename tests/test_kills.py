"""Runs that are killed at every point of their last second, or at random: the same command finishes what is missing."""

from __future__ import annotations

import json
import random
import shutil
import socket
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from maml.experiment import run_experiment
from maml.record import checkpoint
from maml.record.index import read_run
from tests.kills import every_point, run_killed, start_process, sweep_killed
from tests.runs import TinyRuns

# Entries of run.json that differ between an interrupted run and one that was not.
_TIMES = ("started", "finished", "seconds", "segments", "command")
SHORT = ("log_every=2", "checkpoint_every=3", "evaluation.num_tasks=3", "evaluation.num_steps=1")
SINUSOID = (*SHORT, "num_iterations=7", "meta_batch_size=2", "evaluation.num_shots=[5]")
RL = (
    "+experiment=point_navigation_maml",
    "domain.num_shots=3",
    "domain.horizon=8",
    "model.hidden_sizes=[10]",
    "evaluation.step_size=0.5",
    "evaluation.num_shots=null",
    *SHORT,
    "num_iterations=4",
    "meta_batch_size=2",
)
IMAGES = (*SHORT, "num_iterations=4", "meta_batch_size=2", "model.num_filters=4")
LOGGER = "logger._target_=tests.kills.Delivering"
UNTRAINED = ("+experiment=sinusoid_random_init", *SHORT, "num_iterations=0", "evaluation.num_shots=[5]")


def records(runs_dir: Path) -> dict[str, Any]:
    """Returns all that a folder of runs holds, by file, without times."""
    content: dict[str, Any] = {}
    for path in sorted(path for path in runs_dir.rglob("*") if path.is_file()):
        name = str(path.relative_to(runs_dir))
        if path.suffix == ".pt":
            content[name] = checkpoint.load(path)
        elif path.name == "run.json":
            record = json.loads(path.read_text())
            segments, reached = record["segments"], 0
            for segment in segments:
                assert segment["first_iteration"] == reached, "no hole between the segments"
                reached = segment["last_iteration"]
                assert reached == segment["first_iteration"] or "execution" in segment
            content[name] = {key: value for key, value in record.items() if key not in _TIMES}
            content[name] |= {"keys": set(record), "reached": reached}
        elif path.suffix == ".json" and "sweeps" in path.parts:
            content[name] = {key: value for key, value in json.loads(path.read_text()).items() if key not in _TIMES}
        elif path.name == "report.png":
            assert path.stat().st_size
            content[name] = None
        elif path.name in ("lock", "config.yaml"):
            content[name] = None  # they name a process, and the folder of the runs
        else:
            content[name] = path.read_bytes()
    return content


def assert_equal(mine: Any, theirs: Any, where: str = "") -> None:
    """Asserts that nested content is equal, tensors bit by bit."""
    if isinstance(mine, dict) and isinstance(theirs, dict):
        assert list(mine) == list(theirs) if where.endswith(".pt") else mine.keys() == theirs.keys(), where
        for name, value in mine.items():
            assert_equal(value, theirs[name], f"{where}/{name}")
    elif isinstance(mine, torch.Tensor):
        assert mine.dtype == theirs.dtype and torch.equal(mine, theirs), where
    else:
        assert mine == theirs, where


def assert_nothing_runs(runs_dir: Path) -> None:
    """Asserts that no reader takes a dead run for a live one, or an evaluated run for an unfinished one."""
    for record in runs_dir.glob("*/*/run.json"):
        run = read_run(record.parent)
        assert run is not None
        assert run.status == ("finished" if (record.parent / "report.json").exists() else "killed")


def join(process: BaseProcess) -> int | None:
    process.join(120)
    assert not process.is_alive()
    return process.exitcode


class Storm:
    """Kills a kind of run again and again, and compares each with one that was not killed.

    Args:
        tiny: where the runs are.
        overrides: the kind of run.
        num_updates: number of meta-updates before the last second.
        prepare: makes what has to be there before the run.
    """

    def __init__(
        self,
        tiny: TinyRuns,
        overrides: Sequence[str],
        num_updates: int,
        prepare: Callable[[TinyRuns], object] = lambda _: None,
    ) -> None:
        self.tiny, self.overrides, self.num_updates, self.prepare = tiny, overrides, num_updates, prepare
        self.anew()
        start = time.monotonic()
        assert join(self.start()) == 0
        self.seconds = time.monotonic() - start
        self.whole = records(tiny.runs_dir)

    def start(self, at: int = 0) -> BaseProcess:
        """Starts the run, which is killed at a point."""
        return start_process(run_killed, self.tiny.config(*self.overrides), at, self.num_updates)

    def again(self) -> None:
        """Gives the same command again, to the end."""
        run_experiment(self.tiny.config(*self.overrides), "custom")

    def check(self) -> None:
        """Gives the same command again, and compares."""
        if self.tiny.runs_dir.exists():
            assert_nothing_runs(self.tiny.runs_dir)
        self.again()
        assert_equal(records(self.tiny.runs_dir), self.whole)

    def anew(self) -> None:
        """Removes the runs of the kill before."""
        shutil.rmtree(self.tiny.runs_dir, ignore_errors=True)
        self.prepare(self.tiny)

    def at_every_point(self) -> int:
        """Kills at each point of the last second; returns the number of points."""

        def kill(at: int) -> int | None:
            self.anew()
            return join(self.start(at))

        return every_point(kill, self.check)

    def at_random(self, count: int = 10) -> int:
        """Kills at random times, each run up to three times; returns the number of processes that died of it."""
        killed = 0
        while killed < count:
            self.anew()
            for _ in range(3):
                process = self.start()
                time.sleep(random.uniform(0, self.seconds))
                process.kill()
                was_killed = join(process) != 0
                killed += was_killed
                self.seconds *= 1.2 if was_killed else 0.7  # half of them die before their end, on any machine
            self.check()
        return killed


class Processes(Storm):
    """A run of two processes, as torchrun starts them; the first writes all files, and is killed at the points."""

    def start(self, at: int = 0) -> BaseProcess:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        config = self.tiny.config(*self.overrides)
        self.both = [
            start_process(
                run_killed,
                config,
                0 if rank else at,
                self.num_updates,
                {name: str(value) for name, value in (shared | {"RANK": rank, "LOCAL_RANK": rank}).items()},
            )
            for rank in (0, 1)
        ]
        return self.both[0]

    def again(self) -> None:
        join(self.both[1])
        first = self.start()
        assert [join(first), join(self.both[1])] == [0, 0]


class Sweep(Storm):
    """A sweep over two seeds, one after the other."""

    def start(self, at: int = 0) -> BaseProcess:
        places = (f"runs_dir={self.tiny.runs_dir}", f"cache_dir={self.tiny.cache_dir}")
        arguments = ["-m", *self.tiny.base, *self.overrides, *places, "seed=0,1"]
        return start_process(sweep_killed, arguments, at, self.num_updates)

    def again(self) -> None:
        assert join(self.start()) == 0


def trained(tiny: TinyRuns) -> None:
    """Makes a run that is trained and evaluated."""
    kept = tiny.in_folder("trained").runs_dir
    if not kept.exists():
        tiny.in_folder("trained").run(*SINUSOID)
    shutil.copytree(kept, tiny.runs_dir)


Kind = Callable[[pytest.FixtureRequest], Storm]


def on_sinusoid(
    kind: type[Storm], overrides: Sequence[str], num_updates: int = 0, prepare: Any = lambda _: None
) -> Kind:
    return lambda request: kind(request.getfixturevalue("tiny"), (*overrides, LOGGER), num_updates, prepare)


KINDS: dict[str, Kind] = {
    "sinusoid": on_sinusoid(Storm, SINUSOID, 7),
    "evaluation": on_sinusoid(Storm, (*SINUSOID, "mode=eval", "evaluation.num_shots=[3]"), 0, trained),
    "other_evaluation": on_sinusoid(Storm, (*SINUSOID, "evaluation.num_shots=[3]"), 0, trained),
    "untrained": on_sinusoid(Storm, UNTRAINED),
    "seeds": on_sinusoid(Storm, (*SINUSOID, "seeds=2", "hardware.task_chunk=2"), 7),
    "policy": on_sinusoid(Storm, RL, 4),
    "processes": on_sinusoid(Processes, SINUSOID, 7),
    "sweep": on_sinusoid(Sweep, SINUSOID, 14),
    "images": lambda request: Storm(request.getfixturevalue("tiny_images"), (*IMAGES, LOGGER), 4),
}
FAST = {"sinusoid"}


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, id=name, marks=() if name in FAST else pytest.mark.slow) for name, kind in KINDS.items()],
)
def test_run_killed_at_any_point_of_its_last_second_is_finished_by_the_same_command(
    kind: Kind, request: pytest.FixtureRequest
) -> None:
    number = kind(request).at_every_point()
    print(f"killed at {number} points")
    assert number > 30


@pytest.mark.slow
@pytest.mark.parametrize("kind", [pytest.param(kind, id=name) for name, kind in KINDS.items()])
def test_run_killed_at_random_times_is_finished_by_the_same_command(kind: Kind, request: pytest.FixtureRequest) -> None:
    number = kind(request).at_random()
    print(f"killed {number} times")
