"""Sinusoid tasks against section 5.1."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from maml.domain.sinusoid import Sinusoid
from maml.errors import MamlError
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


def obvious_authors_bank(num_shots: int) -> list[tuple[float, float, np.ndarray]]:
    """The authors' test loop: amplitude, phase and inputs of each of 600 batches of one sinusoid."""
    np_random = np.random.RandomState(1)
    tasks = []
    for _ in range(600):
        amplitude = np_random.uniform(0.1, 5.0, [1])[0]
        phase = np_random.uniform(0, np.pi, [1])[0]
        inputs = np_random.uniform(-5.0, 5.0, [2 * num_shots, 1])
        tasks.append((amplitude, phase, inputs))
    return tasks


@pytest.mark.parametrize("num_shots", [5, 10, 20])
def test_authors_bank_is_that_of_their_code(num_shots: int) -> None:
    domain = Sinusoid(oracle=True)
    bank = domain.authors_test_tasks(600, num_shots)
    support, query = domain.data(bank, "support"), domain.data(bank, "query")
    for task, (amplitude, phase, inputs) in enumerate(obvious_authors_bank(num_shots)):
        for data, x in ((support, inputs[:num_shots]), (query, inputs[num_shots:])):
            expected = np.concatenate([x, np.full_like(x, amplitude), np.full_like(x, phase)], axis=1)
            np.testing.assert_allclose(data.x[task], expected, rtol=1e-6)
            np.testing.assert_allclose(data.y[task], amplitude * np.sin(x - phase), rtol=1e-4, atol=1e-5)
    first = domain.authors_test_tasks(3, num_shots)
    assert all(torch.equal(value[:3], first[name]) for name, value in bank.items())


def test_zero_function_on_the_authors_bank_scores_4_095() -> None:
    domain = Sinusoid()
    query = domain.data(domain.authors_test_tasks(600, 5), "query")
    assert domain.loss(torch.zeros_like(query.y), query)[0].mean().item() == pytest.approx(4.095, abs=5e-4)


def test_more_tasks_than_the_authors_bank_has_are_refused() -> None:
    with pytest.raises(MamlError, match=r"600 sinusoids, but evaluation\.num_tasks=601"):
        Sinusoid().authors_test_tasks(601, 5)
