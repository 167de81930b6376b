"""Exported checkpoints and their verification: a committed cell, and all errors that a cell can have."""

from __future__ import annotations

import json
import math
import runpy
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from maml.config.paths import CHECKPOINTS
from maml.curve import Curve
from maml.domain.base import Domain, without_data
from maml.domain.omniglot import Omniglot
from maml.domain.sinusoid import Sinusoid
from maml.errors import MamlError
from maml.evaluation import Evaluation
from maml.paper.cells import named_sources
from maml.paper.evidence import find_evidence
from maml.record import checkpoint
from maml.record.exported import CommittedNumber, read_index, read_parameters, unpack
from maml.record.index import SUPERSEDED, find_runs
from tests.paper.fake_runs import make_run, make_run_with_checkpoint
from tests.runs import ROOT

RESULTS = ROOT / "results"
VERIFY = runpy.run_path(str(ROOT / "scripts" / "verify.py"))
EXPORT = runpy.run_path(str(ROOT / "scripts" / "export_checkpoints.py"))
CELL = "table2_multitask/MAML/K5_gradsteps_1"


@pytest.fixture
def committed(tmp_path: Path) -> Path:
    """A copy of the cell's file and its index."""
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for name in ("index.json", read_index(CHECKPOINTS).cells[CELL].file):
        shutil.copy(CHECKPOINTS / name, folder)
    return folder


def verify(folder: Path, *arguments: str) -> int:
    return VERIFY["main"]([*arguments, "--checkpoints", str(folder)])


def test_committed_cell_and_curve_are_landed_on(committed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(committed, CELL, "table2_multitask/MAML/K5_gradsteps_10", "figure6/MAML/K10", "--elsewhere") == 0
    first, second, curve, count = capsys.readouterr().out.splitlines()
    assert first.startswith(f"VERIFIED  {CELL}: 0.65334")
    assert "after 10 gradient steps" in second
    assert "10 gradient steps, with the largest difference at" in curve
    assert count == "3 of 3 verified"


def test_same_versions_and_machine_allow_no_difference(committed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here = {"versions": {"torch": torch.__version__}, "hardware": {"device": "cpu"}}
    edit_index(committed, lambda index: index["files"][index["cells"][CELL]["file"]].update(here))
    verify(committed, CELL)
    assert "every bit must be the same" in capsys.readouterr().out
    mean = read_index(committed).cells[CELL].numbers[1].mean
    assert mean is not None
    edit_index(committed, lambda index: index["cells"][CELL]["numbers"]["1"].update(mean=math.nextafter(mean, 1.0)))
    verdicts = [verify(committed, CELL), verify(committed, CELL, "--elsewhere")]
    assert verdicts == [1, 0]


def test_changed_number_fails(committed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit_index(committed, lambda index: index["cells"][CELL]["numbers"]["1"].update(mean=0.67))
    assert verify(committed, CELL) == 1
    said = capsys.readouterr().out
    assert said.startswith(f"FAILED  {CELL}: after 1 gradient step it is 0.65334")
    assert "0.67 is committed. They differ by 0.0167;" in said


def test_wrong_hash_missing_and_damaged_files_fail(committed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = committed / read_index(committed).cells[CELL].file
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert verify(committed, CELL) == 1
    assert "has a wrong hash: its SHA-256 is " in capsys.readouterr().out
    path.unlink()
    assert verify(committed, CELL) == 1
    assert "cannot be read" in capsys.readouterr().out
    (committed / "index.json").write_text('{"cells": {"a": {}}}')
    with pytest.raises(MamlError, match=r"index.json is damaged \(cells.a"):
        verify(committed, CELL)


def test_other_bank_run_or_evaluation_fails(committed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes: dict[str, Callable[[Any], object]] = {
        "the task bank is different": lambda index: index["cells"][CELL].update(bank="0"),
        "the evaluation settings of sinusoid_10shot in conf/ have changed": lambda index: index["cells"][CELL][
            "evaluation"
        ].update({"evaluation.bank_seed": 1}),
        "no longer has run id": lambda index: index["cells"][CELL].update(overrides=["inner.step_size=0.02"]),
    }
    original = (committed / "index.json").read_text()
    for message, change in changes.items():
        edit_index(committed, change)
        assert verify(committed, CELL) == 1
        assert message in capsys.readouterr().out
        (committed / "index.json").write_text(original)


@pytest.mark.parametrize(
    "override",
    [
        "evaluation={_target_: shutil.copyfile, src: index.json, dst: left}",
        "+x._target_=os.system",
        "hydra.run.dir=left",
    ],
)
def test_index_that_asks_for_more_than_a_setting_fails(
    override: str, committed: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(committed)
    edit_index(committed, lambda index: index["cells"][CELL].update(overrides=[override]))
    assert verify(committed, CELL) == 1
    assert f"index.json has the override {override!r}. Only numbers and options of" in capsys.readouterr().out
    assert not Path("left").exists()


def test_cells_without_a_checkpoint_say_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, message in {
        "table2_multitask/MAML/K5_gradstep_1": f"there is no cell .*Did you mean {CELL}",
        "table1_omniglot/MANN_noconv/5way_1shot": r"train.py \+experiment=omniglot_sequence_mann, then",
        "table5_cheetah_dir/MAML/gradsteps_1": r"train.py \+experiment=cheetah_direction_maml, then",
    }.items():
        with pytest.raises(MamlError, match=message):
            verify(tmp_path, name)
    for arguments in [[], [CELL, "--all"]]:
        with pytest.raises(SystemExit):
            verify(tmp_path, *arguments)
    capsys.readouterr()


def judged(domain: Domain[Any], values: Tensor, committed: float | None, ci95: float = 0.0) -> bool:
    """Judges one gradient step as on another machine."""
    evaluation = Evaluation(num_tasks=len(values), num_steps=0)
    algorithm = SimpleNamespace(domain=domain, stream=SimpleNamespace(device=torch.device("cpu")))
    reevaluation = VERIFY["Reevaluation"](Curve(1, "it", values.double()[None]), algorithm, evaluation, ["torch"])
    return VERIFY["judge"]({0: CommittedNumber(mean=committed, ci95=ci95)}, reevaluation)[0]


def test_another_machine_may_differ_by_one_query_image_in_600_tasks() -> None:
    with without_data():
        domain = Omniglot(num_ways=5, num_shots=1, data_dir="", cache_dir="")
    right = torch.full((600,), 0.8)
    committed = right.double().mean().item()
    for images, good in {0: True, 1: True, 2: False}.items():
        values = right.clone()
        values[:images] = 0.6
        assert judged(domain, values, committed) is good


def test_another_machine_may_differ_by_float_tolerance_or_the_interval_of_rollouts() -> None:
    errors = torch.tensor([1.0, 3.0])
    assert [judged(Sinusoid(), errors, mean) for mean in (2.0, 2.0001, 1.9999, 2.001)] == [True, True, True, False]
    policy: Any = SimpleNamespace(on_policy=True)
    assert [judged(policy, errors, mean, ci95=0.3) for mean in (2.0, 2.29, 2.31)] == [True, True, False]
    diverged = torch.tensor([1.0, torch.inf])
    assert [judged(Sinusoid(), *pair) for pair in [(diverged, None), (diverged, 2.0), (errors, None)]] == [
        True,
        False,
        False,
    ]


def export(root: Path, *runs_dirs: Path, status: int = 0) -> dict[str, bytes]:
    out = root / "exported"
    assert EXPORT["main"](["--runs-dir", *map(str, runs_dirs), "--out", str(out)]) == status
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


def test_export_takes_the_lowest_seed_and_gives_equal_bytes(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    make_run_with_checkpoint(runs, seed=1, mean=2.0)
    add_execution(make_run_with_checkpoint(runs, seed=0, mean=1.0))
    first = export(tmp_path, runs)
    (file,) = (name for name in first if name != "index.json")
    index = read_index(tmp_path / "exported")
    about, cell = index.files[file], index.cells[CELL]
    assert (about.seed, about.iteration, about.hardware["cpu"]) == (0, 70_000, "Abacus")
    assert (cell.file, cell.bank, cell.numbers) == (file, "5a", {1: CommittedNumber(mean=1.0, ci95=0.1)})
    assert sorted(index.cells["figure6/MAML/K5"].numbers) == list(range(10))
    saved = checkpoint.load(runs / "sinusoid_10shot" / about.run_id / "checkpoint.pt")["state"]
    state = unpack(tmp_path / "exported" / file, about.sha256)
    assert list(state) == ["theta"]
    assert all(torch.equal(value, saved["theta"][name]) for name, value in state["theta"].items())
    assert export(tmp_path, runs) == first
    (tmp_path / "exported" / "of_the_user.safetensors").touch()
    assert export(tmp_path, runs) == first | {"of_the_user.safetensors": b""}


def test_export_keeps_what_has_no_checkpoint_any_more(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare, whole = tmp_path / "bare", tmp_path / "whole"
    add_execution(make_run(bare, done=300))
    assert list(export(tmp_path, bare, status=1)) == ["index.json"]
    error = capsys.readouterr().err
    assert CELL in error and "have no checkpoint.pt of run" in error
    add_execution(make_run_with_checkpoint(whole, done=300))
    first = export(tmp_path, bare, whole)
    (about,) = read_index(tmp_path / "exported").files.values()
    assert (about.iteration, about.num_iterations) == (300, 70_000)
    assert export(tmp_path, bare) == first
    (path,) = (tmp_path / "exported").glob("*.safetensors")
    path.write_bytes(b"")
    export(tmp_path, bare, status=1)
    assert "has a wrong hash" in capsys.readouterr().err


def test_export_never_takes_the_parameters_of_another_machine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add_execution(make_run(tmp_path / "ours", mean=1.0))
    add_execution(make_run_with_checkpoint(tmp_path / "theirs", mean=2.0))  # the same seed, and so the same id
    assert list(export(tmp_path, tmp_path / "ours", tmp_path / "theirs", status=1)) == ["index.json"]
    assert "have no checkpoint.pt of run" in capsys.readouterr().err


def test_export_keeps_what_it_does_not_see(tmp_path: Path) -> None:
    add_execution(make_run_with_checkpoint(tmp_path / "runs"))
    first = export(tmp_path, tmp_path / "runs")
    assert len(first) == 2
    (tmp_path / "empty").mkdir()
    assert export(tmp_path, tmp_path / "empty") == first
    (record,) = (tmp_path / "runs").glob("*/*/run.json")
    record.write_text("{")
    assert export(tmp_path, tmp_path / "runs", status=1) == first


def test_export_keeps_a_number_whose_run_is_trained_again_and_drops_a_superseded_one(tmp_path: Path) -> None:
    run = make_run_with_checkpoint(tmp_path / "runs")
    add_execution(run)
    first = export(tmp_path, tmp_path / "runs")
    make_run(tmp_path / "training", evaluated=False, status="running")
    assert export(tmp_path, tmp_path / "training") == first
    (run / SUPERSEDED).write_text(json.dumps({"by": "", "reason": "a mistake"}))
    assert list(export(tmp_path, tmp_path / "runs")) == ["index.json"]


def test_parameters_that_are_too_large_stay_in_their_run_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(EXPORT["main"].__globals__, "MAX_BYTES", 10)
    elsewhere, runs = tmp_path / "elsewhere", tmp_path / "runs"
    add_execution(make_run_with_checkpoint(elsewhere, done=300))
    assert list(export(tmp_path, elsewhere, status=1)) == ["index.json"]
    assert "but at most 10 are exported; copy" in capsys.readouterr().err
    shutil.copytree(elsewhere, runs)
    first = export(tmp_path, runs)
    assert list(first) == ["index.json"]
    ((file, origin),) = read_index(tmp_path / "exported").files.items()
    assert origin.run == f"sinusoid_10shot/{origin.run_id}"
    saved = checkpoint.load(runs / origin.run / "checkpoint.pt")["state"]
    found = read_parameters(tmp_path / "exported", file, origin)
    assert all(torch.equal(value, saved["theta"][name]) for name, value in found["theta"].items())
    assert export(tmp_path, runs) == first


def test_committed_index_says_what_the_committed_reports_say() -> None:
    runs, damaged = find_runs(RESULTS / "runs")
    index, sources = read_index(CHECKPOINTS), named_sources(RESULTS)
    assert not damaged
    evaluated = {name for name, (source, _) in sources.items() if find_evidence(source, runs).evaluated}
    assert set(index.cells) == evaluated, "run scripts/export_checkpoints.py"
    for name, entry in index.cells.items():
        source, steps = sources[name]
        _, report = find_evidence(source, runs).evaluated[0]
        assert index.files[entry.file].run_id == report.run_id
        for step in steps:
            mean, ci95 = report.reading(replace(source, scale=1.0), step)
            assert entry.numbers[step] == CommittedNumber(mean=mean, ci95=ci95), name
    assert max(path.stat().st_size for path in CHECKPOINTS.iterdir()) < 1_500_000
    exported = {name for name, origin in index.files.items() if origin.run is None}
    assert {path.name for path in CHECKPOINTS.glob("*.safetensors")} == exported


def add_execution(folder: Path) -> None:
    """Adds to a fake run the fields that only the export reads."""
    path = folder / "checkpoint.pt"
    if path.exists():
        checkpoint.save(path, checkpoint.load(path) | {"execution": {"num_threads": 1}})
    record = json.loads((folder / "run.json").read_text())
    record["segments"][-1]["versions"] = {"torch": "1"}
    (folder / "run.json").write_text(json.dumps(record))


def edit_index(folder: Path, change: Callable[[Any], object]) -> None:
    path = folder / "index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))
