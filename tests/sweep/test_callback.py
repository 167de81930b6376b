"""Sweeps: with every launcher, interrupted, with failing jobs, and their summaries."""

from __future__ import annotations

import csv
import importlib.metadata
import json
import math
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

from maml.config.compose import compose
from maml.config.hints import explain_override_error
from maml.config.identity import digest, training_config
from maml.errors import Interrupted
from maml.experiment import run_experiment
from maml.record.run_folder import read_json
from maml.sweep.callback import Job, read_jobs, tabulate
from tests.runs import ROOT, TinyRuns

CONF = ROOT / "conf"
OPTIONS = [f"{path.parent.name}={path.stem}" for group in ("launcher", "sweeper") for path in CONF.glob(f"{group}/*")]


def skip_without_plugin(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    explain_override_error([option])
    reason = capsys.readouterr().err
    if "not installed" in reason:
        pytest.skip(reason)


def sweep_folder(runs_dir: Path) -> Path:
    """Returns the folder of the only sweep."""
    (folder,) = (path.parent for path in runs_dir.glob("sweeps/*/jobs"))
    return folder


def job(mean: float | None, *overrides: str, metric: str = "mse") -> Job:
    last = {"mean": mean, "ci95": None if mean is None else 0.5}
    curve = {"metric": metric, "steps": [{"mean": 9.0, "ci95": 1.0}, last]}
    return Job(
        overrides,
        {"headline_metric": metric, "headline": mean, "larger_is_better": metric != "mse", "curves": [curve]},
    )


def test_table_has_a_row_for_each_combination_of_the_axes() -> None:
    rows = tabulate(
        [
            job(2.0, "+experiment=a", "inner.step_size=0.1", "seed=0"),
            job(4.0, "+experiment=a", "inner.step_size=0.1", "seed=1"),
            job(1.0, "+experiment=a", "inner.step_size=0.2", "seed=0"),
            Job(("+experiment=a", "inner.step_size=0.2", "seed=1"), None, "killed"),
        ]
    )
    assert [row["inner.step_size"] for row in rows] == ["0.2", "0.1"], "the best first"
    assert [(row["mean"], row["ci95"], row["seeds"]) for row in rows] == [(1.0, 0.5, "1 of 2"), (3.0, 0.5, "2 of 2")]
    assert math.isnan(rows[0]["std"])
    assert rows[1]["std"] == pytest.approx(math.sqrt(2))
    assert list(rows[0]) == ["inner.step_size", "metric", "mean", "ci95", "std", "seeds"]


def test_table_puts_large_accuracies_first_and_what_diverged_or_failed_last() -> None:
    jobs = [job(None, "a=1", metric="accuracy"), job(0.5, "a=2", metric="accuracy"), Job(("a=3",), None, "why")]
    rows = tabulate([*jobs, job(0.9, "a=4", metric="accuracy")])
    assert [row["a"] for row in rows] == ["4", "2", "1", "3"]


def test_sweep_lists_what_failed_and_goes_on_with_that(tiny: TinyRuns) -> None:
    arguments = ("-m", "seed=0", "inner.step_size=0.02,-1", "+debug=smoke")
    process = tiny.start(*arguments)
    stdout, _ = process.communicate(timeout=120)
    folder = sweep_folder(tiny.runs_dir)
    summary = (folder / "summary.md").read_text()
    assert process.returncode == 1
    assert summary in stdout
    assert "1 of 2 jobs are finished" in summary
    assert "- inner.step_size=-1: the config is not valid" in summary
    assert "`python train.py -m seed=0 inner.step_size=0.02,-1" in summary
    with open(folder / "summary.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["inner.step_size"], row["metric"], row["seeds"]) for row in rows] == [
        ("0.02", "mse", "1 of 1"),
        ("-1", "", "0 of 1"),
    ]

    stdout, _ = tiny.start(*arguments).communicate(timeout=120)
    assert stdout.count("already finished") == 1
    assert sweep_folder(tiny.runs_dir) == folder


def test_seeds_side_by_side_are_counted_one_by_one(tiny: TinyRuns) -> None:
    overrides = [*tiny.base, "num_iterations=3", f"runs_dir={tiny.runs_dir}", "seeds=2", "inner.step_size=0.01"]
    (tiny.runs_dir / "sweeps" / "jobs").mkdir(parents=True)
    record = json.dumps({"overrides": overrides, "error": None})
    (tiny.runs_dir / "sweeps" / "jobs" / "one.json").write_text(record)
    run_experiment(compose([*overrides, "seeds=1"])[0], "custom")
    first, second = read_jobs(tiny.runs_dir / "sweeps")
    assert (first.settings["seed"], first.problem) == ("0", "")
    assert (second.settings["seed"], second.problem) == ("1", "not started")
    (row,) = tabulate([first, second])
    assert row["seeds"] == "1 of 2"


@pytest.mark.parametrize("option", OPTIONS)
def test_way_to_sweep_leaves_the_run_id_alone(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    skip_without_plugin(option, capsys)
    config, _ = compose([option])
    assert digest(training_config(config)) == digest(training_config(compose([])[0]))


@pytest.mark.parametrize("option", OPTIONS)
def test_missing_plugin_is_named_with_its_extra(
    option: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(package: str) -> str:
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    explain_override_error([option, "seed=0,1"])
    line = capsys.readouterr().err.splitlines()[0]
    extra = line.partition(".[")[2].partition("]")[0]
    assert f"hydra-{extra}-" in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize(
    ("launcher", "more"),
    [
        ("joblib", []),
        pytest.param("slurm_local", [], marks=pytest.mark.slow),
        ("ray", ["hydra.launcher.ray.init.address=local"]),
    ],  # not on a user's cluster
)
def test_launcher_runs_two_jobs(
    launcher: str, more: list[str], tiny: TinyRuns, capsys: pytest.CaptureFixture[str]
) -> None:
    skip_without_plugin(f"launcher={launcher}", capsys)
    process = tiny.start(f"launcher={launcher}", *more, "seed=0,1", "+debug=smoke")
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert "2 of 2 jobs are finished" in stdout
    for seed in (0, 1):
        record = read_json(tiny.folder("+debug=smoke", f"seed={seed}") / "run.json")
        assert record
        assert record["status"] == "finished"
        assert record["command"].startswith(f"python train.py launcher={launcher} ")


# A fake of submitit: the process that starts the job handles the signal and requeues the job.
PREEMPTED = """
import runpy, signal, sys
from maml.training import iteration

meta_update, count = iteration.meta_update, 0

def preempted_update(*args):
    global count
    count += 1
    if count == 5:
        signal.raise_signal(signal.SIGUSR2)
    return meta_update(*args)

iteration.meta_update = preempted_update
signal.signal(signal.SIGUSR2, lambda *_: sys.exit(144))
sys.argv[0] = "train.py"
runpy.run_path("train.py", run_name="__main__")
"""


def test_preempted_job_is_saved_before_its_launcher_requeues_it(tiny: TinyRuns, tmp_path: Path) -> None:
    arguments = ("seed=0", f"runs_dir={tiny.runs_dir}", *tiny.base)
    command = [sys.executable, "-c", PREEMPTED, "-m", *arguments]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert process.returncode == 144, process.stderr
    assert ": interrupted at iteration 5" in process.stdout

    run_experiment(tiny.config(), "custom")
    record = read_json(tiny.folder() / "run.json")
    assert record
    assert [part["first_iteration"] for part in record["segments"]] == [0, 5]


def test_interruption_passes_from_process_to_process() -> None:
    passed = pickle.loads(pickle.dumps(Interrupted("why", signal.SIGTERM)))
    assert (str(passed), passed.signal_number) == ("why", signal.SIGTERM)


@pytest.mark.slow
def test_preempted_job_of_submitit_goes_on(tiny: TinyRuns, capsys: pytest.CaptureFixture[str]) -> None:
    skip_without_plugin("launcher=slurm_local", capsys)
    longer = replace(tiny, base=(*tiny.base, "num_iterations=3000", "checkpoint_every=3000"))
    process = longer.start("launcher=slurm_local", "seed=0,1")
    folder = longer.folder()
    while not (folder / "metrics.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.01)
    for submitted in tiny.runs_dir.glob("sweeps/.submitit/*/*_submitted.pkl"):
        controller = submitted.parent.name
        (child,) = Path(f"/proc/{controller}/task/{controller}/children").read_text().split()
        subprocess.run(["kill", f"-{signal.SIGUSR2}", child], check=True)
    stdout, _ = process.communicate(timeout=300)
    assert "2 of 2 jobs are finished" in stdout
    record = read_json(folder / "run.json")
    assert record
    first, second = record["segments"]
    assert 0 < first["last_iteration"] == second["first_iteration"] < 3000


def test_optuna_looks_where_the_domain_is_better(capsys: pytest.CaptureFixture[str]) -> None:
    skip_without_plugin("sweeper=optuna", capsys)
    config, _ = compose(["sweeper=optuna"])
    assert config.evaluation["split"] == "val"


@pytest.mark.parametrize(("domain", "direction"), [("sinusoid", "minimize"), ("omniglot", "maximize")])
def test_direction_is_that_of_the_domain(domain: str, direction: str) -> None:
    target = OmegaConf.load(CONF / "domain" / f"{domain}.yaml")._target_
    assert OmegaConf.create({"direction": f"${{direction:{target}}}"}).direction == direction


@pytest.mark.parametrize("path", sorted((ROOT / "sweeps").glob("*.yaml")), ids=lambda path: path.stem)
def test_wandb_sweep_drives_the_same_command(path: Path) -> None:
    sweep: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    python, script, *overrides = sweep["command"]
    assert (python, script, overrides.pop()) == ("python", "${program}", "${args_no_hyphens}")
    assert sweep["program"] == "train.py"
    values = {
        key: {"value": choice["min"] if "min" in choice else choice["values"][0]}
        for key, choice in sweep["parameters"].items()
    }
    overrides += create_sweep_command_args({"args": values})["args_no_hyphens"]  # as W&B's agent fills it in
    config, experiment = compose(overrides)
    assert experiment != "custom"
    assert config.logger["_target_"] == "maml.logger.wandb.WandB"
    assert config.evaluation["split"] == "val"
    assert sweep["metric"]["name"] == "headline"
