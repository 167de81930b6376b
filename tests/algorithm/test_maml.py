"""MAML's meta-gradient on losses whose adaptation can be written out by hand, in float64."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor

from maml.algorithm.maml import MAML
from maml.config.schema import build
from maml.domain.base import Metrics, Role, SupervisedDomain
from maml.experiment import build_algorithm
from maml.inner.sgd import SGD
from maml.model.base import Model
from maml.seeding import Stream
from maml.types import Examples, Params, Split, Tasks
from tests import algorithms
from tests.algorithms import build_from
from tests.runs import TinyRuns

pytestmark = pytest.mark.usefixtures("float64")

ALPHA = 0.1
# For each task, a target for adaptation and a target for the meta-objective.
SUPPORT, QUERY = (1.0, -2.0, 0.5), (3.0, 0.25, -1.0)
A, B = 1.5, -0.7
Order = Literal[1, 2]


class Product(Model):
    """A model whose output is a * b for every input."""

    def init(self, stream: Stream) -> Params:
        return {"a": torch.tensor(A, dtype=torch.float64), "b": torch.tensor(B, dtype=torch.float64)}

    def __call__(self, params: Params, x: Tensor, num_reference: int | None = None) -> Tensor:
        return (params["a"] * params["b"]).reshape(-1, 1, 1)


class Targets(SupervisedDomain):
    """A domain whose tasks are single numbers to reach, with the squared error."""

    in_shape, out_dim, num_shots = (1,), 1, 1
    headline, larger_is_better = "loss", False

    def draw_tasks(self, num_tasks: int, stream: Stream, split: Split, num_shots: int, num_query: int) -> Tasks:
        return {role: torch.tensor(y, dtype=torch.float64) for role, y in (("support", SUPPORT), ("query", QUERY))}

    def data(self, tasks: Tasks, role: Role, step: int = 0) -> Examples:
        y = tasks[role].reshape(-1, 1, 1)
        return Examples(torch.zeros_like(y), y, num_shots=1)

    def loss(self, outputs: Tensor, data: Examples) -> tuple[Tensor, Metrics]:
        return (outputs - data.y).square().sum((1, 2)), {}

    def measure(self, model: Model, params: Params, support: Examples, query: Examples, step: int) -> Metrics:
        return {"loss": self.inner_loss(model, params, query)}


def meta_gradient(num_steps: int, order: Order, adapt: list[str]) -> tuple[dict[str, float], float]:
    """Returns the gradient of the mean query loss with respect to a and b, and that loss."""
    inner = SGD(step_size=ALPHA, num_steps=num_steps, order=order, adapt=adapt)
    algorithm = build_from(MAML, Targets(), Product(), inner)
    gradient, metrics = algorithms.gradient(algorithm, algorithm.theta, algorithm.sample_tasks(3, Stream(0)))
    return {name: value.item() for name, value in gradient.items()}, metrics["loss"].item()


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def test_one_step_on_a_alone_is_differentiated_by_hand() -> None:
    """a' = a - 2 alpha b (a b - c): the loss (a' b - d)^2 depends on b by the step too."""
    gradient, loss = meta_gradient(1, 2, ["a"])
    outputs = [A * B - 2 * ALPHA * B**2 * (A * B - c) for c in SUPPORT]
    errors = [output - d for output, d in zip(outputs, QUERY, strict=True)]
    by_a = B - 2 * ALPHA * B**3
    by_b = [A - 2 * ALPHA * (2 * B * (A * B - c) + A * B**2) for c in SUPPORT]
    assert loss == pytest.approx(mean([error**2 for error in errors]), rel=1e-12)
    assert gradient["a"] == pytest.approx(mean([2 * error * by_a for error in errors]), rel=1e-12)
    expected = mean([2 * error * slope for error, slope in zip(errors, by_b, strict=True)])
    assert gradient["b"] == pytest.approx(expected, rel=1e-12)


def test_first_order_takes_the_gradient_at_the_adapted_parameters() -> None:
    """The gradient of the same step with a constant inner gradient: d/da' and d/db of (a' b - d)^2."""
    gradient, _ = meta_gradient(1, 1, ["a"])
    adapted = [A - 2 * ALPHA * B * (A * B - c) for c in SUPPORT]
    errors = [a * B - d for a, d in zip(adapted, QUERY, strict=True)]
    assert gradient["a"] == pytest.approx(mean([2 * error * B for error in errors]), rel=1e-12)
    expected = mean([2 * error * a for error, a in zip(errors, adapted, strict=True)])
    assert gradient["b"] == pytest.approx(expected, rel=1e-12)


def two_steps(a: float, b: float) -> float:
    """The meta-objective after two steps on both parameters, in plain numbers."""
    losses = []
    for c, d in zip(SUPPORT, QUERY, strict=True):
        own_a, own_b = a, b
        for _ in range(2):
            error = own_a * own_b - c
            own_a, own_b = own_a - 2 * ALPHA * error * own_b, own_b - 2 * ALPHA * error * own_a
        losses.append((own_a * own_b - d) ** 2)
    return mean(losses)


def test_two_steps_on_both_have_the_slopes_of_plain_arithmetic() -> None:
    gradient, loss = meta_gradient(2, 2, ["*"])
    assert loss == pytest.approx(two_steps(A, B), rel=1e-12)
    h = 1e-4
    for name, (da, db) in {"a": (h, 0.0), "b": (0.0, h)}.items():
        near, far = (two_steps(A + s * da, B + s * db) - two_steps(A - s * da, B - s * db) for s in (1, 2))
        assert gradient[name] == pytest.approx((8 * near - far) / (12 * h), rel=1e-9)


@pytest.mark.parametrize("order", [1, 2])
def test_without_steps_it_is_the_plain_gradient_on_query_data(order: Order) -> None:
    gradient, _ = meta_gradient(0, order, ["*"])
    errors = [A * B - d for d in QUERY]
    assert gradient["a"] == pytest.approx(2 * mean(errors) * B, rel=1e-12)
    assert gradient["b"] == pytest.approx(2 * mean(errors) * A, rel=1e-12)


def test_fomaml_builds_a_first_order_algorithm(tiny: TinyRuns) -> None:
    config = tiny.config("algorithm=fomaml")
    assert build_algorithm(config, build(config.hardware)).inner.order == 1
    config = tiny.config()
    assert build_algorithm(config, build(config.hardware)).inner.order == 2
