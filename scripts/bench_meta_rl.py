"""Times meta-RL on one core: the sampler against Gymnasium's vector environments, and whole meta-iterations by phase.

    python scripts/bench_meta_rl.py --rounds 10

The sampler is what training uses, every environment of a meta-batch at once, with noise for a policy. Gymnasium's steps
our own single environments with the same noise, and keeps nothing of what it sees. They take turns, so that a ratio
compares neighbours in time; the reported ratio is the median over rounds. A meta-iteration is everything between two
updates of theta, at the sizes of section 5.3, in a process of its own whose peak memory is read at its end.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_meta_gradient import choose_clock, describe
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from torch import Tensor

from maml.algorithm.base import Algorithm
from maml.config import compose
from maml.domain import reinforcement
from maml.domain.reinforcement import Reinforcement
from maml.experiment import build_algorithm
from maml.hardware import Hardware
from maml.rl.rollouts import collect_episodes
from maml.seeding import Stream
from maml.types import Params, Product, Tasks

ROOT = Path(__file__).resolve().parents[1]
NUM_THREADS = 1
PHASES = ("sampling", "advantages and adaptation", "gradient", "curvature", "conjugate gradient", "line search", "rest")
TURN_SECONDS = 0.5


@dataclass(frozen=True)
class Shape:
    """The sizes of one meta-iteration (protocol 6.3).

    Attributes:
        experiment: whose policy, optimizers and environment.
        num_tasks: B.
        num_rollouts: per task and gradient step.
        horizon: H.
        times_sync: how many times as fast as SyncVectorEnv the sampler shall be.
        steps_per_second: how fast at least.
        max_seconds: of a meta-iteration.
    """

    experiment: str
    num_tasks: int
    num_rollouts: int
    horizon: int
    times_sync: float | None = None
    steps_per_second: float | None = None
    max_seconds: float | None = None

    def build(self) -> Algorithm:
        """Returns what training would build."""
        sizes = f"domain.num_shots={self.num_rollouts}", f"domain.horizon={self.horizon}"
        config, _ = compose([f"+experiment={self.experiment}", *sizes], ROOT / "conf")
        hardware = Hardware("cpu")
        algorithm = build_algorithm(config, hardware)
        algorithm.task_chunk = hardware.choose(algorithm.domain, num_iterations=1, earlier={}).task_chunk
        return algorithm

    def sizes(self) -> str:
        """Says tasks x rollouts x steps."""
        return f"{self.num_tasks} x {self.num_rollouts} x {self.horizon}"


SHAPES = {
    "point": Shape("point_navigation_maml", 20, 20, 100, steps_per_second=500_000, max_seconds=4.0),
    "cheetah": Shape("cheetah_velocity_maml", 40, 20, 200, times_sync=1.6, max_seconds=15.0),
    "ant": Shape("ant_velocity_maml", 40, 20, 200, times_sync=1.4),
}


@dataclass(frozen=True)
class Result:
    """What was measured on one shape.

    Attributes:
        speeds: env-steps per second by sampler, one number per round.
        seconds: of the meta-iterations.
        phases: seconds of each phase, mean over them.
        peak_mib: memory of the process that made them, and of the same process before the first.
    """

    name: str
    shape: Shape
    speeds: Mapping[str, Sequence[float]]
    seconds: Sequence[float]
    phases: Mapping[str, float]
    peak_mib: tuple[float, float]

    def times(self, other: str) -> tuple[float, float, float]:
        """Returns how many times as fast as another the sampler is: median, least and most over the rounds."""
        ratios = [ours / theirs for ours, theirs in zip(self.speeds["ours"], self.speeds[other], strict=True)]
        return statistics.median(ratios), min(ratios), max(ratios)


# Sampling.

Sampler = Callable[[], int]
"""Samples for a while, and returns how many steps environments took."""


def batched(domain: Reinforcement, shape: Shape) -> Sampler:
    """Returns the project's own: episodes with all that is learnt from, but for the policy's network."""
    tasks = domain.sample_tasks(shape.num_tasks, Stream(0))
    outputs = torch.zeros(domain.out_dim)  # mean 0 and standard deviation 1

    def policy(observations: Tensor) -> Tensor:
        return outputs.expand(*observations.shape[:-1], -1)

    def sample() -> int:
        stream = Stream(tasks["keys"])
        episodes = collect_episodes(
            domain.environments, policy, tasks["goals"], stream, shape.num_rollouts, shape.horizon, domain.discount
        )
        return int(episodes.lengths.sum())

    return sample


def vectorized(environments: VectorEnv, num_steps: int) -> Sampler:
    """Returns one of Gymnasium's."""
    environments.reset(seed=0)
    count, size = environments.num_envs, environments.single_action_space.shape
    assert size is not None
    actions = Stream(0).normal((num_steps, count, *size)).numpy()

    def sample() -> int:
        for action in actions:
            environments.step(action)
        return num_steps * count

    return sample


def steps_per_second(sampler: Sampler, turn_seconds: float) -> float:
    """Times one turn, by the wall clock: Gymnasium's asynchronous environments live in other processes."""
    steps, start, elapsed = 0, time.perf_counter(), 0.0
    while elapsed < turn_seconds:
        steps += sampler()
        elapsed = time.perf_counter() - start
    return steps / elapsed


def compare_samplers(shape: Shape, rounds: int, turn_seconds: float) -> dict[str, list[float]]:
    """Times the samplers in turns."""
    domain = shape.build().domain
    assert isinstance(domain, Reinforcement)
    goals = domain.draw_goals(shape.num_rollouts, Stream(0))
    makers = [partial(domain.make_single, goal) for goal in goals]
    # A step that ends an episode also begins the next: every call steps every environment.
    synchronous = SyncVectorEnv(makers, autoreset_mode=AutoresetMode.SAME_STEP)
    asynchronous = AsyncVectorEnv(makers, autoreset_mode=AutoresetMode.SAME_STEP)
    samplers = {
        "ours": batched(domain, shape),
        "SyncVectorEnv": vectorized(synchronous, shape.horizon),
        "AsyncVectorEnv": vectorized(asynchronous, shape.horizon),
    }
    speeds: dict[str, list[float]] = defaultdict(list)
    for turn in range(rounds + 1):
        for name, sampler in samplers.items():
            speed = steps_per_second(sampler, turn_seconds)
            if turn > 0:  # the first warms up
                speeds[name].append(speed)
    synchronous.close()
    asynchronous.close()
    return speeds


# Meta-iterations.


class Stopwatch:
    """Tells the time of phases that call each other: every moment belongs to the innermost.

    Attributes:
        seconds: by phase.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._clock, self._phase, self._since = clock, "rest", clock()

    def enter(self, phase: str) -> str:
        """Returns the phase that was before."""
        now, before = self._clock(), self._phase
        self.seconds[before] += now - self._since
        self._phase, self._since = phase, now
        return before

    def timed(self, phase: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """Returns the same function as a phase."""

        def run(*args: Any, **kwargs: Any) -> Any:
            before = self.enter(phase)
            try:
                return call(*args, **kwargs)
            finally:
                self.enter(before)

        return run


def watch(algorithm: Algorithm, stopwatch: Stopwatch) -> None:
    """Has the phases of this process's meta-iterations timed."""
    curvature: Callable[..., Product] = stopwatch.timed("curvature", algorithm.curvature)

    def timed_curvature(theta: Params, tasks: Tasks, every: int = 1) -> Product:
        return stopwatch.timed("conjugate gradient", curvature(theta, tasks, every))

    for name, replacement in {
        "collect": stopwatch.timed("advantages and adaptation", algorithm.collect),
        "gradient": stopwatch.timed("gradient", algorithm.gradient),
        "curvature": timed_curvature,
        "evaluate": stopwatch.timed("line search", algorithm.evaluate),
    }.items():
        setattr(algorithm, name, replacement)
    reinforcement.collect_episodes = stopwatch.timed("sampling", reinforcement.collect_episodes)


def meta_iterations(shape: Shape, count: int) -> tuple[list[float], dict[str, float], tuple[float, float]]:
    """Trains for some iterations behind a first one; returns seconds, phases and memory. To be run in a fresh process.

    The memory is the high-water mark of the resident set. That of `resource.getrusage` would not do: it begins with the
    resident set of the process that started this one.
    """
    torch.set_num_threads(NUM_THREADS)
    clock, _ = choose_clock(torch.device("cpu"), NUM_THREADS)
    algorithm = shape.build()
    before = _resident_mib("VmRSS")
    stopwatch = Stopwatch(clock)
    watch(algorithm, stopwatch)
    seconds = []
    for iteration in range(count + 1):
        stopwatch.enter("rest")
        if iteration == 1:
            stopwatch.seconds.clear()  # the first warms up
        start = clock()
        algorithm.step(algorithm.sample_tasks(shape.num_tasks, Stream(0).child(iteration)))
        seconds.append(clock() - start)
    stopwatch.enter("rest")
    phases = {phase: stopwatch.seconds[phase] / count for phase in PHASES}
    return seconds[1:], phases, (_resident_mib("VmHWM"), before)


def _resident_mib(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 2**10 for line in lines if line.startswith(f"{field}:"))


def measure(name: str, shape: Shape, rounds: int, turn_seconds: float, iterations: int) -> Result:
    """Measures one shape."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
        seconds, phases, memory = fresh.submit(meta_iterations, shape, iterations).result()
    return Result(name, shape, compare_samplers(shape, rounds, turn_seconds), seconds, phases, memory)


# Writing.


def write_csv(path: Path, results: Sequence[Result], conditions: Mapping[str, str]) -> None:
    """Writes one line per measured number."""
    rows = []
    for result in results:
        numbers = {f"{sampler}, steps per second": values for sampler, values in result.speeds.items()}
        numbers |= {"meta-iteration, seconds": result.seconds}
        numbers |= {f"{phase}, seconds": [value] for phase, value in result.phases.items()}
        numbers |= {"peak memory, MiB": [result.peak_mib[0]], "memory before, MiB": [result.peak_mib[1]]}
        for what, values in numbers.items():
            spread = {"median": statistics.median(values), "min": min(values), "max": max(values)}
            row: dict[str, Any] = {"shape": result.name, "sizes": result.shape.sizes(), "what": what}
            rows.append(row | spread | {"count": len(values)} | dict(conditions))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def write_markdown(path: Path, results: Sequence[Result], conditions: Mapping[str, str], with_bars: bool) -> None:
    """Writes a table of samplers and one of meta-iterations, our bars beside them if they apply."""

    def verdict(is_met: bool, bar: str) -> str:
        return f"{'met' if is_met else 'missed'} ({bar})" if with_bars else ""

    lines = ["# Time and memory of meta-RL on one core", ""]
    lines += [f"- {key}: {value}" for key, value in conditions.items()]
    lines += [
        "",
        "## Sampling",
        "",
        "Env-steps per second (wall clock), all on one core. Ours samples a whole meta-batch, `sizes` being tasks x",
        "rollouts x steps; Gymnasium's vector environments hold as many environments as a task has rollouts, and more",
        "would not make them faster. A ratio is the median over rounds of those of one round, least and most in",
        "brackets.",
        "",
        "| environment | sizes | ours | SyncVectorEnv | AsyncVectorEnv | ours / Sync | ours / Async | bar |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for result in results:
        speeds = {sampler: statistics.median(values) for sampler, values in result.speeds.items()}
        ratios = [result.times(other) for other in ("SyncVectorEnv", "AsyncVectorEnv")]
        shape, bars = result.shape, []
        if shape.times_sync is not None:
            bars.append(verdict(ratios[0][0] >= shape.times_sync, f">= {shape.times_sync:g} x Sync"))
        if shape.steps_per_second is not None:
            bars.append(verdict(speeds["ours"] >= shape.steps_per_second, f">= {shape.steps_per_second:,g} steps/s"))
        cells = [result.name, shape.sizes(), *(f"{speed:,.0f}" for speed in speeds.values())]
        cells += [f"{middle:.2f} ({low:.2f} to {high:.2f})" for middle, low, high in ratios]
        lines.append("| " + " | ".join([*cells, ", ".join(bars)]) + " |")
    lines += [
        "",
        "## Meta-iterations",
        "",
        "Seconds of CPU time, median over iterations, least and most in brackets; of the phases the mean. `gradient`",
        "is the meta-gradient, `curvature` what is prepared once for its products with the vectors of",
        "`conjugate gradient`. Peak memory is that of the whole process, and what it adds to libraries and theta.",
        "",
        "| environment | sizes | seconds | bar | " + " | ".join(PHASES) + " | peak MiB | added MiB |",
        "| --- | --- | ---: | --- |" + " ---: |" * (len(PHASES) + 2),
    ]
    for result in results:
        middle, bar = statistics.median(result.seconds), result.shape.max_seconds
        cells = [result.name, result.shape.sizes()]
        cells += [f"{middle:.3g} ({min(result.seconds):.3g} to {max(result.seconds):.3g})"]
        cells += [verdict(middle <= bar, f"<= {bar:g} s") if bar is not None else ""]
        cells += [f"{result.phases[phase]:.3f}" for phase in PHASES]
        cells += [f"{result.peak_mib[0]:.0f}", f"{result.peak_mib[0] - result.peak_mib[1]:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    path.write_text("\n".join(lines) + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and writes; the files are rewritten after each shape, so that a run cut short leaves what it has."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=10, help="turns of each sampler (default %(default)s)")
    parser.add_argument("--iterations", type=int, default=5, help="meta-iterations (default %(default)s)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, for tests; the numbers mean nothing")
    folder = ROOT / "results" / "benchmarks" / "meta_rl"
    parser.add_argument("--out", type=Path, default=folder, help="folder (default results/benchmarks/meta_rl)")
    options = parser.parse_args(arguments)
    if hasattr(os, "sched_setaffinity"):  # Linux: also for processes that this one starts
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(NUM_THREADS)
    conditions = describe(torch.device("cpu"), NUM_THREADS)
    conditions["clock"] = "of samplers the wall's; of meta-iterations the CPU's, which other load disturbs less"
    options.out.mkdir(parents=True, exist_ok=True)
    results: list[Result] = []
    for name in options.shapes:
        if options.quick:
            tiny = replace(SHAPES[name], num_tasks=2, num_rollouts=2, horizon=10)
            results.append(measure(name, tiny, rounds=2, turn_seconds=0.01, iterations=2))
        else:
            results.append(measure(name, SHAPES[name], options.rounds, TURN_SECONDS, options.iterations))
        write_csv(options.out / "meta_rl.csv", results, conditions)
        write_markdown(options.out / "meta_rl.md", results, conditions, with_bars=not options.quick)
    print((options.out / "meta_rl.md").read_text())


if __name__ == "__main__":
    main()
