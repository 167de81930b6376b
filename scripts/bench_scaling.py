"""Measures how the time of one meta-gradient grows with tasks, shots, inner steps and width, for ours and the loop.

    python scripts/bench_scaling.py --rounds 3
    python scripts/bench_scaling.py --redraw       # only the plots of all processors, from the measured times

Each quantity is varied alone; the others have the experiment's values. An exponent is the slope of a straight line
through the medians on logarithmic axes: 1 means proportional, and less than 1 means that overhead is shared.
"""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
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
    time_in_turns,
    write_results,
)
from implementations import IMPLEMENTATIONS, Problem

from maml.record.style import PAGE, log_ticks, save, style

NAMES = ("ours", "loop")
# The varied quantities of each experiment: an override, and the values.
SWEEPS: dict[str, dict[str, tuple[str, Sequence[int]]]] = {
    "sinusoid_10shot": {
        "tasks": ("meta_batch_size={}", (5, 10, 25, 50, 100)),
        "shots": ("domain.num_shots={}", (5, 10, 20, 40, 80)),
        "inner steps": ("inner.num_steps={}", (1, 2, 4, 8)),
        "width": ("model.hidden_sizes=[{0},{0}]", (20, 40, 80, 160)),
    },
    "omniglot_5way_1shot": {
        "tasks": ("meta_batch_size={}", (4, 8, 16, 32)),
        "shots": ("domain.num_shots={}", (1, 2, 4, 8)),
        "inner steps": ("inner.num_steps={}", (1, 2, 4, 8)),
        "width": ("model.num_filters={}", (16, 32, 64, 128)),
    },
}
# Fewer tasks for images, whose sweeps would otherwise take minutes. A plain loop's time is proportional to the tasks.
FEWER_TASKS = {"omniglot_5way_1shot": "meta_batch_size=8"}

Medians = Mapping[str, Sequence[tuple[int, float]]]
"""Points (value, seconds) by implementation."""


def exponent(points: Sequence[tuple[float, float]]) -> float:
    """Returns the exponent b of the power law a * x ** b that fits the points best on logarithmic axes."""
    x, y = zip(*((math.log(at), math.log(value)) for at, value in points), strict=True)
    return statistics.linear_regression(x, y).slope


def sweep(
    experiment: str, quantity: str, rounds: int, device: torch.device, values: Sequence[int] | None = None
) -> dict[str, list[tuple[int, list[float]]]]:
    """Returns the seconds per meta-gradient, one number per round, by implementation and value."""
    override, default_values = SWEEPS[experiment][quantity]
    fixed = [FEWER_TASKS[experiment]] if experiment in FEWER_TASKS and quantity != "tasks" else []
    clock, _ = choose_clock(device, torch.get_num_threads())
    times: dict[str, list[tuple[int, list[float]]]] = {name: [] for name in NAMES}
    for value in values or default_values:
        problem = Problem(experiment, [*fixed, override.format(value)], device)
        ready = {name: IMPLEMENTATIONS[name](problem) for name in NAMES}
        runs = {name: lambda way=way, problem=problem: way.gradient(problem.tasks) for name, way in ready.items()}
        for run in runs.values():
            run()
        for name, seconds in time_in_turns(runs, rounds, clock, title=f"{experiment}, {quantity} {value}").items():
            times[name].append((value, seconds))
    return times


@style()
def plot(panels: Mapping[tuple[str, str], Medians], path: Path) -> None:
    """Plots a row per experiment and a column per varied quantity, with the fitted exponents."""
    from matplotlib.figure import Figure  # imported here because it takes half a second

    experiments = list(dict.fromkeys(experiment for experiment, _ in panels))
    columns = list(dict.fromkeys(quantity for _, quantity in panels))
    figure = Figure(figsize=(PAGE, 1.85 * len(experiments) + 0.5), layout="constrained")
    grid = figure.subplots(len(experiments), len(columns), squeeze=False, sharey="row")
    for (experiment, quantity), medians in panels.items():
        row, column = experiments.index(experiment), columns.index(quantity)
        axes = grid[row][column]
        for name, points in medians.items():
            x, y = zip(*points, strict=True)
            axes.loglog(x, [1e3 * value for value in y], marker="o", label=name)
        axes.set_xticks(x, [str(value) for value in x])
        axes.set_xticks([], minor=True)
        axes.set_xlabel(quantity)
        if column == 0:
            axes.set_ylabel(f"{experiment}\nms per meta-gradient")
        axes.set_title("exponent\n" + ", ".join(f"{name} {exponent(medians[name]):.2f}" for name in medians))
    for axes in grid[:, 0]:  # at the end, when all limits of a row are known
        log_ticks(axes)
    figure.suptitle("Time of one meta-gradient; all axes are logarithmic")
    figure.legend(handles=grid[0][0].get_lines(), loc="outside lower center", ncols=len(NAMES))
    save(figure, path)


def measured(path: Path) -> dict[tuple[str, str], dict[str, list[tuple[int, float]]]]:
    """Returns the medians that an earlier run wrote into the CSV, by experiment and varied quantity."""
    panels: dict[tuple[str, str], dict[str, list[tuple[int, float]]]] = {}
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            medians = panels.setdefault((row["experiment"], row["varied"]), {})
            medians.setdefault(row["implementation"], []).append((int(row["value"]), float(row["seconds"])))
    return panels


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures all sweeps; the files are written after each one, so that an interrupted run keeps its results."""
    options = argument_parser(__doc__, "scaling", rounds=3)
    options.add_argument("--experiments", nargs="+", choices=SWEEPS, default=list(SWEEPS), help=REPLACES)
    options.add_argument("--values", nargs="+", type=int, help="values of every sweep, instead of the default ones")
    options.add_argument("--redraw", action="store_true", help="measure nothing: draw the plots from the CSVs again")
    args = options.parse_args(arguments)
    if args.values is not None and len(set(args.values)) < 2:
        options.error("--values needs two different values or more, because an exponent is a slope between them")
    if args.redraw:
        for path in args.out.glob(f"*/{args.name}.csv"):
            plot(measured(path), path.with_suffix(".png"))
        return
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    conditions = describe_conditions(device, args.threads)
    panels: dict[tuple[str, str], Medians] = {}
    shown: list[dict[str, str]] = []
    rows: list[dict[str, Any]] = []
    for experiment in args.experiments:
        for quantity in SWEEPS[experiment]:
            times = sweep(experiment, quantity, args.rounds, device, args.values)
            panels[experiment, quantity] = {
                name: [(value, statistics.median(seconds)) for value, seconds in points]
                for name, points in times.items()
            }
            for name, points in times.items():
                spreads = [(value, Spread.of(seconds)) for value, seconds in points]
                medians = panels[experiment, quantity][name]
                varied = {"experiment": experiment, "varied": quantity, "implementation": name}
                milliseconds = ", ".join(f"{1e3 * seconds:.3g}" for _, seconds in medians)
                values = ", ".join(str(value) for value, _ in medians)
                shown.append(varied | {"values": values, "ms": milliseconds, "exponent": f"{exponent(medians):.2f}"})
                for value, spread in spreads:
                    assert spread is not None
                    rows.append(varied | {"value": value, "rounds": args.rounds, "seconds": spread.median})
                    rows[-1] |= {"min": spread.low, "max": spread.high, "exponent": exponent(medians)}
            text = [
                "Each quantity is varied alone; an exponent of 1 means that the time is proportional to it. On images,",
                f"all quantities other than the tasks are varied with {', '.join(FEWER_TASKS.values())}.",
                *markdown_table(shown),
                f"![plot]({output_path(args, 'png').name})",
            ]
            write_results(args, "How the cost of one meta-gradient grows", conditions, text, rows)
            plot(panels, output_path(args, "png"))
    print(output_path(args).read_text())


if __name__ == "__main__":
    main()
