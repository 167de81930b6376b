"""Plans the runs that the paper's cells, curves and pictures need: one job per training, and its progress."""

from __future__ import annotations

import difflib
import os
import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from maml.config.compose import compose_experiment
from maml.config.identity import evaluation_config, training_config, without_keys
from maml.config.schema import Settings, build, build_without_data
from maml.digest import digest
from maml.errors import MamlError, Unavailable
from maml.paper.cells import load_figures, load_pictures, load_tables
from maml.record import checkpoint
from maml.record.atomic import is_temporary, write_text_atomically
from maml.record.contents import HardwareRecord, Source
from maml.record.index import SUPERSEDED, Run, read_run
from maml.record.lock import is_held
from maml.record.run_folder import RunFolder

WATERMARK = "SMOKE TEST: these numbers mean nothing"
SMOKE = "+debug=smoke"
_MIN_HOURS = 1 / 60  # a job that has only to be evaluated takes about a minute


@dataclass(frozen=True)
class Need:
    """A cell, curve or panel, and the source of its number; the source is None if there is no experiment yet."""

    artifact: str
    row: str
    column: str
    source: Source | None
    is_of_paper: bool = True

    @property
    def path(self) -> tuple[str, str, str]:
        """Its name in three parts: artifact, row and column."""
        return self.artifact, self.row, self.column


@dataclass(frozen=True)
class Job:
    """One training run and its missing evaluations.

    Attributes:
        name: the first experiment that needs it, its overrides, and the seed.
        artifacts: names of the tables and figures that need it.
        commands: arguments of ``train.py``, one command for each missing evaluation; empty if all are done.
        settings: settings of the training.
        folder: folder of the run, which may not exist yet.
        iteration: number of iterations of the newest checkpoint; None if there is no checkpoint.
        committed: committed run folder with that checkpoint, if it is not in ``folder``.
        impossible: why it cannot run on this machine, if that is known before the start; else empty.
        num_needs: number of the paper's cells, curves and panels that need the missing evaluations.
    """

    name: str
    artifacts: tuple[str, ...]
    commands: tuple[tuple[str, ...], ...]
    settings: Settings
    folder: Path
    iteration: int | None = None
    committed: Path | None = None
    impossible: str = ""
    num_needs: int = 0

    @property
    def run_id(self) -> str:
        """The hash of the training settings."""
        return digest(training_config(self.settings))

    @property
    def left(self) -> int:
        """The number of iterations that are still to run."""
        return self.settings.num_iterations - (self.iteration or 0) if self.commands else 0

    @property
    def state(self) -> str:
        """The progress, in words."""
        if not self.commands:
            return "done"
        if self.impossible:
            return "cannot"
        if self.iteration is None:
            return "run"
        return f"continue from {self.iteration:,}" if self.left else "evaluate"

    @property
    def is_open(self) -> bool:
        """Whether there is something to do that this machine can do."""
        return self.state not in ("done", "cannot")

    @property
    def num_threads(self) -> int:
        """The number of CPU threads that it is to have beside other jobs; a simulation is as well off with one."""
        num_threads = self.settings.hardware["num_threads"]
        if num_threads != "auto":
            return num_threads
        workload = build_without_data(self.settings.domain).workload
        return (os.cpu_count() or 1) if workload.threads == "operations" else 1

    @property
    def alive(self) -> bool:
        """Whether another process is training in its folder."""
        try:
            run = read_run(self.folder)
        except (MamlError, OSError):
            return False  # the folder is damaged; train.py will report it
        return is_held(self.folder / "lock") if run is None else run.alive

    def prepare(self) -> None:
        """Copies the committed run to the folder in which training continues; the copy is atomic.

        A folder that holds anything else than the traces of a start is left as it is.
        """
        if self.committed is None or not _is_vacant(self.folder):
            return
        # One level deeper than run folders, so that an incomplete copy is not read as a run.
        staging = self.folder.parents[1] / ".copying" / self.folder.parent.name / self.folder.name
        for leftover in (staging, self.folder):
            shutil.rmtree(leftover, ignore_errors=True)
        shutil.copytree(self.committed, staging)
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        staging.rename(self.folder)


def _is_vacant(folder: Path) -> bool:
    """Returns whether a folder does not exist, or holds only what a run writes before its record and checkpoints."""
    traces = ("lock", "lock.marker", "config.yaml")
    if not folder.is_dir():
        return not folder.exists()
    return all(path.name in traces or is_temporary(path) for path in folder.iterdir())


def list_needs(results: Path) -> list[Need]:
    """Lists every cell, curve and panel in ``results/cells.yaml``."""
    cells = [
        Need(table.name, cell.row, cell.column, cell.source, cell.is_of_paper)
        for table in load_tables(results)
        for cell in table.cells
    ]
    curves = [
        Need(figure.name, curve.row, curve.panel, curve.source)
        for figure in load_figures(results)
        for curve in figure.curves
    ]
    panels = [
        Need(picture.name, panel.row, f"K={panel.source.num_shots}", panel.source)
        for picture in load_pictures(results)
        for panel in picture.panels
    ]
    return cells + curves + panels


def select(needs: Sequence[Need], names: Iterable[str]) -> list[Need]:
    """Selects needs by name: ``artifact``, ``artifact/row`` or ``artifact/row/column``.

    Upper case, blanks and hyphens do not matter. A name selects everything that begins with it. For rows and columns,
    an exact match has priority: ``figure4`` includes its trajectories, but ``table5/MAML`` is one row.

    Raises:
        MamlError: if a name matches nothing, or only cells without an experiment.
    """
    chosen: dict[Need, None] = {}
    for name in names:
        matches = list(needs)
        for level, part in enumerate(name.split("/", 2)):
            wanted, candidates = _normalised(part), matches
            matches = [need for need in candidates if _normalised(need.path[level]).startswith(wanted)]
            exact = [need for need in matches if _normalised(need.path[level]) == wanted]
            matches = exact if exact and level else matches
            if not matches:
                known = dict.fromkeys("/".join(need.path[: level + 1]) for need in candidates)
                raise MamlError(f"--only: results/cells.yaml has no {name}{_near_miss(name, known)}")
        if not any(need.source for need in matches):
            raise MamlError(f"--only: results/cells.yaml has no experiment for {name}, so there is nothing to run")
        chosen |= dict.fromkeys(matches)
    return list(chosen)


def _near_miss(name: str, known: Iterable[str]) -> str:
    known = list(known)
    words = known + [path.partition("_")[0] for path in known if "/" not in path]
    by_key = {_normalised(path): path for path in words}
    close = [by_key[key] for key in difflib.get_close_matches(_normalised(name), by_key)]
    return f"; did you mean {' or '.join(close)}?" if close else f"; allowed: {', '.join(known)}"


def _normalised(name: str) -> str:
    """Normalises a name for comparison: ``Table 2`` becomes ``table2``, and other words are joined by ``_``."""
    words = re.sub(r"[\W_]+", "_", name.lower()).strip("_")
    return re.sub(r"^(table|figure)_(?=\d)", r"\1", words)


def plan(
    needs: Sequence[Need], seeds: Sequence[int], runs: Sequence[Run], runs_dir: Path, wandb: bool = False
) -> list[Job]:
    """Plans a job for each source and seed, with the progress that existing runs have made.

    Args:
        needs: the cells, curves and panels to show.
        seeds: the seeds of each source.
        runs: existing runs, in ``runs_dir`` and among the committed ones.
        runs_dir: folder in which jobs make their run folders.
        wandb: whether jobs are mirrored to W&B, grouped by their first artifact and tagged with all artifacts.

    Returns:
        One job per training run, in the order of the needs.
    """
    needs_of: dict[tuple[str, tuple[str, ...]], list[Need]] = {}
    for need in needs:
        if need.source:
            needs_of.setdefault((need.source.experiment, need.source.overrides), []).append(need)
    groups: dict[str, list[_Command]] = {}
    for (experiment, overrides), its_needs in needs_of.items():
        for seed in seeds:
            settings = replace(compose_experiment(experiment, overrides), seed=seed, runs_dir=str(runs_dir))
            command = _Command(experiment, overrides, settings, tuple(its_needs))
            groups.setdefault(digest(training_config(settings)), []).append(command)
    return [_job(group, runs, wandb) for group in groups.values()]


@dataclass(frozen=True)
class _Command:
    """One experiment with one seed, and the cells, curves and panels that need it."""

    experiment: str
    overrides: tuple[str, ...]
    settings: Settings
    needs: tuple[Need, ...]

    @property
    def artifacts(self) -> tuple[str, ...]:
        """The names of the tables and figures that need it."""
        return tuple(dict.fromkeys(need.artifact for need in self.needs))

    def arguments(self, wandb: bool) -> tuple[str, ...]:
        """Returns the arguments of ``train.py``, without defaults, so that the run's record shows a short command."""
        words = [f"+experiment={self.experiment}", *self.overrides]
        words += [f"seed={self.settings.seed}"] if self.settings.seed else []
        words += [f"runs_dir={self.settings.runs_dir}"] if self.settings.runs_dir != "runs" else []
        if wandb:
            words += ["logger=wandb", f"logger.group={self.artifacts[0]}", f"logger.tags=[{','.join(self.artifacts)}]"]
        return tuple(words)


def _job(group: Sequence[_Command], runs: Sequence[Run], wandb: bool) -> Job:
    """Makes one job from the commands with the same training settings."""
    settings = group[0].settings
    training, folder = training_config(settings), RunFolder(settings, group[0].experiment).path
    trained = [run for run in runs if run.record.training == training]
    evaluated = [report.evaluation for run in trained for report in run.reports if report.complete]
    missing, num_needs = [], 0
    for command in group:
        evaluation = evaluation_config(command.settings)
        if evaluation not in evaluated or (folder.exists() and _lacks_its_end(command)):
            evaluated.append(evaluation)
            missing.append(command.arguments(wandb))
            num_needs += sum(need.is_of_paper for need in command.needs)
    resumable = [run for run in trained if checkpoint.newest(run.path / "checkpoint.pt")]
    here = next((run for run in resumable if run.path == folder), None)
    committed = None
    vacant = _is_vacant(folder)
    if here is None and vacant:
        committed = max(resumable, key=lambda run: run.iteration, default=None)
    start = here or committed
    newest = checkpoint.newest(folder / "checkpoint.pt")
    impossible = ""
    if missing:
        impossible = _missing_requirement(settings)
        if (folder / SUPERSEDED).exists():
            impossible = f"{folder} is marked as superseded; delete it to run this again"
        elif resumable and not vacant and not (folder / "run.json").exists() and not newest:
            impossible = f"{folder} has files, but neither run.json nor a checkpoint; restore one, or move it away"
    words = [group[0].experiment, *group[0].overrides, *([f"seed={settings.seed}"] if settings.seed else [])]
    words += [f"and {len(group) - 1} more evaluations of it"] if len(group) > 1 else []
    return Job(
        " ".join(words),
        tuple(dict.fromkeys(name for command in group for name in command.artifacts)),
        tuple(missing),
        settings,
        folder,
        start.iteration if start else None,
        committed.path if committed else None,
        impossible,
        num_needs,
    )


def most_valuable_first(jobs: Sequence[Job], runs: Sequence[Run]) -> list[Job]:
    """Sorts jobs by the number of the paper's cells, curves and panels that each completes per hour.

    Jobs of unknown length follow those of known length; then come the jobs of tables that are not in the paper. The
    length of an evaluation in simulation is unknown: up to half an hour, and lost when it is stopped. On a machine with
    a GPU, jobs that it hardly speeds up (simulation) come last.

    Args:
        jobs: all jobs of the plan.
        runs: existing runs, from which lengths are estimated.
    """

    def rank(job: Job) -> tuple[bool, bool, bool, float]:
        on_gpu = build(job.settings.hardware).device.type == "cuda"
        is_simulated = not build_without_data(job.settings.domain).workload.fixed_shapes
        hours = estimate(job, runs).hours if job.left or not is_simulated else None
        per_hour = job.num_needs / max(hours or 0.0, _MIN_HOURS)
        return on_gpu and is_simulated, not job.num_needs, hours is None, -per_hour

    return sorted((job for job in jobs if job.is_open), key=rank) + [job for job in jobs if not job.is_open]


def _lacks_its_end(command: _Command) -> bool:
    """Returns whether a run was killed after its evaluation, or has lost a file of it; the command then finishes it."""
    run = RunFolder(command.settings, command.experiment)
    try:
        missing = run.missing()
    except MamlError:
        return True  # the command will report it
    return missing != {"report.json"} and bool(missing)


def _missing_requirement(settings: Settings) -> str:
    """Returns what this machine lacks for a run, or an empty text; images are neither read nor downloaded."""
    try:
        build(settings.hardware)
        build_without_data(settings.domain).check_available()
    except Unavailable as error:
        return str(error)
    return ""


@dataclass(frozen=True)
class Estimate:
    """The estimated cost of a job, from runs that differ in seed and number of iterations only; None if unknown.

    Attributes:
        hours: hours for the remaining iterations.
        size: final size of its folder, in bytes.
        machine: machine on which the hours were measured; empty if it is this one.
    """

    hours: float | None
    size: int | None
    machine: str = ""


def estimate(job: Job, runs: Sequence[Run]) -> Estimate:
    """Estimates a job's cost from the newest run with the same settings, if possible one on this machine."""
    hardware = build(job.settings.hardware).describe()
    this_machine = _machine(HardwareRecord(cpu=hardware["cpu"], gpu=hardware.get("gpu")))
    varying = ("seed", "num_iterations")
    training = without_keys(training_config(job.settings), *varying)
    similar = [run for run in runs if without_keys(run.record.training, *varying) == training]
    similar.sort(key=lambda run: run.record.segments[-1].started, reverse=True)
    size = next((_size_in_bytes(run.path) for run in similar if (run.path / "checkpoint.pt").exists()), None)
    if not job.left:
        return Estimate(0.0, size)
    timed = [
        (run, part.hardware)
        for run in similar
        for part in reversed(run.record.segments)
        if part.seconds and part.last_iteration > part.first_iteration
    ]
    if not timed:
        return Estimate(None, size)
    run, machine = next((pair for pair in timed if _machine(pair[1]) == this_machine), timed[0])
    parts = [part for part in run.record.segments if _machine(part.hardware) == _machine(machine)]
    seconds, iterations = (
        sum(values)
        for values in zip(*((part.seconds, part.last_iteration - part.first_iteration) for part in parts), strict=True)
    )
    hours = job.left * seconds / iterations / 3600
    return Estimate(hours, size, "" if _machine(machine) == this_machine else machine.gpu or machine.cpu)


def _machine(hardware: HardwareRecord) -> tuple[str, str | None, int]:
    """Returns what has to be equal for two times to be comparable; the other entries of a record say more."""
    return hardware.cpu, hardware.gpu, hardware.processes


def _size_in_bytes(folder: Path) -> int:
    """Returns the size of a run folder, including a previous checkpoint, which committed folders do not have."""
    sizes = {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}
    return sum(({"checkpoint.previous.pt": sizes["checkpoint.pt"]} | sizes).values())


def write_smoke_cells(results: Path, out: Path) -> None:
    """Writes a ``cells.yaml`` whose experiments are smoke tests and whose titles say so, and copies ``paper/``.

    Args:
        results: folder of ``cells.yaml`` and ``paper/``.
        out: folder of the smoke test's ``cells.yaml`` and ``paper/``.
    """
    entries: Any = OmegaConf.to_container(OmegaConf.load(results / "cells.yaml"))
    for entry in (entry for kind in entries.values() for entry in kind.values()):
        entry["title"] = f"{WATERMARK}. {entry['title']}"
        entry.setdefault("defaults", {}).setdefault("overrides", [])
        _append_smoke(entry)
    shutil.copytree(results / "paper", out / "paper", dirs_exist_ok=True)
    for path in (results / "notes.md", results / "departures.yaml"):  # other files that the renderers read
        if path.exists():
            shutil.copy(path, out)
    write_text_atomically(out / "cells.yaml", OmegaConf.to_yaml(OmegaConf.create(entries)))


def _append_smoke(entry: Any) -> None:
    for key, value in entry.items() if isinstance(entry, dict) else enumerate(entry) if isinstance(entry, list) else ():
        if key == "overrides":
            value.append(SMOKE)
        elif key == "goal":
            entry[key] = 0  # a smoke test has only a few goals
        else:
            _append_smoke(value)
