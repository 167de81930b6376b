"""The outer Adam against the formula, one number at a time."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from maml.outer.adam import Adam
from maml.outer.base import Objective
from maml.types import Params


class Given(Objective):
    """An objective with a given gradient."""

    def __init__(self, gradient: Params) -> None:
        self.given = gradient

    def gradient(self, theta: Params) -> tuple[Params, dict[str, Tensor]]:
        return self.given, {"loss": torch.tensor(0.0)}


def steps(adam: Adam, gradients: list[list[float]]) -> list[float]:
    theta = {"a": torch.tensor([1.0], dtype=torch.float64), "b": torch.tensor([[2.0]], dtype=torch.float64)}
    state = adam.init_state(theta)
    for a, b in gradients:
        given = {"b": torch.tensor([[b]], dtype=torch.float64), "a": torch.tensor([a], dtype=torch.float64)}
        adam.step(Given(given), theta, state)
    return [theta["a"].item(), theta["b"].item()]


def test_updates_equal_tensorflows_formula() -> None:
    gradients = [[0.3, -2.0], [1e-9, 1.0], [-0.5, 40.0]]
    expected = []
    for value, column in ((1.0, 0), (2.0, 1)):
        mean = square = 0.0
        for t, gradient in enumerate((row[column] for row in gradients), start=1):
            mean = 0.9 * mean + 0.1 * gradient
            square = 0.999 * square + 0.001 * gradient**2
            rate = 0.01 * math.sqrt(1 - 0.999**t) / (1 - 0.9**t)
            value -= rate * mean / (math.sqrt(square) + 1e-8)
        expected.append(value)
    assert steps(Adam(step_size=0.01), gradients) == pytest.approx(expected, rel=1e-12)


def test_clip_bounds_each_entry_of_the_gradient() -> None:
    adam = Adam(step_size=0.01, clip=10.0)
    assert steps(adam, [[0.3, -200.0], [50.0, 1.0]]) == steps(Adam(step_size=0.01), [[0.3, -10.0], [10.0, 1.0]])


def test_tiny_gradients_move_less_than_with_torchs_epsilon() -> None:
    ours = steps(Adam(step_size=0.01), [[1e-9, 1e-9]])[0]
    parameter = torch.tensor([1.0], dtype=torch.float64, requires_grad=True)
    parameter.grad = torch.tensor([1e-9], dtype=torch.float64)
    torch.optim.Adam([parameter], lr=0.01).step()
    assert abs(ours - 1.0) < 0.1 * abs(parameter.item() - 1.0)


def test_state_of_some_entries_goes_on_as_they_would_alone() -> None:
    adam, random = Adam(step_size=0.1), torch.Generator().manual_seed(0)
    gradients = [{"a": torch.randn(4, 2, generator=random), "b": torch.randn(4, 3, 1, generator=random)} for _ in "123"]
    whole = {"a": torch.ones(4, 2), "b": torch.ones(4, 3, 1)}
    state = adam.init_state(whole)
    for given in gradients[:2]:
        adam.step(Given(given), whole, state)
    which = torch.tensor([2, 0])
    part = {name: value[which].clone() for name, value in whole.items()}
    part_state = adam.select_state(state, whole, which)
    adam.step(Given(gradients[2]), whole, state)
    adam.step(Given({name: value[which] for name, value in gradients[2].items()}), part, part_state)
    for name, value in part.items():
        torch.testing.assert_close(value, whole[name][which])
