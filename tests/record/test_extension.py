"""A finished run that goes on to more iterations: the same bits as from the start, and only where that is so."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from maml.record import checkpoint, extension
from maml.record.index import SUPERSEDED, find_runs
from tests.runs import TinyRuns, assert_same_run, file_contents


def first_iterations(folder: Path) -> list[int]:
    return [part["first_iteration"] for part in json.loads((folder / "run.json").read_text())["segments"]]


@pytest.mark.parametrize("done", [7, 9])  # the last iteration is logged, though log_every=3 does not divide 7
def test_longer_run_goes_on_from_the_finished_one_with_the_same_bits(
    done: int, each_domain: TinyRuns, capsys: pytest.CaptureFixture[str]
) -> None:
    shorter = each_domain.run(f"num_iterations={done}")
    before = file_contents(shorter)
    folder = each_domain.run("num_iterations=12")
    assert f"goes on from {shorter}" in capsys.readouterr().err
    assert folder != shorter and first_iterations(folder) == [0, done]
    assert_same_run(folder, each_domain.in_folder("whole").run("num_iterations=12"))
    assert file_contents(shorter) == before
    assert not (each_domain.runs_dir / ".extending").exists()
    runs, problems = find_runs(each_domain.runs_dir)
    assert sorted(run.iteration for run in runs) == [done, 12] and not problems


def test_longest_of_several_finished_runs_is_taken(tiny: TinyRuns) -> None:
    tiny.run("num_iterations=2")
    tiny.run("num_iterations=4")
    assert first_iterations(tiny.run("num_iterations=6")) == [0, 2, 4]


@pytest.mark.parametrize("difference", ["seed=1", "inner.step_size=0.02", "meta_batch_size=3"])
def test_run_with_other_settings_starts_anew(difference: str, tiny: TinyRuns) -> None:
    tiny.run("num_iterations=4")
    assert first_iterations(tiny.run("num_iterations=6", difference)) == [0]


def test_run_whose_schedule_follows_the_number_of_iterations_starts_anew(tiny: TinyRuns) -> None:
    tiny.run("num_iterations=4", "outer=adam_cosine")
    assert first_iterations(tiny.run("num_iterations=6", "outer=adam_cosine")) == [0]


def test_run_that_was_validated_in_between_starts_anew(tiny: TinyRuns) -> None:
    validated = ("validate_every=3", "evaluation.theta=best")
    tiny.run("num_iterations=4", *validated)
    assert first_iterations(tiny.run("num_iterations=8", *validated)) == [0]
    tiny.run("num_iterations=6", *validated)
    folder = tiny.run("num_iterations=9", *validated)
    assert first_iterations(folder) == [0, 6]
    assert_same_run(folder, tiny.in_folder("whole").run("num_iterations=9", *validated))


def test_shorter_run_does_not_go_back(tiny: TinyRuns) -> None:
    tiny.run("num_iterations=6")
    assert first_iterations(tiny.run("num_iterations=4")) == [0]


@pytest.mark.parametrize("damage", ["status", "checkpoint", "metrics", "superseded", "record"])
def test_run_that_is_not_whole_is_left_alone(damage: str, tiny: TinyRuns) -> None:
    shorter = tiny.run("num_iterations=4")
    record = json.loads((shorter / "run.json").read_text())
    if damage == "status":
        (shorter / "run.json").write_text(json.dumps(record | {"status": "interrupted"}))
    elif damage == "checkpoint":
        for file in shorter.glob("checkpoint*.pt"):
            file.write_bytes(b"no checkpoint")
    elif damage == "metrics":
        (shorter / "metrics.jsonl").write_text("garbage\n" + (shorter / "metrics.jsonl").read_text())
    elif damage == "superseded":
        (shorter / SUPERSEDED).write_text("{}")
    else:
        (shorter / "run.json").write_text("[")
    assert first_iterations(tiny.run("num_iterations=6")) == [0]


def test_run_whose_data_or_code_has_changed_starts_anew(tiny: TinyRuns, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.run("num_iterations=4")
    monkeypatch.setattr(extension, "changed_since", lambda *_: ["the data have changed"])
    assert first_iterations(tiny.run("num_iterations=6")) == [0]
    assert first_iterations(tiny.run("num_iterations=5", "changed_sources=accept")) == [0, 4]


def test_lines_of_a_stretch_that_was_logged_more_often_are_kept(tiny: TinyRuns) -> None:
    tiny.run("num_iterations=4", "log_every=1")
    tiny.run("num_iterations=7", "log_every=3")
    folder = tiny.run("num_iterations=9", "log_every=3")
    logged = [json.loads(line)["iteration"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert logged == [1, 2, 3, 4, 6, 9]


def test_copy_of_another_process_is_left_alone(tiny: TinyRuns) -> None:
    tiny.run("num_iterations=4")
    other = tiny.runs_dir / ".extending" / "custom" / "0123456789ab_of_another_process" / "run.json"
    other.parent.mkdir(parents=True)
    other.write_text("{}")
    assert first_iterations(tiny.run("num_iterations=6")) == [0, 4]
    assert other.exists()
    os.utime(other.parent, (0, 0))  # left by a process that was killed
    tiny.run("num_iterations=8")
    assert not other.exists()


def test_folder_of_ones_own_deletes_nothing_elsewhere(tiny: TinyRuns, tmp_path: Path) -> None:
    folder = tiny.run("num_iterations=4")
    (tiny.runs_dir / ".extending" / "custom" / "left").mkdir(parents=True)
    for path in (folder.parent, tiny.runs_dir / ".extending" / "custom"):
        os.utime(path, (0, 0))
    before = file_contents(tiny.runs_dir)
    for run_dir in (tmp_path / "x" / ".." / "mine", Path(os.path.relpath(tmp_path)) / ".." / "mine"):
        tiny.run(f"run_dir={run_dir}", "num_iterations=2")
    assert file_contents(tiny.runs_dir) == before


def test_several_seeds_go_on_together(tiny: TinyRuns) -> None:
    tiny.run("num_iterations=4", "seeds=2")
    tiny.run("num_iterations=6", "seeds=3")
    folders = [tiny.folder("num_iterations=6", f"seed={seed}") for seed in range(3)]
    assert [first_iterations(folder) for folder in folders] == [[0, 4], [0, 4], [0]]
    assert [checkpoint.load(folder / "checkpoint.pt")["iteration"] for folder in folders] == [6, 6, 6]
