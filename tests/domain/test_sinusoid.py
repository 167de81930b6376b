"""Sinusoid tasks against section 5.1."""

from __future__ import annotations

import math

import torch

from maml.domain.sinusoid import Sinusoid
from maml.model.mlp import MLP
from maml.seeding import Stream

MODEL = MLP((1,), 1, [4])


def test_tasks_have_the_papers_ranges() -> None:
    tasks = Sinusoid(num_shots=10).sample_tasks(5000, Stream(0))
    for name, low, high in (("amplitude", 0.1, 5.0), ("phase", 0.0, math.pi), ("support_x", -5.0, 5.0)):
        values = tasks[name]
        assert low <= values.min() < low + 0.01 * (high - low)
        assert high - 0.01 * (high - low) < values.max() <= high
        assert abs(values.mean() - (low + high) / 2) < 0.02 * (high - low)


def test_targets_are_the_tasks_sinusoid() -> None:
    domain = Sinusoid(num_shots=3, num_query=7)
    tasks = domain.sample_tasks(2, Stream(1))
    query = domain.data(tasks, "query")
    assert query.x.shape == query.y.shape == (2, 7, 1)
    for task in range(2):
        for point in range(7):
            amplitude, phase = tasks["amplitude"][task].item(), tasks["phase"][task].item()
            expected = amplitude * math.sin(query.x[task, point].item() - phase)
            assert math.isclose(query.y[task, point].item(), expected, rel_tol=1e-4, abs_tol=1e-5)


def test_splits_and_roles_share_no_points() -> None:
    domain = Sinusoid()
    train, test = (domain.sample_tasks(3, Stream(0), split) for split in ("train", "test"))
    assert not torch.isin(train["support_x"], test["support_x"]).any()
    assert not torch.isin(train["support_x"], train["query_x"]).any()


def test_loss_is_the_mean_squared_error_per_task() -> None:
    domain = Sinusoid()
    data = domain.data(domain.sample_tasks(2, Stream(0)), "support")
    outputs = torch.zeros_like(data.y)
    losses, _ = domain.loss(outputs, data)
    assert torch.allclose(losses, torch.stack([sum(y**2 for y in task) / len(task) for task in data.y]).squeeze(-1))


def test_step_zero_is_measured_on_the_support_points() -> None:
    domain = Sinusoid()
    params = {name: value.unsqueeze(0) for name, value in MODEL.init(Stream(2)).items()}
    tasks = domain.sample_tasks(1, Stream(0))
    support, query = (domain.data(tasks, role) for role in ("support", "query"))
    before = domain.measure(MODEL, params, support, query, step=0)["mse"]
    after = domain.measure(MODEL, params, support, query, step=1)["mse"]
    assert torch.equal(before, domain.inner_loss(MODEL, params, support))
    assert torch.equal(after, domain.inner_loss(MODEL, params, query))
