"""Measuring the fastest chunk of tasks: done once, only if it pays off, and kept in checkpoints."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from maml.config.compose import compose
from maml.errors import Interrupted
from maml.hardware.base import Execution, Hardware
from maml.hardware.threads import use_threads
from maml.record import checkpoint
from maml.training import autotune
from maml.training.autotune import DIVIDED, SHARED, measure_seconds_per_task, tune_execution
from maml.training.iteration import Iteration
from maml.training.meta_gradient import MetaGradient
from maml.types import num_tasks
from tests.runs import TinyRuns, before_iteration
from tests.training.test_iteration import iteration

LONG = (
    "hardware.compile=false",
    "num_iterations=2000",
    "meta_batch_size=5",
    "hardware.task_chunk=auto",
    "model.num_filters=4",
)


def clock(monkeypatch: pytest.MonkeyPatch, seconds: dict[int, float], num_seeds: int = 1) -> list[int]:
    """Fakes the clock: each chunk size takes the given seconds. Returns a list that collects the sizes tried."""
    tried, now = list[int](), 0.0

    def compute(theta: Any, tasks: Any, chunk: int) -> None:
        nonlocal now
        assert num_tasks(tasks) == chunk * num_seeds
        if chunk not in tried:
            tried.append(chunk)
            now += 100.0  # the warm-up is slow and must not count
        if seconds[chunk] < 0:
            raise torch.OutOfMemoryError
        now += seconds[chunk]

    monkeypatch.setattr("maml.training.meta_gradient.MetaGradient.sums", lambda self, *given: compute(*given))
    monkeypatch.setattr(autotune.time, "perf_counter", lambda: now)
    return tried


@pytest.mark.parametrize(
    ("seconds", "best", "tried"),
    [
        ({1: 1.0, 2: 1.5, 4: 2.8, 8: 5.5, 16: 12.0, 20: 30.0}, 8, [1, 2, 4, 8, 16, 20]),
        ({1: 1.0, 2: 3.0, 4: 7.0}, 1, [1, 2, 4]),  # slower twice in a row: stops
        ({1: 1.0, 2: 1.8, 4: -1, 8: -1, 16: -1, 20: -1}, 2, [1, 2, 4, 8, 16, 20]),
    ],
)
def test_chunk_is_the_one_that_takes_least_per_task(
    seconds: dict[int, float], best: int, tried: list[int], monkeypatch: pytest.MonkeyPatch, cache_dir: Path
) -> None:
    iterate = iteration("omniglot_5way_1shot", 20, cache_dir, torch.device("cpu"))
    given = clock(monkeypatch, seconds)
    found = measure_seconds_per_task(iterate)
    assert min(found, key=found.__getitem__) == best
    assert given == tried
    assert found[best] == pytest.approx(seconds[best] / best)


def test_burst_of_other_load_does_not_decide(monkeypatch: pytest.MonkeyPatch, cache_dir: Path) -> None:
    iterate, calls, now = iteration("omniglot_5way_1shot", 4, cache_dir, torch.device("cpu")), list[int](), 0.0

    def compute(self: Any, theta: Any, tasks: Any, chunk: int) -> None:
        nonlocal now
        calls.append(chunk)
        load = 1.4 if chunk == 2 and calls.count(2) <= 4 else 1.0  # while this size is measured for the first time
        now += load * {1: 1.2, 2: 2.0, 4: 4.4}[chunk]

    monkeypatch.setattr("maml.training.meta_gradient.MetaGradient.sums", compute)
    monkeypatch.setattr(autotune.time, "perf_counter", lambda: now)
    assert measure_seconds_per_task(iterate) == pytest.approx({1: 1.2, 2: 1.0, 4: 1.1})


@pytest.mark.parametrize(
    ("shared", "divided", "chunk", "thread_chunks"),
    [
        ({1: 1.0, 2: 0.86, 4: 0.79}, {1: 0.9, 2: 0.85}, 2, False),  # 2 is nearly as fast as 4 and takes less memory
        ({1: 1.0, 2: 0.88, 4: 0.79}, {1: 0.9, 2: 0.85}, 4, False),
        ({1: 1.0, 2: 0.8, 4: 0.79}, {1: 0.71, 2: 0.7}, 1, True),
        ({1: 1.0, 2: 0.8, 4: 0.79}, None, 2, False),
    ],
)
def test_threads_divide_what_is_faster_to_divide(
    shared: dict[int, float],
    divided: dict[int, float] | None,
    chunk: int,
    thread_chunks: bool,
    monkeypatch: pytest.MonkeyPatch,
    cache_dir: Path,
    tmp_path: Path,
) -> None:
    iterate = iteration("omniglot_5way_1shot", 4, cache_dir, torch.device("cpu"))
    config, _ = compose(["+experiment=omniglot_5way_1shot", "hardware=cpu", f"cache_dir={tmp_path}"])
    num_threads = 1 if divided is None else 2

    def measure(iterate: Iteration, threads: int = 1) -> dict[int, float]:
        assert torch.get_num_threads() == 1, "those of each chunk"
        assert threads == (1 if threads == 1 else num_threads)
        return shared if threads == 1 else divided or pytest.fail("there is one thread only")

    monkeypatch.setattr(autotune, "measure_seconds_per_task", measure)
    execution = Execution(num_threads, 2, False, kernels=True)
    for _ in range(2):  # measured, and read from the cache
        tuned = tune_execution(iterate, execution, Hardware("cpu"), config)
        assert (tuned.task_chunk, tuned.thread_chunks) == (chunk, thread_chunks)
        use_threads(1, thread_chunks=False)
    (file,) = (tmp_path / "execution").iterdir()
    assert set(json.loads(file.read_text())["seconds_per_task"]) == {SHARED, DIVIDED}.difference(
        () if divided else (DIVIDED,)
    )


def test_divided_chunks_are_measured_on_the_whole_batch(monkeypatch: pytest.MonkeyPatch, cache_dir: Path) -> None:
    iterate, sizes, now = iteration("omniglot_5way_1shot", 5, cache_dir, torch.device("cpu")), list[int](), 0.0

    def compute(self: Any, theta: Any, tasks: Any, chunk: int) -> None:
        nonlocal now
        assert num_tasks(tasks) == 5, "two threads divide five tasks unevenly"
        sizes.append(chunk)
        now += {1: 3.0, 2: 2.5, 3: 4.0}[chunk]

    monkeypatch.setattr("maml.training.meta_gradient.MetaGradient.sums", compute)
    monkeypatch.setattr(autotune.time, "perf_counter", lambda: now)
    assert measure_seconds_per_task(iterate, 2) == pytest.approx({1: 0.6, 2: 0.5, 3: 0.8})
    assert max(sizes) == 3, "with more, a thread would have nothing to do"


def test_seeds_are_measured_together(monkeypatch: pytest.MonkeyPatch, cache_dir: Path) -> None:
    iterate = iteration("omniglot_5way_1shot", 2, cache_dir, torch.device("cpu"), seeds=(0, 1, 2))
    clock(monkeypatch, {1: 3.0, 2: 3.0}, num_seeds=3)
    assert measure_seconds_per_task(iterate) == {1: 1.0, 2: 0.5}


def test_measuring_changes_nothing_and_is_remembered(tiny_images: TinyRuns, monkeypatch: pytest.MonkeyPatch) -> None:
    cache_dir = tiny_images.runs_dir.with_name("cache")
    (cache_dir / "execution").mkdir(parents=True)
    for file in tiny_images.cache_dir.glob("*.safetensors"):
        (cache_dir / file.name).symlink_to(file)
    tiny = TinyRuns(tiny_images.runs_dir, cache_dir, tiny_images.base)
    calls = []
    real = measure_seconds_per_task

    def counting(iterate: Iteration) -> dict[int, float]:
        calls.append(1)
        return dict.fromkeys(real(iterate), 1.0) | {2: 0.5}

    monkeypatch.setattr(autotune, "measure_seconds_per_task", counting)
    for number, overrides in enumerate([LONG, (*LONG, "seed=1")]):
        with monkeypatch.context() as patch, pytest.raises(Interrupted):
            before_iteration(patch, 3, lambda _: os.kill(os.getpid(), signal.SIGTERM))
            tiny.run(*overrides)
        assert len(calls) == 1, "another seed needs no measuring"
        assert checkpoint.load(tiny.folder(*overrides) / "checkpoint.pt")["execution"]["task_chunk"] == 2, number
    (file,) = (cache_dir / "execution").iterdir()
    assert json.loads(file.read_text())["seconds_per_task"][SHARED]["2"] == 0.5
    file.write_text("{")
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        before_iteration(patch, 3, lambda _: os.kill(os.getpid(), signal.SIGTERM))
        tiny.run(*LONG, "seed=2")
    assert len(calls) == 2, "a damaged file is measured anew"


def test_measurement_with_other_code_does_not_count(
    tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    iterate = iteration("omniglot_5way_1shot", 2, cache_dir, torch.device("cpu"))
    config, _ = compose(["+experiment=omniglot_5way_1shot", "hardware=cpu", f"cache_dir={tmp_path}"])

    def chunk(fastest: int) -> int | None:
        measured = dict.fromkeys([1, 2], 0.2) | {fastest: 0.1}
        monkeypatch.setattr(autotune, "measure_seconds_per_task", lambda iterate: measured)
        return tune_execution(iterate, Execution(1, 2, False), Hardware("cpu"), config).task_chunk

    assert chunk(1) == 1
    assert chunk(2) == 1, "it was measured before"
    monkeypatch.setattr(autotune, "_CODE", ("hardware",))
    assert chunk(2) == 2
    monkeypatch.setattr(autotune, "code_hashes", lambda settings: {"own.Model": "changed"})
    assert chunk(1) == 1


@pytest.mark.parametrize("setting", ["num_iterations=10", "hardware.task_chunk=2"])
def test_nothing_is_measured_where_it_does_not_pay_or_is_not_asked_for(
    setting: str, tiny_images: TinyRuns, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(autotune, "measure_seconds_per_task", lambda iterate: pytest.fail("measured"))
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        before_iteration(patch, 3, lambda _: os.kill(os.getpid(), signal.SIGTERM))
        tiny_images.run(*LONG, setting)


@pytest.mark.parametrize("kernels", [False, True])
def test_measurement_decides_the_chunk_alone(
    kernels: bool, monkeypatch: pytest.MonkeyPatch, cache_dir: Path, tmp_path: Path
) -> None:
    iterate = iteration("omniglot_5way_1shot", 2, cache_dir, torch.device("cpu"))
    config, _ = compose(["+experiment=omniglot_5way_1shot", "hardware=cpu", f"cache_dir={tmp_path}"])
    monkeypatch.setattr(autotune, "measure_seconds_per_task", lambda iterate: {1: 0.1, 2: 0.2})
    tuned = tune_execution(iterate, Execution(1, 2, False, kernels=kernels), Hardware("cpu"), config)
    assert tuned == Execution(1, 1, False, kernels=kernels)


@pytest.mark.parametrize("failure", [None, RuntimeError, torch.OutOfMemoryError])
def test_what_will_run_as_a_graph_is_measured_as_a_graph(
    failure: type[RuntimeError] | None, monkeypatch: pytest.MonkeyPatch, cache_dir: Path
) -> None:
    iterate = iteration("omniglot_5way_1shot", 2, cache_dir, torch.device("cpu"))
    iterate.meta_gradient = MetaGradient(iterate.algorithms[0], Execution(1, None, False, cuda_graph=True))
    plain, replayed = [], []

    def capture(compute: Callable[[], object]) -> tuple[object, Callable[[], None]]:
        if failure is not None:
            raise failure
        return compute(), lambda: replayed.append(1)

    monkeypatch.setattr(autotune, "capture", capture)
    monkeypatch.setattr(MetaGradient, "sums", lambda self, *given: plain.append(1))
    seconds = measure_seconds_per_task(iterate)
    calls_per_size = {None: (2, 4), RuntimeError: (5, 0), torch.OutOfMemoryError: (1, 0)}[failure]
    assert (len(plain), len(replayed)) == tuple(2 * calls for calls in calls_per_size)
    assert set(seconds) == ({1} if failure is torch.OutOfMemoryError else {1, 2})


def test_measurement_in_which_nothing_fitted_is_not_remembered(
    monkeypatch: pytest.MonkeyPatch, cache_dir: Path, tmp_path: Path
) -> None:
    iterate = iteration("omniglot_5way_1shot", 2, cache_dir, torch.device("cpu"))
    config, _ = compose(["+experiment=omniglot_5way_1shot", "hardware=cpu", f"cache_dir={tmp_path}"])
    hardware, execution = Hardware("cpu", compile=False), Execution(1, 2, False)
    monkeypatch.setattr(autotune, "measure_seconds_per_task", lambda iterate: {1: 0.0})
    assert tune_execution(iterate, execution, hardware, config).task_chunk == 1
    monkeypatch.setattr(autotune, "measure_seconds_per_task", lambda iterate: {1: 2.0, 2: 1.0})
    assert tune_execution(iterate, execution, hardware, config).task_chunk == 2
    monkeypatch.setattr(autotune, "measure_seconds_per_task", lambda iterate: pytest.fail("measured again"))
    assert tune_execution(iterate, execution, hardware, config).task_chunk == 2
