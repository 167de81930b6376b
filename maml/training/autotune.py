"""How many tasks are best batched at once on this machine, and whether compiling pays: measured, and remembered."""

from __future__ import annotations

import json
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch

from maml.config.identity import digest, training_config
from maml.config.schema import Settings
from maml.errors import MamlError
from maml.hardware.base import Execution, Hardware
from maml.record.checkpoint import write_whole
from maml.record.run_folder import read_json, versions
from maml.training.iteration import Iteration
from maml.types import num_tasks

_MIN_ITERATIONS = 1000  # of a run that is worth the seconds which measuring takes
_REPETITIONS = 3
# Of a CPU, in which compiling (minutes, at each start) pays: images then take two thirds of the time. The program of
# several inner steps is too long to compile.
_MIN_SECONDS_TO_COMPILE = 3600
_ENOUGH_WORSE = 1.1  # times as slow as the best so far, twice in a row: larger chunks would be worse still
_IRRELEVANT = ("outer.", "seed", "num_iterations")  # keys of training on which speed does not depend


def tune_execution(iterate: Iteration, execution: Execution, hardware: Hardware, config: Settings) -> Execution:
    """Returns the execution with the fastest chunk of tasks, compiled if that pays; as it was, if measuring does not.

    Only a domain whose `Workload` says ``measure_chunk`` is measured; the others go by the rules of `Hardware`.

    Args:
        iterate: of the run; its state is left alone.
        execution: what rules have chosen.
        hardware: on which it runs.
        config: of the run.
    """
    can_pay = iterate.algorithms[0].domain.workload.measure_chunk
    is_worth_it = can_pay and config.num_iterations >= _MIN_ITERATIONS and not execution.compile
    if hardware.task_chunk != "auto" or not is_worth_it:
        return execution
    tasks = iterate.sample_tasks(1)
    settings = {key: value for key, value in training_config(config).items() if not key.startswith(_IRRELEVANT)}
    settings |= {f"hardware.{name}": value for name, value in hardware.describe().items()}
    settings |= {"execution": replace(execution, task_chunk=None).as_dict(), "versions": versions()}
    settings |= {"num_tasks": num_tasks(tasks), "num_seeds": len(iterate.algorithms)}
    path = Path(config.cache_dir) / "execution" / f"{digest(settings)}.json"
    seconds = _remembered(path)
    if seconds is None:
        seconds = measure_seconds_per_task(iterate)
        content = json.dumps({"seconds_per_task": seconds, "settings": settings}, indent=2) + "\n"
        with suppress(OSError, MamlError):  # a cache that cannot be written costs the next run some seconds, no more
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, lambda file: file.write(content.encode()))
        found = ", ".join(f"{size}: {1e3 * value:.3g} ms" for size, value in seconds.items())
        print(f"hardware.task_chunk=auto: measured by chunk, per task: {found}", file=sys.stderr)
    chunk = min(seconds, key=seconds.__getitem__)
    needed = seconds[chunk] * num_tasks(tasks) * config.num_iterations
    is_compilable = hardware.device.type == "cpu" and iterate.algorithms[0].inner.num_steps == 1
    pays = hardware.compile == "auto" and is_compilable and needed >= _MIN_SECONDS_TO_COMPILE
    return replace(execution, task_chunk=chunk, compile=pays)


def measure_seconds_per_task(iterate: Iteration) -> dict[int, float]:
    """Returns the seconds that a task's meta-gradient takes, by the number of tasks (of each seed) batched at once."""
    tasks, seeds = iterate.sample_tasks(1), len(iterate.algorithms)
    count = num_tasks(tasks) // seeds
    params, on_gpu = iterate.params(), tasks[next(iter(tasks))].is_cuda
    sizes = sorted({min(2**power, count) for power in range(count.bit_length() + 1)}, reverse=on_gpu)
    seconds: dict[int, float] = {}
    best, num_worse = float("inf"), 0
    for size in sizes:
        chunk = {name: value.unflatten(0, (seeds, -1))[:, :size].flatten(0, 1) for name, value in tasks.items()}
        times = []
        try:
            for _ in range(1 + _REPETITIONS):  # the first is a warm-up
                start = time.perf_counter()
                iterate.meta_gradient.sums(params, chunk, size)
                if on_gpu:
                    torch.cuda.synchronize()
                times.append(time.perf_counter() - start)
        except torch.OutOfMemoryError:
            continue
        seconds[size] = min(times[1:]) / (seeds * size)
        num_worse = num_worse + 1 if seconds[size] > _ENOUGH_WORSE * best else 0
        best = min(best, seconds[size])
        if num_worse == 2:
            break
    return seconds or {1: 0.0}  # memory that does not suffice for one task is an error of the first iteration


def _remembered(path: Path) -> dict[int, float] | None:
    try:
        return {int(size): float(value) for size, value in (read_json(path) or {})["seconds_per_task"].items()}
    except (AttributeError, KeyError, ValueError, MamlError):  # absent or damaged: measured anew
        return None
