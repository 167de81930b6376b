"""The files of a run folder: read, and refused with a remedy if they are damaged or lack an entry."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from maml.digest import digest
from maml.errors import MamlError
from maml.record import checkpoint
from maml.record.classes import TABLES
from maml.record.contents import Report, SavedTraining

LOG = logging.getLogger(__name__)

# The files of a run folder, and of a folder of another evaluation in it.
RUN_FILES = ("run.json", "metrics.jsonl", "lock", "checkpoint.pt", "checkpoint.new.pt", "checkpoint.previous.pt")
EVALUATION_FILES = ("config.yaml", "report.json", "tasks.csv", "report.png", *TABLES)

Schema = TypeVar("Schema", bound=BaseModel)


def read_json(path: Path, schema: type[BaseModel] | None = None) -> dict[str, Any] | None:
    """Reads a JSON file with an object, as it is; returns None if it does not exist.

    Args:
        path: the file.
        schema: what the object has to fulfil; entries that it does not name are kept.

    Raises:
        MamlError: if the file is damaged, cannot be read, or does not hold such an object.
    """
    try:
        content = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except IsADirectoryError as error:
        raise _in_the_way(path) from error
    except OSError as error:
        raise MamlError(f"{path} cannot be read ({error.strerror}); change its permissions, and try again") from error
    except ValueError as error:
        raise _damaged(path, str(error)) from error
    if not isinstance(content, dict):
        raise _damaged(path, f"it holds a {type(content).__name__}, not an object")
    if schema is not None:
        validated(path, content, schema)
    return content


def read(path: Path, schema: type[Schema]) -> Schema | None:
    """Reads a JSON file as an object of a schema; returns None if it does not exist.

    Raises:
        MamlError: as `read_json`.
    """
    content = read_json(path)
    return None if content is None else validated(path, content, schema)


def read_config(path: Path) -> dict[str, Any]:
    """Reads a run's config as plain data: tags of Python objects are refused, interpolations stay texts.

    Raises:
        MamlError: if the file is no mapping of plain data.
    """
    try:
        config = yaml.safe_load(path.read_text())
        json.dumps(config)  # fails for dates, bytes and lists that contain themselves
    except (OSError, TypeError, ValueError, yaml.YAMLError) as error:
        raise MamlError(f"{path} is damaged, or no config of a run ({error}); restore it") from error
    if not isinstance(config, dict):
        raise MamlError(f"{path} is damaged: it is no mapping of settings; restore it")
    return config


def report_paths(folder: Path) -> list[Path]:
    """Returns where a run's reports are: first its own, which may not exist, then those in ``evaluations/``."""
    return [folder / "report.json", *sorted(folder.glob("evaluations/*/report.json"))]


def evaluation_folder(folder: Path, iteration: int, evaluation: Mapping[str, Any]) -> Path:
    """Returns the own folder of one of a run's evaluations, named by a hash of its settings.

    Args:
        folder: the run's folder.
        iteration: number of iterations that the evaluated state was trained for.
        evaluation: settings of the evaluation, see `evaluation_config`.
    """
    return folder / "evaluations" / digest({"iteration": iteration, **evaluation})


def find_report(
    folder: Path, run_id: str, evaluation: Mapping[str, Any], unfinished: bool = False
) -> tuple[dict[str, Any], Path] | None:
    """Returns the report of an evaluation, and the folder that it and its ``tasks.csv`` are in; None if there is none.

    Args:
        folder: the run's folder.
        run_id: the run's id.
        evaluation: settings of the evaluation, see `evaluation_config`.
        unfinished: whether an evaluation of an unfinished training counts; the one of the latest iteration is returned.

    Raises:
        MamlError: if a report is damaged.
    """
    found = []
    for path in report_paths(folder):
        report = read_json(path, Report)
        if report is None or report["evaluation"] != evaluation or report["run_id"] != run_id:
            continue
        if report["iteration"] == report["num_iterations"]:
            return report, path.parent
        if unfinished:
            found.append((report, path.parent))
    return max(found, key=lambda entry: entry[0]["iteration"], default=None)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Reads a run's checkpoint.

    Raises:
        MamlError: if it does not exist, is damaged, or lacks an entry.
    """
    saved = checkpoint.load(path)
    validated(path, saved, SavedTraining)
    return saved


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Reads a ``metrics.jsonl``, without a last line that is being written or was cut off.

    Returns:
        One dict per line; empty if the file does not exist, as after a run of no iterations.

    Raises:
        MamlError: if the file is damaged.
    """
    *lines, _ = path.read_text(errors="replace").split("\n") if path.exists() else [""]
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            record["iteration"] = int(record["iteration"])
        except (ValueError, TypeError, KeyError) as error:
            raise MamlError(f"{path} is damaged in line {number} ({error}); restore it, and try again") from error
        records.append(record)
    return records


def lines_until(
    iteration: int, path: Path, record: Mapping[str, Any] | None, num_iterations: int, warn: bool
) -> bytes | None:
    """Returns the lines of a ``metrics.jsonl`` up to a checkpoint; None if the file does not exist.

    Lines after the checkpoint may be cut off by a kill, or garbage after a power failure. Earlier ones cannot:
    they were flushed to disk before the checkpoint was written.

    Args:
        iteration: the checkpoint's iteration.
        path: the file.
        record: the run's record, which knows how often lines were written.
        num_iterations: number of iterations of the whole training.
        warn: whether to log a warning about lost lines.

    Raises:
        MamlError: if there is garbage before the checkpoint's iteration.
    """
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    kept, iterations, last, unreadable = [], [0], 0, 0
    for number, line in enumerate(lines, start=1):
        logged = _logged_iteration(line)
        if logged is not None and logged <= iteration and (unreadable or logged <= last):
            raise _garbage(path, unreadable or number, iteration)
        if logged is None:
            unreadable = unreadable or number
            continue
        last = logged
        if logged <= iteration:
            kept.append(line)
            iterations.append(logged)
    lost = sorted(_expected_iterations(record, iteration, num_iterations) - set(iterations))
    if lost and unreadable:
        raise _garbage(path, unreadable, iteration)
    if lost and warn:
        before = sum(logged < lost[0] for logged in iterations) - 1
        LOG.warning(
            "%s lacks iterations %d to %d%s. The run goes on without these lines, and no result depends on them. "
            "If you have a copy of the file, stop the run and restore it",
            path,
            lost[0],
            lost[-1],
            f", after line {before}" if before else "",
        )
    return b"".join(kept) if lines else None


def refuse_folders(folder: Path, names: Iterable[str]) -> None:
    """Refuses folders that lie where files with these names belong.

    Raises:
        MamlError: names the first one.
    """
    for name in names:
        if (folder / name).is_dir():
            raise _in_the_way(folder / name)


def validated(path: Path, content: Any, schema: type[Schema]) -> Schema:
    """Returns what was read from a file as an object of a schema.

    Raises:
        MamlError: names the first entry that is missing or wrong.
    """
    try:
        return schema.model_validate(content)
    except ValidationError as error:
        raise _damaged(path, _reason(error)) from error


def _reason(error: ValidationError) -> str:
    first = error.errors()[0]
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
    if first["type"] == "missing":
        return f"{where} is missing"
    if first["type"] == "too_short":
        return f"{where} is empty"
    if first["type"] == "model_type":
        return f"{where} is not an object"
    if first["type"].endswith("_type"):
        return f"{where} is a {type(first['input']).__name__}"
    return f"{where}: {first['msg']}"


def _damaged(path: Path, reason: str) -> MamlError:
    return MamlError(f"{path} is damaged ({reason}); move it away, or restore it, and try again")


def _in_the_way(path: Path) -> MamlError:
    return MamlError(f"{path} is a folder, but a file belongs there; move it away, and try again")


def _logged_iteration(line: bytes) -> int | None:
    """Returns the iteration of one line of ``metrics.jsonl``; None if the line is damaged or cut off."""
    try:
        content = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    logged = content.get("iteration") if isinstance(content, dict) else None
    return logged if isinstance(logged, int) else None


def _expected_iterations(record: Mapping[str, Any] | None, iteration: int, num_iterations: int) -> set[int]:
    """Returns the iterations up to a checkpoint that were logged, as far as the record knows how often that was."""
    expected: set[int] = set()
    end = iteration
    for segment in reversed(record["segments"] if record else []):
        numbers = range(segment["first_iteration"] + 1, end + 1)
        if every := segment.get("log_every"):
            expected |= {number for number in numbers if number % every == 0 or number == num_iterations}
        end = min(end, segment["first_iteration"])
    return expected


def _garbage(path: Path, line: int, iteration: int) -> MamlError:
    return MamlError(
        f"{path}, line {line}, is damaged or out of order, although it is older than the checkpoint of iteration "
        f"{iteration}. Restore the file, or delete this line (no result depends on it), and run the same command again"
    )
