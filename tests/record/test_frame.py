"""Runs as DataFrames: what the rows say, and that a foreign run makes nothing be imported."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from maml.errors import MamlError
from maml.record.frame import NUMBER, UNKNOWN, check_key, number_frame, run_frame, setting, task_frame
from maml.record.index import find_runs, read_runs
from tests.paper.fake_runs import add_evaluation, edit, make_run, make_run_with_own_classes


def test_run_frame_has_a_row_per_run_evaluated_or_not(tmp_path: Path) -> None:
    make_run(tmp_path, mean=0.5)
    make_run(tmp_path, seed=1, done=500, evaluated=False, status="interrupted")
    frame = run_frame(read_runs(tmp_path)[0]).set_index("seed")
    assert frame["status"].to_dict() == {0: "finished", 1: "interrupted"}
    assert frame.loc[0, ["metric", "num_shots", "step", "mean"]].tolist() == ["mse", 5, 10, 0.5]
    assert frame.loc[1, "mean"] is None


def test_number_frame_has_every_number_once_and_the_settings_that_are_asked_for(tmp_path: Path) -> None:
    make_run(tmp_path, mean=0.5)
    other: dict[str, Any] = {"inner.step_size": 0.5}
    make_run(tmp_path, mean=None, seed=1, **other)
    frame = number_frame(find_runs(tmp_path)[0], ["inner.step_size", "model.activation", "no.such"])
    assert len(frame) == len(frame.drop_duplicates(NUMBER)) == 2 * 3 * 11
    assert frame.groupby("seed")["inner.step_size"].unique().map(list).to_dict() == {0: [0.001], 1: [0.5]}
    assert set(frame["model.activation"]) == {"relu"}  # a default, which runs do not record
    assert frame["no.such"].isna().all()
    assert frame[frame["seed"] == 1]["mean"].isna().all()


def test_iteration_of_a_number_is_that_of_its_evaluation(tmp_path: Path) -> None:
    folder = make_run(tmp_path, done=500, status="interrupted")
    (segment,) = json.loads((folder / "run.json").read_text())["segments"]
    edit(folder / "run.json", segments=[segment | {"last_iteration": 900}])
    add_evaluation(make_run(tmp_path, seed=1), iteration=600)
    runs, _ = find_runs(tmp_path)
    (row,) = run_frame(runs).query("seed == 0").to_dict("records")
    assert (row["iteration"], row["evaluated_at"]) == (900, 500)
    assert sorted(number_frame(runs)["iteration"].unique()) == [500, 600, 70_000]


def test_default_of_an_own_class_is_that_of_the_config(tmp_path: Path) -> None:
    folder = make_run_with_own_classes(tmp_path)
    other: dict[str, Any] = {"algorithm.strength": 0.5, "model.module.width": 4}
    make_run_with_own_classes(tmp_path, seed=1, **other)
    make_run(tmp_path, seed=2)
    keys = list(other)
    runs, _ = find_runs(tmp_path)
    frame = number_frame(runs, [*keys, "algorithm.omitted"]).drop_duplicates("seed").set_index("seed")
    assert frame.loc[[0, 1], keys].to_numpy().tolist() == [[0.01, 8.0], [0.5, 4.0]]
    assert frame.loc[2, keys].isna().all()
    assert frame["algorithm.omitted"].isna().all()
    for key in keys:
        check_key([run for run in runs if run.path == folder], key)
    with pytest.raises(MamlError, match=r"did you mean algorithm\.strength\?"):
        check_key(runs, "algorithm.strenght")
    for damage in (lambda file: file.write_text("{"), Path.unlink):
        damage(folder / "config.yaml")
        (run,) = [run for run in find_runs(tmp_path)[0] if run.path == folder]
        assert run.training == run.record.training


def test_task_frame_means_are_the_numbers(tmp_path: Path) -> None:
    make_run(tmp_path, mean=0.5)
    make_run(tmp_path, mean=0.25, seed=1)
    runs, _ = find_runs(tmp_path)
    means = task_frame(runs).groupby(NUMBER)["value"].mean()
    assert len(means) == 2 * 3 * 11
    expected = number_frame(runs).set_index(NUMBER)["mean"]
    assert (means - expected).abs().max() < 1e-6


def test_task_frame_names_a_missing_file(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    (folder / "tasks.csv").unlink()
    with pytest.raises(MamlError, match=r"tasks\.csv is missing or damaged"):
        task_frame(find_runs(tmp_path)[0])


def test_without_runs_the_columns_are_the_same(tmp_path: Path) -> None:
    empty = number_frame([])
    make_run(tmp_path)
    assert list(empty) == list(number_frame(find_runs(tmp_path)[0]))
    assert list(task_frame([])) == list(task_frame(find_runs(tmp_path)[0]))


def test_a_default_is_looked_up_in_this_package_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "brought_along.py").write_text("class Net:\n    def __init__(self, size=3): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert setting({"model._target_": "brought_along.Net"}, "model.size") is UNKNOWN
    assert "brought_along" not in sys.modules
    assert setting({"model._target_": "maml.model.mlp.MLP"}, "model.activation") == "relu"
