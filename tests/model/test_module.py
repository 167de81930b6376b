"""The adapter for a user's own torch.nn.Module."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize

from maml.algorithm.maml import MAML
from maml.config.schema import _check_part, build
from maml.errors import MamlError
from maml.hardware.precision import use_precision
from maml.inner.base import Inner
from maml.inner.learned_sgd import LearnedSGD
from maml.inner.sgd import SGD
from maml.model import module
from maml.model.base import Model
from maml.model.module import ModuleModel
from maml.seeding import Stream
from maml.types import Params
from tests import algorithms
from tests.model import torch_layers
from tests.training.test_meta_gradient import NUM_TASKS, FixedExamples, as_list

SHAPE = (6, 6, 2)


class Net(nn.Module):
    def __init__(self, num_outputs: int = 3) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
        self.head = nn.Linear(64, num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def stacked(model: ModuleModel, count: int) -> dict[str, Tensor]:
    tasks = [model.init(Stream(seed)) for seed in range(count)]
    return {name: torch.stack([task[name] for task in tasks]) for name in tasks[0]}


@pytest.mark.parametrize("vectorize", [True, False])
def test_outputs_are_those_of_the_module_in_training_mode(vectorize: bool) -> None:
    model = ModuleModel(SHAPE, 3, Net, vectorize)
    params, x = stacked(model, 2), Stream(5).normal((2, 7, *SHAPE))
    outputs = model(params, x)
    for task in range(2):
        net = Net()
        net.load_state_dict({name: value[task] for name, value in params.items()}, strict=False)
        torch.testing.assert_close(outputs[task], net.train()(x[task].permute(0, 3, 1, 2)), rtol=1e-4, atol=1e-5)


def test_buffers_of_batch_normalisation_stay_unchanged() -> None:
    net = Net()
    before = {name: value.clone() for name, value in net.named_buffers()}
    model = ModuleModel(SHAPE, 3, lambda: net)
    model(stacked(model, 2), Stream(5).normal((2, 7, *SHAPE)))
    assert before
    assert all(torch.equal(value, before[name]) for name, value in net.named_buffers())


def test_reference_statistics_make_predictions_inductive() -> None:
    model = ModuleModel(SHAPE, 3, Net)
    params, x = stacked(model, 1), Stream(5).normal((1, 8, *SHAPE))
    joint = model(params, x, num_reference=5)
    alone = model(params, x[:, :6], num_reference=5)
    torch.testing.assert_close(joint[:, 5], alone[:, 5], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(model(params, x)[:, 5], alone[:, 5], rtol=1e-2)


def test_initial_parameters_follow_the_seed_alone() -> None:
    first, again, other = (ModuleModel(SHAPE, 3, Net).init(Stream(seed)) for seed in (1, 1, 2))
    torch.manual_seed(77)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])


def test_frozen_parameters_are_not_trained() -> None:
    class Frozen(Net):
        def __init__(self) -> None:
            super().__init__()
            self.body[0].weight.requires_grad_(False)

    assert "body.0.weight" not in ModuleModel(SHAPE, 3, Frozen).init(Stream(0))
    assert "body.0.bias" in ModuleModel(SHAPE, 3, Frozen).init(Stream(0))


def test_dropout_is_refused_because_no_seed_controls_it() -> None:
    with pytest.raises(MamlError, match=r"has dropout \(1, p=0.5\)"):
        ModuleModel((4,), 3, lambda: nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5)))


def test_modules_that_do_not_fit_the_domain_are_refused() -> None:
    with pytest.raises(MamlError, match=r"outputs of shape \(2,\), but the domain needs \(3,\)"):
        ModuleModel(SHAPE, 3, lambda: Net(2))
    with pytest.raises(MamlError, match="cannot be run on inputs of shape"):
        ModuleModel((9, 9, 2), 3, Net)


class Linear(nn.Module):
    """A linear model whose constructor takes the number of outputs."""

    def __init__(self, out_dim: int, in_shape: tuple[int, ...] = (), width: int = 5) -> None:
        super().__init__()
        self.in_shape = in_shape
        self.net = nn.Sequential(nn.Flatten(), nn.LazyLinear(width), nn.Linear(width, out_dim))
        self.net(torch.zeros(1, *in_shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def test_module_is_told_the_sizes_of_the_domain_that_it_asks_for() -> None:
    model = ModuleModel(SHAPE, 4, Linear)
    assert isinstance(model.net, Linear)
    assert model.net.in_shape == SHAPE
    assert model.init(Stream(0))["net.2.weight"].shape == (4, 5)


def test_sizes_that_the_config_gives_are_kept() -> None:
    model = ModuleModel((6,), 3, partial(Linear, in_shape=(2, 3), width=2))
    assert isinstance(model.net, Linear)
    assert model.net.in_shape == (2, 3)
    with pytest.raises(MamlError, match=r"outputs of shape \(2,\), but the domain needs \(3,\)"):
        ModuleModel(SHAPE, 3, partial(Linear, 2, SHAPE))
    with pytest.raises(MamlError, match=r"outputs of shape \(2,\).*give its constructor a parameter called out_dim"):
        ModuleModel(SHAPE, 3, partial(Linear, out_dim=2))


def test_size_left_open_is_no_missing_key() -> None:
    target = {"_target_": f"{__name__}.Linear", "_partial_": True}
    config = {"_target_": "maml.model.module.ModuleModel", "module": target}
    assert _check_part("model", config, Model) == []
    assert _check_part("model", {**config, "module": {**target, "out_dim": 2}}, Model) == []
    (problem,) = _check_part("model", {**config, "module": {**target, "out_dim": "two"}}, Model)
    assert "model.module.out_dim='two'" in problem
    model = build(config, in_shape=SHAPE, out_dim=4)
    assert model.init(Stream(0))["net.2.weight"].shape == (4, 5)


Forward = Callable[[Params, Tensor], Tensor]


def assert_exact_meta_gradient(
    make: Callable[..., nn.Module],
    forward: Forward,
    order: int,
    vectorize: bool = True,
    inner_kind: type[SGD | LearnedSGD] = SGD,
    adapt: str = "*",
) -> ModuleModel:
    """Compares the meta-gradient of a network of three inputs and one output with a plain loop over tasks, in float64.

    Args:
        make: builds the network.
        forward: the same network as a function of its parameters and inputs.
        order: order of the meta-gradient.
        vectorize: as in `ModuleModel`.
        inner_kind: the inner optimizer.
        adapt: pattern of the parameters that adapt.

    Returns:
        The model.
    """
    with use_precision("float64"):
        domain = FixedExamples((3,), classes=False)
        inner: Inner = inner_kind(step_size=0.1, num_steps=2, order=order, adapt=[adapt])  # type: ignore[arg-type]
        model = ModuleModel((3,), 1, make, vectorize)
        algorithm = algorithms.build_from(MAML, domain, model, inner)
        theta = {
            name: value + Stream(1).child(name).uniform(value.shape, -0.05, 0.05)
            for name, value in algorithm.theta.items()
        }
        tasks = domain.sample_tasks(NUM_TASKS, Stream(2))
        gradient, metrics = algorithms.gradient(algorithm, theta, tasks)

        leaves = {name: value.clone().requires_grad_() for name, value in theta.items()}
        total = torch.zeros(())
        for x, y, query_x, query_y in as_list(tasks):
            params = {name: value for name, value in leaves.items() if not name.startswith("inner.")}
            for step in range(2):
                names = inner.adapted_names(list(params))
                gradients = torch.autograd.grad(
                    ((forward(params, x) - y) ** 2).mean(),
                    [params[name] for name in names],
                    create_graph=order == 2,
                    materialize_grads=True,
                )
                for name, each in zip(names, gradients, strict=True):
                    size = leaves[f"inner.step_size.{name}"][step] if inner_kind is LearnedSGD else 0.1
                    params[name] = params[name] - size * each
            total = total + ((forward(params, query_x) - query_y) ** 2).mean() / NUM_TASKS
        expected = torch.autograd.grad(total, list(leaves.values()), materialize_grads=True)
        assert metrics["loss"].item() == pytest.approx(total.item(), rel=1e-10)
        assert any(value.any() for value in expected)
        for name, value in zip(leaves, expected, strict=True):
            torch.testing.assert_close(gradient[name], value, rtol=1e-9, atol=1e-11, msg=partial("{}: {}".format, name))
    return model


class Calling(nn.Module):
    """Calls a function."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def test_every_layer_of_torch_is_listed() -> None:
    listed = sorted(torch_layers.CASES)
    assert torch_layers.layers() == listed, "tests/model/torch_layers.py lists other layers than torch.nn has"


@pytest.mark.parametrize("name", torch_layers.CASES)
def test_layer_of_torch_trains_with_the_exact_meta_gradient_or_is_refused(name: str) -> None:
    case = torch_layers.CASES[name]
    make = partial(torch_layers.Surrounded, case)
    if "refused" in case.limits:
        with pytest.raises(MamlError, match=r"model\.module (has dropout|draws random numbers in forward) \(layer, "):
            ModuleModel((3,), 1, make)
        return
    with use_precision("float64"):
        reference = torch_layers.Surrounded(case, 1, plain=True)
        reference(torch.zeros(2, 3))

    def forward(params: Params, x: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return functional_call(reference, params, (x,))

    model = assert_exact_meta_gradient(make, forward, order=1)
    assert model.vectorize == ("one task at a time" not in case.limits)
    if "first order" in case.limits:
        with pytest.raises(MamlError, match=r"model\.module has no second derivative: .*choose inner\.order=1"):
            assert_exact_meta_gradient(make, forward, order=2)
    else:
        assert_exact_meta_gradient(make, forward, order=2)


class Tied(nn.Module):
    """One layer that is registered twice, and another one that is tied to its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.c, self.head = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 1)
        self.b = self.a
        self.c.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.c(torch.tanh(self.b(torch.tanh(self.a(x))))))


def tied(params: Params, x: Tensor) -> Tensor:
    for _ in range(2):
        x = torch.tanh(F.linear(x, params["a.weight"], params["a.bias"]))
    return F.linear(F.linear(x, params["a.weight"], params["c.bias"]), params["head.weight"], params["head.bias"])


class Spare(nn.Module):
    """A linear layer, and one that forward does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.spare, self.used = nn.Linear(2, 2), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def spare(params: Params, x: Tensor) -> Tensor:
    return F.linear(x, params["used.weight"], params["used.bias"])


@pytest.mark.parametrize("inner_kind", [SGD, LearnedSGD])
@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize(("make", "forward"), [(Tied, tied), (Spare, spare)])
def test_tied_and_unused_parameters_have_the_exact_meta_gradient(
    make: type[nn.Module], forward: Forward, order: int, vectorize: bool, inner_kind: type[SGD | LearnedSGD]
) -> None:
    model = assert_exact_meta_gradient(make, forward, order, vectorize, inner_kind)
    assert model.vectorize == vectorize


def test_tied_network_keeps_its_own_parameters_in_all_places() -> None:
    model = ModuleModel((3,), 1, Tied, vectorize=False)
    before = {name: value.clone() for name, value in model.net.named_parameters(remove_duplicate=False)}
    assert len(before) == 8
    for seed in (1, 2):
        params = {name: value.unsqueeze(0) for name, value in model.init(Stream(seed)).items()}
        x = Stream(seed).normal((1, 4, 3))
        torch.testing.assert_close(model(params, x)[0], tied({name: value[0] for name, value in params.items()}, x[0]))
    after = dict(model.net.named_parameters(remove_duplicate=False))
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert after["c.weight"] is after["a.weight"] is after["b.weight"]


@pytest.mark.parametrize("order", [1, 2])
def test_parameters_that_adapt_may_all_be_unused(order: int) -> None:
    assert_exact_meta_gradient(Spare, spare, order, adapt="spare.*")
    inner = SGD(step_size=0.1, num_steps=1, order=1, adapt=["spare.*"])
    model = ModuleModel((3,), 1, Spare)
    params = {name: value.unsqueeze(0) for name, value in model.init(Stream(0)).items()}
    x = Stream(1).normal((1, 4, 3))
    *_, (adapted, _) = inner.adapt(lambda own, step: model(own, x).sum((1, 2)), params, 2, create_graph=False)
    assert all(torch.equal(adapted[name], value) for name, value in params.items())


def test_unused_parameters_are_named_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        ModuleModel((3,), 1, Spare)
    printed = capsys.readouterr().err
    assert printed.count("model.module does not use spare.weight, spare.bias in forward") <= 1, "once in a process"


def test_batch_normalisation_that_is_registered_twice_uses_its_batch_in_both_places() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = self.second = nn.BatchNorm1d(3)
            self.head = nn.Linear(3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.second(torch.tanh(self.first(x))))

    with use_precision("float64"):
        reference = Twice()

    assert assert_exact_meta_gradient(Twice, lambda params, x: functional_call(reference, params, x), 2).vectorize


@pytest.mark.parametrize("order", [1, 2])
def test_function_that_a_network_makes_of_itself_sees_the_parameters_of_the_task(order: int) -> None:
    class Closed(nn.Linear):
        def __init__(self) -> None:
            super().__init__(3, 1)
            self.function = lambda x: F.linear(x, self.weight, self.bias)

        def forward(self, x: Tensor) -> Tensor:
            return self.function(x)

    assert_exact_meta_gradient(Closed, lambda params, x: F.linear(x, params["weight"], params["bias"]), order)


def test_layers_that_a_function_keeps_stay_as_they_are() -> None:
    backbone = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    model = ModuleModel((3,), 1, lambda: nn.Sequential(backbone, nn.Linear(4, 1)))
    model(stacked(model, 2), Stream(5).normal((2, 7, 3)))
    assert isinstance(backbone[1], nn.BatchNorm1d)
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    assert torch.equal(model.init(Stream(3))["0.0.weight"], before["0.weight"])


@pytest.mark.parametrize("order", [1, 2])
def test_data_dependent_control_flow_runs_one_task_at_a_time(order: int) -> None:
    def bent(x: Tensor) -> Tensor:
        return 2 * x if x.sum() > 0 else torch.tanh(x)

    model = assert_exact_meta_gradient(
        lambda: nn.Sequential(nn.Linear(3, 1), Calling(bent)),
        lambda params, x: bent(F.linear(x, params["0.weight"], params["0.bias"])),
        order,
    )
    assert not model.vectorize


def test_line_says_that_one_task_is_computed_at_a_time_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    module._announce_once.cache_clear()
    for _ in range(2):
        ModuleModel((3,), 1, lambda: nn.Sequential(nn.Linear(3, 1), Calling(lambda x: x * float(x.sum().item()))))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("model.module computes one task at a time, which is slower: torch.func.vmap fails on it (")
    ModuleModel((3,), 1, lambda: nn.Sequential(nn.Linear(3, 1)), vectorize=False)
    assert not capsys.readouterr().err


def test_names_of_the_inner_optimizer_are_refused() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    with pytest.raises(MamlError, match=r"has the parameter inner\.weight.*give the layer another name"):
        ModuleModel((3,), 1, Named)


def test_lazy_layers_get_their_shapes_from_the_domain_and_their_values_from_the_seed() -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3))

    model = ModuleModel(SHAPE, 3, make)
    first, again, other = (model.init(Stream(seed)) for seed in (1, 1, 2))
    assert first["0.weight"].shape == (4, 2, 3, 3)
    assert first["4.weight"].shape == (3, 64)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["4.weight"], other["4.weight"])
    assert model(stacked(model, 2), Stream(5).normal((2, 7, *SHAPE))).shape == (2, 7, 3)


def test_initial_values_from_any_global_generator_follow_the_seed() -> None:
    class Drawn(nn.Module):
        def __init__(self, draw: Callable[[], float]) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([[draw()] * 3]))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight.mT

    for draw in (random.random, np.random.uniform):
        model = ModuleModel((3,), 1, partial(Drawn, draw))
        values = [model.init(Stream(seed))["weight"][0, 0].item() for seed in (1, 1, 2)]
        assert values[0] == values[1] != values[2]
    with pytest.raises(MamlError, match="gives weight another initial value each time it is built"):
        ModuleModel((3,), 1, partial(Drawn, np.random.default_rng(0).uniform))


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(MamlError, match=r"gives an object of class int, not a torch\.nn\.Module"):
        ModuleModel((3,), 1, lambda: 3)  # type: ignore[arg-type, return-value]


def small_net(width: int, out_dim: int = 1):  # type: ignore[no-untyped-def]
    """A function that returns a network, as user code writes it."""
    return nn.Sequential(nn.Linear(3, width), nn.Linear(width, out_dim))


def annotated_net(out_dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, out_dim))


def text(out_dim: int) -> str:
    return "no network"


def function_part(function: str, **arguments: Any) -> dict[str, Any]:
    module = {"_target_": f"{__name__}.{function}", "_partial_": True, **arguments}
    return {"_target_": "maml.model.module.ModuleModel", "module": module}


def test_function_that_returns_a_network_is_a_target() -> None:
    for part in (function_part("small_net", width=2), function_part("annotated_net")):
        assert _check_part("model", part, Model) == []
        assert build(part, in_shape=(3,), out_dim=1).init(Stream(0))["0.weight"].shape[1] == 3
    (problem,) = _check_part("model", function_part("small_net", widht=2, width=2), Model)
    assert "model.module.widht is not a key" in problem
    (problem,) = _check_part("model", function_part("small_net"), Model)
    assert problem == "model.module.width is missing"
    (problem,) = _check_part("model", function_part("text"), Model)
    assert "it returns str, not torch.nn.modules.module.Module" in problem


def test_function_of_a_file_from_somebody_else_has_to_say_that_it_returns_a_network() -> None:
    assert _check_part("model", function_part("annotated_net"), Model, allow=["tests"]) == []
    (problem,) = _check_part("model", function_part("small_net", width=2), Model, allow=["tests"])
    assert "its annotation has to say that it returns torch.nn.modules.module.Module" in problem
    (problem,) = _check_part("model", function_part("annotated_net"), Model, allow=[])
    assert "needs the module tests.model.test_module" in problem


class Headed(nn.Module):
    """Calls its head once, or as often as it is told to."""

    def __init__(self, out_dim: int, num_calls: int = 1) -> None:
        super().__init__()
        self.body, self.norm, self.num_calls = nn.Linear(6, 5), nn.BatchNorm1d(5), num_calls
        self.head = nn.Linear(5, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.body(x)).relu()
        return sum((self.head(x) for _ in range(self.num_calls)), self.head.bias * 0)


@pytest.mark.parametrize("vectorize", [True, False])
def test_features_are_the_inputs_of_the_head(vectorize: bool) -> None:
    model = ModuleModel((6,), 3, partial(Headed), vectorize=vectorize)
    params, x = stacked(model, 2), Stream(1).normal((2, 4, 6))
    body = {name: value for name, value in params.items() if not name.startswith("head.")}
    features = model.features(body, x)
    assert model.num_features == 5 and features.shape == (2, 4, 5)
    torch.testing.assert_close(model.outputs(params, features), model(params, x))
    for task in range(2):
        net = Headed(3)
        net.load_state_dict({name: value[task] for name, value in params.items()}, strict=False)
        expected = net.norm(net.body(x[task])).relu()
        torch.testing.assert_close(features[task], expected, rtol=1e-4, atol=1e-5)
    assert model.running_statistics({"norm.shift": torch.zeros(5)}) == {}


@pytest.mark.parametrize("vectorize", [True, False])
def test_tasks_share_weights_in_one_batch_per_task(vectorize: bool) -> None:
    model = ModuleModel((6,), 3, partial(Headed), vectorize=vectorize)
    params, x = stacked(model, 2), Stream(1).normal((4, 4, 6))
    for shared in (params, {name: value[:1] for name, value in params.items()}):
        copies = {name: value.repeat_interleave(4 // len(value), 0) for name, value in shared.items()}
        torch.testing.assert_close(model(shared, x), model(copies, x))
        torch.testing.assert_close(model.features(shared, x), model.features(copies, x))


class HeadedByLayers(nn.Module):
    """Has a head of several layers, which gets feature maps; by name, and with further arguments if it is told to."""

    def __init__(self, out_dim: int, more: bool = False) -> None:
        super().__init__()
        self.body, self.more = nn.Conv2d(1, 2, 3), more
        self.head = _Head(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, out_dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x), 1) if self.more else self.head(input=self.body(x))


class _Head(nn.Sequential):
    def forward(self, input: Tensor, factor: int = 1) -> Tensor:
        return super().forward(input) * factor


@pytest.mark.parametrize("vectorize", [True, False])
def test_head_may_get_feature_maps(vectorize: bool) -> None:
    model = ModuleModel((5, 6, 1), 3, partial(HeadedByLayers), vectorize=vectorize)
    params, x = stacked(model, 2), Stream(1).normal((2, 4, 5, 6, 1))
    features = model.features(params, x)
    assert features.shape == (2, 4, model.num_features) == (2, 4, 2 * 3 * 4)
    torch.testing.assert_close(model.outputs(params, features), model(params, x))
    assert ModuleModel((5, 6, 1), 3, partial(HeadedByLayers, more=True)).num_features == 0


def test_module_without_a_head_that_is_called_once_has_no_features() -> None:
    assert ModuleModel((6,), 3, partial(Headed, num_calls=2)).num_features == 0
    assert ModuleModel((6,), 3, partial(nn.Linear, 6, 3)).num_features == 0


class WithRows(nn.Module):
    """Normalises several rows of each example, which follow one another, or come in turns with those of the others."""

    def __init__(self, in_turns: bool, norm: Callable[[], nn.Module] = lambda: nn.BatchNorm1d(4)) -> None:
        super().__init__()
        self.embed, self.norm, self.head, self.in_turns = nn.Linear(1, 4), norm(), nn.Linear(4, 1), in_turns

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.tanh(self.embed(x.unsqueeze(-1)))  # (S, L, 4)
        rows = rows.transpose(0, 1) if self.in_turns else rows
        normalised = self.norm(rows.flatten(0, 1)).unflatten(0, rows.shape[:2])
        return self.head(normalised.mean(0 if self.in_turns else 1))


def test_reference_statistics_are_those_of_all_rows_of_the_reference_examples() -> None:
    model = ModuleModel((6,), 1, lambda: WithRows(in_turns=False))
    params, x = stacked(model, 1), Stream(5).normal((1, 8, 6))
    torch.testing.assert_close(model(params, x, num_reference=4)[:, :4], model(params, x[:, :4]))
    with pytest.raises(MamlError, match="sees the rows of several examples in turns"):
        ModuleModel((6,), 1, lambda: WithRows(in_turns=True))


class WithReLU(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(super().forward(x))


def with_hook() -> nn.Module:
    layer = nn.BatchNorm1d(4)
    layer.register_forward_hook(lambda layer, inputs, outputs: torch.relu(outputs))
    return layer


def with_parametrization() -> nn.Module:
    return parametrize.register_parametrization(nn.BatchNorm1d(4), "weight", nn.Softplus())


@pytest.mark.parametrize("norm", [lambda: WithReLU(4), with_hook, with_parametrization])
def test_batch_normalisation_that_does_more_is_refused_by_its_name(norm: Callable[[], nn.Module]) -> None:
    with pytest.raises(MamlError, match=r"batch normalisation layer \(norm, \w+\) with a forward, hooks"):
        ModuleModel((6,), 1, lambda: WithRows(False, norm))


@pytest.mark.skipif(
    "bias" not in inspect.signature(nn.BatchNorm1d.__init__).parameters, reason="this torch has no such layer"
)
def test_batch_normalisation_without_a_shift_is_normalised() -> None:
    model = ModuleModel((6,), 1, lambda: WithRows(False, lambda: nn.BatchNorm1d(4, bias=False)))
    assert "norm.bias" not in model.init(Stream(0))


def test_module_that_cannot_be_vectorized_with_shared_weights_runs_one_task_at_a_time() -> None:
    class Repeating(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.start, self.head = nn.Parameter(torch.ones(1, 3)), nn.Linear(3, 1)

        def forward(self, x: Tensor) -> Tensor:
            state = self.start.repeat(len(x), 1)
            state += x
            return self.head(state)

    model = ModuleModel((3,), 1, Repeating)
    params, x = model.init(Stream(0)), Stream(5).normal((2, 6, 3))
    shared = model({name: value.unsqueeze(0) for name, value in params.items()}, x)
    torch.testing.assert_close(shared, (1 + x) @ params["head.weight"].T + params["head.bias"])


def test_one_task_of_colour_images_passes_group_normalisation() -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))

    model = ModuleModel((8, 8, 3), 2, make)
    assert model.vectorize
    model.check_second_derivative()
    params, x = stacked(model, 1), Stream(5).normal((1, 5, 8, 8, 3))
    expected = functional_call(model.net, {name: value[0] for name, value in params.items()}, x[0].permute(0, 3, 1, 2))
    torch.testing.assert_close(model(params, x)[0], expected)
