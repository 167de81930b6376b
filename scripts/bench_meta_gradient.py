"""Times one second-order meta-gradient, and compares it with a plain loop and with other libraries.

    python scripts/bench_meta_gradient.py --experiments sinusoid_10shot omniglot_5way_1shot --rounds 20

Every implementation computes the gradient of the mean query loss from theta and the sampled tasks. Before the timing,
all gradients must agree. All implementations run in one process and take turns, so that a ratio compares measurements
that are close in time. The reported ratio is the median over rounds.
"""

from __future__ import annotations

import gc
import multiprocessing
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from benchmark import (
    PEERS,
    Spread,
    argument_parser,
    choose_clock,
    describe_conditions,
    markdown_table,
    output_path,
    resident_mib,
    time_in_turns,
    times_as_fast,
    verdict,
    write_results,
)
from floor import NOTES, Cost, Rates, slowest_operations
from implementations import IMPLEMENTATIONS, Problem, prepare

# Required ratio to the loop on one CPU core: how many times as fast an implementation must be.
BARS: dict[str, dict[str, float]] = {
    "sinusoid_10shot": {"ours": 10, "ours compiled": 25},
    "omniglot_5way_1shot": {"ours": 2.8, "ours compiled": 1.4},
    "omniglot_20way_1shot": {"ours": 2.0, "ours compiled": 1.15},
    "mini_imagenet_5way_1shot": {"ours": 2.2, "ours compiled": 1.4},
}
MAX_MEMORY_RATIO = 2.0

TEXT = """
A ratio says how many times as fast an implementation is: the median over rounds of (time of the other / its own time in
the same round), with the lowest and highest ratio in brackets. Before the timing, each gave the loop's gradient;
`error` is the relative difference in float64 and in float32. Peak memory does not count libraries, theta and data.
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
    experiment: str, names: Sequence[str], rounds: int, device: torch.device, rates: Rates, with_bars: bool
) -> tuple[list[str], list[dict[str, Any]]]:
    """Returns the lines of one experiment's section and its rows for the CSV."""
    num_threads = torch.get_num_threads()
    problem, ready, errors, missing = prepare(names, experiment, device=device)
    runs = {name: lambda way=way: way.gradient(problem.tasks) for name, way in ready.items()}
    seconds = time_in_turns(runs, rounds, choose_clock(device, num_threads)[0])
    bars = BARS.get(experiment, {}) if with_bars else {}
    shown: list[Mapping[str, str]] = []
    rows: list[dict[str, Any]] = []
    for name in names:
        spread = Spread.of(seconds.get(name, []))
        speeds = {
            other: times_as_fast(seconds[name], seconds[other])
            for other in ("loop", "learn2learn")
            if spread and other in seconds
        }
        against = speeds.get("loop")
        shown.append(
            {
                "implementation": name,
                "ms": f"{1e3 * spread.median:.4g}" if spread else missing[name],
                "ratio to loop": str(against or ""),
                "bar": verdict(against.median, bars.get(name)) if against else "",
                "ratio to learn2learn": str(speeds.get("learn2learn") or ""),
                "error": ", ".join(f"{error:.0e}" for error in errors.get(name, [])),
            }
        )
        row: dict[str, Any] = {"experiment": experiment, "implementation": name, "note": missing.get(name, "")}
        row |= {"rounds": len(seconds.get(name, []))} | _cells("seconds", spread)
        for other in ("loop", "learn2learn"):
            row |= _cells(f"times_{other}", speeds.get(other))
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


def _cells(name: str, spread: Spread | None) -> dict[str, Any]:
    median, low, high = spread or ("", "", "")
    return {name: median, f"{name}_min": low, f"{name}_max": high}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures all experiments; the files are written after each one, so that an interrupted run keeps its results."""
    options = argument_parser(__doc__, "meta_gradient", rounds=10)
    options.add_argument("--experiments", nargs="+", default=list(BARS))
    options.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS), help="libraries besides the loop")
    compiled = ["sinusoid_10shot"]  # the other experiments take minutes to compile, and training does not compile them
    options.add_argument("--compile", nargs="*", default=compiled, help="experiments to time compiled as well")
    args = options.parse_args(arguments)
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    rates = Rates.measure(device)
    conditions = describe_conditions(device, args.threads) | {"rates": str(rates)}
    text, rows = [TEXT, "", NOTES, ""], []
    with_bars = device.type == "cpu" and args.threads == 1
    for experiment in args.experiments:
        compiled = ["ours compiled"] if experiment in args.compile else []
        names = ["ours", *compiled, "loop", "loop, fused norm", *args.peers]
        lines, csv_rows = measure(experiment, names, args.rounds, device, rates, with_bars)
        text += lines
        rows += csv_rows
        write_results(args, "Time and memory of one second-order meta-gradient", conditions, text, rows)
    print(output_path(args).read_text())


if __name__ == "__main__":
    main()
