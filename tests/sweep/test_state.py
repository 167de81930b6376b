"""The state of a sweep, read from its files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from maml.errors import MamlError
from maml.record.heartbeat import DEAD_AFTER
from maml.sweep.state import SWEEP, Job, SweepReader, find_sweep, find_sweeps, job_rows, summary_line, sweep_rows
from tests.paper.fake_runs import edit, make_run
from tests.sweep.fake_sweep import job, write_beat, write_job, write_report


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / "sweeps" / "0123456789ab"
    (folder / "jobs").mkdir(parents=True)
    return folder


def only(sweep: Path) -> Job:
    (job,) = SweepReader(sweep).jobs()
    return job


def test_planned_job_has_not_started(sweep: Path) -> None:
    (sweep / SWEEP).write_text(json.dumps({"planned": [["a=1"], ["a=2"]], "num_jobs": 2}))
    write_job(sweep, "a=1", error="ValueError: why")
    states = {job.settings["a"]: (job.state, job.problem) for job in SweepReader(sweep).jobs()}
    assert states == {"1": ("failed", "ValueError: why"), "2": ("not started", "not started")}


def test_job_of_an_earlier_start_waits(sweep: Path) -> None:
    (sweep / SWEEP).write_text(json.dumps({"planned": [["a=1"], ["a=2"], ["a=3"]], "num_jobs": 3, "started": 7.5}))
    for number, (started, error) in enumerate([(7.5, None), (2.0, None), (2.0, "why")], start=1):
        write_report(sweep.parents[1], f"run{number}", [1.0])
        path = write_job(sweep, f"a={number}", run_id=f"run{number}", error=error)
        path.write_text(json.dumps(json.loads(path.read_text()) | {"started": started}))
    jobs = SweepReader(sweep).jobs()
    assert [job.state for job in jobs] == ["finished", "not started", "not started"], "settings may have changed since"
    assert summary_line(jobs) == "1 of 3 finished"


def test_finished_job_has_its_report(sweep: Path) -> None:
    write_report(sweep.parents[1], "run", [1.0, 3.0])
    write_job(sweep, "a=1", run_id="run", seconds=5.0)
    job = only(sweep)
    assert (job.state, job.headline[0], job.seconds, job.problem) == ("finished", 2.0, 5.0, "")


def test_headline_is_that_of_its_own_k() -> None:
    found = job(2.0)
    assert found.report
    (curve,) = found.report.curves
    found.report.curves = [curve.model_copy(update={"num_shots": 1, "steps": curve.steps[:1]}), curve]
    assert (found.headline, found.headline_label) == ((2.0, 0.5), "mse (K=5, step 1, n=2)")


def test_headline_of_curves_that_end_alike_is_that_of_the_recorded_k() -> None:
    for mean in (None, 1.0):
        finished = job(mean)
        assert finished.report
        (curve,) = finished.report.curves
        finished.report.curves = [curve, curve.model_copy(update={"num_shots": 10})]
        for num_shots in (5, 10):
            finished.report.headline_num_shots = num_shots
            assert finished.headline_label == f"mse (K={num_shots}, step 1, n=2)"


def test_evaluation_of_an_unfinished_training_is_finished(sweep: Path) -> None:
    write_report(sweep.parents[1], "run", [1.0, 3.0])
    edit(sweep.parents[1] / "sinusoid" / "run" / "report.json", iteration=5)
    record = write_job(sweep, "mode=eval", run_id="run")
    for mode, state in (("train", "failed"), ("eval", "finished")):
        edit(record, mode=mode)
        assert only(sweep).state == state


def test_report_with_other_settings_does_not_count(sweep: Path) -> None:
    write_report(sweep.parents[1], "run", [1.0])
    path = write_job(sweep, "a=1", run_id="run")
    record = json.loads(path.read_text())
    record["runs"][0]["evaluation"] = {"evaluation.num_tasks": 3}
    path.write_text(json.dumps(record))
    assert only(sweep).report is None


def test_running_job_says_how_far_it_is(sweep: Path) -> None:
    record = write_job(sweep, "a=1", run_id="run")
    write_beat(record, iteration=3, speed=2.0)
    job = only(sweep)
    assert (job.state, job.iteration, job.time_left) == ("running", 3, 3.0)
    assert job.problem.startswith("running, at iteration 3 of 9, on ")


def test_job_whose_process_is_gone_was_killed(sweep: Path) -> None:
    child = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    write_beat(write_job(sweep, "a=1", run_id="run"), pid=int(child.stdout), iteration=3)
    job = only(sweep)
    assert job.state == "stopped"
    assert job.problem.startswith("killed: ")
    assert job.problem.endswith("at iteration 3")


def test_job_that_was_interrupted_is_not_called_killed(sweep: Path) -> None:
    made = make_run(sweep.parents[1], done=500, evaluated=False, status="interrupted")
    record = write_job(sweep, "a=1", run_id=made.name)
    content = json.loads(record.read_text())
    content["runs"][0]["folder"] = str(made.relative_to(sweep.parents[1]))
    record.write_text(json.dumps(content))
    write_beat(record, age=DEAD_AFTER + 1, host="elsewhere", iteration=500)
    job = only(sweep)
    assert (job.state, job.problem) == ("stopped", "interrupted at iteration 500")
    write_beat(record)
    assert only(sweep).state == "running", "it was resumed, and its record does not say so yet"


def test_silent_job_of_another_machine_looks_dead(sweep: Path) -> None:
    record = write_job(sweep, "a=1", run_id="run")
    write_beat(record, age=DEAD_AFTER + 9, host="another", iteration=3)
    job = only(sweep)
    assert job.state == "stopped"
    assert "looks dead: no heartbeat from another for 69 s" in job.problem


def test_seeds_side_by_side_are_jobs_of_their_own(sweep: Path) -> None:
    path = write_job(sweep, "a=1", run_id="first")
    record = json.loads(path.read_text())
    record["runs"].append(record["runs"][0] | {"seed": 1, "run_id": "second", "folder": "sinusoid/second"})
    path.write_text(json.dumps(record))
    write_report(sweep.parents[1], "second", [1.0])
    reader = SweepReader(sweep)
    states = [(job.settings["seed"], job.state) for job in reader.jobs()]
    assert states == [("0", "not started"), ("1", "finished")]
    write_report(sweep.parents[1], "first", [1.0])
    assert [job.state for job in reader.jobs()] == ["finished"] * 2, "it is read again until all seeds are finished"


def test_seed_with_its_report_is_finished_although_another_failed(sweep: Path) -> None:
    path = write_job(sweep, "a=1", run_id="first", error="why")
    record = json.loads(path.read_text())
    record["runs"].append(record["runs"][0] | {"seed": 1, "run_id": "second", "folder": "sinusoid/second"})
    path.write_text(json.dumps(record))
    write_report(sweep.parents[1], "second", [1.0, 3.0])
    failed, finished = SweepReader(sweep).jobs()
    assert (failed.state, failed.problem, failed.report) == ("failed", "why", None)
    assert (finished.state, finished.problem, finished.headline[0]) == ("finished", "", 2.0)
    write_report(sweep.parents[1], "first", [1.0])
    states = [(job.state, job.problem, job.report) for job in SweepReader(sweep).jobs()]
    assert states == [("failed", "why", None)] * 2, "the error is of neither seed's training"


def test_finished_job_is_read_once(sweep: Path) -> None:
    write_report(sweep.parents[1], "run", [1.0])
    path = write_job(sweep, "a=1", run_id="run")
    reader = SweepReader(sweep)
    (before,) = reader.jobs()
    path.write_text("not JSON")
    assert reader.jobs() == [before]


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"overrides": 1}'])
def test_damaged_record_is_named(sweep: Path, content: str) -> None:
    write_job(sweep, "a=1").write_text(content)
    with pytest.raises(MamlError, match=r"jobs/\w+\.json is damaged"):
        SweepReader(sweep).jobs()


def test_line_about_all_jobs_counts_and_estimates() -> None:
    def running(iteration: int, speed: float | None) -> Job:
        return Job(("a",), None, state="running", iteration=iteration, num_iterations=100, speed=speed)

    finished = replace(job(1.0, "a"), seconds=100.0)
    waiting, failed = Job(("a",), None), Job(("a",), None, state="failed")
    assert summary_line([finished, waiting], 4) == "1 of at most 4 finished", "equal trials are one job"
    # 50 s for each of the two that run, and 100 s for the two that wait, two at once.
    jobs = [finished, running(50, 1.0), running(50, 1.0), waiting, waiting, failed]
    assert summary_line(jobs) == "1 of 6 finished, 2 running, 1 failed, ETA 0:02:30"
    assert summary_line([running(0, None), waiting]) == "0 of 2 finished, 1 running", "nothing is known"
    assert summary_line([finished, running(0, None)]) == "1 of 2 finished, 1 running, ETA 0:01:40"


def test_time_left_is_never_too_long_to_be_shown() -> None:
    endless = Job(("a",), None, state="running", iteration=1, num_iterations=2**63 - 1, speed=0.1)
    assert summary_line([endless]) == "0 of 1 finished, 1 running, ETA 999999999 days, 23:59:59"
    assert job_rows([endless])[0]["ETA"] == "999999999 days, 23:59:59"


def test_sweep_is_found_by_the_beginning_of_its_id(sweep: Path) -> None:
    runs_dir = sweep.parents[1]
    assert find_sweep("0123", runs_dir) == sweep
    (sweep.parent / "0199" / "jobs").mkdir(parents=True)
    with pytest.raises(MamlError, match="01 matches 2 sweeps"):
        find_sweep("01", runs_dir)
    with pytest.raises(MamlError, match="there is no sweep 7"):
        find_sweep("7", runs_dir)


def test_sweeps_are_listed_the_newest_last(sweep: Path) -> None:
    older = sweep.parent / "older"
    (older / "jobs").mkdir(parents=True)
    os.utime(older / "jobs", (0, 0))
    (sweep / SWEEP).write_text(json.dumps({"started": 0.0, "num_jobs": 3, "planned": None, "command": "train.py -m"}))
    first, second = sweep_rows(find_sweeps(sweep.parents[1]))
    assert (first["sweep"], first["state"]) == ("older", "0 of 0 finished")
    assert (second["sweep"], second["state"], second["command"]) == (
        sweep.name,
        "0 of at most 3 finished",
        "train.py -m",
    )


def test_rows_show_settings_that_differ_and_why_a_job_has_no_report(sweep: Path) -> None:
    write_beat(write_job(sweep, "a=1", "b=0", run_id="run"), iteration=3, speed=2.0)
    write_job(sweep, "a=2", "b=0", error="the config\n  is not valid")
    running, failed = job_rows(SweepReader(sweep).jobs())
    assert list(running)[:2] == ["a", "state"]
    assert [running[name] for name in ("iteration", "it/s", "ETA", "why")] == ["3 of 9", "2", "0:00:03", ""]
    assert (failed["state"], failed["why"]) == ("failed", "the config is not valid")


def test_damaged_sweep_does_not_hide_others_and_its_jobs_are_kept(sweep: Path) -> None:
    record = write_job(sweep, "a=1", run_id="0a")
    write_report(sweep.parents[1], "0a", [1.0, 2.0])
    edit(record, started=5.0)
    other = sweep.with_name("other")
    write_job(other, "a=1")
    (sweep / SWEEP).write_text("{")
    states = {row["sweep"]: row["state"] for row in sweep_rows(find_sweeps(sweep.parents[1]))}
    assert states["other"].startswith("0 of 1 finished")
    assert states[sweep.name].startswith(f"damaged: {sweep / SWEEP} is damaged")
    (sweep / SWEEP).write_text('{"planned": 5}')
    assert [row["state"].partition(":")[0] for row in sweep_rows([sweep])] == ["damaged"]
    (sweep / SWEEP).unlink()  # as the message advises
    assert [job.state for job in SweepReader(sweep).jobs()] == ["finished"]
