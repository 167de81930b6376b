"""`make paper` on tiny experiments: interrupted, killed, with jobs that fail or cannot run, and as a smoke test."""

from __future__ import annotations

import importlib.util
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from omegaconf import OmegaConf

from maml.config.compose import compose
from maml.experiment import run_experiment
from maml.paper.plan import WATERMARK
from maml.record.atomic import is_temporary
from maml.record.run_files import read_json
from tests.kills import every_point, script_killed, start_process
from tests.runs import assert_same_run, file_contents

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "paper.py"
SPEC = importlib.util.spec_from_file_location("paper_script", SCRIPT)
assert SPEC and SPEC.loader
paper = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(paper)
RENDERERS: dict[str, str] = paper.RENDERERS

TINY = ["meta_batch_size=2", "evaluation.num_tasks=3", "log_every=3", "checkpoint_every=7", "hardware=cpu"]
TINY += ["hardware.num_threads=1"]
LONG, SHORT = [*TINY, "num_iterations=800"], [*TINY, "num_iterations=20"]

Results = Callable[..., Path]


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Results:
    """Makes a results folder with one table; each row has an experiment and overrides. Nothing is rendered."""
    monkeypatch.setattr(paper, "RENDERERS", {})

    def make(**rows: tuple[str, list[str]]) -> Path:
        folder = tmp_path / "results"
        (folder / "paper").mkdir(parents=True)
        lines = [f"table_x,{row},one,1.0,,\n" for row in rows]
        (folder / "paper" / "table_x.csv").write_text("".join(["table,method,setting,value,ci,notes\n", *lines]))
        table = {
            "title": "Table X",
            "layout": {"corner": "", "columns": {"one": ["1"]}, "groups": [{row: row for row in rows}]},
            "defaults": {"metric": "mse", "num_shots": 5, "step": 1},
            "columns": {"one": {}},
            "runs": [{"row": row, "experiment": name, "overrides": words} for row, (name, words) in rows.items()],
        }
        entries = {"tables": {"table_x": table}, "figures": {}, "pictures": {}}
        OmegaConf.save(OmegaConf.create(entries), folder / "cells.yaml")
        return folder

    return make


def arguments(results: Path, *more: str) -> list[str]:
    return ["--results", str(results), "--runs-dir", str(results.with_name("runs")), *more]


def start(results: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(SCRIPT), *arguments(results, *more)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_metrics(results: Path, count: int, process: subprocess.Popen[str]) -> None:
    """Waits until ``count`` runs have logged metrics."""
    deadline = time.monotonic() + 120
    while len([path for path in results.with_name("runs").glob("*/*/metrics.jsonl") if path.stat().st_size]) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def reference(tmp_path: Path, experiment: str, overrides: list[str]) -> Path:
    """Runs an experiment without interruption and returns its folder."""
    config, _ = compose([f"+experiment={experiment}", *overrides])
    run_experiment(replace(config, runs_dir=str(tmp_path / "undisturbed")), experiment)
    (folder,) = (tmp_path / "undisturbed" / experiment).iterdir()
    return folder


def test_stopped_jobs_save_and_go_on(results: Results, capsys: pytest.CaptureFixture[str]) -> None:
    folder = results(MAML=("sinusoid_10shot", LONG))
    process = start(folder)
    wait_for_metrics(folder, 1, process)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (130, "")
    assert "stopped by SIGINT after iteration " in stdout
    last = stdout.splitlines()[-1]
    assert "stopped by SIGINT; all progress is saved" in last and "continue: python scripts/paper.py --results" in last
    (record_path,) = folder.with_name("runs").glob("*/*/run.json")
    record = read_json(record_path)
    assert record and record["status"] == "interrupted"
    assert paper.main(arguments(folder, "--plan")) == 0
    assert f"continue from {record['iteration']}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("now", "said"),
    [
        (85.0, "stopped by SIGTERM after iteration "),
        pytest.param(101.0, "killed sinusoid_10shot", marks=pytest.mark.slow),
    ],
)
def test_budget_ends_in_time_and_nothing_is_rendered(
    now: float,
    said: str,
    results: Results,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    endless = [*TINY, "num_iterations=100000000"]
    folder = results(short=("sinusoid_pretrain", SHORT), MAML=("sinusoid_10shot", endless))

    def monotonic() -> float:
        """Stands still until one run has finished and the other has begun, whatever the load of this machine."""
        has_finished = any(tmp_path.glob("runs/sinusoid_pretrain/*/report.png"))
        return now if has_finished and any(tmp_path.glob("runs/sinusoid_10shot/*/checkpoint.pt")) else 0.0

    monkeypatch.setattr(paper, "time", SimpleNamespace(monotonic=monotonic, sleep=time.sleep))
    monkeypatch.setattr(paper, "render", lambda *_: pytest.fail("rendered"))
    assert paper.main(arguments(folder, "--budget", "100s", "--jobs", "2")) == 0
    out = capsys.readouterr().out
    assert said in out
    assert "the budget is used up. Run the same command again to continue: " in out
    (path,) = tmp_path.glob("runs/sinusoid_10shot/*/run.json")
    record = read_json(path)
    assert record and record["status"] == ("interrupted" if now < 100 else "running")


def test_budget_that_suffices_is_not_used_up(
    results: Results, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = results(short=("sinusoid_pretrain", SHORT))
    monkeypatch.setattr(paper, "render", lambda *_: print("rendered") or True)
    assert paper.main(arguments(folder, "--budget", "1h")) == 0
    out = capsys.readouterr().out
    assert "rendered" in out and "used up" not in out


@pytest.mark.parametrize("text", ["8", "m", "", "20s", "-8m", "8 m", "1.5h"])
def test_wrong_budget_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        paper.main([f"--budget={text}"])
    assert "give a time of at least 30 s, as in 90s, 8m or 1h30m" in capsys.readouterr().err


def test_killed_at_any_point_loses_nothing_and_repeats_nothing(
    results: Results, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = results(MAML=("sinusoid_10shot", LONG), pretrain=("sinusoid_pretrain", LONG))
    process = start(folder, "--jobs", "2")
    wait_for_metrics(folder, 2, process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    process.communicate()
    os.kill(int(children[0]), signal.SIGKILL)  # the other child keeps running

    assert paper.main(arguments(folder)) == 0
    first = capsys.readouterr().out
    assert "2 jobs: " in first and first.count("finished ") == 2
    for experiment in ("sinusoid_10shot", "sinusoid_pretrain"):
        (run,) = (path.parent for path in (tmp_path / "runs" / experiment).glob("*/run.json"))
        assert_same_run(run, reference(tmp_path, experiment, LONG))
    (killed,) = (tmp_path / "runs" / "sinusoid_10shot").glob("*/run.json")
    record = read_json(killed)
    assert record and len(record["segments"]) == 2, "it went on from its checkpoint"

    before = file_contents(tmp_path / "runs")
    assert paper.main(arguments(folder)) == 0
    assert "2 jobs: 2 done" in capsys.readouterr().out
    assert file_contents(tmp_path / "runs") == before


def test_job_that_fails_or_lacks_data_leaves_the_rest_alone(
    results: Results, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("maml.domain.mini_imagenet.check_provided", lambda *_: None)  # train.py finds out
    photos = ["data_dir=/nowhere", "cache_dir=/nowhere", "meta_batch_size=1"]
    folder = results(
        bad=("sinusoid_10shot", [*SHORT, "inner.step_size=1e6", "inner.num_steps=5"]),
        photos=("mini_imagenet_5way_1shot", photos),
        MAML=("sinusoid_10shot", SHORT),
    )
    assert paper.main(arguments(folder, "--jobs", "1")) == 1
    out, err = capsys.readouterr()
    assert out.count("finished sinusoid_10shot") == 1
    assert "FAILED sinusoid_10shot" in err and "python train.py +experiment=sinusoid_10shot" in err
    assert "training has diverged" in err and "log: " in err
    assert "mini_imagenet" not in err
    assert "cannot run here: mini_imagenet_5way_1shot data_dir=/nowhere" in out
    assert "mini-ImageNet not found in data_dir=/nowhere" in out


def test_jobs_are_stopped_and_saved_if_the_script_fails(results: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = results(MAML=("sinusoid_10shot", LONG))
    jobs: list[subprocess.Popen[bytes]] = []

    def fail(display: object, workers: Sequence[Any]) -> None:
        jobs[:] = [worker.process for worker in workers]
        if any(path.stat().st_size for path in folder.with_name("runs").glob("*/*/metrics.jsonl")):
            raise OSError("the terminal is gone")

    monkeypatch.setattr(paper._StatusDisplay, "show", fail)
    with pytest.raises(OSError, match="the terminal is gone"):
        paper.main(arguments(folder))
    (job,) = jobs
    job.wait(timeout=60)
    (record_path,) = folder.with_name("runs").glob("*/*/run.json")
    record = read_json(record_path)
    assert record and record["status"] == "interrupted"


def test_unfinished_committed_run_goes_on_in_runs(
    results: Results, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = results(MAML=("sinusoid_10shot", SHORT))
    run = reference(tmp_path, "sinusoid_10shot", SHORT)
    whole = tmp_path / "whole"
    shutil.copytree(run, whole)
    (run / "report.json").unlink()  # trained, but not evaluated
    committed = folder / "runs" / "sinusoid_10shot" / run.name
    shutil.copytree(run, committed)
    before = file_contents(committed)
    assert paper.main(arguments(folder)) == 0
    assert f"resumes from {committed}, copied to {tmp_path / 'runs'}" in capsys.readouterr().out
    assert file_contents(committed) == before
    assert_same_run(tmp_path / "runs" / "sinusoid_10shot" / run.name, whole)


def test_second_of_two_at_once_is_refused(
    results: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = results(MAML=("sinusoid_10shot", SHORT))
    with (
        paper._exclusive_lock(tmp_path / "runs"),
        pytest.raises(paper.MamlError, match=r"another `make paper` \(process .*\) is running"),
    ):
        paper.main(arguments(folder))
    capsys.readouterr()


def test_smoke_test_is_watermarked_and_apart(
    results: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(paper, "RENDERERS", {"paper_tables.py": ""})
    folder = results(MAML=("sinusoid_10shot", TINY), oracle=("sinusoid_oracle", TINY))
    before = file_contents(folder)
    assert paper.main(arguments(folder, "--smoke", "--only", "table_x/MAML")) == 0
    assert WATERMARK in capsys.readouterr().out
    assert file_contents(folder) == before
    assert not (tmp_path / "runs").exists()
    smoke = tmp_path / "runs_smoke"
    assert len(list(smoke.glob("*/*/report.json"))) == 1
    for name in ("tables.md", "table_x/table_x.md"):
        assert (smoke / "results" / name).read_text().startswith(f"**{WATERMARK}**")
    assert f"# {WATERMARK}. Table X" in (smoke / "results" / "table_x" / "table_x.md").read_text()


def test_smoke_test_that_would_be_the_real_thing_is_refused(
    results: Results, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = [*TINY, "num_iterations=3", "domain.num_shots=2"]
    with pytest.raises(paper.MamlError, match=r"a smoke test of sinusoid_10shot .* would have the settings of"):
        paper.main(arguments(results(MAML=("sinusoid_10shot", tiny)), "--smoke"))
    capsys.readouterr()


def copy_notes(results: Path) -> None:
    """Copies what the report also reads."""
    for name in ("notes.md", "departures.yaml"):
        shutil.copy(ROOT / "results" / name, results)


def rendered(folder: Path) -> dict[str, bytes]:
    """Returns all that is in a folder of results, but the inputs that a smoke test copies."""
    return {
        name: content
        for name, content in file_contents(folder).items()
        if not name.startswith(("paper/", "runs/")) and name not in ("cells.yaml", "notes.md", "departures.yaml")
    }


@pytest.mark.slow
def test_smoke_test_killed_at_random_even_while_it_renders_is_finished_by_the_same_command(
    results: Results, tmp_path: Path
) -> None:
    folder = results(MAML=("sinusoid_10shot", TINY), pretrain=("sinusoid_pretrain", TINY))
    copy_notes(folder)
    smoke = tmp_path / "runs_smoke"
    begin = time.monotonic()
    process = start(folder, "--smoke")
    assert process.communicate()[1] == "" and process.returncode == 0
    seconds = time.monotonic() - begin
    whole, runs = rendered(smoke / "results"), {path.parent.name: path.parent for path in smoke.glob("*/*/run.json")}
    assert len(runs) == 2
    kept = tmp_path / "whole"
    killed = while_rendering = 0
    smoke.rename(kept)
    while killed < 12:
        shutil.rmtree(smoke, ignore_errors=True)
        for _ in range(3):
            process = start(folder, "--smoke")
            time.sleep(random.uniform(0.1, 1) * seconds * random.choice((0.3, 1)))  # training is short
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            is_rendering = all((smoke / path.relative_to(smoke) / "report.png").exists() for path in runs.values())
            process.kill()
            for child in children if random.random() < 0.5 else ():  # else they go on alone
                with suppress(ProcessLookupError):
                    os.kill(int(child), signal.SIGKILL)
            process.communicate()
            killed += process.returncode == -signal.SIGKILL
            while_rendering += process.returncode == -signal.SIGKILL and is_rendering
        process = start(folder, "--smoke")
        assert process.communicate()[1] == "" and process.returncode == 0
        for path in runs.values():
            assert_same_run(path, kept / path.relative_to(smoke))
            record = read_json(path / "run.json")
            assert record and record["status"] == "finished"
        assert rendered(smoke / "results").keys() == whole.keys()
        for name, content in rendered(smoke / "results").items():
            if not name.endswith((".html", ".png", ".pdf")):  # these show times
                assert content == whole[name], name
    print(f"killed {killed} times, {while_rendering} times while rendering")


@pytest.mark.slow
@pytest.mark.parametrize(("script", "out"), list(RENDERERS.items()))
def test_renderer_killed_at_any_point_leaves_whole_files(
    script: str, out: str, results: Results, tmp_path: Path
) -> None:
    folder = results(MAML=("sinusoid_10shot", SHORT), pretrain=("sinusoid_pretrain", SHORT))
    copy_notes(folder)
    for experiment in ("sinusoid_10shot", "sinusoid_pretrain"):
        reference(tmp_path, experiment, SHORT)
    target = tmp_path / "rendered"
    roots = ["--runs-dir", str(tmp_path / "undisturbed"), "--results", str(folder), "--out", str(target / out)]

    def render(at: int = 0) -> int | None:
        process = start_process(script_killed, script, roots, at)
        process.join(120)
        return process.exitcode

    def kill(at: int) -> int | None:
        for name in whole:
            (target / name).write_bytes(b"old")
        return render(at)

    def check() -> None:
        for path in target.rglob("*"):
            if path.is_file() and not is_temporary(path):
                assert path.read_bytes() in (b"old", whole[str(path.relative_to(target))]), path
        assert render() == 0
        for path in target.rglob("*"):
            if is_temporary(path):
                path.unlink()
        assert file_contents(target) == whole

    target.mkdir()
    assert render() == 0
    whole = file_contents(target)
    print(f"killed at {every_point(kill, check)} points")
