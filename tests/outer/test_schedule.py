"""Schedules of the outer step size against PyTorch's optimizers with the same factors."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from maml.errors import MamlError
from maml.outer.adam import Adam
from maml.outer.schedule import Cosine, Steps
from maml.outer.sgd import SGD
from tests.outer.test_first_order import assert_close, ours, torchs


@pytest.mark.parametrize(
    ("schedule", "factor"),
    [
        (Cosine(8), lambda done: (1 + math.cos(math.pi * min(done / 8, 1))) / 2),
        (Cosine(8, final=0.1), lambda done: 0.1 + 0.9 * (1 + math.cos(math.pi * min(done / 8, 1))) / 2),
        (Cosine(8, warm_up=3), lambda done: min((done + 1) / 3, 1) * (1 + math.cos(math.pi * min(done / 8, 1))) / 2),
        (Steps(5, 0.5), lambda done: 0.5 ** (done // 5)),
    ],
)
def test_schedule_multiplies_the_step_size(schedule: Cosine | Steps, factor: Callable[[int], float]) -> None:
    expected = torchs(lambda values: torch.optim.AdamW(values, 0.1, weight_decay=0.2, eps=1e-12), factor=factor)
    assert_close(ours(Adam(0.1, weight_decay=0.2, eps=1e-12, schedule=schedule)), expected)
    expected = torchs(lambda values: torch.optim.SGD(values, 0.1), factor=factor)
    assert_close(ours(SGD(0.1, num_iterations=1, schedule=schedule)), expected)


@pytest.mark.parametrize("warm_up", [8, 9])
def test_warm_up_that_never_ends_is_refused(warm_up: int) -> None:
    with pytest.raises(
        MamlError, match=rf"outer\.schedule\.warm_up={warm_up}: .* rise during all 8 updates; set fewer"
    ):
        Cosine(8, warm_up=warm_up)


def test_schedules_allow_a_run_without_iterations() -> None:
    done = torch.zeros((), dtype=torch.float64)
    assert Cosine(0).factor(done).item() == 1
    assert float(SGD(0.5, num_iterations=0, final_step_size=0.0).rate(done)) == 0.5
