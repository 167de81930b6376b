"""The verdicts on the paper's cells at the end of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from maml.config.compose import compose
from maml.paper import verdicts
from maml.paper.verdicts import cell_verdicts
from maml.record.contents import Source
from maml.record.report import Judgement
from tests.paper.fake_runs import make_run

CELL = "table2_multitask/MAML/K5_gradsteps_1"


def judged(tmp_path: Path, *overrides: str, **made: Any) -> dict[str, Judgement]:
    config, _ = compose(["+experiment=sinusoid_10shot", *overrides])
    (path,) = make_run(tmp_path, **made).rglob("report.json")
    report = json.loads(path.read_text())
    return cell_verdicts("sinusoid_10shot", config, report)


def test_finished_run_is_judged_as_the_tables_do(tmp_path: Path) -> None:
    assert judged(tmp_path, mean=0.6, ci95=0.1)[CELL].text == "0.600 ± 0.100 (paper 0.67): reproduced"
    assert judged(tmp_path, mean=0.9, ci95=0.1)[CELL].text == "0.900 ± 0.100 (paper 0.67): worse"
    assert judged(tmp_path, "seed=3", mean=0.5, ci95=0.1)[CELL].text.endswith(": better")
    assert len(judged(tmp_path)) == 3


def test_unfinished_run_is_no_reproduction(tmp_path: Path) -> None:
    assert judged(tmp_path, mean=0.67, done=10)[CELL].text.endswith(": reduced budget")


def test_judgement_names_the_step_and_the_published_number_in_our_unit(tmp_path: Path) -> None:
    found = judged(tmp_path, mean=0.6, ci95=0.1)[CELL]
    assert (found.metric, found.num_shots, found.step) == ("mse", 5, 1)
    assert (found.published, found.verdict) == ("0.67", "reproduced")
    assert verdicts._in_our_unit("98.70", 100) == "0.9870", "percent"


@pytest.mark.parametrize("change", ["inner.step_size=0.02", "evaluation.num_steps=11"])
def test_run_of_other_settings_is_of_no_cell(change: str, tmp_path: Path) -> None:
    assert judged(tmp_path, change) == {}


@pytest.mark.parametrize(("change", "expected"), [((), True), (("evaluation.num_ways=3",), False)])
def test_run_tested_at_other_ways_is_of_no_cell(change: tuple[str, ...], expected: bool) -> None:
    settings, _ = compose(["+experiment=omniglot_5way_1shot", *change])
    source = Source("omniglot_5way_1shot", "accuracy_transductive", 1)
    assert verdicts._has_settings_of(settings, source) is expected


def test_without_a_list_of_cells_there_is_nothing_to_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdicts, "RESULTS", tmp_path)
    assert judged(tmp_path) == {}
