"""Several processes on one run: the numbers of a single process, and a clear error when one of them dies."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

from maml.config.schema import Settings
from maml.errors import Disconnected, Interrupted, MamlError
from maml.experiment import run_experiment
from maml.hardware import distributed
from maml.record import checkpoint
from maml.record.run_files import read_json
from maml.types import Tasks
from tests.runs import ROOT, TinyRuns, checkpoint_tensors, file_contents

RL: tuple[str, ...] = (
    "domain.num_shots=3",
    "domain.horizon=8",
    "model.hidden_sizes=[10]",
    "evaluation.step_size=0.5",
    "evaluation.search=null",
    "evaluation.num_shots=null",
    "outer.damping=0.1",  # with less, conjugate gradients magnify rounding errors
)
SMALL = (
    "precision=float64",
    "num_iterations=4",
    "log_every=1",
    "meta_batch_size=5",
    "evaluation.num_tasks=5",
    "evaluation.num_steps=1",
)
KINDS = {
    "sinusoid": (),
    "learned_step_sizes": ("inner=learned_sgd",),
    "reptile": ("+experiment=sinusoid_reptile",),
    "rl": ("+experiment=point_navigation_maml", *RL),
    "rl_pooled": ("+experiment=point_navigation_pretrain", "outer=trpo", *RL, "domain.pooled=true"),
    # Goals are near the start, so that episodes end early.
    "rl_goal_per_episode": (
        "+experiment=point_navigation_oracle",
        *RL,
        "domain.horizon=30",
        "domain.goal_range=[-0.05,0.05]",
    ),
    "meta_lstm": ("inner=meta_lstm", "inner.num_steps=2", "inner.hidden_size=2", "model.hidden_sizes=[8]"),
}


def _run_as(config: Settings, rank: int, size: int, port: int, message_file: Path) -> None:
    """The main function of one process; its exit status is that of train.py."""
    torch.set_num_threads(1)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in names.items()} | {"MASTER_ADDR": "127.0.0.1"}
    sys.argv = [str(ROOT / "train.py")]
    try:
        run_experiment(config, "custom")
    except Interrupted as stop:
        sys.exit(128 + stop.signal_number)
    except MamlError as error:
        message_file.write_text(str(error))
        sys.exit(1)


class Processes:
    """Several processes that train one run together."""

    def __init__(self, config: Settings, size: int) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["maml.experiment", "maml.domain.sinusoid"])
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.processes: list[BaseProcess] = []
        self.messages = [Path(config.runs_dir).with_name(f"message_of_rank_{rank}") for rank in range(size)]
        for rank, message_file in enumerate(self.messages):
            process = context.Process(target=_run_as, args=(config, rank, size, port, message_file), daemon=True)
            process.start()
            self.processes.append(process)

    def join(self) -> list[int | None]:
        """Waits for all processes and returns their exit statuses."""
        for process in self.processes:
            process.join(90)
            assert not process.is_alive(), "still waits for a process that has ended"
        return [process.exitcode for process in self.processes]


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_alike(mine: Path, theirs: Path) -> None:
    """Asserts equality up to the rounding of float64."""
    for one, other in zip(metrics(mine), metrics(theirs), strict=True):
        assert one == pytest.approx(other, rel=1e-6, abs=1e-9)
    first, second = checkpoint_tensors(mine), checkpoint_tensors(theirs)
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-6, atol=1e-9, msg=name)
    reports = [read_json(folder / "report.json") for folder in (mine, theirs)]
    means = [[step["mean"] for curve in report["curves"] for step in curve["steps"]] for report in reports if report]
    assert means[0] == pytest.approx(means[1], rel=1e-6)


@pytest.mark.parametrize(("kind", "size"), [(kind, 2 + number % 2) for number, kind in enumerate(KINDS)])
def test_processes_give_the_numbers_of_one_alone(tiny: TinyRuns, kind: str, size: int) -> None:
    overrides = (*KINDS[kind], *SMALL)
    alone = tiny.run(*overrides)
    together = tiny.in_folder("together")
    assert Processes(together.config(*overrides), size).join() == [0] * size
    folder = together.folder(*overrides)
    assert folder.name == alone.name
    assert_alike(alone, folder)
    assert sorted(file_contents(folder)) == sorted(file_contents(alone)), "one process writes, once"
    record = read_json(folder / "run.json")
    assert record is not None
    assert record["segments"][0]["hardware"]["processes"] == size
    assert record["command"].startswith(f"torchrun --nproc-per-node={size} train.py")


def test_killed_process_stops_the_others_and_the_run_goes_on_with_another_number(
    tiny: TinyRuns,
) -> None:
    overrides = ("num_iterations=100000", "log_every=10", "checkpoint_every=10", "hardware.compile=false")
    folder = tiny.folder(*overrides)
    processes = Processes(tiny.config(*overrides), 3)
    _wait_for_checkpoint(folder)
    os.kill(processes.processes[2].pid or 0, signal.SIGKILL)
    assert processes.join() == [1, 1, -signal.SIGKILL]
    assert all("another process of this run has ended" in file.read_text() for file in processes.messages[:2])
    reached = checkpoint.load(folder / "checkpoint.pt")["iteration"]
    assert read_json(folder / "run.json") is not None

    processes = Processes(tiny.config(*overrides), 2)
    _wait_for_checkpoint(folder, reached + 20)
    os.kill(processes.processes[1].pid or 0, signal.SIGTERM)  # only one process gets the signal
    assert processes.join() == [128 + signal.SIGTERM] * 2
    record = read_json(folder / "run.json")
    assert record is not None
    assert record["status"] == "interrupted"
    assert [segment["first_iteration"] for segment in record["segments"]] == [0, reached]
    lines = [line["iteration"] for line in metrics(folder)]
    assert lines == list(range(10, 10 * len(lines) + 1, 10)), "as one that was never killed"


def _wait_for_checkpoint(folder: Path, iteration: int = 1) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        newest = checkpoint.newest(folder / "checkpoint.pt")
        if newest is not None and checkpoint.load(newest)["iteration"] >= iteration:
            return
        time.sleep(0.01)
    raise AssertionError("no checkpoint")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("meta_batch_size=2",), "meta_batch_size=2 cannot be shared by 3 processes"),
        (("+experiment=sinusoid_multitask_average",), "MultitaskAverage cannot be trained by several processes"),
        (("hardware.min_processes=4",), "3 processes, fewer than hardware.min_processes=4"),
    ],
)
def test_what_cannot_be_shared_is_refused_before_anything_is_written(
    tiny: TinyRuns, overrides: tuple[str, ...], message: str
) -> None:
    processes = Processes(tiny.config(*overrides), 3)
    assert processes.join() == [1, 1, 1]
    assert all(message in file.read_text() for file in processes.messages)
    assert not tiny.runs_dir.exists()


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_shares_follow_each_other_and_leave_nothing_out(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks: Tasks = {"x": torch.arange(5)}
    monkeypatch.setattr(distributed, "world_size", lambda: size)
    shares = []
    for rank in range(size):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        shares.append(distributed.shard(tasks)["x"])
    assert torch.equal(torch.cat(shares), tasks["x"])
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_torchrun_starts_it(tiny: TinyRuns) -> None:
    arguments = (*SMALL, f"runs_dir={tiny.runs_dir}", f"cache_dir={tiny.cache_dir}", "hardware=cpu")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "train.py", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("written to") == 1, "one process speaks"


WHOLE = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


def use_environment(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("variables", "problem"),
    [
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE='abc' is not a number at least 1"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE='0' is not a number at least 1"),
        ({"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE='0' is not a number at least 1"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK='x' is not a number at least 0"),
        (WHOLE | {"MASTER_PORT": "abc"}, "MASTER_PORT='abc' is not a number from 1 to 65535"),
        (WHOLE | {"RANK": "2"}, "RANK='2' is not a number from 0 to 1"),
        ({"WORLD_SIZE": "2"}, "RANK is not set"),
        (WHOLE | {"MASTER_ADDR": ""}, "MASTER_ADDR is not set"),
    ],
)
def test_wrong_variable_of_torchrun_is_refused_by_name(
    variables: dict[str, str], problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_environment(monkeypatch, variables)
    for ask in (distributed.launched_rank, partial(distributed.start, False)):
        with pytest.raises(MamlError, match=problem) as caught:
            ask()
        assert "unset WORLD_SIZE" in str(caught.value)


def test_rank_that_was_left_over_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    use_environment(monkeypatch, {"RANK": "1"})
    assert (distributed.launched_rank(), distributed.launched_processes()) == (0, 1)
    use_environment(monkeypatch, WHOLE)
    assert (distributed.launched_rank(), distributed.launched_processes()) == (1, 2)


def test_error_is_that_of_another_process_only_if_it_is_not_memory_or_a_capture(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(error: RuntimeError) -> None:
        with distributed._explain_lost_process():
            raise error

    with pytest.raises(Disconnected, match="another process of this run has ended"):
        fail(RuntimeError("Connection closed by peer"))
    with pytest.raises(torch.OutOfMemoryError):
        fail(torch.OutOfMemoryError("CUDA out of memory"))
    monkeypatch.setattr(distributed, "is_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="not permitted"):
        fail(RuntimeError("operation not permitted when stream is capturing"))
