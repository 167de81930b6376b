"""Kills a process at one of its file operations: before or after each open, write, fsync, rename and removal."""

from __future__ import annotations

import builtins
import io
import os
import signal
from collections.abc import Callable
from typing import Any

_WRITES = (1, 4)  # which writes to a file are points: a checkpoint has a hundred


class Killer:
    """Counts the file operations of this process and kills it at one of them.

    Args:
        at: number of the point at which the process dies, from 1; 0 is never.
        after_updates: number of meta-updates before the count begins.
    """

    def __init__(self, at: int, after_updates: int) -> None:
        self.at, self.left, self.count = at, after_updates, 0

    def point(self) -> None:
        """Marks a point."""
        if self.left <= 0:
            self.count += 1
            if self.count == self.at:
                os.kill(os.getpid(), signal.SIGKILL)

    def install(self) -> None:
        """Replaces this process's file operations, until it ends."""
        from maml.training.iteration import Iteration  # here, because this module itself imports nothing slow

        for name in ("replace", "rename", "unlink", "mkdir"):
            setattr(os, name, self._around(getattr(os, name)))
        os.fsync = self._around(lambda _: None)  # a kill is no power failure, so nothing has to reach the disk
        builtins.open = io.open = self._open(io.open)
        update = Iteration.__call__

        def counted(iterate: Iteration, number: Any) -> Any:
            self.left -= 1
            return update(iterate, number)

        Iteration.__call__ = counted  # type: ignore[assignment, method-assign]

    def _around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def replacement(*arguments: Any, **options: Any) -> Any:
            self.point()
            result = call(*arguments, **options)
            self.point()
            return result

        return replacement

    def _open(self, original: Callable[..., Any]) -> Callable[..., Any]:
        point = self.point

        class HalfWritten(io.BufferedWriter):
            """A file whose first writes arrive in two halves, with a point between them."""

            writes = 0

            def write(self, content: Any) -> int:
                self.writes += 1
                if self.writes not in _WRITES or len(content) < 2:
                    return super().write(content)
                half = len(content) // 2
                super().write(content[:half])
                self.flush()
                point()
                return half + super().write(content[half:])

        def replacement(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
            if isinstance(file, int) or not set(mode) & set("wax"):
                return original(file, mode, *arguments, **options)
            point()
            binary = HalfWritten(io.FileIO(file, mode.replace("b", "").replace("t", "")))
            point()
            return binary if "b" in mode else io.TextIOWrapper(binary, encoding="utf-8", newline=options.get("newline"))

        return replacement
