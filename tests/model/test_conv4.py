"""The convolutional network against docs/protocol.md#omniglot-networks and docs/protocol.md#miniimagenet-network."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn

from maml.errors import MamlError
from maml.hardware.kernels import library, use_kernels
from maml.model.conv4 import Conv4
from maml.seeding import Stream
from maml.types import Params
from tests import plain_maml

needs_compiler = pytest.mark.skipif(library() is None, reason="needs a C++ compiler")


def omniglot() -> Conv4:
    return Conv4((28, 28, 1), 5, head_std=1.0)


def mini_imagenet() -> Conv4:
    return Conv4((84, 84, 3), 5, num_filters=32, pooling="max", head="flatten")


_LIBRARY_NAMES = {"scale": "weight", "shift": "bias", "mean": "running_mean", "variance": "running_var"}


class _FlattenImage(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1).flatten(1)


def library_network(params: Params, ceil_mode: bool = False) -> nn.Sequential:
    """Builds the network with 2x2 pooling from PyTorch's layers, for one task; images are ``(S, C, H, W)``."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for i in range(1, 5):
        filters, channels = params[f"conv{i}.weight"].shape[:2]
        layers[f"conv{i}"] = nn.Conv2d(channels, filters, 3, padding=1)
        layers[f"norm{i}"] = nn.BatchNorm2d(filters, eps=1e-3, momentum=0.1)
        layers[f"relu{i}"] = nn.ReLU()
        layers[f"pool{i}"] = nn.MaxPool2d(2, ceil_mode=ceil_mode)
    layers["flatten"] = _FlattenImage()
    layers["head"] = nn.Linear(params["head.weight"].shape[1], params["head.weight"].shape[0])
    net = nn.Sequential(layers).to(params["head.weight"].dtype)
    with torch.no_grad():
        for name, value in library_values(net, list(params)).items():
            value.copy_(params[name])
    return net


def library_values(net: nn.Sequential, names: list[str]) -> Params:
    """Returns the network's tensors under the names that Conv4 uses."""
    own = dict(net.named_parameters()) | dict(net.named_buffers())
    layers = {name: name.rpartition(".") for name in names}
    return {name: own[f"{layer}.{_LIBRARY_NAMES.get(kind, kind)}"] for name, (layer, _, kind) in layers.items()}


@pytest.mark.parametrize("norm_scale", [False, True])
@pytest.mark.parametrize("with_kernels", [False, pytest.param(True, marks=needs_compiler)])
def test_dropout_keeps_what_was_drawn_and_scales_it(norm_scale: bool, with_kernels: bool) -> None:
    model = Conv4((17, 16, 1), 3, num_filters=4, pooling="max", head="flatten", norm_scale=norm_scale, dropout=0.25)
    theta = {name: value.double() for name, value in model.init(Stream(0)).items()}
    x = Stream(1).uniform((2, 5, 17, 16, 1), dtype=torch.float64)
    kept = model.draw_dropout(5, Stream(torch.tensor([3, 4])))
    params = {name: value.expand(2, *value.shape) for name, value in theta.items()}
    use_kernels(with_kernels)
    try:
        found = model(params | kept, x)
    finally:
        use_kernels(False)
    for task in range(2):
        net = library_network(theta)

        def drop(layer: int, y: Tensor, task: int = task) -> Tensor:
            return y * kept[f"dropout.conv{layer}"][task].permute(0, 3, 1, 2) / 0.75

        for i in range(1, 5):
            getattr(net, f"pool{i}").register_forward_hook(lambda _, __, y, i=i: drop(i, y))
        torch.testing.assert_close(found[task], net(x[task].permute(0, 3, 1, 2)), rtol=1e-9, atol=1e-9)
    assert Conv4((17, 16, 1), 3).draw_dropout(5, Stream(torch.tensor([3]))) == {}


def test_parameter_counts_are_the_papers() -> None:
    assert sum(value.numel() for value in mini_imagenet().init(Stream(0)).values()) == 32_773
    sizes = {name: tuple(value.shape) for name, value in omniglot().init(Stream(0)).items()}
    assert sizes["conv1.weight"] == (64, 1, 3, 3)
    assert sizes["conv4.weight"] == (64, 64, 3, 3)
    assert sizes["head.weight"] == (5, 64)
    assert not any("scale" in name for name in sizes)


def test_initial_weights_are_glorot_uniform_and_the_head_has_std_one() -> None:
    params = omniglot().init(Stream(0))
    bound = (6 / (9 * 64 + 9 * 64)) ** 0.5
    assert 0.99 * bound < params["conv3.weight"].abs().max() <= bound
    assert abs(params["head.weight"].std().item() - 1.0) < 0.15
    assert not any(params[name].any() for name in params if name.endswith(("bias", "shift")))


@pytest.mark.parametrize("num_tasks", [1, 3])
@pytest.mark.parametrize(("pooling", "head"), [("stride", "mean"), ("max", "flatten"), ("mean", "flatten")])
def test_each_task_uses_its_own_parameters(num_tasks: int, pooling: str, head: str) -> None:
    model = Conv4((21, 18, 2), 5, num_filters=6, pooling=pooling, head=head)  # type: ignore[arg-type]
    tasks = [model.init(Stream(seed)) for seed in range(num_tasks)]
    x = Stream(9).normal((num_tasks, 4, 21, 18, 2))
    outputs = model({name: torch.stack([task[name] for task in tasks]) for name in tasks[0]}, x)
    for task, params in enumerate(tasks):
        expected = plain_maml.conv4(pooling, head)(params, x[task])
        torch.testing.assert_close(outputs[task], expected, rtol=1e-4, atol=1e-5)


def test_inputs_that_do_not_fit_are_refused() -> None:
    with pytest.raises(MamlError, match="takes images"):
        Conv4((1,), 5)
    with pytest.raises(MamlError, match="too small to be halved 4 times"):
        Conv4((12, 12, 1), 5, pooling="max")


def tasks_of_a_scaled_network(
    pooling: str = "max", count: int = 2, size: int = 17
) -> tuple[Conv4, list[Params], Tensor]:
    """Returns a network, random parameters of each task in float64, and images."""
    model = Conv4((size, size, 2), 3, num_filters=4, pooling=pooling, head="flatten", norm_scale=True)  # type: ignore[arg-type]
    tasks = [
        {
            name: value.double() + Stream(task).child(name).uniform(value.shape, -0.3, 0.3, dtype=torch.float64)
            for name, value in model.init(Stream(0)).items()
        }
        for task in range(count)
    ]
    return model, tasks, Stream(9).uniform((count, 6, size, size, 2), dtype=torch.float64)


def stacked(tasks: list[Params]) -> Params:
    return {name: torch.stack([task[name] for task in tasks]) for name in tasks[0]}


@pytest.mark.parametrize("num_tasks", [1, 2])
@pytest.mark.parametrize("pooling", ["max", "max_keep_odd"])
def test_scaled_normalisation_equals_the_librarys(num_tasks: int, pooling: str) -> None:
    model, tasks, x = tasks_of_a_scaled_network(pooling, num_tasks)
    initial = model.init(Stream(0))
    assert all(torch.equal(initial[f"norm{i}.scale"], torch.ones(4)) for i in range(1, 5))
    outputs = model(stacked(tasks), x)
    for task, params in enumerate(tasks):
        expected = library_network(params, ceil_mode=pooling == "max_keep_odd")(x[task].permute(0, 3, 1, 2))
        torch.testing.assert_close(outputs[task], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("num_tasks", [1, 2])
def test_statistics_seen_are_those_that_the_library_averages(num_tasks: int) -> None:
    model, tasks, x = tasks_of_a_scaled_network(count=num_tasks)
    seen: Params = {}
    model.features({name: value.requires_grad_() for name, value in stacked(tasks).items()}, x, seen=seen)
    assert len(seen) == 8 and not any(value.requires_grad for value in seen.values())
    for task, params in enumerate(tasks):
        net = library_network(params)
        net(x[task].permute(0, 3, 1, 2))
        for name, averaged in library_values(net, list(seen)).items():
            start = 1.0 if name.endswith("variance") else 0.0
            torch.testing.assert_close(0.9 * start + 0.1 * seen[name][task], averaged, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("num_tasks", [1, 2])
def test_running_statistics_normalise_where_there_are_any(num_tasks: int) -> None:
    model, tasks, x = tasks_of_a_scaled_network(count=num_tasks)
    for task, params in enumerate(tasks):
        for i in range(1, 5):
            stream = Stream(task).child(f"statistics {i}")
            params[f"norm{i}.mean"] = stream.child("mean").uniform((4,), -1.0, 1.0, dtype=torch.float64)
            params[f"norm{i}.variance"] = stream.child("variance").uniform((4,), 0.5, 2.0, dtype=torch.float64)
    outputs = model(stacked(tasks), x)
    for task, params in enumerate(tasks):
        expected = library_network(params).eval()(x[task].permute(0, 3, 1, 2))
        torch.testing.assert_close(outputs[task], expected, rtol=1e-9, atol=1e-9)
    one_image = model(stacked(tasks), x[:, :1])
    torch.testing.assert_close(one_image, outputs[:, :1], rtol=1e-9, atol=1e-9)


def test_pooling_that_keeps_odd_sizes_halves_84_to_6() -> None:
    model = Conv4((84, 84, 3), 5, num_filters=2, pooling="max_keep_odd", head="flatten", norm_scale=True)
    params = model.init(Stream(0))
    x = Stream(1).uniform((1, 2, 84, 84, 3))
    sizes = []
    net = library_network(params, ceil_mode=True)
    for i in range(1, 5):
        net.get_submodule(f"pool{i}").register_forward_hook(
            lambda module, given, output: sizes.append(output.shape[2:])
        )
    expected = net(x[0].permute(0, 3, 1, 2))
    assert sizes == [(42, 42), (21, 21), (11, 11), (6, 6)]
    features = model.features({name: value.unsqueeze(0) for name, value in params.items()}, x)
    assert features.shape == (1, 2, model.num_features) == (1, 2, 6 * 6 * 2)
    torch.testing.assert_close(model.outputs(stacked([params]), features)[0], expected, rtol=1e-4, atol=1e-5)
    assert mini_imagenet().num_features == 5 * 5 * 32, "pooling that drops odd rows and columns gives 5"
