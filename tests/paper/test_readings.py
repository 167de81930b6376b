"""The page that says where the paper's number lies among the runs of each reading."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from maml.errors import MamlError
from maml.paper.cells import Cell, Layout, Reading, Table, load_tables
from maml.paper.evidence import Evidence, find_evidence
from maml.paper.readings import OWN, measured_readings, readings_markdown
from maml.record.contents import Source
from maml.record.index import find_runs
from tests.paper.fake_runs import SINUSOID, make_run

OTHER = Source("sinusoid_10shot", "mse", 5, overrides=("inner.step_size=0.01",))
CELL = Cell(
    "table9",
    "MAML",
    "K5",
    "0.67",
    "",
    False,
    SINUSOID,
    1,
    readings=(Reading("the text", OTHER, 1, "sinusoid-step-size"),),
)
TABLE = Table(
    "table9",
    "Title",
    (CELL, Cell("table9", "quoted", "K5", "0.1", "", True)),
    Layout("", {"K5": ["after 1 step"]}, [{"MAML": "MAML (ours)", "quoted": "quoted"}]),
)


def rows(runs: Path) -> list[list[str]]:
    """Returns the cells of the page's only table."""
    found = find_runs(runs)[0]
    page = readings_markdown([TABLE], lambda source: find_evidence(source, found))
    return [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| MAML (ours)")]


@pytest.mark.parametrize(
    ("means", "place"),
    [((0.6, 0.7), "inside"), ((0.67, 0.8), "inside"), ((0.7, 0.8), "below"), ((0.5, 0.6), "above")],
)
def test_place_is_that_of_the_printed_number_in_the_range_of_our_runs(
    tmp_path: Path, means: tuple[float, ...], place: str
) -> None:
    for seed, mean in enumerate(means):
        make_run(tmp_path, mean=mean, seed=seed)
    (row,) = rows(tmp_path)
    assert row == [
        "MAML (ours)", "after 1 step", "0.67", OWN, "2",
        f"{sum(means) / 2:.3f}", f"{means[0]:.3f} to {means[1]:.3f}", place,
        "`python train.py -m +experiment=sinusoid_10shot seed=0,1`",
    ]  # fmt: skip


def test_every_reading_with_a_run_has_a_line_below_the_tables_own(tmp_path: Path) -> None:
    assert rows(tmp_path) == []
    for seed, mean in enumerate((0.9, 0.5, 0.6)):
        make_run(tmp_path, mean=mean, seed=seed, source=OTHER)
    make_run(tmp_path, mean=0.8)
    own, other = rows(tmp_path)
    assert own[3:8] == [OWN, "1", "0.800", "", "one run"]
    assert other[3:8] == ["[the text](notes.md#sinusoid-step-size)", "3", "0.600", "0.500 to 0.900", "inside"]
    assert other[8] == "`python train.py -m +experiment=sinusoid_10shot inner.step_size=0.01 seed=0,1,2`"


def test_unfinished_and_diverged_runs_are_said_and_not_placed(tmp_path: Path) -> None:
    make_run(tmp_path / "a", mean=0.67, done=69_999, status="interrupted")
    assert rows(tmp_path / "a")[0][7] == "reduced budget: 69,999 of 70,000 iterations"
    for seed, mean in enumerate((0.6, None)):
        make_run(tmp_path / "b", mean=mean, seed=seed)
    assert rows(tmp_path / "b")[0][5:8] == ["diverged", "diverged to diverged", "a run diverged"]


def test_the_summary_counts_the_tables_own_readings_with_several_runs(tmp_path: Path) -> None:
    for seed, mean in enumerate((0.6, 0.7)):
        make_run(tmp_path, mean=mean, seed=seed)
    found = find_runs(tmp_path)[0]
    page = readings_markdown([TABLE], lambda source: find_evidence(source, found))
    assert "Of 1 numbers with several runs, 1 lie inside the range in the table's own reading, 0 below it" in page
    assert list(measured_readings(TABLE, lambda source: Evidence())) == []


def test_readings_of_a_row_fill_its_columns_and_unknown_rows_are_refused(tmp_path: Path) -> None:
    (tmp_path / "paper").mkdir()
    with open(tmp_path / "paper" / "table9.csv", "w", newline="") as file:
        csv.writer(file).writerows([["method", "setting", "value", "ci"], ["A", "x", "1", ""], ["A", "y", "2", ""]])
    text = """
tables:
  table9:
    title: T
    layout: {corner: "", columns: {x: [x], y: [y]}, groups: [{A: A}]}
    defaults: {metric: mse, num_shots: 5}
    columns: {x: {step: 1}, y: {step: 5}}
    runs: [{row: A, experiment: sinusoid_10shot}]
    readings: [{row: ROW, name: another, experiment: sinusoid_pretrain, overrides: [seed=1]}]
"""
    (tmp_path / "cells.yaml").write_text(text.replace("ROW", "A"))
    (table,) = load_tables(tmp_path)
    source = Source("sinusoid_pretrain", "mse", 5, overrides=("seed=1",))
    assert [cell.readings for cell in table.cells] == [(Reading("another", source, step),) for step in (1, 5)]
    (tmp_path / "cells.yaml").write_text(text.replace("ROW", "B"))
    with pytest.raises(MamlError, match="has no B"):
        load_tables(tmp_path)
