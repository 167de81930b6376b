"""Exports the parameters of every number that has been run to results/checkpoints/*.safetensors and index.json.

    python scripts/export_checkpoints.py

Parameters above 1.5 MB are not exported: their index entry names the run folder in results/runs that has them. A cell
or curve has the parameters of one of its runs: the complete run with the lowest seed, or, if there is none, the
run with the most iterations; the index contains the iteration. Equal runs give equal bytes. If a run's checkpoint.pt no
longer exists, its exported file is kept, and so is that of a run that is damaged, not evaluated yet or in none of the
folders; not that of a superseded run. Exported files that no number needs are deleted.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from maml.cli.scripts import existing_folder, exit_with, print_problems
from maml.config.paths import CHECKPOINTS, RESULTS
from maml.errors import MamlError
from maml.paper.cells import named_sources
from maml.paper.evidence import Evidence, find_evidence
from maml.record import checkpoint
from maml.record.atomic import write_bytes_atomically
from maml.record.contents import Report, Source
from maml.record.exported import (
    CommittedNumber,
    Entry,
    ExportedFile,
    Index,
    check_overrides,
    pack,
    read_index,
    read_parameters,
    title,
    write_index,
)
from maml.record.index import Run, read_runs

MAX_BYTES = 1_500_000  # largest exported file, because all files are committed


def main(arguments: Sequence[str] | None = None) -> int:
    """Exports all parameters; returns 1 if a number that has been run has no file, else 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--runs-dir",
        type=existing_folder,
        nargs="+",
        default=[RESULTS / "runs"],
        help="folders of run folders; a missing checkpoint is looked for in the next folder (default: results/runs)",
    )
    parser.add_argument("--out", type=Path, default=CHECKPOINTS, help="where to write (default: results/checkpoints)")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    everything, problems = read_runs(*options.runs_dir)
    runs = [run for run in everything if not run.superseded]
    before, index = read_index(options.out), Index()
    decided = {run.record.run_id for run in everything if run.reports or run.superseded}

    @cache
    def find(source: Source) -> Evidence:
        return find_evidence(source, runs)

    for name, (source, steps) in named_sources(RESULTS).items():
        evidence = find(source)
        if not evidence.evaluated:
            kept = before.cells.get(name)
            if kept and before.files[kept.file].run_id not in decided:
                index.cells[name], index.files[kept.file] = kept, before.files[kept.file]
            continue
        run, report = evidence.evaluated[0]
        file = f"{run.path.parent.name}_{report.run_id}.safetensors"
        try:
            cell = entry(source, steps, report, file)
            if file not in index.files:
                index.files[file] = export(runs, run, report, options.out / file, before.files.get(file))
        except MamlError as error:
            problems.append(f"{name}: {error}")
        else:
            index.cells[name] = cell
    write_index(options.out, index)
    for file in before.files:
        if file not in index.files or index.files[file].run:
            (options.out / file).unlink(missing_ok=True)
    status = print_problems(problems)
    size = sum(path.stat().st_size for path in options.out.glob("*.safetensors"))
    print(f"{len(index.cells)} cells and curves of {len(index.files)} runs, {size / 1e6:.1f} MB, in {options.out}")
    return status


def export(runs: Sequence[Run], run: Run, report: Report, path: Path, before: ExportedFile | None) -> ExportedFile:
    """Writes the parameters with which a report was computed, and returns their entry for the index.

    Args:
        runs: all runs, which may include copies of ``run``.
        run: the run of the report.
        report: the report of the number.
        path: path of the file to write.
        before: the earlier index's entry of the file; None if there is none.

    Raises:
        MamlError: if there is no checkpoint of the report's iteration, or if it is too large and not in ``runs`` beside
            the folder of exported files.
    """
    for folder in (other.path for other in runs if _has_report(other, report)):
        if not (folder / "checkpoint.pt").exists():
            continue
        saved = checkpoint.load(folder / "checkpoint.pt")
        if (saved["run_id"], saved["iteration"]) == (report.run_id, report.iteration):
            break
    else:
        if before is not None and before.iteration == report.iteration:
            read_parameters(path.parent, path.name, before)  # checks that they are unchanged
            return before
        raise MamlError(
            f"{run.path} and its copies in --runs-dir have no checkpoint.pt of run {report.run_id} at iteration "
            f"{report.iteration}; train the run again, or add the folder that has it to --runs-dir"
        )
    content = pack(saved["state"], title(run.path, report.iteration))
    is_large = len(content) > MAX_BYTES
    if is_large and folder.parent.parent.resolve() != path.parent.parent.resolve() / "runs":
        raise MamlError(
            f"{path.name} would have {len(content):,} bytes, but at most {MAX_BYTES:,} are exported; copy {folder} "
            f"into {path.parent.parent / 'runs'}, so that the index can name it"
        )
    if not is_large:
        write_bytes_atomically(path, content)
    last = run.record.segments[-1]
    return ExportedFile(
        sha256=hashlib.sha256(content).hexdigest(),
        run=f"{folder.parent.name}/{folder.name}" if is_large else None,
        run_id=report.run_id,
        seed=report.seed,
        iteration=report.iteration,
        num_iterations=report.num_iterations,
        execution=saved["execution"],
        versions=last.versions,
        hardware=last.hardware.model_dump(exclude_unset=True),
    )


def _has_report(run: Run, report: Report) -> bool:
    """Returns whether a run is that of a report, or a copy. Another machine's has the same id, but other numbers."""
    return run.record.run_id == report.run_id and any(
        not each.difference(report)
        for each in run.reports
        if (each.evaluation, each.iteration) == (report.evaluation, report.iteration)
    )


def entry(source: Source, steps: Sequence[int], report: Report, file: str) -> Entry:
    """Returns the index entry of one cell or curve.

    Raises:
        MamlError: if the cell has an override that an index cannot have.
    """
    check_overrides(source.overrides)
    (curve,) = (
        curve for curve in report.curves if (curve.metric, curve.num_shots) == (source.metric, source.num_shots)
    )
    return Entry(
        file=file,
        experiment=source.experiment,
        overrides=list(source.overrides),
        evaluation=report.evaluation,
        metric=source.metric,
        num_shots=source.num_shots,
        step_sizes=report.step_sizes.get(source.num_shots),
        bank=report.banks[source.num_shots],
        numbers={step: CommittedNumber(mean=curve.steps[step].mean, ci95=curve.steps[step].ci95) for step in steps},
    )


if __name__ == "__main__":
    exit_with(main)
