"""Evaluates exported parameters again, on the frozen task bank, and compares with the committed number.

    python scripts/verify.py table2_multitask/MAML/K5_gradsteps_1
    python scripts/verify.py --all

A cell is <table>/<row>/<column>, as in results/paper/; a curve is <figure>/<row>/<panel>, where the panel is its file
there, or where that has no exact numbers K5, K10, K20. The number must be the same to the last bit where versions and
machine are those that it was computed with, on a CPU. Elsewhere it may differ: in classification by one query image in
600 tasks, in regression by 0.01 %. In reinforcement learning rounding grows within a rollout until it is another one,
so all that can be asked elsewhere is that the number lies in the committed 95 % interval. The exit status is 1 if
something is not verified.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from maml.algorithm.base import Algorithm
from maml.config.compose import composed
from maml.config.identity import differences, digest, evaluation_config, training_config
from maml.config.paths import CHECKPOINTS
from maml.config.schema import Settings, build
from maml.domain.classification import FewShotClassification
from maml.errors import MamlError
from maml.evaluation import Curve, Evaluation, bank_hash
from maml.experiment import build_algorithm
from maml.hardware.base import Hardware
from maml.hardware.precision import use_precision
from maml.paper.cells import load_tables, named_sources
from maml.record.exported import Entry, Exported, Index, Reading, State, read_index, restore, unpack
from maml.record.run_folder import versions

RESULTS = Path(__file__).resolve().parents[1] / "results"
_RELATIVE = 1e-4  # of a mean squared error on another machine
_ROUNDING = 1e-6  # of an accuracy in float32


class Repeated(NamedTuple):
    """What a second evaluation gave.

    Attributes:
        curve: of the entry's metric.
        algorithm: with the parameters.
        evaluation: its settings.
        departures: what is not as it was: versions, machine.
    """

    curve: Curve
    algorithm: Algorithm
    evaluation: Evaluation
    departures: list[str]


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a verdict on each cell; returns 1 if one is not verified, else 0."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n    ")[0], epilog=__doc__.partition("--all\n\n")[2]
    )
    parser.add_argument("cells", metavar="CELL", nargs="*", help="<table>/<row>/<column>, or <figure>/<row>/<panel>")
    parser.add_argument("--all", action="store_true", help="everything that has a checkpoint")
    parser.add_argument(
        "--elsewhere", action="store_true", help="judge as on another machine; some processors share a name"
    )
    parser.add_argument(
        "--checkpoints", type=Path, default=CHECKPOINTS, help="where they are (default: results/checkpoints)"
    )
    options = parser.parse_args(arguments)
    if bool(options.cells) == options.all:
        parser.error("name a cell, or give --all")
    index = read_index(options.checkpoints)
    names = options.cells or list(index.cells)
    for name in names:
        check_name(name, index)

    done: dict[str, Repeated] = {}
    failed = 0
    for name in names:
        entry = index.cells[name]
        try:
            work = entry.model_dump_json(exclude={"readings"})  # cells of one curve share it
            if work not in done:
                done[work] = evaluate(entry, index.files[entry.file], options.checkpoints)
            good, text = judge(entry.readings, done[work], options.elsewhere)
        except MamlError as error:
            good, text = False, str(error)
        failed += not good
        print(f"{'VERIFIED' if good else 'FAILED'}  {name}: {text}{_budget(index.files[entry.file])}", flush=True)
    if len(names) > 1:
        print(f"{len(names) - failed} of {len(names)} verified")
    return 1 if failed else 0


def check_name(name: str, index: Index) -> None:
    """Refuses a name that nothing is known of.

    Raises:
        MamlError: says whether there is no such cell, or no checkpoint of it, and what to do.
    """
    if name in index.cells:
        return
    sources = named_sources(RESULTS)
    if name in sources:
        raise MamlError(
            f"{name} has no checkpoint: nothing of it is committed. Run it with {sources[name][0].command([])}, then "
            "scripts/export_checkpoints.py --runs-dir runs results/runs"
        )
    printed = {f"{cell.table}/{cell.row}/{cell.column}": cell for table in load_tables(RESULTS) for cell in table.cells}
    if name in printed:
        why = "is quoted by the paper from others" if printed[name].quoted else "has no experiment yet"
        raise MamlError(f"{name} {why}, so there is nothing of ours to verify")
    known = list(dict.fromkeys([*sources, *printed]))
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    meant = f"Did you mean {', '.join(close)}?" if close else f"There are, with a checkpoint: {', '.join(index.cells)}"
    raise MamlError(f"there is no cell {name}: it is <table>/<row>/<column>, as in results/paper/. {meant}")


def evaluate(entry: Entry, exported: Exported, folder: Path) -> Repeated:
    """Builds the experiment, loads the parameters and evaluates them on the bank.

    Args:
        entry: what to evaluate; step sizes that were searched for are not searched for again.
        exported: its file.
        folder: where that is.

    Raises:
        MamlError: if the file, the experiment or the bank is not what it was, or data is missing.
    """
    state = unpack(folder / entry.file, exported.sha256)
    config = composed(entry.experiment, (*entry.overrides, f"seed={exported.seed}"))
    if digest(training_config(config)) != exported.run_id:
        raise MamlError(f"conf/ does not give run {exported.run_id} any more: {entry.experiment} trains something else")
    if evaluation_config(config) != entry.evaluation:
        changed = differences(evaluation_config(config), entry.evaluation)
        raise MamlError(f"{entry.experiment} is evaluated otherwise now:\n{changed}")
    with use_precision(config.precision):
        return _evaluate(config, state, entry, exported)


def _evaluate(config: Settings, state: State, entry: Entry, exported: Exported) -> Repeated:
    recorded = exported.hardware["device"]
    hardware = Hardware("cuda" if recorded.startswith("cuda") and torch.cuda.is_available() else "cpu")
    algorithm = build_algorithm(config, hardware)
    restore(algorithm, state)
    execution = hardware.choose(algorithm.domain, config.num_iterations, exported.execution)
    hardware.apply(execution)
    evaluation: Evaluation = build(config.evaluation)
    bank = evaluation.bank(algorithm.domain, entry.num_shots)
    if bank_hash(bank) != entry.bank:
        raise MamlError(
            f"the task bank is another: its hash is {bank_hash(bank)}, not {entry.bank}. Either the data "
            "differ, or the code that draws tasks has changed"
        )
    curves = evaluation.curves(algorithm, entry.num_shots, bank, entry.step_sizes)
    (curve,) = (curve for curve in curves if curve.metric == entry.metric)
    return Repeated(curve, algorithm, evaluation, _departures(exported, hardware))


def _departures(exported: Exported, hardware: Hardware) -> list[str]:
    """Returns what is not as it was, of all that was recorded."""
    now = {**versions(), **hardware.describe()}
    before = {**exported.versions, **exported.hardware}
    return [f"{key} {now.get(key, 'none')}, not {value}" for key, value in before.items() if now.get(key) != value]


def judge(committed: Mapping[int, Reading], repeated: Repeated, elsewhere: bool = False) -> tuple[bool, str]:
    """Compares, and returns whether the committed numbers were landed on and a sentence that says so.

    Args:
        committed: by gradient step.
        repeated: the second evaluation.
        elsewhere: allows what is allowed on another machine, though this one seems to be the same.
    """
    if elsewhere:
        repeated = repeated._replace(departures=[*repeated.departures, "--elsewhere"])
    steps = {record["step"]: record["mean"] for record in repeated.curve.summary()["steps"]}
    exact = not repeated.departures and repeated.algorithm.stream.device.type == "cpu"
    worst, text = -1.0, ""
    for step, reading in committed.items():
        found, allowed = steps[step], 0.0
        if found is None or reading.mean is None:
            difference = 0.0 if found is reading.mean else float("inf")
        else:
            difference = abs(found - reading.mean)
            allowed = 0.0 if exact else tolerance(reading, repeated)
        if difference > allowed:
            return False, (
                f"after {_steps(step)} {_shown(found)}, but {_shown(reading.mean)} is committed: "
                f"{difference:.3g} apart, where {_why(allowed, exact, repeated)}"
            )
        if difference > worst:
            worst, text = difference, f"{_shown(found)} after {_steps(step)}"
    if len(committed) > 1:
        text = f"{len(committed)} gradient steps, the worst {text}"
    match = "exactly the committed number" if worst == 0 else f"{worst:.3g} from the committed number"
    return True, f"{text}, {match} ({_why(tolerance(reading, repeated), exact, repeated)})"


def tolerance(reading: Reading, repeated: Repeated) -> float:
    """Returns how far apart two machines may be, in the metric's unit."""
    domain, evaluation = repeated.algorithm.domain, repeated.evaluation
    if isinstance(domain, FewShotClassification):
        num_query = evaluation.num_query or repeated.curve.num_shots
        return 1 / (min(600, evaluation.num_tasks) * domain.num_ways * num_query) + _ROUNDING
    if domain.on_policy:
        return reading.ci95 or 0.0
    return _RELATIVE * abs(reading.mean or 0.0)


def _why(allowed: float, exact: bool, repeated: Repeated) -> str:
    if exact:
        return "same versions and machine: every bit must be the same"
    what = "; ".join(repeated.departures) or "a GPU, whose sums come in any order"
    return f"up to {allowed:.3g} is allowed on another machine: {what}"


def _steps(count: int) -> str:
    return f"{count} gradient step{'' if count == 1 else 's'}"


def _shown(mean: float | None) -> str:
    return "diverged" if mean is None else repr(mean)


def _budget(exported: Exported) -> str:
    if exported.iteration == exported.num_iterations:
        return ""
    return f" [reduced budget: {exported.iteration:,} of {exported.num_iterations:,} iterations]"


if __name__ == "__main__":
    try:
        sys.exit(main())
    except MamlError as error:
        sys.exit(str(error))
