"""Sweeps: with every launcher, interrupted, with failing jobs, and their summaries."""

from __future__ import annotations

import csv
import importlib.metadata
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

from maml.config.compose import compose
from maml.config.hints import explain_override_error
from maml.config.identity import training_config
from maml.digest import digest
from maml.errors import Interrupted
from maml.experiment import run_experiment
from maml.record import checkpoint
from maml.record.run_files import read_json
from maml.sweep.callback import Sweep, _hopeless, _planned_jobs, _sweep_id
from maml.sweep.state import SWEEP
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
    assert "These would fail again in the same way: change their settings, or leave them out" in summary
    with open(folder / "summary.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["inner.step_size"], row["metric"], row["seeds"]) for row in rows] == [
        ("0.02", "mse (K=10, step 2, n=5)", "1 of 1"),
        ("-1", "", "0 of 1"),
    ]

    stdout, _ = tiny.start(*arguments).communicate(timeout=120)
    assert stdout.count("already finished") == 1
    assert sweep_folder(tiny.runs_dir) == folder


def multirun_config(*overrides: str, config_dir: Path = CONF, config_name: str = "config") -> DictConfig:
    """Composes the config that Hydra passes to a sweep's callbacks; Hydra is initialised afterwards."""
    GlobalHydra.instance().clear()
    initialize_config_dir(str(config_dir), version_base="1.3")
    loader = GlobalHydra.instance().config_loader()
    return loader.load_configuration(config_name, [*overrides], run_mode=RunMode.MULTIRUN)


def leave_process_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a sweep start in the process of the tests, which it would change."""
    monkeypatch.setattr("maml.sweep.callback.Monitor", lambda *_: None)
    monkeypatch.setattr("maml.sweep.callback.atexit.register", lambda *_: None)
    for name in ("signal", "pthread_sigmask"):
        monkeypatch.setattr(f"maml.sweep.callback.signal.{name}", lambda *_: None)


@pytest.fixture
def _clear_hydra() -> Iterator[None]:
    yield
    GlobalHydra.instance().clear()


@pytest.mark.usefixtures("_clear_hydra")
@pytest.mark.parametrize(
    ("override", "planned"),
    [
        ("seed=0,1", ["seed=0", "seed=1"]),
        ("seed=choice(0,1)", ["seed=0", "seed=1"]),
        ("seed=range(0,3)", ["seed=0", "seed=1", "seed=2"]),
        ("seed=range(start=0,stop=3,step=2)", ["seed=0", "seed=2"]),
        ("seed=sort(2,1,reverse=true)", ["seed=2", "seed=1"]),
        ("seed=shuffle(1,2)", ["seed=1", "seed=2"]),
        ("seed=tag(a,choice(1,2))", ["seed=1", "seed=2"]),
        ("inner.step_size=float(choice(1,2))", ["inner.step_size=1.0", "inner.step_size=2.0"]),
        ("hardware=glob(c*)", ["hardware=cpu"]),
        ("hardware=glob([c*,a*])", ["hardware=auto", "hardware=cpu"]),
        ("inner.step_size=interval(0.1,1)", None),
        ("+experiment=sinusoid_10shot,sinusoid_oracle", ["+experiment=sinusoid_10shot", "+experiment=sinusoid_oracle"]),
        ("evaluation.num_shots=[5],[10]", ["evaluation.num_shots=[5]", "evaluation.num_shots=[10]"]),
    ],
)
def test_every_form_of_sweep_has_its_jobs(override: str, planned: list[str] | None) -> None:
    if planned is None:
        with pytest.raises(HydraException):
            _planned_jobs(multirun_config("num_iterations=3", override))
        return
    jobs = _planned_jobs(multirun_config("num_iterations=3", "launcher=joblib", override))
    assert jobs is not None
    assert sorted(map(sorted, jobs)) == sorted(sorted(["num_iterations=3", each]) for each in planned)


@pytest.mark.usefixtures("_clear_hydra")
def test_sweep_may_be_written_into_a_config_file(tmp_path: Path) -> None:
    shutil.copytree(CONF, tmp_path, dirs_exist_ok=True)
    (tmp_path / "mine.yaml").write_text(
        "defaults: [config, _self_]\nhydra: {sweeper: {params: {seed: 'range(2,4)'}}}\n"
    )
    config = multirun_config("num_iterations=3", config_dir=tmp_path, config_name="mine")
    assert _planned_jobs(config) == [["seed=2", "num_iterations=3"], ["seed=3", "num_iterations=3"]]
    others = [
        multirun_config("num_iterations=3", config_dir=tmp_path),
        multirun_config("seed=range(2,4)", "num_iterations=3", config_dir=tmp_path),
    ]
    assert len({_sweep_id(each) for each in (config, *others)}) == 3


@pytest.mark.usefixtures("_clear_hydra")
def test_id_is_that_of_the_settings_and_not_of_the_launcher() -> None:
    alone = _sweep_id(multirun_config("seed=0,1"))
    assert _sweep_id(multirun_config("launcher=joblib", "seed=0,1", "hydra.launcher.n_jobs=2")) == alone
    assert _sweep_id(multirun_config("seed=0,2")) != alone


def test_folder_of_another_sweep_at_the_same_path_is_not_taken_for_its_own(tmp_path: Path) -> None:
    sweep = Sweep()
    sweep.folder, sweep._token = tmp_path, "ours"
    for token, sees in (("ours", True), ("another", False)):
        (tmp_path / SWEEP).write_text(json.dumps({"token": token}))
        assert bool(sweep._read_sweep()) == sees


def test_summary_of_a_glob_over_own_options(tiny: TinyRuns, tmp_path: Path) -> None:
    own = tmp_path / "own"
    for group, name, content in (
        ("inner", "slow", "defaults: [sgd]\nstep_size: 0.01\n"),
        ("inner", "slower", "defaults: [sgd]\nstep_size: 0.001\n"),
    ):
        (own / group).mkdir(parents=True, exist_ok=True)
        (own / group / f"{name}.yaml").write_text(content)
    process = tiny.start("-m", "--config-dir", str(own), "inner=glob(slow*)", "num_iterations=3")
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert "Callback" not in stderr
    assert "1 of 2 finished, 1 running" in stderr
    assert "2 of 2 jobs are finished" in stdout
    with open(sweep_folder(tiny.runs_dir) / "summary.csv", newline="") as file:
        assert sorted(row["inner"] for row in csv.DictReader(file)) == ["slow", "slower"]


@pytest.mark.usefixtures("_clear_hydra")
def test_start_says_that_slurm_needs_a_shared_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    leave_process_alone(monkeypatch)
    config = multirun_config("launcher=slurm_local", "seed=0,1", f"runs_dir={tmp_path}")
    for disk in (None, "ext4"):
        monkeypatch.setattr("maml.sweep.callback.local_disk", lambda _, disk=disk: disk)
        Sweep(jobs_outlive_command=True).on_multirun_start(config)
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == (disk is not None)
    assert f"have to see {tmp_path}" in lines[0]
    assert "runs_dir=" in lines[0]


@pytest.mark.usefixtures("_clear_hydra")
@pytest.mark.parametrize(("launcher", "goes_on"), [("slurm", True), ("joblib", False)])
def test_stopped_sweep_asks_to_run_it_again_unless_its_jobs_go_on(
    launcher: str, goes_on: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    skip_without_plugin(f"launcher={launcher}", capsys)
    callback = instantiate(multirun_config(f"launcher={launcher}", "seed=0,1").hydra.callbacks.sweep)
    with pytest.raises(Interrupted, match="stopped by SIGTERM") as stop:
        callback._stop(signal.SIGTERM, None)
    assert ("run the same command again" in str(stop.value)) is not goes_on


def started_sweep(tiny: TinyRuns, monkeypatch: pytest.MonkeyPatch) -> tuple[Sweep, DictConfig]:
    """Starts a sweep of two jobs in this process, and returns it with the config of its jobs."""
    leave_process_alone(monkeypatch)
    monkeypatch.setattr(sys, "argv", sys.argv)  # a job sets it
    config = multirun_config("launcher=joblib", "seed=0,1", f"runs_dir={tiny.runs_dir}", *tiny.base)
    config.hydra.runtime.cwd = str(ROOT)
    callback = Sweep()
    callback.on_multirun_start(config)
    return callback, config


@pytest.mark.usefixtures("_clear_hydra")
def test_callback_is_pickled_while_its_job_runs(tiny: TinyRuns, monkeypatch: pytest.MonkeyPatch) -> None:
    # SLURM's launcher does so to requeue a job.
    callback, config = started_sweep(tiny, monkeypatch)
    for _ in range(2):  # the second time in the process of the requeued job
        config.seed = 0
        callback.on_job_start(config)
        try:
            again = pickle.loads(pickle.dumps(callback))
            assert again.folder == callback.folder
        finally:
            callback.on_job_end(config, JobReturn(status=JobStatus.COMPLETED))
        callback = again


@pytest.mark.usefixtures("_clear_hydra")
@pytest.mark.parametrize("runs", [True, False])
def test_job_belongs_to_the_sweep_although_its_command_was_given_again(
    runs: bool, tiny: TinyRuns, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    callback, config = started_sweep(tiny, monkeypatch)
    folder = sweep_folder(tiny.runs_dir)
    first = read_json(folder / SWEEP)
    if runs:
        (folder / "jobs" / "a.heartbeat").write_text(json.dumps({"time": time.time(), "host": "another", "pid": 1}))
    Sweep().on_multirun_start(config)
    second = read_json(folder / SWEEP)
    assert first and second
    assert (first["started"] == second["started"]) is runs, "jobs that run are not of an earlier start"
    config.seed = 0
    callback.on_job_start(config)
    try:
        (record,) = (folder / "jobs").glob("*.json")
        assert json.loads(record.read_text())["started"] == second["started"]
    finally:
        callback.on_job_end(config, JobReturn(status=JobStatus.COMPLETED))
    assert "does not see" not in capsys.readouterr().err


@pytest.mark.usefixtures("_clear_hydra")
@pytest.mark.parametrize("key", ["nodes", "tasks_per_node"])
def test_job_of_several_processes_is_refused(key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    skip_without_plugin("launcher=slurm_local", capsys)
    config = multirun_config("launcher=slurm_local", f"hydra.launcher.{key}=2", "seed=0,1", f"runs_dir={tmp_path}")
    with pytest.raises(SystemExit):
        Sweep().on_multirun_start(config)
    assert f"hydra.launcher.{key}=2: a job of a sweep is one process" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("_clear_hydra")
@pytest.mark.parametrize(
    ("setting", "allowed"),
    [
        ("timeout_min=-5", "above 0"),
        ("mem_gb=0", "above 0"),
        ("cpus_per_task=0", "above 0"),
        ("array_parallelism=0", "above 0"),
        ("gpus_per_node=-1", "at least 0"),
        ("signal_delay_s=-1", "at least 0"),
        ("max_num_timeout=-1", "at least 0"),
    ],
)
def test_impossible_slurm_job_is_refused(
    setting: str, allowed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    skip_without_plugin("launcher=slurm", capsys)
    config = multirun_config("launcher=slurm", f"hydra.launcher.{setting}", "seed=0,1", f"runs_dir={tmp_path}")
    with pytest.raises(SystemExit):
        Sweep().on_multirun_start(config)
    assert f"hydra.launcher.{setting}: it has to be {allowed}" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("_clear_hydra")
@pytest.mark.parametrize(
    ("overrides", "refused"),
    [
        (["+experiment=omniglot_5way_1shot,omniglot_5way_1shot_fomaml"], True),
        (["domain=omniglot,cifar_fs"], True),
        (["+experiment=omniglot_5way_1shot,sinusoid_10shot", "hydra.sweeper.direction=maximize"], False),
        (["+experiment=omniglot_5way_1shot", "seed=0,1"], False),
    ],
)
def test_search_over_domains_needs_a_direction(overrides: list[str], refused: bool) -> None:
    config = multirun_config(*(word for word in overrides if not word.startswith("hydra.")))
    # As with sweeper=optuna, which may not be installed.
    direction = "maximize" if "hydra.sweeper.direction=maximize" in overrides else "${direction:${domain}}"
    config.hydra.sweeper = OmegaConf.create({"_target_": "Optuna", "direction": direction})
    assert ("set hydra.sweeper.direction=maximize" in _hopeless(config, None)) is refused


@pytest.mark.usefixtures("_clear_hydra")
def test_sweep_that_cannot_make_its_folder_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "sweeps").touch()
    with pytest.raises(SystemExit):
        Sweep().on_multirun_start(multirun_config("seed=0,1", f"runs_dir={tmp_path}"))
    assert "cannot be created (Not a directory); change runs_dir" in capsys.readouterr().err


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
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    assert "2 of 2 jobs are finished" in stdout
    assert "2 of 2 finished" in stderr
    assert "it/s" not in stderr, "each job has a file for its output"
    assert len(list(tiny.runs_dir.glob("sweeps/*/jobs/*.log"))) == 2
    for seed in (0, 1):
        record = read_json(tiny.folder("+debug=smoke", f"seed={seed}") / "run.json")
        assert record
        assert record["status"] == "finished"
        assert record["command"].startswith(f"python train.py launcher={launcher} ")


@pytest.mark.parametrize(
    ("launcher", "signal_number"),
    [
        ("joblib", signal.SIGTERM),
        ("joblib", signal.SIGINT),
        pytest.param("slurm_local", signal.SIGTERM, marks=pytest.mark.slow),
    ],
)
def test_jobs_of_a_stopped_sweep_save(
    launcher: str, signal_number: int, tiny: TinyRuns, capsys: pytest.CaptureFixture[str]
) -> None:
    skip_without_plugin(f"launcher={launcher}", capsys)
    longer = replace(tiny, base=(*tiny.base, "num_iterations=1000000", "checkpoint_every=1000000"))
    seeds, more = ("seed=0,1,2", ["hydra.launcher.n_jobs=2"]) if launcher == "joblib" else ("seed=0,1", [])
    process = longer.start(f"launcher={launcher}", *more, seeds, process_group=0)
    try:
        while len(list(tiny.runs_dir.glob("*/*/metrics.jsonl"))) < 2:
            assert process.poll() is None
            time.sleep(0.01)
        if signal_number == signal.SIGINT:
            os.killpg(process.pid, signal_number)  # as a terminal does
        else:
            process.send_signal(signal_number)
        stdout, stderr = process.communicate(timeout=120)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 128 + signal_number, stderr
    assert f"stopped by {signal.Signals(signal_number).name}" in stderr
    folders = [path.parent for path in tiny.runs_dir.glob("*/*/run.json")]
    assert len(folders) == 2, "no other job has begun"
    for folder in folders:
        record = read_json(folder / "run.json")
        assert record
        assert record["status"] == "interrupted"
        assert checkpoint.load(folder / "checkpoint.pt")["iteration"] == record["segments"][-1]["last_iteration"] > 0
    assert stdout.count(": interrupted at iteration ") == 2
    assert not list(tiny.runs_dir.rglob("*.heartbeat"))


def test_job_does_not_start_if_its_command_has_ended(tmp_path: Path) -> None:
    child = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    callback = Sweep()
    callback.folder, callback._stops_jobs, callback._command = tmp_path, True, int(child.stdout)
    with pytest.raises(Interrupted, match="the sweep has been stopped"):
        callback.on_job_start(OmegaConf.create())
    assert not list(tmp_path.iterdir())


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


@pytest.mark.parametrize(
    ("domain", "keys", "direction"),
    [
        ("sinusoid", {}, "minimize"),
        ("omniglot", {}, "maximize"),
        ("table", {"classes": None}, "minimize"),
        ("table", {"classes": ["no", "yes"]}, "maximize"),
    ],
)
def test_direction_is_that_of_the_domain(domain: str, keys: dict[str, Any], direction: str) -> None:
    if domain == "table":
        keys = keys | {"file": "t.csv", "task": "who", "inputs": ["a"], "targets": ["b"], "split": "part"}
    part = OmegaConf.merge(OmegaConf.load(CONF / "domain" / f"{domain}.yaml"), keys)
    config = OmegaConf.create(
        {"data_dir": "d", "cache_dir": "c", "domain": part, "direction": "${direction:${domain}}"}
    )
    assert config.direction == direction


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
