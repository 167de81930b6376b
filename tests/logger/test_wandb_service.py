"""The end of a process whose wandb-core is frozen: within a time limit, with one warning and the right exit status."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from maml.logger.wandb_service import Service
from tests.runs import ROOT

# Freezes wandb-core at a moment of the first run and lets something happen; then runs train.py with short limits.
CHILD = """
import os, signal, sys, time
from pathlib import Path
from maml.cli.train import main
from maml.logger.wandb import SERVICE, WandB
from maml.training.iteration import Iteration

moment, event, file = sys.argv[1:4]
del sys.argv[1:4]
WandB.patience, WandB.init_timeout, SERVICE.limit, SERVICE.limit_if_troubled = 8.0, 3.0, 2.0, 1.0
owner, name = (SERVICE, "watch") if moment == "start" else (WandB, {"exit": "_finish"}.get(moment, moment))
method = getattr(owner, name)

def freeze():
    if not Path(file).exists():
        os.kill(SERVICE._process.pid, signal.SIGSTOP)
        Path(file).touch()

def freezing(*arguments):
    if moment not in ("start", "exit"):
        freeze()
    method(*arguments)
    if moment in ("start", "exit"):
        freeze()

setattr(owner, name, freezing)
start = WandB.start

def start_and_wait(self, *arguments):
    start(self, *arguments)
    while moment != "start" and not Path(file).exists() and not hasattr(self, "_run"):
        time.sleep(0.1)

WandB.start = start_and_wait
iterate = Iteration.__call__

def with_event(self, number):
    if number == 200 and event in ("SIGINT", "SIGTERM"):
        os.kill(os.getpid(), getattr(signal, event))
    if number == 200 and event == "error":
        raise RuntimeError("a bug")
    return iterate(self, number)

Iteration.__call__ = with_event
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores SIGINT from its start
main()
"""
FAST = [
    ("exit", "none", 0),
    ("_log", "SIGTERM", 143),
    ("start", "none", 0),
]
SLOW = [
    ("_log", "SIGINT", 130),
    ("exit", "error", 1),
    ("_log", "none", 0),
    ("_finish", "none", 0),
    ("_log", "error", 1),
    ("_log", "sweep", 0),
    ("exit", "sweep", 0),
    ("start", "sweep", 0),
]


def start(folder: Path, moment: str, event: str) -> subprocess.Popen[str]:
    environment = os.environ | {"WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false"}
    environment |= {f"WANDB_{name}_DIR": str(folder / name) for name in ("CONFIG", "CACHE", "DATA")}
    words = ["hardware=cpu", "hardware.num_threads=1", "num_iterations=300", "evaluation.num_tasks=2"]
    words += [
        "evaluation.num_shots=[5]",
        "evaluation.num_steps=1",
        "logger=wandb",
        f"runs_dir={folder}/{moment}{event}",
    ]
    words = ["-m", "seed=0,1,2", *words] if event == "sweep" else words
    command = [sys.executable, "-c", CHILD, moment, event, str(folder / f"{moment} {event}"), *words]
    output = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, text=True)


@pytest.mark.parametrize("cases", [FAST, pytest.param(SLOW, marks=pytest.mark.slow)], ids=["fast", "slow"])
def test_frozen_service_ends_with_the_process_in_time(cases: list[tuple[str, str, int]], tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    processes = [start(tmp_path, moment, event) for moment, event, _ in cases]  # at once, since each mostly waits
    try:
        for process, (moment, event, status) in zip(processes, cases, strict=True):
            # The end of the output, too: a wandb-core that is left behind would hold it open.
            output, _ = process.communicate(timeout=200)
            where = f"{moment}, {event}:\n{output}"
            assert (tmp_path / f"{moment} {event}").exists(), where
            assert process.returncode == status, where
            assert output.count("W&B") == 1, where
            assert "Exception ignored" not in output and "Exception in thread" not in output, where
            assert output.count("Traceback") == (event == "error"), where
            assert "wandb-core" not in output and "site-packages/wandb" not in output, where
    finally:
        for process in processes:
            process.kill()
            process.communicate()


class Frozen:
    """Stands for a teardown that never ends, until the process is killed."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process

    def teardown(self) -> None:
        self.process.wait()


def watching(monkeypatch: pytest.MonkeyPatch, process: subprocess.Popen[bytes]) -> Service:
    service = Service()
    monkeypatch.setitem(sys.modules, "wandb", Frozen(process))
    service.watch()
    service._process = process
    return service


def test_process_that_ends_in_time_is_not_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    process = subprocess.Popen(["sleep", "0.2"])
    assert watching(monkeypatch, process).end(30)
    assert process.returncode == 0


def test_stopped_process_is_killed_after_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    process = subprocess.Popen(["sleep", "60"])
    process.send_signal(signal.SIGSTOP)
    service, start = watching(monkeypatch, process), time.monotonic()
    assert not service.end(0.2)
    assert time.monotonic() - start < 5
    assert process.wait(5) == -signal.SIGKILL
    assert service.end(30), "there is nothing left to end"


def test_service_of_another_process_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    process = subprocess.Popen(["sleep", "60"])
    service = watching(monkeypatch, process)
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: -1)  # as in a forked process
        assert service.end(0)
    assert process.poll() is None
    process.kill()
    service.end(1)


def test_warning_at_exit_comes_only_if_there_was_none(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Service, "limit", 0.1)
    monkeypatch.setattr(Service, "limit_if_troubled", 0.1)
    for is_troubled in (True, False):
        service = watching(monkeypatch, subprocess.Popen(["sleep", "60"]))
        service.is_troubled = is_troubled
        service._end_at_exit()
        assert len(caplog.messages) == (not is_troubled)
    assert "scripts/runs.py mirror RUN" in caplog.messages[0]
