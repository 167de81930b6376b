"""The process in which another revision of this project times itself, driven by scripts/previous.py.

    python scripts/previous_worker.py FOLDER DEVICE THREADS EXPERIMENT IMPLEMENTATION METHOD [OVERRIDE ...]

It builds the implementation with the revision's own scripts/implementations.py. For each line on its standard input it
times one turn and answers with the seconds per call. Between turns it waits for the next line and computes nothing.
"""

from __future__ import annotations

import importlib
import itertools
import os
import sys
from pathlib import Path
from typing import Any

import torch
from clocks import WARM_UP, choose_clock, seconds_per_call


def main() -> None:
    """Answers "ready" when the implementation is built, then every line with a number.

    Raises:
        ImportError: if another revision would be measured than that of the folder.
    """
    # The revision's own output must not look like an answer, so its standard output becomes standard error.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    folder, device, threads, experiment, name, method, *overrides = sys.argv[1:]
    torch.set_num_threads(int(threads))
    torch.backends.cudnn.allow_tf32 = False  # as in training; older revisions do not set it for themselves
    # From here on, imports find the revision. The clock is today's, because a ratio needs the same clock on both sides.
    sys.path[0] = str(Path(folder) / "scripts")
    sys.path.insert(1, folder)
    del sys.modules["clocks"]
    implementations: Any = importlib.import_module("implementations")
    for module in ("implementations", "maml"):
        if not Path(sys.modules[module].__file__ or "").is_relative_to(folder):
            raise ImportError(f"{module} is not the revision's own; run the benchmark with the project's own Python")
    problem = implementations.Problem(experiment, overrides, device)
    implementation = implementations.IMPLEMENTATIONS[name](problem)
    iterations = itertools.count(1)

    def run() -> object:
        if method == "gradient":
            return implementation.gradient(problem.tasks)
        return implementation.iterate(problem, next(iterations))

    clock, _ = choose_clock(torch.device(device), int(threads))
    for _ in range(WARM_UP if method == "iterate" else 1):
        run()
    print("ready", file=answers, flush=True)
    for _ in sys.stdin:
        print(seconds_per_call(run, clock), file=answers, flush=True)


if __name__ == "__main__":
    main()
