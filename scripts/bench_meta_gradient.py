"""Times one second-order meta-gradient, and compares it with a plain loop and with other libraries.

    python scripts/bench_meta_gradient.py --experiments sinusoid_10shot omniglot_5way_1shot --rounds 20

Every implementation computes the gradient of the mean query loss from theta and the sampled tasks. Before the timing,
all gradients must agree. All implementations run in one process and take turns, so that a ratio compares measurements
that are close in time. The reported ratio is the median over rounds. This project's own code at an earlier revision
takes turns as well, in a process of its own.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from benchmark import (
    PEERS,
    REPLACES,
    Spread,
    argument_parser,
    csv_cells,
    describe_conditions,
    judged,
    markdown_table,
    output_path,
    resident_mib,
    times_as_fast,
    verdict,
    write_results,
)
from floor import NOTES, Cost, Rates, slowest_operations
from implementations import IMPLEMENTATIONS, Problem, prepare
from previous import PREVIOUS, PREVIOUS_BAR, PREVIOUS_TEXT, Previous, add_previous_option

# Required ratio to each other implementation on one CPU core: how many times as fast ours must be.
BARS: dict[str, dict[str, dict[str, float]]] = {
    "sinusoid_10shot": {"ours": {"loop": 10}, "ours compiled": {"loop": 30}},
    "omniglot_5way_1shot": {"ours": {"loop": 2.8, "jax": 1.0}, "ours compiled": {"loop": 1.4, "jax": 1.2}},
    "omniglot_5way_5shot": {"ours": {"jax": 1.0}, "ours compiled": {"jax": 1.2}},
    "omniglot_20way_1shot": {"ours": {"loop": 2.0, "jax": 1.0}, "ours compiled": {"loop": 1.15, "jax": 1.2}},
    "mini_imagenet_5way_1shot": {"ours": {"loop": 2.2, "jax": 1.0}, "ours compiled": {"loop": 1.4, "jax": 1.2}},
}
MAX_MEMORY_RATIO = 2.0
# The implementations that ratios are shown to.
OTHERS = ("loop", "jax", "learn2learn", PREVIOUS)

TEXT = """
A ratio says how many times as fast an implementation is: the median over rounds of (time of the other / its own time in
the same round), with the lowest and highest ratio in brackets; then comes the required ratio, if there is one. Before
the timing, each gave the loop's gradient; `error` is the relative difference in float64 and in float32. Peak memory
does not count libraries, theta and data.

Two implementations are compiled, in this process and before the timing: `ours compiled` by `torch.compile`, and `jax`,
whose whole meta-gradient is one program that XLA compiled (`jax.jit`). The others run operation by operation.
""".strip()


def peak_memory(name: str, experiment: str, device: str, num_threads: int) -> tuple[float, float]:
    """Returns the peak memory that meta-gradients add, and the peak memory of the whole process, in MiB.

    On a CPU, both are high-water marks of the resident set, which is reset after libraries, theta and data are loaded.
    So they include memory that PyTorch's allocator does not see, such as the scratch space of convolutions. Run this in
    a fresh process.
    """
    torch.set_num_threads(num_threads)
    problem = Problem(experiment, device=device)
    implementation = IMPLEMENTATIONS[name](problem)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        implementation.gradient(problem.tasks)
        peak = torch.cuda.max_memory_allocated()
        return (peak - before) / 2**20, peak / 2**20
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before_mib = resident_mib("VmRSS")
    for _ in range(3):
        implementation.gradient(problem.tasks)
    return resident_mib("VmHWM") - before_mib, resident_mib("VmHWM")


def measure(
    experiment: str, names: Sequence[str], options: argparse.Namespace, rates: Rates, previous: Previous
) -> tuple[list[str], list[dict[str, Any]]]:
    """Returns the lines of one experiment's section and its rows for the CSV."""
    device, num_threads = torch.device(options.device), options.threads
    problem, ready, errors, missing = prepare(names, experiment, device=device)
    runs = {name: lambda way=way: way.gradient(problem.tasks) for name, way in ready.items()}
    seconds, without = previous.time_in_turns(runs, options.rounds, "ours", experiment, "gradient")
    missing |= without
    shown: list[Mapping[str, str]] = []
    rows: list[dict[str, Any]] = []
    for name in (*names, PREVIOUS):
        spread = Spread.of(seconds.get(name, []))
        speeds = {
            other: times_as_fast(seconds[name], seconds[other]) for other in OTHERS if spread and other in seconds
        }
        bars = BARS.get(experiment, {}).get(name, {}) if device.type == "cpu" and num_threads == 1 else {}
        if name == "ours":
            bars = bars | {PREVIOUS: PREVIOUS_BAR}
        shown.append(
            {
                "implementation": name,
                "ms": f"{1e3 * spread.median:.4g}" if spread else missing[name],
                **{f"ratio to {other}": judged(speeds.get(other), bars.get(other)) for other in OTHERS},
                "error": ", ".join(f"{error:.0e}" for error in errors.get(name, [])),
            }
        )
        row: dict[str, Any] = {"experiment": experiment, "implementation": name, "note": missing.get(name, "")}
        row |= {"rounds": len(seconds.get(name, []))} | csv_cells("seconds", spread)
        for other in OTHERS:
            row |= csv_cells(f"times_{other}", speeds.get(other))
        row |= dict(zip(("error_float64", "error_float32"), errors.get(name, ("", "")), strict=True))
        rows.append(row)
    lines = [f"## {experiment}", *markdown_table(shown)]
    cost = Cost.of(runs["loop"])
    lines += [f"Floor: {', '.join(f'{key} {value}' for key, value in cost.row(rates).items())}.", ""]
    lines += ["Where the time of ours goes:", *markdown_table(slowest_operations(runs["ours"], device))]
    peaks = {}
    for name in ("ours", "loop"):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
            peaks[name] = fresh.submit(peak_memory, name, experiment, device.type, num_threads).result()
    for row in rows:
        row |= {"operations": cost.operations, "bytes": cost.bytes, "floor_seconds": cost.seconds(rates)}
        row |= dict(zip(("peak_mib", "process_peak_mib"), peaks.get(row["implementation"], ("", "")), strict=True))
    (ours, ours_process), (plain, plain_process) = peaks["ours"], peaks["loop"]
    lines += [
        f"Peak: ours {ours:.0f} MiB, loop {plain:.0f} MiB, ratio {ours / plain:.2f}, "
        f"{verdict(ours / plain, MAX_MEMORY_RATIO, at_most=True)}. "
        f"Whole process: {ours_process:.0f} and {plain_process:.0f} MiB, ratio {ours_process / plain_process:.2f}.",
        "",
    ]
    return lines, rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures all experiments; the files are written after each one, so that an interrupted run keeps its results."""
    options = argument_parser(__doc__, "meta_gradient", rounds=10)
    options.add_argument("--experiments", nargs="+", default=list(BARS), help=REPLACES)
    options.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS), help="libraries besides the loop")
    compiled = ["sinusoid_10shot"]  # the other experiments take minutes to compile, and training does not compile them
    options.add_argument("--compile", nargs="*", default=compiled, help="experiments to time compiled as well")
    add_previous_option(options)
    args = options.parse_args(arguments)
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    rates, previous = Rates.measure(device), Previous(args)
    conditions = describe_conditions(device, args.threads) | {"rates": str(rates), "previous": str(previous)}
    text, rows = [TEXT, "", PREVIOUS_TEXT, "", NOTES, ""], []
    for experiment in args.experiments:
        compiled = ["ours compiled"] if experiment in args.compile else []
        names = ["ours", *compiled, "loop", "loop, fused norm", *args.peers]
        lines, csv_rows = measure(experiment, names, args, rates, previous)
        text += lines
        rows += csv_rows
        write_results(args, "Time and memory of one second-order meta-gradient", conditions, text, rows)
    print(output_path(args).read_text())


if __name__ == "__main__":
    main()
