"""Records each job of a sweep while it runs, and writes a table over the sweep's axes at its end."""

from __future__ import annotations

import atexit
import csv
import io
import json
import math
import os
import signal
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import CompactHydraException, HydraException
from hydra.experimental.callback import Callback
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

from maml.config.compose import compose
from maml.config.identity import digest
from maml.errors import Interrupted, MamlError
from maml.record.checkpoint import write_atomically
from maml.record.index import read_run
from maml.record.run_folder import RunFolder, command_line, read_json
from maml.sweep.gpu_lease import visible_gpus


def _direction(domain: str) -> str:
    """Returns the direction in which a sweeper optimises a domain's headline number."""
    target: Any = get_class(domain)
    return "maximize" if target.larger_is_better else "minimize"


OmegaConf.register_new_resolver("direction", _direction, replace=True)
OmegaConf.register_new_resolver("gpus_per_job", lambda: min(1, len(visible_gpus())), replace=True)


class Sweep(Callback):
    """Records each job in ``runs_dir/sweeps/<id>``. However the sweep ends, it writes a summary table.

    Hydra also calls it in the processes in which a launcher runs the jobs. The id is a hash of the sweep's overrides,
    so the same command finds the same folder.
    """

    def __init__(self) -> None:
        self.folder: Path | None = None  # the sweep's folder; None for a single run
        self.arguments: list[str] = []

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            return  # train.py refuses sweeps under torchrun
        swept = list(config.hydra.overrides.task)
        self.folder = Path(config.runs_dir).resolve() / "sweeps" / _hash_overrides(swept)
        self.arguments = [str(Path(sys.argv[0]).resolve()), *sys.argv[1:]]
        (self.folder / "jobs").mkdir(parents=True, exist_ok=True)
        if get_class(config.hydra.sweeper._target_) is BasicSweeper:  # other sweepers choose their jobs one by one
            (jobs,) = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(swept), None)
            for overrides in jobs:
                if not self._path(overrides).exists():
                    self._record(overrides)
        signal.signal(signal.SIGTERM, _stop)  # an exception, as from Ctrl-C, lets a launcher stop its processes too
        # Folders of `--config-dir`, in which the jobs find a user's options that conf/ does not have.
        sources = config.hydra.runtime.config_sources
        config_dirs = [source.path for source in sources if source.provider == "command-line"]
        atexit.register(summarise, self.folder, config_dirs)

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        if self.folder:
            sys.argv = self.arguments  # the sweep's command, for the run's record; a launcher's process has its own
            os.chdir(config.hydra.runtime.cwd)  # a process on a cluster starts in another folder
            self._record(config.hydra.overrides.task)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        if self.folder and job_return.status is JobStatus.FAILED:
            error = job_return._return_value  # the public `return_value` raises the error
            known = isinstance(error, CompactHydraException)
            self._record(config.hydra.overrides.task, str(error) if known else f"{type(error).__name__}: {error}")

    def _record(self, overrides: Iterable[str], error: str | None = None) -> None:
        content = json.dumps({"overrides": _without_launcher(overrides), "error": error}, indent=2) + "\n"
        write_atomically(self._path(overrides), lambda file: file.write(content.encode()))

    def _path(self, overrides: Iterable[str]) -> Path:
        assert self.folder
        return self.folder / "jobs" / f"{_hash_overrides(overrides)}.json"


def _without_launcher(overrides: Iterable[str]) -> list[str]:
    """Returns the overrides that identify a sweep or a job: all but the launcher."""
    return [override for override in overrides if not override.startswith("launcher=")]


def _hash_overrides(overrides: Iterable[str]) -> str:
    return digest({"overrides": _without_launcher(overrides)})


def _stop(number: int, frame: FrameType | None) -> None:
    raise Interrupted("stopped by SIGTERM; run the same command again to continue from the checkpoints", number)


@dataclass(frozen=True)
class Job:
    """One job of a sweep, with its report.

    Attributes:
        overrides: the overrides of its config.
        report: the report of its run; None if the run is not finished.
        problem: why there is no report; empty if there is one.
    """

    overrides: tuple[str, ...]
    report: dict[str, Any] | None
    problem: str = ""

    @property
    def settings(self) -> dict[str, str]:
        """The overrides by key."""
        return {key.lstrip("+"): value for key, _, value in (override.partition("=") for override in self.overrides)}

    @property
    def headline(self) -> tuple[float, float]:
        """Mean and half-width of the 95 % interval over test tasks; nan if adaptation diverged."""
        assert self.report
        for curve in self.report["curves"]:
            last = curve["steps"][-1]
            if (curve["metric"], last["mean"]) == (self.report["headline_metric"], self.report["headline"]):
                return (math.nan, math.nan) if last["ci95"] is None else (last["mean"], last["ci95"])
        raise AssertionError("the headline must be the last step of a curve")


def read_jobs(folder: Path, config_dirs: Sequence[str] = ()) -> list[Job]:
    """Reads the state of all jobs of a sweep from their run folders, or from the sweep's folder if a job failed.

    Args:
        folder: folder of the sweep.
        config_dirs: folders of options, besides ``conf/``.
    """
    searched = [f"hydra.searchpath=[{','.join(f'file://{path}' for path in config_dirs)}]"] if config_dirs else []
    jobs = []
    for path in sorted((folder / "jobs").glob("*.json")):
        record = read_json(path)
        assert record
        overrides, error = tuple(record["overrides"]), record["error"]
        try:
            settings, experiment = compose([*searched, *overrides])
        except (MamlError, HydraException) as reason:
            jobs.append(Job(overrides, None, error or str(reason)))
            continue
        for seed in range(settings.seed, settings.seed + settings.seeds):
            with_seed = overrides if settings.seeds == 1 else (*overrides, f"seed={seed}")
            jobs.append(_read_job(with_seed, RunFolder(settings.for_seed(seed), experiment), error))
    return sorted(jobs, key=lambda job: job.overrides)


def _read_job(overrides: tuple[str, ...], run: RunFolder, error: str | None) -> Job:
    try:
        report = None if error else run.finished_report()
        unfinished = None if error or report else read_run(run.path)
    except MamlError as reason:
        return Job(overrides, None, str(reason))
    state = f"{unfinished.status} at iteration {unfinished.iteration:,}" if unfinished else "not started"
    return Job(overrides, report, "" if report else error or state)


def tabulate(jobs: Sequence[Job]) -> list[dict[str, Any]]:
    """Returns one row per combination of the values that differ between jobs, other than the seed; best row first.

    ``ci95`` is the half-width of the 95 % interval over test tasks, averaged over seeds, because seeds share their test
    tasks. ``std`` is the standard deviation over seeds.
    """
    axes = [key for key in _varying_keys(jobs) if key != "seed"]
    groups: dict[tuple[str, ...], list[Job]] = {}
    for job in jobs:
        groups.setdefault(tuple(job.settings.get(axis, "") for axis in axes), []).append(job)
    rows = []
    for point, group in groups.items():
        reports = [job.report for job in group if job.report]
        headlines = [job.headline for job in group if job.report]
        mean, ci95 = (statistics.fmean(values) for values in zip(*headlines or [(math.nan, math.nan)], strict=True))
        row = dict(zip(axes, point, strict=True)) | {
            "metric": reports[0]["headline_metric"] if reports else "",
            "mean": mean,
            "ci95": ci95,
            "std": statistics.stdev(mean for mean, _ in headlines) if len(headlines) > 1 else math.nan,
            "seeds": f"{len(reports)} of {len(group)}",
        }
        worse = math.isnan(mean), -mean if reports and reports[0]["larger_is_better"] else mean
        rows.append((not reports, row["metric"], worse, row))
    return [row for *_, row in sorted(rows, key=lambda entry: entry[:-1])]


def _varying_keys(jobs: Sequence[Job]) -> list[str]:
    """Returns the keys whose values are not the same in all jobs."""
    keys = dict.fromkeys(key for job in jobs for key in job.settings)
    return [key for key in keys if len({job.settings.get(key) for job in jobs}) > 1]


def summarise(folder: Path, config_dirs: Sequence[str] = ()) -> None:
    """Prints the table of a sweep and its unfinished jobs, and writes ``summary.md`` and ``summary.csv``.

    Args:
        folder: folder of the sweep.
        config_dirs: folders of options, besides ``conf/``.
    """
    jobs = read_jobs(folder, config_dirs)
    rows = tabulate(jobs)
    lines = _markdown(rows)
    missing = [job for job in jobs if not job.report]
    lines += ["", f"{len(jobs) - len(missing)} of {len(jobs)} jobs are finished"]
    named = _varying_keys(jobs)
    for job in missing:
        settings = " ".join(f"{key}={job.settings[key]}" for key in named if key in job.settings)
        lines.append(f"- {settings or ' '.join(job.overrides)}: {job.problem}")
    lines += ["", f"Run the same command again to continue with these: `{command_line()}`"] if missing else []
    if any(folder.parent.glob(".submitit/*")):
        lines.append(f"The output of the jobs is in {folder.parent / '.submitit'}")
    table = io.StringIO()
    if rows:
        writer = csv.DictWriter(table, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    text = "\n".join(lines).strip() + "\n"
    write_atomically(folder / "summary.md", lambda file: file.write(text.encode()))
    write_atomically(folder / "summary.csv", lambda file: file.write(table.getvalue().encode()))
    print(f"\n{text}written to {folder}")


def _markdown(rows: Sequence[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    cells = [list(rows[0]), *([_format_value(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    return [f"| {' | '.join(text.ljust(width) for text, width in zip(row, widths, strict=True))} |" for row in cells]


def _format_value(value: Any) -> str:
    return value if isinstance(value, str) else "" if math.isnan(value) else f"{value:.4f}"
