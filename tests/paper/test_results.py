"""``maml.results()``: its rows, its cells, and that it agrees with the tables."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import maml
from maml.errors import MamlError
from maml.paper.cells import load_tables
from maml.paper.evidence import find_evidence
from maml.record.index import find_runs, read_runs, supersede
from tests.paper.fake_runs import make_run
from tests.runs import ROOT

RESULTS = ROOT / "results"


@pytest.fixture(scope="module")
def committed() -> pd.DataFrame:
    return maml.results(RESULTS / "runs")


def test_each_number_says_which_cells_it_counts_for_and_what_the_paper_has(tmp_path: Path) -> None:
    make_run(tmp_path, mean=0.5)
    frame = maml.results(tmp_path)
    assert len(frame) == 3 * 11
    assert frame["cell"].isin(["", *(f"table2_multitask/MAML/K5_gradsteps_{step}" for step in (1, 5, 10))]).all()
    (row,) = frame[frame["cell"] == "table2_multitask/MAML/K5_gradsteps_5"].to_dict("records")
    assert (row["metric"], row["num_shots"], row["step"], row["mean"], row["paper"]) == ("mse", 5, 5, 0.5, 0.38)
    assert frame[frame["cell"] == ""]["paper"].isna().all()


def test_published_numbers_are_in_our_unit(committed: pd.DataFrame) -> None:
    published = committed[committed["metric"].str.startswith("accuracy") & committed["paper"].notna()]
    assert len(published) and published["paper_ci95"].notna().any()
    assert (published["paper"] < 1).all(), "the paper has percent"
    assert (published["paper_ci95"].dropna() < 0.1).all()


def test_per_task_rows_pair_runs_task_by_task(tmp_path: Path) -> None:
    make_run(tmp_path, mean=0.5)
    make_run(tmp_path, mean=0.25, seed=1)
    frame = maml.results(tmp_path, per_task=True, cells=False)
    end = frame[(frame["num_shots"] == 5) & (frame["step"] == 10)].pivot(index="task", columns="seed", values="value")
    assert len(end) == 600
    assert (end[0] - end[1]).to_numpy() == pytest.approx(0.25)


def test_superseded_runs_are_left_out_and_damaged_ones_with_a_warning(tmp_path: Path) -> None:
    for seed in (0, 1, 2):
        make_run(tmp_path, seed=seed, name=str(seed))
    supersede(read_runs(tmp_path)[0][1], None, "wrong")
    (tmp_path / "sinusoid_10shot" / "2" / "run.json").write_text("{")
    with pytest.warns(UserWarning, match=r"left out: .*run\.json is damaged"):
        frame = maml.results([tmp_path], cells=False)
    assert set(frame["seed"]) == {0}


def test_an_empty_folder_gives_no_rows(tmp_path: Path) -> None:
    frame = maml.results(tmp_path, settings=["inner.step_size"])
    assert len(frame) == len(maml.results(tmp_path, per_task=True)) == 0
    assert {"mean", "cell", "inner.step_size"} <= set(frame)


def test_wrong_folders_and_settings_are_refused(tmp_path: Path) -> None:
    make_run(tmp_path, mean=0.5)
    with pytest.raises(MamlError, match=r"there is no folder .*nothing; name the folder"):
        maml.results([tmp_path, tmp_path / "nothing"])
    with pytest.raises(MamlError, match=r"no run was trained with inner\.step_sise.*inner\.step_size"):
        maml.results(tmp_path, settings=["inner.step_sise"])


def test_means_over_runs_are_those_of_the_tables(committed: pd.DataFrame) -> None:
    means = committed[committed["cell"] != ""].assign(cell=lambda rows: rows["cell"].str.split(", ")).explode("cell")
    means = means.groupby("cell")["mean"].mean()
    runs, _ = find_runs(RESULTS / "runs")
    cells = [cell for table in load_tables(RESULTS) for cell in table.cells if cell.source]
    found = {
        f"{cell.table}/{cell.row}/{cell.column}": statistics.mean / cell.source.scale
        for cell in cells
        if cell.source and (statistics := find_evidence(cell.source, runs).statistics(cell.source, cell.step))
    }
    assert means.to_dict() == pytest.approx(found)


def test_settings_may_be_one_name_and_lists_can_be_grouped(tmp_path: Path) -> None:
    heads_adapt: dict[str, Any] = {"inner.adapt": ["head.*"]}
    make_run(tmp_path, mean=0.5, **heads_adapt)
    frame = maml.results(tmp_path, settings="inner.adapt", cells=False)
    assert [*frame.groupby("inner.adapt").groups] == [("head.*",)]
    assert maml.results(tmp_path, settings=["inner.adapt"])["paper"].dtype == float
