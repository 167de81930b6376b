"""The runs behind a number: which count, and what stands beside the number."""

import fcntl
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from maml.errors import MamlError
from maml.paper.evidence import Evidence, find_evidence, provenance
from maml.record.index import SUPERSEDED, find_runs, read_runs, supersede
from tests.paper.fake_runs import SINUSOID, add_evaluation, edit, make_run
from tests.runs import file_contents


def evidence(*roots: Path) -> Evidence:
    runs, damaged = find_runs(*roots)
    assert damaged == []
    return find_evidence(SINUSOID, runs)


def readings(found: Evidence) -> list[float]:
    return [report.reading(SINUSOID, 1)[0] for _, report in found.evaluated]


def test_without_runs_there_is_no_evidence(tmp_path: Path) -> None:
    assert evidence(tmp_path, tmp_path / "absent") == Evidence()
    assert evidence(tmp_path).state == "not run"


def test_a_complete_run_is_preferred_to_one_that_is_not(tmp_path: Path) -> None:
    make_run(tmp_path, mean=1.0, done=69_000, name="a")
    make_run(tmp_path, mean=2.0, done=70_000, name="b")
    make_run(tmp_path, mean=3.0, done=69_999, name="c", status="interrupted")
    found = evidence(tmp_path)
    assert (readings(found), found.state, found.progress) == ([2.0], "finished", "")


def test_of_unfinished_runs_the_furthest_counts_and_is_reduced_budget(tmp_path: Path) -> None:
    for name, done in (("a", 1000), ("b", 30_000), ("c", 2000)):
        make_run(tmp_path, mean=done, done=done, seed=len(name), name=name, status="interrupted")
    found = evidence(tmp_path)
    assert (readings(found), found.state) == ([30_000], "reduced budget")
    assert found.progress == "30,000 of 70,000 iterations"


def test_newest_evaluation_of_a_run_counts(tmp_path: Path) -> None:
    add_evaluation(make_run(tmp_path, mean=0.5), iteration=500)
    found = evidence(tmp_path)
    assert [report.iteration for _, report in found.evaluated] == [70_000]
    assert found.state == "finished"


def test_seeds_are_gathered_lowest_first_and_equal_ones_counted_once(tmp_path: Path) -> None:
    for seed in (2, 0, 1):
        make_run(tmp_path / "local", mean=seed, seed=seed)
    make_run(tmp_path / "committed", mean=0.0, seed=0)
    for roots in (("local", "committed"), ("committed", "local")):
        found = evidence(*(tmp_path / root for root in roots))
        assert readings(found) == [0, 1, 2]
        assert found.evaluated[0][0].path.is_relative_to(tmp_path / roots[0])


def test_equal_runs_that_contradict_each_other_are_both_counted_and_named(tmp_path: Path) -> None:
    local, committed = (make_run(tmp_path / root, mean=mean) for root, mean in (("local", 0.5), ("committed", 0.6)))
    make_run(tmp_path / "committed", mean=0.7, seed=1)
    found = evidence(tmp_path / "local", tmp_path / "committed")
    assert readings(found) == [0.5, 0.6, 0.7]
    (message,) = found.conflicts
    assert (
        f"{committed} has the settings, the seed, the hardware and the versions of {local}, but mse at K=5" in message
    )
    assert "is 0.6, not 0.5" in message
    every, _ = read_runs(tmp_path / "local", tmp_path / "committed")
    assert {run.path for run in every if run.status == "conflict"} == {local, committed}


def test_another_machine_with_other_numbers_is_one_more_sample(tmp_path: Path) -> None:
    make_run(tmp_path / "local", mean=0.5)
    make_run(tmp_path / "committed", mean=0.6, cpu="Slide rule")
    found = evidence(tmp_path / "local", tmp_path / "committed")
    assert (readings(found), found.conflicts) == ([0.5, 0.6], [])
    assert provenance(SINUSOID, found)["hardware"] == "CPU, Abacus; CPU, Slide rule"
    assert provenance(SINUSOID, found)["command"] == "python train.py +experiment=sinusoid_10shot"


def test_statistics_use_common_tasks_only(tmp_path: Path) -> None:
    for seed, mean in enumerate((0.5, 0.6, 0.8)):
        folder = make_run(tmp_path, mean=mean, seed=seed)
    paired = evidence(tmp_path).statistics(SINUSOID, 1)
    assert paired
    assert paired.mean == pytest.approx(1.9 / 3)
    banks = json.loads((folder / "report.json").read_text())["banks"]
    edit(folder / "report.json", banks=banks | {"5": "another"})
    apart = evidence(tmp_path).statistics(SINUSOID, 1)
    assert apart
    assert (apart.mean, apart.tasks_ci95) == (paired.mean, pytest.approx(0.1))  # that of the reports
    edit(folder / "report.json", banks=banks)
    assert evidence(tmp_path).missing_values(SINUSOID, 1) == ""
    (folder / "tasks.csv").unlink()
    assert evidence(tmp_path).statistics(SINUSOID, 1) == apart
    assert f"{folder / 'tasks.csv'} is missing" in evidence(tmp_path).missing_values(SINUSOID, 1)
    assert Evidence().statistics(SINUSOID, 1) is None


def test_of_runs_on_different_tasks_the_first_stands_for_all(tmp_path: Path) -> None:
    other, folder = (make_run(tmp_path, mean=mean, seed=seed) for seed, mean in enumerate((0.5, 0.6)))
    together = evidence(tmp_path)
    np.testing.assert_array_equal(together.per_task_or_first(SINUSOID, 1), together.per_task(SINUSOID, 1))
    banks = json.loads((folder / "report.json").read_text())["banks"]
    edit(folder / "report.json", banks=banks | {"5": "another"})
    apart = evidence(tmp_path)
    assert apart.per_task(SINUSOID, 1) is None
    first = apart.evaluated[0][1].per_task(SINUSOID, 1)
    np.testing.assert_array_equal(apart.per_task_or_first(SINUSOID, 1), [first])
    beside = provenance(SINUSOID, apart)
    assert (beside["task_bank"], beside["run_id"]) == ("5a another", f"{other.name} {folder.name}")


def test_a_superseded_run_is_no_evidence_and_in_no_conflict(tmp_path: Path) -> None:
    wrong, right = make_run(tmp_path, mean=0.9, name="a"), make_run(tmp_path, mean=0.5, name="b")
    before = file_contents(wrong)
    by_path = {run.path: run for run in read_runs(tmp_path)[0]}
    supersede(by_path[wrong], by_path[right], "its data was wrong")
    assert readings(evidence(tmp_path)) == [0.5]
    (run,) = (run for run in read_runs(tmp_path)[0] if run.path == wrong)
    assert (run.status, str(run.superseded)) == ("superseded", f"superseded by {right}: its data was wrong")
    assert {name: content for name, content in file_contents(wrong).items() if name != SUPERSEDED} == before
    (wrong / SUPERSEDED).unlink()
    assert len(evidence(tmp_path).conflicts) == 1


def test_values_per_task_may_have_diverged(tmp_path: Path) -> None:
    make_run(tmp_path, mean=None)
    ((_, report),) = evidence(tmp_path).evaluated
    tasks = report.folder / "tasks.csv"
    assert np.isnan(report.per_task(SINUSOID, 1)).all()
    tasks.write_text(tasks.read_text().replace("nan", "inf"))
    assert np.isinf(read_runs(tmp_path)[0][0].reports[0].per_task(SINUSOID, 1)).all()
    tasks.write_text(tasks.read_text().replace("inf", "1.0"))
    with pytest.raises(MamlError, match=r"tasks\.csv does not belong to the report\.json"):
        read_runs(tmp_path)[0][0].reports[0].per_task(SINUSOID, 1)


@pytest.mark.parametrize("change", [{"inner.order": 1}, {"num_iterations": 100}, {"inner.step_size": 0.5}])
def test_other_training_settings_are_another_run(tmp_path: Path, change: dict[str, float]) -> None:
    make_run(tmp_path, done=100, **change)  # type: ignore[arg-type]
    assert evidence(tmp_path) == Evidence()


def test_other_evaluation_settings_do_not_count(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    edit(folder / "report.json", evaluation={"evaluation.num_tasks": 4})
    found = evidence(tmp_path)
    assert (found.evaluated, found.state, found.progress) == ((), "not run", "70,000 of 70,000 iterations")


def test_a_run_is_running_only_while_a_process_holds_its_lock(tmp_path: Path) -> None:
    folder = make_run(tmp_path, done=12_000, evaluated=False, status="running")
    make_run(tmp_path, done=20_000, seed=1, evaluated=False, status="interrupted")
    assert evidence(tmp_path).state == "not run"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = evidence(tmp_path)
    assert (found.state, found.progress) == ("running", "12,000 of 70,000 iterations")
    assert evidence(tmp_path).state == "not run"  # it was killed


def test_an_unfinished_evaluation_of_a_running_run_stays_reduced_budget(tmp_path: Path) -> None:
    folder = make_run(tmp_path, done=12_000, status="running")
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert evidence(tmp_path).state == "reduced budget"


def corrupt(folder: Path) -> None:
    (folder / "report.json").write_text('{"run_id": "x", "cur')


def nan(folder: Path) -> None:
    text = (folder / "report.json").read_text()
    (folder / "report.json").write_text(text.replace('"mean": 1.0', '"mean": NaN'))


def empty(folder: Path) -> None:
    (folder / "report.json").write_text("[]")


def foreign(folder: Path) -> None:
    edit(folder / "report.json", run_id="of another")


def short(folder: Path) -> None:
    edit(folder / "report.json", num_iterations=10, iteration=10)


def headless(folder: Path) -> None:
    (folder / "run.json").unlink()


def no_segments(folder: Path) -> None:
    edit(folder / "run.json", segments=[])


@pytest.mark.parametrize("damage", [corrupt, nan, empty, foreign, short, headless, no_segments])
def test_a_damaged_run_is_named_and_left_out(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    make_run(tmp_path, seed=1, mean=0.5)
    folder = make_run(tmp_path)
    damage(folder)
    runs, damaged = find_runs(tmp_path)
    assert len(damaged) == 1
    assert str(folder) in damaged[0]
    assert readings(find_evidence(SINUSOID, runs)) == [0.5]


def test_reading_is_scaled_and_what_a_report_lacks_is_named(tmp_path: Path) -> None:
    make_run(tmp_path, mean=0.5, ci95=0.25)
    ((_, report),) = evidence(tmp_path).evaluated
    assert report.reading(replace(SINUSOID, scale=100), 10) == (50.0, 25.0)
    with pytest.raises(MamlError, match=r"asks sinusoid_10shot for mse at K=5, step 11, .* steps 0 to 10"):
        report.reading(SINUSOID, 11)
    with pytest.raises(MamlError, match="for accuracy at K=5"):
        report.reading(replace(SINUSOID, metric="accuracy"), 1)


def test_provenance_names_seeds_order_commit_hardware_and_command(tmp_path: Path) -> None:
    folder = make_run(tmp_path, seed=3)
    assert provenance(SINUSOID, evidence(tmp_path)) == {
        "seeds": "3",
        "iteration": 70_000,
        "num_iterations": 70_000,
        "inner_order": 2,
        "commit": "0123456+",
        "hardware": "CPU, Abacus",
        "run_id": folder.name,
        "task_bank": "5a",
        "command": "python train.py +experiment=sinusoid_10shot seed=3",
    }
    (segment,) = json.loads((folder / "run.json").read_text())["segments"]
    segments = [
        segment | {"commit": commit, "dirty": False, "hardware": {"cpu": "Abacus", "gpu": gpu}}
        for commit, gpu in [("a" * 40, None), ("b" * 40, "H1"), (None, "H1")]
    ]
    edit(folder / "run.json", segments=segments)
    beside = provenance(SINUSOID, evidence(tmp_path))
    assert beside["commit"] == "aaaaaaa, bbbbbbb, ?"
    assert beside["hardware"] == "CPU, Abacus; H1"
