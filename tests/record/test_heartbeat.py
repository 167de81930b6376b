"""The heartbeat of a job, and how others tell from it that the job has died."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

from maml.record import heartbeat
from maml.record.heartbeat import DEAD_AFTER, Heartbeat, looks_dead, report_iteration


def wait_for(beats: list[Mapping[str, Any]], count: int) -> None:
    end = time.monotonic() + 10
    while len(beats) < count and time.monotonic() < end:
        time.sleep(0.01)
    assert len(beats) >= count


def test_first_beat_is_there_at_once_and_says_which_process_it_is() -> None:
    beats: list[Mapping[str, Any]] = []
    report_iteration(5)  # by an earlier job of this process
    Heartbeat(beats.append).stop()
    (beat,) = beats
    assert (beat["host"], beat["pid"]) == (platform.node(), os.getpid())
    assert "iteration" not in beat


def test_beats_give_iteration_and_speed() -> None:
    beats: list[Mapping[str, Any]] = []
    running = Heartbeat(beats.append, seconds=0.02)
    report_iteration(100)
    wait_for(beats, 3)
    report_iteration(200)
    wait_for(beats, len(beats) + 2)
    running.stop()
    count = len(beats)
    assert beats[-1]["iteration"] == 200
    assert max(beat.get("speed") or 0 for beat in beats) > 100
    time.sleep(0.06)
    assert len(beats) == count, "a beat after stop()"


def test_full_disk_does_not_stop_the_beats() -> None:
    beats: list[Mapping[str, Any]] = []

    def fail_first(beat: Mapping[str, Any]) -> None:
        beats.append(beat)
        if len(beats) == 1:
            raise OSError("no space left on device")

    running = Heartbeat(fail_first, seconds=0.01)
    wait_for(beats, 2)
    running.stop()


def test_dead_process_of_this_machine_is_seen_at_once() -> None:
    child = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    now = time.time()
    gone = {"time": now, "host": platform.node(), "pid": int(child.stdout)}
    assert "no longer exists" in looks_dead(gone)
    assert looks_dead(gone | {"pid": os.getpid()}) == ""


def test_process_of_another_machine_looks_dead_after_some_silence() -> None:
    beat = {"time": 1000.0, "host": "another", "pid": 2**30}  # which no process of this machine has
    assert looks_dead(beat, 1000.0 + heartbeat.SECONDS) == ""
    assert "no heartbeat from another" in looks_dead(beat, 1001.0 + DEAD_AFTER)
