"""Meta-test: the frozen bank, the interval, the two accuracies."""

from __future__ import annotations

import math

import pytest
import torch

from maml.algorithm.maml import MAML
from maml.domain.sinusoid import Sinusoid
from maml.errors import MamlError
from maml.evaluation import Curve, Evaluation, bank_hash, per_task_rows
from maml.inner.sgd import SGD
from maml.model.mlp import MLP
from maml.outer.adam import Adam
from maml.seeding import Stream


def sinusoid(seed: int = 0, chunk: int | None = None) -> MAML:
    inner = SGD(step_size=0.01, num_steps=1, order=2, adapt=["*"])
    return MAML(Sinusoid(), MLP((1,), 1, [40, 40]), inner, Adam(), Stream(seed), chunk)


def test_bank_is_frozen() -> None:
    _, banks = Evaluation(num_tasks=600, num_steps=0, num_shots=[5, 10])(sinusoid())
    assert banks == {"5": "7c2ad5c08e7bf2d0", "10": "d7f95fefde4f5634"}


def test_bank_depends_on_neither_seed_nor_chunk_and_results_not_on_the_chunk() -> None:
    evaluation = Evaluation(num_tasks=7, num_steps=2)
    curves, banks = evaluation(sinusoid())
    for other in (sinusoid(chunk=3), sinusoid(chunk=1)):
        again, same = evaluation(other)
        assert same == banks
        torch.testing.assert_close(again[0].values, curves[0].values, rtol=1e-5, atol=1e-6)
    assert evaluation(sinusoid(seed=1))[1] == banks


@pytest.mark.parametrize("change", [{"bank_seed": 1}, {"split": "val"}, {"num_query": 3}, {"num_shots": [4]}])
def test_bank_follows_its_settings(change: dict[str, object]) -> None:
    domain = Sinusoid()
    first, other = (Evaluation(**{"num_tasks": 5, "num_steps": 0} | extra) for extra in ({}, change))  # type: ignore[arg-type]
    shots = (other.num_shots or [10])[0]
    assert bank_hash(first.bank(domain, 10)) != bank_hash(other.bank(domain, shots))


def test_curve_equals_adaptation_by_hand() -> None:
    algorithm = sinusoid()
    evaluation = Evaluation(num_tasks=3, num_steps=2, step_size=[0.1, 0.05])
    (curve,), _ = evaluation(algorithm)
    bank = evaluation.bank(algorithm.domain, 10)
    for task in range(3):
        params = {name: value.clone().requires_grad_() for name, value in algorithm.theta.items()}
        only = {name: value[task : task + 1] for name, value in bank.items()}
        for step, step_size in enumerate([0.1, 0.05, 0.0]):
            role = "query" if step else "support"
            data = algorithm.domain.collect(only, role, algorithm.model, params)  # type: ignore[arg-type]
            batched = {name: value.unsqueeze(0) for name, value in params.items()}
            error = ((algorithm.model(batched, data.x) - data.y) ** 2).mean().item()
            assert curve.values[step, task].item() == pytest.approx(error, rel=1e-4)
            support = algorithm.domain.collect(only, "support", algorithm.model, params)
            loss = ((algorithm.model(batched, support.x) - support.y) ** 2).mean()
            gradients = torch.autograd.grad(loss, list(params.values()))
            params = {
                name: (value - step_size * gradient).detach().requires_grad_()
                for (name, value), gradient in zip(params.items(), gradients, strict=True)
            }


def test_interval_is_the_authors() -> None:
    values = torch.tensor([[1.0, 2.0, 6.0], [1.0, math.inf, 1.0]], dtype=torch.float64)
    first, diverged = Curve(5, "mse", values).summary()["steps"]
    population_std = math.sqrt(((1 - 3) ** 2 + (2 - 3) ** 2 + (6 - 3) ** 2) / 3)
    assert first["mean"] == pytest.approx(3.0)
    assert first["ci95"] == pytest.approx(1.96 * population_std / math.sqrt(3))
    assert first["num_tasks"] == 3
    assert diverged["mean"] is None
    assert diverged["ci95"] is None


def test_per_task_rows_hold_every_value() -> None:
    rows = per_task_rows([Curve(5, "mse", torch.tensor([[1.0, 2.0], [3.0, 4.0]]))])
    assert rows == [
        {"num_shots": 5, "metric": "mse", "task": 0, "step_0": 1.0, "step_1": 3.0},
        {"num_shots": 5, "metric": "mse", "task": 1, "step_0": 2.0, "step_1": 4.0},
    ]


def test_evaluation_leaves_theta_as_it_was() -> None:
    algorithm = sinusoid()
    before = {name: value.clone() for name, value in algorithm.theta.items()}
    Evaluation(num_tasks=3, num_steps=3)(algorithm)
    assert all(torch.equal(algorithm.theta[name], value) for name, value in before.items())
    assert not any(value.requires_grad for value in algorithm.theta.values())


def test_settings_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(MamlError, match=r"lists 2 sizes for evaluation\.num_steps=3"):
        Evaluation(num_tasks=1, num_steps=3, step_size=[0.1, 0.1])
    with pytest.raises(MamlError, match="names a K twice"):
        Evaluation(num_tasks=1, num_steps=3, num_shots=[5, 5])
