"""Begins a run with the state of a finished run that differs from it in a smaller number of iterations only."""

from __future__ import annotations

import json
import shutil
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from maml.errors import MamlError
from maml.record import checkpoint
from maml.record.atomic import write_json_atomically
from maml.record.contents import RunRecord
from maml.record.index import SUPERSEDED
from maml.record.provenance import changed_since
from maml.record.run_files import read_checkpoint, read_json, read_metrics
from maml.record.run_folder import RunFolder

_STAGING = ".extending"  # in the folder of all runs, one level deeper than run folders
_ABANDONED = 86_400  # seconds


def extend_finished_run(folder: RunFolder) -> Path | None:
    """Copies the longest such run to the run's folder, if this does not exist yet; training then goes on from there.

    Iteration t depends on the seed and t only, so the extended run has the numbers that it would have from the start. A
    setting that follows ``num_iterations``, such as the length of a schedule, makes two runs differ in more.

    Args:
        folder: the folder of the run, before `RunFolder.open`.

    Returns:
        The folder of the finished run; None if there is none.
    """
    if folder.settings.run_dir is not None:
        return None
    runs_dir, path = Path(folder.settings.runs_dir), folder.path
    copies = runs_dir / _STAGING / path.parent.name
    for left in copies.glob("*"):  # by a process that was killed while it copied
        with suppress(OSError):  # another process removes it, too
            if time.time() - left.stat().st_mtime > _ABANDONED:
                shutil.rmtree(left)
    if path.exists():
        return None
    found = [other for run in sorted(runs_dir.glob("*/*/run.json")) if (other := _finished_part(run.parent, folder))]
    if not found:
        return None
    donor, record, saved, lines = max(found, key=lambda each: each[2]["iteration"])
    staging = copies / f"{path.name}_{uuid.uuid4().hex}"  # of this process alone
    try:
        staging.mkdir(parents=True)
        # The shorter run logged its last iteration in any case. A run that goes on logs it only if log_every says so.
        done = saved["iteration"]
        is_regular = done % record["segments"][-1].get("log_every", 1) == 0
        regular = lines if is_regular else [line for line in lines if line["iteration"] < done]
        (staging / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in regular))
        own = {"experiment": folder.experiment, "run_id": folder.run_id, "training": folder.training_config}
        checkpoint.save(staging / "checkpoint.pt", saved | own)
        keys = ("seed", "started", "seconds", "segments", "algorithm")
        kept = {key: record[key] for key in keys if key in record}
        content = kept | own | {"command": record["command"], "status": "interrupted", "iteration": saved["iteration"]}
        write_json_atomically(staging / "run.json", content)
        path.parent.mkdir(parents=True, exist_ok=True)
        staging.rename(path)
    except OSError as error:
        raise MamlError(f"{donor} cannot be copied to {path} ({error.strerror}); change runs_dir") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        for parent in (staging.parent, staging.parent.parent):
            with suppress(OSError):  # another process uses it
                parent.rmdir()
    return donor


def _finished_part(
    other: Path, folder: RunFolder
) -> tuple[Path, dict[str, Any], dict[str, Any], list[dict[str, Any]]] | None:
    """Returns the folder, record, checkpoint and metrics of a run that this one can go on from; None for others."""
    try:
        record = read_json(other / "run.json", RunRecord)
    except MamlError:  # damaged; its own command says so
        return None
    if record is None or record["status"] != "finished" or (other / SUPERSEDED).exists():
        return None
    training: Mapping[str, Any] = record["training"]
    ours = folder.training_config
    done, wanted = training.get("num_iterations"), ours.get("num_iterations")
    if not isinstance(done, int) or not isinstance(wanted, int) or not 0 < done < wanted:
        return None
    if {**training, "num_iterations": wanted} != ours:
        return None
    if folder.settings.changed_sources == "refuse" and changed_since(other, folder.settings, folder.data_digest):
        return None  # its numbers belong to the old code or data
    every = ours.get("validate_every")
    if every and done % every:  # its last iteration was validated in addition
        return None
    file = checkpoint.newest(other / "checkpoint.pt")
    if file is None:
        return None
    try:
        saved, lines = read_checkpoint(file), read_metrics(other / "metrics.jsonl")
    except MamlError:  # damaged; its own command says so
        return None
    return (other, record, saved, lines) if (saved["iteration"], saved["training"]) == (done, training) else None
