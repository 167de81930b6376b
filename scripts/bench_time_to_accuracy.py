"""Trains Omniglot 5-way 1-shot until it classifies 97 % of the query images of validation tasks, and says how long.

    python scripts/bench_time_to_accuracy.py --device cuda --minutes 60

Training is that of `python train.py`, without its record. Every so many iterations the experiment's evaluation is made
on validation tasks; its time is counted apart. The state is kept in a file, from which the same command goes on: on a
CPU it takes hours, so a call trains for so many minutes at most and says where it stands.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from benchmark import (
    ROOT,
    argument_parser,
    choose_clock,
    describe_conditions,
    markdown_table,
    output_path,
    write_results,
)
from implementations import build_as_trained

from maml.config.compose import compose
from maml.config.schema import build
from maml.evaluation import Evaluation
from maml.record import checkpoint


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains on, evaluates and writes; the files are rewritten after each evaluation.

    Raises:
        RuntimeError: if the state is of another commit, machine or output_path, so that the seconds would not add up.
    """
    options = argument_parser(__doc__, "time_to_accuracy", rounds=1)
    options.add_argument("--experiment", default="omniglot_5way_1shot")
    options.add_argument("--accuracy", type=float, default=0.97, help="to be reached (default %(default)s)")
    options.add_argument("--every", type=int, default=200, help="iterations between evaluations (default %(default)s)")
    options.add_argument("--tasks", type=int, default=600, help="validation tasks (default %(default)s)")
    options.add_argument("--minutes", type=float, default=5.0, help="of this call (default %(default)s)")
    options.add_argument("--state", type=Path, default=ROOT / "runs" / "time_to_accuracy.pt", help="file to go on from")
    options.add_argument("overrides", nargs="*", help="of the experiment's config, for trying things")
    args = options.parse_args(arguments)
    device = torch.device(args.device)
    clock = choose_clock(device, args.threads)[0] if device.type == "cuda" else time.perf_counter
    hardware = (f"hardware.device={args.device}", f"hardware.num_threads={args.threads}")
    bank_settings = ("evaluation.split=val", "evaluation.search=null", f"evaluation.num_tasks={args.tasks}")
    config, _ = compose([f"+experiment={args.experiment}", *hardware, *bank_settings, *args.overrides], ROOT / "conf")
    algorithm, iterate = build_as_trained(config)
    evaluation: Evaluation = build(config.evaluation)
    domain = algorithm.domain
    bank = evaluation.bank(domain, domain.num_shots)

    conditions = describe_conditions(device, args.threads) | {"clock": "wall clock"}
    same = {key: conditions[key] for key in ("commit", "hardware", "threads", "versions")}
    same |= {"experiment": args.experiment, "accuracy": str(args.accuracy), "overrides": " ".join(args.overrides)}
    points: list[dict[str, Any]] = []
    if args.state.exists():
        saved = checkpoint.load(args.state)
        if saved["same"] != same:
            raise RuntimeError(f"{args.state} was made under {saved['same']}, not {same}; move it away to begin anew")
        points = saved["points"]
        algorithm.load_state_dict(saved["state"])

    last: dict[str, Any] = (
        points[-1] if points else {"iteration": 0, "seconds": 0.0, "evaluating": 0.0, "accuracy": 0.0}
    )
    end = time.monotonic() + 60 * args.minutes
    while last["accuracy"] < args.accuracy and time.monotonic() < end:
        start = clock()
        for iteration in range(last["iteration"] + 1, last["iteration"] + args.every + 1):
            iterate(iteration)
        between = clock()
        curves = evaluation.curves(algorithm, domain.num_shots, bank, evaluation.step_sizes(domain.num_shots))
        accuracy = next(curve.values[-1].mean().item() for curve in curves if curve.metric == domain.headline)
        last = {
            "iteration": iteration,
            "seconds": last["seconds"] + between - start,
            "evaluating": last["evaluating"] + clock() - between,
            "accuracy": accuracy,
        }
        points.append(last)
        args.state.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.save(args.state, {"same": same, "points": points, "state": algorithm.state_dict()})
        write_results(
            args, f"Time to {args.accuracy:.0%} on {args.experiment}", conditions, _text(points, args), points
        )
    print(output_path(args).read_text() if points else "no time to train")


def _text(points: Sequence[dict[str, Any]], args: Any) -> list[str]:
    last = points[-1]
    where = f"after {last['iteration']:,} iterations and {last['seconds']:,.0f} s of training"
    found = (
        f"Reached {where}, to the next {args.every} iterations."
        if last["accuracy"] >= args.accuracy
        else f"Not reached yet: {last['accuracy']:.1%} {where}. The same command goes on."
    )
    shown = [
        {
            "iteration": f"{point['iteration']:,}",
            "seconds of training": f"{point['seconds']:,.1f}",
            "seconds of evaluating": f"{point['evaluating']:,.1f}",
            "accuracy": f"{point['accuracy']:.2%}",
        }
        for point in points
    ]
    return [
        f"Transductive accuracy after the last gradient step, mean over {args.tasks} validation tasks, whose classes",
        f"training never sees. Compiling and other first use counts as training. {found}",
        *markdown_table(shown),
    ]


if __name__ == "__main__":
    main()
