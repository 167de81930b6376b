"""The summary of a sweep: its table, and what is missing."""

from __future__ import annotations

import math
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pandas as pd
import pytest

from maml.config.compose import compose
from maml.errors import MamlError
from maml.record.statistics import combine
from maml.sweep.state import Job
from maml.sweep.summary import submitted_jobs, summarise, tabulate
from maml.training.loop import _check_finite
from tests.paper.fake_runs import edit
from tests.sweep.fake_sweep import job, write_job, write_report


def test_table_has_a_row_for_each_combination_of_the_axes() -> None:
    table = tabulate(
        [
            job(2.0, "+experiment=a", "inner.step_size=0.1", "seed=0"),
            job(4.0, "+experiment=a", "inner.step_size=0.1", "seed=1"),
            job(1.0, "+experiment=a", "inner.step_size=0.2", "seed=0"),
            Job(("+experiment=a", "inner.step_size=0.2", "seed=1"), None, "killed"),
        ]
    )
    assert list(table["inner.step_size"]) == ["0.2", "0.1"], "the best first"
    assert list(table["mean"]) == [1.0, 3.0]
    assert list(table["ci95"]) == [0.5, 0.5]
    assert list(table["seeds"]) == ["1 of 2", "2 of 2"]
    assert (table["lowest"][1], table["highest"][1]) == (2.0, 4.0)
    assert list(table) == ["inner.step_size", "metric", "mean", "ci95", "lowest", "highest", "seeds"]


def test_table_puts_large_accuracies_first_and_what_diverged_or_failed_last() -> None:
    jobs = [job(None, "a=1", metric="accuracy"), job(0.5, "a=2", metric="accuracy"), Job(("a=3",), None, "why")]
    table = tabulate([*jobs, job(0.9, "a=4", metric="accuracy")])
    assert list(table["a"]) == ["4", "2", "1", "3"]
    assert math.isnan(table["mean"][2])


def test_table_says_at_which_k_and_step_each_number_is() -> None:
    few, many, showing = (job(mean, f"x={mean}") for mean in (2.0, 1.0, 3.0))
    for each, num_shots, step in ((few, 5, 1), (many, 10, 32)):
        assert each.report
        (curve,) = each.report.curves
        curve.num_shots, curve.steps[-1].step = num_shots, step
    assert showing.report
    showing.report.measured_by = "showing"
    table = tabulate([few, many, showing])
    assert list(table["metric"]) == ["mse (K=10, step 32, n=2)", "mse (K=5, step 1, n=2)", "mse (K=5, showing 2, n=2)"]
    assert list(table["mean"]) == [1.0, 2.0, 3.0], "the best first, at whatever K"


@pytest.mark.parametrize("axis", ["mean", "kind", "job", "finished", "metric"])
def test_axis_may_have_any_name(axis: str) -> None:
    table = tabulate([job(2.0, f"{axis}=b"), job(1.0, f"{axis}=a")])
    assert list(table.iloc[:, 0]) == ["a", "b"]
    assert next(iter(table)) == axis


def test_sweep_over_seeds_alone_is_one_row() -> None:
    table = tabulate([job(2.0, "seed=0"), job(4.0, "seed=1")])
    assert list(table) == ["metric", "mean", "ci95", "lowest", "highest", "seeds"]
    assert list(table["seeds"]) == ["2 of 2"]


def test_sweep_without_jobs_is_an_empty_table() -> None:
    assert len(tabulate([])) == 0


def test_interval_covers_trainings_and_knows_that_runs_share_their_tasks(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    runs_dir, sweep = tmp_path, tmp_path / "sweeps" / "one"
    values = np.random.default_rng(0).normal(size=(3, 20)).round(4) + np.array([[0.0], [1.0], [2.0]])
    for seed, row in enumerate(values.tolist()):
        write_report(runs_dir, f"run{seed}", row)
        write_job(sweep, f"seed={seed}", run_id=f"run{seed}")
    summarise(sweep)
    (row,) = pd.read_csv(sweep / "summary.csv").to_dict("records")
    expected = combine([(mean, 0.5) for mean in values.mean(1)], values)
    assert row["ci95"] == pytest.approx(expected.ci95)
    assert (row["lowest"], row["highest"]) == pytest.approx((expected.lowest, expected.highest))
    assert expected.ci95 > 1.5 * expected.tasks_ci95, "the example must show the difference"
    lost = runs_dir / "sinusoid" / "run1" / "tasks.csv"
    lost.unlink()
    summarise(sweep)
    assert f"{lost} is missing or damaged" in caplog.text
    (row,) = pd.read_csv(sweep / "summary.csv").to_dict("records")
    assert row["ci95"] == pytest.approx(combine([(mean, 0.5) for mean in values.mean(1)]).ci95)


def test_runs_on_different_banks_are_not_paired(tmp_path: Path) -> None:
    sweep = tmp_path / "sweeps" / "one"
    values = np.random.default_rng(0).normal(size=(3, 20)).round(4) + np.array([[0.0], [1.0], [2.0]])
    for seed, row in enumerate(values.tolist()):
        write_report(tmp_path, f"run{seed}", row)
        write_job(sweep, f"seed={seed}", run_id=f"run{seed}")
    edit(tmp_path / "sinusoid" / "run1" / "report.json", banks={"5": "another"})
    summarise(sweep)
    (row,) = pd.read_csv(sweep / "summary.csv").to_dict("records")
    assert row["ci95"] == pytest.approx(combine([(mean, 0.5) for mean in values.mean(1)]).ci95)


@pytest.mark.parametrize(("line", "measured_by"), [("10,mse,0,9,8", "gradient step"), ("5,mse,20,9,", "showing")])
def test_interval_is_of_the_tasks_that_have_the_headline(tmp_path: Path, line: str, measured_by: str) -> None:
    sweep, values = tmp_path / "sweeps" / "one", np.random.default_rng(0).normal(size=(3, 20)).round(4)
    for seed, row in enumerate(values.tolist()):
        write_report(tmp_path, f"run{seed}", row)
        edit(tmp_path / "sinusoid" / f"run{seed}" / "report.json", measured_by=measured_by)
        with open(tmp_path / "sinusoid" / f"run{seed}" / "tasks.csv", "a") as file:
            file.write(f"{line}\n")  # at another K, or of a task that has no such showing
        write_job(sweep, f"seed={seed}", run_id=f"run{seed}")
    summarise(sweep)
    (summary,) = pd.read_csv(sweep / "summary.csv").to_dict("records")
    assert summary["ci95"] == pytest.approx(combine([(mean, 0.5) for mean in values.mean(1)], values).ci95)


def test_summary_names_missing_jobs_and_their_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = tmp_path / "sweeps" / "one"
    path = write_job(sweep, "a=1", error="why")
    path.with_suffix(".log").write_text("")
    write_job(sweep, "a=2")
    summarise(sweep)
    text = (sweep / "summary.md").read_text()
    assert text in capsys.readouterr().out
    assert "0 of 2 jobs are finished" in text
    assert f"- a=1: why (its output: {path.with_suffix('.log')})" in text
    assert "- a=2: not started" in text


def test_summary_does_not_ask_to_run_again_what_diverged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = tmp_path / "sweeps" / "one"
    folder = SimpleNamespace(path=sweep, checkpoint_path=sweep / "checkpoint.pt")
    learner = SimpleNamespace(folder=folder, logger=SimpleNamespace(alert=lambda *_: None))
    with pytest.raises(MamlError) as raised:
        _check_finite({"loss": math.nan}, 7, cast(Any, learner))
    write_job(sweep, "a=1", error=f"MamlError: {raised.value}")
    summarise(sweep)
    advice = "would fail again in the same way: change their settings, or leave them out"
    text = capsys.readouterr().out
    assert f"\n\nThese {advice}\n" in text
    assert "Run the same command again" not in text
    write_job(sweep, "a=2")
    summarise(sweep)
    text = capsys.readouterr().out
    assert f"\n\n1 of these {advice}\n\nRun the same command again to continue with the others: `" in text


def test_summary_does_not_ask_to_run_again_what_is_not_valid(tmp_path: Path) -> None:
    sweep = tmp_path / "sweeps" / "one"
    with pytest.raises(MamlError) as raised:
        compose(["+experiment=sinusoid_10shot", "inner.num_steps=-1"])
    write_job(sweep, "inner.num_steps=-1", error=f"MamlError: {raised.value}")
    summarise(sweep)
    text = (sweep / "summary.md").read_text()
    assert "These would fail again in the same way" in text
    assert "the same command again" not in text
    write_job(
        sweep, "inner.num_steps=-1", error="MamlError: the config is not valid: inner._target_=a.B: no such class"
    )
    summarise(sweep)
    assert "Run the same command again" in (sweep / "summary.md").read_text()


def test_seed_of_two_jobs_counts_once() -> None:
    jobs = [job(1.0, "a=1", "seed=0"), job(3.0, "a=1", "seed=1"), job(3.0, "a=1", "seed=1"), job(2.0, "a=1", "seed=2")]
    missing = [Job(("a=1", "seed=2"), None, "failed", "x"), Job(("a=1", "seed=3"), None, "failed", "y")]
    (row,) = tabulate([*jobs, *missing]).to_dict("records")
    assert (row["seeds"], row["mean"]) == ("3 of 4", 2.0)


def test_summary_says_that_the_jobs_of_slurm_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = tmp_path / "sweeps" / "one"
    failed = write_job(sweep, "a=1", error="why")
    summarise(sweep, jobs_outlive_command=True)
    assert "\n\nRun the same command again to continue with these: `" in capsys.readouterr().out
    write_job(sweep, "a=2")
    summarise(sweep, jobs_outlive_command=True)
    assert "SLURM" not in capsys.readouterr().out, "nothing was submitted"
    submitit = tmp_path / "sweeps" / ".submitit"
    (submitit / "1_0").mkdir(parents=True)
    (submitit / "0123abcd.pkl").touch()
    summarise(sweep, jobs_outlive_command=True)
    assert "SLURM" not in capsys.readouterr().out, "sbatch refused it"
    (submitit / "1_0" / "1_0_submitted.pkl").touch()
    summarise(sweep, jobs_outlive_command=True, earlier_jobs=submitted_jobs(sweep))
    assert "SLURM" not in capsys.readouterr().out, "it is of another sweep"
    for who in ("those jobs that have not failed", "these jobs"):
        summarise(sweep, jobs_outlive_command=True)
        text = capsys.readouterr().out
        assert (
            f"\n\nSLURM still runs or queues {who} unless you cancelled them. When squeue shows none of them, run "
            in text
        )
        assert "Run the same command again" not in text
        failed.unlink(missing_ok=True)
    summarise(sweep)
    assert "SLURM still runs" not in capsys.readouterr().out


def test_summary_that_cannot_be_written_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = tmp_path / "sweeps" / "one"
    write_job(sweep, "a=1", error="why")
    (sweep / "summary.md").mkdir()
    with pytest.raises(MamlError, match=r"summary\.md could not be written"):
        summarise(sweep)
    printed = capsys.readouterr().out
    assert "- a=1: why" in printed
    assert "written to" not in printed


def test_summary_of_200_jobs_takes_less_than_three_seconds(tmp_path: Path) -> None:
    sweep = tmp_path / "sweeps" / "many"
    values = np.random.default_rng(0).normal(size=600).tolist()
    for number in range(200):
        write_report(tmp_path, f"run{number}", values)
        write_job(sweep, "+experiment=a", f"x={number // 5}", f"seed={number % 5}", run_id=f"run{number}")
    before = time.process_time()
    summarise(sweep)
    assert time.process_time() - before < 3
    assert len(pd.read_csv(sweep / "summary.csv")) == 40
