"""Sends the output of a job to a file, so that parallel jobs do not write over each other on the screen."""

from __future__ import annotations

import os
import sys
from pathlib import Path


class OutputFile:
    """Everything that this process prints is appended to a file, until `close`.

    File descriptors are redirected too, because libraries and child processes write to them directly.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self._file = open(path, "a", buffering=1, errors="replace")  # noqa: SIM115 - open until `close`
        sys.stdout.flush()
        sys.stderr.flush()
        self._descriptors = os.dup(1), os.dup(2)
        self._streams = sys.stdout, sys.stderr
        os.dup2(self._file.fileno(), 1)
        os.dup2(self._file.fileno(), 2)
        sys.stdout = sys.stderr = self._file

    def close(self) -> None:
        """Restores the output."""
        self._file.flush()
        for stream in self._streams:
            stream.flush()  # what a logging handler wrote to the old stream belongs to the job
        sys.stdout, sys.stderr = self._streams
        for number, descriptor in zip((1, 2), self._descriptors, strict=True):
            os.dup2(descriptor, number)
            os.close(descriptor)
        self._file.close()
