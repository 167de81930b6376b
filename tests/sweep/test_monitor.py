"""What stands on the screen while parallel jobs run."""

from __future__ import annotations

import io
import time
from pathlib import Path

from rich.console import Console

from maml.sweep.monitor import Monitor
from tests.sweep.fake_sweep import write_beat, write_job, write_report


def wait_for(text: str, output: io.StringIO) -> None:
    end = time.monotonic() + 10
    while text not in output.getvalue() and time.monotonic() < end:
        time.sleep(0.01)
    assert text in output.getvalue()


def test_jobs_that_end_are_whole_lines_and_one_line_is_about_all(tmp_path: Path) -> None:
    sweep, output = tmp_path / "sweeps" / "one", io.StringIO()
    write_report(tmp_path, "old", [5.0])
    write_job(sweep, "a=0", run_id="old")
    monitor = Monitor(sweep, 3, Console(file=output, width=200), seconds=0.01)
    wait_for("1 of at most 3 finished\n", output)
    write_beat(write_job(sweep, "a=1", run_id="run"), iteration=3)
    write_job(sweep, "a=2", error="ValueError: [red]why[/red]")
    wait_for("failed: a=2: ValueError: [red]why[/red]\n", output)
    write_report(tmp_path, "run", [1.0, 3.0])
    monitor.stop()
    lines = output.getvalue().splitlines()
    assert lines[0] == f"the output of each job is in {sweep / 'jobs'}/*.log"
    assert "finished: a=1: mse (K=5, step 1, n=2) 2 +- 0.5" in lines
    assert not [line for line in lines if line.startswith("finished: a=0")], "it was finished before"
    assert lines[-1] == "2 of 3 finished, 1 failed", "the last line is up to date"


def test_line_stands_below_on_a_terminal(tmp_path: Path) -> None:
    sweep, output = tmp_path / "sweeps" / "one", io.StringIO()
    write_job(sweep, "a=1")
    monitor = Monitor(sweep, 1, Console(file=output, width=200, force_terminal=True), seconds=0.01)
    wait_for("0 of 1 finished", output)
    write_job(sweep, "a=1", error="why")
    wait_for("failed: ", output)
    monitor.stop()
    text = output.getvalue()
    assert text.rindex("0 of 1 finished, 1 failed") > text.rindex("failed: a=1: why")
    assert "\r" in text, "the line is drawn again in place"
