"""The progress display, on a terminal and elsewhere, with a fake clock."""

import io
from collections.abc import Mapping

import pytest
from rich.console import Console

from maml.training.progress import EvaluationProgress, Progress


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("maml.training.progress.monotonic", clock)
    return clock


def metrics() -> Mapping[str, float]:
    return {"loss": 0.123456, "accuracy": 0.5}


def test_plain_output_has_the_first_line_the_last_and_one_each_30_seconds(clock: Clock) -> None:
    out = io.StringIO()
    with Progress("sinusoid [10shot]", total=1000, console=Console(file=out)) as progress:
        clock.now += 60  # the first iteration compiles
        for iteration in range(1, 1001):
            progress.update(iteration, metrics)
            if iteration == 500:
                progress.message("saved")
            clock.now += 0.125  # exact in binary
    assert out.getvalue().splitlines() == [
        "sinusoid [10shot] 1/1000  loss 0.1235  accuracy 0.5",
        "sinusoid [10shot] 241/1000  loss 0.1235  accuracy 0.5  8.0 it/s  ETA 0:01:35",
        "sinusoid [10shot] 481/1000  loss 0.1235  accuracy 0.5  8.0 it/s  ETA 0:01:05",
        "saved",
        "sinusoid [10shot] 721/1000  loss 0.1235  accuracy 0.5  8.0 it/s  ETA 0:00:35",
        "sinusoid [10shot] 961/1000  loss 0.1235  accuracy 0.5  8.0 it/s  ETA 0:00:05",
        "sinusoid [10shot] 1000/1000  loss 0.1235  accuracy 0.5  8.0 it/s  ETA 0:00:00",
    ]


def test_speed_is_that_of_the_recent_iterations(clock: Clock) -> None:
    out = io.StringIO()
    with Progress("run", total=200, start=100, console=Console(file=out)) as progress:
        for iteration in range(101, 201):
            progress.update(iteration, dict)
            clock.now += 20.0 if iteration < 150 else 0.5
    lines = out.getvalue().splitlines()
    assert lines[0] == "run 101/200"
    assert lines[1] == "run 103/200  20.0 s/it  ETA 0:32:20"
    assert lines[-1] == "run 200/200  2.0 it/s  ETA 0:00:00"


def test_time_left_is_never_too_long_to_be_shown(clock: Clock) -> None:
    out = io.StringIO()
    with Progress("run", total=2**63 - 1, console=Console(file=out)) as progress:
        progress.update(1, dict)
        clock.now += 30
        progress.update(2, dict)
    assert out.getvalue().splitlines()[1].endswith("30.0 s/it  ETA 999999999 days, 23:59:59")


def test_metrics_are_read_only_when_drawn(clock: Clock) -> None:
    reads = 0

    def read() -> Mapping[str, float]:
        nonlocal reads
        reads += 1
        return {}

    terminal = Console(file=io.StringIO(), force_terminal=True, width=120)
    with Progress("run", total=10_000, console=terminal) as progress:
        for iteration in range(1, 10_001):
            progress.update(iteration, read)
            clock.now += 0.001
    assert reads == pytest.approx(10_000 * 0.001 / 0.2, abs=2)


@pytest.mark.parametrize("width", [70, 120])
def test_terminal_shows_a_bar_with_the_same_facts(width: int, clock: Clock) -> None:
    terminal = Console(file=io.StringIO(), force_terminal=True, color_system=None, width=width)
    with Progress("run [x]", total=70_000, console=terminal) as progress:
        progress.update(1, metrics)
        clock.now += 0.2
        progress.update(201, metrics)
        progress.message("saved [checkpoint]")
    drawn = terminal.file.getvalue()  # type: ignore[attr-defined]
    for fact in (
        "run [x]",
        "201/70000",
        "loss 0.1235",
        "accuracy 0.5",
        "1,000.0 it/s",
        "ETA 0:01:10",
        "saved [checkpoint]",
    ):
        assert fact in drawn


def test_interrupted_display_lets_the_error_pass(clock: Clock) -> None:
    out = io.StringIO()
    with pytest.raises(KeyboardInterrupt), Progress("run", total=10, console=Console(file=out)) as progress:
        progress.update(1, dict)
        raise KeyboardInterrupt
    assert out.getvalue() == "run 1/10\n"


def test_long_evaluation_has_a_line_after_a_second_and_one_each_30_seconds(clock: Clock) -> None:
    out = io.StringIO()
    with EvaluationProgress(total=200, console=Console(file=out)) as progress:
        progress.what = "K=5, 200 tasks"
        for done in range(1, 201):
            clock.now += 0.5
            progress.reach(done)
    assert out.getvalue().splitlines() == [
        "evaluating 1 %  K=5, 200 tasks  ETA 0:01:39",
        "evaluating 31 %  K=5, 200 tasks  ETA 0:01:09",
        "evaluating 61 %  K=5, 200 tasks  ETA 0:00:39",
        "evaluating 91 %  K=5, 200 tasks  ETA 0:00:09",
    ]


@pytest.mark.parametrize("terminal", [True, False])
def test_short_evaluation_is_silent(terminal: bool, clock: Clock) -> None:
    out = io.StringIO()
    with EvaluationProgress(total=100, console=Console(file=out, force_terminal=terminal)) as progress:
        for done in range(101):
            progress.reach(done)
            clock.now += 0.009
    assert "evaluating" not in out.getvalue()


def test_terminal_shows_a_bar_of_the_evaluation_which_goes_at_the_end(clock: Clock) -> None:
    terminal = Console(file=io.StringIO(), force_terminal=True, color_system=None, width=100)
    with EvaluationProgress(total=100, console=terminal) as progress:
        progress.what = "K=5, trying step size 0.1"
        clock.now += 2
        progress.reach(50)
    drawn = terminal.file.getvalue()  # type: ignore[attr-defined]
    assert "50 %  K=5, trying step size 0.1  ETA 0:00:02" in drawn
    assert drawn.endswith("\x1b[1A\x1b[2K"), "the line is erased"
