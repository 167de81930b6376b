"""The heartbeat of a job: every few seconds, a thread says that the job is alive and how far its training is."""

from __future__ import annotations

import os
import platform
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from maml.record.lock import process_exists

SECONDS = 10.0  # between two beats
DEAD_AFTER = 60.0  # seconds; some beats may come late, because a network file system or a machine is busy
_WINDOW = 6  # beats over which the speed is measured

# The last iteration that this process has trained; None before the training loop.
_reached: int | None = None


def report_iteration(iteration: int) -> None:
    """Notes how far the training of this process is. The training loop calls this after each iteration."""
    global _reached
    _reached = iteration


class Heartbeat:
    """A thread that beats at once and then every few seconds until it is stopped.

    A beat is a dict: ``time`` (seconds since 1970), ``host``, ``pid``, and, once training has begun, ``iteration``
    and ``speed`` in iterations per second (None at first).

    Args:
        send: takes a beat. Its errors are ignored, because a full disk or a lost network must not end training.
        seconds: time between two beats.
    """

    def __init__(self, send: Callable[[Mapping[str, Any]], object], seconds: float = SECONDS) -> None:
        global _reached
        _reached = None  # this process may have run another job before
        self._send, self._seconds = send, seconds
        self._samples: deque[tuple[float, int]] = deque(maxlen=_WINDOW)
        self._stopped = threading.Event()
        self._send_beat()  # from here on, others can see that the job runs
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread; no beat follows."""
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(self._seconds):
            self._send_beat()

    def _send_beat(self) -> None:
        with suppress(Exception):
            self._send(self._beat())

    def _beat(self) -> dict[str, Any]:
        beat: dict[str, Any] = {"time": time.time(), "host": platform.node(), "pid": os.getpid()}
        if _reached is None:
            return beat
        iteration = _reached
        self._samples.append((time.monotonic(), iteration))
        (then, before), (now, _) = self._samples[0], self._samples[-1]
        speed = (iteration - before) / (now - then) if iteration > before else None
        return beat | {"iteration": iteration, "speed": speed}


def looks_dead(beat: Mapping[str, Any], now: float | None = None) -> str:
    """Returns why the process of a heartbeat seems to have ended; empty if it seems to be alive.

    Args:
        beat: its last beat.
        now: seconds since 1970; None is this moment.
    """
    age = (time.time() if now is None else now) - beat["time"]
    if beat["host"] == platform.node() and not process_exists(beat["pid"]):
        return f"killed: process {beat['pid']} no longer exists"
    if age > DEAD_AFTER:
        return f"looks dead: no heartbeat from {beat['host']} for {age:,.0f} s"
    return ""
