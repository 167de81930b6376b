"""Methods on the same tasks: which are, and the paired differences between them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from maml.record.comparison import data_of_bank, groups_on_the_same_tasks, method_rows, paired_interval
from maml.record.contents import Source
from maml.record.index import find_runs, read_run
from tests.paper.fake_runs import POINT, SINUSOID, add_evaluation, edit, make_run

PRETRAIN = Source("sinusoid_pretrain", "mse", 5)


def groups(root: Path) -> Any:
    return groups_on_the_same_tasks(find_runs(root)[0])


def test_methods_on_equal_banks_are_a_group_with_the_best_first(tmp_path: Path) -> None:
    make_run(tmp_path, mean=0.5, seed=0)
    make_run(tmp_path, mean=0.7, seed=1)
    assert groups(tmp_path) == [], "two seeds are one method"
    make_run(tmp_path, mean=0.25, source=PRETRAIN, done=7)
    copied = make_run(tmp_path / "copies", mean=0.5, seed=0)
    copied.rename(tmp_path / "sinusoid_10shot" / "copy")
    found = groups(tmp_path)
    assert [(each[0].num_shots, [tested.experiment for tested in each]) for each in found] == [
        (k, ["sinusoid_pretrain", "sinusoid_10shot"]) for k in (5, 10, 20)
    ]
    best, other = found[0]
    assert (best.mean, other.mean, len(other.runs)) == (pytest.approx(0.25), pytest.approx(0.6), 2)
    assert (best.is_complete, other.is_complete) == (False, True)
    values = np.linspace(-1, 1, 600) + 0.6
    assert other.ci95 == pytest.approx(1.96 * values.std() / 600**0.5, rel=1e-6)
    assert other.difference(best) == pytest.approx((0.35, 0.35, 0.35), rel=1e-5), "all tasks differ by the same"
    first, second = method_rows(found[0])
    assert "7 of 70,000 iterations" in first["method"] and first["minus best"] == ""
    assert second["minus best"] == "+0.35" and second["95 % interval"] == "+0.35 to +0.35"


def test_best_return_is_the_largest(tmp_path: Path) -> None:
    make_run(tmp_path, mean=5.0, source=POINT)
    make_run(tmp_path, mean=9.0, source=replace(POINT, experiment="point_navigation_pretrain"))
    assert [[round(each.mean) for each in group] for group in groups(tmp_path)] == [[9, 5]]


def test_newest_evaluation_of_a_run_is_compared(tmp_path: Path) -> None:
    add_evaluation(make_run(tmp_path, mean=0.5), iteration=500)
    make_run(tmp_path, mean=0.25, source=PRETRAIN)
    found = groups(tmp_path)
    assert [len(group) for group in found] == [2, 2, 2]
    assert all(each.is_complete for group in found for each in group)


def test_evaluation_that_the_experiment_asks_for_goes_before_others(tmp_path: Path) -> None:
    authors: dict[str, Any] = {"evaluation.num_steps": 10, "evaluation.step_size": [0.02]}
    for seed, mean in ((0, 0.5), (1, 0.75)):
        folder = make_run(tmp_path, mean=mean, seed=seed)
        other = add_evaluation(folder)
        edit((folder, other)[seed] / "report.json", evaluation=authors)  # the run's own report of seed 0 is another
    make_run(tmp_path, mean=0.25, source=PRETRAIN)
    assert [len(each.runs) for each in groups(tmp_path)[0]] == [1, 2], "the two seeds are one method"
    third = make_run(tmp_path, mean=1.0, seed=2)
    edit(third / "report.json", evaluation=authors)
    assert [len(each.runs) for each in groups(tmp_path)[0]] == [1, 2, 1], "another protocol is another method"
    _, asked, otherwise = method_rows(groups(tmp_path)[0])
    assert asked["method"].endswith(")") and "evaluation.step_size=[0.02]" in otherwise["method"].split()


def test_methods_of_one_experiment_name_the_settings_in_which_they_differ(tmp_path: Path) -> None:
    both: dict[str, Any] = {"outer.clip": 10.0}
    larger: dict[str, Any] = {"inner.step_size": 0.01}
    make_run(tmp_path, mean=0.25, source=PRETRAIN, **both)
    make_run(tmp_path, mean=0.5, **both)
    make_run(tmp_path, mean=0.75, **both, **larger)
    names = [row["method"] for row in method_rows(groups(tmp_path)[0])]
    assert [name.partition(") ")[2] for name in names] == ["", "", "inner.step_size=0.01"]


def test_methods_of_an_unknown_experiment_name_all_settings_in_which_they_differ(tmp_path: Path) -> None:
    changes: list[tuple[float, dict[str, Any]]] = [(0.5, {"inner.step_size": 0.01}), (0.75, {"inner.step_size": 0.02})]
    for mean, training in changes:
        make_run(tmp_path, mean=mean, **training)
    (tmp_path / "sinusoid_10shot").rename(tmp_path / "custom")
    names = [row["method"] for row in method_rows(groups(tmp_path)[0])]
    assert [name.partition(") ")[2] for name in names] == ["inner.step_size=0.01", "inner.step_size=0.02"]


def test_accuracies_are_in_percent(tmp_path: Path) -> None:
    for name, mean in (("sinusoid_10shot", 0.75), ("sinusoid_pretrain", 0.5)):
        folder = make_run(tmp_path, mean=mean, source=Source(name, "accuracy_transductive", 5))
        edit(folder / "report.json", larger_is_better=True)
    best, other = method_rows(groups(tmp_path)[0])
    assert best["mean in percent ± 95 %"].startswith("75 ± ")
    assert (other["minus best"], other["95 % interval"]) == ("-25", "-25 to -25")


def test_runs_of_other_lengths_are_other_methods(tmp_path: Path) -> None:
    make_run(tmp_path, mean=0.5)
    make_run(tmp_path, mean=0.7, seed=1, done=500, status="interrupted")
    assert [len(group) for group in groups(tmp_path)] == [2, 2, 2]


def test_method_is_complete_only_if_all_runs_are(tmp_path: Path) -> None:
    make_run(tmp_path, mean=0.5)
    make_run(tmp_path, mean=0.7, seed=1, done=500, status="interrupted")
    complete, unfinished = groups(tmp_path)[0]
    assert (complete.is_complete, unfinished.is_complete) == (True, False)
    assert not replace(complete, runs=[*complete.runs, *unfinished.runs]).is_complete


def test_ways_are_those_of_meta_test(tmp_path: Path) -> None:
    sixty_ways: dict[str, Any] = {"domain.num_ways": 60}
    make_run(tmp_path, mean=0.5, **sixty_ways)
    make_run(tmp_path, mean=0.6, source=PRETRAIN, **sixty_ways)
    assert groups(tmp_path)[0][0].tasks == "60-way, K=5, 600 tasks"
    for report in tmp_path.glob("*/*/report.json"):
        edit(report, evaluation={"evaluation.num_ways": 5})
    assert groups(tmp_path)[0][0].tasks == "5-way, K=5, 600 tasks"


@pytest.mark.parametrize(
    ("key", "value", "is_other"),
    [
        ("domain._target_", "maml.domain.fc100.FC100", True),  # a bank may hold numbers of classes only
        ("domain.file", "other.csv", True),
        ("domain.horizon", 20, True),
        ("domain.num_query", 15, False),
        ("domain.split", "vinyals_trainval", False),
        ("domain.distort", True, False),
    ],
)
def test_equal_banks_of_other_data_are_other_tasks(tmp_path: Path, key: str, value: Any, is_other: bool) -> None:
    first = make_run(tmp_path, mean=0.5)
    second = make_run(tmp_path, mean=0.6, source=PRETRAIN, **{key: value})
    assert (groups(tmp_path) == []) is is_other
    hashes = {data_of_bank(run) for run in map(read_run, (first, second)) if run}
    assert len(hashes) == 1 + is_other


def test_equal_banks_of_a_file_whose_content_has_changed_are_other_tasks(tmp_path: Path) -> None:
    own: dict[str, Any] = {"domain._target_": "maml.domain.table.Table", "domain.file": "a.csv"}
    runs = [make_run(tmp_path, source=source, **own) for source in (SINUSOID, PRETRAIN)]
    for digests, is_other in ((("a", "a"), False), (("a", "b"), True)):
        for run, data in zip(runs, digests, strict=True):
            (segment,) = json.loads((run / "run.json").read_text())["segments"]
            edit(run / "run.json", segments=[segment | {"data": data}])
        assert (groups(tmp_path) == []) is is_other


def test_settings_of_a_domain_of_the_users_own_all_choose_its_tasks(tmp_path: Path) -> None:
    own: dict[str, Any] = {"domain._target_": "mine.Rows"}
    runs = [
        make_run(tmp_path, source=source, **own | {"domain.split": split, "domain.num_shots": num_shots})
        for source, split, num_shots in ((SINUSOID, "old", 1), (PRETRAIN, "new", 1), (POINT, "old", 5))
    ]
    old, new, also_old = (data_of_bank(run) for run in map(read_run, runs) if run)
    assert old == also_old != new


def test_other_tasks_and_what_has_no_values_are_left_out(tmp_path: Path) -> None:
    make_run(tmp_path, mean=0.5)
    other = make_run(tmp_path, mean=0.6, source=PRETRAIN)
    edit(other / "report.json", banks={"5": "another", "10": "10a", "20": "another"})
    assert [each[0].num_shots for each in groups(tmp_path)] == [10]
    (other / "tasks.csv").unlink()
    assert groups(tmp_path) == []
    make_run(tmp_path, mean=None, source=PRETRAIN, seed=3)
    assert groups(tmp_path) == [], "it diverged"


def test_paired_interval_is_that_of_a_plain_bootstrap_and_far_narrower_than_an_unpaired_one() -> None:
    rng = np.random.default_rng(1)
    a = rng.normal(size=600)
    b = a + 0.1 + 0.05 * rng.normal(size=600)
    low, high = paired_interval(a, b)
    means = [float(np.mean([(b - a)[task] for task in rng.integers(600, size=600)])) for _ in range(2000)]
    assert (low, high) == pytest.approx(np.percentile(means, (2.5, 97.5)), abs=5e-4)
    half = 1.96 * (b - a).std() / np.sqrt(600)
    assert (high - low) / 2 == pytest.approx(half, rel=0.05)
    assert half < 0.1 * 1.96 * np.sqrt(a.var() + b.var()) / np.sqrt(600)
