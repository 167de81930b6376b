"""Gradient-descent adaptation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from maml.inner.sgd import SGD
from maml.types import Params

NAMES = ["conv1.weight", "conv1.bias", "norm1.shift", "head.weight"]


def sgd(adapt: list[str], num_steps: int = 1) -> SGD:
    return SGD(step_size=0.1, num_steps=num_steps, order=2, adapt=adapt)


def quadratic(params: Params, step: int) -> Tensor:
    """A loss whose gradient is a * (x - 1); it does not depend on parameter b."""
    return (0.5 * params["a"] * (params["x"] - 1) ** 2).sum(1) + 0 * params["b"].sum(1)


def start() -> Params:
    return {"x": torch.tensor([[3.0], [5.0]]), "a": torch.tensor([[1.0], [2.0]]), "b": torch.zeros(2, 1)}


def test_adapt_with_zero_steps_returns_theta() -> None:
    params = start()
    ((only, _),) = sgd(["x"]).adapt(quadratic, params, 0, create_graph=False)
    assert only is params


@pytest.mark.parametrize("create_graph", [True, False])
def test_adapt_follows_the_closed_form_of_each_task(create_graph: bool) -> None:
    steps = sgd(["x"]).adapt(quadratic, start(), 3, create_graph)
    for step, (params, _) in enumerate(steps):
        expected = torch.tensor([[1 + 2 * 0.9**step], [1 + 4 * 0.8**step]])
        torch.testing.assert_close(params["x"].detach(), expected)
        assert torch.equal(params["a"], start()["a"])


def test_adapt_takes_one_step_size_per_step() -> None:
    *_, (last, _) = sgd(["x"]).adapt(quadratic, start(), 2, create_graph=False, step_sizes=[0.5, 0.25])
    torch.testing.assert_close(last["x"].detach(), torch.tensor([[1 + 2 * 0.5 * 0.75], [1 + 4 * 0.0 * 0.5]]))


def test_adapt_inside_no_grad_still_adapts_and_leaves_theta_alone() -> None:
    params = start()
    with torch.no_grad():
        *_, (last, _) = sgd(["x"]).adapt(quadratic, params, 1, create_graph=False)
    assert not params["x"].requires_grad
    assert not torch.equal(last["x"], params["x"])
