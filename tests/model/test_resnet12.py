"""ResNet-12 against the same network from PyTorch's own layers, in float64."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from maml.errors import MamlError
from maml.model.resnet12 import ResNet12
from maml.seeding import Stream
from maml.types import Params
from tests import algorithms, plain_maml
from tests.training.test_meta_gradient import NUM_WAYS, as_list, make, plain_loss

pytestmark = pytest.mark.usefixtures("float64")

SHAPE, WIDTHS = (18, 17, 2), (3, 4, 2, 3)
_LIBRARY_NAMES = {"scale": "weight", "shift": "bias", "mean": "running_mean", "variance": "running_var"}


class _Convolution(nn.Conv2d):
    """A convolution and its normalisation."""

    def __init__(self, channels: int, filters: int, size: int) -> None:
        super().__init__(channels, filters, size, padding=size // 2, bias=False)
        self.norm = nn.BatchNorm2d(filters, eps=1e-3, momentum=0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))


class _Block(nn.Module):
    def __init__(self, channels: int, filters: int) -> None:
        super().__init__()
        self.conv1 = _Convolution(channels, filters, 3)
        self.conv2 = _Convolution(filters, filters, 3)
        self.conv3 = _Convolution(filters, filters, 3)
        self.shortcut = _Convolution(channels, filters, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.leaky_relu(self.conv1(x), 0.1)
        y = F.leaky_relu(self.conv2(y), 0.1)
        y = self.conv3(y)
        return F.max_pool2d(F.leaky_relu(y + self.shortcut(x), 0.1), 2)


class Library(nn.Module):
    """ResNet-12 from PyTorch's layers, for one task; images are ``(S, C, H, W)``."""

    def __init__(self, widths: tuple[int, ...], num_features: int, num_outputs: int, mean: bool) -> None:
        super().__init__()
        channels = (SHAPE[-1], *widths)
        for i in range(4):
            self.add_module(f"block{i + 1}", _Block(channels[i], channels[i + 1]))
        self.head = nn.Linear(num_features, num_outputs)
        self.mean = mean

    def forward(self, x: Tensor) -> Tensor:
        for i in range(4):
            x = self.get_submodule(f"block{i + 1}")(x)
        return self.head(x.mean((2, 3)) if self.mean else x.permute(0, 2, 3, 1).flatten(1))


def library_values(params: Params) -> Params:
    """Returns the tensors under the names that PyTorch's layers use."""
    parts = {name: name.rpartition(".") for name in params}
    return {f"{layer}.{_LIBRARY_NAMES.get(kind, kind)}": params[name] for name, (layer, _, kind) in parts.items()}


def library(model: ResNet12, params: Params) -> Library:
    net = Library(model.widths, model.num_features, model.out_dim, model.head == "mean")
    net.load_state_dict(library_values(params), strict=False)
    return net


def random_tasks(model: ResNet12, count: int) -> list[Params]:
    return [
        {
            name: value + Stream(task).child(name).uniform(value.shape, -0.3, 0.3, dtype=torch.float64)
            for name, value in model.init(Stream(0)).items()
        }
        for task in range(count)
    ]


def stacked(tasks: list[Params]) -> Params:
    return {name: torch.stack([task[name] for task in tasks]) for name in tasks[0]}


@pytest.mark.parametrize("num_tasks", [1, 3])
@pytest.mark.parametrize("head", ["mean", "flatten"])
def test_outputs_of_each_task_are_those_of_pytorchs_layers(head: str, num_tasks: int) -> None:
    model = ResNet12((35, 32, 2), 5, WIDTHS, head)  # type: ignore[arg-type]
    tasks, x = random_tasks(model, num_tasks), Stream(9).uniform((num_tasks, 4, 35, 32, 2), dtype=torch.float64)
    outputs = model(stacked(tasks), x)
    for task, params in enumerate(tasks):
        expected = library(model, params)(x[task].permute(0, 3, 1, 2))
        torch.testing.assert_close(outputs[task], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("head", ["mean", "flatten"])
def test_meta_gradient_is_that_of_pytorchs_layers(head: str, order: int) -> None:
    model = ResNet12((16, 16, 2), NUM_WAYS, WIDTHS, head)  # type: ignore[arg-type]
    algorithm, theta, tasks = make((16, 16, 2), True, model, num_steps=2, order=order)
    gradient, metrics = algorithms.gradient(algorithm, theta, tasks)

    def forward(params: Params, x: Tensor) -> Tensor:
        net = Library(model.widths, model.num_features, NUM_WAYS, head == "mean")
        return functional_call(net, library_values(params), (x.permute(0, 3, 1, 2),))

    leaves = {name: value.clone().requires_grad_() for name, value in theta.items()}
    adapted = algorithm.inner.adapted_names(list(theta))
    loss = plain_maml.outer_loss(forward, plain_loss(True), leaves, as_list(tasks), 0.3, 2, order, adapted)
    expected = torch.autograd.grad(loss, list(leaves.values()))
    assert metrics["loss"].item() == pytest.approx(loss.item(), rel=1e-9)
    for name, value in zip(leaves, expected, strict=True):
        torch.testing.assert_close(gradient[name], value, rtol=1e-7, atol=1e-9)


def test_statistics_seen_and_given_are_those_of_pytorchs_layers() -> None:
    model = ResNet12(SHAPE, 5, WIDTHS)
    tasks, x = random_tasks(model, 2), Stream(9).uniform((2, 6, *SHAPE), dtype=torch.float64)
    seen: Params = {}
    features = model.features(stacked(tasks), x, seen=seen)
    running = model.running_statistics(tasks[0])
    assert seen.keys() == running.keys() and len(seen) == 2 * 16
    averaged = {name: torch.lerp(start.expand_as(seen[name]), seen[name], 0.1) for name, start in running.items()}
    outputs = model(stacked(tasks) | averaged, x[:, :3])
    for task, params in enumerate(tasks):
        net = library(model, params)
        torch.testing.assert_close(model.outputs(stacked(tasks), features)[task], net(x[task].permute(0, 3, 1, 2)))
        own = dict(net.named_buffers())
        for name, value in library_values({name: value[task] for name, value in averaged.items()}).items():
            torch.testing.assert_close(own[name], value)
        torch.testing.assert_close(outputs[task], net.eval()(x[task, :3].permute(0, 3, 1, 2)))


def test_weights_that_tasks_share_give_the_outputs_of_copies() -> None:
    model = ResNet12(SHAPE, 5, WIDTHS)
    (params,) = random_tasks(model, 1)
    x = Stream(9).uniform((3, 4, *SHAPE), dtype=torch.float64)
    torch.testing.assert_close(model(stacked([params]), x), model(stacked([params] * 3), x))


def test_reference_images_alone_give_the_statistics() -> None:
    model = ResNet12(SHAPE, 5, WIDTHS)
    tasks, x = random_tasks(model, 2), Stream(9).uniform((2, 8, *SHAPE), dtype=torch.float64)
    both, fewer = model(stacked(tasks), x, num_reference=5), model(stacked(tasks), x[:, :6], num_reference=5)
    torch.testing.assert_close(both[:, 5], fewer[:, 5])
    torch.testing.assert_close(both[:, :5], model(stacked(tasks), x[:, :5]))


def test_default_network_has_the_published_size() -> None:
    model = ResNet12((84, 84, 3), 5, head="flatten")
    assert model.num_features == 5 * 5 * 640
    sizes = {name: value.shape for name, value in model.init(Stream(0)).items()}
    body = sum(size.numel() for name, size in sizes.items() if not name.startswith("head"))
    filters = (3, 64, 160, 320, 640)
    assert body == sum(9 * c * f + 18 * f * f + c * f + 8 * f for c, f in pairwise(filters))
    assert body == 12_424_320
    assert sizes["block2.shortcut.weight"] == (160, 64, 1, 1)


def test_initial_kernels_have_he_variance_and_shifts_are_zero() -> None:
    params = ResNet12((28, 28, 1), 5, (32, 32, 32, 32)).init(Stream(0))
    assert params["block3.conv2.weight"].std().item() == pytest.approx((2 / (9 * 32)) ** 0.5, rel=0.05)
    assert params["block3.shortcut.weight"].std().item() == pytest.approx((2 / 32) ** 0.5, rel=0.1)
    assert all((params[name] == 1).all() for name in params if name.endswith("scale"))
    assert not any(params[name].any() for name in params if name.endswith(("bias", "shift")))


def test_inputs_that_do_not_fit_are_refused() -> None:
    with pytest.raises(MamlError, match="takes images"):
        ResNet12((1,), 5)
    with pytest.raises(MamlError, match="15x28 are too small to be halved 4 times"):
        ResNet12((15, 28, 1), 5)
