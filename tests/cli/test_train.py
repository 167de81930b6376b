"""`maml train` and `maml eval` compared with `python train.py`: equal runs, recorded with their own commands."""

from __future__ import annotations

import runpy
import shlex
import sys
from pathlib import Path

import pytest

from maml.cli import main
from maml.record.run_folder import read_json
from tests.runs import ROOT, TinyRuns


def test_train_and_eval_do_what_train_py_does(tiny: TinyRuns, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))
    words = ["+experiment=sinusoid_10shot", "+debug=smoke", f"runs_dir={tiny.runs_dir}", "hardware=cpu"]
    for command in ("train", "eval"):
        monkeypatch.setattr("sys.argv", ["/v/bin/maml", command, *words])
        main()
    assert str(tmp_path) in sys.path, "classes in the user's folder can be imported"
    (folder,) = tiny.runs_dir.glob("sinusoid_10shot/*")
    record = read_json(folder / "run.json")
    assert record
    assert record["status"] == "finished"
    assert record["command"] == shlex.join(["maml", "train", *words])
    report = (folder / "report.json").read_bytes()

    monkeypatch.setattr("sys.argv", ["train.py", *words[:2], f"runs_dir={tmp_path / 'other'}", words[3]])
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    (other,) = (tmp_path / "other").glob("sinusoid_10shot/*/report.json")
    assert other.read_bytes() == report
