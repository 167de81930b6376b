"""The base class of mirrors: calls in order in one thread, one warning, and no run that waits or fails."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from maml.logger.base import Logger, Mirror, cause


class Noting(Mirror):
    """Records its calls and their threads; a call named in `broken` runs the function given there instead."""

    name = "Noting"

    def __init__(self, **broken: Callable[[], object]) -> None:
        self.broken, self.calls, self.threads = broken, list[tuple[Any, ...]](), set[threading.Thread]()

    def _note(self, name: str, *arguments: Any) -> None:
        self.calls.append((name, *arguments))
        self.threads.add(threading.current_thread())
        self.broken.get(name, lambda: None)()

    def _start(self, run_dir: Path, experiment: str, run_id: str, config: Mapping[str, Any], resumed: bool) -> None:
        self._note("start", experiment, run_id, resumed)

    def _log(self, metrics: dict[str, float], iteration: int) -> None:
        self._note("log", metrics, iteration)

    def _report(self, report: dict[str, Any], pictures: dict[str, Path]) -> None:
        self._note("report", report)

    def _finish(self, status: str) -> None:
        self._note("finish", status)


def run(logger: Logger, num_iterations: int = 2) -> None:
    metrics = {"loss": 0.0}
    logger.start(Path(), "an experiment", "1f2e3d", {}, False)
    for iteration in range(num_iterations):
        metrics["loss"] = float(iteration)  # the same dictionary each time
        logger.log(metrics, iteration)
    logger.report({"headline": 0.5}, {})
    logger.finish("finished")


def test_calls_go_through_in_order_in_one_other_thread(caplog: pytest.LogCaptureFixture) -> None:
    logger = Noting()
    run(logger)
    assert logger.calls == [
        ("start", "an experiment", "1f2e3d", False),
        ("log", {"loss": 0.0}, 0),
        ("log", {"loss": 1.0}, 1),
        ("report", {"headline": 0.5}),
        ("finish", "finished"),
    ]
    (thread,) = logger.threads
    assert thread is not threading.current_thread() and thread.daemon
    assert caplog.messages == []


def fail() -> None:
    raise ConnectionError("no route\nto the host")


@pytest.mark.parametrize("broken", ["start", "log", "report", "finish"])
def test_first_failure_is_warned_of_and_ends_the_mirror(broken: str, caplog: pytest.LogCaptureFixture) -> None:
    logger = Noting(**{broken: fail})
    run(logger)
    assert [name for name, *_ in logger.calls].count(broken) == 1
    assert logger.calls[-1][0] == broken
    assert caplog.messages == [
        "Noting stopped mirroring this run (ConnectionError: no route); the run continues, and its run folder is "
        "complete."
    ]
    assert caplog.records[0].levelno == logging.WARNING


def test_second_run_of_the_same_logger_starts_anew(caplog: pytest.LogCaptureFixture) -> None:
    logger = Noting(log=fail)
    run(logger)
    logger.broken.clear()
    logger.calls.clear()
    run(logger)
    assert [name for name, *_ in logger.calls] == ["start", "log", "log", "report", "finish"]
    assert len(caplog.messages) == 1


def test_slow_mirror_holds_up_no_call_and_is_left_behind(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Noting, "patience", 0.05)
    monkeypatch.setattr(Noting, "abandoned", False)
    release = threading.Event()
    logger = Noting(start=release.wait)
    run(logger, num_iterations=1000)
    assert [name for name, *_ in logger.calls] == ["start"]
    release.set()
    (message,) = caplog.messages
    assert message.startswith("Noting did not finish within 0 seconds and was abandoned")


def test_cause_is_kind_and_first_line() -> None:
    assert cause(ValueError("a\nb")) == "ValueError: a"
    assert cause(KeyboardInterrupt()) == "KeyboardInterrupt"


def test_plain_logger_takes_every_call() -> None:
    run(Logger())


def test_later_runs_do_not_wait_for_an_abandoned_service(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Noting, "patience", 0.05)
    monkeypatch.setattr(Noting, "abandoned", False)
    release = threading.Event()
    side_by_side = Noting(start=release.wait)
    side_by_side.start(Path(), "an experiment", "0", {}, False)
    run(Noting(start=release.wait))
    monkeypatch.setattr(Noting, "patience", 600.0)
    side_by_side.finish("finished")
    later = Noting()
    run(later)
    release.set()
    assert later.calls == []
    assert len(caplog.messages) == 1


def test_user_who_stops_the_wait_at_the_end_is_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Noting, "abandoned", False)
    release = threading.Event()
    logger = Noting(start=release.wait)

    def impatient(self: threading.Thread, timeout: float | None = None) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(threading.Thread, "join", impatient)
        run(logger)
    release.set()
    assert Noting.abandoned


def test_mirror_notes_which_report_it_got(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Noting, "folder", "noting")
    (tmp_path / "noting").mkdir()
    report = {"iteration": 3, "evaluation": {"num_tasks": 5}, "headline": 0.5}
    where = tmp_path, "an experiment", "1f2e3d", {"mode": "train"}
    for broken, is_complete in (({"finish": fail}, False), ({}, True)):
        logger = Noting(**broken)
        assert not logger.has(*where, report)
        logger.start(*where, False)
        logger.report(report, {})
        logger.finish("finished")
        assert logger.has(*where, report) == logger.is_complete == is_complete
    killed_before_the_end_of_the_run = Noting()
    killed_before_the_end_of_the_run.start(*where, True)
    killed_before_the_end_of_the_run.report(report, {})
    killed_before_the_end_of_the_run.finish("finished")
    assert [name for name, *_ in killed_before_the_end_of_the_run.calls] == ["start", "finish"]
    (tmp_path / "noting" / "an experiment-1f2e3d.open").touch()  # as a part leaves it that is killed
    for resumed in (True, False):
        later, longer = Noting(), report | {"iteration": 9}
        later.start(*where, resumed)
        later.report(longer, {})
        later.finish("finished")
        assert later.has(*where, longer) == (not resumed), "what the killed part had in memory is sent with the whole"
    later.destination = {"project": "another"}
    assert not later.has(*where, longer)
    assert not logger.has(*where, report | {"iteration": 4})
    assert not logger.has(*where, report | {"evaluation": {"num_tasks": 6}})
    assert not logger.has(*where, report | {"headline": 0.6})
    assert not logger.has(tmp_path, "another experiment", "1f2e3d", {"mode": "train"}, report)
    assert not logger.has(tmp_path, "an experiment", "1f2e3d", {"mode": "eval"}, report), "it is a run of its own"
    assert Logger().has(*where, report), "a logger that sends nothing lacks nothing"
