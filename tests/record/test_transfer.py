"""Taking runs over from another machine: what is further stays, what is wrong is refused, a kill loses nothing."""

from __future__ import annotations

import io
import json
import lzma
import os
import shutil
import signal
import tarfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from maml.errors import Interrupted, MamlError
from maml.record.index import read_run
from maml.record.lock import acquire
from maml.record.transfer import import_runs
from tests.kills import every_point, script_killed, start_process
from tests.paper.fake_runs import add_evaluation, edit, make_run, make_run_with_checkpoint
from tests.runs import TinyRuns, before_iteration, file_contents

STEPS = ("checkpoint_every=7", "num_iterations=20")


@pytest.fixture
def stages(tiny: TinyRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """One run at two stages of its training, and once more from the beginning: archives by name."""
    archives = {}

    def pack(name: str) -> None:
        archives[name] = archive_of(tiny.runs_dir, tmp_path / f"{name}.tar")

    for name, iterations in (("early", 5), ("late", 6)):
        with monkeypatch.context() as patch, pytest.raises(Interrupted):
            before_iteration(patch, iterations, lambda _: os.kill(os.getpid(), signal.SIGTERM))
            tiny.run(*STEPS)
        pack(name)
    tiny.run(*STEPS)
    pack("finished")
    shutil.rmtree(tiny.runs_dir)
    tiny.run(*STEPS)
    pack("again")
    shutil.rmtree(tiny.runs_dir)
    return archives


def archive_of(runs: Path, path: Path) -> Path:
    with tarfile.open(path, "w") as tar:
        tar.add(runs, "runs")
    return path


def imported(archive: Path, into: Path) -> list[str]:
    return [outcome.text for outcome in import_runs(archive, into)]


def test_further_run_replaces_and_is_never_replaced(stages: dict[str, Path], tmp_path: Path) -> None:
    into = tmp_path / "here"
    assert imported(stages["early"], into)[0].startswith("imported, 5 of 20")
    assert imported(stages["late"], into)[0].startswith("imported, 11 of 20 iterations (before: 5 of 20")
    late = file_contents(into)
    for name in ("early", "late"):
        assert imported(stages[name], into)[0].startswith("kept: it is here already, 11 of 20")
    assert file_contents(into) == late
    assert imported(stages["finished"], into)[0].startswith("imported, 20 of 20 iterations, 1 evaluation (before: 11")
    assert imported(stages["late"], into)[0].startswith("kept: ")


def test_run_goes_on_where_it_was_imported(stages: dict[str, Path], tiny: TinyRuns) -> None:
    import_runs(stages["late"], tiny.runs_dir)
    folder = tiny.run(*STEPS)
    record = json.loads((folder / "run.json").read_text())
    assert [part["first_iteration"] for part in record["segments"]] == [0, 5, 11]


def test_start_that_computed_nothing_is_no_reason_to_replace(stages: dict[str, Path], tiny: TinyRuns) -> None:
    (outcome,) = import_runs(stages["late"], tiny.runs_dir)
    record = json.loads((outcome.folder / "run.json").read_text())
    segment = record["segments"][-1] | {"started": "later", "first_iteration": 11, "last_iteration": 11}
    edit(outcome.folder / "run.json", segments=[*record["segments"], segment])
    archive = archive_of(tiny.runs_dir, tiny.runs_dir.with_name("started.tar"))
    into = tiny.runs_dir.with_name("here")
    import_runs(stages["late"], into)
    assert imported(archive, into)[0].startswith("kept: ")


def test_other_history_is_another_sample_beside_it(stages: dict[str, Path], tmp_path: Path) -> None:
    into = tmp_path / "here"
    import_runs(stages["late"], into)
    (text,) = imported(stages["again"], into)
    assert "which has another history" in text
    assert len(list(into.glob("*/*_2/run.json"))) == 1
    assert imported(stages["again"], into)[0].startswith("kept: ")
    assert imported(stages["finished"], into)[0].startswith("imported, 20 of 20"), "it continues the first"
    assert len(list(into.glob("*/*/run.json"))) == 2


def test_run_that_began_in_the_same_second_elsewhere_is_another_sample(tmp_path: Path) -> None:
    here = make_run(tmp_path / "here", done=11, status="interrupted")
    other = make_run(tmp_path / "runs", done=20, status="interrupted")
    (segment,) = json.loads((other / "run.json").read_text())["segments"]
    for own in ({"commit": "another"}, {"hardware": segment["hardware"] | {"cpu": "another"}}):
        edit(other / "run.json", segments=[segment | own])
        (outcome,) = import_runs(archive_of(tmp_path / "runs", tmp_path / "runs.tar"), tmp_path / "here")
        assert outcome.folder != here and "which has another history" in outcome.text


def test_evaluations_and_marks_of_here_are_kept(stages: dict[str, Path], tmp_path: Path) -> None:
    into = tmp_path / "here"
    (outcome,) = import_runs(stages["late"], into)
    (outcome.folder / "superseded.json").write_text(json.dumps({"by": "", "reason": "why"}))
    shutil.copy(outcome.folder / "checkpoint.pt", outcome.folder / "checkpoint.new.pt")  # a kill before its renames
    import_runs(stages["finished"], into)
    assert (outcome.folder / "superseded.json").exists()
    assert not (outcome.folder / "checkpoint.new.pt").exists(), "it would replace the checkpoint that is further"


def test_files_of_loggers_and_of_the_user_here_are_kept(stages: dict[str, Path], tmp_path: Path) -> None:
    into = tmp_path / "here"
    (outcome,) = import_runs(stages["late"], into)
    names = {
        "wandb/offline-run-1/run-a.wandb",
        "tensorboard/events.1",
        "evaluations/a/wandb/offline-run-2/run-b.wandb",
        "evaluations/a/tensorboard/events.2",
        "policy_goal_1.gif",
        "notes.txt",
        "analysis/report.json",
        "wandb/offline-run-1/files/config.yaml",
    }
    for name in names:
        (outcome.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (outcome.folder / name).write_text(name)
    links = {
        "wandb/latest-run": "offline-run-1",
        "big.bin": str(tmp_path / "elsewhere"),
        "wandb/offline-run-1/m": "run-a",
    }
    for name, target in links.items():
        (outcome.folder / name).symlink_to(target)
    assert imported(stages["finished"], into)[0].startswith("imported, 20 of 20")
    now = file_contents(outcome.folder)
    assert {name: now[name].decode() for name in names} == {name: name for name in names}
    assert {name: os.readlink(outcome.folder / name) for name in links} == links


def test_both_evaluations_of_a_finished_run_are_kept(tiny: TinyRuns, tmp_path: Path) -> None:
    run = tiny.run(*STEPS)
    record = json.loads((run / "report.json").read_text())
    archive = archive_of(tiny.runs_dir, tmp_path / "runs.tar")
    edit(run / "report.json", evaluation=record["evaluation"] | {"evaluation.num_tasks": 99})
    import_runs(archive, tiny.runs_dir)
    reports = [run / "report.json", *run.glob("evaluations/*/report.json")]
    assert (
        sorted(len(json.loads(path.read_text())["evaluation"]) for path in reports) == [len(record["evaluation"])] * 2
    )
    assert all((path.parent / "tasks.csv").exists() for path in reports)


def evaluated_at(run: Path) -> list[int]:
    found = read_run(run)
    assert found
    return sorted(report.iteration for report in found.reports)


def test_evaluation_of_here_at_an_earlier_iteration_is_kept_whole(tmp_path: Path) -> None:
    here = make_run(tmp_path / "here", done=500, status="interrupted")
    (here / "evaluations" / "0a" / "classes.csv").touch()
    make_run(tmp_path / "runs")
    import_runs(archive_of(tmp_path / "runs", tmp_path / "runs.tar"), tmp_path / "here")
    assert evaluated_at(here) == [500, 70_000]
    assert list(here.glob("evaluations/*/classes.csv"))


def test_evaluation_at_another_iteration_is_added_and_the_checkpoint_of_here_kept(tmp_path: Path) -> None:
    here = make_run_with_checkpoint(tmp_path / "here")
    checkpoint = (here / "checkpoint.pt").read_bytes()
    add_evaluation(make_run(tmp_path / "runs"), iteration=500)
    import_runs(archive_of(tmp_path / "runs", tmp_path / "runs.tar"), tmp_path / "here")
    assert evaluated_at(here) == [500, 70_000]
    assert (here / "checkpoint.pt").read_bytes() == checkpoint


def test_checkpoint_that_is_missing_here_is_added(tiny: TinyRuns, tmp_path: Path) -> None:
    run = tiny.run("num_iterations=2")
    archive = archive_of(tiny.runs_dir, tmp_path / "runs.tar")
    content = (run / "checkpoint.pt").read_bytes()
    (run / "checkpoint.pt").unlink()
    import_runs(archive, tiny.runs_dir)
    assert (run / "checkpoint.pt").read_bytes() == content


def test_run_that_left_an_earlier_iteration_has_another_history(tmp_path: Path) -> None:
    make_run(tmp_path / "here", done=11, status="interrupted")
    run = make_run(tmp_path / "runs", done=20, status="interrupted")
    (segment,) = json.loads((run / "run.json").read_text())["segments"]
    later = segment | {"started": "later", "first_iteration": 5}
    edit(run / "run.json", segments=[segment | {"last_iteration": 5}, later])
    (text,) = imported(archive_of(tmp_path / "runs", tmp_path / "runs.tar"), tmp_path / "here")
    assert "which has another history" in text


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_failure_between_the_moves_puts_the_run_back(
    error: type[BaseException], stages: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    into = tmp_path / "here"
    import_runs(stages["early"], into)
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if "content" in self.parts:
            raise error
        return rename(self, target)

    with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
        patch.setattr(Path, "rename", failing)
        assert import_runs(stages["finished"], into)[0].refused
    assert imported(stages["early"], into)[0].startswith("kept: it is here already, 5 of 20")


def test_run_in_a_folder_of_any_name_is_recognised(stages: dict[str, Path], tmp_path: Path) -> None:
    into = tmp_path / "here"
    (outcome,) = import_runs(stages["early"], into)
    renamed = outcome.folder.rename(outcome.folder.with_name("mine"))
    (outcome,) = import_runs(stages["finished"], into)
    assert outcome.folder == renamed
    assert len(list(into.glob("*/*/run.json"))) == 1


def test_evaluation_from_elsewhere_is_added(tiny: TinyRuns, tmp_path: Path) -> None:
    run = tiny.run(*STEPS)
    archive = archive_of(tiny.runs_dir, tmp_path / "runs.tar")
    for name in ("report.json", "tasks.csv"):
        (run / name).unlink()
    (text,) = imported(archive, tiny.runs_dir)
    assert "1 evaluation (before: 20 of 20 iterations)" in text
    assert (run / "report.json").exists()


def test_run_in_training_is_not_replaced(stages: dict[str, Path], tmp_path: Path) -> None:
    into = tmp_path / "here"
    (outcome,) = import_runs(stages["early"], into)
    before = file_contents(outcome.folder)
    lock = acquire(outcome.folder / "lock")
    assert lock
    (refused,) = import_runs(stages["late"], into)
    lock.release()
    assert refused.refused and "is training in" in refused.text
    (outcome.folder / "lock").unlink()
    assert file_contents(outcome.folder) == before


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda run: (run / "run.json").write_text("{"), "is damaged"),
        (lambda run: edit(run / "run.json", run_id="0" * 12), "does not belong to the run"),
        (lambda run: (run / "checkpoint.pt").write_bytes(b"PK"), "checkpoint.pt"),
        (lambda run: (run / "metrics.jsonl").write_text("no\nmetrics\n"), "damaged in line 1"),
        (lambda run: (run / "tasks.csv").unlink(), "has a report without its tasks.csv"),
        (lambda run: (run / "tasks.csv").write_text("x" + (run / "tasks.csv").read_text()), "tasks.csv is missing or"),
        (lambda run: (run / "config.yaml").write_bytes(bytes(9)), "config.yaml is damaged"),
    ],
)
def test_damaged_run_is_refused_and_the_others_are_taken(
    spoil: Callable[[Path], object], message: str, tiny: TinyRuns, tmp_path: Path
) -> None:
    spoil(tiny.run(*STEPS))
    make_run(tiny.runs_dir, seed=1)
    outcomes = import_runs(archive_of(tiny.runs_dir, tmp_path / "runs.tar"), tmp_path / "here")
    assert sorted(outcome.refused for outcome in outcomes) == [False, True]
    (refused,) = (outcome for outcome in outcomes if outcome.refused)
    assert message in refused.text
    assert ".importing" not in refused.text
    assert len(list((tmp_path / "here").glob("*/*/run.json"))) == 1


def test_changed_settings_are_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs")
    record = json.loads((run / "run.json").read_text())
    edit(run / "run.json", training=record["training"] | {"meta_batch_size": 99})
    (outcome,) = import_runs(archive_of(tmp_path / "runs", tmp_path / "runs.tar"), tmp_path / "here")
    assert outcome.refused and "its settings do not have the id" in outcome.text


def test_archive_that_is_none_or_would_write_elsewhere_is_refused(tmp_path: Path) -> None:
    archive, into = tmp_path / "runs.tar", tmp_path / "here"
    with pytest.raises(MamlError, match=r"there is no file .*runs\.tar"):
        import_runs(archive, into)
    assert not into.exists()
    archive.write_bytes(b"no archive")
    with pytest.raises(MamlError, match="is no tar file, or is damaged"):
        import_runs(archive, into)
    (tmp_path / "empty").mkdir()
    with pytest.raises(MamlError, match="holds no run"):
        import_runs(archive_of(tmp_path / "empty", archive), into)
    for name, kind in (("../../outside", tarfile.REGTYPE), ("runs/a/link", tarfile.SYMTYPE)):
        with tarfile.open(archive, "w") as tar:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member, io.BytesIO())
        with pytest.raises(MamlError, match=r"is a link or a device|no tar file"):
            import_runs(archive, into)
    assert not (tmp_path / "outside").exists()
    whole = archive_of(make_run(tmp_path / "runs").parents[1], archive).read_bytes()
    with tarfile.open(archive) as tar:
        last = tar.getmembers()[-1].offset
    wrong_header = bytearray(whole)
    wrong_header[last + 3] ^= 1
    packed = bytearray(lzma.compress(whole))
    packed[len(packed) // 2] ^= 1
    for damaged in (whole[: len(whole) // 2], whole[:last], whole[: last + 9], wrong_header, packed):
        archive.write_bytes(damaged)
        with pytest.raises(MamlError, match="is damaged"):
            import_runs(archive, into)
        assert not list(into.glob("*/*")), "nothing was taken"


def test_damaged_record_of_another_run_here_does_not_stop_the_import(tmp_path: Path) -> None:
    other = make_run(tmp_path / "here", seed=1)
    (other / "run.json").write_bytes(b"\xff\x00")
    make_run(tmp_path / "runs")
    (outcome,) = import_runs(archive_of(tmp_path / "runs", tmp_path / "runs.tar"), tmp_path / "here")
    assert not outcome.refused


def test_links_of_wandb_are_left_out(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "runs") / "wandb"
    (folder / "offline-run-1").mkdir(parents=True)
    (folder / "offline-run-1" / "run.wandb").touch()
    (folder / "latest-run").symlink_to("offline-run-1")
    (folder / "debug.log").symlink_to("/etc/passwd")
    (outcome,) = import_runs(archive_of(tmp_path / "runs", tmp_path / "runs.tar"), tmp_path / "here")
    assert not outcome.refused
    assert [path.name for path in (outcome.folder / "wandb").iterdir()] == ["offline-run-1"]


@pytest.mark.parametrize("stride", [12, pytest.param(1, marks=pytest.mark.slow)])
def test_kill_at_any_point_loses_nothing(stages: dict[str, Path], tmp_path: Path, stride: int) -> None:
    into = tmp_path / "here"

    def kill(at: int) -> int | None:
        shutil.rmtree(into, ignore_errors=True)
        import_runs(stages["early"], into)
        process = start_process(script_killed, "runs.py", ["import", str(stages["finished"]), "--into", str(into)], at)
        process.join(60)
        return process.exitcode

    def check() -> None:
        (text,) = imported(stages["finished"], into)
        assert text.startswith("kept: ") or "(before: 5 of 20 iterations" in text, "the one that was here is lost"
        assert len(list(into.glob("*/*/run.json"))) == 1
        assert not (into / ".importing").exists()

    assert every_point(kill, check, stride) > 5
