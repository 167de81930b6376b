"""The W&B mirror: what it writes offline, and that no failure of W&B affects the run."""

import json
import logging
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from maml.errors import MamlError
from maml.experiment import run_experiment
from maml.logger.wandb import WandB
from maml.logger.wandb_service import Service
from tests.runs import TinyRuns

CONFIG = {
    "inner": {"step_size": 0.01, "num_steps": 1},
    "seed": 3,
    "mode": "train",
    "domain": {"_target_": "maml.domain.sinusoid.Sinusoid"},
    "algorithm": {"_target_": "maml.algorithm.maml.MAML"},
    "settings_hash": "abcdef",
}
REPORT = {
    "experiment": "sinusoid_10shot",
    "run_id": "1f2e3d",
    "iteration": 30,
    "headline": 0.5,
    "bank": {"hash": "abc"},
    "curves": [
        {
            "num_shots": 10,
            "metric": "mse",
            "steps": [
                {"step": 0, "mean": 3.25, "ci95": 0.125, "num_tasks": 600},
                {"step": 1, "mean": 0.5, "ci95": 0.0625, "num_tasks": 600},
            ],
        }
    ],
}


@pytest.fixture(autouse=True)
def _service(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process of its own for every test: none has abandoned W&B yet."""
    monkeypatch.setattr(WandB, "abandoned", False)
    monkeypatch.setattr("maml.logger.wandb.SERVICE", Service())


@pytest.fixture
def wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The real library, without credentials and without access to the user's folders."""
    wandb = pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_SERVICE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "NETRC"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    yield wandb
    wandb.teardown()


def fold(items: Any) -> dict[str, Any]:
    return {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}


def read_run(run_dir: Path, part: int = 0) -> dict[str, Any]:
    """Reads a .wandb file: LevelDB's log format (32 KiB blocks; crc, length, type) after a header of 7 bytes."""
    import wandb
    from wandb.proto import wandb_internal_pb2

    wandb.teardown()  # the last of a file is written after its run finished
    file = sorted(run_dir.glob("wandb/offline-run-*/run-*.wandb"))[part]
    data = file.read_bytes()
    content: dict[str, Any] = {name: {} for name in ("config", "summary", "metrics", "best")}
    content |= {"file": file, "history": [], "artifacts": [], "alerts": []}
    at, payload = 7, b""
    while at + 7 <= len(data):
        if (room := 32768 - at % 32768) < 7:
            at += room
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        payload += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a full record, or the last piece of one
            record = wandb_internal_pb2.Record.FromString(payload)  # type: ignore[attr-defined]
            payload = b""
            if record.HasField("run"):
                content["run"] = record.run
                content["config"] |= fold(record.run.config.update)
            content["history"] += [fold(record.history.item)] if record.HasField("history") else []
            content["summary"] |= fold(record.summary.update)
            content["metrics"] |= {record.metric.name or record.metric.glob_name: record.metric.step_metric}
            content["best"] |= {record.metric.name: {field.name for field, _ in record.metric.summary.ListFields()}}
            content["alerts"] += [record.alert] if record.HasField("alert") else []
            content["artifacts"] += [record.artifact] if record.HasField("artifact") else []
            if record.request.HasField("log_artifact"):
                content["artifacts"].append(record.request.log_artifact.artifact)
            if record.HasField("exit"):
                content["exit_code"] = record.exit.exit_code
    return content


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("maml.")]


def mirror(logger: WandB, run_dir: Path, iterations: range, resumed: bool = False) -> None:
    run_dir.mkdir(exist_ok=True)
    logger.start(run_dir, "sinusoid_10shot", "1f2e3d", CONFIG, resumed)
    for iteration in iterations:
        logger.log({"loss": 1 / (1 + iteration)}, iteration)


def test_offline_run_holds_config_metrics_and_evaluation(
    wandb: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "curve.png"
    Image.new("RGB", (4, 3)).save(picture)
    logger = WandB(project="project", tags=["tag"], mode="offline")
    mirror(logger, tmp_path / "run", range(0, 30, 10))
    (tmp_path / "run" / "checkpoint.pt").write_bytes(b"theta")
    logger.report(
        REPORT | {"cells": {"table2_multitask/MAML/K5_gradsteps_1": "0.50 (paper 0.67): better"}}, {"curve": picture}
    )
    logger.finish("finished")

    content = read_run(tmp_path / "run")
    assert content["run"].run_id == "sinusoid_10shot-1f2e3d"
    assert (content["run"].project, content["run"].run_group) == ("project", "sinusoid_10shot")
    assert list(content["run"].tags) == ["Sinusoid", "MAML", "tag"]
    assert (content["run"].display_name, content["run"].job_type) == ("sinusoid_10shot seed 3 1f2e3d", "train")
    assert {key: content["config"][key] for key in CONFIG} == CONFIG
    assert content["metrics"]["*"] == "iteration"
    rows = [(row["iteration"], row["loss"]) for row in content["history"] if "loss" in row]
    assert rows == [(0, 1.0), (10, 1 / 11), (20, 1 / 21)]
    assert content["history"][-1]["iteration"] == 30
    assert content["summary"]["headline"] == 0.5
    assert content["summary"]["cells/table2_multitask/MAML/K5_gradsteps_1"] == "0.50 (paper 0.67): better"
    (artifact,) = (one for one in content["artifacts"] if one.type == "checkpoint")
    assert [file.path for file in artifact.manifest.contents] == ["checkpoint.pt"]
    assert (content["summary"]["mse_10shot"], content["summary"]["mse_10shot_ci95"]) == (0.5, 0.0625)
    assert (content["summary"]["status"], content["exit_code"]) == ("finished", 0)

    files = content["file"].parent / "files"
    line = json.loads((files / content["history"][-1]["adaptation/mse_10shot_table.path"]).read_text())
    assert line == {"columns": ["gradient step", "mse"], "data": [[0, 3.25], [1, 0.5]]} | {
        key: line[key] for key in line.keys() - {"columns", "data"}
    }
    table = json.loads((files / content["history"][-1]["evaluation.path"]).read_text())
    assert table["columns"] == ["metric", "num_shots", "step", "mean", "ci95", "num_tasks"]
    assert table["data"] == [["mse", 10, 0, 3.25, 0.125, 600], ["mse", 10, 1, 0.5, 0.0625, 600]]
    assert (files / content["history"][-1]["pictures/curve.path"]).read_bytes() == picture.read_bytes()
    assert not warned(caplog)
    assert capfd.readouterr() == ("", "")


def test_summary_has_the_best_and_the_last_of_what_can_be_good_or_bad(wandb: Any, tmp_path: Path) -> None:
    logger = WandB(mode="offline")
    mirror(logger, tmp_path / "run", range(0))
    for iteration in range(3):
        logger.log({"loss": 1.0, "accuracy": 0.5, "return_step_0": -3.0, "kl": 0.01}, iteration)
    logger.finish("finished")
    best = read_run(tmp_path / "run")["best"]
    assert best["loss"] == {"min", "last"}
    assert best["accuracy"] == best["return_step_0"] == {"max", "last"}
    assert "kl" not in best


def test_divergence_is_an_alert(wandb: Any, tmp_path: Path) -> None:
    logger = WandB(mode="offline")
    mirror(logger, tmp_path / "run", range(3))
    logger.alert("Training diverged", "loss=nan at iteration 3")
    logger.report(REPORT | {"headline": None}, {})
    logger.finish("failed")
    training, meta_test = read_run(tmp_path / "run")["alerts"]
    assert (training.title, training.text, training.level) == ("Training diverged", "loss=nan at iteration 3", "ERROR")
    assert meta_test.title == "Adaptation diverged"


def test_steps_at_which_adaptation_diverged_are_left_out_of_the_line(wandb: Any, tmp_path: Path) -> None:
    logger = WandB(mode="offline")
    mirror(logger, tmp_path / "run", range(1))
    steps = [*REPORT["curves"][0]["steps"], {"step": 2, "mean": None, "ci95": None, "num_tasks": 600}]  # type: ignore[index]
    for measured_by in ("gradient step", "showing"):
        curves = [{"num_shots": 10, "metric": "mse", "steps": steps}]
        logger.report(REPORT | {"measured_by": measured_by, "curves": curves}, {})
    logger.finish("finished")
    content = read_run(tmp_path / "run")
    files, key = content["file"].parent / "files", "adaptation/mse_10shot_table.path"
    over_steps, over_showings = (json.loads((files / row[key]).read_text())["data"] for row in content["history"][-2:])
    assert (over_steps, over_showings) == ([[0, 3.25], [1, 0.5]], [[1, 3.25], [2, 0.5]])


def test_uncommitted_changes_of_the_clone_are_saved_but_not_with_a_replayed_run(
    wandb: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clone = tmp_path / "clone"
    git = ["git", "-c", "user.name=n", "-c", "user.email=e@example.org", "-C", str(clone)]
    subprocess.run(["git", "init", "-q", str(clone)], check=True)
    (clone / "a.txt").write_text("committed\n")
    for words in (["add", "a.txt"], ["commit", "-qm", "first"]):
        subprocess.run([*git, *words], check=True)
    (clone / "a.txt").write_text("changed\n")
    monkeypatch.setattr("maml.logger.wandb.ROOT", clone)
    for name in ("run", "replayed"):
        logger = WandB(mode="offline")
        if name == "replayed":
            logger.replay_into(tmp_path / name)
        mirror(logger, tmp_path / name, range(1))
        logger.finish("finished")
    (patch,) = tmp_path.glob("run/wandb/offline-run-*/files/diff.patch")
    assert "+changed" in patch.read_text()
    assert not list(tmp_path.glob("replayed/wandb/offline-run-*/files/*.patch"))


def test_agent_of_a_sweep_gets_the_headline_under_its_own_id(
    wandb: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep")
    where = tmp_path / "run", "sinusoid_10shot", "1f2e3d", CONFIG, REPORT
    for run_id in ("first", "second"):
        monkeypatch.setenv("WANDB_RUN_ID", run_id)
        logger = WandB(project="mine", mode="offline")
        assert not logger.has(*where)
        mirror(logger, tmp_path / "run", range(1))
        logger.report(REPORT, {})
        logger.finish("finished")
        assert logger.has(*where)
        wandb.teardown()  # each run of an agent is a process of its own
    contents = [read_run(tmp_path / "run", part) for part in range(2)]
    assert {content["run"].run_id: content["summary"]["headline"] for content in contents} == {
        "first": 0.5,
        "second": 0.5,
    }
    assert not warned(caplog)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_agent_of_a_sweep_gets_no_two_seeds(tiny: TinyRuns, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    WandB().check_seeds(2)
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep")
    monkeypatch.setenv("WANDB_RUN_ID", "given")
    WandB().check_seeds(1)
    with pytest.raises(MamlError, match="seeds=2 makes several runs, but a trial of a W&B sweep is one run"):
        run_experiment(tiny.config("logger=wandb", "seeds=2", f"mode={mode}"), "custom")
    assert not tiny.runs_dir.exists()


def test_resumed_run_continues_the_same_wandb_run(wandb: Any, tmp_path: Path) -> None:
    for part, iterations in enumerate((range(20), range(15, 30))):
        logger = WandB(mode="offline")
        mirror(logger, tmp_path / "run", iterations, resumed=part > 0)
        logger.finish("interrupted" if part == 0 else "finished")
    first, second = read_run(tmp_path / "run", 0), read_run(tmp_path / "run", 1)
    assert first["run"].run_id == second["run"].run_id
    assert not first["run"].resume
    assert second["run"].resume  # read by `wandb sync`, which then appends
    assert [row["iteration"] for row in second["history"]] == list(range(15, 30))
    assert (first["exit_code"], first["summary"]["status"]) == (1, "interrupted")


def test_two_runs_in_one_process_give_two_files(wandb: Any, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        logger = WandB(mode="offline")
        logger.start(tmp_path / name, name, "0", {"name": name}, False)
        logger.log({"loss": 1.0}, 1)
        logger.finish("finished")
    for name in ("a", "b"):
        content = read_run(tmp_path / name)
        assert (content["run"].run_id, content["config"]["name"]) == (f"{name}-0", name)
        assert len(content["history"]) == 1


def test_auto_without_credentials_is_offline_and_quiet(
    wandb: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logger = WandB()
    mirror(logger, tmp_path / "run", range(3))
    logger.finish("finished")
    assert len(read_run(tmp_path / "run")["history"]) == 3
    assert not warned(caplog)


def test_auto_obeys_wandb_mode(wandb: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    logger = WandB()
    mirror(logger, tmp_path / "run", range(3))
    logger.finish("finished")
    assert not list((tmp_path / "run").iterdir())
    assert not logger.has(tmp_path / "run", "sinusoid_10shot", "1f2e3d", CONFIG, REPORT)


def test_unreachable_server_turns_the_process_offline_with_one_warning(
    wandb: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setattr(WandB, "init_timeout", 1.0)
    for name in ("a", "b"):
        logger = WandB()
        mirror(logger, tmp_path / name, range(3))
        logger.finish("finished")
    assert [len(read_run(tmp_path / name)["history"]) for name in ("a", "b")] == [3, 3]
    (warning,) = warned(caplog)
    assert "offline" in warning and "connection refused" in warning
    assert f"wandb sync {tmp_path / 'a' / 'wandb'}" in warning


def test_online_without_credentials_warns_and_is_offline(
    wandb: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logger = WandB(mode="online")
    mirror(logger, tmp_path / "run", range(3))
    logger.finish("finished")
    assert len(read_run(tmp_path / "run")["history"]) == 3
    (warning,) = warned(caplog)
    assert "wandb login" in warning


class Broken:
    """A fake of the library and its run object, with one function that fails."""

    def __init__(self, broken: str, how: Any) -> None:
        self.broken, self.how = broken, how
        self.summary: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        if name == self.broken:
            return self.how
        if name == "plot":
            return self
        if name == "setup":
            return lambda settings: SimpleNamespace(settings=SimpleNamespace(mode="offline"))
        return lambda *args, **kwargs: self


def fail(*args: Any, **kwargs: Any) -> None:
    raise BrokenPipeError("the pipe\nis broken")


def leave(*args: Any, **kwargs: Any) -> None:
    sys.exit(1)


@pytest.mark.parametrize("how", [fail, leave])
@pytest.mark.parametrize("broken", ["setup", "init", "define_metric", "log", "Table", "finish"])
def test_error_in_wandb_gives_one_warning_and_no_exception(
    broken: str, how: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", Broken(broken, how))
    logger = WandB()
    mirror(logger, tmp_path / "run", range(100))
    logger.report(REPORT, {})
    logger.finish("finished")
    error = "BrokenPipeError: the pipe" if how is fail else "SystemExit: 1"
    assert warned(caplog) == [
        f"W&B stopped mirroring this run ({error}); the run continues, and its run folder is complete."
    ]
    assert caplog.records[0].levelno == logging.WARNING


def test_missing_wandb_gives_one_warning_and_no_exception(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    logger = WandB()
    mirror(logger, tmp_path / "run", range(3))
    logger.finish("finished")
    (warning,) = warned(caplog)
    assert "ModuleNotFoundError" in warning


@pytest.mark.parametrize("broken", ["init", "log", "finish"])
def test_hanging_wandb_is_left_behind(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    release = threading.Event()
    monkeypatch.setitem(sys.modules, "wandb", Broken(broken, lambda *args, **kwargs: release.wait()))
    monkeypatch.setattr(WandB, "patience", 0.05)
    logger = WandB()
    mirror(logger, tmp_path / "run", range(100))
    logger.finish("finished")
    release.set()
    (warning,) = warned(caplog)
    assert "did not finish" in warning
    later = WandB()
    mirror(later, tmp_path / "later", range(100))
    later.finish("finished")
    assert not later.is_complete, "a later run of this process does not wait again"
    assert len(warned(caplog)) == 1


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("logger.project=a/b", r"logger\.project='a/b': the name of a W&B project has no /"),
        (f"logger.project={'a' * 129}", "the name of a W&B project has at most 128 characters, this one has 129"),
        ("logger.tags=['']", r"logger\.tags.*: a W&B tag has 1 to 64 characters, this one has 0"),
        (f"logger.tags=[a,{'b' * 65}]", r"logger\.tags.*: a W&B tag has 1 to 64 characters, this one has 65"),
    ],
    ids=["slash", "long project", "empty tag", "long tag"],
)
def test_names_that_wandb_refuses_are_refused_before_training(tiny: TinyRuns, setting: str, message: str) -> None:
    with pytest.raises(MamlError, match=message):
        tiny.config("logger=wandb", setting)
    tiny.config("logger=wandb", f"logger.project={'a' * 128}", f"logger.tags=[{'b' * 64}]")


def test_importing_the_logger_does_not_import_wandb() -> None:
    command = (
        "import sys, maml.logger.wandb, maml.logger.tensorboard; assert not {'wandb', 'tensorboard'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", command], check=True, cwd=Path(__file__).parents[2])
