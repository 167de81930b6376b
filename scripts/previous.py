"""Times this project's own code at another revision, in turns with the present one, so that a slowdown shows."""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from benchmark import (
    RESULTS,
    ROOT,
    Turn,
    Unavailable,
    choose_clock,
    git,
    hardware_folder,
    read_conditions,
    time_in_turns,
)

Method = Literal["gradient", "iterate"]
"""What is timed: a meta-gradient, or a whole training iteration."""

PREVIOUS = "previous"
PREVIOUS_BAR = 0.95  # required ratio of the present speed to that of the previous revision

PREVIOUS_TEXT = """
`previous` is this project's own code at the revision above: the newest tag, or else the commit of the last table of
this processor. A process of its own takes its turns; it waits while the others are measured. Its gradient is not
compared with the loop's.
""".strip()


def add_previous_option(options: argparse.ArgumentParser) -> None:
    """Adds the option that names the revision."""
    options.add_argument(
        "--previous",
        metavar="REVISION",
        help="git revision of this project that takes turns as well (default: the newest tag, or else the commit that "
        "this processor's committed table names)",
    )


class Previous:
    """The revision that the present code is compared with.

    Args:
        options: the benchmark's options, with ``previous``, the name of a revision or None.

    Attributes:
        commit: full id of the revision's commit; empty if there is no such revision.
        reason: why there is none.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self._device, self._threads = options.device, options.threads
        self.commit, self.reason = "", ""
        name = options.previous or git("describe", "--tags", "--abbrev=0") or _commit_of_table(options)
        if not name:
            self.reason = "no tag, and no committed table of this processor; give --previous REVISION"
            return
        self.commit = git("rev-parse", "--verify", f"{name}^{{commit}}")
        if not self.commit:
            self.reason = f"this clone has no revision {name}; git fetch --unshallow --tags, or give --previous"

    def __str__(self) -> str:
        return self.commit or f"unavailable: {self.reason}"

    def time_in_turns(
        self,
        runs: Mapping[str, Callable[[], object]],
        rounds: int,
        implementation: str,
        experiment: str,
        method: Method,
    ) -> tuple[dict[str, list[float]], dict[str, str]]:
        """Times functions in turns, and the revision as ``previous``; the other arguments are those of `process`.

        Returns:
            The seconds per call by name, one number per round; and by name, why the revision is missing if it is.
        """
        clock, _ = choose_clock(torch.device(self._device), self._threads)
        with contextlib.ExitStack() as stack:
            elsewhere, missing = {}, {}
            try:
                elsewhere[PREVIOUS] = stack.enter_context(self.process(implementation, experiment, method))
            except Unavailable as reason:
                missing[PREVIOUS] = f"unavailable: {reason}"
            return time_in_turns(runs, rounds, clock, elsewhere=elsewhere, title=experiment), missing

    @contextlib.contextmanager
    def process(
        self, implementation: str, experiment: str, method: Method, overrides: Sequence[str] = ()
    ) -> Iterator[Turn]:
        """Exports the revision and starts its process, until the context ends.

        Args:
            implementation: name of the implementation in the revision's own scripts/implementations.py.
            experiment: name of the experiment.
            method: what is timed.
            overrides: overrides of the experiment's config.

        Yields:
            A function that times one turn and returns the seconds per call.

        Raises:
            Unavailable: if there is no such revision, or it cannot be measured in this way.
        """
        if not self.commit:
            raise Unavailable(self.reason)
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary).resolve()
            _export(self.commit, folder)
            worker = [sys.executable, str(Path(__file__).with_name("previous_worker.py")), str(folder)]
            worker += [self._device, str(self._threads), experiment, implementation, method, *overrides]
            log = folder / "stderr"
            with (
                log.open("w") as stderr,
                subprocess.Popen(
                    worker, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True
                ) as process,
            ):
                try:
                    yield _driver(process, log, self.commit)
                finally:
                    process.kill()


def _driver(process: subprocess.Popen[str], log: Path, commit: str) -> Turn:
    """Waits until the process is ready; returns a function that lets it take a turn."""
    assert process.stdin is not None and process.stdout is not None
    questions, answers = process.stdin, process.stdout
    if not answers.readline():
        raise Unavailable(f"{commit[:7]} cannot be measured: {_last_line(log)}")

    def turn() -> float:
        if process.poll() is None:
            questions.write("\n")
            questions.flush()
        if answer := answers.readline():
            return float(answer)
        raise RuntimeError(
            f"the process of revision {commit[:7]} ended during its turn: {_last_line(log)}; "
            "run the benchmark again with another --previous"
        )

    return turn


def _export(commit: str, folder: Path) -> None:
    """Writes the revision's code and configs into a folder."""
    archive = subprocess.run(
        ["git", "-C", str(ROOT), "archive", commit, "maml", "conf", "scripts"], capture_output=True, check=False
    )
    if archive.returncode:
        raise Unavailable(f"git cannot export {commit[:7]}: {archive.stderr.decode().strip()}")
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive.stdout, check=True)


def _commit_of_table(options: argparse.Namespace) -> str:
    """Returns the commit that this processor's committed table names; empty if there is no such table."""
    committed = git("show", f"HEAD:{RESULTS}/{hardware_folder(options.device)}/{options.name}.md")
    return read_conditions(committed).get("commit", "").removesuffix("-dirty").removesuffix("unknown")


def _last_line(log: Path) -> str:
    """Returns the last line of a log, which names the error."""
    lines = log.read_text().split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it ended without a message")
