"""The curvature and the meta-gradient of policies, against autograd and finite differences."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import pytest
import torch
from torch import Tensor

from maml.algorithm.base import Algorithm, Parts
from maml.algorithm.context_vector import ContextVector
from maml.algorithm.maml import MAML
from maml.algorithm.pretrain import Pretrain
from maml.domain.point_navigation import PointNavigation
from maml.domain.reinforcement import Reinforcement
from maml.environment.base import Environments, Transition
from maml.environment.distribution import Categorical, Distribution
from maml.environment.point import PointEnvironments
from maml.inner.learned_sgd import LearnedSGD
from maml.inner.sgd import SGD
from maml.model.gaussian_policy import GaussianPolicy
from maml.model.mlp import MLP
from maml.outer.trpo import TRPO
from maml.seeding import Stream
from maml.types import MatrixVectorProduct, Params, Tasks, expand
from tests import algorithms

Case = tuple[Algorithm, Tasks]


class Choices(PointEnvironments):
    """A point that moves to one of three sides."""

    action_dim = 1
    _MOVES = torch.tensor([[1.0, 0.0], [-0.5, 0.8], [-0.5, -0.8]])

    @property
    def distribution(self) -> Distribution:
        return Categorical(3)

    def step(self, actions: Tensor, living: Tensor) -> Transition:
        return super().step(self._MOVES[actions[:, 0].long()], living)


class ChoosingSides(PointNavigation):
    """Point navigation with discrete actions."""

    def make_environments(self) -> Environments:
        return Choices()


def policy(activation: str, in_shape: Sequence[int], out_dim: int) -> GaussianPolicy:
    return GaussianPolicy(in_shape, out_dim, hidden_sizes=[5, 4], activation=activation)  # type: ignore[arg-type]


def choice_policy(activation: str, in_shape: Sequence[int], out_dim: int) -> MLP:
    return MLP(in_shape, out_dim, [5, 4], activation, weight_std=None)  # type: ignore[arg-type]


def made(kind: str, activation: str, num_steps: int) -> Case:
    """An algorithm in float64, with a meta-batch of rollouts of its policies."""
    is_discrete = kind == "categorical"
    domain = (ChoosingSides if is_discrete else PointNavigation)(num_shots=2, horizon=12)
    inner = (LearnedSGD if kind == "learned_sgd" else SGD)(
        0.1, num_steps, order=1 if kind == "fomaml" else 2, adapt=["*"]
    )
    if kind == "context_vector":
        inner = SGD(0.1, num_steps, order=2, adapt=["context"])
    parts = Parts(
        domain,
        partial(choice_policy if is_discrete else policy, activation),
        inner,
        TRPO(),
        Stream(3),
    )
    algorithm: Algorithm
    if kind == "context_vector":
        algorithm = ContextVector(parts, num_channels=2, init="glorot")
    else:
        algorithm = Pretrain(parts) if kind == "pretrain" else MAML(parts)
    tasks = algorithm.sample_tasks(3, Stream(1))
    algorithm.collect(expand(algorithm.theta, 3), tasks)
    tasks = {name: value.double() if value.is_floating_point() else value for name, value in tasks.items()}
    algorithm.theta = {name: value.double() for name, value in algorithm.theta.items()}
    # Exactly the policies that collected the rollouts, so that the divergence and its gradient are zero.
    start = expand(algorithm.theta, 3)
    for step, params in enumerate(algorithm.inner_steps(start, tasks, algorithm.adaptation_steps, None, False)):
        with torch.no_grad():
            tasks[f"step_{step}.outputs"] = algorithm.model(params, tasks[f"step_{step}.observations"])
    return algorithm, tasks


def curvature(algorithm: Algorithm, tasks: Tasks, task_chunk: int | None = None, every: int = 1) -> MatrixVectorProduct:
    return algorithms.meta_gradient(algorithm, task_chunk).curvature(algorithm.theta, tasks, every)


def flat(params: Params) -> Tensor:
    return torch.cat([value.flatten() for value in params.values()])


def like(vector: Tensor, theta: Params) -> Params:
    parts = vector.split([value.numel() for value in theta.values()])
    return {name: part.view_as(value) for (name, value), part in zip(theta.items(), parts, strict=True)}


def mean_kl(algorithm: Algorithm, tasks: Tasks, vector: Tensor) -> Tensor:
    with torch.enable_grad():
        return algorithm.task_losses(expand(like(vector, algorithm.theta), 3), tasks)[1]["kl"].mean()


KINDS = ["maml", "categorical", "fomaml", "pretrain", "context_vector", "learned_sgd"]


@pytest.mark.parametrize("activation", ["relu", "tanh"])
@pytest.mark.parametrize("num_steps", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_curvature_is_the_hessian_of_the_divergence(kind: str, activation: str, num_steps: int) -> None:
    algorithm, tasks = made(kind, activation, num_steps)
    theta = flat(algorithm.theta)
    hessian = torch.autograd.functional.hessian(lambda vector: mean_kl(algorithm, tasks, vector), theta)
    product = curvature(algorithm, tasks, task_chunk=2)
    for seed in range(3):
        vector = torch.randn(len(theta), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        expected = hessian @ vector
        ours = flat(product(like(vector, algorithm.theta)))
        assert (ours - expected).abs().max() < 1e-6 * expected.abs().max()
    assert expected.abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["maml", "categorical"])
def test_inner_derivatives_are_autograds(kind: str) -> None:
    algorithm, tasks = made(kind, "tanh", 1)
    domain, model, theta = algorithm.domain, algorithm.model, flat(algorithm.theta)
    assert isinstance(domain, Reinforcement)
    rollouts = domain.data(tasks, "support", 0)

    def loss(vector: Tensor) -> Tensor:
        return domain.inner_loss(model, expand(like(vector, algorithm.theta), 3), rollouts)[1]

    with torch.enable_grad():
        gradient = torch.autograd.functional.jacobian(loss, theta)
        hessian = torch.autograd.functional.hessian(loss, theta)
    direction = torch.randn(len(theta), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ours, product = domain.inner_derivatives(model, expand(algorithm.theta, 3), rollouts)
    curved = product(expand(like(direction, algorithm.theta), 3))
    again = domain.inner_hessian(model, expand(algorithm.theta, 3), rollouts)(
        expand(like(direction, algorithm.theta), 3)
    )
    for found, expected in ((ours, gradient), (curved, hessian @ direction), (again, hessian @ direction)):
        one = flat({name: found[name][1] for name in algorithm.theta})
        torch.testing.assert_close(one, expected, rtol=1e-9, atol=1e-11)
        assert expected.abs().max() > 1e-3


def test_curvature_does_not_depend_on_the_chunks() -> None:
    vectors = []
    for chunk in (1, 2, None):
        algorithm, tasks = made("maml", "tanh", 1)
        vectors.append(flat(curvature(algorithm, tasks, chunk)(algorithm.theta)))
    assert torch.allclose(vectors[0], vectors[1], rtol=1e-12, atol=0)
    assert torch.allclose(vectors[0], vectors[2], rtol=1e-12, atol=0)


def test_curvature_of_every_second_timestep_is_that_of_thinned_rollouts() -> None:
    algorithm, tasks = made("maml", "tanh", 1)
    thinned = algorithm.domain.subsample_timesteps(tasks, 2)
    assert thinned["step_0.actions"].shape[1] == -(-tasks["step_0.actions"].shape[1] // 2)
    assert torch.allclose(thinned["step_1.weights"].sum(1), torch.ones(3, dtype=torch.float64))
    ours = curvature(algorithm, tasks, every=2)(algorithm.theta)
    expected = curvature(algorithm, thinned)(algorithm.theta)
    assert torch.equal(flat(ours), flat(expected))


# FOMAML is left out: its gradient is not that of the loss.
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "fomaml"])
def test_meta_gradient_equals_finite_differences(kind: str) -> None:
    algorithm, tasks = made(kind, "tanh", 1)
    gradient = flat(algorithms.gradient(algorithm, algorithm.theta, tasks, task_chunk=2)[0])
    theta = flat(algorithm.theta)
    for seed in range(3):
        vector = torch.randn(len(theta), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        high, low = (
            algorithms.evaluate(algorithm, like(theta + sign * 1e-5 * vector, algorithm.theta), tasks)["loss"]
            for sign in (1, -1)
        )
        assert abs((high - low) / 2e-5 - gradient @ vector) < 1e-6 * (1 + abs(gradient @ vector))


def test_inner_step_is_the_papers() -> None:
    """theta' = theta + alpha * gradient of mean(log pi * A), written out for a single task."""
    algorithm, tasks = made("maml", "tanh", 1)
    theta = {name: value.clone().requires_grad_() for name, value in algorithm.theta.items()}
    rollouts = algorithm.domain.data(tasks, "support", 0)
    net = MLP((2,), 2, [5, 4], activation="tanh")
    task = 1
    count = int((rollouts.weights[task] > 0).sum())
    means = net({name: value.unsqueeze(0) for name, value in theta.items()}, rollouts.observations[task : task + 1])[0]
    total = torch.zeros((), dtype=torch.float64)
    for time in range(count):
        normal = torch.distributions.Normal(means[time], theta["log_std"].exp())
        total = total + normal.log_prob(rollouts.actions[task, time]).sum() * rollouts.advantages[task, time]
    gradients = torch.autograd.grad(total / count, list(theta.values()))
    *_, adapted = algorithm.inner_steps(expand(algorithm.theta, 3), tasks, 1, None, create_graph=False)
    for (name, value), gradient in zip(theta.items(), gradients, strict=True):
        assert torch.allclose(adapted[name][task], value + 0.1 * gradient, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("activation", ["relu", "tanh"])
@pytest.mark.parametrize("num_steps", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_of_the_divergence_is_autograds_away_from_theta(kind: str, activation: str, num_steps: int) -> None:
    algorithm, tasks = made(kind, activation, num_steps)
    theta = flat(algorithm.theta)
    vector = theta + 0.1 * torch.randn(len(theta), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    vector.requires_grad_()
    (expected,) = torch.autograd.grad(mean_kl(algorithm, tasks, vector), vector)
    assert expected.abs().max() > 1e-3
    params = like(vector.detach(), algorithm.theta)
    for chunk in (2, None):
        ours = flat(algorithms.meta_gradient(algorithm, chunk).kl_gradient(params, tasks))
        assert torch.allclose(ours, expected, rtol=1e-10, atol=1e-12)
    thinned = algorithm.domain.subsample_timesteps(tasks, 2)
    ours = flat(algorithms.meta_gradient(algorithm).kl_gradient(params, tasks, every=2))
    assert torch.equal(ours, flat(algorithms.meta_gradient(algorithm).kl_gradient(params, thinned)))
