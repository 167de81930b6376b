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

from maml.logger.wandb import WandB

CONFIG = {"inner": {"step_size": 0.01, "num_steps": 1}, "seed": None}
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
    content: dict[str, Any] = {"file": file, "config": {}, "history": [], "summary": {}, "metrics": {}, "artifacts": []}
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
    assert list(content["run"].tags) == ["tag"]
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
    table = json.loads((files / content["history"][-1]["evaluation.path"]).read_text())
    assert table["columns"] == ["metric", "num_shots", "step", "mean", "ci95", "num_tasks"]
    assert table["data"] == [["mse", 10, 0, 3.25, 0.125, 600], ["mse", 10, 1, 0.5, 0.0625, 600]]
    assert (files / content["history"][-1]["pictures/curve.path"]).read_bytes() == picture.read_bytes()
    assert not warned(caplog)
    assert capfd.readouterr() == ("", "")


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


def test_importing_the_logger_does_not_import_wandb() -> None:
    command = (
        "import sys, maml.logger.wandb, maml.logger.tensorboard; assert not {'wandb', 'tensorboard'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", command], check=True, cwd=Path(__file__).parents[2])
