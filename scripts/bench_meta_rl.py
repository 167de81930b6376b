"""Times meta-RL on one core: our sampler and Gymnasium's vector environments, and the phases of a meta-iteration.

    python scripts/bench_meta_rl.py --rounds 10

Our sampler is the one of training: it steps all environments of a meta-batch at once, with noise instead of a policy.
Gymnasium's vector environments step our single environments with the same noise, and store nothing. The samplers take
turns, so that a ratio compares measurements that are close in time. The reported ratio is the median over rounds. A
meta-iteration is one update of theta at the sizes of section 5.3. It runs in its own process, whose peak memory is
read at the end.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from benchmark import (
    REPLACES,
    Spread,
    argument_parser,
    choose_clock,
    describe_conditions,
    markdown_table,
    output_path,
    resident_mib,
    times_as_fast,
    verdict,
    write_results,
)
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from torch import Tensor

from maml.config.compose import compose
from maml.domain import reinforcement
from maml.domain.reinforcement import Reinforcement
from maml.environment.rollouts import collect_episodes
from maml.experiment import build_algorithm
from maml.hardware.base import Hardware
from maml.seeding import Stream
from maml.training.iteration import meta_update
from maml.training.meta_gradient import MetaGradient
from maml.types import MatrixVectorProduct, Params, Tasks

NUM_THREADS = 1
PHASES = ("sampling", "advantages and adaptation", "gradient", "curvature", "conjugate gradient", "line search", "rest")
TURN_SECONDS = 0.5


@dataclass(frozen=True)
class Shape:
    """The sizes of one meta-iteration (docs/protocol.md#rl-training).

    Attributes:
        experiment: name of the experiment with the policy, optimizers and environment.
        overrides: what differs from the experiment.
        num_tasks: number of tasks, B.
        num_rollouts: number of rollouts per task and gradient step.
        horizon: number of steps of a rollout, H.
        times_sync: required ratio of the sampler's speed to that of SyncVectorEnv; None is no requirement.
        steps_per_second: required speed of the sampler, in environment steps per second; None is no requirement.
        max_seconds: longest allowed time of a meta-iteration, in seconds; None is no requirement.
    """

    experiment: str
    num_tasks: int
    num_rollouts: int
    horizon: int
    times_sync: float | None = None
    steps_per_second: float | None = None
    max_seconds: float | None = None
    overrides: tuple[str, ...] = ()

    @property
    def has_sampler(self) -> bool:
        """Whether the sampler has requirements; otherwise it is that of another shape, and is not measured again."""
        return self.times_sync is not None or self.steps_per_second is not None

    def build(self) -> MetaGradient:
        """Builds what training would build."""
        sizes = f"domain.num_shots={self.num_rollouts}", f"domain.horizon={self.horizon}"
        settings, _ = compose([f"+experiment={self.experiment}", *sizes, *self.overrides])
        hardware = Hardware("cpu", num_threads=NUM_THREADS)
        algorithm = build_algorithm(settings, hardware)
        execution = hardware.choose(algorithm.domain.workload, num_iterations=1, earlier={})
        hardware.apply(execution)  # switches of the process, such as oneDNN
        return MetaGradient(algorithm, execution)

    def sizes(self) -> str:
        """Returns the sizes as text: tasks x rollouts x steps."""
        return f"{self.num_tasks} x {self.num_rollouts} x {self.horizon}"


SHAPES = {
    "point": Shape("point_navigation_maml", 20, 20, 100, steps_per_second=500_000, max_seconds=2.8),
    "point_exact": Shape("point_navigation_maml", 20, 20, 100, max_seconds=2.8, overrides=("outer=trpo",)),
    "cheetah": Shape("cheetah_velocity_maml", 40, 20, 200, times_sync=1.6, max_seconds=12.0),
    "ant": Shape("ant_velocity_maml", 40, 20, 200, times_sync=1.4),
}


@dataclass(frozen=True)
class Result:
    """The measurements of one shape.

    Attributes:
        name: name of the shape.
        shape: the sizes.
        speeds: environment steps per second by sampler, one number per round; empty if not measured.
        seconds: seconds of each meta-iteration.
        phases: seconds of each phase, mean over the meta-iterations.
        peak_mib: peak memory of the process of the meta-iterations, and its memory before the first one, in MiB.
    """

    name: str
    shape: Shape
    speeds: Mapping[str, Sequence[float]]
    seconds: Sequence[float]
    phases: Mapping[str, float]
    peak_mib: tuple[float, float]


# Sampling.

Sampler = Callable[[], int]
"""Samples for a while, and returns the number of environment steps."""


def our_sampler(domain: Reinforcement, shape: Shape) -> Sampler:
    """Returns our sampler; it records episodes as in training, but has no policy network."""
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


def gymnasium_sampler(environments: VectorEnv, num_steps: int) -> Sampler:
    """Returns a sampler that steps Gymnasium's vector environments."""
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
    """Times one turn by the wall clock, because Gymnasium's asynchronous environments run in other processes."""
    steps, start, elapsed = 0, time.perf_counter(), 0.0
    while elapsed < turn_seconds:
        steps += sampler()
        elapsed = time.perf_counter() - start
    return steps / elapsed


def compare_samplers(shape: Shape, rounds: int, turn_seconds: float) -> dict[str, list[float]]:
    """Times the samplers in turns."""
    domain = shape.build().algorithm.domain
    assert isinstance(domain, Reinforcement)
    goals = domain.draw_goals(shape.num_rollouts, Stream(0))
    makers = [partial(domain.make_single, goal) for goal in goals]
    # With SAME_STEP, a step that ends an episode also begins the next one, so every call steps every environment.
    synchronous = SyncVectorEnv(makers, autoreset_mode=AutoresetMode.SAME_STEP)
    asynchronous = AsyncVectorEnv(makers, autoreset_mode=AutoresetMode.SAME_STEP)
    samplers = {
        "ours": our_sampler(domain, shape),
        "SyncVectorEnv": gymnasium_sampler(synchronous, shape.horizon),
        "AsyncVectorEnv": gymnasium_sampler(asynchronous, shape.horizon),
    }
    speeds: dict[str, list[float]] = defaultdict(list)
    for turn in range(rounds + 1):
        for name, sampler in samplers.items():
            speed = steps_per_second(sampler, turn_seconds)
            if turn > 0:  # the first turn is a warm-up
                speeds[name].append(speed)
        if turn > 0:
            measured = ", ".join(f"{name} {values[-1]:,.0f} steps/s" for name, values in speeds.items())
            print(f"{shape.experiment}, round {turn} of {rounds}: {measured}", flush=True)
    synchronous.close()
    asynchronous.close()
    return speeds


# Meta-iterations.


class Stopwatch:
    """Times phases that call each other; time in a nested phase counts for the innermost phase only.

    Attributes:
        seconds: seconds by phase.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._clock, self._phase, self._since = clock, "rest", clock()

    def enter(self, phase: str) -> str:
        """Switches to a phase and returns the previous one."""
        now, previous = self._clock(), self._phase
        self.seconds[previous] += now - self._since
        self._phase, self._since = phase, now
        return previous

    def time_phase(self, phase: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """Wraps a function so that its time counts for a phase."""

        def run(*args: Any, **kwargs: Any) -> Any:
            previous = self.enter(phase)
            try:
                return call(*args, **kwargs)
            finally:
                self.enter(previous)

        return run


def time_phases(meta_gradient: MetaGradient, stopwatch: Stopwatch) -> None:
    """Replaces functions of this process by timed ones, so that the stopwatch sees every phase."""
    curvature: Callable[..., MatrixVectorProduct] = stopwatch.time_phase("curvature", meta_gradient.curvature)

    def timed_curvature(params: Params, tasks: Tasks, every: int = 1) -> MatrixVectorProduct:
        return stopwatch.time_phase("conjugate gradient", curvature(params, tasks, every))

    algorithm: Any = meta_gradient.algorithm
    algorithm.collect = stopwatch.time_phase("advantages and adaptation", algorithm.collect)
    for name, replacement in {
        "gradient": stopwatch.time_phase("gradient", meta_gradient.gradient),
        "curvature": timed_curvature,
        "kl_gradient": stopwatch.time_phase("conjugate gradient", meta_gradient.kl_gradient),
        "evaluate": stopwatch.time_phase("line search", meta_gradient.evaluate),
    }.items():
        setattr(meta_gradient, name, replacement)
    reinforcement.collect_episodes = stopwatch.time_phase("sampling", reinforcement.collect_episodes)


def meta_iterations(shape: Shape, count: int) -> tuple[list[float], dict[str, float], tuple[float, float]]:
    """Trains for a warm-up iteration and ``count`` more; returns seconds, phases and memory. Run in a fresh process.

    The memory is the high-water mark of the resident set. `resource.getrusage` cannot be used, because its value starts
    with the resident set of the parent process.
    """
    torch.set_num_threads(NUM_THREADS)
    clock, _ = choose_clock(torch.device("cpu"), NUM_THREADS)
    meta_gradient = shape.build()
    algorithm = meta_gradient.algorithm
    before = resident_mib("VmRSS")
    stopwatch = Stopwatch(clock)
    time_phases(meta_gradient, stopwatch)
    seconds = []
    for iteration in range(count + 1):
        stopwatch.enter("rest")
        if iteration == 1:
            stopwatch.seconds.clear()  # the first iteration is a warm-up
        start = clock()
        meta_update(algorithm, meta_gradient, algorithm.sample_tasks(shape.num_tasks, Stream(0).child(iteration)))
        seconds.append(clock() - start)
        print(f"{shape.experiment}, meta-iteration {iteration} of {count}: {seconds[-1]:.3g} s", flush=True)
    stopwatch.enter("rest")
    phases = {phase: stopwatch.seconds[phase] / count for phase in PHASES}
    return seconds[1:], phases, (resident_mib("VmHWM"), before)


def measure(name: str, shape: Shape, rounds: int, turn_seconds: float, iterations: int) -> Result:
    """Measures one shape."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
        seconds, phases, memory = fresh.submit(meta_iterations, shape, iterations).result()
    speeds = compare_samplers(shape, rounds, turn_seconds) if shape.has_sampler else {}
    return Result(name, shape, speeds, seconds, phases, memory)


# Writing.

SAMPLING = """
## Sampling

Environment steps per second (wall clock), all on one core. Our sampler samples a whole meta-batch; `sizes` is tasks x
rollouts x steps. Gymnasium's vector environments hold as many environments as a task has rollouts; more would not make
them faster. A ratio is the median over rounds of the ratio within a round, with the lowest and highest in brackets.
""".strip()
META_ITERATIONS = """
## Meta-iterations

Seconds of CPU time: the median over iterations, with the lowest and highest in brackets; for phases, the mean.
`gradient` is the meta-gradient. `curvature` is the preparation of the curvature-vector products that
`conjugate gradient` makes. Point navigation takes them from finite differences, which need no preparation, and twice
the time; `point_exact` has exact products, as the half-cheetah and the ant. Peak memory is that of the whole process;
added memory does not count libraries and theta.
""".strip()


def csv_rows(result: Result) -> list[dict[str, Any]]:
    """Returns the rows of the CSV, one per measured quantity."""
    measured = {f"{sampler}, steps per second": values for sampler, values in result.speeds.items()}
    measured |= {"meta-iteration, seconds": result.seconds}
    measured |= {f"{phase}, seconds": [value] for phase, value in result.phases.items()}
    measured |= {"peak memory, MiB": [result.peak_mib[0]], "memory before, MiB": [result.peak_mib[1]]}
    rows: list[dict[str, Any]] = []
    for what, values in measured.items():
        median, low, high = Spread.of(values) or ("", "", "")
        row = {"shape": result.name, "sizes": result.shape.sizes(), "what": what, "count": len(values)}
        rows.append(row | {"median": median, "min": low, "max": high})
    return rows


def sampling_row(result: Result, with_bars: bool) -> dict[str, object]:
    """Returns one row of the table of samplers; ``with_bars`` adds the required values."""
    shape, speeds = result.shape, {name: Spread.of(values) for name, values in result.speeds.items()}
    ours, sync, asynchronous = (result.speeds[name] for name in ("ours", "SyncVectorEnv", "AsyncVectorEnv"))
    ratio, speed = times_as_fast(sync, ours), speeds["ours"]  # swapped, because these are speeds and not seconds
    assert ratio is not None and speed is not None
    bars = [
        verdict(ratio.median, shape.times_sync, " x Sync"),
        verdict(speed.median, shape.steps_per_second, " steps/s"),
    ]
    return {
        "environment": result.name,
        "sizes": shape.sizes(),
        **{name: f"{spread.median:,.0f}" for name, spread in speeds.items() if spread},
        "ours / Sync": ratio,
        "ours / Async": times_as_fast(asynchronous, ours),
        "bar": ", ".join(filter(None, bars)) if with_bars else "",
    }


def meta_iteration_row(result: Result, with_bars: bool) -> dict[str, object]:
    """Returns one row of the table of meta-iterations; ``with_bars`` adds the required value."""
    seconds = Spread.of(result.seconds)
    assert seconds is not None
    peak, before = result.peak_mib
    return {
        "environment": result.name,
        "sizes": result.shape.sizes(),
        "seconds": seconds,
        "bar": verdict(seconds.median, result.shape.max_seconds, " s", at_most=True) if with_bars else "",
        **{phase: f"{result.phases[phase]:.3f}" for phase in PHASES},
        "peak MiB": f"{peak:.0f}",
        "added MiB": f"{peak - before:.0f}",
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures all shapes; the files are written after each one, so that an interrupted run keeps its results."""
    parser = argument_parser(__doc__, "meta_rl", rounds=10, only_one_core=True)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), help=REPLACES)
    parser.add_argument("--iterations", type=int, default=5, help="meta-iterations (default %(default)s)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, for tests; the numbers mean nothing")
    options = parser.parse_args(arguments)
    if hasattr(os, "sched_setaffinity"):  # Linux: also for processes that this one starts
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(NUM_THREADS)
    conditions = describe_conditions(torch.device("cpu"), NUM_THREADS)
    conditions["clock"] = "wall clock for samplers; CPU time for meta-iterations, which other load disturbs less"
    results: list[Result] = []
    with_bars = not options.quick
    for name in options.shapes:
        if options.quick:
            tiny = replace(SHAPES[name], num_tasks=2, num_rollouts=2, horizon=10)
            results.append(measure(name, tiny, rounds=2, turn_seconds=0.01, iterations=2))
        else:
            results.append(measure(name, SHAPES[name], options.rounds, TURN_SECONDS, options.iterations))
        sampled = [sampling_row(result, with_bars) for result in results if result.speeds]
        text = [SAMPLING, *markdown_table(sampled)] if sampled else []
        text += [META_ITERATIONS, *markdown_table([meta_iteration_row(result, with_bars) for result in results])]
        rows = [row for result in results for row in csv_rows(result)]
        write_results(options, "Time and memory of meta-RL on one core", conditions, text, rows)
    print(output_path(options).read_text())


if __name__ == "__main__":
    main()
