"""Times whole training steps of `python train.py`, and compares them with a plain loop and with other libraries.

    python scripts/bench_training.py --rounds 5
    python scripts/bench_training.py --device cuda

A step samples the tasks, gathers their data, computes the meta-gradient and makes Adam's update. All implementations
use our code for sampling and gathering. Ours is built from the experiment's config and does the same as in training on
this hardware, with compilation. Before the timing, all must give the same meta-gradient. They then take turns in one
process; this project's own code at an earlier revision takes turns as well, in a process of its own.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Mapping, Sequence
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
    times_as_fast,
    verdict,
    write_results,
)
from clocks import WARM_UP
from floor import NOTES, Cost, Rates, kernels, slowest_operations
from implementations import Implementation, Problem, prepare
from previous import PREVIOUS, PREVIOUS_BAR, PREVIOUS_TEXT, Previous, add_previous_option

BARS_GPU = "H100"  # the bars are for GPUs with this in their name
BARS = {  # required iterations per second
    "sinusoid_10shot": 1500.0,
    "omniglot_5way_1shot": 300.0,
    "omniglot_5way_5shot": 150.0,
    "omniglot_20way_1shot": 100.0,
    "omniglot_20way_5shot": 35.0,
    "cifar_fs_5way_1shot": 150.0,
    "mini_imagenet_5way_1shot": 60.0,
}
LOOP_BARS = {"omniglot_5way_1shot": 20.0}  # required ratio to the loop on the same GPU
BUSY_BARS = {"omniglot_5way_1shot": 80.0}  # required share of the time in which the GPU computes, in percent
OURS = "ours as trained"
VARIANTS = (
    "ours without graph",
    "ours without kernels",
    "ours compiled",
)  # on a GPU; the last takes minutes to compile

TEXT = """
A ratio says how many times as fast an implementation is: the median over rounds of (time of the other / its own time in
the same round), with the lowest and highest ratio in brackets. Then comes what is required, if anything is.
""".strip()


def make_iterations(problem: Problem, implementation: Implementation) -> Callable[[], object]:
    """Returns a function that makes the next training iteration at each call."""
    iterations = itertools.count(1)
    return lambda: implementation.iterate(problem, next(iterations))


def measure(
    experiment: str, names: Sequence[str], options: argparse.Namespace, rates: Rates, previous: Previous
) -> tuple[list[str], list[dict[str, Any]]]:
    """Returns the lines of one experiment's section and its rows for the CSV."""
    device = torch.device(options.device)
    problem, ready, _, missing = prepare(names, experiment, device=device)
    runs = {name: make_iterations(problem, way) for name, way in ready.items()}
    for run in runs.values():  # a warm-up, which makes Adam's state, compiles, and captures the graph
        for _ in range(WARM_UP):
            run()
    seconds, without = previous.time_in_turns(runs, options.rounds, OURS, experiment, "iterate")
    missing |= without
    shown, rows = [], []
    for name in (*names, PREVIOUS):
        cells, row = compared(experiment, name, seconds, missing.get(name, ""), device)
        shown.append(cells)
        rows.append(row)
    cost = Cost.of(lambda: ready["loop"].gradient(problem.tasks))
    floor = cost.seconds(rates)
    rows[0] |= {"operations": cost.operations, "bytes": cost.bytes, "floor_seconds": floor}
    lines = [f"## {experiment}", *markdown_table(shown)]
    lines += [f"Floor: {', '.join(f'{key} {value}' for key, value in cost.row(rates).items())}: {1 / floor:,.0f} it/s."]
    if OURS not in ready:
        return lines, rows
    if device.type == "cuda":
        computing, count = kernels(runs[OURS], device)
        busy = 100 * computing / Spread.of(seconds[OURS]).median  # type: ignore[union-attr] # there are seconds
        rows[0] |= {"busy_percent": busy, "kernels": count}
        met = verdict(busy, BUSY_BARS.get(experiment), " %")
        busy_text = f"The GPU computes {busy:.0f} % of the time of ours, {count:,.0f} kernels per iteration. {met}"
        lines += ["", busy_text]
    lines += ["", "Where the time of ours goes:", *markdown_table(slowest_operations(runs[OURS], device))]
    return lines, rows


def compared(
    experiment: str, name: str, seconds: Mapping[str, Sequence[float]], note: str, device: torch.device
) -> tuple[dict[str, str], dict[str, Any]]:
    """Returns an implementation's row of the table and of the CSV; the note says why it was not measured."""
    bars_hold = device.type == "cuda" and BARS_GPU in torch.cuda.get_device_name(device)
    cells = {"implementation": name, "it/s": note}
    row: dict[str, Any] = {"experiment": experiment, "implementation": name, "note": note}
    speed = Spread.of(1 / value for value in seconds.get(name, []))
    if speed:
        bar = BARS.get(experiment) if bars_hold and name == OURS else None
        cells["it/s"] = f"{speed} {verdict(speed.median, bar, ' it/s')}".rstrip()
        row |= {
            "rounds": len(seconds[name]),
            "iterations_per_second": speed.median,
            "min": speed.low,
            "max": speed.high,
        }
    for other, bar in {"loop": LOOP_BARS.get(experiment) if bars_hold else None, PREVIOUS: PREVIOUS_BAR}.items():
        against = times_as_fast(seconds[name], seconds[other]) if speed and other in seconds else None
        cells[f"ratio to {other}"] = judged(against, bar if name == OURS else None)
        if against:
            row |= csv_cells(f"times_{other}", against)
    return cells, row


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures all experiments; the files are written after each one, so that an interrupted run keeps its results."""
    options = argument_parser(__doc__, "training", rounds=5)
    options.add_argument("--experiments", nargs="+", default=list(BARS), help=REPLACES)
    options.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS), help="libraries besides the loop")
    options.add_argument(
        "--variants", nargs="*", choices=VARIANTS, help="on a GPU, besides ours (default: the first two)"
    )
    add_previous_option(options)
    args = options.parse_args(arguments)
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    rates, previous = Rates.measure(device), Previous(args)
    conditions = describe_conditions(device, args.threads) | {"rates": str(rates), "previous": str(previous)}
    text, rows = [TEXT, "", PREVIOUS_TEXT, "", NOTES, ""], []
    variants = VARIANTS[:2] if args.variants is None and device.type == "cuda" else args.variants or ()
    for experiment in args.experiments:
        lines, csv_rows = measure(experiment, [OURS, *variants, "loop", *args.peers], args, rates, previous)
        text += [*lines, ""]
        rows += csv_rows
        write_results(args, "Whole training steps", conditions, text, rows)
    print(output_path(args).read_text())


if __name__ == "__main__":
    main()
