"""The wandb-core process that a Python process starts: ended within a time limit, so that it cannot hold the process.

W&B's own exit hook waits for wandb-core without a limit. If wandb-core is frozen, the Python process never ends, and
neither does a shell that waits for the end of its output, because wandb-core has inherited it. The hook of this module
runs before W&B's and makes it superfluous.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
from contextlib import suppress
from subprocess import Popen
from threading import Event, Thread
from typing import Any

LOG = logging.getLogger(__name__)


class Service:
    """The wandb-core process of this process, if it has one.

    Attributes:
        limit: seconds that wandb-core gets to write and send what is left at exit.
        limit_if_troubled: the same if a mirror had trouble before, and has said so.
        is_troubled: whether a mirror of this process had trouble.
    """

    limit = 30.0
    limit_if_troubled = 5.0
    _seconds_after_kill = 5.0

    def __init__(self) -> None:
        self.is_troubled = False
        self._process: Popen[Any] | None = None
        self._owner: int | None = None
        self._requested, self._ended = Event(), Event()

    def watch(self) -> None:
        """Takes over the end of the wandb-core process that was started last. Call this after ``wandb.setup``."""
        setup = getattr(sys.modules.get("wandb.sdk.wandb_setup"), "_singleton", None)
        # Not public: without it, a frozen wandb-core is left behind instead of ended, and this process still exits.
        started = getattr(getattr(getattr(setup, "_connection", None), "_proc", None), "_process", None)
        self._process = started if isinstance(started, Popen) else None
        if self._owner != os.getpid():
            self._owner = os.getpid()
            # Before it is needed: at exit, Python starts no more threads.
            self._requested, self._ended = Event(), Event()
            Thread(target=self._tear_down_on_request, name="W&B teardown", daemon=True).start()
        # Exit hooks run in reverse order. Each ``wandb.setup`` may add W&B's own, which has to come after this one.
        atexit.unregister(self._end_at_exit)
        atexit.register(self._end_at_exit)

    def end(self, limit: float) -> bool:
        """Ends wandb-core: asks it to, waits for at most ``limit`` seconds, then kills it.

        Returns:
            Whether it ended in time.
        """
        if self._owner != os.getpid():  # never started, or that of the process from which this one was forked
            return True
        atexit.unregister(self._end_at_exit)
        self._requested.set()
        try:
            in_time = self._ended.wait(limit)
        except KeyboardInterrupt:  # the user does not want to wait
            in_time = False
        if not in_time and self._process is not None:
            self._process.kill()  # works on a stopped process too
            self._ended.wait(self._seconds_after_kill)
        self._owner = None
        return in_time

    def _tear_down_on_request(self) -> None:
        requested, ended = self._requested, self._ended
        requested.wait()
        with suppress(BaseException):  # wandb-core is gone or killed, or has failed, which W&B turns into `sys.exit`
            sys.modules["wandb"].teardown()
        ended.set()

    def _end_at_exit(self) -> None:
        in_time = self.end(self.limit_if_troubled if self.is_troubled else self.limit)
        if not in_time and not self.is_troubled:
            LOG.warning(
                "W&B did not stop within %.0f seconds and was ended; run folders are complete, and "
                "`python scripts/runs.py mirror RUN` sends a run again.",
                self.limit,
            )


SERVICE = Service()
