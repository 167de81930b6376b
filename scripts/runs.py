"""Lists, shows, compares, imports, mirrors and deletes runs: those in runs/ and the committed ones in results/runs/.

    python scripts/runs.py list 'sinusoid_*' --set inner.step_size=0.001 --by-seed

Only `supersede` (a mark in the run's folder), `import` (runs of another machine) and `mirror` (files of W&B or
TensorBoard) write anything. Only `prune --yes` deletes anything.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from math import inf, isnan, nan
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from maml.cli.scripts import add_runs_dir, exit_with
from maml.config.compose import compose
from maml.config.paths import CONF, RESULTS
from maml.config.schema import build
from maml.errors import MamlError
from maml.logger.base import Mirror
from maml.logger.mirror import mirror
from maml.paper.cells import load_figures, load_pictures, load_tables
from maml.paper.evidence import Evidence, find_evidence
from maml.record import checkpoint
from maml.record.comparison import (
    RESAMPLES,
    data_of_bank,
    groups_on_the_same_tasks,
    method_rows,
    paired_interval,
    settings_but_seed,
)
from maml.record.contents import CurveRecord, Report, Source, StepRecord
from maml.record.frame import UNKNOWN, check_key, run_frame, setting
from maml.record.index import SUPERSEDED, Run, conflicts_among, read_run, read_runs, samples, supersede
from maml.record.labels import number_label, step_label
from maml.record.lock import acquire
from maml.record.run_files import read_json
from maml.record.settings import differing_keys, experiment_settings, setting_texts
from maml.record.transfer import import_runs
from maml.sweep.state import SWEEP, SweepReader, find_sweep, find_sweeps, job_rows, summary_line, sweep_rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a subcommand; returns 1 if it failed, or if `list` left out a damaged run folder, else 0."""
    try:
        options = _parser().parse_args(arguments)
        runs, problems = ([], []) if options.act is show_sweep else read_runs(*options.runs_dir)
        options.act(options, runs)
    except MamlError as error:
        problems = [str(error)]
    except OSError as error:
        if error.filename is None:
            raise
        problems = [f"{error.filename}: {error.strerror}"]
    else:
        problems = [f"left out: {problem}" for problem in problems] if options.act is list_runs else []
    for problem in problems:
        print(f"ERROR, {problem}", file=sys.stderr)
    return 1 if problems else 0


def _parser() -> argparse.ArgumentParser:
    shared = argparse.ArgumentParser(add_help=False)
    add_runs_dir(shared)
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(required=True)

    def command(name: str, act: Any, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, parents=[shared], help=text, description=text)
        added.set_defaults(act=act)
        return added

    _add_list_options(command("list", list_runs, "one line per run"))

    show_parser = command("show", show_run, "a run's settings, segments and evaluations, and the cells that use it")
    show_parser.add_argument("run", help="its folder, or the beginning of its id")

    compare_parser = command("compare", compare_runs, "the differences of two runs: settings, and numbers task by task")
    compare_parser.add_argument("a", help="a run's folder, or the beginning of its id")
    compare_parser.add_argument("b", help="another run's folder, or the beginning of its id")

    methods_parser = command(
        "methods", show_methods, "methods that were tested on the same tasks, compared task by task"
    )
    methods_parser.add_argument("experiment", nargs="?", default="*", help="only these experiments, as in 'omniglot_*'")

    sweep_parser = command("sweep", show_sweep, "the state of a sweep's jobs: running, looks dead, failed, ETA")
    sweep_parser.add_argument("sweep", nargs="?", help="the beginning of its id; without it, all sweeps are listed")

    supersede_parser = command("supersede", supersede_run, "mark a run as no longer evidence")
    supersede_parser.add_argument("run", help="its folder, or the beginning of its id")
    supersede_parser.add_argument("--by", metavar="RUN", help="the run that replaces it")
    supersede_parser.add_argument("--reason", default="", metavar="TEXT", help="why it is no longer evidence")
    supersede_parser.add_argument("--undo", action="store_true", help="remove the mark")

    import_parser = command("import", import_archive, "take runs over from another machine")
    import_parser.add_argument("archive", type=Path, help="tar file of run folders, made by `tar cf runs.tar runs`")
    import_parser.add_argument("--into", type=Path, default=Path("runs"), help="folder that takes them (default: runs)")

    mirror_parser = command("mirror", mirror_run, "send a run that has ended to W&B or TensorBoard")
    mirror_parser.add_argument("run", help="its folder, or the beginning of its id")
    loggers = sorted(path.stem for path in (CONF / "logger").glob("*.yaml") if path.stem != "local")
    mirror_parser.add_argument("--logger", choices=loggers, default="wandb", help="the service (default: wandb)")
    mirror_parser.add_argument("--project", help="W&B project (default: that of conf/logger/wandb.yaml)")
    mirror_parser.add_argument("--entity", help="W&B user or team (default: the account's)")
    mirror_parser.add_argument("--mode", help="online, offline or auto (default: auto, online if logged in)")

    prune_parser = command("prune", prune_runs, "delete superseded runs, and failed runs in which nothing was saved")
    prune_parser.add_argument("--days", type=_days, default=7, help="least age of a failed run in days (default: 7)")
    prune_parser.add_argument("--yes", action="store_true", help="delete the runs instead of only listing them")
    return parser


def _days(text: str) -> float:
    """Parses an age in days."""
    try:
        days = float(text)
    except ValueError:
        days = nan
    if not days >= 0:  # NaN is not
        raise argparse.ArgumentTypeError(f"{text} is no age in days; give 0 or more")
    return days


def _add_list_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("experiment", nargs="?", default="*", help="only these experiments, as in 'sinusoid_*'")
    statuses = ["finished", "running", "interrupted", "failed", "killed", "superseded", "conflict"]
    parser.add_argument("--status", choices=statuses, help="only runs with this status")
    parser.add_argument("--seed", type=int, help="only this seed")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="only runs that were trained with it"
    )
    finished = parser.add_mutually_exclusive_group()
    finished.add_argument("--finished", action="store_true", default=None, help="only completely trained runs")
    finished.add_argument(
        "--unfinished", dest="finished", action="store_false", default=None, help="only incompletely trained runs"
    )
    parser.add_argument(
        "--by-seed",
        action="store_true",
        help="one line per group of completely trained runs that differ in seed or hardware only, with the mean over "
        "runs; superseded runs are left out",
    )
    parser.add_argument(
        "--sort",
        choices=["headline"],
        help="best number first, of each metric; what diverged or was not evaluated comes last (default: by "
        "experiment, then seed)",
    )
    parser.add_argument("--csv", action="store_true", help="as CSV, with more columns and in full precision")


def find(name: str, runs: Sequence[Run]) -> Run:
    """Returns the run with a folder, or with an id that begins with ``name``.

    Raises:
        MamlError: if there is no such run, or several, or the folder is damaged.
    """
    if Path(name).is_dir():
        run = next((run for run in runs if run.path.samefile(name)), None) or read_run(Path(name))
        if run is None:
            raise MamlError(f"{name} is no run folder: it has no run.json")
        return run
    matches = [run for run in runs if run.record.run_id.startswith(name)]
    if len(matches) == 1:
        return matches[0]
    if not matches:
        raise MamlError(f"there is no run {name}; `python scripts/runs.py list` shows all runs")
    folders = "\n  ".join(str(run.path) for run in matches)
    raise MamlError(f"{name} matches {len(matches)} runs; give more of the id, or a folder:\n  {folders}")


def print_table(rows: Sequence[Mapping[str, str]]) -> None:
    """Prints a table, with ruled lines on a terminal and as plain text elsewhere."""
    if not rows:
        print("none")
        return
    console = Console()
    if console.is_terminal:
        table = Table(*(Column(name, overflow="fold") for name in rows[0]))
        for row in rows:
            table.add_row(*map(Text, row.values()))
        console.print(table)
        return
    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())


# List.


def list_runs(options: argparse.Namespace, runs: Sequence[Run]) -> None:
    """Prints the runs that match all filters."""
    wanted = [_parse_setting(text, runs) for text in options.set]
    chosen = [
        run
        for run in sorted(runs, key=lambda run: (run.experiment, run.record.seed, run.record.run_id))
        if fnmatch(run.experiment, options.experiment)
        and options.status in (None, run.status)
        and options.seed in (None, run.record.seed)
        and options.finished in (None, run.iteration == run.num_iterations)
        and all(setting(run.training, key) == value for key, value in wanted)
    ]
    texts = dict(zip((run.path for run in chosen), settings_texts(chosen), strict=True))
    if options.by_seed:
        frame = _frame_by_seed(chosen, texts, options.sort == "headline")
    else:
        if options.sort == "headline":
            chosen.sort(key=lambda run: _rank(run, run.headline[1].mean if run.headline else None))
        frame = run_frame(chosen)
        if chosen:
            frame["settings"] = [texts[run.path] for run in chosen]
    if options.csv:
        frame.to_csv(sys.stdout, index=False)
        return
    if frame.empty:
        print(_why_none(options, runs, len(chosen)))
    else:
        to_text = _group_text if options.by_seed else _row_text
        print_table([to_text(row) | {"settings": row["settings"]} for row in frame.to_dict("records")])
    for run in chosen:
        if run.superseded and not options.by_seed:
            print(f"left out, {run.superseded}: {run.path}")
    for conflict in conflicts_among(chosen):
        print(f"conflict: {conflict}")


def _why_none(options: argparse.Namespace, runs: Sequence[Run], num_chosen: int) -> str:
    """Returns why no run is listed: where there is none, or which filter left all out."""
    pattern, where = options.experiment, ", ".join(map(str, options.runs_dir))
    found = sum(fnmatch(run.experiment, pattern) for run in runs)
    what = "" if pattern == "*" else f" of {pattern!r}"
    if found:
        why = "is completely trained, evaluated and not superseded" if num_chosen else "fits the other options"
        count = num_chosen or found
        return f"none: of {count} run{'s' * (count > 1)}{what} in {where}, none {why}"
    hint = ""
    if any(fnmatch(run.experiment, f"{pattern}*") for run in runs):
        hint = f"; experiments begin with it: '{pattern}*'"
    return f"none: there is no run{what} in {where}{hint}"


def _parse_setting(text: str, runs: Sequence[Run]) -> tuple[str, Any]:
    """Parses a setting in the syntax of train.py's overrides; returns key and value."""
    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException:
        override = None
    if override is None or override.is_sweep_override() or override.is_delete():
        raise MamlError(f"--set {text} is not a setting; give KEY=VALUE, as in --set inner.step_size=0.4")
    key = override.key_or_group
    try:
        check_key(runs, key)
    except MamlError as error:
        raise MamlError(f"--set {text}: {error}") from error
    return key, override.value()


def settings_texts(runs: Sequence[Run]) -> list[str]:
    """Returns for each run in what it differs from its experiment, ``key=value key=value``, the seed left out.

    These are the settings of its training and of the evaluation that `Run.report` returns. The text is ``?`` if the
    experiment is unknown here.
    """
    known = {name: experiment_settings(name) for name in {run.experiment for run in runs}}  # 0.1 s for each
    return [_settings_text(run, *known[run.experiment]) for run in runs]


def _settings_text(run: Run, training: Mapping[str, Any], evaluation: Mapping[str, Any]) -> str:
    if not training:
        return "?"
    if run.report is None:
        return " ".join(setting_texts(run.training, training))
    return " ".join(setting_texts(run.training | run.report.evaluation, {**training, **evaluation}))


def _rank(run: Run, mean: float | None) -> tuple[bool, str, float]:
    """Returns the key by which runs are sorted, the best first, if the headline number of one is ``mean``."""
    if run.report is None:
        return True, "", 0.0
    sign = -1 if run.report.larger_is_better else 1
    return False, run.report.headline_metric, inf if mean is None or isnan(mean) else sign * mean


def _run_row(run: Run) -> dict[str, Any]:
    return run_frame([run]).to_dict("records")[0]


def _row_text(row: Mapping[str, Any]) -> dict[str, str]:
    headline = ""
    if row["metric"]:
        reading = _mean_text(row["mean"], row["ci95"], row["num_tasks"])
        headline = f"{row['metric']} {reading}{_label(row).removeprefix(row['metric'])}"
        if row["evaluated_at"] != row["iteration"]:
            headline += f" at {row['evaluated_at']:,}"
    return {
        "run": row["run"],
        "experiment": row["experiment"],
        "seed": str(row["seed"]),
        "iteration": f"{row['iteration']:,} of {row['num_iterations']:,}",
        "status": row["status"],
        "headline ± 95 % over n tasks": headline,
        "seconds": f"{row['seconds']:,.0f}",
        "commit": row["commit"],
        "hardware": row["hardware"],
    }


def _label(row: Mapping[str, Any]) -> str:
    return number_label(*(row[name] for name in ("metric", "num_shots", "step", "measured_by", "num_tasks")))


def _number(step: int, report: Report) -> str:
    """Returns the number of a step; by showing, its name, because showings count from 1."""
    return step_label(step, report.measured_by) if report.measured_by == "showing" else str(step)


def _step_reading(step: StepRecord) -> str:
    return _mean_text(step.mean, step.ci95, step.num_tasks)


def _mean_text(mean: float | None, ci95: float | None, num_tasks: int | None = None) -> str:
    """Formats a mean and the half-width of its 95 % interval over tasks; by showing, no task may have the showing."""
    if num_tasks == 0:
        return "in no task"
    return "diverged" if mean is None or ci95 is None else f"{mean:.4g} ± {ci95:.2g}"


def _frame_by_seed(runs: Sequence[Run], texts: Mapping[Path, str], best_first: bool = False) -> pd.DataFrame:
    """Returns one row per group of complete runs that differ in seed or hardware only, with their statistics.

    Args:
        runs: the runs.
        texts: what `settings_texts` returns, by folder.
        best_first: whether the best mean comes first.
    """
    complete = [run for run in runs if run.report and run.report.complete and not run.superseded]
    keys = [settings_but_seed(run, run.report) for run in complete if run.report]
    groups = pd.Series(complete, dtype=object).groupby(keys, sort=False)
    rows = [(group.iloc[0], _group_row(list(group), texts)) for _, group in groups]
    if best_first:
        rows.sort(key=lambda row: _rank(row[0], row[1]["mean"]))
    return pd.DataFrame([row for _, row in rows], dtype=object)


def _group_row(runs: Sequence[Run], texts: Mapping[Path, str]) -> dict[str, Any]:
    evidence = Evidence(tuple(samples((run, run.report) for run in runs if run.report)))
    run, report = evidence.evaluated[0]
    row = run_frame([run]).iloc[0]
    found = evidence.statistics(Source(run.experiment, row["metric"], row["num_shots"]), row["step"])
    assert found is not None
    seeds = [report.seed for _, report in evidence.evaluated]
    means = np.array(found.means)
    return {
        "experiment": run.experiment,
        "first_run": report.run_id,
        **row[["metric", "num_shots", "step", "measured_by", "num_tasks"]],
        "mean": found.mean,
        "ci95": found.ci95,
        "tasks_ci95": found.tasks_ci95,
        "num_runs": found.num_runs,
        "seeds": " ".join(map(str, seeds)),
        "sd": means.std(ddof=1) if len(means) > 1 else nan,
        "lowest_run": found.lowest,
        "highest_run": found.highest,
        "settings": texts[run.path],
    }


def _group_text(row: Mapping[str, Any]) -> dict[str, str]:
    several, diverged = row["num_runs"] > 1, isnan(row["mean"])
    span = "" if diverged or not several else f"{row['lowest_run']:.4g} to {row['highest_run']:.4g}"
    return {
        "experiment": row["experiment"],
        "first run": row["first_run"],
        "headline": _label(row),
        "mean over runs ± 95 %": _mean_text(None if diverged else row["mean"], row["ci95"]),
        "over tasks alone": "" if diverged else f"± {row['tasks_ci95']:.2g}",
        "runs": f"{row['num_runs']}: seeds {row['seeds']}" if several else f"1: seed {row['seeds']}",
        "range over runs": span,
    }


# Sweep.


def show_sweep(options: argparse.Namespace, runs: Sequence[Run]) -> None:
    """Prints the state of each job of a sweep, or one line per sweep."""
    if options.sweep is None:
        rows = sweep_rows(find_sweeps(*options.runs_dir))
        if not rows:
            where = ", ".join(map(str, options.runs_dir))
            print(f"none: there is no sweep in {where}; --runs-dir names another folder, the runs_dir of train.py")
            return
        print_table(rows)
        return
    folder = find_sweep(options.sweep, *options.runs_dir)
    jobs = SweepReader(folder).jobs()
    print_table(job_rows(jobs))
    print(f"\n{summary_line(jobs, (read_json(folder / SWEEP) or {}).get('num_jobs'))}\nin {folder}")


# Show.


def show_run(options: argparse.Namespace, runs: Sequence[Run]) -> None:
    """Prints the settings, segments and evaluations of one run, and the cells that use it."""
    run = find(options.run, runs)
    print_table([{"run": name, run.record.run_id: value} for name, value in _row_text(_run_row(run)).items()][1:])
    print(f"\nin {run.path}")
    if run.superseded:
        print(f"left out of tables and figures: {run.superseded}")
    if run.conflict:
        print(f"conflict: {run.conflict}")
    training, evaluation = experiment_settings(run.experiment)
    print("\nTraining settings that differ from the experiment's:" if training else "\nTraining settings:")
    print_differences(run.training, training, "run", "experiment")
    print("\nSegments:")
    print_table(
        [
            {
                "started": part.started,
                "iterations": f"{part.first_iteration:,} to {part.last_iteration:,}",
                "seconds": f"{part.seconds:,.0f}",
                "iterations/s": f"{(part.last_iteration - part.first_iteration) / (part.seconds or nan):.3g}",
                "commit": part.commit_name,
                "hardware": part.machine,
            }
            for part in run.record.segments
        ]
    )
    print("\nEvaluations, mean ± 95 % over n tasks:")
    print_table(
        [
            {
                "folder": str(report.folder.relative_to(run.path)),
                "iteration": f"{report.iteration:,}",
                "curve": f"{curve.metric}, K={curve.num_shots}",
                "n": str(curve.steps[0].num_tasks),
                step_label(0, report.measured_by): _step_reading(curve.steps[0]),
                "last step": f"{_number(last.step, report)}: {_step_reading(last)}",
            }
            for report in run.reports
            for curve in report.curves
            for last in curve.steps[-1:]
        ]
    )
    for report in run.reports:
        if evaluation and report.evaluation != evaluation:
            print(f"\nEvaluation settings of {report.folder.relative_to(run.path)} that differ from the experiment's:")
            print_differences(report.evaluation, evaluation, "run", "experiment")
    print("\nUsed by:")
    print("\n".join(_artifacts_using(run, [other for other in runs if not other.superseded])) or "none")


def _artifacts_using(run: Run, runs: Sequence[Run]) -> list[str]:
    """Returns every cell, curve and panel that shows the run."""
    measured = {(curve.metric, curve.num_shots) for report in run.reports for curve in report.curves}
    sources: dict[Source, list[str]] = {}
    for table in load_tables(RESULTS):
        for cell in table.cells:
            if cell.source:
                sources.setdefault(cell.source, []).append(cell.name)
    for figure in load_figures(RESULTS):
        for curve in figure.curves:
            sources.setdefault(curve.source, []).append(f"{figure.name}: {curve.label}")
    for picture in load_pictures(RESULTS):
        for panel in picture.panels:
            sources.setdefault(panel.source, []).append(f"{picture.name}: {panel.label}")
    return [
        name
        for source, names in sources.items()
        if (source.metric, source.num_shots) in measured  # checked first: composing an experiment takes 0.1 s
        and any(evaluated.path.samefile(run.path) for evaluated, _ in find_evidence(source, runs).evaluated)
        for name in dict.fromkeys(names)
    ]


def print_differences(a: Mapping[str, Any], b: Mapping[str, Any], a_name: str, b_name: str) -> None:
    """Prints the settings that differ, with their defaults where they are not recorded."""
    print_table(
        [{"setting": key, a_name: _value_text(a, key), b_name: _value_text(b, key)} for key in differing_keys(a, b)]
    )


def _value_text(settings: Mapping[str, Any], key: str) -> str:
    value = setting(settings, key)
    return "" if value is UNKNOWN else str(value)


# Compare.


def compare_runs(options: argparse.Namespace, runs: Sequence[Run]) -> None:
    """Prints the differences of two runs."""
    a, b = find(options.a, runs), find(options.b, runs)
    rows = _row_text(_run_row(a)) | {"folder": str(a.path)}, _row_text(_run_row(b)) | {"folder": str(b.path)}
    print_table([{"": name, "A": rows[0][name], "B": rows[1][name]} for name in rows[0]])
    print("\nSettings that differ:")
    evaluations = [run.report.evaluation if run.report else {} for run in (a, b)]
    print_differences(a.training | evaluations[0], b.training | evaluations[1], "A", "B")
    if a.report is None or b.report is None:
        raise MamlError(f"{(a if a.report is None else b).path} has no evaluation, so no numbers can be compared")
    direction = "larger" if a.report.larger_is_better else "smaller"
    print(f"\nB - A ({direction} is better), paired task by task: 95 % bootstrap, {RESAMPLES:,} resamples of n tasks")
    unmatched = {(curve.metric, curve.num_shots): curve for curve in b.report.curves}
    rows_of_curves = []
    for curve in a.report.curves:
        other = unmatched.pop((curve.metric, curve.num_shots), None)
        rows_of_curves += _difference_rows(a, b, curve, other) if other else [_unmatched_row("A", curve)]
    print_table(rows_of_curves + [_unmatched_row("B", curve) for curve in unmatched.values()])


def _unmatched_row(name: str, curve: CurveRecord) -> dict[str, str]:
    columns = dict.fromkeys(("curve", "step", "A", "B", "B - A", "95 % interval", "n"), "")
    return columns | {"curve": f"{curve.metric}, K={curve.num_shots}", "95 % interval": f"only {name} has this curve"}


def _difference_rows(a: Run, b: Run, a_curve: CurveRecord, b_curve: CurveRecord) -> list[dict[str, str]]:
    """Returns one row per common step: both means, and their difference with its interval or why there is none."""
    assert a.report is not None
    assert b.report is not None
    source = Source(a.experiment, a_curve.metric, a_curve.num_shots)
    rows = []
    for first, second in zip(a_curve.steps, b_curve.steps, strict=False):
        row = {
            "curve": f"{a_curve.metric}, K={a_curve.num_shots}",
            "step": _number(first.step, a.report),
            "A": _step_reading(first),
            "B": _step_reading(second),
            "B - A": "",
            "95 % interval": "diverged" if first.num_tasks else "",
            "n": str(first.num_tasks),
        }
        if first.mean is not None and second.mean is not None:
            row["B - A"] = f"{second.mean - first.mean:+.4g}"
            try:
                if a.report.banks[a_curve.num_shots] != b.report.banks[a_curve.num_shots]:
                    raise MamlError("their task banks are different")
                if data_of_bank(a) != data_of_bank(b):
                    raise MamlError("the data or environments of their tasks are different")
                low, high = paired_interval(*(run.per_task(source, first.step) for run in (a.report, b.report)))
                row["95 % interval"] = f"{low:+.4g} to {high:+.4g}"
            except MamlError as error:
                row["95 % interval"] = f"not paired: {error}"
        rows.append(row)
    return rows


def show_methods(options: argparse.Namespace, runs: Sequence[Run]) -> None:
    """Prints the methods that were tested on the same tasks, each with its difference from the best."""
    chosen = [run for run in runs if fnmatch(run.experiment, options.experiment) and not run.superseded]
    groups = groups_on_the_same_tasks(chosen)
    if not groups:
        raise MamlError(
            f"no two methods of {options.experiment!r} were tested on the same tasks. mode=eval with equal evaluation "
            "settings (num_tasks, num_query, split) tests finished runs on the same ones, if their data or environment "
            "is the same"
        )
    print("all intervals are over test tasks alone, without the luck of training (list --by-seed has both)")
    for group in groups:
        best = group[0]
        print(f"\n{best.tasks}; minus best: paired over tasks, 95 % bootstrap")
        print_table(method_rows(group))


# Import.


def import_archive(options: argparse.Namespace, runs: Sequence[Run]) -> None:
    """Takes the runs of an archive, and prints what became of each.

    Raises:
        MamlError: if the archive cannot be read, or some of its runs were refused.
    """
    outcomes = import_runs(options.archive, options.into)
    for outcome in outcomes:
        print(f"{outcome.folder}: {outcome.text}")
    refused = sum(outcome.refused for outcome in outcomes)
    if refused:
        raise MamlError(f"{refused} of {len(outcomes)} runs were refused, see above; the others are in their places")


# Mirror.


def mirror_run(options: argparse.Namespace, runs: Sequence[Run]) -> None:
    """Sends a run and its evaluations to the service of a logger."""
    run = find(options.run, runs)
    given = {key: getattr(options, key) for key in ("project", "entity", "mode") if getattr(options, key) is not None}
    quoted = {key: "'" + value.replace("'", r"\'") + "'" for key, value in given.items()}
    try:
        settings, _ = compose([f"logger={options.logger}", *(f"logger.{key}={value}" for key, value in quoted.items())])
    except HydraException as error:
        raise MamlError(f"{', '.join(f'--{key}' for key in given)} is no option of {options.logger}") from error
    is_committed = run.path.resolve().is_relative_to(RESULTS)
    files_dir = Path("runs", "mirrored", run.experiment, run.path.name) if is_committed else run.path
    logger: Mirror = build(settings.logger)
    logger.patience = 600.0  # nothing waits for this command
    if mirror(run.path, logger, files_dir):
        print(f"mirrored {run.path} to {logger.name}; its files are in {files_dir}")
    else:
        print(f"{run.path} was mirrored to {logger.name} before")


# Supersede and prune.


def supersede_run(options: argparse.Namespace, runs: Sequence[Run]) -> None:
    """Marks a run, or removes the mark."""
    run = find(options.run, runs)
    if options.undo:
        if options.by or options.reason:
            raise MamlError("--undo removes the mark, so --by and --reason have no meaning; leave them out")
        if not run.superseded:
            raise MamlError(f"{run.path} is evidence: it has no mark to remove")
        (run.path / SUPERSEDED).unlink(missing_ok=True)
        print(f"{run.path} is evidence again")
        return
    if not (options.by or options.reason.strip()):
        raise MamlError("name the run that replaces it with --by RUN, or give the reason with --reason TEXT")
    other = find(options.by, runs) if options.by else None
    if other and other.path.samefile(run.path):
        raise MamlError(f"{run.path} cannot replace itself; name another run with --by")
    if other and other.superseded:
        raise MamlError(f"{other.path} is no longer evidence itself: {other.superseded}; name another run with --by")
    supersede(run, other, options.reason)
    print(
        f"{run.path} is left out from now on. Its command would still find it finished; to run it again, delete the "
        "folder by hand, or with `prune --yes`, which deletes nothing in results/. To remove the mark: supersede --undo"
    )


def prune_runs(options: argparse.Namespace, runs: Sequence[Run]) -> None:
    """Deletes, or only lists, runs that no table or figure can use; never those in results/ or those in progress."""
    unneeded = [(run, reason) for run in runs if (reason := _prune_reason(run, options.days))]
    for run, reason in unneeded:
        outcome = "would delete" if not options.yes else "deleted" if _delete(run) else "kept, a process is using it:"
        print(f"{outcome} {run.path} ({reason})")
    if not unneeded:
        young = 0 if options.days <= 0 else sum(bool(_prune_reason(run, 0)) for run in runs)
        what = f"{young} failed runs are" if young > 1 else "1 failed run is"
        print(
            f"nothing to delete; {what} younger than {options.days:g} days (--days 0)" if young else "nothing to delete"
        )
    elif not options.yes:
        print("nothing is deleted without --yes")


def _prune_reason(run: Run, days: float) -> str:
    """Returns why a run can be deleted; empty if it must be kept."""
    if run.alive or run.path.resolve().is_relative_to(RESULTS):
        return ""
    if run.superseded:
        return str(run.superseded)
    age = (time.time() - (run.path / "run.json").stat().st_mtime) / 86_400
    if run.status not in ("failed", "killed") or age < days:
        return ""
    is_empty = not run.reports and checkpoint.newest(run.path / "checkpoint.pt") is None
    return f"{run.status} {age:.0f} days ago, and nothing was saved" if is_empty else ""


def _delete(run: Run) -> bool:
    """Deletes a run folder; returns False, and keeps it, if a process holds its lock."""
    lock = acquire(run.path / "lock")
    if lock is None:
        return False
    try:
        # Renamed first, in one step: if the deletion is interrupted, the rest is not read as a run.
        trash = run.path.rename(run.path.parents[1] / f".deleted-{run.path.name}-{os.getpid()}")
    finally:
        lock.release()
    shutil.rmtree(trash)
    return True


if __name__ == "__main__":
    exit_with(main)
