"""Adaptation by Adam against torch's Adam, whose epsilon is converted to ours."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from maml.errors import MamlError
from maml.inner.adam import Adam
from maml.types import Params
from tests.runs import TinyRuns

STEP_SIZE, EPS = 0.1, 0.05  # an epsilon so large that its position in the formula matters


def adam(betas: tuple[float, float] = (0.0, 0.999)) -> Adam:
    return Adam(step_size=STEP_SIZE, num_steps=1, order=1, adapt=["x", "m"], betas=betas, eps=EPS)


def loss(params: Params, step: int) -> Tensor:
    """A loss that depends on the task and on the step."""
    weights = torch.tensor([1.0, -2.0, 0.01], dtype=torch.float64)
    vector = (weights * (params["x"] - step) ** 3).sum(1)
    return vector + (params["m"] ** 2).sum((1, 2)) + 0 * params["fixed"].sum(1)


def start() -> Params:
    return {
        "x": torch.tensor([[1.0, 2.0, 3.0], [-1.0, 0.5, 8.0]], dtype=torch.float64),
        "m": torch.tensor([[[1.0], [0.1]], [[-2.0], [1e-3]]], dtype=torch.float64),
        "fixed": torch.ones(2, 1, dtype=torch.float64),
    }


@pytest.mark.parametrize("betas", [(0.0, 0.999), (0.9, 0.999)])
def test_steps_of_each_task_equal_the_librarys(betas: tuple[float, float]) -> None:
    steps = [params for params, _ in adam(betas).adapt(loss, start(), 6, create_graph=False)]
    for task in range(2):
        params = {name: value[task : task + 1].clone().requires_grad_() for name, value in start().items()}
        optimizer = torch.optim.Adam([params["x"], params["m"]], lr=STEP_SIZE, betas=betas)
        for step in range(6):
            # torch adds epsilon after the bias correction, we add it before.
            optimizer.param_groups[0]["eps"] = EPS / math.sqrt(1 - betas[1] ** (step + 1))
            optimizer.zero_grad()
            loss(params, step).sum().backward()
            optimizer.step()
            for name, value in params.items():
                torch.testing.assert_close(steps[step + 1][name][task : task + 1], value, rtol=1e-12, atol=1e-12)


def test_state_of_one_task_does_not_touch_another() -> None:
    *_, (together, state) = adam().adapt(loss, start(), 4, create_graph=False)
    for task in range(2):
        alone = {name: value[task : task + 1] for name, value in start().items()}
        *_, (params, own) = adam().adapt(loss, alone, 4, create_graph=False)
        assert all(torch.equal(together[name][task : task + 1], value) for name, value in params.items())
        assert all(torch.equal(state[name][task : task + 1], value) for name, value in own.items())


@pytest.mark.parametrize("betas", [(0.0, 0.999), (0.9, 0.999)])
def test_state_handed_over_goes_on_exactly(betas: tuple[float, float]) -> None:
    *_, (whole, end) = adam(betas).adapt(loss, start(), 5, create_graph=False)
    *_, (params, state) = adam(betas).adapt(loss, start(), 2, create_graph=False)
    assert state["step"].tolist() == [2.0, 2.0]
    handed_over = {name: value.clone() for name, value in state.items()}
    rest = adam(betas).adapt(lambda params, step: loss(params, step + 2), params, 3, create_graph=False, state=state)
    *_, (params, last) = rest
    assert all(torch.equal(params[name], value) for name, value in whole.items())
    assert all(torch.equal(last[name], value) for name, value in end.items())
    assert all(torch.equal(state[name], value) for name, value in handed_over.items()), "and is left as it was"


def test_step_sizes_of_the_evaluation_take_their_place() -> None:
    *_, (twice, _) = adam().adapt(loss, start(), 1, create_graph=False, step_sizes=[2 * STEP_SIZE])
    *_, (once, _) = adam().adapt(loss, start(), 1, create_graph=False)
    torch.testing.assert_close(twice["x"] - start()["x"], 2 * (once["x"] - start()["x"]), rtol=1e-12, atol=0.0)


def test_second_order_is_refused(tiny: TinyRuns) -> None:
    with pytest.raises(MamlError, match=r"inner\.order=2: input should be 1"):
        tiny.config("inner=adam", "inner.order=2")
