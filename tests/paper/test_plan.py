"""The plan of jobs: missing runs, runs to resume, and estimated costs, for runs with invented numbers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from maml.errors import MamlError
from maml.paper import plan as plan_module
from maml.paper.plan import (
    SMOKE,
    WATERMARK,
    Estimate,
    Job,
    Need,
    estimate,
    list_needs,
    most_valuable_first,
    plan,
    select,
    write_smoke_cells,
)
from maml.record.contents import Source
from maml.record.index import find_runs
from maml.record.lock import acquire
from tests.paper.fake_runs import SINUSOID, edit, make_run, make_run_with_checkpoint
from tests.paper.printed import printed_needs
from tests.runs import file_contents

RESULTS = Path(__file__).parents[2] / "results"
NEEDS = printed_needs()
NOWHERE = ("data_dir=/nowhere", "cache_dir=/nowhere")


def jobs(root: Path, *sources: Source, seeds: Sequence[int] = (0,), wandb: bool = False) -> list[Job]:
    """Plans jobs in the folder ``runs``, with the committed runs in ``committed``."""
    needs = [Need(f"table{number}", "row", "column", source) for number, source in enumerate(sources)]
    runs, _ = find_runs(root / "runs", root / "committed")
    return plan(needs, seeds, runs, root / "runs", wandb)


@pytest.mark.parametrize(
    ("name", "artifacts", "rows"),
    [
        ("table2", {"table2_multitask"}, 5),
        ("Table 2", {"table2_multitask"}, 5),
        ("table2/maml", {"table2_multitask"}, 1),
        ("table1", {"table1_omniglot", "table1_miniimagenet"}, 13),
        ("table1_omniglot/MAML", {"table1_omniglot"}, 2),
        ("table1_omniglot/MAML_conv/5way_1shot", {"table1_omniglot"}, 1),
        ("figure4", {"figure4", "figure4_trajectories"}, 4),
        ("figure-6/oracle", {"figure6"}, 1),
    ],
)
def test_name_stands_for_what_begins_with_it(name: str, artifacts: set[str], rows: int) -> None:
    chosen = select(NEEDS, [name])
    assert {need.artifact for need in chosen} == artifacts
    assert len({(need.artifact.partition("_t")[0], need.row) for need in chosen}) == rows


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tabel2", "has no tabel2; did you mean table2"),
        ("figure9", "has no figure9; did you mean figure"),
        ("table2/MAMI", "has no table2/MAMI; did you mean table2_multitask/MAML"),
        ("x", "has no x; allowed: table1_omniglot, "),
    ],
)
def test_unknown_name_is_refused_with_what_was_probably_meant(name: str, message: str) -> None:
    with pytest.raises(MamlError, match=message):
        select(NEEDS, ["table2", name])


def test_row_without_an_experiment_is_refused() -> None:
    needs = [replace(need, source=None) if need.path[1] == "MANN_noconv" else need for need in NEEDS]
    with pytest.raises(MamlError, match="no experiment for table1/MANN"):
        select(needs, ["table2", "table1/MANN"])


def test_source_of_several_artifacts_is_one_job(tmp_path: Path) -> None:
    found = jobs(tmp_path, SINUSOID, replace(SINUSOID, num_shots=10), seeds=(0, 2))
    assert [(job.name, job.state, job.artifacts) for job in found] == [
        ("sinusoid_10shot", "run", ("table0", "table1")),
        ("sinusoid_10shot seed=2", "run", ("table0", "table1")),
    ]
    place = f"runs_dir={tmp_path / 'runs'}"
    assert [job.commands for job in found] == [
        (("+experiment=sinusoid_10shot", place),),
        (("+experiment=sinusoid_10shot", "seed=2", place),),
    ]
    assert [job.left for job in found] == [70_000, 70_000]


def test_experiments_that_train_the_same_are_one_job(tmp_path: Path) -> None:
    names = ("cifar_fs_5way_1shot_finetune", "cifar_fs_5way_5shot_nearest_neighbor")
    (job,) = jobs(tmp_path, *(Source(name, "accuracy_transductive", 1) for name in names))
    assert [command[0] for command in job.commands] == [f"+experiment={name}" for name in names]
    assert job.name == "cifar_fs_5way_1shot_finetune and 1 more evaluations of it"


@pytest.mark.parametrize("where", ["runs", "committed"])
def test_complete_and_evaluated_run_is_done_for_its_own_seed(where: str, tmp_path: Path) -> None:
    make_run(tmp_path / where, seed=1)
    found = jobs(tmp_path, SINUSOID, seeds=(0, 1))
    assert [(job.state, job.left) for job in found] == [("run", 70_000), ("done", 0)]
    assert found[1].commands == ()


def test_complete_run_of_another_evaluation_is_evaluated(tmp_path: Path) -> None:
    make_run_with_checkpoint(tmp_path / "runs")
    (job,) = jobs(tmp_path, replace(SINUSOID, overrides=("evaluation.num_steps=3",)))
    assert (job.state, job.left, len(job.commands)) == ("evaluate", 0, 1)


def test_unfinished_run_is_continued_where_it_is(tmp_path: Path) -> None:
    folder = make_run_with_checkpoint(tmp_path / "runs", done=20_000, evaluated=False, status="interrupted")
    make_run_with_checkpoint(tmp_path / "committed", done=30_000, status="interrupted")
    (job,) = jobs(tmp_path, SINUSOID)
    assert (job.state, job.left, job.folder, job.committed) == ("continue from 20,000", 50_000, folder, None)
    (folder / "checkpoint.pt").unlink()
    assert jobs(tmp_path, SINUSOID)[0].state == "run", "there is nothing to go on from"


def test_unfinished_committed_run_is_copied_whole_and_stays_as_it_is(tmp_path: Path) -> None:
    make_run_with_checkpoint(tmp_path / "committed", done=20_000, status="interrupted", name="a shorter one")
    committed = make_run_with_checkpoint(tmp_path / "committed", done=30_000, status="interrupted")
    before = file_contents(committed)
    (job,) = jobs(tmp_path, SINUSOID)
    assert (job.state, job.committed) == ("continue from 30,000", committed)
    half = tmp_path / "runs" / ".copying" / "sinusoid_10shot" / job.run_id  # left by a copy that was killed
    shutil.copytree(committed, half)
    (half / "checkpoint.pt").write_bytes(b"half")
    assert find_runs(tmp_path / "runs") == ([], [])
    job.folder.mkdir(parents=True)
    (job.folder / "lock").touch()  # left by a process that was killed before it recorded anything
    job.prepare()
    assert file_contents(job.folder) == file_contents(committed) == before
    assert not half.exists()

    (job.folder / "metrics.jsonl").write_text("gone on")
    job.prepare()
    assert (job.folder / "metrics.jsonl").read_text() == "gone on"
    (job,) = jobs(tmp_path, SINUSOID)
    assert job.committed is None


def test_folder_with_a_checkpoint_is_never_replaced_by_a_committed_run(tmp_path: Path) -> None:
    make_run_with_checkpoint(tmp_path / "committed", done=30_000, status="interrupted")
    (job,) = jobs(tmp_path, SINUSOID)
    for name in ("checkpoint.pt", "checkpoint.new.pt", "checkpoint.previous.pt"):
        job.folder.mkdir(parents=True)
        (job.folder / name).write_bytes(b"mine")  # run.json was moved away, because it was damaged
        job.prepare()
        assert file_contents(job.folder) == {name: b"mine"}
        (again,) = jobs(tmp_path, SINUSOID)
        assert (again.state, again.committed) == ("run", None), "train.py goes on from it"
        shutil.rmtree(job.folder)


def test_folder_with_unknown_files_is_left_alone_and_named(tmp_path: Path) -> None:
    make_run_with_checkpoint(tmp_path / "committed", done=30_000, status="interrupted")
    (job,) = jobs(tmp_path, SINUSOID)
    job.folder.mkdir(parents=True)
    (job.folder / "metrics.jsonl").write_text("mine")
    job.prepare()
    assert file_contents(job.folder) == {"metrics.jsonl": b"mine"}
    (again,) = jobs(tmp_path, SINUSOID)
    assert again.state == "cannot"
    assert "has files, but neither run.json nor a checkpoint; restore one, or move it away" in again.impossible


def test_traces_of_a_start_do_not_keep_a_committed_run_from_being_copied(tmp_path: Path) -> None:
    committed = make_run_with_checkpoint(tmp_path / "committed", done=30_000, status="interrupted")
    (job,) = jobs(tmp_path, SINUSOID)
    job.folder.mkdir(parents=True)
    for name in ("lock", "config.yaml", ".run.json.12345"):
        (job.folder / name).touch()
    (job,) = jobs(tmp_path, SINUSOID)
    job.prepare()
    assert file_contents(job.folder) == file_contents(committed)


def test_process_that_has_recorded_nothing_yet_is_alive(tmp_path: Path) -> None:
    make_run_with_checkpoint(tmp_path / "committed", done=30_000, status="interrupted")
    (job,) = jobs(tmp_path, SINUSOID)
    assert not job.alive
    job.folder.mkdir(parents=True)
    held = acquire(job.folder / "lock")
    assert held is not None
    assert job.alive
    held.release()
    assert not job.alive


@pytest.mark.parametrize("lost", ["report.png", "tasks.csv", "status"])
def test_run_that_lacks_the_end_of_its_evaluation_is_a_job(tmp_path: Path, lost: str) -> None:
    folder = make_run_with_checkpoint(tmp_path / "runs", status="running" if lost == "status" else "finished")
    if lost != "status":
        (folder / lost).unlink()
    (job,) = jobs(tmp_path, SINUSOID)
    assert (job.state, len(job.commands)) == ("evaluate", 1)


def test_missing_photos_and_superseded_runs_cannot_be_run(tmp_path: Path) -> None:
    photos = Source("mini_imagenet_5way_1shot", "accuracy_transductive", 1, overrides=NOWHERE)
    folder = make_run(tmp_path / "runs")
    (folder / "superseded.json").write_text('{"by": "", "reason": "a bug", "since": "today"}')
    impossible, superseded = jobs(tmp_path, photos, SINUSOID)
    assert (impossible.state, superseded.state) == ("cannot", "cannot")
    assert impossible.impossible.startswith("mini-ImageNet not found in data_dir=/nowhere")
    assert "superseded; delete it" in superseded.impossible
    for extension in ("images", "train"):
        place = tmp_path / extension / "mini-imagenet" / extension
        place.mkdir(parents=True)
        (job,) = jobs(tmp_path, replace(photos, overrides=(f"data_dir={place.parents[1]}", "cache_dir=/nowhere")))
        assert job.state == "run", "whether the photos are complete, train.py will say"


def test_wandb_groups_by_the_first_artifact_and_tags_with_all(tmp_path: Path) -> None:
    (job,) = jobs(tmp_path, SINUSOID, SINUSOID, wandb=True)
    assert job.commands[0][-3:] == ("logger=wandb", "logger.group=table0", "logger.tags=[table0,table1]")


def test_threads_are_those_of_the_hardware_asked_for_or_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    photos = Source("cifar_fs_5way_1shot", "accuracy_transductive", 1)
    three = replace(SINUSOID, overrides=("hardware.num_threads=3", "num_iterations=1"))
    assert [job.num_threads for job in jobs(tmp_path, SINUSOID, photos, three)] == [1, 8, 3]


def test_estimate_is_of_the_newest_run_on_this_machine_or_names_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (job,) = jobs(tmp_path, SINUSOID, seeds=(5,))
    unknown = estimate(job, [])
    assert (unknown.hours, unknown.size, unknown.machine) == (None, None, "")

    other = make_run_with_checkpoint(tmp_path / "runs", seed=1)  # 70,000 iterations in 50 seconds
    found = estimate(job, find_runs(tmp_path / "runs")[0])
    assert (found.hours, found.machine) == (pytest.approx(50 / 3600), "Abacus")
    sizes = {path.name: path.stat().st_size for path in other.iterdir()}
    assert found.size == sum(sizes.values()) + sizes["checkpoint.pt"]

    monkeypatch.setattr("maml.hardware.base._cpu_name", lambda: "Mine")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    mine = make_run(tmp_path / "runs", seed=2)
    (segment,) = json.loads((mine / "run.json").read_text())["segments"]
    here = {"cpu": "Mine", "device": "cpu", "cores": 2}  # a record has more than the names
    others = (segment["hardware"], here | {"processes": 2})  # whose times say nothing about this machine
    parts = [segment | {"hardware": hardware, "seconds": 9000.0} for hardware in others]
    parts += [segment | {"hardware": here, "started": "2020", "first_iteration": at} for at in (0, 35_000)]
    parts += [segment | {"hardware": here, "seconds": 0.0, "first_iteration": 70_000}]
    edit(mine / "run.json", segments=parts)
    make_run(tmp_path / "runs", seed=3, num_iterations=10)
    found = estimate(job, find_runs(tmp_path / "runs")[0])
    assert (found.hours, found.machine) == (pytest.approx(70_000 * 100 / 105_000 / 3600), "")
    assert estimate(replace(job, commands=()), []).hours == 0
    for record in (tmp_path / "runs").glob("*/*/run.json"):
        edit(record, segments=[segment | {"first_iteration": 70_000}])
    assert estimate(job, find_runs(tmp_path / "runs")[0]).hours is None, "no iteration was timed"


@pytest.mark.parametrize("has_gpu", [False, True])
def test_most_valuable_jobs_come_first(has_gpu: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: has_gpu)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "Abacus")
    names = {
        "later": ("cifar_fs_5way_1shot", 1, 0.1, False),  # from another paper
        "unknown": ("omniglot_20way_1shot", 9, None, True),
        "slow": ("omniglot_5way_1shot", 2, 10.0, True),
        "rollouts": ("point_navigation_maml", 8, 1.0, True),
        "quick": ("sinusoid_10shot", 2, 1.0, True),
        "evaluate": ("sinusoid_pretrain", 1, 0.0, True),
        "evaluate rollouts": ("ant_velocity_random_init", 3, 0.0, True),
    }
    needs, hours = [], {}
    for experiment, count, length, in_paper in names.values():
        needs += [Need("table", "row", str(column), Source(experiment, "m", 1), in_paper) for column in range(count)]
        hours[experiment] = length
    monkeypatch.setattr(plan_module, "estimate", lambda job, runs: Estimate(hours[job.name], None))
    order = ["evaluate", "rollouts", "quick", "slow", "unknown", "evaluate rollouts", "later"]
    if has_gpu:  # which rollouts do not use
        order = ["evaluate", "quick", "slow", "unknown", "later", "rollouts", "evaluate rollouts"]
    found = [job.name for job in most_valuable_first(plan(needs, [0], [], tmp_path), [])]
    assert found == [names[name][0] for name in order]


def test_smoke_cells_are_smoke_tests_and_say_so(tmp_path: Path) -> None:
    write_smoke_cells(RESULTS, tmp_path)
    write_smoke_cells(RESULTS, tmp_path)
    real, smoke = list_needs(RESULTS), list_needs(tmp_path)
    assert [need.path for need in smoke] == [need.path for need in real]
    for need, one in zip(real, smoke, strict=True):
        assert (need.source is None) == (one.source is None)
        if need.source and one.source:
            assert one.source == replace(need.source, overrides=(*need.source.overrides, SMOKE))
    entries = OmegaConf.load(tmp_path / "cells.yaml")
    assert all(entry.title.startswith(WATERMARK) for kind in entries.values() for entry in kind.values())
    (mine,), (theirs,) = (plan(select(needs, ["figure3/oracle"]), [0], [], tmp_path) for needs in (real, smoke))
    assert mine.run_id != theirs.run_id
