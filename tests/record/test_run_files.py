"""The files of a run folder, as they are read; what `RunFolder` refuses is in test_run_folder.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from maml.errors import MamlError
from maml.record.contents import RunRecord
from maml.record.run_files import find_report, lines_until, read, read_config, read_json, read_metrics
from tests.paper.fake_runs import add_evaluation, make_run


def test_file_that_does_not_exist_is_none(tmp_path: Path) -> None:
    assert read_json(tmp_path / "run.json") is None
    assert read(tmp_path / "run.json", RunRecord) is None
    assert read_metrics(tmp_path / "metrics.jsonl") == []
    assert lines_until(5, tmp_path / "metrics.jsonl", None, 10, warn=True) is None


@pytest.mark.parametrize("content", ["- a list", "date: 2020-01-01", "{", "a: !!python/name:os.system"])
def test_config_that_is_no_mapping_of_plain_data_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(MamlError, match=r"config\.yaml is damaged"):
        read_config(tmp_path / "config.yaml")


def test_metrics_are_read_and_cut_at_a_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"iteration": iteration, "loss": 0.5}) + "\n" for iteration in (3, 6, 9)]
    path.write_text("".join(lines) + '{"iteration": 12, "lo')
    assert [line["iteration"] for line in read_metrics(path)] == [3, 6, 9]
    assert lines_until(6, path, None, 20, warn=True) == "".join(lines[:2]).encode()


def test_unfinished_training_has_the_report_of_its_latest_evaluation(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    report = read_json(folder / "report.json") or {}
    add_evaluation(folder, iteration=500)
    (folder / "evaluations" / "0b").rename(folder / "evaluations" / "0a")
    add_evaluation(folder, iteration=400)
    asked = folder, folder.name, report["evaluation"]
    assert find_report(*asked, unfinished=True) == (report, folder)
    assert find_report(folder, "of another run", report["evaluation"], unfinished=True) is None
    (folder / "report.json").unlink()
    assert find_report(*asked) is None
    found = find_report(*asked, unfinished=True)
    assert found and found[1].name == "0a"


def test_lost_line_of_the_last_iteration_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 3}\n{"iteration": 6}\n')
    record = {"segments": [{"first_iteration": 0, "log_every": 3}]}
    lines_until(7, tmp_path / "metrics.jsonl", record, 8, warn=True)
    assert caplog.text == ""
    lines_until(7, tmp_path / "metrics.jsonl", record, 7, warn=True)
    assert "lacks iterations 7 to 7, after line 2" in caplog.text
