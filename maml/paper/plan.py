"""What has to be run for the paper's cells, curves and pictures: one job per training, and how far each of them is."""

from __future__ import annotations

import difflib
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from maml.config.compose import compose_experiment
from maml.config.identity import digest, evaluation_config, training_config
from maml.config.schema import Settings, build, without_data
from maml.errors import MamlError, Unavailable
from maml.paper.cells import Source, load_figures, load_pictures, load_tables
from maml.record import checkpoint
from maml.record.index import SUPERSEDED, HardwareRecord, Run, read_run
from maml.record.run_folder import RunFolder

WATERMARK = "SMOKE TEST: these numbers mean nothing"
SMOKE = "+debug=smoke"


@dataclass(frozen=True)
class Need:
    """A cell, curve or panel, and where its number is found; no source if there is no experiment for it."""

    artifact: str
    row: str
    column: str
    source: Source | None

    @property
    def path(self) -> tuple[str, str, str]:
        """What it is called, from the outside in."""
        return self.artifact, self.row, self.column


@dataclass(frozen=True)
class Job:
    """One training, and the evaluations of it that are needed.

    Attributes:
        name: the first experiment, and the seed.
        artifacts: that need it.
        commands: what ``train.py`` is given, once for each evaluation that is missing; none if all is done.
        config: of the training.
        folder: where it is, or will be, run.
        iteration: how many iterations are saved; None if nothing is.
        committed: the folder that these are saved in, if that is not ``folder``.
        impossible: why it cannot be run here, as far as that is known beforehand; else empty.
    """

    name: str
    artifacts: tuple[str, ...]
    commands: tuple[tuple[str, ...], ...]
    config: Settings
    folder: Path
    iteration: int | None = None
    committed: Path | None = None
    impossible: str = ""

    @property
    def run_id(self) -> str:
        """Names the training."""
        return digest(training_config(self.config))

    @property
    def left(self) -> int:
        """The iterations that are to be run."""
        return self.config.num_iterations - (self.iteration or 0) if self.commands else 0

    @property
    def state(self) -> str:
        """How far it is, in words."""
        if not self.commands:
            return "done"
        if self.impossible:
            return "cannot"
        if self.iteration is None:
            return "run"
        return f"continue from {self.iteration:,}" if self.left else "evaluate"

    @property
    def num_threads(self) -> int:
        """The CPU threads that it takes, as `Hardware` chooses them on a CPU."""
        asked = self.config.hardware["num_threads"]
        if asked != "auto":
            return asked
        workload = build(without_data(self.config.domain)).workload
        return (os.cpu_count() or 1) if workload.threads_pay == "always" else 1

    @property
    def alive(self) -> bool:
        """Whether another process trains in its folder now."""
        try:
            run = read_run(self.folder)
        except MamlError:
            return False  # damaged, as train.py will say
        return run is not None and run.alive

    def prepare(self) -> None:
        """Copies what is committed to where it goes on: all of it, or nothing if it is killed meanwhile."""
        if self.committed is None or (self.folder / "run.json").exists():
            return
        # One level deeper than run folders are, so that half a copy is not taken for one.
        staging = self.folder.parents[1] / ".copying" / self.folder.parent.name / self.folder.name
        for leftover in (staging, self.folder):  # the latter holds a lock at most, as nothing is recorded
            shutil.rmtree(leftover, ignore_errors=True)
        shutil.copytree(self.committed, staging)
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        staging.rename(self.folder)


def list_needs(results: Path) -> list[Need]:
    """Lists every cell, curve and panel in ``results/cells.yaml``."""
    cells = [
        Need(table.name, cell.row, cell.column, cell.source) for table in load_tables(results) for cell in table.cells
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
    """Picks what is named as ``artifact``, ``artifact/row`` or ``artifact/row/column``.

    Upper case, blanks and hyphens do not matter. A name stands for all that begin with it, but for rows and columns
    where one is just it: ``figure4`` has its trajectories with it, and ``table5/MAML`` is one row.

    Raises:
        MamlError: if a name stands for nothing, or only for what there is no experiment for.
    """
    chosen: dict[Need, None] = {}
    for name in names:
        found = list(needs)
        for level, part in enumerate(name.split("/", 2)):
            wanted, candidates = _normalised(part), found
            found = [need for need in candidates if _normalised(need.path[level]).startswith(wanted)]
            exact = [need for need in found if _normalised(need.path[level]) == wanted]
            found = exact if exact and level else found
            if not found:
                known = dict.fromkeys("/".join(need.path[: level + 1]) for need in candidates)
                raise MamlError(f"--only: results/cells.yaml has no {name}{_near_miss(name, known)}")
        if not any(need.source for need in found):
            raise MamlError(f"--only: results/cells.yaml has no experiment for {name}, so there is nothing to run")
        chosen |= dict.fromkeys(found)
    return list(chosen)


def _near_miss(name: str, known: Iterable[str]) -> str:
    known = list(known)
    words = known + [path.partition("_")[0] for path in known if "/" not in path]
    by_key = {_normalised(path): path for path in words}
    close = [by_key[key] for key in difflib.get_close_matches(_normalised(name), by_key)]
    return f"; did you mean {' or '.join(close)}?" if close else f"; there is {', '.join(known)}"


def _normalised(name: str) -> str:
    """Returns a name as it is compared: ``Table 2`` is ``table2``, and other words are joined by ``_``."""
    words = re.sub(r"[\W_]+", "_", name.lower()).strip("_")
    return re.sub(r"^(table|figure)_(?=\d)", r"\1", words)


def plan(
    needs: Sequence[Need], seeds: Sequence[int], runs: Sequence[Run], runs_dir: Path, wandb: bool = False
) -> list[Job]:
    """Finds out what there is of each source and seed, and what is missing.

    Args:
        needs: what is to be shown.
        seeds: of each source.
        runs: what there is, in ``runs_dir`` and among the committed.
        runs_dir: where jobs are run.
        wandb: mirrors them to W&B, grouped by the first of the artifacts that need them and tagged with all.

    Returns:
        One job per training, in the order of the needs.
    """
    artifacts: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for need in needs:
        if need.source:
            artifacts.setdefault((need.source.experiment, need.source.overrides), []).append(need.artifact)
    groups: dict[str, list[_Command]] = {}
    for (experiment, overrides), names in artifacts.items():
        for seed in seeds:
            config = replace(compose_experiment(experiment, overrides), seed=seed, runs_dir=str(runs_dir))
            command = _Command(experiment, overrides, config, tuple(dict.fromkeys(names)))
            groups.setdefault(digest(training_config(config)), []).append(command)
    return [_job(group, runs, wandb) for group in groups.values()]


@dataclass(frozen=True)
class _Command:
    """One experiment with one seed, and what needs it."""

    experiment: str
    overrides: tuple[str, ...]
    config: Settings
    artifacts: tuple[str, ...]

    def arguments(self, wandb: bool) -> tuple[str, ...]:
        """What ``train.py`` is given; no defaults, as the record of a run is to show what one would type."""
        words = [f"+experiment={self.experiment}", *self.overrides]
        words += [f"seed={self.config.seed}"] if self.config.seed else []
        words += [f"runs_dir={self.config.runs_dir}"] if self.config.runs_dir != "runs" else []
        if wandb:
            words += ["logger=wandb", f"logger.group={self.artifacts[0]}", f"logger.tags=[{','.join(self.artifacts)}]"]
        return tuple(words)


def _job(group: Sequence[_Command], runs: Sequence[Run], wandb: bool) -> Job:
    """Joins commands that train the same thing."""
    config = group[0].config
    training, folder = training_config(config), RunFolder(config, group[0].experiment).path
    mine = [run for run in runs if run.record.training == training]
    evaluated = [report.evaluation for run in mine for report in run.reports if report.complete]
    missing = []
    for command in group:
        evaluation = evaluation_config(command.config)
        if evaluation not in evaluated:
            evaluated.append(evaluation)
            missing.append(command.arguments(wandb))
    resumable = [run for run in mine if checkpoint.newest(run.path / "checkpoint.pt")]
    here = next((run for run in resumable if run.path == folder), None)
    committed = None
    if here is None and not (folder / "run.json").exists():
        committed = max(resumable, key=lambda run: run.iteration, default=None)
    start = here or committed
    impossible = ""
    if missing:
        impossible = _missing_requirement(config)
        if (folder / SUPERSEDED).exists():
            impossible = f"{folder} is marked as superseded; delete it to run this again"
    words = [group[0].experiment, *group[0].overrides, *([f"seed={config.seed}"] if config.seed else [])]
    words += [f"and {len(group) - 1} more evaluations of it"] if len(group) > 1 else []
    return Job(
        " ".join(words),
        tuple(dict.fromkeys(name for command in group for name in command.artifacts)),
        tuple(missing),
        config,
        folder,
        start.iteration if start else None,
        committed.path if committed else None,
        impossible,
    )


def _missing_requirement(config: Settings) -> str:
    """Says what this machine lacks for a run, as far as a glance tells; images are neither read nor downloaded."""
    try:
        build(config.hardware)
        build(without_data(config.domain)).check_available()
    except Unavailable as error:
        return str(error)
    return ""


@dataclass(frozen=True)
class Estimate:
    """What a job will take, as far as runs that differ in seed and length at most tell; None is unknown.

    Attributes:
        hours: for the iterations that are left.
        size: of its folder in the end, in bytes.
        machine: that the hours were measured on; empty if it is this one.
    """

    hours: float | None
    size: int | None
    machine: str = ""


def estimate(job: Job, runs: Sequence[Run]) -> Estimate:
    """Estimates from the newest run of the same settings, one on this machine if there is any."""
    hardware = build(job.config.hardware).describe()
    mine = HardwareRecord(cpu=hardware["cpu"], gpu=hardware.get("gpu"))
    training = _without_seed_and_length(training_config(job.config))
    similar = [run for run in runs if _without_seed_and_length(run.record.training) == training]
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
    run, machine = next((pair for pair in timed if pair[1] == mine), timed[0])
    parts = [part for part in run.record.segments if part.hardware == machine]
    seconds, iterations = (
        sum(values)
        for values in zip(*((part.seconds, part.last_iteration - part.first_iteration) for part in parts), strict=True)
    )
    return Estimate(job.left * seconds / iterations / 3600, size, "" if machine == mine else machine.gpu or machine.cpu)


def _without_seed_and_length(training: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in training.items() if key not in ("seed", "num_iterations")}


def _size_in_bytes(folder: Path) -> int:
    """Returns the bytes of a run folder, with the checkpoint before the last, which a committed one does without."""
    sizes = {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}
    return sum(({"checkpoint.previous.pt": sizes["checkpoint.pt"]} | sizes).values())


def write_smoke_cells(results: Path, out: Path) -> None:
    """Writes a ``cells.yaml`` whose experiments are smoke tests and whose titles say so, beside the published numbers.

    Args:
        results: the folder of ``cells.yaml`` and ``paper/``.
        out: the same for the smoke test.
    """
    entries: Any = OmegaConf.to_container(OmegaConf.load(results / "cells.yaml"))
    for entry in (entry for kind in entries.values() for entry in kind.values()):
        entry["title"] = f"{WATERMARK}. {entry['title']}"
        entry.setdefault("defaults", {}).setdefault("overrides", [])
        _append_smoke(entry)
    shutil.copytree(results / "paper", out / "paper", dirs_exist_ok=True)
    for path in (results / "notes.md", results / "departures.yaml"):  # what else the renderers read
        if path.exists():
            shutil.copy(path, out)
    OmegaConf.save(OmegaConf.create(entries), out / "cells.yaml")


def _append_smoke(entry: Any) -> None:
    for key, value in entry.items() if isinstance(entry, dict) else enumerate(entry) if isinstance(entry, list) else ():
        if key == "overrides":
            value.append(SMOKE)
        elif key == "goal":
            entry[key] = 0  # a smoke test has few
        else:
            _append_smoke(value)
