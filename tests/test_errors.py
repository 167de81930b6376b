"""Errors that a user can cause: what kind they are, and that they pass from one process to another."""

from __future__ import annotations

import pickle
import signal

import pytest

from maml.errors import Disconnected, Diverged, Interrupted, MamlError, Unavailable, first_ten


@pytest.mark.parametrize("kind", [Unavailable, Diverged, Disconnected])
def test_every_error_is_one_that_the_entry_point_prints_without_a_traceback(kind: type[MamlError]) -> None:
    assert issubclass(kind, MamlError) and issubclass(kind, ValueError)
    assert str(pickle.loads(pickle.dumps(kind("what, why, what now")))) == "what, why, what now"


def test_interruption_keeps_its_signal_and_its_message_in_another_process() -> None:
    stop = pickle.loads(pickle.dumps(Interrupted("stopped; the same command resumes", signal.SIGTERM)))
    assert type(stop) is Interrupted
    assert (str(stop), stop.signal_number) == ("stopped; the same command resumes", signal.SIGTERM)


def test_interruption_is_no_error_that_a_handler_of_errors_swallows() -> None:
    assert not issubclass(Interrupted, Exception)


def test_more_than_ten_faults_are_counted() -> None:
    names = [f"f{number}" for number in range(12)]
    assert first_ten(names[:10]) == "f0, f1, f2, f3, f4, f5, f6, f7, f8, f9"
    assert first_ten(names) == "f0, f1, f2, f3, f4, f5, f6, f7, f8, f9, and 2 more"
