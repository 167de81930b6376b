"""Errors that a user can cause or mend; errors of the framework itself are plain exceptions."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from pathlib import Path


class MamlError(ValueError):
    """A setting, a file or a run cannot be used. The message says what is wrong, why, and what to do."""


class UnknownKeys(MamlError):
    """A config has keys that do not exist.

    Args:
        message: what is wrong with the config.
        keys: the keys, with the names of their parts: ``inner.step_size``.
    """

    def __init__(self, message: str, keys: Sequence[str]) -> None:
        super().__init__(message, keys)  # both, because pickle calls the class with these arguments
        self.keys = keys

    def __str__(self) -> str:
        return self.args[0]


class Unavailable(MamlError):
    """This machine lacks something that the run needs: data, a package, a device."""


class Diverged(MamlError):
    """Parameters, or values computed from them, are not finite."""


class TooLarge(MamlError):
    """Something would take more memory than this machine has."""


class EnvironmentFailed(MamlError):
    """A user's environment raised an error in an episode."""


class Disconnected(MamlError):
    """Another process of the run has ended or cannot be reached; this process itself has not failed."""


class Interrupted(KeyboardInterrupt):
    """A signal stopped the run. Its state is saved; the same command resumes it.

    Args:
        message: what was stopped and how to resume.
        signal_number: the signal's number.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message, signal_number)  # both, because pickle calls the class with these arguments
        self.signal_number = signal_number

    def __str__(self) -> str:
        return self.args[0]


def first_line(error: BaseException) -> str:
    """Returns the first line of an error, or its name if it has no text."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def place(error: BaseException) -> str:
    """Returns the file and the line that raised an error."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{Path(last.filename).name}, line {last.lineno}"


def first_ten(faults: Sequence[str]) -> str:
    """Joins the first ten faults to one line, and says how many more there are."""
    more = f", and {len(faults) - 10} more" if len(faults) > 10 else ""
    return f"{', '.join(faults[:10])}{more}"


def cause(error: BaseException) -> str:
    """Returns an error's class and the first line of its message."""
    return ": ".join([type(error).__name__, *str(error).splitlines()[:1]])
