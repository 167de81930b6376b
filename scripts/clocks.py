"""The clock of a benchmark and the time of one turn; it imports nothing of this project, so any revision can use it."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable

import torch

MIN_TURN_SECONDS = 0.2  # shortest duration of a turn, which repeats the computation
WARM_UP = 6  # training iterations before the timing: a graph is captured at the fourth, and its first launch is slow

Clock = Callable[[], float]


def choose_clock(device: torch.device, num_threads: int) -> tuple[Clock, str]:
    """Returns the clock and its description."""
    if device.type == "cuda":

        def synchronized() -> float:
            torch.cuda.synchronize()
            return time.perf_counter()

        return synchronized, "wall clock, synchronised with the GPU"
    if num_threads == 1:
        return time.process_time, "CPU time of all threads of the process, which other load disturbs less"
    return time.perf_counter, "wall clock"


def seconds_per_call(run: Callable[[], object], clock: Clock, min_seconds: float = MIN_TURN_SECONDS) -> float:
    """Returns the seconds per call in one turn, which calls ``run`` until ``min_seconds`` have passed."""
    gc.collect()
    calls, start, elapsed = 0, clock(), 0.0
    while elapsed < min_seconds or not calls:
        run()
        calls += 1
        elapsed = clock() - start
    return elapsed / calls
