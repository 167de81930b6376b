"""The examples of docs/extending.md: each is written to its file and run with the printed command."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import ROOT, blocks, run_in_order, trainings
from tests.model.torch_layers import CASES

PAGE = ROOT / "docs" / "extending.md"
RUNS = {
    "domain": "step_function",
    "setting": "head.*",
    "algorithm": "nearest_mean",
    "draws": "input_noise",
    "evaluation": "worst_class",
    "module": "SmallNet",
    "environment": "own_environment",
    "discrete": "Corridor",
    "logger": "csv_log",
}


@pytest.fixture
def extended(clone: Path) -> Path:
    """A clone to which the files of the page have been added."""
    for title, text in [*blocks(PAGE, "python"), *blocks(PAGE, "yaml")]:
        assert title
        path = clone / title
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return clone


def test_every_command_of_the_page_is_tried() -> None:
    assert sum(any(word in " ".join(run) for run in trainings(PAGE)) for word in RUNS.values()) == len(RUNS)
    assert len(trainings(PAGE)) == len(RUNS)


# tests/contract/test_own_algorithms.py runs the algorithm with random draws, too.
@pytest.mark.parametrize("kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind == "draws")) for kind in RUNS])
def test_example_runs_as_printed(kind: str, extended: Path) -> None:
    (words,) = [run for run in trainings(PAGE) if RUNS[kind] in " ".join(run)]
    few_rollouts = ["domain.num_shots=2", "evaluation.num_shots=[2]"] if kind in ("environment", "discrete") else []
    run_in_order(extended, [[*words, *few_rollouts]])
    assert list(extended.glob("runs/*/*/report.json"))


def test_check_of_the_gradient_agrees_with_finite_differences(extended: Path) -> None:
    command = next(line for _, text in blocks(PAGE, "sh") for line in text.splitlines() if "check_gradient.py" in line)
    command = command.replace(" python ", f" {sys.executable} ")
    printed = subprocess.run(["bash", "-c", command], cwd=extended, capture_output=True, text=True, check=True).stdout
    found = re.fullmatch(r"gradient (\S+), finite differences (\S+)\n", printed)
    assert found, printed
    gradient, differences = found.groups()
    assert abs(float(gradient)) > 0.1
    assert float(gradient) == pytest.approx(float(differences), rel=1e-7)


def test_sweep_over_an_own_option_is_summed_up(extended: Path) -> None:
    (words,) = [run for run in trainings(PAGE) if RUNS["domain"] in " ".join(run)]
    run_in_order(extended, [["-m", *words, "seed=0,1"]])
    (summary,) = extended.glob("runs/sweeps/*/summary.md")
    assert "2 of 2 jobs are finished" in summary.read_text()


def test_table_names_every_layer_of_torch_that_has_a_limit() -> None:
    _, _, table = PAGE.read_text().partition("| layer | what happens | why |")
    listed: dict[str, str] = {}
    for row in table.partition("\n\n")[0].splitlines()[2:]:
        layers, limits, _ = row.strip("|").split("|")
        listed |= {name: limits.strip() for name in re.findall(r"`([A-Z]\w+)`", layers)}
    assert listed == {name: ", ".join(case.limits) for name, case in CASES.items() if case.limits}
