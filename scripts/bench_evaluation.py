"""Times a meta-test of 600 tasks, as at the end of training, and compares it with a plain loop over the tasks.

    python scripts/bench_evaluation.py --rounds 2

Both adapt to the same frozen bank and evaluate after every gradient step; images are evaluated both transductively and
inductively. Before the timing, both must give equal values for every task. They then take turns in one process.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from benchmark import (
    REPLACES,
    Spread,
    argument_parser,
    choose_clock,
    csv_cells,
    describe_conditions,
    markdown_table,
    output_path,
    time_in_turns,
    times_as_fast,
    write_results,
)
from implementations import Problem, batch_norm, default_dtype, network
from torch import Tensor

from maml.config.schema import build
from maml.evaluation import Evaluation
from maml.types import Params, Tasks

EXPERIMENTS = ("sinusoid_10shot", "omniglot_5way_1shot")


def evaluate_batched(problem: Problem, evaluation: Evaluation, bank: Tasks) -> dict[str, Tensor]:
    """Evaluates all tasks as training does; returns the values of every metric, ``(num_steps + 1, tasks)``."""
    algorithm = problem.algorithm
    curves = evaluation.curves(algorithm, algorithm.domain.num_shots, bank, None)
    return {curve.metric: curve.values for curve in curves}


def evaluate_in_loop(problem: Problem, evaluation: Evaluation, bank: Tasks) -> dict[str, Tensor]:
    """Returns the same values as `evaluate_batched`, computed one task at a time."""
    inner, theta = problem.algorithm.inner, problem.algorithm.theta
    adapted = inner.adapted_names([*theta])
    tasks: list[list[dict[str, Tensor]]] = []
    for support_x, support_y, query_x, query_y in problem.episodes(bank):

        def measure(phi: Params, step: int, task: Sequence[Tensor]) -> dict[str, Tensor]:
            support_x, support_y, query_x, query_y = task
            if not problem.is_image:
                x, y = (query_x, query_y) if step else (support_x, support_y)
                return {"mse": F.mse_loss(network(problem, phi, x), y)}
            both = torch.cat([support_x, query_x])
            inductive = network(problem, phi, both, partial(batch_norm, num_reference=len(support_x)))[len(support_x) :]
            outputs = {"transductive": network(problem, phi, query_x), "inductive": inductive}
            return {f"accuracy_{kind}": (o.argmax(-1) == query_y).to(o.dtype).mean() for kind, o in outputs.items()}

        phi, task = dict(theta), (support_x, support_y, query_x, query_y)
        with torch.no_grad():
            tasks.append([measure(phi, 0, task)])
        for step in range(evaluation.num_steps):
            leaves = {name: phi[name].detach().requires_grad_() for name in adapted}
            loss = problem.loss(network(problem, phi | leaves, support_x), support_y)
            gradients = torch.autograd.grad(loss, [*leaves.values()])
            with torch.no_grad():
                phi |= {name: leaves[name] - inner.step_size * g for name, g in zip(adapted, gradients, strict=True)}
                tasks[-1].append(measure(phi, step + 1, task))
    return {
        name: torch.stack([torch.stack([step[name] for step in steps]) for steps in tasks], 1).double().cpu()
        for name in tasks[0][0]
    }


def make(
    experiment: str, num_tasks: int, device: torch.device, dtype: torch.dtype
) -> tuple[Problem, Evaluation, Tasks]:
    """Returns the problem, the evaluation and the task bank, with the K of training."""
    problem = Problem(experiment, [f"evaluation.num_tasks={num_tasks}", "evaluation.num_shots=null"], device, dtype)
    evaluation: Evaluation = build(problem.settings.evaluation)
    domain = problem.algorithm.domain
    return problem, evaluation, problem.cast(evaluation.bank(domain, domain.num_shots))


def check(experiment: str, device: torch.device, num_tasks: int = 20) -> None:
    """Checks in float64 that both implementations give equal values for every task.

    Raises:
        RuntimeError: if they differ.
    """
    with default_dtype(torch.float64):
        problem, evaluation, bank = make(experiment, num_tasks, device, torch.float64)
        batched, looped = evaluate_batched(problem, evaluation, bank), evaluate_in_loop(problem, evaluation, bank)
    for name, values in batched.items():
        if not torch.allclose(values, looped[name].to(values), rtol=1e-6, atol=1e-6):
            raise RuntimeError(
                f"{name} of the loop differs from ours in {experiment}, so its time would mean nothing; fix it first"
            )


def measure(
    experiment: str, num_tasks: int, rounds: int, device: torch.device
) -> tuple[list[dict[str, str]], list[dict[str, Any]]]:
    """Returns the rows of the table and of the CSV of one experiment."""
    check(experiment, device)
    problem, evaluation, bank = make(experiment, num_tasks, device, torch.float32)
    runs = {
        "ours": lambda: evaluate_batched(problem, evaluation, bank),
        "loop": lambda: evaluate_in_loop(problem, evaluation, bank),
    }
    for run in runs.values():  # a warm-up; the check was in float64
        run()
    seconds = time_in_turns(runs, rounds, choose_clock(device, torch.get_num_threads())[0], title=experiment)
    shown, rows = [], []
    for name in runs:
        spread, against = Spread.of(seconds[name]), times_as_fast(seconds[name], seconds["loop"])
        assert spread is not None and against is not None
        labels = {"experiment": experiment, "tasks": num_tasks, "steps": evaluation.num_steps, "implementation": name}
        shown.append({key: str(value) for key, value in labels.items()})
        shown[-1] |= {"seconds": str(spread), "ratio to loop": str(against)}
        rows.append(labels | {"rounds": rounds, "seconds": spread.median, "min": spread.low, "max": spread.high})
        rows[-1] |= csv_cells("times_loop", against)
    return shown, rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures all experiments; the files are written after each one, so that an interrupted run keeps its results."""
    options = argument_parser(__doc__, "evaluation", rounds=2)
    options.add_argument("--experiments", nargs="+", default=list(EXPERIMENTS), help=REPLACES)
    options.add_argument("--tasks", type=int, default=600, help="tasks in the bank (default %(default)s)")
    args = options.parse_args(arguments)
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    shown, rows = [], []
    for experiment in args.experiments:
        table_rows, csv_rows = measure(experiment, args.tasks, args.rounds, device)
        shown += table_rows
        rows += csv_rows
        write_results(
            args,
            "Evaluation",
            describe_conditions(device, args.threads),
            [f"A meta-test of {args.tasks} tasks.", *markdown_table(shown)],
            rows,
        )
    print(output_path(args).read_text())


if __name__ == "__main__":
    main()
