"""Finding runs: the right ones, the best of them, and nothing that is damaged."""

import fcntl
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from maml.errors import MamlError
from maml.paper.runs import Evidence, find_evidence, find_runs, provenance
from tests.paper.made_up import SINUSOID, edit, make_run


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


def test_seeds_are_gathered_lowest_first_and_equal_ones_counted_once(tmp_path: Path) -> None:
    for seed in (2, 0, 1):
        make_run(tmp_path / "local", mean=seed, seed=seed)
    make_run(tmp_path / "committed", mean=9.0, seed=0)
    assert readings(evidence(tmp_path / "local", tmp_path / "committed")) == [0, 1, 2]
    assert readings(evidence(tmp_path / "committed", tmp_path / "local")) == [9, 1, 2]


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
    segments = [
        {"last_iteration": 9, "commit": commit, "dirty": False, "hardware": {"cpu": "Abacus", "gpu": gpu}}
        for commit, gpu in [("a" * 40, None), ("b" * 40, "H1"), (None, "H1")]
    ]
    edit(folder / "run.json", segments=segments)
    beside = provenance(SINUSOID, evidence(tmp_path))
    assert beside["commit"] == "aaaaaaa, bbbbbbb, ?"
    assert beside["hardware"] == "CPU, Abacus; H1"
