"""The outer gradient descent against the formula, one number at a time."""

from __future__ import annotations

import pytest
import torch

from maml.outer.base import OuterState
from maml.outer.sgd import SGD
from maml.types import Params
from tests.outer.test_adam import Given

GRADIENT = {"b": torch.tensor([[-4.0]]), "a": torch.tensor([1.0, 2.0])}


def start() -> Params:
    return {"a": torch.tensor([10.0, 20.0]), "b": torch.tensor([[30.0]])}


def moves(sgd: SGD, theta: Params, state: OuterState, count: int) -> list[float]:
    """Makes updates; returns by how many gradients each moves theta."""
    moved = []
    for _ in range(count):
        before = {name: value.clone() for name, value in theta.items()}
        assert sgd.step(Given(GRADIENT), theta, state)["loss"] == 0.0
        shares = torch.cat([((before[name] - theta[name]) / GRADIENT[name]).flatten() for name in theta])
        assert shares.unique().numel() == 1
        moved.append(shares[0].item())
    return moved


@pytest.mark.parametrize(
    ("final", "expected"),
    [
        (0.0, [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]),
        (0.5, [1.0, 0.875, 0.75, 0.625, 0.5, 0.5]),
        (None, [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_step_size_falls_linearly_and_stays_at_its_end(final: float | None, expected: list[float]) -> None:
    sgd = SGD(step_size=1.0, num_iterations=4, final_step_size=final)
    theta = start()
    assert moves(sgd, theta, sgd.init_state(theta), 6) == expected


def test_copied_state_goes_on_where_it_was() -> None:
    sgd = SGD(step_size=1.0, num_iterations=4, final_step_size=0.0)
    theta = start()
    state = sgd.init_state(theta)
    moves(sgd, theta, state, 2)
    copied = {name: value.clone() for name, value in state.items()}
    assert moves(SGD(step_size=1.0, num_iterations=4, final_step_size=0.0), start(), copied, 2) == [0.5, 0.25]
