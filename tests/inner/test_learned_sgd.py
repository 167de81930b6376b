"""Meta-learnt step sizes: their place in theta, their effect, and their meta-gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from maml.algorithm.maml import MAML
from maml.errors import MamlError
from maml.inner.base import Inner
from maml.inner.learned_sgd import LearnedSGD
from maml.inner.sgd import SGD
from maml.model.functional import Activation
from maml.model.mlp import MLP
from maml.seeding import Stream
from maml.types import Params, Tasks
from tests import algorithms, plain_maml
from tests.algorithms import build_from
from tests.training.test_meta_gradient import NUM_TASKS, FixedExamples, as_list

ADAPTED = ["linear1.weight", "linear1.bias", "head.weight"]


def make(
    num_steps: int,
    order: int = 2,
    chunk: int | None = None,
    activation: Activation = "relu",
    kind: type[LearnedSGD | SGD] = LearnedSGD,
) -> tuple[MAML, Params, Tasks]:
    """Builds MAML and a theta in float64 whose entries, step sizes included, all differ."""
    domain = FixedExamples((2,), classes=False)
    inner: Inner = kind(step_size=0.3, num_steps=num_steps, order=order, adapt=["*", "!head.bias"])  # type: ignore[arg-type]
    algorithm = build_from(MAML, domain, MLP((2,), 1, [6], activation), inner)
    theta = {
        name: value.double() + Stream(1).child(name).uniform(value.shape, -0.2, 0.2, dtype=torch.float64)
        for name, value in algorithm.theta.items()
    }
    return algorithm, theta, domain.sample_tasks(NUM_TASKS, Stream(2))


def plain_outer_loss(theta: Params, tasks: Tasks, num_steps: int, order: int) -> Tensor:
    """The mean query loss, computed one task at a time."""
    total = torch.zeros((), dtype=torch.float64)
    for x, y, query_x, query_y in as_list(tasks):
        params = {name: value for name, value in theta.items() if not name.startswith("inner.")}
        for step in range(num_steps):
            loss = ((plain_maml.mlp(params, x) - y) ** 2).mean()
            gradients = torch.autograd.grad(loss, [params[name] for name in ADAPTED], create_graph=order == 2)
            for name, gradient in zip(ADAPTED, gradients, strict=True):
                params[name] = params[name] - theta[f"inner.step_size.{name}"][step] * gradient
        total = total + ((plain_maml.mlp(params, query_x) - query_y) ** 2).mean()
    return total / NUM_TASKS


def test_theta_holds_one_step_size_per_adapted_tensor_and_step() -> None:
    algorithm, *_ = make(num_steps=3)
    own = {name: value for name, value in algorithm.theta.items() if name.startswith("inner.")}
    assert list(own) == [f"inner.step_size.{name}" for name in ADAPTED]
    assert all(torch.equal(value, torch.full((3,), 0.3)) for value in own.values())


@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize("num_steps", [1, 3])
@pytest.mark.parametrize("order", [1, 2])
def test_meta_gradient_equals_the_plain_loop(order: int, num_steps: int, chunk: int | None) -> None:
    algorithm, theta, tasks = make(num_steps, order, chunk)
    gradient, metrics = algorithms.gradient(algorithm, theta, tasks)
    leaves = {name: value.clone().requires_grad_() for name, value in theta.items()}
    loss = plain_outer_loss(leaves, tasks, num_steps, order)
    expected = torch.autograd.grad(loss, list(leaves.values()))
    assert metrics["loss"].item() == pytest.approx(loss.item(), rel=1e-12)
    assert all(gradient[f"inner.step_size.{name}"].all() for name in ADAPTED)
    for name, value in zip(leaves, expected, strict=True):
        torch.testing.assert_close(gradient[name], value, rtol=1e-10, atol=1e-12)


def test_meta_gradient_equals_finite_differences() -> None:
    algorithm, theta, tasks = make(num_steps=3, activation="tanh")
    gradient, _ = algorithms.gradient(algorithm, theta, tasks)
    for name, value in theta.items():
        direction = Stream(3).child(name).uniform(value.shape, -1.0, 1.0, dtype=torch.float64)
        behind, ahead = (
            algorithms.gradient(algorithm, theta | {name: value + offset * direction}, tasks)[1]["loss"].item()
            for offset in (-1e-5, 1e-5)
        )
        assert (gradient[name] * direction).sum().item() == pytest.approx((ahead - behind) / 2e-5, rel=1e-6)


@pytest.mark.parametrize("order", [1, 2])
def test_meta_gradient_of_theta_is_sgds_where_all_step_sizes_are_its_own(order: int) -> None:
    learned, theta, tasks = make(num_steps=3, order=order)
    plain, *_ = make(num_steps=3, order=order, kind=SGD)
    theta |= {name: torch.full_like(value, 0.3) for name, value in theta.items() if name.startswith("inner.")}
    gradient, _ = algorithms.gradient(learned, theta, tasks)
    expected, _ = algorithms.gradient(plain, {name: theta[name] for name in plain.theta}, tasks)
    assert all(torch.equal(gradient[name], value) for name, value in expected.items())


def test_steps_beyond_those_of_training_use_the_last_size() -> None:
    algorithm, theta, tasks = make(num_steps=2)
    longer, *_ = make(num_steps=4)
    repeated = {name: value[[0, 1, 1, 1]] if name.startswith("inner.") else value for name, value in theta.items()}
    *_, last = algorithm.adapt(algorithm.params_per_task(NUM_TASKS, theta), tasks, 4)
    *_, expected = longer.adapt(longer.params_per_task(NUM_TASKS, repeated), tasks, 4)
    assert all(torch.equal(last[name], expected[name]) for name in ADAPTED)


def test_step_sizes_of_the_evaluation_take_their_place() -> None:
    algorithm, theta, tasks = make(num_steps=2)
    plain, *_ = make(num_steps=2, kind=SGD)
    *_, last = algorithm.adapt(algorithm.params_per_task(NUM_TASKS, theta), tasks, 3, [0.1, 0.05, 0.2])
    *_, expected = plain.adapt(plain.params_per_task(NUM_TASKS, plain.theta_of(theta)), tasks, 3, [0.1, 0.05, 0.2])
    assert all(torch.equal(last[name], expected[name]) for name in expected)


def test_step_sizes_are_never_adapted() -> None:
    algorithm, theta, tasks = make(num_steps=2)
    *_, last = algorithm.adapt(algorithm.params_per_task(NUM_TASKS, theta), tasks, 2)
    own = [name for name in theta if name.startswith("inner.")]
    assert own and all(torch.equal(last[name], theta[name].expand_as(last[name])) for name in own)
    with pytest.raises(MamlError, match=r"'inner\.\*' matches no parameter; there are linear1\.weight"):
        LearnedSGD(step_size=0.1, num_steps=1, order=2, adapt=["*", "inner.*"]).adapted_names(list(theta))
