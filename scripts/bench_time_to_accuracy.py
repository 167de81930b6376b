"""Measures the time until Omniglot 5-way 1-shot classifies 97 % of the query images of validation tasks correctly.

    python scripts/bench_time_to_accuracy.py --device cuda --minutes 60

Training is the same as with `python train.py`, but without a run folder. After every 200 iterations the experiment's
evaluation runs on validation tasks; its time is counted separately. Training takes hours on a CPU, so a call stops
after a number of minutes, prints its progress and saves its state to a file, one for each processor and commit. The
same command resumes from that file.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from benchmark import (
    ROOT,
    argument_parser,
    choose_clock,
    describe_conditions,
    hardware_folder,
    markdown_table,
    output_path,
    short_commit,
    write_results,
)
from implementations import build_as_trained

from maml.cli.scripts import exit_with
from maml.config.compose import compose
from maml.config.schema import build
from maml.errors import MamlError
from maml.evaluation import Evaluation
from maml.record import checkpoint


def default_state(device: str, conditions: Mapping[str, str]) -> Path:
    """Returns the file of this processor and commit; seconds of another one may not be added to it."""
    return ROOT / "runs" / f"time_to_accuracy_{hardware_folder(device)}_{short_commit(conditions)}.pt"


def main(arguments: Sequence[str] | None = None) -> None:
    """Resumes training and evaluates; the files are written after each evaluation.

    Raises:
        MamlError: if the saved state is from another commit, machine or target, so that its seconds do not count.
    """
    options = argument_parser(__doc__, "time_to_accuracy", rounds=1)
    options.add_argument("--experiment", default="omniglot_5way_1shot")
    options.add_argument("--accuracy", type=float, default=0.97, help="target accuracy (default %(default)s)")
    options.add_argument("--every", type=int, default=200, help="iterations between evaluations (default %(default)s)")
    options.add_argument("--tasks", type=int, default=600, help="validation tasks (default %(default)s)")
    options.add_argument("--minutes", type=float, default=5.0, help="most minutes of this call (default %(default)s)")
    state = "file with the state (default: a file in runs/ for each processor and commit)"
    options.add_argument("--state", type=Path, help=state)
    options.add_argument("overrides", nargs="*", help="overrides of the experiment's config, for trials")
    args = options.parse_args(arguments)
    device = torch.device(args.device)
    clock = choose_clock(device, args.threads)[0] if device.type == "cuda" else time.perf_counter
    hardware = (f"hardware.device={args.device}", f"hardware.num_threads={args.threads}")
    bank_settings = ("evaluation.split=val", "evaluation.search=null", f"evaluation.num_tasks={args.tasks}")
    settings, _ = compose([f"+experiment={args.experiment}", *hardware, *bank_settings, *args.overrides])
    algorithm, iterate = build_as_trained(settings)
    evaluation: Evaluation = build(settings.evaluation)
    domain = algorithm.domain
    bank = evaluation.bank(domain, domain.num_shots)

    conditions = describe_conditions(device, args.threads) | {"clock": "wall clock"}
    same = {key: conditions[key] for key in ("commit", "hardware", "threads", "versions")}
    same |= {"experiment": args.experiment, "accuracy": str(args.accuracy), "overrides": " ".join(args.overrides)}
    points: list[dict[str, Any]] = []
    args.state = args.state or default_state(args.device, conditions)
    if args.state.exists():
        saved = checkpoint.load(args.state)
        if saved["same"] != same:
            raise MamlError(f"{args.state} was made with {saved['same']}, not {same}; move it away to start again")
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
        trained = clock()
        curves = evaluation.curves(algorithm, domain.num_shots, bank, evaluation.step_sizes(domain.num_shots))
        accuracy = next(curve.values[-1].mean().item() for curve in curves if curve.metric == domain.headline)
        last = {
            "iteration": iteration,
            "seconds": last["seconds"] + trained - start,
            "evaluating": last["evaluating"] + clock() - trained,
            "accuracy": accuracy,
        }
        points.append(last)
        print(f"{iteration:,} iterations, {last['seconds']:,.1f} s of training: {accuracy:.2%}", flush=True)
        args.state.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.save(args.state, {"same": same, "points": points, "state": algorithm.state_dict()})
        write_results(
            args, f"Time to {args.accuracy:.0%} on {args.experiment}", conditions, _text(points, args), points
        )
    print(output_path(args).read_text() if points else "nothing was trained: give more --minutes")


def _text(points: Sequence[dict[str, Any]], args: Any) -> list[str]:
    last = points[-1]
    time_point = f"after {last['iteration']:,} iterations and {last['seconds']:,.0f} s of training"
    outcome = (
        f"Reached {time_point}; this is checked every {args.every} iterations."
        if last["accuracy"] >= args.accuracy
        else f"Not reached yet: {last['accuracy']:.1%} {time_point}. Run the same command again to continue."
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
        f"Transductive accuracy after the last gradient step, mean over {args.tasks} validation tasks. Training never",
        "sees their classes. The time of a call starts with its first iteration: what is compiled or captured from",
        f"then on counts as training; the choice of the chunk size, which comes before, does not. {outcome}",
        *markdown_table(shown),
    ]


if __name__ == "__main__":
    exit_with(main)
