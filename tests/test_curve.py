"""Curves of meta-test: the interval is the authors', and no value per task is lost."""

from __future__ import annotations

import math

import pytest
import torch

from maml.curve import Curve, per_task_rows


def test_interval_is_the_authors() -> None:
    values = torch.tensor([[1.0, 2.0, 6.0], [1.0, math.inf, 1.0]], dtype=torch.float64)
    first, diverged = Curve(5, "mse", values).summary()["steps"]
    population_std = math.sqrt(((1 - 3) ** 2 + (2 - 3) ** 2 + (6 - 3) ** 2) / 3)
    assert first["mean"] == pytest.approx(3.0)
    assert first["ci95"] == pytest.approx(1.96 * population_std / math.sqrt(3))
    assert first["num_tasks"] == 3
    assert diverged["mean"] is None
    assert diverged["ci95"] is None


def test_per_task_rows_hold_every_value() -> None:
    rows = per_task_rows([Curve(5, "mse", torch.tensor([[1.0, 2.0], [3.0, 4.0]]))])
    assert rows == [
        {"num_shots": 5, "metric": "mse", "task": 0, "step_0": 1.0, "step_1": 3.0},
        {"num_shots": 5, "metric": "mse", "task": 1, "step_0": 2.0, "step_1": 4.0},
    ]


def test_per_task_rows_of_several_shots_by_showing_have_the_same_columns() -> None:
    curves = [Curve(shots, "accuracy", torch.full((shots, 2), 0.5), measured_by="showing") for shots in (1, 3)]
    first, _, last, _ = per_task_rows(curves)
    assert list(first) == list(last) == ["num_shots", "metric", "task", "step_0", "step_1", "step_2"]
    assert (first["step_0"], first["step_1"], last["step_2"]) == (0.5, None, 0.5)
