"""Directional derivatives, hand-written and by autograd, against full Jacobians and Hessians in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from torch import Tensor

from maml.algorithm.context_vector import _ModelWithContext
from maml.model import linearized
from maml.model.base import Model
from maml.model.functional import Activation
from maml.model.gaussian_policy import GaussianPolicy
from maml.model.linearized import Linearized, LinearizedByAutograd
from maml.model.lstm import LSTM
from maml.model.mlp import MLP
from maml.seeding import Stream
from maml.types import Params

NUM_ROWS, NUM_IN, NUM_OUT = 7, 3, 4
assert_close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-9)
Linearize = Callable[[Model, Params, Tensor], Linearized]


def policy(in_shape: Sequence[int], out_dim: int) -> Model:
    return GaussianPolicy(in_shape, out_dim, [6, 5], "tanh")


MODELS: dict[str, Model] = {
    **{name: MLP((NUM_IN,), NUM_OUT, [6, 5, 2], name) for name in ("relu", "softplus", "tanh")},
    "linear": MLP((NUM_IN,), NUM_OUT, []),
    "batch": MLP((NUM_IN,), NUM_OUT, [6, 5], "softplus", normalization="batch"),
    "policy": policy((NUM_IN,), NUM_OUT),
    "lstm": LSTM((NUM_IN,), NUM_OUT, hidden_size=3),
    "context_policy": _ModelWithContext(policy, (NUM_IN,), NUM_OUT, 2, "glorot"),
    "context_batch": _ModelWithContext(
        lambda in_shape, out_dim: MLP(in_shape, out_dim, [6, 5], normalization="batch"), (NUM_IN,), NUM_OUT, 2, "glorot"
    ),
    "context_lstm": _ModelWithContext(
        lambda in_shape, out_dim: LSTM(in_shape, out_dim, hidden_size=3), (2, NUM_IN), NUM_OUT, 2, "glorot"
    ),
}
OVERRIDDEN = [name for name, model in MODELS.items() if type(model).linearize is not Model.linearize]
CASES = [(name, Model.linearize) for name in MODELS] + [(name, type(MODELS[name]).linearize) for name in OVERRIDDEN]


def draw(shape: tuple[int, ...], *names: str) -> Tensor:
    stream = Stream(0)
    for name in names:
        stream = stream.child(name)
    return stream.uniform(shape, -1.5, 1.5, dtype=torch.float64)


def parameters(model: Model, num_tasks: int) -> Params:
    return {name: draw((num_tasks, *value.shape), "at", name) for name, value in model.init(Stream(0)).items()}


def inputs(name: str, num_tasks: int) -> Tensor:
    shape = (2, NUM_IN) if name == "context_lstm" else (NUM_IN,)
    return draw((num_tasks, NUM_ROWS, *shape), "inputs")


def flatten(params: Params) -> Tensor:
    return torch.cat([value.flatten(1) for value in params.values()], dim=1)


def unflatten(vector: Tensor, like: Params) -> Params:
    """Turns a vector, ``(P,)``, into one task's parameters, ``(1, ...)``."""
    parts = vector.split([value[0].numel() for value in like.values()])
    return {name: part.reshape(1, *like[name].shape[1:]) for name, part in zip(like, parts, strict=True)}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linearized, "BLOCK", 3)


@pytest.mark.parametrize("num_tasks", [1, 3])
@pytest.mark.parametrize(("name", "linearize"), CASES)
def test_derivatives_equal_the_full_jacobian_and_hessian(name: str, linearize: Linearize, num_tasks: int) -> None:
    model, x = MODELS[name], inputs(name, num_tasks)
    params = parameters(model, num_tasks)
    direction = {key: draw(tuple(value.shape), "direction", key) for key, value in params.items()}
    delta, targets = draw((num_tasks, NUM_ROWS, NUM_OUT), "delta"), draw((num_tasks, NUM_ROWS, NUM_OUT), "targets")
    moved_delta = draw((num_tasks, NUM_ROWS, NUM_OUT), "moved")

    def loss(outputs: Tensor, task: int) -> Tensor:  # its Hessian couples the rows
        return (outputs.square() * targets[task]).sum().sin() + outputs.pow(3).mean()

    def for_each_loss(function: Callable[..., Tensor], outputs: Tensor) -> Tensor:
        return torch.stack([function(lambda y, task=task: loss(y, task), outputs[task]) for task in range(num_tasks)])

    linear = linearize(model, params, x)
    gradient = for_each_loss(torch.autograd.functional.jacobian, linear.outputs)
    curvature = for_each_loss(torch.autograd.functional.hessian, linear.outputs)
    jvp, vjp = linear.jvp(direction), linear.vjp(delta)
    hessian = linear.hessian(gradient, lambda dy: torch.einsum("tndme,tme->tnd", curvature, dy))
    dy, backward = linear.second_order(delta)(direction)
    moved = backward(moved_delta)
    product, doubled = hessian(direction), hessian({key: 2 * value for key, value in direction.items()})
    assert not jvp.requires_grad and not product["head.bias"].requires_grad

    assert_close(linear.outputs, model(params, x))
    assert_close(dy, jvp)
    results = [flatten({key: result[key] for key in params}) for result in (vjp, product, doubled, moved)]
    assert all(result.keys() == params.keys() for result in (vjp, product, doubled, moved))
    for task in range(num_tasks):

        def outputs(vector: Tensor, task: int = task) -> Tensor:
            return model(unflatten(vector, params), x[task : task + 1])[0]

        point, v = flatten(params)[task], flatten(direction)[task]
        jacobian = torch.autograd.functional.jacobian(outputs, point)
        loss_hessian = torch.autograd.functional.hessian(lambda vector, task=task: loss(outputs(vector), task), point)
        output_hessian = torch.autograd.functional.hessian(
            lambda vector, task=task: (outputs(vector) * delta[task]).sum(), point
        )
        assert_close(jvp[task], jacobian @ v)
        expected = [
            torch.einsum("ndp,nd->p", jacobian, delta[task]),
            loss_hessian @ v,
            2 * loss_hessian @ v,
            output_hessian @ v + torch.einsum("ndp,nd->p", jacobian, moved_delta[task]),
        ]
        for result, value in zip(results, expected, strict=True):
            assert_close(result[task], value)


def test_other_models_and_batch_normalisation_are_left_to_autograd() -> None:
    by_autograd = {
        name
        for name, model in MODELS.items()
        if isinstance(model.linearize(parameters(model, 1), inputs(name, 1)), LinearizedByAutograd)
    }
    assert by_autograd == {"batch", "lstm", "context_lstm"}


@pytest.mark.parametrize("linearize", [Model.linearize, GaussianPolicy.linearize])
@pytest.mark.parametrize("activation", ["relu", "softplus", "tanh"])
def test_hessian_of_a_policy_gradient_loss_at_shared_parameters(activation: Activation, linearize: Linearize) -> None:
    """The inner loss of REINFORCE, -mean(log pi * A), with one standard deviation at its floor."""
    model = GaussianPolicy((NUM_IN,), NUM_OUT, [6, 5], activation)
    theta = {name: value[0] for name, value in parameters(model, 1).items()}
    theta["log_std"] = torch.tensor([0.3, math.log(1e-6) - 1], dtype=torch.float64)
    params = {name: value.expand(2, *value.shape) for name, value in theta.items()}
    x, advantages = draw((2, NUM_ROWS, NUM_IN), "inputs"), draw((2, NUM_ROWS), "advantages")
    noise = draw((2, NUM_ROWS, NUM_OUT // 2), "noise")
    means, log_std = model(params, x).chunk(2, dim=2)
    actions = means + noise * log_std.exp()

    def losses(outputs: Tensor) -> Tensor:
        means, log_std = outputs.chunk(2, dim=2)
        log_pi = (-0.5 * ((actions - means) / log_std.exp()).square() - log_std).sum(2)
        return -(log_pi * advantages).mean(1)

    linear = linearize(model, params, x)
    outputs = linear.outputs.clone().requires_grad_()
    (delta,) = torch.autograd.grad(losses(outputs).sum(), outputs, create_graph=True)
    product = linear.hessian(delta.detach(), lambda dy: torch.autograd.grad(delta, outputs, dy, retain_graph=True)[0])
    direction = {name: draw(tuple(value.shape), "direction", name) for name, value in theta.items()}
    result = product({name: value.expand(2, *value.shape) for name, value in direction.items()})
    assert not result["log_std"][:, 1].any()

    leaves = {name: value.clone().requires_grad_() for name, value in params.items()}
    gradient = torch.autograd.grad(losses(model(leaves, x)).sum(), list(leaves.values()), create_graph=True)
    slope = sum((g * direction[name]).sum() for name, g in zip(leaves, gradient, strict=True))
    assert isinstance(slope, Tensor)
    for name, expected in zip(leaves, torch.autograd.grad(slope, list(leaves.values())), strict=True):
        torch.testing.assert_close(result[name], expected, rtol=1e-9, atol=1e-9 * expected.abs().max().item())
