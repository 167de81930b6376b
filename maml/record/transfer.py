"""Takes runs over from another machine: checked first, one by one, and never in place of something that is further."""

from __future__ import annotations

import lzma
import os
import shutil
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from maml.digest import digest
from maml.errors import MamlError
from maml.record import checkpoint
from maml.record.atomic import is_temporary
from maml.record.classes import TABLES
from maml.record.gallery import report_pictures
from maml.record.index import Run, read_run
from maml.record.lock import acquire, advice, holder
from maml.record.run_files import (
    EVALUATION_FILES,
    RUN_FILES,
    evaluation_folder,
    read_checkpoint,
    read_config,
    read_metrics,
)

_STAGING = ".importing"  # in the folder that takes the runs, so that moving them is a rename


def is_portable(path: Path) -> bool:
    """Returns whether a file of a run folder is of use on another machine: locks and half-written files are not."""
    return path.name not in ("lock", "lock.marker", "checkpoint.previous.pt") and not is_temporary(path)


@dataclass(frozen=True)
class Outcome:
    """The outcome of importing one run of the archive.

    Attributes:
        folder: the run's folder: here, or in the archive if it was refused.
        text: what was done, in words.
        refused: whether the run was not taken because something is wrong.
    """

    folder: Path
    text: str
    refused: bool = False


def import_runs(archive: Path, into: Path) -> list[Outcome]:
    """Takes the runs of an archive into a folder of run folders.

    A run that is here already is replaced if the archive's continues it or adds evaluations; evaluations from here are
    kept. If it is further here, it stays. A run of the same settings and seed with another history is another sample
    and stands beside it, as ``<run id>_2``. A kill at any point loses nothing; the same call goes on.

    Args:
        archive: tar file with folders ``<experiment>/<run id>``, at any depth.
        into: folder of run folders.

    Returns:
        One outcome for each run in the archive.

    Raises:
        MamlError: if the archive cannot be read or holds no run, or another process is importing.
    """
    if not archive.is_file():
        raise MamlError(f"there is no file {archive}")
    with _staging(into) as staging:
        content = staging / "content"
        _extract(archive, content)
        folders = sorted(path.parent for path in content.glob("*/*/**/run.json"))
        if not folders:
            raise MamlError(f"{archive} holds no run: pack folders EXPERIMENT/ID, as `tar cf runs.tar runs` does")
        outcomes = []
        for folder in folders:
            try:
                outcomes.append(_take(folder, into, staging))
            except (MamlError, OSError) as error:
                where = folder.relative_to(content)
                outcomes.append(Outcome(where, f"refused: {str(error).replace(f'{content}/', '')}", refused=True))
        return outcomes


@contextmanager
def _staging(into: Path) -> Iterator[Path]:
    """Yields a folder for incomplete copies, one at a time, and puts back what a killed import had moved away."""
    try:
        into.mkdir(parents=True, exist_ok=True)
        lock = acquire(into / f"{_STAGING}.lock")
    except OSError as error:
        raise MamlError(f"{into} cannot be written ({error.strerror}); choose another folder with --into") from error
    if lock is None:
        path = into / f"{_STAGING}.lock"
        raise MamlError(f"{holder(path)} is importing into {into}; {advice(path)}")
    staging = into / _STAGING
    try:
        _clear(staging, into)
        yield staging
    finally:
        try:
            _clear(staging, into)
        finally:
            lock.release()


def _clear(staging: Path, into: Path) -> None:
    """Deletes the staging folder, after putting back each run that was moved away and has no successor in its place."""
    for replaced in staging.glob("replaced/*/*"):
        target = into / replaced.relative_to(staging / "replaced")
        successor, run = read_run(target), read_run(replaced)
        if run is None or (successor is not None and _continues(successor, run)):
            continue
        replaced.rename(_free_folder(run, into) if target.exists() else target)
    obsolete = staging / "obsolete"
    shutil.rmtree(obsolete, ignore_errors=True)
    if (staging / "replaced").exists():
        (staging / "replaced").rename(obsolete)  # in one step: what a killed deletion leaves is not read as a run
    shutil.rmtree(staging, ignore_errors=True)


def _extract(archive: Path, folder: Path) -> None:
    """Unpacks an archive; nothing can be written outside the folder.

    Raises:
        MamlError: if it is no tar file, is cut off, holds links other than W&B's, or does not fit on the disk.
    """
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                if member.issym() and "wandb" in Path(member.name).parent.parts:
                    continue  # W&B links to its latest files, and works without the links
                if not (member.isfile() or member.isdir()):
                    raise MamlError(f"{archive}: {member.name} is a link or a device, which no run has; pack it anew")
                if is_portable(Path(member.name)):
                    tar.extract(member, folder, filter="data")
            # A damaged header, or the end of the file instead of two empty blocks, ends the loop as well.
            assert tar.fileobj is not None
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"cut off or damaged at byte {tar.offset:,}")
    except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise MamlError(f"{archive} is no tar file, or is damaged ({error}); copy it again") from error
    except OSError as error:
        raise MamlError(f"{archive} cannot be unpacked into {folder} ({error.strerror or error})") from error


def _take(folder: Path, into: Path, staging: Path) -> Outcome:
    """Checks a run in the staging folder and moves it to its place."""
    run = _checked(folder)
    equal = _equal_runs(run, into)
    for other in equal:
        if not _adds_to(run, other) and (_continues(other, run) or _continues(run, other)):
            return Outcome(other.path, f"kept: it is here already, {_progress(other)} (archive: {_progress(run)})")
    continued = next((other for other in equal if _continues(run, other)), None)
    if continued is None:
        beside = f", beside {equal[0].path}, which has another history" if equal else ""
        text = f"imported, {_progress(run)}{beside}"
        target = _free_folder(run, into)
        target.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(target)
        return Outcome(target, text)
    lock = acquire(continued.path / "lock")
    if lock is None:
        raise MamlError(f"{holder(continued.path / 'lock')} is training in {continued.path}; stop it first")
    text = f"imported, {_progress(run)} (before: {_progress(continued)})"
    try:
        _keep_files(continued, run)
        replaced = staging / "replaced" / continued.path.relative_to(into)
        replaced.parent.mkdir(parents=True, exist_ok=True)
        continued.path.rename(replaced)
        folder.rename(continued.path)  # if this fails, the staging folder is cleared with the run put back
    finally:
        lock.release()
    return Outcome(continued.path, text)


def _checked(folder: Path) -> Run:
    """Returns a run whose files were read and fit together.

    Raises:
        MamlError: if one is missing, damaged, or of another run.
    """
    run = read_run(folder)
    assert run is not None, "it was found by its run.json"
    if digest(run.record.training) != run.record.run_id:
        raise MamlError(f"{folder / 'run.json'} is damaged: its settings do not have the id {run.record.run_id}")
    newest = checkpoint.newest(folder / "checkpoint.pt")
    if newest is None and run.report is None:
        raise MamlError(f"{folder} has neither a checkpoint nor a report, so there is nothing to take")
    if newest is not None and read_checkpoint(newest)["run_id"] != run.record.run_id:
        raise MamlError(f"{newest} belongs to another run than the run.json beside it")
    read_metrics(folder / "metrics.jsonl")
    if (folder / "config.yaml").exists():
        read_config(folder / "config.yaml")
    for report in run.reports:
        if not (report.folder / "tasks.csv").exists():
            raise MamlError(f"{report.folder} has a report without its tasks.csv")
        report.check_tasks()
    return run


def _iteration(run: Run) -> int:
    """The iteration of the newest checkpoint, which after a kill may be ahead of the record."""
    newest = checkpoint.newest(run.path / "checkpoint.pt")
    return max(run.iteration, checkpoint.load(newest)["iteration"] if newest else 0)


def _continues(run: Run, earlier: Run) -> bool:
    """Returns whether a run has the whole history of another, and is at least as far."""
    parts, before = run.record.segments, earlier.record.segments
    has_history = len(parts) >= len(before) and all(
        (mine.started, mine.first_iteration, mine.commit, mine.hardware)
        == (theirs.started, theirs.first_iteration, theirs.commit, theirs.hardware)
        and mine.last_iteration >= theirs.last_iteration
        for mine, theirs in zip(parts, before, strict=False)
    )
    return has_history and _iteration(run) >= _iteration(earlier)


def _adds_to(run: Run, other: Run) -> bool:
    """Returns whether a run is further than another, or as far and has an evaluation or checkpoint more."""
    if _iteration(run) != _iteration(other):
        return _iteration(run) > _iteration(other)
    if checkpoint.newest(run.path / "checkpoint.pt") and not checkpoint.newest(other.path / "checkpoint.pt"):
        return True
    known = [(report.evaluation, report.iteration) for report in other.reports]
    return any((report.evaluation, report.iteration) not in known for report in run.reports)


def _keep_files(here: Run, run: Run) -> None:
    """Copies what only the run here has: evaluations, its last checkpoint, and files of others, such as W&B's."""
    for report in here.reports:
        if any((other.evaluation, other.iteration) == (report.evaluation, report.iteration) for other in run.reports):
            continue
        # As in RunFolder.save_report: one evaluation of the whole training has its place in the run's own folder.
        target = evaluation_folder(run.path, report.iteration, report.evaluation)
        if report.folder == here.path and not (run.path / "report.json").exists():
            target = run.path
        target.mkdir(parents=True, exist_ok=True)
        pictures = (path.name for path in report_pictures(report.folder).values())
        for name in ("config.yaml", *TABLES, "tasks.csv", *pictures, "report.json"):
            if (report.folder / name).exists():
                shutil.copy2(report.folder / name, target)
    last = here.path / "checkpoint.pt"
    if _iteration(run) == _iteration(here) and last.exists() and not (run.path / last.name).exists():
        shutil.copy2(last, run.path)
    for path in here.path.rglob("*"):  # notes, logs, and what W&B has not been sent yet are nowhere else
        target = run.path / path.relative_to(here.path)
        is_wanted = (path.is_symlink() or path.is_file()) and not _is_of_record(path, here.path)
        if is_wanted and not os.path.lexists(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, target, follow_symlinks=False)


def _is_of_record(path: Path, run: Path) -> bool:
    """Returns whether a file in a run's folder is one that trainings and evaluations write there."""
    if path.parent != run and path.parent.parent != run / "evaluations":
        return False
    pictures = report_pictures(path.parent).values()
    return path.name in (*RUN_FILES, *EVALUATION_FILES) or path in pictures or not is_portable(path)


def _equal_runs(run: Run, into: Path) -> list[Run]:
    """Returns the runs here with the same id; their folders may have any name."""
    records = [path for path in sorted(into.glob("*/*/run.json")) if run.record.run_id.encode() in path.read_bytes()]
    here = (read_run(path.parent) for path in records)
    return [other for other in here if other is not None and other.record.run_id == run.record.run_id]


def _free_folder(run: Run, into: Path) -> Path:
    names = (run.record.run_id, *(f"{run.record.run_id}_{number}" for number in range(2, 1000)))
    default = into / run.experiment / run.record.run_id
    if default.exists() and not (default / "run.json").exists():
        raise MamlError(f"{default} exists but has no run.json; move it away, and import again")
    return next(path for path in (default.with_name(name) for name in names) if not path.exists())


def _progress(run: Run) -> str:
    count = len(run.reports)
    evaluated = f", {count} evaluation{'s' * (count != 1)}" if count else ""
    return f"{_iteration(run):,} of {run.num_iterations:,} iterations{evaluated}"
