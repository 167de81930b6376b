"""Measures which chunks of tasks and threads are fastest here; results are cached."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from maml.config.identity import training_config
from maml.config.schema import Settings
from maml.config.source import code_hashes
from maml.digest import digest
from maml.errors import MamlError
from maml.hardware.base import Execution, Hardware
from maml.hardware.memory import is_out_of_memory, release_failed_memory
from maml.hardware.threads import use_threads
from maml.record.atomic import write_json_atomically
from maml.record.provenance import versions
from maml.record.run_files import read_json
from maml.status import announce
from maml.training.cuda_graph import capture, cause_of
from maml.training.iteration import Iteration
from maml.types import num_tasks

_MIN_ITERATIONS = 1000  # a shorter run would not win back the seconds that measuring takes
_REPETITIONS = 3
# On a CPU, a burst of other load can slow the measurement of a single size. Sizes that took up to this many times the
# best are therefore measured again, in turns: for some seconds, but at least `_REPETITIONS` times.
_CONTENDERS = 2.5
_SECONDS_IN_TURNS, _MOST_TURNS = 5.0, 20
# The smallest size that takes up to this many times the best is chosen, because memory grows with the size.
_AS_GOOD, _AS_GOOD_ON_CPU = 1.05, 1.1
# Measuring stops after two sizes in a row that are this many times slower than the best, on a GPU and on a CPU.
_SLOWER_THAN_BEST, _SLOWER_THAN_BEST_ON_CPU = 1.1, 1.4
# How threads divide the work, as `Execution.thread_chunks` says.
SHARED, DIVIDED = "threads share each operation", "each thread has its own"
_UNRELATED_KEYS = ("outer.", "seed", "num_iterations")  # training settings that do not change the speed
# Folders of the package whose code decides how fast a task is. What was measured with other code does not count.
_CODE = ("algorithm", "domain", "hardware", "inner", "model", "training")


def tune_execution(iterate: Iteration, execution: Execution, hardware: Hardware, settings: Settings) -> Execution:
    """Sets the fastest chunk of tasks and how CPU threads divide the work, by measurement.

    Measures only if the domain's `Workload` says ``measure_chunk``, the setting is ``auto``, and the run is long
    enough. Otherwise the choice of `Hardware` stays.

    Args:
        iterate: the run's iteration; its state is not changed.
        execution: the choice of `Hardware`.
        hardware: the run's hardware.
        settings: the run's settings.

    Returns:
        The execution to train with.
    """
    may_pay_off = iterate.algorithms[0].domain.workload.measure_chunk
    is_worth_it = may_pay_off and settings.num_iterations >= _MIN_ITERATIONS and not execution.compile
    if hardware.task_chunk != "auto" or not is_worth_it:
        return execution
    tasks = iterate.sample_tasks(1)
    if num_tasks(tasks) > 1 and not iterate.algorithms[0].sums_over_tasks:
        return execution  # tasks that are computed one after the other have no chunks
    measured_for = {
        key: value for key, value in training_config(settings).items() if not key.startswith(_UNRELATED_KEYS)
    }
    measured_for |= {f"hardware.{name}": value for name, value in hardware.describe().items()}
    measured_for |= {"execution": replace(execution, task_chunk=None).as_dict(), "versions": versions()}
    measured_for |= {"num_tasks": num_tasks(tasks), "num_seeds": len(iterate.algorithms)}
    measured_for |= {"code": _code_hash(), "own_code": code_hashes(settings)}
    path = Path(settings.cache_dir) / "execution" / f"{digest(measured_for)}.json"
    measured = _read_cache(path)
    if measured is None:
        announce("hardware.task_chunk=auto: measuring how many tasks to compute at once, for this machine once")
        measured = {SHARED: measure_seconds_per_task(iterate)}
        if hardware.device.type == "cpu" and execution.num_threads > 1:
            use_threads(execution.num_threads, thread_chunks=True)
            measured[DIVIDED] = measure_seconds_per_task(iterate, execution.num_threads)
            use_threads(execution.num_threads, execution.thread_chunks)
        if _is_measured(measured):
            with suppress(OSError, MamlError):  # without a cache file, the next run only measures again
                path.parent.mkdir(parents=True, exist_ok=True)
                write_json_atomically(path, {"seconds_per_task": measured, "settings": measured_for})
        for way, seconds in measured.items():
            table = ", ".join(f"{size}: {1e3 * value:.3g} ms" for size, value in seconds.items())
            threads = f", {way}" * (len(measured) > 1)
            announce(f"hardware.task_chunk=auto: measured time per task, by chunk size{threads}: {table}")
    way = min(measured, key=lambda way: min(measured[way].values()))
    seconds = measured[way]
    best = min(seconds.values())
    as_good = _AS_GOOD_ON_CPU if hardware.device.type == "cpu" else _AS_GOOD
    chunk = min(size for size, value in seconds.items() if value <= as_good * best)
    return replace(execution, task_chunk=chunk, thread_chunks=way == DIVIDED)


def _code_hash() -> str:
    package = Path(__file__).parents[1]
    files = [path for folder in _CODE for kind in ("py", "cpp") for path in (package / folder).glob(f"*.{kind}")]
    return digest({str(path.relative_to(package)): path.read_text(encoding="utf-8") for path in files})


def measure_seconds_per_task(iterate: Iteration, num_threads: int = 1) -> dict[int, float]:
    """Returns the seconds that the meta-gradient of one task takes, by chunk size (number of tasks of each seed).

    If the run will replay a CUDA graph, so does the measurement: otherwise it would measure how fast the CPU launches.

    Args:
        iterate: the run's iteration; its state is not changed.
        num_threads: number of threads that compute chunks at once (`maml.hardware.threads`). If there are several, the
            whole meta-batch is measured, because they may not divide it evenly.
    """
    tasks, num_seeds = iterate.sample_tasks(1), len(iterate.algorithms)
    count = num_tasks(tasks) // num_seeds
    params, on_gpu = iterate.params(), tasks[next(iter(tasks))].is_cuda
    largest = -(-count // num_threads)
    sizes = sorted({min(2**power, largest) for power in range(count.bit_length() + 1)}, reverse=on_gpu)
    can_capture = iterate.execution.cuda_graph and iterate.algorithms[0].sums_over_tasks
    seconds: dict[int, float] = {}
    in_turns = not (on_gpu or can_capture)
    too_slow = _SLOWER_THAN_BEST_ON_CPU if in_turns else _SLOWER_THAN_BEST
    best, num_worse = float("inf"), 0

    def measured_tasks(size: int) -> int:
        return count if num_threads > 1 else size

    def computation(size: int) -> Callable[[], object]:
        used = measured_tasks(size)
        chunk = {name: value.unflatten(0, (num_seeds, -1))[:, :used].flatten(0, 1) for name, value in tasks.items()}
        return partial(iterate.meta_gradient.sums, params, chunk, size)

    for size in sizes:
        try:
            times = _times(computation(size), on_gpu, can_capture)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            times = []
        if not times:
            release_failed_memory()
            continue
        seconds[size] = min(times[1:]) / (num_seeds * measured_tasks(size))
        num_worse = num_worse + 1 if seconds[size] > too_slow * best else 0
        best = min(best, seconds[size])
        if num_worse == 2:
            break
    end = time.perf_counter() + _SECONDS_IN_TURNS
    for turn in range(_MOST_TURNS if in_turns else 0):
        best = min(seconds.values())
        contenders = [size for size, value in seconds.items() if value <= _CONTENDERS * best]
        if len(contenders) == 1 or (turn >= _REPETITIONS and time.perf_counter() > end):
            break
        for size in contenders:
            (once,) = _time(computation(size), 1)
            seconds[size] = min(seconds[size], once / (num_seeds * measured_tasks(size)))
    return seconds or {1: 0.0}  # not even one task fits into memory: the first iteration will report that


def _times(compute: Callable[[], object], on_gpu: bool, captured: bool) -> list[float]:
    """Returns the seconds of a few calls; the first is a warm-up.

    Raises:
        torch.OutOfMemoryError: if memory does not suffice.
    """
    if captured:
        compute()  # libraries choose algorithms in their first calls, which cannot be captured
        ran_out, reason = False, ""
        try:
            _, compute = capture(compute)
        except RuntimeError as error:  # if memory is not the reason, the computation is timed without a graph
            reason, ran_out = cause_of(error)
        if ran_out:  # a new error, because the first one keeps the failed computation's tensors alive
            raise torch.OutOfMemoryError(reason)
    return _time(compute, 1 + _REPETITIONS, on_gpu)


def _time(compute: Callable[[], object], count: int, on_gpu: bool = False) -> list[float]:
    """Returns the seconds of each of ``count`` calls."""
    times = []
    for _ in range(count):
        start = time.perf_counter()
        compute()
        if on_gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return times


def _read_cache(path: Path) -> dict[str, dict[int, float]] | None:
    try:
        measured = (read_json(path) or {})["seconds_per_task"]
        known = {way: {int(size): float(value) for size, value in measured[way].items()} for way in measured}
        return known if _is_measured(known) else None
    except (AttributeError, KeyError, ValueError, MamlError):  # missing or damaged: measure again
        return None


def _is_measured(measured: Mapping[str, Mapping[int, float]]) -> bool:
    """Returns whether every measurement has times: with another process in the memory, no chunk may have fitted."""
    return all(min(seconds.values()) > 0 for seconds in measured.values())
