"""Evaluates exported parameters again on the frozen task bank, and compares the result with the committed number.

    python scripts/verify.py table2_multitask/MAML/K5_gradsteps_1
    python scripts/verify.py --all

A cell is <table>/<row>/<column>, with the names in results/paper/. A curve is <figure>/<row>/<panel>. The panel is its
file in results/paper/, or K5, K10 or K20 if the file has no exact numbers. On a CPU, with the same versions and the
same machine, the number must be equal to the last bit. On another machine it may differ: in classification by one query
image in 600 tasks, in regression and in accuracy by showing by 0.01 %. In reinforcement learning, rounding differences
grow within a rollout, so on another machine the number must only lie in the committed 95 % interval. The exit status is
1 if a number is not verified.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from maml.algorithm.base import Algorithm
from maml.cli.scripts import exit_with
from maml.config.identity import differences, evaluation_config, training_config
from maml.config.paths import CHECKPOINTS, RESULTS
from maml.config.schema import Settings, build
from maml.curve import Curve
from maml.digest import digest
from maml.domain.classification import FewShotClassification
from maml.errors import MamlError
from maml.evaluation import Evaluation, bank_hash
from maml.experiment import build_algorithm
from maml.hardware.base import Hardware
from maml.hardware.precision import use_precision
from maml.paper.cells import load_tables, named_sources
from maml.record.exported import (
    CommittedNumber,
    Entry,
    ExportedFile,
    Index,
    State,
    compose_entry,
    read_index,
    read_parameters,
    restore,
)
from maml.record.labels import step_label
from maml.record.provenance import versions
from maml.types import MeasuredBy

_RELATIVE = 1e-4  # relative tolerance of a mean squared error on another machine
_ROUNDING = 1e-6  # absolute tolerance of an accuracy, for rounding in float32


class Reevaluation(NamedTuple):
    """The result of a second evaluation.

    Attributes:
        curve: the curve of the entry's metric.
        algorithm: the algorithm with the exported parameters.
        evaluation: the evaluation that was repeated.
        changes: differences of versions and machine from the first evaluation.
    """

    curve: Curve
    algorithm: Algorithm
    evaluation: Evaluation
    changes: list[str]


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a verdict for each cell; returns 1 if a cell is not verified, else 0."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n    ")[0], epilog=__doc__.partition("--all\n\n")[2]
    )
    parser.add_argument("cells", metavar="CELL", nargs="*", help="<table>/<row>/<column>, or <figure>/<row>/<panel>")
    parser.add_argument("--all", action="store_true", help="all cells and curves with a checkpoint")
    parser.add_argument(
        "--elsewhere",
        action="store_true",
        help="use the tolerance for another machine, for processors that differ but have the same name",
    )
    parser.add_argument(
        "--checkpoints", type=Path, default=CHECKPOINTS, help="folder of the checkpoints (default: results/checkpoints)"
    )
    options = parser.parse_args(arguments)
    if bool(options.cells) == options.all:
        parser.error("name a cell, or give --all")
    index = read_index(options.checkpoints)
    names = options.cells or list(index.cells)
    for name in names:
        check_name(name, index)

    done: dict[str, Reevaluation] = {}
    failed = 0
    for name in names:
        entry = index.cells[name]
        try:
            key = entry.model_dump_json(exclude={"numbers"})  # cells of the same curve share one evaluation
            if key not in done:
                done[key] = evaluate(entry, index.files[entry.file], options.checkpoints)
            good, text = judge(entry.numbers, done[key], options.elsewhere)
        except MamlError as error:
            good, text = False, str(error)
        failed += not good
        file = index.files[entry.file]
        origin = f"; run {file.run_id}, seed {file.seed}{_budget(file)}"  # tables have the mean over runs
        print(f"{'VERIFIED' if good else 'FAILED'}  {name}: {text}{origin}", flush=True)
    if len(names) > 1:
        print(f"{len(names) - failed} of {len(names)} verified")
    return 1 if failed else 0


def check_name(name: str, index: Index) -> None:
    """Refuses a name without a checkpoint.

    Raises:
        MamlError: if there is no such cell, or no checkpoint of it; the message says what to do.
    """
    if name in index.cells:
        return
    sources = named_sources(RESULTS)
    if name in sources:
        raise MamlError(
            f"{name} has no committed checkpoint. Run it with {sources[name][0].command([])}, then "
            "python scripts/export_checkpoints.py --runs-dir runs results/runs"
        )
    printed = [cell.name for table in load_tables(RESULTS) for cell in table.cells]
    if name in printed:
        raise MamlError(f"{name} has no experiment yet, so there is no number of ours to verify")
    known = list(dict.fromkeys([*sources, *printed]))
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"Did you mean {', '.join(close)}?" if close else f"Cells with a checkpoint: {', '.join(index.cells)}"
    raise MamlError(f"there is no cell {name}; a cell is <table>/<row>/<column>, as in results/paper/. {hint}")


def evaluate(entry: Entry, exported: ExportedFile, folder: Path) -> Reevaluation:
    """Builds the experiment, loads the parameters and evaluates them on the bank.

    Args:
        entry: the index entry to evaluate; it has the result of a search for step sizes, which is not repeated.
        exported: the index entry of its file.
        folder: folder of the file.

    Raises:
        MamlError: if the file, the experiment or the bank has changed, or data is missing.
    """
    state = read_parameters(folder, entry.file, exported)
    settings = compose_entry(entry, exported.seed)
    if digest(training_config(settings)) != exported.run_id:
        raise MamlError(
            f"{entry.experiment} no longer has run id {exported.run_id}, because its training settings in conf/ have "
            "changed; restore them, or train and export it again"
        )
    if evaluation_config(settings) != entry.evaluation:
        changed = differences(evaluation_config(settings), entry.evaluation)
        raise MamlError(
            f"the evaluation settings of {entry.experiment} in conf/ have changed; restore them, or export the run "
            f"again:\n{changed}"
        )
    with use_precision(settings.precision):
        return _evaluate(settings, state, entry, exported)


def _evaluate(settings: Settings, state: State, entry: Entry, exported: ExportedFile) -> Reevaluation:
    recorded = exported.hardware["device"]
    hardware = Hardware("cuda" if recorded.startswith("cuda") and torch.cuda.is_available() else "cpu")
    algorithm = build_algorithm(settings, hardware)
    restore(algorithm, state)
    workload = algorithm.domain.workload
    execution = hardware.choose(workload, settings.num_iterations, exported.execution)
    hardware.apply(execution.for_meta_test(workload))
    evaluation: Evaluation = build(settings.evaluation)
    bank = evaluation.bank(algorithm.domain, entry.num_shots)
    if bank_hash(bank) != entry.bank:
        raise MamlError(
            f"the task bank is different: its hash is {bank_hash(bank)}, not {entry.bank}. Either the data differ, or "
            "the code that samples tasks has changed"
        )
    curves = evaluation.curves(algorithm, entry.num_shots, bank, entry.step_sizes)
    (curve,) = (curve for curve in curves if curve.metric == entry.metric)
    return Reevaluation(curve, algorithm, evaluation, _changes_since(exported, hardware))


def _changes_since(exported: ExportedFile, hardware: Hardware) -> list[str]:
    """Returns the recorded versions and machine properties that are now different."""
    now = {**versions(), **hardware.describe()}
    recorded = {**exported.versions, **exported.hardware}
    return [f"{key} {now.get(key, 'none')}, not {value}" for key, value in recorded.items() if now.get(key) != value]


def judge(
    committed: Mapping[int, CommittedNumber], reevaluation: Reevaluation, elsewhere: bool = False
) -> tuple[bool, str]:
    """Compares the second evaluation with the committed numbers.

    Args:
        committed: the committed numbers, by gradient step.
        reevaluation: the second evaluation.
        elsewhere: use the tolerance for another machine, even if this one seems to be the same.

    Returns:
        Whether all numbers agree, and a sentence for the user.
    """
    if elsewhere:
        reevaluation = reevaluation._replace(changes=[*reevaluation.changes, "--elsewhere"])
    steps = {record["step"]: record["mean"] for record in reevaluation.curve.summary()["steps"]}
    exact = not reevaluation.changes and reevaluation.algorithm.stream.device.type == "cpu"
    measured_by = reevaluation.curve.measured_by
    worst, text = -1.0, ""
    for step, number in committed.items():
        mean, allowed = steps[step], 0.0
        if mean is None or number.mean is None:
            difference = 0.0 if mean is number.mean else float("inf")
        else:
            difference = abs(mean - number.mean)
            allowed = 0.0 if exact else tolerance(number, reevaluation)
        if difference > allowed:
            return False, (
                f"{_at(step, measured_by)} it is {_format_mean(mean)}, but {_format_mean(number.mean)} is committed. "
                f"They differ by {difference:.3g}; {_explain_tolerance(allowed, exact, reevaluation)}"
            )
        if difference > worst:
            worst, text = difference, f"{_format_mean(mean)} {_at(step, measured_by)}"
    if len(committed) > 1:
        text = f"{len(committed)} {measured_by}s, with the largest difference at {text}"
    match = "exactly the run's committed number" if worst == 0 else f"{worst:.3g} from the run's committed number"
    return True, f"{text}, {match} ({_explain_tolerance(tolerance(number, reevaluation), exact, reevaluation)})"


def tolerance(number: CommittedNumber, reevaluation: Reevaluation) -> float:
    """Returns the largest allowed difference between two machines, in the metric's unit."""
    domain, evaluation = reevaluation.algorithm.domain, reevaluation.evaluation
    if isinstance(domain, FewShotClassification):
        num_query = evaluation.num_query or reevaluation.curve.num_shots
        num_ways = evaluation.num_ways or domain.num_ways
        return 1 / (min(600, evaluation.num_tasks) * num_ways * num_query) + _ROUNDING
    if domain.on_policy:
        return number.ci95 or 0.0
    return _RELATIVE * abs(number.mean or 0.0)


def _explain_tolerance(allowed: float, exact: bool, reevaluation: Reevaluation) -> str:
    if exact:
        return "same versions and machine: every bit must be the same"
    reason = "; ".join(reevaluation.changes) or "a GPU, whose order of summation varies"
    return f"up to {allowed:.3g} is allowed on another machine: {reason}"


def _at(step: int, measured_by: MeasuredBy) -> str:
    if measured_by == "showing":
        return f"at {step_label(step, measured_by)}"
    return f"after {step} gradient step{'' if step == 1 else 's'}"


def _format_mean(mean: float | None) -> str:
    return "diverged" if mean is None else repr(mean)


def _budget(exported: ExportedFile) -> str:
    if exported.iteration == exported.num_iterations:
        return ""
    return f" [reduced budget: {exported.iteration:,} of {exported.num_iterations:,} iterations]"


if __name__ == "__main__":
    exit_with(main)
