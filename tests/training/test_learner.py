"""The owner of a seed: what it keeps open during training, and how it records the end."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from maml.errors import Disconnected, Diverged, Interrupted
from maml.experiment import build_algorithm
from maml.hardware.base import Hardware
from maml.logger.base import Logger
from maml.record.run_files import read_json
from maml.training.learner import Learner
from tests.runs import TinyRuns


class Closing(Logger):
    """A logger that notes the status it was given, and run.json's status at that time."""

    closed: list[tuple[str, str]] = []
    folder: Path

    def start(self, run_dir: Path, *_: Any) -> None:
        self.folder = run_dir

    def finish(self, status: str) -> None:
        record = read_json(self.folder / "run.json")
        assert record is not None
        self.closed.append((record["status"], status))


def learner(tiny: TinyRuns, *overrides: str) -> Learner:
    settings = tiny.config(f"logger._target_={__name__}.Closing", *overrides)
    return Learner(settings, "custom", build_algorithm(settings, Hardware("cpu")))


def test_nothing_is_written_before_it_is_opened(tiny: TinyRuns) -> None:
    mine = learner(tiny)
    assert mine.title == f"custom {mine.folder.run_id[:6]}, MAML"
    assert (mine.start, mine.report) == (0, None)
    assert not tiny.runs_dir.exists()


def test_meta_batches_are_those_of_the_seed(tiny: TinyRuns) -> None:
    first, again, second = (learner(tiny, f"seed={seed}").stream for seed in (0, 0, 1))
    assert first.uniform((3,)).equal(again.uniform((3,)))
    assert not first.uniform((3,)).equal(second.uniform((3,)))


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (Diverged("loss=nan"), "failed"),
        (RuntimeError("a bug"), "failed"),
        (Interrupted("stopped", 15), "interrupted"),
        (SystemExit(0), "interrupted"),
        (Disconnected("another process is gone"), "interrupted"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else value,
)
def test_error_says_how_a_training_ended_in_the_record_first_and_in_the_mirror(
    tiny: TinyRuns, error: BaseException, status: str
) -> None:
    Closing.closed.clear()
    mine = learner(tiny)
    with pytest.raises(type(error)), mine.open(Hardware("cpu"), num_seeds=1) as saved:
        assert saved is None
        record = read_json(mine.folder.path / "run.json")
        assert record is not None and record["status"] == "running"
        raise error
    assert Closing.closed == [(status, status)]


@pytest.mark.parametrize(
    ("report", "closed", "status"),
    [({"headline": 1.0}, ("running", "finished"), "finished"), (None, ("failed", "failed"), "failed")],
)
def test_training_is_finished_once_it_has_its_report_and_its_mirror_too(
    tiny: TinyRuns, report: dict[str, Any] | None, closed: tuple[str, str], status: str
) -> None:
    Closing.closed.clear()
    mine = learner(tiny)
    with mine.open(Hardware("cpu"), num_seeds=3):
        if report is not None:
            mine.finish(report, Path("plot.png"))
    assert Closing.closed == [closed]
    record = read_json(mine.folder.path / "run.json")
    assert record is not None and record["status"] == status
    assert record["segments"][0]["hardware"]["seeds"] == 3, "whose time it is, together"


def test_opened_again_it_gives_the_checkpoint_and_takes_it_over(tiny: TinyRuns) -> None:
    first = learner(tiny)
    with pytest.raises(Interrupted), first.open(Hardware("cpu"), num_seeds=1):
        first.folder.save_checkpoint(7, first.algorithm.state_dict(), {"num_threads": 1})
        raise Interrupted("stopped", 15)
    second = learner(tiny)
    for value in second.algorithm.theta.values():
        value.zero_()
    with second.open(Hardware("cpu"), num_seeds=1) as saved:
        assert saved is not None
        second.restore(saved)
        second.finish({}, Path("plot.png"))
    assert second.start == 7
    assert all(torch.equal(value, second.algorithm.theta[name]) for name, value in first.algorithm.theta.items())


class Listening(Closing):
    """A logger that notes which parts of which runs it gets."""

    heard: list[Any] = []
    knows = False

    def start(self, run_dir: Path, experiment: str, run_id: str, config: Mapping[str, Any], resumed: bool) -> None:
        super().start(run_dir)
        self.heard.append((run_dir.name, config["mode"], resumed))

    def log(self, metrics: Mapping[str, float], iteration: int) -> None:
        self.heard.append(iteration)

    def finish(self, status: str) -> None:
        self.heard.append(status)

    def has_part(self, *_: Any) -> bool:
        return self.knows


@pytest.mark.parametrize("knows", [True, False])
def test_logger_that_lacks_the_beginning_of_a_run_gets_it(
    tiny: TinyRuns, knows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (f"logger._target_={__name__}.Listening", "num_iterations=4", "log_every=1", "checkpoint_every=2")
    monkeypatch.setattr(Listening, "knows", knows)
    monkeypatch.setattr("maml.training.loop.report_iteration", lambda number: interrupt(number == 2))
    Listening.heard.clear()
    with pytest.raises(Interrupted):
        tiny.run(*words)
    monkeypatch.undo()
    monkeypatch.setattr(Listening, "knows", knows)
    folder = tiny.run(*words)
    first = [(folder.name, "train", False), 1, 2, "interrupted"]
    assert Listening.heard == [*first, (folder.name, "train", knows), *([] if knows else [1, 2]), 3, 4, "finished"]


def interrupt(now: bool) -> None:
    if now:
        os.kill(os.getpid(), signal.SIGTERM)


def test_another_evaluation_of_a_finished_run_is_a_run_of_its_own(tiny: TinyRuns) -> None:
    words = (f"logger._target_={__name__}.Listening", "num_iterations=2")
    folder = tiny.run(*words)
    Listening.heard.clear()
    tiny.run(*words, "evaluation.num_steps=1")
    (evaluation,) = (folder / "evaluations").iterdir()
    assert Listening.heard == [(evaluation.name, "eval", False), "finished"]
