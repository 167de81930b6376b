"""The trust-region step: against NumPy on quadratics, its line search try by try, and on point navigation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from maml.algorithm.maml import MAML
from maml.domain.point_navigation import PointNavigation
from maml.inner.sgd import SGD
from maml.model.functional import Activation
from maml.model.gaussian_policy import GaussianPolicy
from maml.outer.base import MatrixVectorProduct, Objective
from maml.outer.trpo import TRPO, conjugate_gradient, exact_product, finite_difference_product
from maml.seeding import Stream
from maml.types import Params
from tests import algorithms
from tests.algorithms import build_from

SIZE = 6


def positive_definite(seed: int) -> Tensor:
    root = torch.randn(SIZE, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return root @ root.T + 0.5 * torch.eye(SIZE, dtype=torch.float64)


def start() -> Params:
    return {
        "a": torch.linspace(-1.0, 1.0, 4, dtype=torch.float64).reshape(2, 2),
        "b": torch.tensor([0.5, 2.0], dtype=torch.float64),
    }


def flat(theta: Params) -> Tensor:
    return torch.cat([theta["a"].flatten(), theta["b"]])


class Quadratic(Objective):
    """A quadratic loss, and a KL divergence that is exactly quadratic around theta.

    Args:
        judge: gives the loss and the divergence at each try of the line search, from the try's number, from 0.
    """

    def __init__(self, judge: Callable[[int], tuple[float, float]] | None = None) -> None:
        self.hessian, self.minimum = positive_definite(1), torch.full((SIZE,), 30.0, dtype=torch.float64)
        self.metric, self.start = positive_definite(2), flat(start())
        self.judge = judge
        self.tried: list[Tensor] = []
        self.every: list[int] = []
        self.bend = 0.0  # a term of the divergence's gradient: bend * |away|^2 * away

    def loss(self, vector: Tensor) -> Tensor:
        away = vector - self.minimum
        return 0.5 * away @ self.hessian @ away

    def slope(self) -> Tensor:
        return self.hessian @ (self.start - self.minimum)

    def gradient(self, theta: Params) -> tuple[Params, dict[str, Tensor]]:
        slope = self.hessian @ (flat(theta) - self.minimum)
        metrics = {"loss": self.loss(flat(theta)), "kl": torch.tensor(0.0), "other": torch.tensor(7.0)}
        return {"b": slope[4:], "a": slope[:4].reshape(2, 2)}, metrics  # theta has another order

    def evaluate(self, theta: Params) -> dict[str, Tensor]:
        self.tried.append(flat(theta).clone())
        if self.judge is not None:
            loss, kl = self.judge(len(self.tried) - 1)
            return {"loss": torch.tensor(loss), "kl": torch.tensor(kl)}
        away = flat(theta) - self.start
        return {"loss": self.loss(flat(theta)), "kl": 0.5 * away @ self.metric @ away}

    def curvature(self, theta: Params, every: int = 1) -> MatrixVectorProduct:
        self.every.append(every)

        def product(vector: Params) -> Params:
            curved = self.metric @ flat(vector)
            return {"b": curved[4:], "a": curved[:4].reshape(2, 2)}

        return product

    def kl_gradient(self, theta: Params, every: int = 1) -> Params:
        self.every.append(every)
        away = flat(theta) - self.start
        curved = self.metric @ away + self.bend * away.norm() ** 2 * away
        return {"b": curved[4:], "a": curved[:4].reshape(2, 2)}


def full_step(objective: Quadratic, max_kl: float, damping: float) -> np.ndarray:
    """Returns the full step, which the line search does not shorten."""
    damped = objective.metric.numpy() + damping * np.eye(SIZE)
    direction = np.linalg.solve(damped, objective.slope().numpy())
    return np.sqrt(2 * max_kl / (direction @ damped @ direction)) * direction


def test_conjugate_gradient_solves_linear_equations() -> None:
    matrix, vector = positive_definite(3), torch.linspace(-2.0, 3.0, SIZE, dtype=torch.float64)
    expected = np.linalg.solve(matrix.numpy(), vector.numpy())
    solution, _ = conjugate_gradient(lambda x: matrix @ x, vector, 20)
    assert np.allclose(solution.numpy(), expected, rtol=1e-5)
    few, residual = conjugate_gradient(lambda x: matrix @ x, vector, 2)
    assert not np.allclose(few.numpy(), expected, rtol=1e-2)
    torch.testing.assert_close(residual, vector - matrix @ few)


def test_conjugate_gradient_ends_when_the_residual_is_small() -> None:
    products = 0

    def double(x: Tensor) -> Tensor:
        nonlocal products
        products += 1
        return 2 * x

    vector = torch.tensor([3.0, -4.0])
    assert torch.equal(conjugate_gradient(double, vector, 10)[0], torch.tensor([1.5, -2.0]))
    assert products == 1
    assert torch.equal(conjugate_gradient(double, torch.zeros(2), 10)[0], torch.zeros(2))
    assert products == 1
    assert torch.equal(vector, torch.tensor([3.0, -4.0]))


@pytest.mark.parametrize("curvature", ["exact", "finite_difference"])
@pytest.mark.parametrize("max_kl", [0.01, 0.5])
@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_step_goes_to_the_border_of_the_trust_region(
    max_kl: float, damping: float, curvature: Literal["exact", "finite_difference"]
) -> None:
    objective, theta = Quadratic(), start()
    outer = TRPO(max_kl, num_cg_steps=20, damping=damping, curvature=curvature, curvature_every=3)
    metrics = outer.step(objective, theta, {})
    expected = full_step(objective, max_kl, damping)
    assert np.allclose((objective.start - flat(theta)).numpy(), expected, rtol=1e-5)
    assert metrics["step_fraction"] == 1.0
    assert metrics["kl"] <= max_kl
    # Damping makes the step shorter than the divergence would allow.
    assert metrics["kl"].item() == pytest.approx(max_kl, rel=1e-6 if damping == 0 else 0.2)
    assert set(objective.every) == {3}


def test_finite_difference_is_the_authors_formula() -> None:
    """Their formula, with the step that their code uses by mistake, on a divergence that is not quadratic."""
    objective, theta = Quadratic(), start()
    objective.bend = 3.0
    vector = torch.linspace(-3.0, 2.0, SIZE, dtype=torch.float64)
    eps = 1.0 / (np.linalg.norm(flat(theta).numpy()) + 1e-8)

    def gradient(at: np.ndarray) -> np.ndarray:
        away = at - objective.start.numpy()
        return objective.metric.numpy() @ away + 3.0 * (away @ away) * away

    around = objective.start.numpy()
    expected = (gradient(around + eps * vector.numpy()) - gradient(around - eps * vector.numpy())) / (2 * eps)
    ours = finite_difference_product(objective, theta, 1)(vector)
    assert np.allclose(ours.numpy(), expected, rtol=1e-12)
    exact = exact_product(objective, theta, 1)(vector).numpy()
    assert not np.allclose(exact, expected, rtol=0.1)


def test_length_of_a_step_measures_the_curvature_of_its_own_direction() -> None:
    """A difference is not linear, so the authors multiply the direction once more. Here the product is b^3."""

    class Cubic(Quadratic):
        def kl_gradient(self, theta: Params, every: int = 1) -> Params:
            away = flat(theta) - self.start
            curved = away**3
            return {"b": curved[4:], "a": curved[:4].reshape(2, 2)}

    objective, theta = Cubic(lambda number: (-1e9, 0.0)), start()
    TRPO(max_kl=0.02, num_cg_steps=1, damping=0.0, curvature="finite_difference").step(objective, theta, {})
    eps = 1 / (objective.start.norm() + 1e-8)
    slope = objective.slope()
    direction = (slope @ slope) / (slope @ (eps**2 * slope**3)) * slope
    step = (2 * 0.02 / (direction @ (eps**2 * direction**3) + 1e-8)).sqrt() * direction
    assert torch.allclose(objective.start - objective.tried[0], step)


def test_metrics_are_those_before_the_step_and_after() -> None:
    objective, theta = Quadratic(), start()
    metrics = TRPO().step(objective, theta, {})
    assert metrics["other"] == 7.0
    assert metrics["loss"] == objective.loss(objective.start)
    assert metrics["loss_after"] == objective.loss(flat(theta)) < metrics["loss"]
    assert set(metrics) == {"loss", "kl", "other", "loss_after", "step_fraction"}
    assert all(value.dim() == 0 for value in metrics.values())
    assert TRPO().init_state(theta) == {}


BAD = {
    "the loss is no lower": (1e9, 0.0),
    "the divergence is too large": (-1.0, 0.0101),
    "the loss is not a number": (float("nan"), 0.0),
    "the divergence is not a number": (-1.0, float("nan")),
}


@pytest.mark.parametrize("accepted", [0, 3, 14])
@pytest.mark.parametrize("reason", BAD)
def test_line_search_takes_the_first_step_that_will_do(accepted: int, reason: str) -> None:
    objective = Quadratic(lambda number: (-5.0, 0.01) if number == accepted else BAD[reason])
    theta = start()
    metrics = TRPO(max_kl=0.0100001, num_cg_steps=20).step(objective, theta, {})
    step = full_step(objective, 0.0100001, 1e-5)
    assert len(objective.tried) == accepted + 1
    for number, tried in enumerate(objective.tried):
        assert np.allclose((objective.start - tried).numpy(), 0.8**number * step, rtol=1e-5)
    assert torch.equal(flat(theta), objective.tried[-1])
    assert metrics["step_fraction"].item() == pytest.approx(0.8**accepted)
    assert (metrics["loss_after"].item(), metrics["kl"].item()) == pytest.approx((-5.0, 0.01))


@pytest.mark.parametrize("reason", BAD)
def test_theta_stays_to_the_bit_where_fifteen_steps_will_not_do(reason: str) -> None:
    objective, theta = Quadratic(lambda number: BAD[reason]), start()
    before = theta["a"]
    metrics = TRPO().step(objective, theta, {})
    assert len(objective.tried) == 15
    assert torch.equal(flat(theta), objective.start)
    assert theta["a"] is before, "in place"
    assert (metrics["step_fraction"].item(), metrics["kl"].item()) == (0.0, 0.0)
    assert metrics["loss_after"] == metrics["loss"]


def test_shortening_follows_the_option() -> None:
    objective = Quadratic(lambda number: (-5.0, 0.0) if number == 2 else (1e9, 0.0))
    metrics = TRPO(backtrack=0.5).step(objective, start(), {})
    assert metrics["step_fraction"] == 0.25


def test_fractions_begin_and_end_where_the_options_say() -> None:
    objective = Quadratic(lambda number: (1e9, 0.0))
    TRPO(num_cg_steps=20, first_fraction=1.5, backtrack=0.5, num_tries=3).step(objective, start(), {})
    step = full_step(objective, 0.01, 1e-5)
    assert len(objective.tried) == 3
    for fraction, tried in zip((1.5, 0.75, 0.375), objective.tried, strict=True):
        assert np.allclose((objective.start - tried).numpy(), fraction * step, rtol=1e-5)


def test_gradient_that_is_not_a_number_moves_nothing() -> None:
    class Broken(Quadratic):
        def gradient(self, theta: Params) -> tuple[Params, dict[str, Tensor]]:
            gradients, metrics = super().gradient(theta)
            gradients["b"][0] = torch.nan
            return gradients, metrics

    theta = start()
    metrics = TRPO().step(Broken(), theta, {})
    assert torch.equal(flat(theta), flat(start()))
    assert metrics["step_fraction"] == 0.0


def test_gradient_of_zero_moves_nothing() -> None:
    class AtMinimum(Quadratic):
        def __init__(self) -> None:
            super().__init__()
            self.minimum = self.start.clone()

    theta = start()
    assert TRPO().step(AtMinimum(), theta, {})["step_fraction"] == 0.0
    assert torch.equal(flat(theta), flat(start()))


def test_direction_of_negative_curvature_is_tried_at_length_one() -> None:
    """As in the authors' code, a length of NaN becomes 1."""

    class Saddle(Quadratic):
        def __init__(self) -> None:
            super().__init__(lambda number: BAD["the loss is no lower"])
            self.metric = -torch.eye(SIZE, dtype=torch.float64)

    objective = Saddle()
    TRPO(damping=0.0).step(objective, start(), {})
    assert torch.allclose(objective.start - objective.tried[0], -objective.slope())


def navigating(max_kl: float, activation: Activation) -> MAML:
    domain = PointNavigation(num_shots=5, horizon=20)
    model = GaussianPolicy((2,), 4, hidden_sizes=[20, 20], activation=activation)
    return build_from(MAML, domain, model, SGD(0.5, 1, order=2, adapt=["*"]), TRPO(max_kl))


def test_loss_falls_and_policies_stay_in_the_trust_region() -> None:
    algorithm = navigating(0.01, "relu")
    for iteration in range(6):
        tasks = algorithm.sample_tasks(8, Stream(1).child(iteration))
        before = {name: value.clone() for name, value in algorithm.theta.items()}
        metrics = algorithms.step(algorithm, tasks)
        assert 0 < metrics["step_fraction"] <= 1
        assert metrics["loss_after"] < metrics["loss"]
        assert 0 < metrics["kl"] <= 0.01
        after = algorithms.evaluate(algorithm, algorithm.theta, tasks)
        assert (after["loss"], after["kl"]) == (metrics["loss_after"], metrics["kl"])
        assert abs(algorithms.evaluate(algorithm, before, tasks)["kl"]) < 1e-6


def test_divergence_is_what_the_curvature_foretold() -> None:
    """The network is smooth: with ReLU, a step may cross kinks, which second derivatives do not see."""
    algorithm = navigating(1e-4, "tanh")
    for iteration in range(3):
        metrics = algorithms.step(algorithm, algorithm.sample_tasks(8, Stream(1).child(iteration)))
        foretold = 1e-4 * metrics["step_fraction"].item() ** 2
        assert metrics["kl"].item() == pytest.approx(foretold, rel=0.1)
