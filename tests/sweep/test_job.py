"""The job of a sweep in its own process, on a machine that shares the sweep's disk or does not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from maml.config.paths import CONF
from maml.errors import MamlError
from maml.experiment import run_experiment
from maml.record import checkpoint, heartbeat
from maml.sweep import job
from maml.sweep.job import RunningJob
from maml.sweep.ray_sweep import Disk
from maml.sweep.state import SweepReader
from tests.runs import TinyRuns, assert_same_run, before_iteration


def config(tiny: TinyRuns, *overrides: str) -> DictConfig:
    """Composes a job's config as a launcher does."""
    words = [*tiny.base, f"cache_dir={tiny.cache_dir}", f"runs_dir={tiny.runs_dir}", *overrides]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", words, return_hydra_config=True)
    cfg.hydra.runtime.cwd = str(tiny.runs_dir.parent)
    return cfg


class FarDisk(Disk):
    """The disk of the machine that started the sweep; it keeps what was written, in order."""

    def __init__(self, runs_dir: Path) -> None:
        super().__init__(runs_dir)
        self.written: list[str] = []

    def write(self, files: Mapping[str, bytes | None]) -> None:
        self.written += files
        super().write(files)


def test_job_records_its_runs_and_leaves_no_heartbeat(tiny: TinyRuns) -> None:
    sweep = tiny.runs_dir / "sweeps" / "one"
    running = RunningJob(sweep, config(tiny, "seeds=2", "launcher=joblib"))
    states = [(each.state, each.settings["seed"]) for each in SweepReader(sweep).jobs()]
    assert states == [("running", "0"), ("running", "1")]
    tiny.run("seeds=2")
    running.end(None)
    (record,) = (sweep / "jobs").iterdir()
    content = json.loads(record.read_text())
    assert not [override for override in content["overrides"] if override.startswith("launcher=")]
    assert [run["folder"] for run in content["runs"]] == [f"custom/{tiny.folder(f'seed={n}').name}" for n in (0, 1)]
    assert content["seconds"] > 0
    assert [each.state for each in SweepReader(sweep).jobs()] == ["finished", "finished"]

    RunningJob(sweep, config(tiny, "seeds=2")).end(None)
    assert json.loads(record.read_text())["seconds"] is None, "nothing was done: the time says nothing about others"


def test_time_of_a_resumed_job_is_not_that_of_a_whole_one(tiny: TinyRuns, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> None:
        raise OSError("the disk is gone")

    with monkeypatch.context() as patch:
        before_iteration(patch, 50, fail)
        with pytest.raises(OSError, match="gone"):
            tiny.run()
    sweep = tiny.runs_dir / "sweeps" / "one"
    running = RunningJob(sweep, config(tiny))
    tiny.run()
    running.end(None)
    (found,) = SweepReader(sweep).jobs()
    assert (found.state, found.seconds) == ("finished", None)


def test_run_that_another_experiment_has_made_meanwhile_is_found(tiny: TinyRuns) -> None:
    sweep = tiny.runs_dir / "sweeps" / "one"
    running = RunningJob(sweep, config(tiny))  # it waits for a GPU
    run_experiment(tiny.config(), "another")
    run_experiment(tiny.config(), "custom")
    running.end(None)
    (found,) = SweepReader(sweep).jobs()
    assert found.state == "finished"
    assert found.folder and found.folder.parent.name == "another"


def test_job_with_a_runs_dir_of_its_own_is_found_there(tiny: TinyRuns) -> None:
    other, sweep = tiny.in_folder("other"), tiny.runs_dir / "sweeps" / "one"
    running = RunningJob(sweep, config(tiny, f"runs_dir={other.runs_dir}"))
    folder = other.run()
    running.end(None)
    (found,) = SweepReader(sweep).jobs()
    assert (found.state, found.folder) == ("finished", folder)


def test_failed_job_keeps_its_error_and_output(tiny: TinyRuns) -> None:
    sweep = tiny.runs_dir / "sweeps" / "one"
    running = RunningJob(sweep, config(tiny, "inner.step_size=-1"), to_file=True)
    print("what the job prints")
    running.end("why")
    (found,) = SweepReader(sweep).jobs()
    assert (found.state, found.problem) == ("failed", "why")
    assert (sweep / "jobs" / f"{running.name}.log").read_text() == "what the job prints\n"


def test_job_with_a_damaged_report_is_failed_with_its_reason(tiny: TinyRuns) -> None:
    report = tiny.run() / "report.json"
    report.write_text(report.read_text()[:100])
    sweep = tiny.runs_dir / "sweeps" / "one"
    running = RunningJob(sweep, config(tiny))
    with pytest.raises(MamlError) as error:
        tiny.run()
    running.end(str(error.value))
    (found,) = SweepReader(sweep).jobs()
    assert found.state == "failed"
    assert found.problem.startswith(f"{report} is damaged")


def test_evaluation_of_a_checkpoint_file_is_found(tiny: TinyRuns) -> None:
    file = tiny.run() / "checkpoint.pt"
    sweep, overrides = tiny.runs_dir / "sweeps" / "one", ("mode=eval", f"checkpoint={file}", "evaluation.num_tasks=3")
    running = RunningJob(sweep, config(tiny, *overrides))
    tiny.run(*overrides)
    running.end(None)
    (found,) = SweepReader(sweep).jobs()
    assert found.state == "finished"
    assert found.folder and found.folder.parent == file.parent / "evaluations"


def test_run_folder_of_another_disk_comes_back(tiny: TinyRuns) -> None:
    near, far = tiny.in_folder("near"), FarDisk(tiny.runs_dir)
    running = RunningJob(near.runs_dir / "sweeps" / "one", config(near), to_file=True, post=far)
    near.run()
    running.end(None)
    (found,) = SweepReader(tiny.runs_dir / "sweeps" / "one").jobs()
    assert found.state == "finished"
    for name in ("report.json", "tasks.csv", "metrics.jsonl", "run.json", "config.yaml"):
        assert (tiny.folder() / name).read_bytes() == (near.folder() / name).read_bytes()
    assert not list(tiny.folder().glob("*.pt")), "checkpoints come back only on request"
    assert "already" not in (tiny.runs_dir / "sweeps" / "one" / "jobs" / f"{running.name}.log").read_text()
    assert not list(tiny.runs_dir.rglob("*.heartbeat"))
    names = [Path(name).name for name in far.written]
    assert names.index("report.json") > names.index("tasks.csv"), "a run is finished when all is there"

    # The same job on a third machine finds that it is finished.
    third = tiny.in_folder("third")
    again = RunningJob(third.runs_dir / "sweeps" / "one", config(third), to_file=True, post=far)
    run_experiment(third.config(), "custom")
    again.end(None)
    assert "already finished" in (tiny.runs_dir / "sweeps" / "one" / "jobs" / f"{again.name}.log").read_text()


def test_heartbeat_sends_no_file_again_that_has_not_changed(tiny: TinyRuns, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "Heartbeat", lambda send: heartbeat.Heartbeat(send, seconds=1000.0))
    near, far = tiny.in_folder("near"), FarDisk(tiny.runs_dir)
    running = RunningJob(near.runs_dir / "sweeps" / "one", config(near), post=far)
    near.run()
    written = []
    for _ in range(2):
        far.written.clear()
        running._beat({"time": 0.0, "host": "near", "pid": 1})
        written.append({Path(name).name for name in far.written})
    running.end(None)
    first, second = written
    assert "report.json" in first
    assert second == {f"{running.name}.heartbeat"}


def test_run_folder_that_this_machine_has_is_not_replaced(tiny: TinyRuns) -> None:
    near, far = tiny.in_folder("near"), FarDisk(tiny.runs_dir)
    for folder, content in ((near.folder(), "further"), (tiny.folder(), "sent a while ago")):
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text(content)
    RunningJob(near.runs_dir / "sweeps" / "one", config(near), post=far).stop()
    assert (near.folder() / "metrics.jsonl").read_text() == "further"


def test_killed_job_goes_on_on_another_machine(tiny: TinyRuns, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "Heartbeat", lambda send: heartbeat.Heartbeat(send, seconds=1000.0))
    undisturbed = tiny.in_folder("undisturbed").run()
    near, far = tiny.in_folder("near"), FarDisk(tiny.runs_dir)
    running = RunningJob(near.runs_dir / "sweeps" / "one", config(near), post=far, with_checkpoints=True)

    def die(_: object) -> None:
        running._beat({"time": 0.0, "host": "near", "pid": 1})  # the last one
        raise OSError("the machine is gone")

    with monkeypatch.context() as patch:
        before_iteration(patch, 50, die)
        with pytest.raises(OSError, match="gone"):
            near.run()
    running._heartbeat.stop()
    names = [Path(name).name for name in far.written]
    assert names.index("checkpoint.pt") < names.index("metrics.jsonl"), "read later, it has all lines before it"

    third = tiny.in_folder("third")
    again = RunningJob(third.runs_dir / "sweeps" / "one", config(third), post=far, with_checkpoints=True)
    start = checkpoint.load(third.folder() / "checkpoint.pt")["iteration"]
    assert start == 49
    third.run()
    again.end(None)
    assert_same_run(third.folder(), undisturbed)
    assert_same_run(tiny.folder(), undisturbed)
