"""The code that all models share: initial weights, and a linearization that works for any model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from maml.model.base import Model, glorot_uniform
from maml.seeding import Stream
from maml.types import Params


def test_glorot_weights_are_uniform_with_variance_two_over_the_fans() -> None:
    weights = glorot_uniform(Stream(0), (300, 200), fan_in=200, fan_out=300)
    bound = (6 / 500) ** 0.5
    assert 0.999 * bound < weights.abs().max() <= bound
    assert weights.mean().item() == pytest.approx(0.0, abs=0.002)
    assert weights.square().mean().item() == pytest.approx(2 / 500, rel=0.02)
    assert torch.equal(weights, glorot_uniform(Stream(0), (300, 200), fan_in=200, fan_out=300))


class Cubic(Model):
    """The output is w x^3 of each input."""

    def init(self, stream: Stream) -> Params:
        return {"w": stream.normal((1,))}

    def __call__(self, params: Params, x: Tensor, num_reference: int | None = None) -> Tensor:
        return params["w"].unsqueeze(1) ** 2 * x**3


def test_linearization_of_any_model_is_its_own_derivative() -> None:
    """d/dw of w^2 x^3 is 2 w x^3, for each task with its own w and x."""
    params = {"w": torch.tensor([[3.0], [-1.0]], dtype=torch.float64)}
    x = torch.tensor([[[1.0], [2.0]], [[0.5], [-1.0]]], dtype=torch.float64)
    linear = Cubic().linearize(params, x)
    direction = {"w": torch.tensor([[0.25], [2.0]], dtype=torch.float64)}
    torch.testing.assert_close(linear.jvp(direction), 2 * (params["w"] * direction["w"]).unsqueeze(1) * x**3)
    delta = torch.tensor([[[1.0], [-2.0]], [[0.5], [3.0]]], dtype=torch.float64)
    per_task = (delta * x**3).sum(1)
    torch.testing.assert_close(linear.vjp(delta)["w"], 2 * params["w"] * per_task)
    # The Hessian of delta * outputs, which is linear in the outputs.
    curved = linear.hessian(delta, torch.zeros_like)(direction)
    torch.testing.assert_close(curved["w"], 2 * direction["w"] * per_task)
