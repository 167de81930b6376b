"""What would give wrong numbers in silence is refused when a module is built."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from maml.errors import MamlError
from maml.model import checks
from maml.model.module import ModuleModel
from maml.seeding import Stream
from tests.model import torch_layers
from tests.model.test_module import Calling, Tied, stacked
from tests.runs import TinyRuns


class Drawing(nn.Module):
    """A network that draws in forward."""

    def __init__(self, draw: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.body, self.draw = nn.Sequential(nn.Linear(3, 4), Calling(draw)), draw
        self.head = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize(
    "draw",
    [
        lambda x: F.dropout(x, 0.5),
        lambda x: x + torch.randn_like(x),
        lambda x: x * (random.random() < 0.999),
        lambda x: x + np.random.uniform(),
        lambda x: x if torch.rand(()) < 2 else -x,  # its outputs are always the same
    ],
)
def test_draws_in_forward_are_refused_by_the_name_of_the_layer(
    draw: Callable[[Tensor], Tensor], vectorize: bool
) -> None:
    states = torch.get_rng_state(), random.getstate()
    with pytest.raises(MamlError, match=r"draws random numbers in forward \(body\.1, Calling\)"):
        ModuleModel((3,), 1, lambda: Drawing(draw), vectorize)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]


def test_dropout_that_is_no_layer_of_its_own_is_refused() -> None:
    case = torch_layers.Case(
        lambda: nn.LSTM(3, 3, 2, dropout=0.5, batch_first=True), (4, 3), lambda layer, x: layer(x)[0]
    )
    with pytest.raises(MamlError, match=r"draws random numbers in forward \(layer, LSTM\).*set its dropout to 0"):
        ModuleModel((3,), 1, partial(torch_layers.Surrounded, case))


def test_spectral_norm_is_refused_by_the_name_of_its_buffers() -> None:
    with pytest.raises(MamlError, match=r"changes its buffers 0\.parametrizations\.weight\.0\._u, .* in forward"):
        ModuleModel((3,), 2, lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(3, 2))))


class Centred(nn.Module):
    """Keeps a running mean, and subtracts it if asked."""

    def __init__(self, subtract: bool, in_place: bool = True, is_buffer: bool = True) -> None:
        super().__init__()
        self.subtract, self.in_place, self.head = subtract, in_place, nn.Linear(3, 1)
        if is_buffer:
            self.register_buffer("mean", torch.ones(3))
        else:
            self.mean = torch.ones(3)

    def forward(self, x: Tensor) -> Tensor:
        outputs = self.head(x - self.mean if self.subtract else x)
        if self.in_place:
            self.mean.mul_(0.9).add_(0.1 * x.detach().mean(0))
        else:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return outputs


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("in_place", [True, False])
def test_running_statistics_are_refused_where_outputs_depend_on_them(in_place: bool, vectorize: bool) -> None:
    with pytest.raises(MamlError, match="changes its buffers mean in forward"):
        ModuleModel((3,), 1, partial(Centred, True, in_place), vectorize)
    with pytest.raises(MamlError, match="changes values that it keeps in forward"):
        ModuleModel((3,), 1, partial(Centred, True, in_place, is_buffer=False), vectorize)
    model = ModuleModel((3,), 1, partial(Centred, False, in_place), vectorize)
    assert model.vectorize == vectorize
    params = stacked(model, 2)
    x = Stream(5).normal((2, 7, 3))
    torch.testing.assert_close(model(params, x), x @ params["head.weight"].mT + params["head.bias"].unsqueeze(1))
    assert torch.equal(dict(model.net.named_buffers())["mean"], torch.ones(3))


def test_parameters_that_forward_reaches_by_other_ways_are_refused() -> None:
    class Listed(nn.Linear):
        def __init__(self) -> None:
            super().__init__(3, 1)
            self.kept = [self.weight]

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.kept[0], self.bias)

    class Cached(nn.Linear):
        cache: Tensor | None = None

        def __init__(self) -> None:
            super().__init__(3, 1)

        def forward(self, x: Tensor) -> Tensor:
            self.cache = 2 * self.weight if self.cache is None else self.cache
            return F.linear(x, self.cache, self.bias)

    for make in (Listed, Cached):
        with pytest.raises(MamlError, match="does not follow all changes of its parameters"):
            ModuleModel((3,), 1, make)


def test_outputs_that_are_no_tensor_are_refused_with_the_remedy() -> None:
    with pytest.raises(MamlError, match=r"returns a tuple, but one tensor of shape \(S, 3\) is needed; wrap it"):
        ModuleModel((4, 2), 3, lambda: nn.LSTM(2, 3))


@pytest.mark.parametrize("forward", [lambda x: x.detach(), lambda x: (x > 0).float()])
def test_outputs_without_a_gradient_are_refused(forward: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(MamlError, match="has outputs without a gradient"):
        ModuleModel((3,), 1, lambda: nn.Sequential(nn.Linear(3, 1), Calling(forward)))


def test_places_of_tied_parameters_and_of_layers_that_are_registered_twice_are_found_once() -> None:
    assert checks.places(Tied()) == {
        "a.weight": ["a.weight", "c.weight"],
        "a.bias": ["a.bias"],
        "c.bias": ["c.bias"],
        "head.weight": ["head.weight"],
        "head.bias": ["head.bias"],
    }
    layer = nn.BatchNorm1d(2)
    layer.register_buffer("again", layer.running_mean)
    assert checks.places(nn.Sequential(layer, layer))["0.running_mean"] == ["0.running_mean", "0.again"]


def test_generators_are_seeded_and_restored() -> None:
    def draw() -> tuple[float, ...]:
        return torch.rand(()).item(), np.random.uniform(), random.random()

    before = torch.get_rng_state(), np.random.get_state(legacy=False), random.getstate()
    values = []
    for seed in (1, 1, -1):
        with checks.seeded(seed):
            values.append(draw())
    assert values[0] == values[1]
    assert all(one != other for one, other in zip(values[0], values[2], strict=True))
    after = torch.get_rng_state(), np.random.get_state(legacy=False), random.getstate()
    assert [repr(state) for state in after] == [repr(state) for state in before]


def test_buffers_get_their_values_back() -> None:
    layer = nn.BatchNorm1d(2)
    values, mean = checks.BufferValues(layer), layer.running_mean
    assert values.changed() == {}
    layer(torch.rand(3, 2))
    layer.num_batches_tracked = torch.tensor(5)
    assert list(values.changed()) == ["running_mean", "running_var", "num_batches_tracked"]
    values.restore()
    assert values.changed() == {}
    assert layer.running_mean is mean
    assert mean is not None
    assert not mean.any()


def test_function_without_a_second_derivative_is_refused() -> None:
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x.square()

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return 2 * ctx.saved_tensors[0] * gradient

    model = ModuleModel((3,), 1, lambda: nn.Sequential(nn.Linear(3, 1), Calling(Once.apply)))
    assert not model.vectorize
    with pytest.raises(MamlError, match=r"has no second derivative: .*choose inner\.order=1"):
        model.check_second_derivative()
    ModuleModel((3,), 1, lambda: nn.Linear(3, 1)).check_second_derivative()
    ModuleModel((3,), 3, nn.Identity).check_second_derivative()


class Noisy(nn.Linear):
    """A network for sinusoids whose outputs are noisy."""

    def __init__(self) -> None:
        super().__init__(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.randn(())


class FirstOrderOnly(nn.Linear):
    """A network for sinusoids that has a first derivative only."""

    def __init__(self) -> None:
        super().__init__(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.hardsigmoid(super().forward(x))


def test_refused_network_leaves_no_file(tiny: TinyRuns) -> None:
    for name, reason in (("Noisy", "draws random numbers"), ("FirstOrderOnly", "no second derivative")):
        network = ["model=module", f"model.module._target_={__name__}.{name}", "inner.adapt=['*']"]
        with pytest.raises(MamlError, match=reason):
            tiny.run(*network)
        assert not tiny.runs_dir.exists()
    assert (tiny.run(*network, "inner.order=1") / "report.json").exists()


class Kept(nn.Module):
    """A network around a given function, with one parameter of a given value."""

    def __init__(self, weight: Tensor, function: Callable[[Tensor], Tensor] = torch.tanh) -> None:
        super().__init__()
        self.weight, self.head, self.function = nn.Parameter(weight), nn.Linear(4, 1), function

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.function(x @ self.weight))


def test_tensor_that_a_parameter_is_made_around_stays_as_it_is() -> None:
    kept = Stream(0).normal((3, 4))
    before = kept.clone()
    model = ModuleModel((3,), 1, lambda: Kept(kept))
    assert torch.equal(kept, before)
    assert torch.equal(model.init(Stream(1))["weight"], before)


@pytest.mark.parametrize("vectorize", [True, False])
def test_gradient_that_is_computed_with_other_parameters_is_refused(vectorize: bool) -> None:
    class Checkpointed(Kept):
        def __init__(self) -> None:
            super().__init__(torch.ones(3, 4), lambda x: checkpoint(self.compute, x, use_reentrant=False))
            self.second = nn.Linear(4, 4)

        def compute(self, x: Tensor) -> Tensor:
            return torch.tanh(self.second(x))

    with pytest.raises(MamlError, match=r"wrong gradient of \S+ here.*torch\.utils\.checkpoint"):
        ModuleModel((3,), 1, Checkpointed, vectorize)


def test_hook_that_changes_the_gradient_of_a_parameter_is_refused() -> None:
    class Hooked(Kept):
        def __init__(self) -> None:
            super().__init__(torch.ones(3, 4))
            self.weight.register_hook(lambda gradient: 0 * gradient)

    with pytest.raises(MamlError, match=r"wrong gradient of weight here.*or a hook of a parameter"):
        ModuleModel((3,), 1, Hooked)


def test_forward_that_changes_inputs_or_parameters_is_refused() -> None:
    with pytest.raises(MamlError, match="changes its inputs in place in forward"):
        ModuleModel((3,), 1, lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 1)))

    class Bounded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(5, 4, max_norm=0.1), nn.Linear(4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.table(x.sum(1).long().clamp(0, 4)))

    with pytest.raises(MamlError, match=r"changes table\.weight in place in forward"):
        ModuleModel((3,), 1, Bounded)


def test_complex_parameters_are_refused() -> None:
    class Complex(Kept):
        def __init__(self) -> None:
            super().__init__(torch.ones(3, 4))
            self.phase = nn.Parameter(torch.ones(4, dtype=torch.complex64))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.phase.real.sum()

    with pytest.raises(MamlError, match=r"complex parameter phase.*view_as_complex"):
        ModuleModel((3,), 1, Complex)
