"""Adaptation of a context vector alone, against MAML on a network with wider inputs, one task at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import pytest
import torch
from torch import Tensor

from maml.algorithm.base import Parts
from maml.algorithm.context_vector import ContextVector
from maml.config.schema import build
from maml.errors import MamlError
from maml.experiment import build_algorithm
from maml.inner.sgd import SGD
from maml.model.base import Model
from maml.model.conv4 import Conv4
from maml.model.mlp import MLP
from maml.outer.adam import Adam
from maml.seeding import Stream
from maml.types import Params, Tasks
from tests import algorithms, plain_maml
from tests.runs import TinyRuns
from tests.training.test_meta_gradient import NUM_TASKS, SMALL, FixedExamples, as_list, plain_loss

MakeModel = Callable[[Sequence[int], int], Model]
CASES: dict[str, tuple[tuple[int, ...], bool, MakeModel, plain_maml.Forward]] = {
    "mlp": ((2,), False, lambda in_shape, out_dim: MLP(in_shape, out_dim, [8, 6]), plain_maml.mlp),
    "conv4": (
        SMALL,
        True,
        lambda in_shape, out_dim: Conv4(in_shape, out_dim, num_filters=4),
        plain_maml.conv4("stride", "mean"),
    ),
}


def make(case: str, order: int = 2, num_steps: int = 1) -> tuple[ContextVector, Params, Tasks]:
    in_shape, classes, make_model, _ = CASES[case]
    domain = FixedExamples(in_shape, classes)
    inner = SGD(step_size=0.3, num_steps=num_steps, order=order, adapt=["context"])  # type: ignore[arg-type]
    parts = Parts(domain, make_model, inner, Adam(), Stream(0))
    algorithm = ContextVector(parts, num_channels=3, init="glorot")
    theta = {
        name: value.double() + Stream(1).child(name).uniform(value.shape, -0.4, 0.4, dtype=torch.float64)
        for name, value in algorithm.theta.items()
    }
    return algorithm, theta, domain.sample_tasks(NUM_TASKS, Stream(2))


class Named(MLP):
    """A network with a parameter that is called context."""

    def init(self, stream: Stream) -> Params:
        return super().init(stream) | {"context": torch.ones(2)}


def test_network_with_a_parameter_that_is_called_context_is_refused() -> None:
    inner = SGD(step_size=0.3, num_steps=1, order=1, adapt=["context"])
    parts = Parts(
        FixedExamples((2,), False), lambda in_shape, out_dim: Named(in_shape, out_dim, [8]), inner, Adam(), Stream(0)
    )
    with pytest.raises(MamlError, match="a parameter 'context', the name of the context vector"):
        ContextVector(parts, num_channels=3, init="glorot")


def with_context(forward: plain_maml.Forward) -> plain_maml.Forward:
    """Appends the same z to each input."""

    def widened(params: Params, x: Tensor) -> Tensor:
        rest = {name: value for name, value in params.items() if name != "context"}
        return forward(rest, torch.stack([torch.cat([one, params["context"]], dim=-1) for one in x]))

    return widened


@pytest.mark.parametrize("num_steps", [1, 3])
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_meta_gradient_equals_the_plain_loop(case: str, order: int, num_steps: int) -> None:
    _, classes, _, forward = CASES[case]
    algorithm, theta, tasks = make(case, order, num_steps)
    gradient, metrics = algorithms.gradient(algorithm, theta, tasks, task_chunk=3)
    leaves = {name: value.clone().requires_grad_() for name, value in theta.items()}
    loss = plain_maml.outer_loss(
        with_context(forward), plain_loss(classes), leaves, as_list(tasks), 0.3, num_steps, order, ["context"]
    )
    expected = torch.autograd.grad(loss, list(leaves.values()))
    assert metrics["loss"].item() == pytest.approx(loss.item(), rel=1e-9)
    assert gradient["context"].any()
    for name, value in zip(leaves, expected, strict=True):
        torch.testing.assert_close(gradient[name], value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_nothing_but_the_context_adapts(case: str) -> None:
    algorithm, theta, tasks = make(case)
    *_, adapted = algorithm.adapt(algorithm.params_per_task(NUM_TASKS, theta), tasks, 3)
    changed = {name for name, value in adapted.items() if not torch.equal(value, theta[name].expand_as(value))}
    assert changed == {"context"}


@pytest.mark.parametrize("init", ["glorot", "zero"])
def test_images_of_omniglot_have_three_more_channels(init: Literal["glorot", "zero"], tiny_images: TinyRuns) -> None:
    config = tiny_images.config("algorithm=context_vector", f"algorithm.init={init}")
    theta = build_algorithm(config, build(config.hardware)).theta
    assert config.inner["adapt"] == ["context"]
    assert theta["context"].shape == (28, 28, 3)
    assert theta["conv1.weight"].shape == (16, 4, 3, 3)
    bound = (6 / (2 * 28 * 28 * 3)) ** 0.5 if init == "glorot" else 0.0
    assert 0.99 * bound <= theta["context"].abs().max() <= bound
