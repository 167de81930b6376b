"""Verdicts, and the rendered tables with and without runs."""

import csv
import math
import runpy
from dataclasses import replace
from pathlib import Path

import pytest

from maml.paper.cells import Cell, load_tables
from maml.paper.runs import Evidence, find_evidence, find_runs
from maml.paper.tables import (
    Comparison,
    compare,
    headline_markdown,
    summary,
    table_markdown,
    table_rows,
    verdict,
)
from tests.paper.made_up import SINUSOID, make_run

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results"
main = runpy.run_path(str(ROOT / "scripts" / "paper_tables.py"))["main"]


@pytest.mark.parametrize(
    ("ours", "published", "larger_is_better", "expected"),
    [
        ((98.5, 0.3), (98.7, 0.4), True, "reproduced"),  # each in the other's
        ((98.0, 0.8), (98.7, 0.4), True, "reproduced"),  # the paper's in ours
        ((98.4, 0.1), (98.7, 0.4), True, "reproduced"),  # ours in the paper's
        ((98.0, 0.5), (98.7, 0.4), True, "worse"),  # the intervals overlap, but hold neither value
        ((99.4, 0.5), (98.7, 0.4), True, "better"),
        ((0.75, 0.25), (0.5, 0.0), False, "reproduced"),  # no interval printed, at the very edge of ours
        ((0.80, 0.25), (0.5, 0.0), False, "worse"),
        ((0.20, 0.25), (0.5, 0.0), False, "better"),
        ((-50.0, 1.0), (-40.4, 4.1), True, "worse"),
        ((-30.0, 1.0), (-40.4, 4.1), True, "better"),
        ((math.nan, math.nan), (0.5, 0.1), False, "worse"),
        ((math.nan, math.nan), (98.7, 0.4), True, "worse"),
    ],
)
def test_verdict_follows_from_either_interval_and_the_direction(
    ours: tuple[float, float], published: tuple[float, float], larger_is_better: bool, expected: str
) -> None:
    assert verdict(*ours, *published, larger_is_better) == expected


def compared(root: Path, ci: str = "", quoted: bool = False) -> Comparison:
    cell = Cell("table2_multitask", "MAML", "K5_gradsteps_1", "0.67", ci, quoted, SINUSOID, 1)
    return Comparison(cell, find_evidence(SINUSOID, find_runs(root)[0]))


@pytest.mark.parametrize(("mean", "status"), [(0.6, "reproduced"), (0.5, "better"), (0.9, "worse")])
def test_status_of_a_complete_run_is_its_verdict(tmp_path: Path, mean: float, status: str) -> None:
    make_run(tmp_path, mean=mean)
    assert compared(tmp_path).status == status


def test_status_uses_the_published_interval_where_there_is_one(tmp_path: Path) -> None:
    make_run(tmp_path, mean=0.9)
    assert compared(tmp_path, ci="0.3").status == "reproduced"


def test_status_is_measured_where_nothing_is_published(tmp_path: Path) -> None:
    make_run(tmp_path, mean=0.9, done=69_999, status="interrupted", seed=1)
    unpublished = replace(compared(tmp_path).cell, value="")
    assert Comparison(unpublished, compared(tmp_path).evidence).status == "reduced budget"
    make_run(tmp_path, mean=0.9)
    comparison = Comparison(unpublished, compared(tmp_path).evidence)
    assert comparison.status == "measured"
    assert "| MAML | K5_gradsteps_1 |  | 0.9 ± 0.1 | measured |" in table_markdown("T", [comparison])


def test_unfinished_run_with_the_papers_very_number_is_reduced_budget(tmp_path: Path) -> None:
    make_run(tmp_path, mean=0.67, done=69_999, status="interrupted")
    comparison = compared(tmp_path)
    assert comparison.status == "reduced budget"
    assert "| 0.670 ± 0.100 (69,999 of 70,000 iterations) | reduced budget |" in table_markdown("T", [comparison])


def test_status_without_a_number(tmp_path: Path) -> None:
    assert compared(tmp_path).status == "not run"
    assert compared(tmp_path, quoted=True).status == "quoted"
    make_run(tmp_path, evaluated=False, done=500, status="interrupted")
    assert "| 500 of 70,000 iterations | not run |" in table_markdown("T", [compared(tmp_path)])


def test_several_seeds_show_the_lowest_and_the_spread(tmp_path: Path) -> None:
    for seed, mean in enumerate([0.7, 0.61, 0.75]):
        make_run(tmp_path, mean=mean, seed=seed)
    comparison = compared(tmp_path)
    assert "| 0.700 ± 0.100 | reproduced | 0, 1, 2 (3: 0.610 to 0.750) | 2 |" in table_markdown("T", [comparison])
    (row,) = table_rows([comparison])
    assert (row["ours"], row["lowest_seed_mean"], row["highest_seed_mean"], row["seeds"]) == (0.7, 0.61, 0.75, "0 1 2")
    assert row["command"] == "python train.py -m +experiment=sinusoid_10shot seed=0,1,2"


def test_a_run_that_diverged_is_worse_and_shows_in_the_spread(tmp_path: Path) -> None:
    make_run(tmp_path, mean=None)
    assert "| 0.67 | diverged | worse |" in table_markdown("T", [compared(tmp_path)])
    make_run(tmp_path, mean=0.6, seed=1)
    assert "(2: nan to nan)" in table_markdown("T", [compared(tmp_path)])


def test_summary_counts_every_cell_once(tmp_path: Path) -> None:
    make_run(tmp_path, mean=0.67)
    make_run(tmp_path / "later", mean=0.67, done=1000, status="interrupted")
    comparisons = [compared(tmp_path), compared(tmp_path / "later"), compared(tmp_path, quoted=True)]
    assert summary(comparisons) == (
        "1 of 3 cells reproduced, 0 better, 0 worse, 0 measured, 1 reduced budget, 0 running, 0 not run, 1 quoted"
    )


def test_fresh_clone_renders_all_cells_as_not_run_or_quoted() -> None:
    tables = load_tables(RESULTS)
    comparisons = compare(tables, lambda source: Evidence())
    everything = [comparison for group in comparisons.values() for comparison in group]
    assert summary(everything).startswith("0 of 105 cells reproduced,")
    assert {comparison.status for comparison in everything} == {"not run", "quoted"}
    for table in tables:
        lines = table_markdown(table.title, comparisons[table.name]).splitlines()
        for cell in table.cells:
            status = "quoted" if cell.quoted else "not run"
            (line,) = (line for line in lines if line.startswith(f"| {cell.row} | {cell.column} | {cell.value}"))
            assert f"|  | {status} |" in line
            command = f"`{cell.source.command([])}`" if cell.source else "" if cell.quoted else "no experiment yet"
            assert line.endswith(f" {command} |")


def test_script_renders_runs_and_names_a_corrupt_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs, out = tmp_path / "runs", tmp_path / "out"
    make_run(runs, mean=0.67, ci95=0.1)
    assert main(["--runs-dir", str(runs), "--out", str(out)]) == 0
    overview = (out / "tables.md").read_text()
    assert capsys.readouterr().out.splitlines()[0] + "." in overview
    with open(out / "table2_multitask" / "table2_multitask.csv", newline="") as file:
        rows = {row["column"]: row for row in csv.DictReader(file) if row["row"] == "MAML"}
    assert [(row["ours"], row["status"]) for row in rows.values()] == [
        ("0.67", "reproduced"), ("0.67", "worse"), ("0.67", "worse"),
    ]  # fmt: skip

    corrupt = make_run(runs, seed=1) / "report.json"
    corrupt.write_text("{")
    assert main(["--runs-dir", str(runs), "--out", str(out)]) == 1
    assert f"**ERROR, left out:** {corrupt} is damaged" in (out / "tables.md").read_text()
    assert str(corrupt) in capsys.readouterr().err
    assert (out / "table2_multitask" / "table2_multitask.csv").read_text().count("reproduced") == 1


def test_headline_shows_a_number_once_though_two_tables_print_it(tmp_path: Path) -> None:
    make_run(tmp_path)
    comparison = compared(tmp_path)
    again = Comparison(replace(comparison.cell, table="another"), comparison.evidence)
    later = Comparison(replace(comparison.cell, step=5), comparison.evidence)
    lines = headline_markdown([comparison, again, later]).splitlines()[2:]
    assert [line.split(" |")[0] for line in lines] == ["| table2_multitask/MAML/K5_gradsteps_1"] * 2
