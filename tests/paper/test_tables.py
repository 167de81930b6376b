"""Verdicts, and the rendered tables with and without runs."""

import csv
import json
import math
import re
import runpy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from maml.paper.cells import Cell, Layout, Table, load_figures, load_tables
from maml.paper.evidence import Evidence, find_evidence
from maml.paper.figures import CurveComparison
from maml.paper.tables import (
    CONFLICT,
    COUNTED_TWICE,
    NO_REASON,
    SYMBOLS,
    TRANSDUCTIVE,
    UNPRINTED,
    Comparison,
    bold_cells,
    compare,
    headline_markdown,
    judge,
    reason_for,
    summary,
    table_markdown,
    table_rows,
    verdict_markdown,
)
from maml.record.contents import Source
from maml.record.index import find_runs
from tests.paper.fake_runs import SINUSOID, make_run
from tests.paper.printed import num_added, printed_tables

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results"
main = runpy.run_path(str(ROOT / "scripts" / "paper_tables.py"))["main"]


def test_legend_has_the_accuracies_of_the_committed_run() -> None:
    (path,) = (RESULTS / "runs" / "omniglot_5way_1shot").glob("264f020e4f39/report.json")
    ends = {curve["metric"]: curve["steps"][-1] for curve in json.loads(path.read_text())["curves"]}
    readme = (ROOT / "README.md").read_text()
    for metric in ("accuracy_inductive", "accuracy_transductive"):
        assert f"{100 * ends[metric]['mean']:.2f} ± {100 * ends[metric]['ci95']:.2f}" in TRANSDUCTIVE
        assert f"{100 * ends[metric]['mean']:.2f}" in readme


def table_of(*comparisons: Comparison, note: str = "") -> Table:
    """Returns a table of one row."""
    cells = tuple(comparison.cell for comparison in comparisons)
    columns = {cell.column: [cell.column] for cell in cells}
    return Table("table9", "T", cells, Layout("", columns, [{cells[0].row: "the method"}]), note)


def rendered(*comparisons: Comparison) -> str:
    return table_markdown(table_of(*comparisons), comparisons)


def test_remark_on_a_table_stands_above_it(tmp_path: Path) -> None:
    comparison = compared(tmp_path)
    text = table_markdown(table_of(comparison, note="A remark."), [comparison])
    assert "1 not run. A remark.\n\n| " in text
    assert "1 not run.\n\n| " in rendered(comparison)


@pytest.mark.parametrize(
    ("ours", "published", "larger_is_better", "expected"),
    [
        ((98.5, 0.3), (98.7, 0.4), True, "reproduced"),  # each value lies in the other's interval
        ((98.0, 0.8), (98.7, 0.4), True, "reproduced"),  # the paper's value lies in our interval
        ((98.4, 0.1), (98.7, 0.4), True, "reproduced"),  # our value lies in the paper's interval
        ((98.0, 0.5), (98.7, 0.4), True, "worse"),  # the intervals overlap, but contain neither value
        ((99.4, 0.5), (98.7, 0.4), True, "better"),
        ((0.75, 0.25), (0.5, 0.0), False, "reproduced"),  # no printed interval; the value is at the edge of ours
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
    assert judge(*ours, *published, larger_is_better) == expected


def compared(root: Path, ci: str = "", quoted: bool = False, source: Source | None = SINUSOID) -> Comparison:
    cell = Cell("table2_multitask", "MAML", "K5_gradsteps_1", "0.67", ci, quoted, source, 1)
    return Comparison(cell, find_evidence(SINUSOID, find_runs(root)[0]))


@pytest.mark.parametrize(("mean", "expected"), [(0.6, "reproduced"), (0.5, "better"), (0.9, "worse")])
def test_verdict_on_a_complete_run_compares_it(tmp_path: Path, mean: float, expected: str) -> None:
    make_run(tmp_path, mean=mean)
    assert compared(tmp_path).verdict == expected


def test_verdict_uses_the_published_interval_where_there_is_one(tmp_path: Path) -> None:
    make_run(tmp_path, mean=0.9)
    assert compared(tmp_path, ci="0.3").verdict == "reproduced"


def test_verdict_is_measured_where_nothing_is_published(tmp_path: Path) -> None:
    make_run(tmp_path, mean=0.9, done=69_999, status="interrupted", seed=1)
    unpublished = replace(compared(tmp_path).cell, value="")
    assert Comparison(unpublished, compared(tmp_path).evidence).verdict == "reduced budget"
    make_run(tmp_path, mean=0.9)
    comparison = Comparison(unpublished, compared(tmp_path).evidence)
    assert comparison.verdict == "measured"
    assert "| MAML | K5_gradsteps_1 |  | 0.9 ± 0.1 | measured |" in rendered(comparison)


def test_unfinished_run_with_the_papers_very_number_is_reduced_budget(tmp_path: Path) -> None:
    make_run(tmp_path, mean=0.67, done=69_999, status="interrupted")
    comparison = compared(tmp_path)
    assert comparison.verdict == "reduced budget"
    assert "| 0.670 ± 0.100 (69,999 of 70,000 iterations) | [reduced budget](../notes.md#reduced-budget) |" in rendered(
        comparison
    )


def test_verdict_without_a_number(tmp_path: Path) -> None:
    assert compared(tmp_path).verdict == "not run"
    assert compared(tmp_path, quoted=True, source=None).verdict == "quoted"
    make_run(tmp_path, evaluated=False, done=500, status="interrupted")
    assert "| 500 of 70,000 iterations | not run |" in rendered(compared(tmp_path))


def test_several_runs_show_their_mean_range_and_both_intervals(tmp_path: Path) -> None:
    means = [0.7, 0.61, 0.75]
    for seed, mean in enumerate(means):
        make_run(tmp_path, mean=mean, seed=seed)
    comparison = compared(tmp_path)
    tasks = 1.96 * np.linspace(-1, 1, 600).std() / math.sqrt(600)  # all runs differ from task to task in the same way
    both = math.sqrt(tasks**2 + 4.303**2 * np.var(means, ddof=1) / 3)
    runs = f"3: 0.610 to 0.750 (± {tasks:.3f}); the paper's value is better than 2 of them; seeds 0, 1, 2"
    assert f"| 0.687 ± {both:.3f} | reproduced | {runs} | 2 |" in rendered(comparison)
    (row,) = table_rows([comparison])
    assert (row["ours"], row["ours_ci95"], row["tasks_ci95"]) == pytest.approx((np.mean(means), both, tasks), rel=1e-4)
    assert (row["num_runs"], row["lowest_run"], row["highest_run"], row["seeds"]) == (3, 0.61, 0.75, "0 1 2")
    assert row["command"] == "python train.py -m +experiment=sinusoid_10shot seed=0,1,2"


@pytest.mark.parametrize(
    ("means", "expected"),
    [
        ((0.9, 1.0, 2.0), "worse"),  # one failed training; the interval over trainings reaches from -0.1 to 2.7
        ((0.9, 1.0, 0.5), "reproduced"),  # the paper's 0.67 lies between runs
        ((0.7, 1.0, 2.0), "reproduced"),  # the first run agrees by the interval over test tasks
        ((0.2, 0.3, 0.5), "better"),
    ],
)
def test_a_failed_training_does_not_make_a_number_reproduced(
    tmp_path: Path, means: tuple[float, ...], expected: str
) -> None:
    for seed, mean in enumerate(means):
        make_run(tmp_path, mean=mean, seed=seed)
    comparison = compared(tmp_path)
    found = comparison.statistics
    assert found is not None and abs(found.mean - 0.67) <= found.ci95, "the interval over trainings holds the value"
    assert comparison.verdict == expected


@pytest.mark.parametrize(("means", "place"), [((0.6, 0.5), "none"), ((0.7, 0.8), "all"), ((0.6, 0.7), "1")])
def test_place_of_the_papers_number_is_said_in_words(tmp_path: Path, means: tuple[float, float], place: str) -> None:
    for seed, mean in enumerate(means):
        make_run(tmp_path, mean=mean, seed=seed)
    assert compared(tmp_path).place_text == f"the paper's value is better than {place} of them"


def test_the_same_seed_on_another_machine_is_one_more_run(tmp_path: Path) -> None:
    make_run(tmp_path / "a", mean=0.6)
    make_run(tmp_path / "b", mean=0.8, cpu="Slide rule")
    make_run(tmp_path / "c", mean=0.8, cpu="Astrolabe")  # a copy, by its numbers
    cell = compared(tmp_path / "a").cell
    runs, damaged = find_runs(*(tmp_path / name for name in "abc"))
    comparison = Comparison(cell, find_evidence(SINUSOID, runs))
    assert damaged == comparison.evidence.conflicts == []
    assert comparison.statistics
    assert comparison.statistics.means == (0.6, 0.8)
    assert "CPU, Abacus; CPU, Slide rule" in rendered(comparison)


def test_runs_that_contradict_each_other_are_both_counted_and_marked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [make_run(tmp_path / "runs", mean=mean, name=str(mean)) for mean in (0.6, 0.8)]
    comparison = compared(tmp_path / "runs")
    assert comparison.ours
    assert comparison.ours[0] == pytest.approx(0.7)
    text = rendered(comparison)
    assert f"| ours | 0.700 ± 0.046 ={CONFLICT} |" in text
    assert f"| {CONFLICT} 2: 0.600 to 0.800" in text
    assert main(["--runs-dir", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 0
    message = f"{runs[1]} has the settings, the seed, the hardware and the versions of {runs[0]}, but"
    assert f"NOTE: {message}" in capsys.readouterr().err
    assert f"**{CONFLICT}** {message}" in (tmp_path / "out" / "tables.md").read_text()


def test_a_run_that_diverged_is_worse_and_shows_among_the_runs(tmp_path: Path) -> None:
    make_run(tmp_path, mean=None)
    assert f"| 0.67 | diverged | worse, {NO_REASON} |" in rendered(compared(tmp_path))
    make_run(tmp_path, mean=0.6, seed=1)
    assert "| 1 of 2 diverged; seeds 0, 1 |" in rendered(compared(tmp_path))


def test_quoted_number_with_an_experiment_is_judged_as_any_other(tmp_path: Path) -> None:
    assert compared(tmp_path, quoted=True).verdict == "not run"
    make_run(tmp_path, mean=0.67)
    assert compared(tmp_path, quoted=True).verdict == "reproduced"


def test_summary_counts_every_cell_once(tmp_path: Path) -> None:
    make_run(tmp_path, mean=0.67)
    make_run(tmp_path / "later", mean=0.67, done=1000, status="interrupted")
    comparisons = [compared(tmp_path), compared(tmp_path / "later"), compared(tmp_path, quoted=True, source=None)]
    assert summary(comparisons) == ("1 of 3 cells reproduced, 0 better, 0 worse, 1 reduced budget, 1 quoted, 0 not run")


def test_every_cell_has_an_experiment_and_a_fresh_clone_has_run_none() -> None:
    tables = printed_tables()
    comparisons = compare(tables, lambda source: Evidence())
    everything = [comparison for group in comparisons.values() for comparison in group]
    assert summary(everything) == ("0 of 123 cells reproduced, 0 better, 0 worse, 0 reduced budget, 123 not run")
    assert {comparison.verdict for comparison in everything} == {"not run"}
    for table in tables:
        lines = table_markdown(table, comparisons[table.name]).splitlines()
        for cell in table.cells:
            assert cell.source
            (line,) = (line for line in lines if line.startswith(f"| {cell.row} | {cell.column} | {cell.value}"))
            assert "|  | not run |" in line
            assert line.endswith(f" `{cell.source.command([])}` |")


def test_script_renders_runs_and_names_a_corrupt_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs, out = tmp_path / "runs", tmp_path / "out"
    make_run(runs, mean=0.67, ci95=0.1)
    assert main(["--runs-dir", str(runs), "--out", str(out)]) == 0
    overview = (out / "tables.md").read_text()
    counted, beside, _ = capsys.readouterr().out.splitlines()
    assert counted == "1 of 71 cells reproduced, 0 better, 2 worse, 0 reduced budget, 68 not run"
    assert beside == (
        "Not in the paper, counted separately: "
        f"0 of {52 + num_added()} cells reproduced, 0 better, 0 worse, 0 reduced budget, {52 + num_added()} not run"
    )
    assert f"{counted}.\n\n{beside}." in overview
    assert COUNTED_TWICE in overview and UNPRINTED in overview
    with open(out / "table2_multitask" / "table2_multitask.csv", newline="") as file:
        rows = {row["column"]: row for row in csv.DictReader(file) if row["row"] == "MAML"}
    assert [(row["ours"], row["verdict"]) for row in rows.values()] == [
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


# All but two numbers of the paper's own method are printed in bold, and no other numbers.
OWN = {
    "table1_omniglot": {"MAML_noconv", "MAML_conv"},
    "table1_miniimagenet": {"FOMAML", "MAML"},
    "table2_multitask": {"MAML"},
    "table3_context_omniglot": {"MAML"},
    "table4_pointmass": {"MAML"},
    "table5_cheetah_dir": {"MAML"},
}
NOT_BOLD = {("table4_pointmass", "MAML", "gradsteps_3"), ("table5_cheetah_dir", "MAML", "gradsteps_0")}


def test_bold_is_what_the_paper_prints_in_bold() -> None:
    for table in load_tables(RESULTS):
        own = {(cell.row, cell.column) for cell in table.cells if cell.row in OWN.get(table.name, ())}
        assert table.layout.own == frozenset(OWN.get(table.name, ()))
        assert bold_cells(table) == {place for place in own if (table.name, *place) not in NOT_BOLD}


def test_layout_has_every_row_and_column_of_the_printed_table() -> None:
    for table in load_tables(RESULTS):
        rows = [row for group in table.layout.groups for row in group]
        assert rows == sorted(rows, key=rows.index)
        assert set(rows) == {cell.row for cell in table.cells}
        assert len(rows) == len(set(rows))
        assert set(table.layout.columns) == {cell.column for cell in table.cells}
        assert len({len(words) for words in table.layout.columns.values()}) == 1


def test_markdown_has_the_papers_layout_with_ours_and_the_verdict_below_each_row() -> None:
    (table,) = (table for table in load_tables(RESULTS) if table.name == "table1_omniglot")
    lines = table_markdown(table, compare([table], lambda source: Evidence())[table.name]).splitlines()
    assert lines[4:10] == [
        "| Omniglot (Lake et al., 2011) | 5-way Accuracy 1-shot | 5-way Accuracy 5-shot | 20-way Accuracy 1-shot "
        "| 20-way Accuracy 5-shot |",
        "| --- | --- | --- | --- | --- |",
        "| MANN, no conv (Santoro et al., 2016) † | 82.8 | 94.9 | – | – |",  # noqa: RUF001 - the paper's dash
        "| ours | not run | not run |  |  |",
        "| **MAML, no conv** | **89.7 ± 1.1** | **97.5 ± 0.6** | – | – |",  # noqa: RUF001
        "| ours | not run | not run |  |  |",
    ]


def test_layout_shows_symbol_runs_and_their_range(tmp_path: Path) -> None:
    for seed, mean in enumerate([0.7, 0.61]):
        make_run(tmp_path, mean=mean, seed=seed)
    text = rendered(compared(tmp_path))
    assert "| ours | 0.655 ± 0.046 = |\n| runs | 2: 0.610 to 0.700 (± 0.046) |" in text


def test_an_interval_that_only_the_figure_has_is_not_printed_in_the_layout() -> None:
    (table,) = (table for table in load_tables(RESULTS) if table.name == "table4_pointmass")
    text = table_markdown(table, compare([table], lambda source: Evidence())[table.name])
    assert "| **MAML** | **-40.41** | **-11.68** | **-3.33** | -3.23 |" in text
    assert "| MAML | gradsteps_0 | -40.41 ± 4.06 |" in text
    assert UNPRINTED in text


def test_a_miss_has_its_note_or_says_that_no_reason_is_known() -> None:
    for verdict in ("reproduced", "measured", "quoted", "running", "not run"):
        assert reason_for(verdict, "anchor") == ""
        assert verdict_markdown(verdict, "", "notes.md") == verdict
    assert reason_for("reduced budget", "anchor") == "reduced-budget"
    for verdict in ("better", "worse"):
        link = f"[{verdict}](../notes.md#anchor)"
        assert verdict_markdown(verdict, reason_for(verdict, "anchor"), "../notes.md") == link
        assert verdict_markdown(verdict, reason_for(verdict, ""), "notes.md") == f"{verdict}, no reason known yet"


def test_every_note_is_a_section() -> None:
    anchors = re.findall(r'<a id="([a-z0-9-]+)"></a>\n\n## ', (RESULTS / "notes.md").read_text())
    assert len(anchors) == len(set(anchors)) == (RESULTS / "notes.md").read_text().count("\n## ")
    cells = [cell.note for table in load_tables(RESULTS) for cell in table.cells]
    curves = [curve.note for figure in load_figures(RESULTS) for curve in figure.curves]
    assert {*cells, *curves, "reduced-budget"} - {""} <= set(anchors)


def test_every_miss_among_the_committed_runs_has_a_reason() -> None:
    runs, damaged = find_runs(RESULTS / "runs")
    assert not damaged
    tables = compare(load_tables(RESULTS), lambda source: find_evidence(source, runs))
    judged: list[Comparison | CurveComparison] = [item for group in tables.values() for item in group]
    for figure in load_figures(RESULTS):
        judged += [CurveComparison(curve, find_evidence(curve.source, runs)) for curve in figure.curves]
    misses = [item for item in judged if item.verdict in ("better", "worse", "reduced budget")]
    assert misses
    assert all(item.reason for item in misses)


def test_rendering_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    make_run(tmp_path / "runs", mean=0.67)
    for name in ("one", "two"):
        assert main(["--runs-dir", str(tmp_path / "runs"), "--out", str(tmp_path / name)]) == 0
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / n).rglob("*.*") if p.is_file()} for n in ("one", "two"))
    assert one == two
    assert {Path(name).suffix for name in one} == {".md", ".csv", ".tex"}
    assert len(one) == 3 * 9 + 4
    assert set(SYMBOLS) == {"reproduced", "better", "worse", "reduced budget", "quoted"}


def test_lost_values_per_task_are_named_and_widen_the_interval(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [make_run(tmp_path / "runs", mean=mean, seed=seed) for seed, mean in enumerate((0.6, 0.7, 0.8))]
    before = compared(tmp_path / "runs").ours
    (folders[2] / "tasks.csv").unlink()
    after = compared(tmp_path / "runs").ours
    assert before
    assert after
    assert before[0] == after[0]
    assert before[1] < after[1]
    assert main(["--runs-dir", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 0
    errors = capsys.readouterr().err.splitlines()
    assert [line.startswith(f"NOTE: {folders[2] / 'tasks.csv'} is missing or damaged") for line in errors] == [True]
