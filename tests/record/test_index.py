"""Finding runs: those with the right settings, complete ones first, and no damaged ones."""

import fcntl
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from maml.config.paths import CONF
from maml.record.index import SUPERSEDED, conflicts_among, find_runs, read_run, read_runs, supersede
from tests.paper.fake_runs import edit, make_run, write


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"mean": 0.5004}, ""),  # differs by less than one query image in 600 tasks
        ({"mean": 0.52}, "is 0.52, not 0.5"),
        ({"mean": None}, "is diverged, not 0.5"),
        ({"mean": 0.9, "seed": 1}, ""),
        ({"mean": 0.9, "done": 69_999}, ""),
        ({"mean": 0.9, "meta_batch_size": 26}, ""),
    ],
)
def test_only_equal_settings_seed_and_iteration_can_disagree(
    tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    make_run(tmp_path, mean=0.5, name="a")
    make_run(tmp_path, name="b", **change)
    conflicts = conflicts_among(find_runs(tmp_path)[0])
    assert [named in conflict for conflict in conflicts] == ([True] if named else [])


@pytest.mark.parametrize("change", ["hardware", "versions", "threads", "compiled", "segments"])
def test_only_an_equal_environment_can_contradict(tmp_path: Path, change: str) -> None:
    first, second = (make_run(tmp_path, mean=mean, name=name) for mean, name in ((0.5, "a"), (0.52, "b")))
    (segment,) = json.loads((second / "run.json").read_text())["segments"]
    known = segment | {"versions": {"torch": "2.12"}, "execution": {"num_threads": 1}}
    for folder in (first, second):
        edit(folder / "run.json", segments=[known])
    assert {run.status for run in find_runs(tmp_path)[0]} == {"conflict"}
    other = {
        "hardware": [known | {"hardware": known["hardware"] | {"cpu": "Slide rule"}}],
        "versions": [known | {"versions": {"torch": "2.13"}}],
        "threads": [known | {"execution": {"num_threads": 2}}],
        "compiled": [known | {"execution": {"num_threads": 1, "compile": True}}],
        "segments": [known, known | {"hardware": known["hardware"] | {"cpu": "Slide rule"}}],
    }
    edit(second / "run.json", segments=other[change])
    assert {run.status for run in find_runs(tmp_path)[0]} == {"finished"}
    for folder in (first, second):
        edit(folder / "run.json", segments=other["segments"])
    assert {run.status for run in find_runs(tmp_path)[0]} == {"finished"}, "neither was trained in one environment"


def test_other_task_banks_contradict_and_a_curve_that_only_one_has_does_not(tmp_path: Path) -> None:
    make_run(tmp_path, name="a")
    report = make_run(tmp_path, name="b") / "report.json"
    banks, curves = (json.loads(report.read_text())[name] for name in ("banks", "curves"))
    edit(report, banks=banks | {"5": "another"})
    assert "but its task banks are different" in conflicts_among(find_runs(tmp_path)[0])[0]
    edit(report, banks=banks, curves=curves[1:])
    assert conflicts_among(find_runs(tmp_path)[0]) == []


def test_a_root_that_is_given_twice_has_no_more_runs(tmp_path: Path) -> None:
    for root in ("b", "a"):
        make_run(tmp_path / root)
    again = tmp_path / "a" / ".." / "b"
    runs, _ = find_runs(tmp_path / "b", tmp_path / "a", again)
    assert [run.path.parents[1] for run in runs] == [tmp_path / "b", tmp_path / "a"]


def test_a_mark_that_may_be_committed_names_no_machines_path(tmp_path: Path) -> None:
    make_run(tmp_path)
    (mine,), _ = read_runs(tmp_path)
    supersede(mine, replace(mine, path=CONF.parent / "results" / "runs" / "sinusoid_10shot" / "0a"), "")
    assert str(read_runs(tmp_path)[0][0].superseded) == "superseded by results/runs/sinusoid_10shot/0a"


def test_a_damaged_mark_discredits_the_folder(tmp_path: Path) -> None:
    (make_run(tmp_path) / SUPERSEDED).write_text('{"by": 3}')
    runs, problems = read_runs(tmp_path)
    assert (runs, len(problems)) == ([], 1)
    assert f"{SUPERSEDED} is damaged" in problems[0]


def test_headline_is_the_end_of_the_curve_at_the_k_of_training() -> None:
    folder = CONF.parent / "results" / "runs" / "sinusoid_10shot" / "8374a9db09bf"
    run = read_run(folder)
    assert run
    assert run.headline
    curve, end = run.headline
    assert (curve.metric, curve.num_shots, end.step) == ("mse", 10, 10)
    assert end.mean == json.loads((folder / "report.json").read_text())["headline"]


def test_headline_of_curves_that_end_alike_is_that_of_the_recorded_k(tmp_path: Path) -> None:
    path = make_run(tmp_path, mean=1.0) / "report.json"
    content = json.loads(path.read_text())
    for curve in content["curves"]:
        write(path, content | {"headline_num_shots": curve["num_shots"]})
        run = read_run(path.parent)
        assert run and run.headline
        assert run.headline[0].num_shots == curve["num_shots"]


def test_report_of_the_furthest_iteration_stands_for_a_run(tmp_path: Path) -> None:
    folder = make_run(tmp_path, mean=0.5, done=500, status="interrupted")
    write(
        folder / "evaluations" / "0b" / "report.json", json.loads((folder / "evaluations/0a/report.json").read_text())
    )
    edit(folder / "evaluations" / "0b" / "report.json", iteration=400)
    run = read_run(folder)
    assert run
    assert run.report
    assert run.report.iteration == 500
    assert read_run(make_run(tmp_path, seed=1, evaluated=False)).headline is None  # type: ignore[union-attr]


@pytest.mark.parametrize("status", ["running", "interrupted", "finished"])
def test_a_run_that_was_killed_after_its_evaluation_is_called_finished(tmp_path: Path, status: str) -> None:
    make_run(tmp_path, status=status)
    make_run(tmp_path, seed=1, done=20, status="interrupted")
    assert sorted(run.status for run in read_runs(tmp_path)[0]) == ["finished", "interrupted"]


def test_a_run_that_was_killed_is_not_called_running(tmp_path: Path) -> None:
    folder = make_run(tmp_path, done=12_000, evaluated=False, status="running")
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert [run.status for run in read_runs(tmp_path)[0]] == ["running"]
    assert [run.status for run in read_runs(tmp_path)[0]] == ["killed"]


def test_two_thousand_runs_are_read_in_seconds(tmp_path: Path) -> None:
    first = make_run(tmp_path)
    record, report = (json.loads((first / name).read_text()) for name in ("run.json", "report.json"))
    for seed in range(1, 2000):
        folder, own = tmp_path / f"experiment_{seed % 20}" / f"{seed:06x}", {"seed": seed, "run_id": f"{seed:06x}"}
        write(folder / "run.json", record | own | {"training": record["training"] | {"seed": seed}})
        write(folder / "report.json", report | own)
    start = time.process_time()
    runs, problems = find_runs(tmp_path)
    assert (len(runs), problems) == (2000, [])
    assert time.process_time() - start < 10  # 0.9 s on a 2.5 GHz core; no more is asserted, as machines differ


def test_a_damaged_second_evaluation_discredits_the_folder(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    second = folder / "evaluations" / "0b" / "report.json"
    second.parent.mkdir(parents=True)
    second.write_text("")
    runs, damaged = find_runs(tmp_path)
    assert runs == []
    assert str(second) in damaged[0]


def test_a_folder_in_which_nothing_was_recorded_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "sinusoid_10shot" / "0a").mkdir(parents=True)
    (tmp_path / "sinusoid_10shot" / "0a" / "lock").touch()
    assert find_runs(tmp_path) == ([], [])
