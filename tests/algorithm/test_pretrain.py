"""Pretraining on all tasks pooled, and the oracle, whose inputs say which task it is."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from maml.algorithm.pretrain import Pretrain
from maml.config.compose import compose
from maml.config.schema import build
from maml.domain.sinusoid import Sinusoid
from maml.domain.sinusoid_sequence import SinusoidSequence
from maml.errors import MamlError
from maml.experiment import build_algorithm
from maml.inner.sgd import SGD
from maml.model.lstm import LSTM
from maml.model.mlp import MLP
from maml.seeding import Stream
from maml.types import Params, Tasks
from tests import algorithms, plain_maml
from tests.algorithms import build_from


def make(oracle: bool = False, chunk: int | None = None) -> tuple[Pretrain, Params, Tasks]:
    """Builds a float64 problem. Theta is larger than usual, because the usual theta's gradients are rounding noise."""
    domain = Sinusoid(num_shots=4, num_query=3, oracle=oracle)
    inner = SGD(step_size=0.1, num_steps=1, order=2, adapt=["*"])
    algorithm = build_from(Pretrain, domain, MLP(domain.in_shape, 1, [6, 5]), inner)
    theta = {
        name: Stream(1).child(name).uniform(value.shape, -0.5, 0.5, dtype=torch.float64)
        for name, value in algorithm.theta.items()
    }
    return algorithm, theta, {name: value.double() for name, value in domain.sample_tasks(7, Stream(2)).items()}


def assert_gradient_is_that_of_the_pooled_loss(
    algorithm: Pretrain, theta: Params, x: torch.Tensor, tasks: Tasks
) -> None:
    y = tasks["amplitude"] * torch.sin(tasks["support_x"] - tasks["phase"])
    leaves = {name: value.clone().requires_grad_() for name, value in theta.items()}
    loss = F.mse_loss(plain_maml.mlp(leaves, x.flatten(0, 1)), y.flatten(0, 1))
    expected = torch.autograd.grad(loss, list(leaves.values()))
    gradient, metrics = algorithms.gradient(algorithm, theta, tasks)
    torch.testing.assert_close(metrics["loss"], loss, rtol=1e-12, atol=0.0)
    for name, value in zip(leaves, expected, strict=True):
        torch.testing.assert_close(gradient[name], value, rtol=1e-12, atol=1e-12)


def test_gradient_is_that_of_one_network_on_all_support_points() -> None:
    for chunk in (None, 3):
        algorithm, theta, tasks = make(chunk=chunk)
        assert_gradient_is_that_of_the_pooled_loss(algorithm, theta, tasks["support_x"], tasks)


def test_query_points_are_never_looked_at() -> None:
    algorithm, theta, tasks = make()
    gradient, metrics = algorithms.gradient(algorithm, theta, tasks)
    unknown = tasks | {"query_x": torch.full_like(tasks["query_x"], torch.nan)}
    again, same = algorithms.gradient(algorithm, theta, unknown)
    assert all(torch.equal(again[name], value) for name, value in gradient.items())
    assert torch.equal(same["loss"], metrics["loss"])


def test_oracle_sees_amplitude_and_phase_beside_each_point() -> None:
    algorithm, theta, tasks = make(oracle=True)
    told = torch.cat([tasks["amplitude"], tasks["phase"]], dim=-1).expand(-1, 4, -1)
    x = torch.cat([tasks["support_x"], told], dim=-1)
    assert_gradient_is_that_of_the_pooled_loss(algorithm, theta, x, tasks)


def test_oracle_is_measured_on_the_usual_bank_before_any_step() -> None:
    banks = []
    for option in ("pretrain", "oracle"):
        config, _ = compose([f"algorithm={option}", "hardware=cpu"])
        algorithm = build_algorithm(config, build(config.hardware))
        evaluation = build({**config.evaluation, "num_tasks": 4})
        curves, hashes, _ = evaluation(algorithm)
        assert {curve.values.shape for curve in curves} == {(1 if option == "oracle" else 11, 4)}
        banks.append(hashes)
    assert algorithm.theta["linear1.weight"].shape == (40, 3)
    assert banks[0] == banks[1]


class ByShowing(SinusoidSequence):
    """Sequences that nothing adapts to, so that tasks can share weights."""

    measured_by = "showing"


def test_where_nothing_adapts_tasks_share_weights_and_have_the_same_gradient() -> None:
    inner = SGD(step_size=0.1, num_steps=0, order=1, adapt=["*"])
    shared, copied = (
        build_from(Pretrain, domain, LSTM(domain.in_shape, 1, 4), inner)
        for domain in (ByShowing(num_shots=3), SinusoidSequence(num_shots=3))
    )
    assert (shared.shares_weights, copied.shares_weights, Pretrain.shares_weights) == (True, False, False)
    assert (shared.name, copied.name) == ("LSTM", "Pretrain"), "the network is the method"
    theta = {name: value.double() for name, value in shared.theta.items()}
    tasks = {name: value.double() for name, value in shared.sample_tasks(5, Stream(1)).items()}
    one, other = (algorithms.gradient(algorithm, theta, tasks)[0] for algorithm in (shared, copied))
    for name in theta:
        torch.testing.assert_close(one[name], other[name], rtol=1e-12, atol=1e-14)
    inner.num_steps = 1
    with pytest.raises(MamlError, match=r"inner\.num_steps=1, but ByShowing measures by showing"):
        build_from(Pretrain, ByShowing(num_shots=3), LSTM(shared.domain.in_shape, 1, 4), inner)
