"""A run that has ended, replayed to a logger: what the logger gets, and what the run's folder keeps."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from maml.config.paths import RESULTS
from maml.errors import MamlError
from maml.logger.base import Logger
from maml.logger.mirror import described, mirror, replay
from maml.record.lock import acquire
from maml.record.run_files import read_json
from tests.paper.fake_runs import edit
from tests.runs import TinyRuns, file_contents

SHORT = ("num_iterations=10", "evaluation.num_tasks=3")


class Noting(Logger):
    """A logger that keeps all calls in order, and has a run once it was finished."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.known: list[tuple[str, Any]] = []

    def of(self, kind: str) -> list[Any]:
        return [content for name, content in self.calls if name == kind]

    def replay_into(self, files_dir: Path) -> None:
        self.calls.append(("replay_into", files_dir))

    def start(self, run_dir: Path, experiment: str, run_id: str, config: Mapping[str, Any], resumed: bool) -> None:
        self.calls.append(("start", (run_dir, experiment, run_id, dict(config), resumed)))

    def log(self, metrics: Mapping[str, float], iteration: int) -> None:
        self.calls.append(("log", {"iteration": iteration, **metrics}))

    def report(self, report: dict[str, Any], pictures: Mapping[str, Path]) -> None:
        self.calls.append(("report", (report, dict(pictures))))
        self.known.append((report["run_id"], report["evaluation"]))

    def finish(self, status: str) -> None:
        self.calls.append(("finish", status))

    def has(self, *arguments: Any) -> bool:
        report = arguments[-1]
        return (report["run_id"], report["evaluation"]) in self.known


def test_logger_gets_config_metrics_report_picture_and_status(tiny: TinyRuns) -> None:
    folder, logger = tiny.run(*SHORT), Noting()
    before = file_contents(folder)
    assert mirror(folder, logger) == 1
    assert logger.of("replay_into") == [folder]
    ((run_dir, experiment, run_id, config, resumed),) = logger.of("start")
    assert (run_dir, experiment, run_id, resumed) == (folder, "custom", folder.name, False)
    assert config["num_iterations"] == 10 and config["algorithm_name"] == "MAML"
    assert config["record"]["command"] == (read_json(folder / "run.json") or {})["command"]
    assert "commit" in config["record"] and len(config["settings_hash"]) == 12
    assert logger.of("log") == [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    ((report, pictures),) = logger.of("report")
    assert report == {**(read_json(folder / "report.json") or {}), "cells": {}}
    assert pictures == {"adaptation": folder / "report.png"}
    assert logger.of("finish") == ["finished"]
    assert file_contents(folder) == before


def test_second_mirror_sends_nothing(tiny: TinyRuns) -> None:
    folder, logger = tiny.run(*SHORT), Noting()
    mirror(folder, logger)
    count = len(logger.calls)
    assert mirror(folder, logger) == 0
    assert len(logger.calls) == count


def test_evaluation_is_a_run_of_its_own(tiny: TinyRuns, tmp_path: Path) -> None:
    folder, logger = tiny.run(*SHORT), Noting()
    tiny.run(*SHORT, "mode=eval", "evaluation.num_steps=1")
    edit(next(folder.glob("evaluations/*/report.json")), experiment="another")  # which shares the training
    assert mirror(folder, logger, tmp_path / "files") == 2
    (evaluation,) = folder.glob("evaluations/*")
    assert [experiment for _, experiment, *_ in logger.of("start")] == ["custom", "another"]
    assert logger.of("replay_into") == [tmp_path / "files", tmp_path / "files" / "evaluations" / evaluation.name]
    assert [config["mode"] for _, _, _, config, _ in logger.of("start")] == ["train", "eval"]
    assert logger.of("report")[1][0]["evaluation"] == (read_json(evaluation / "report.json") or {})["evaluation"]
    assert logger.of("report")[1][1] == {"adaptation": evaluation / "report.png"}
    assert len(logger.of("log")) == len((folder / "metrics.jsonl").read_text().splitlines()), "once, not twice"


def test_run_that_was_killed_is_mirrored_as_interrupted_and_without_its_last_half_line(tiny: TinyRuns) -> None:
    folder, logger = tiny.run(*SHORT), Noting()
    record = read_json(folder / "run.json") or {}
    (segment,) = record["segments"]
    edit(folder / "run.json", status="running", segments=[segment, segment | {"commit": "of the end"}])
    (folder / "report.json").unlink()
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join([*lines, '{"iterat']))
    assert mirror(folder, logger) == 1
    assert len(logger.of("log")) == len(lines)
    assert (logger.of("report"), logger.of("finish")) == ([], ["interrupted"])
    assert logger.of("start")[0][3]["record"]["commit"] == "of the end"


def test_what_cannot_be_mirrored_is_refused_before_anything_is_sent(tiny: TinyRuns, tmp_path: Path) -> None:
    folder, logger = tiny.run(*SHORT), Noting()
    for name, content, message in (
        ("metrics.jsonl", '{"iteration": 3}\n[]\n{"iteration": 6}\n', "damaged in line 2"),
        ("config.yaml", "- a list", "config.yaml is damaged: it is no mapping of settings"),
        ("run.json", None, "is no run folder"),
    ):
        copy = shutil.copytree(folder, tmp_path / name)
        (copy / name).unlink()
        if content:
            (copy / name).write_text(content)
        with pytest.raises(MamlError, match=message):
            mirror(copy, logger)
    (folder / "run.json").write_text(json.dumps((read_json(folder / "run.json") or {}) | {"status": "running"}))
    lock = acquire(folder / "lock")
    assert lock is not None
    with pytest.raises(MamlError, match="is being trained"):
        mirror(folder, logger)
    lock.release()
    assert logger.calls == []


def test_incomplete_mirror_is_an_error(tiny: TinyRuns) -> None:
    logger = Noting()
    logger.is_complete = False
    with pytest.raises(MamlError, match="was not mirrored completely"):
        mirror(tiny.run(*SHORT), logger)


def test_config_is_read_as_data_and_builds_nothing(tiny: TinyRuns, tmp_path: Path) -> None:
    folder, logger = tiny.run(*SHORT), Noting()
    target = tmp_path / "written"
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text + f"extra: {{_target_: pathlib.Path.touch, self: {target}}}\n")
    mirror(folder, logger)
    assert logger.of("start")[0][3]["extra"]["_target_"] == "pathlib.Path.touch"
    assert not target.exists()


def test_verdicts_are_asked_for_only_if_they_are_sent(tiny: TinyRuns) -> None:
    folder, logger = tiny.run(*SHORT), Noting()
    report = read_json(folder / "report.json")
    assert replay(folder, logger, {}, report, lambda: {"cell": "equal"})
    assert logger.of("report")[0][0]["cells"] == {"cell": "equal"}
    assert not replay(folder, logger, {}, report, lambda: pytest.fail("asked"))


@pytest.mark.parametrize("folder", sorted(RESULTS.glob("runs/*/*/run.json"))[:3], ids=lambda path: path.parent.name)
def test_committed_run_is_mirrored_without_a_change(folder: Path, tmp_path: Path) -> None:
    folder, logger = folder.parent, Noting()
    before = file_contents(folder)
    assert mirror(folder, logger, tmp_path) >= 1
    assert logger.of("start")[0][0] == folder
    assert file_contents(folder) == before


def test_settings_hash_is_that_of_all_seeds() -> None:
    first, second, other = (
        described({"seed": seed}, {"seed": seed, "num_iterations": number}, "MAML")
        for seed, number in ((0, 10), (1, 10), (0, 20))
    )
    assert first["settings_hash"] == second["settings_hash"] != other["settings_hash"]
    assert (first["seed"], second["seed"], first["algorithm_name"]) == (0, 1, "MAML")
    assert described({}, {"num_iterations": 10}, "MAML")["settings_hash"] == first["settings_hash"]
