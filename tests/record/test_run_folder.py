"""The run folder: its records, its lock, and what it keeps when a run resumes."""

from __future__ import annotations

import csv
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from maml.algorithm.classifier import Classifier
from maml.config.identity import evaluation_config
from maml.digest import digest
from maml.errors import MamlError
from maml.experiment import run_experiment
from maml.record import checkpoint
from maml.record.run_files import read_json
from maml.record.run_folder import RunFolder
from tests.paper.fake_runs import edit
from tests.runs import TinyRuns, file_contents

HARDWARE = {"device": "cpu", "cpu": "Abacus"}


@pytest.fixture
def run(tiny: TinyRuns) -> RunFolder:
    return RunFolder(tiny.config(), "custom")


def saved(run: RunFolder, iteration: int) -> None:
    run.save_checkpoint(iteration, {"theta": {"w": torch.ones(2) * iteration}, "outer": {}}, {"num_threads": 1})


def record(run: RunFolder) -> dict[str, Any]:
    content = read_json(run.path / "run.json")
    assert content is not None
    return content


def report(run: RunFolder, iteration: int = 200, num_shots: int = 5) -> dict[str, Any]:
    steps = [{"step": 0, "mean": 0.5, "ci95": 0.25, "num_tasks": 2}]
    return {
        "experiment": "custom",
        "run_id": run.run_id,
        "seed": 0,
        "iteration": iteration,
        "num_iterations": 200,
        "evaluation": {"evaluation.num_shots": [num_shots]},
        "banks": {str(num_shots): "a"},
        "headline_metric": "mse",
        "headline": 0.5,
        "larger_is_better": False,
        "curves": [{"metric": "mse", "num_shots": num_shots, "steps": steps}],
    }


REPORT_FILES = ("report.json", "tasks.csv", "report.png")
ROWS = [{"metric": "mse", "task": 0, "step_0": 0.1}, {"metric": "mse", "task": 1, "step_0": 1e-9}]


def test_making_a_run_folder_writes_nothing(run: RunFolder, tiny: TinyRuns) -> None:
    assert run.finished_report() is None
    assert run.load_checkpoint() is None
    assert not tiny.runs_dir.exists()


def test_folder_is_named_by_experiment_and_run_id(run: RunFolder, tiny: TinyRuns, tmp_path: Path) -> None:
    assert run.path == tiny.runs_dir / "custom" / run.run_id
    assert len(run.run_id) == 12
    by_hand = RunFolder(tiny.config(f"run_dir={tmp_path / 'x'}"), "custom")
    assert by_hand.path == tmp_path / "x"
    assert by_hand.run_id == run.run_id


def test_record_holds_what_a_reader_needs(run: RunFolder) -> None:
    assert run.open(HARDWARE, "python train.py seed=0", "MAML") is None
    first = record(run)
    assert first["status"] == "running"
    assert first["command"] == "python train.py seed=0"
    assert first["seed"] == 0
    assert first["training"] == run.training_config
    (segment,) = first["segments"]
    assert segment["hardware"] == HARDWARE
    assert segment["versions"]["torch"] == torch.__version__
    assert segment["commit"] is None or len(segment["commit"]) == 40
    assert segment["dirty"] in (None, False, True)
    assert yaml.safe_load((run.path / "config.yaml").read_text()) == run.settings.as_dict()

    saved(run, 7)
    assert record(run)["iteration"] == 7
    assert record(run)["segments"][0]["execution"] == {"num_threads": 1}
    run.close("interrupted")
    assert record(run)["status"] == "interrupted"
    assert record(run)["segments"][0]["last_iteration"] == 7
    assert record(run)["started"] == first["started"] <= record(run)["finished"]


def test_each_part_of_a_run_is_a_segment(tiny: TinyRuns) -> None:
    for iteration in (7, 14):
        run = RunFolder(tiny.config(), "custom")
        run.open(HARDWARE, f"part {iteration}", "MAML")
        saved(run, iteration)
        run.close("interrupted")
    segments = record(run)["segments"]
    assert [(part["first_iteration"], part["last_iteration"]) for part in segments] == [(0, 7), (7, 14)]
    assert record(run)["seconds"] == pytest.approx(sum(part["seconds"] for part in segments))


def test_run_is_open_once_at_a_time(run: RunFolder, tiny: TinyRuns) -> None:
    run.open(HARDWARE, "first", "MAML")
    before = file_contents(run.path)
    other = RunFolder(tiny.config(), "custom")
    with pytest.raises(MamlError, match="is training in"):
        other.open(HARDWARE, "second", "MAML")
    other.close("failed")
    assert file_contents(run.path) == before, "a run that is refused leaves the other one alone"
    run.close("finished")
    other.open(HARDWARE, "second", "MAML")
    other.close("finished")


def test_another_seed_is_another_folder(run: RunFolder, tiny: TinyRuns) -> None:
    run.open(HARDWARE, "", "MAML")
    other = RunFolder(tiny.config("seed=1"), "custom")
    other.open(HARDWARE, "", "MAML")
    assert other.path != run.path
    for each in (run, other):
        each.close("finished")


def test_resumed_run_gets_its_checkpoint_and_drops_later_metrics(run: RunFolder, tiny: TinyRuns) -> None:
    run.open(HARDWARE, "", "MAML")
    for iteration in (3, 6):
        run.log(iteration, {"loss": 1 / iteration})
    saved(run, 7)
    run.log(9, {"loss": 0.5})
    run.close("failed")

    again = RunFolder(tiny.config(), "custom")
    found = again.open(HARDWARE, "", "MAML")
    assert found is not None
    assert found["iteration"] == 7
    assert found["state"]["theta"]["w"].tolist() == [7, 7]
    again.log(9, {"loss": 0.25})
    again.close("finished")
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"iteration": 3, "loss": 1 / 3}, {"iteration": 6, "loss": 1 / 6}, {"iteration": 9, "loss": 0.25}]


@pytest.mark.parametrize(("now", "is_said"), [("b" * 40, True), ("a" * 40, False)])
def test_resumed_run_says_that_the_code_is_of_another_commit(
    now: str,
    is_said: bool,
    run: RunFolder,
    tiny: TinyRuns,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("maml.record.run_folder.commit", lambda: {"commit": "a" * 40, "dirty": False})
    run.open(HARDWARE, "", "MAML")
    saved(run, 7)
    run.close("interrupted")
    monkeypatch.setattr("maml.record.run_folder.commit", lambda: {"commit": now, "dirty": False})
    again = RunFolder(tiny.config(), "custom")
    again.open(HARDWARE, "", "MAML")
    again.close("interrupted")
    line = "goes on from iteration 7, trained at commit aaaaaaa; the code is now at bbbbbbb"
    assert (line in "".join(capsys.readouterr())) == is_said


def test_half_written_checkpoints_of_killed_processes_are_removed(run: RunFolder) -> None:
    (run.path / "evaluations" / "1f").mkdir(parents=True)
    for name in (".checkpoint.new.pt.12345", ".run.json.7", "evaluations/1f/.tasks.csv.12345"):
        (run.path / name).write_bytes(b"half")
    run.open(HARDWARE, "", "MAML")
    run.close("finished")
    assert not list(run.path.rglob(".*"))


def test_metrics_keep_every_bit(run: RunFolder) -> None:
    value = torch.tensor(0.1).item() / 3
    run.open(HARDWARE, "", "MAML")
    run.log(1, {"loss": value})
    run.close("finished")
    assert json.loads((run.path / "metrics.jsonl").read_text())["loss"] == value


def test_full_disk_under_the_metrics_is_said_at_the_next_checkpoint(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    run.open(HARDWARE, "", "MAML")
    run.log(3, {"loss": 1.0})
    with monkeypatch.context() as patch, pytest.raises(MamlError, match=r"metrics\.jsonl could not be written \(No sp"):
        patch.setattr("os.fsync", full)
        saved(run, 7)
    run.close("failed")


@pytest.mark.parametrize("content", ["", "{", '{"status": "runn', "\x00\x00"])
def test_damaged_record_is_named(run: RunFolder, content: str) -> None:
    run.path.mkdir(parents=True)
    (run.path / "run.json").write_text(content)
    with pytest.raises(MamlError, match=r"run\.json is damaged .*; move it away, or restore it"):
        run.open(HARDWARE, "", "MAML")


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("run.json", "[]", "it holds a list, not an object"),
        ("run.json", "{}", "run_id is missing"),
        ("run.json", '{"segments": []}', "segments is empty"),
        ("run.json", '{"segments": [3]}', r"segments\[0\] is not an object"),
        ("run.json", '{"segments": [{"seconds": 1}]}', r"segments\[0\]\.first_iteration is missing"),
        ("report.json", "3", "it holds a int, not an object"),
        ("report.json", "{}", "run_id is missing"),
        ("report.json", '{"iteration": "200"}', "iteration is a str"),
        ("report.json", '{"headline": "0.5"}', "headline is a str"),
        ("report.json", '{"curves": {}}', "curves is a dict"),
        (
            "report.json",
            '{"curves": [{"metric": "mse", "num_shots": 5, "steps": [[]]}]}',
            r"curves\[0\]\.steps\[0\] is not an object",
        ),
    ],
)
def test_json_of_the_wrong_shape_is_named_before_anything_is_written(
    run: RunFolder, tiny: TinyRuns, name: str, content: str, reason: str
) -> None:
    run.open(HARDWARE, "", "MAML")
    run.save_report(report(run), ROWS)
    run.close("finished")
    changes = json.loads(content)
    if changes and isinstance(changes, dict):
        changes = json.loads((run.path / name).read_text()) | changes
    (run.path / name).write_text(json.dumps(changes))
    before = file_contents(run.path)
    again = RunFolder(tiny.config(), "custom")
    for look in (again.missing, lambda: again.open(HARDWARE, "", "MAML")):
        with pytest.raises(MamlError, match=rf"{name} is damaged \({reason}.*\); move it away, or restore it"):
            look()
    assert file_contents(run.path) == before


RUN_FILES = ("run.json", "config.yaml", "metrics.jsonl", "report.json", "tasks.csv", "report.png", "checkpoint.pt")


@pytest.mark.parametrize("name", [*RUN_FILES, "checkpoint.new.pt", "checkpoint.previous.pt", "lock"])
def test_folder_in_place_of_a_file_is_named_before_anything_is_written(
    tiny: TinyRuns, tmp_path: Path, name: str
) -> None:
    in_the_way = tiny.folder() / name
    in_the_way.mkdir(parents=True)
    for more in ((), ("mode=eval",)):
        with pytest.raises(MamlError, match=f"{name} is a folder, but a file belongs there; move it away"):
            tiny.run(*more)
    assert [path for path in tiny.runs_dir.rglob("*") if path != in_the_way] == [tiny.folder().parent, tiny.folder()]


def test_file_in_place_of_the_other_evaluations_is_named(run: RunFolder) -> None:
    run.path.mkdir(parents=True)
    (run.path / "evaluations").touch()
    with pytest.raises(MamlError, match=r"cannot be created .*; move away what is in its way"):
        run.save_report(report(run, iteration=20), ROWS)


def test_evaluation_in_a_read_only_folder_says_what_to_do(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    run.path.mkdir(parents=True)
    monkeypatch.setattr(Path, "mkdir", refused)
    with pytest.raises(MamlError, match=r"\(Permission denied\); make the folder above it writable"):
        run.save_report(report(run, iteration=20), ROWS)


def test_checkpoint_without_its_entries_is_named(run: RunFolder) -> None:
    run.path.mkdir(parents=True)
    checkpoint.save(run.checkpoint_path, {"state": {}, "experiment": "custom"})
    with pytest.raises(MamlError, match=r"checkpoint\.pt is damaged \(training is missing\)"):
        run.open(HARDWARE, "", "MAML")


def opened_again(run: RunFolder, tiny: TinyRuns) -> list[int]:
    """Opens a run and returns the iterations of its metrics."""
    again = RunFolder(tiny.config(), "custom")
    again.open(HARDWARE, "", "MAML")
    again.close("interrupted")
    return [json.loads(line)["iteration"] for line in (run.path / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def metrics(run: RunFolder) -> Path:
    """The metrics of a run with lines 3 to 24, log_every=3, and a checkpoint at 21."""
    run.open(HARDWARE, "", "MAML")
    for iteration in range(3, 25, 3):
        run.log(iteration, {"loss": 0.5})
    saved(run, 21)
    run.close("interrupted")
    return run.path / "metrics.jsonl"


@pytest.mark.parametrize(
    "bad", [b"", b"\0" * 40 + b"\n", b'{"loss": 0.5}\n', b"[6]\n", b'{"iteration": 6, "lo', b"\xff\n"]
)
def test_garbage_in_the_middle_of_the_metrics_is_named_and_left_alone(
    metrics: Path, run: RunFolder, tiny: TinyRuns, bad: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    lines = metrics.read_bytes().splitlines(keepends=True)
    metrics.write_bytes(b"".join([lines[0], bad, *lines[2:]]))
    before = file_contents(run.path)
    if bad:
        with pytest.raises(
            MamlError, match=r"metrics\.jsonl, line 2, is damaged or out of order.*Restore the file, or"
        ):
            opened_again(run, tiny)
        assert file_contents(run.path) == before
        lines = metrics.read_bytes().splitlines(keepends=True)
        metrics.write_bytes(b"".join(line for line in lines if b"iteration" in line and line.startswith(b"{")))
    if b"lo" not in bad or bad.startswith(b'{"loss'):  # else the line after the cut one is gone too
        assert opened_again(run, tiny) == [3, 9, 12, 15, 18, 21]
        assert "metrics.jsonl lacks iterations 6 to 6, after line 1" in caplog.text


def test_metrics_out_of_order_are_named(metrics: Path, run: RunFolder, tiny: TinyRuns) -> None:
    lines = metrics.read_bytes().splitlines(keepends=True)
    metrics.write_bytes(b"".join([*lines[:3], lines[1], *lines[3:]]))
    with pytest.raises(MamlError, match=r"metrics\.jsonl, line 4, is damaged or out of order"):
        opened_again(run, tiny)


def test_garbage_in_place_of_the_last_line_before_the_checkpoint_is_named(
    metrics: Path, run: RunFolder, tiny: TinyRuns
) -> None:
    lines = metrics.read_bytes().splitlines(keepends=True)
    metrics.write_bytes(b"".join(lines[:6]) + b"\0\0\0")
    with pytest.raises(MamlError, match=r"metrics\.jsonl, line 7, is damaged"):
        opened_again(run, tiny)


@pytest.mark.parametrize("end", [b"", b'{"iteration": 24, "lo', b"\0\0\n\xff", b'{"iteration": 24, "loss": 1}\n{"iter'])
def test_end_of_the_metrics_after_the_checkpoint_is_cut_off_in_silence(
    metrics: Path, run: RunFolder, tiny: TinyRuns, end: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    metrics.write_bytes(b"".join(metrics.read_bytes().splitlines(keepends=True)[:7]) + end)
    assert opened_again(run, tiny) == list(range(3, 22, 3))
    assert caplog.text == ""


def test_lost_metrics_are_named_and_the_run_goes_on(
    metrics: Path, run: RunFolder, tiny: TinyRuns, caplog: pytest.LogCaptureFixture
) -> None:
    metrics.unlink()
    again = RunFolder(tiny.config(), "custom")
    again.open(HARDWARE, "", "MAML")
    again.close("interrupted")
    assert "metrics.jsonl lacks iterations 3 to 21. The run goes on" in caplog.text


def test_other_log_every_after_a_resume_is_no_hole(
    metrics: Path, tiny: TinyRuns, caplog: pytest.LogCaptureFixture
) -> None:
    for every in (10, 3):
        other = RunFolder(tiny.config(f"log_every={every}"), "custom")
        other.open(HARDWARE, "", "MAML")
        other.log(30, {"loss": 0.5}) if every == 10 else None
        saved(other, 37)
        other.close("interrupted")
    assert caplog.text == ""


def test_record_that_is_behind_its_checkpoint_catches_up(run: RunFolder, tiny: TinyRuns) -> None:
    run.open(HARDWARE, "", "MAML")
    saved(run, 7)
    behind = (run.path / "run.json").read_bytes()
    saved(run, 14)
    run.close("interrupted")
    (run.path / "run.json").write_bytes(behind)  # as after a kill between the two
    again = RunFolder(tiny.config(), "custom")
    again.open(HARDWARE, "", "MAML")
    again.close("interrupted")
    first, second = record(run)["segments"]
    assert (first["last_iteration"], second["first_iteration"], record(run)["iteration"]) == (14, 14, 14)


def test_run_whose_record_is_lost_goes_on_from_its_checkpoint_with_a_warning(
    run: RunFolder, tiny: TinyRuns, caplog: pytest.LogCaptureFixture
) -> None:
    run.open(HARDWARE, "", "MAML")
    saved(run, 7)
    run.close("interrupted")
    (run.path / "run.json").unlink()
    again = RunFolder(tiny.config(), "custom")
    found = again.open(HARDWARE, "", "MAML")
    again.close("interrupted")
    assert found is not None and found["iteration"] == 7
    assert (
        "run.json is missing: from here on nothing says when and where iterations 1 to 7 were computed" in caplog.text
    )
    (segment,) = record(run)["segments"]
    assert (segment["first_iteration"], record(run)["iteration"]) == (7, 7)


@pytest.mark.parametrize(
    ("kept", "what"),
    [([], "there is no checkpoint"), (["checkpoint.previous.pt"], "the newest checkpoint is of iteration 7")],
)
def test_lost_checkpoints_are_named_and_their_iterations_computed_again(
    kept: list[str], what: str, run: RunFolder, tiny: TinyRuns, caplog: pytest.LogCaptureFixture
) -> None:
    run.open(HARDWARE, "", "MAML")
    for at in (7, 14):
        saved(run, at)
    run.close("interrupted")
    for path in run.path.glob("*.pt"):
        if path.name not in kept:
            path.unlink()
    again = RunFolder(tiny.config(), "custom")
    again.open(HARDWARE, "", "MAML")
    again.close("interrupted")
    assert f"iteration 14 was saved, but {what}: a file is missing, and what it had is computed again" in caplog.text


def test_evaluation_that_was_killed_leaves_nothing_to_the_next_one(run: RunFolder) -> None:
    run.path.mkdir(parents=True)
    left = ("classes.csv", "confusion.csv", "tasks.csv", "report.png", "picture_memory.png")
    for name in left:
        (run.path / name).touch()
    assert run.save_report(report(run), ROWS) == run.path
    assert [name for name in left if (run.path / name).exists()] == ["tasks.csv"]
    (run.path / "classes.csv").touch()
    run.save_report(report(run), ROWS)
    assert (run.path / "classes.csv").exists(), "of the same evaluation"


def test_what_is_missing_is_said_until_the_status_is_recorded(tiny: TinyRuns) -> None:
    run = RunFolder(tiny.config("evaluation.num_shots=[5]"), "custom")
    assert run.missing() == {"report.json"}
    run.open(HARDWARE, "", "MAML")
    saved(run, 200)
    mine = report(run) | {"evaluation": evaluation_config(run.settings)}
    run.save_report(mine, ROWS)
    assert run.missing() == {"report.png", "status"}
    (run.path / "report.png").touch()
    assert run.missing() == {"status"}
    run.close("finished")
    assert run.missing() == set()
    (run.path / "tasks.csv").unlink()
    assert run.missing() == {"tasks.csv"}


def test_tasks_that_cannot_be_made_again_are_named(run: RunFolder, tiny: TinyRuns) -> None:
    run.open(HARDWARE, "", "MAML")
    run.save_report(report(run) | {"evaluation": evaluation_config(run.settings)}, ROWS)
    run.close("finished")
    (run.path / "tasks.csv").unlink()
    with pytest.raises(MamlError, match=r"tasks\.csv is missing, and .* has no checkpoint to evaluate again; restore"):
        RunFolder(tiny.config(), "custom").open(HARDWARE, "", "MAML")
    (run.path / "run.json").unlink()
    with pytest.raises(MamlError, match=r"has a report, but .* has neither run\.json nor a checkpoint"):
        RunFolder(tiny.config(), "custom").open(HARDWARE, "", "MAML")


def test_finished_run_without_checkpoint_is_not_trained_again_for_another_evaluation(tiny: TinyRuns) -> None:
    folder = tiny.run("num_iterations=10")
    for path in folder.glob("*.pt"):
        path.unlink()
    kept = file_contents(folder)
    with pytest.raises(MamlError, match=r"report\.json is of another evaluation, and .* has no checkpoint to evaluate"):
        tiny.run("num_iterations=10", "evaluation.num_steps=3")
    assert file_contents(folder) == kept
    tiny.run("num_iterations=10")
    assert file_contents(folder) == kept, "its own evaluation is there"


def test_time_of_a_run_ends_before_its_logger_is_waited_for(run: RunFolder) -> None:
    run.open(HARDWARE, "", "MAML")
    run.stop_clock()
    time.sleep(0.05)
    run.close("finished")
    assert record(run)["seconds"] < 0.05


def test_report_of_the_whole_run_lies_in_its_folder(run: RunFolder) -> None:
    run.open(HARDWARE, "", "MAML")
    assert run.save_report(report(run), ROWS) == run.path
    assert read_json(run.path / "report.json") == report(run)
    with open(run.path / "tasks.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["metric"], int(row["task"]), float(row["step_0"])) for row in rows] == [
        (row["metric"], row["task"], row["step_0"]) for row in ROWS
    ]
    run.close("finished")


def test_data_of_a_given_checkpoint_are_those_of_its_own_training(tiny: TinyRuns) -> None:
    folder = tiny.run("num_iterations=2")
    (segment,) = (read_json(folder / "run.json") or {})["segments"]
    overrides = ("num_iterations=2", "mode=eval", f"checkpoint={folder / 'checkpoint.pt'}")
    settings = tiny.in_folder("elsewhere").config(*overrides)
    RunFolder(settings, "custom", "now").check_sources()  # the record does not know its data
    edit(folder / "run.json", segments=[segment | {"data": "before"}])
    with pytest.raises(MamlError, match=f"the data of .* have changed since {folder} was trained"):
        RunFolder(settings, "custom", "now").check_sources()
    RunFolder(settings, "custom", "before").check_sources()


def test_sources_may_change_until_something_is_trained(run: RunFolder, tiny: TinyRuns) -> None:
    run.data_digest = "before"
    run.open(HARDWARE, "", "MAML")
    RunFolder(tiny.config(), "custom", "now").check_sources()
    saved(run, 7)
    run.close("interrupted")
    with pytest.raises(MamlError, match=r"the data of .* have changed"):
        RunFolder(tiny.config(), "custom", "now").check_sources()
    (run.path / "checkpoint.pt").rename(run.path / "best.pt")
    given = tiny.config("mode=eval", f"checkpoint={run.path / 'best.pt'}")
    with pytest.raises(MamlError, match=r"the data of .* have changed"):
        RunFolder(given, "custom", "now").check_sources()
    run.save_report(report(run), ROWS)
    with pytest.raises(MamlError, match=r"the data of .* have changed"):
        RunFolder(tiny.config(), "custom", "now").check_sources()


def test_no_report_overwrites_another(run: RunFolder, tiny: TinyRuns) -> None:
    run.path.mkdir(parents=True)
    evaluated = RunFolder(tiny.config("mode=eval"), "custom")
    assert run.save_report(report(run), ROWS) == run.path
    others = (report(run, num_shots=3), report(run, iteration=20), report(run, 20, 3), report(run))
    folders = [evaluated.save_report(each, ROWS) for each in others]
    assert len(set(folders)) == 4
    assert all(folder.parent == run.path / "evaluations" for folder in folders)
    assert run.save_report(report(run, num_shots=3), ROWS) == folders[0], "trained before, evaluated anew"
    assert run.save_report(report(run), ROWS) == run.path


def test_finished_report_is_that_of_the_same_evaluation(tiny: TinyRuns) -> None:
    run = RunFolder(tiny.config("evaluation.num_shots=[3]"), "custom")
    run.path.mkdir(parents=True)
    mine = report(run) | {"evaluation": evaluation_config(run.settings)}
    run.save_report(mine | {"iteration": 20}, ROWS)
    assert run.finished_report() is None, "an unfinished run"
    run.save_report(report(run), ROWS)
    assert run.finished_report() is None, "another evaluation"
    run.save_report(mine, ROWS)
    assert run.finished_report() == mine


def test_same_training_is_found_under_another_experiment(run: RunFolder, tiny: TinyRuns, tmp_path: Path) -> None:
    run.open(HARDWARE, "", "MAML")
    saved(run, 200)
    run.close("finished")
    second = RunFolder(tiny.config("evaluation.num_steps=1"), "second")
    assert second.path == run.path
    found = second.load_checkpoint()
    assert found is not None and found["iteration"] == 200
    assert RunFolder(tiny.config("seed=1"), "second").path.parent == tiny.runs_dir / "second", "another training is not"
    given = tiny.config(f"run_dir={tmp_path / 'x'}")
    assert RunFolder(given, "second").path == tmp_path / "x"


def test_own_folder_comes_before_that_of_another_experiment(run: RunFolder, tiny: TinyRuns) -> None:
    own = tiny.runs_dir / "second" / run.run_id
    own.mkdir(parents=True)
    run.open(HARDWARE, "", "MAML")
    run.close("finished")
    (own / "lock").touch()
    assert RunFolder(tiny.config(), "second").path == run.path, "its own was killed before anything was written"
    for name in ("run.json", "checkpoint.previous.pt"):
        (own / name).touch()
        assert RunFolder(tiny.config(), "second").path == own
        (own / name).unlink()


def test_baselines_that_part_in_meta_test_share_one_training(
    tiny_images: TinyRuns, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (
        tiny_images.config("num_iterations=2", "model.num_filters=4", f"algorithm={name}")
        for name in ("finetune", "nearest_neighbor")
    )
    headline = run_experiment(first, "first")
    folder = RunFolder(first, "first").path
    kept = file_contents(folder)
    monkeypatch.setattr(Classifier, "meta_update", lambda *_: pytest.fail("trained again"))
    other = run_experiment(second, "second")
    assert not (tiny_images.runs_dir / "second").exists()
    now = file_contents(folder)
    assert {name: now[name] for name in kept} == kept, "record, config and report of the first are left alone"
    beside = f"evaluations/{digest({'iteration': 2, **evaluation_config(second)})}/"
    assert {name for name in now if name not in kept} == {f"{beside}{name}" for name in (*REPORT_FILES, "config.yaml")}
    reports = [read_json(folder / path / "report.json") for path in ("", beside)]
    for report, experiment, number in zip(reports, ("first", "second"), (headline, other), strict=True):
        assert report is not None
        assert (report["experiment"], report["headline"]) == (experiment, number)
    monkeypatch.setattr("maml.evaluation.Evaluation.__call__", lambda *_: pytest.fail("evaluated again"))
    assert [run_experiment(first, "first"), run_experiment(second, "second")] == [headline, other]
