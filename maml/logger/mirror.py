"""Replays a run that has ended from its folder to a logger, as if the logger had been there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from maml.config.identity import without_keys
from maml.digest import digest
from maml.errors import MamlError
from maml.logger.base import Logger
from maml.record.contents import Report, RunRecord
from maml.record.gallery import report_pictures
from maml.record.lock import is_held
from maml.record.run_files import read_config, read_json, read_metrics, report_paths


def described(config: Mapping[str, Any], training: Mapping[str, Any], algorithm: str) -> dict[str, Any]:
    """Returns a config with two more entries, by which runs can be grouped: ``settings_hash`` and ``algorithm_name``.

    Args:
        config: the resolved config.
        training: the settings on which trained numbers depend (`maml.config.identity.training_config`). Runs that
            differ in nothing but the seed have the same hash.
        algorithm: the algorithm's name.
    """
    return {**config, "settings_hash": digest(without_keys(training, "seed")), "algorithm_name": algorithm}


def mirror(folder: Path, logger: Logger, files_dir: Path | None = None) -> int:
    """Replays a run, and each evaluation in ``evaluations/`` as a run of its own, of mode ``eval``.

    Nothing is trained, and nothing in the folder changes but the logger's own files.

    Args:
        folder: the run's folder.
        logger: the logger that gets the run; what it got before is not sent again.
        files_dir: the folder below which the logger writes its files; None is the run's folder.

    Returns:
        The number of runs that the logger got, 0 if it had all of them.

    Raises:
        MamlError: if the run has not ended, a file is missing or damaged, or the logger did not get everything.
    """
    files_dir = files_dir or folder
    config = read_config(folder / "config.yaml")
    sent = int(replay(folder, logger, config, read_json(folder / "report.json", Report), files_dir=files_dir))
    _check_complete(logger, folder)
    _, *others = report_paths(folder)
    for path in others:
        evaluation = path.parent
        own_config = {**read_config(evaluation / "config.yaml"), "mode": "eval"}
        own_files = files_dir / evaluation.relative_to(folder)
        sent += replay(folder, logger, own_config, read_json(path, Report), files_dir=own_files, with_training=False)
        _check_complete(logger, evaluation)
    return sent


def _check_complete(logger: Logger, folder: Path) -> None:
    if not logger.is_complete:
        raise MamlError(f"{folder} was not mirrored completely, for the reason above; mend it, and mirror it again")


def replay(
    folder: Path,
    logger: Logger,
    config: Mapping[str, Any],
    report: Mapping[str, Any] | None,
    cells: Callable[[], Mapping[str, str]] = dict,
    files_dir: Path | None = None,
    with_training: bool = True,
) -> bool:
    """Replays a run with one report, unless the logger has it already.

    Args:
        folder: the run's folder.
        logger: the logger that gets the run.
        config: the resolved config.
        report: the content of a ``report.json`` of this run; None if there is none.
        cells: returns verdicts by cell, which are sent with the report.
        files_dir: the folder below which the logger writes its files; None is the run's folder.
        with_training: whether the training metrics are sent too.

    Returns:
        Whether anything was sent.

    Raises:
        MamlError: if the run has not ended, or a file is missing or damaged.
    """
    record = read_json(folder / "run.json", RunRecord)
    if record is None:
        raise MamlError(f"{folder} is no run folder: it has no run.json")
    if record["status"] == "running" and is_held(folder / "lock"):
        raise MamlError(f"{folder} is being trained; mirror it when it has ended")
    files_dir, run_id = files_dir or folder, record["run_id"]
    experiment = (report or record)["experiment"]
    if report is not None and logger.has(files_dir, experiment, run_id, config, report):
        return False
    algorithm = record.get("algorithm", "")  # the oldest records do not have it
    last = record["segments"][-1]
    history = {
        "record": {key: record.get(key) for key in ("started", "finished", "seconds", "command")}
        | {key: last.get(key) for key in ("commit", "dirty", "hardware", "versions")}
    }
    lines = read_metrics(folder / "metrics.jsonl") if with_training else []  # before anything is sent: may be damaged
    files_dir.mkdir(parents=True, exist_ok=True)
    full_config = described(config, record["training"], config.get("algorithm_name") or algorithm) | history
    logger.replay_into(files_dir)
    logger.start(folder, experiment, run_id, full_config, resumed=False)
    for line in lines:
        logger.log({key: value for key, value in line.items() if key != "iteration"}, line["iteration"])
    if report is not None:
        logger.report({**report, "cells": dict(cells())}, _pictures(folder, report))
    logger.finish("interrupted" if record["status"] == "running" else record["status"])  # running: it was killed
    return True


def _pictures(folder: Path, report: Mapping[str, Any]) -> dict[str, Path]:
    """Returns the picture of a report, and the animations of the run's policy, by name."""
    beside = next((path.parent for path in report_paths(folder) if read_json(path) == report), None)
    pictures = report_pictures(beside) if beside is not None else {}
    return pictures | {path.stem: path for path in sorted(folder.glob("policy_goal_*.gif"))}
