"""The benchmark of meta-RL in its quick mode: its files, and the sum of its phases."""

from __future__ import annotations

import csv
import importlib
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from maml.hardware import base, products
from tests.runs import ROOT

pytest.importorskip("mujoco")

PHASES = ("sampling", "advantages and adaptation", "gradient", "curvature", "conjugate gradient", "line search", "rest")
SHAPES = ("ant", "point", "point_exact")


def test_measured_meta_iteration_has_the_switches_of_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    monkeypatch.setattr(base, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(products, "_use_onednn", False)
    module = importlib.import_module("bench_meta_rl")
    meta_gradient = replace(module.SHAPES["point"], num_tasks=2, num_rollouts=2, horizon=10).build()
    assert meta_gradient.execution.onednn and products._use_onednn
    assert meta_gradient.execution.num_threads == torch.get_num_threads() == 1


def test_quick_run_writes_all_it_measures(tmp_path: Path) -> None:
    """In a separate process, because the benchmark restricts its process to one core."""
    command = [sys.executable, "scripts/bench_meta_rl.py", "--quick", "--shapes", *SHAPES, "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    written = (folder / "meta_rl.md").read_text()
    assert written in done.stdout
    assert "ant_velocity_maml, meta-iteration 2 of 2: " in done.stdout.split("# Time and memory")[0]
    assert "met (" not in written and "missed (" not in written  # bars are for the full sizes

    rows = list(csv.DictReader((folder / "meta_rl.csv").read_text().splitlines()))
    assert all(row["commit"] and row["command"] and row["hardware"] for row in rows)
    assert [written.count(f"\n| {shape} | 2 x 2 x 10 |") for shape in SHAPES] == [2, 2, 1]
    for shape in SHAPES:
        medians = {row["what"]: float(row["median"]) for row in rows if row["shape"] == shape}
        phases = [medians[f"{phase}, seconds"] for phase in PHASES]
        # With two iterations, the median is the mean.
        assert sum(phases) == pytest.approx(medians["meta-iteration, seconds"], rel=0.05)
        without = [phase for phase, seconds in zip(PHASES, phases, strict=True) if seconds == 0]
        assert without == (["curvature"] if shape == "point" else []), "finite differences prepare nothing"
        assert medians["peak memory, MiB"] > medians["memory before, MiB"] > 50
        speeds = [value for what, value in medians.items() if what.endswith("steps per second")]
        assert len(speeds) == (0 if shape == "point_exact" else 3) and all(speed > 0 for speed in speeds)
