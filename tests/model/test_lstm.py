"""The LSTM against PyTorch's, and the meta-gradient through it against plain loops, in float64."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maml.algorithm.base import Parts
from maml.algorithm.maml import MAML
from maml.domain.sinusoid_sequence import SinusoidSequence
from maml.inner.sgd import SGD
from maml.model.lstm import LSTM
from maml.outer.adam import Adam
from maml.seeding import Stream
from maml.types import Params, Tasks, expand
from tests import algorithms, plain_maml

HIDDEN, NUM_TASKS = 7, 3


def library_lstm(params: Params, x: Tensor) -> Tensor:
    """Runs PyTorch's LSTM for one task: ``(S, L, D)`` to ``(S, out_dim)``."""
    weights = {
        "weight_ih_l0": params["input.weight"],
        "weight_hh_l0": params["hidden.weight"],
        "bias_ih_l0": params["gates.bias"],
        "bias_hh_l0": torch.zeros_like(params["gates.bias"]),
    }
    layer = nn.LSTM(x.shape[-1], HIDDEN, batch_first=True)
    _, (hidden, _) = torch.func.functional_call(layer, weights, (x,))
    return F.linear(hidden[0], params["head.weight"], params["head.bias"])


def random_params(model: LSTM, seed: int) -> Params:
    """Returns initial parameters plus noise, biases included, in float64."""
    return {
        name: value.double() + Stream(seed).child(name).uniform(value.shape, -0.4, 0.4, dtype=torch.float64)
        for name, value in model.init(Stream(seed)).items()
    }


def test_each_task_is_the_librarys_lstm_with_its_own_weights() -> None:
    model = LSTM((5, 2, 3), 4, HIDDEN)
    tasks = [random_params(model, seed) for seed in range(NUM_TASKS)]
    x = Stream(9).uniform((NUM_TASKS, 6, 5, 2, 3), -2.0, 2.0, dtype=torch.float64)
    outputs = model({name: torch.stack([task[name] for task in tasks]) for name in tasks[0]}, x)
    for task, params in enumerate(tasks):
        torch.testing.assert_close(outputs[task], library_lstm(params, x[task].flatten(2)), rtol=1e-12, atol=1e-12)


def test_a_vector_is_a_sequence_of_numbers() -> None:
    params = {name: value.unsqueeze(0) for name, value in random_params(LSTM((5,), 1, HIDDEN), 0).items()}
    x = Stream(1).uniform((1, 6, 5), dtype=torch.float64)
    assert torch.equal(LSTM((5,), 1, HIDDEN)(params, x), LSTM((5, 1), 1, HIDDEN)(params, x.unsqueeze(-1)))


def test_initial_forget_gates_are_open() -> None:
    params = LSTM((10, 1), 1).init(Stream(0))
    assert sum(value.numel() for value in params.values()) == 4 * 40 * (1 + 40 + 1) + 41
    admit, keep, candidate, emit = params["gates.bias"].chunk(4)
    assert (keep == 1).all()
    assert not torch.cat([admit, candidate, emit, params["head.bias"]]).any()


def make(num_steps: int, order: Literal[1, 2]) -> tuple[MAML, Params, Tasks]:
    domain = SinusoidSequence(num_shots=4, num_query=5, sequence_length=6)
    inner = SGD(step_size=0.3, num_steps=num_steps, order=order, adapt=["*"])
    parts = Parts(domain, lambda in_shape, out_dim: LSTM(in_shape, out_dim, HIDDEN), inner, Adam(), Stream(0))
    tasks = {name: value.double() for name, value in domain.sample_tasks(NUM_TASKS, Stream(2)).items()}
    return MAML(parts), random_params(LSTM(domain.in_shape, domain.out_dim, HIDDEN), 1), tasks


@pytest.mark.parametrize("num_steps", [1, 3])
@pytest.mark.parametrize("order", [1, 2])
def test_meta_gradient_equals_the_plain_loop(order: Literal[1, 2], num_steps: int) -> None:
    algorithm, theta, tasks = make(num_steps, order)
    gradient, metrics = algorithms.gradient(algorithm, theta, tasks, task_chunk=2)
    leaves = {name: value.clone().requires_grad_() for name, value in theta.items()}
    support, query = (algorithm.domain.data(tasks, role) for role in ("support", "query"))
    examples = list(zip(support.x, support.y, query.x, query.y, strict=True))
    loss = plain_maml.outer_loss(library_lstm, F.mse_loss, leaves, examples, 0.3, num_steps, order, list(theta))
    assert metrics["loss"].item() == pytest.approx(loss.item(), rel=1e-10)
    for name, value in zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True):
        torch.testing.assert_close(gradient[name], value, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("num_steps", [1, 3])
def test_meta_gradient_equals_finite_differences(num_steps: int) -> None:
    algorithm, theta, tasks = make(num_steps, order=2)
    gradient, _ = algorithms.gradient(algorithm, theta, tasks, task_chunk=2)
    first_order, *_ = make(num_steps, order=1)  # same loss, but cheaper: no gradient is needed
    for name, value in theta.items():
        direction = Stream(3).child(name).uniform(value.shape, -1.0, 1.0, dtype=torch.float64)

        def loss_at(offset: float, name: str = name, direction: Tensor = direction) -> float:
            moved = theta | {name: theta[name] + offset * direction}
            return first_order.task_losses(expand(moved, NUM_TASKS), tasks)[0].mean().item()

        step = 1e-3
        # A fourth-order difference: accurate enough for the tolerance.
        slope = (8 * (loss_at(step) - loss_at(-step)) - (loss_at(2 * step) - loss_at(-2 * step))) / (12 * step)
        assert (gradient[name] * direction).sum().item() == pytest.approx(slope, rel=1e-6)
