"""Layers with a task axis against PyTorch's layers, task by task, in float64 and up to second derivatives."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from maml.hardware.kernels import library, use_kernels
from maml.model import functional
from maml.seeding import Stream

Layer = Callable[..., Tensor]

# Three code paths of the convolution: one task; wide layers, task by task; all other shapes, all tasks as one product.
ONE_TASK, TASK_BY_TASK, ALL_TASKS = (1, 2, 5, 4, 3), (2, 10, 5, 5, 16), (3, 2, 5, 4, 2)


@pytest.fixture(params=[False, True], ids=["operations", "kernels"])
def kernels(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Whether our kernels convolve, or PyTorch's operations; the test runs with both."""
    if request.param and library() is None:
        pytest.skip("no C++ compiler")
    use_kernels(request.param)
    yield request.param
    use_kernels(False)


def random(*shape: int, seed: int = 0, low: float = -1.0) -> Tensor:
    return Stream(seed).uniform(shape, low, 1.0, dtype=torch.float64)


def with_gradients(*values: Tensor) -> list[Tensor]:
    return [value.clone().requires_grad_() for value in values]


def for_each_task(layer: Callable[..., Tensor], *values: Tensor) -> Tensor:
    """Applies a layer to each task separately."""
    return torch.stack([layer(*own) for own in zip(*values, strict=True)])


def derivatives(layer: Layer, *values: Tensor) -> list[Tensor]:
    """Returns a layer's output, its gradients, and the gradients of a function of these, as in a meta-gradient."""
    inputs = with_gradients(*values)
    output = layer(*inputs)
    first = torch.autograd.grad((output * random(*output.shape, seed=11)).sum(), inputs, create_graph=True)
    # Squares, so that second derivatives exist even for arguments in which the layer is linear.
    scalar = sum(((value * random(*value.shape, seed=12 + i)) ** 2).sum() for i, value in enumerate(first))
    scalar = (
        scalar + (layer(*(value - 0.1 * gradient for value, gradient in zip(inputs, first, strict=True))) ** 2).sum()
    )
    second = torch.autograd.grad(scalar, inputs)
    return [output.detach(), *(value.detach() for value in first), *second]


def assert_same_derivatives(layer: Layer, reference: Layer, *values: Tensor) -> None:
    for result, expected in zip(derivatives(layer, *values), derivatives(reference, *values), strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-10)


def conv_of_one_task(stride: int) -> Layer:
    def convolve(x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x.permute(0, 3, 1, 2), weight, stride=stride, padding=1).permute(0, 2, 3, 1)

    return convolve


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("shape", [ONE_TASK, TASK_BY_TASK, ALL_TASKS], ids=["one task", "task by task", "all tasks"])
def test_convolution_equals_the_librarys_for_each_task_to_second_derivatives(
    shape: tuple[int, ...], stride: int
) -> None:
    x, weight = random(*shape, seed=1), random(shape[0], 4, shape[-1], 3, 3, seed=2)
    reference = conv_of_one_task(stride)
    assert_same_derivatives(
        lambda x, weight: functional.conv3x3(x, weight, stride),
        lambda *both: for_each_task(reference, *both),
        x,
        weight,
    )
    assert functional.conv3x3(x, weight, stride).shape == (
        *shape[:2],
        math.ceil(shape[2] / stride),
        math.ceil(shape[3] / stride),
        4,
    )


def convolutions(stride: int, x: Tensor, weight: Tensor, grad: Tensor) -> list[Tensor]:
    """Returns the convolution, its data gradient and its weight gradient."""
    return [
        functional._convolve(x, weight, stride),
        functional._data_gradient(grad, weight, x.shape, stride),
        functional._weight_gradient(grad, x, weight.shape, stride),
    ]


@pytest.fixture
def compiled() -> Iterator[None]:
    """Kernels can be compiled here, and are off after the test."""
    if library() is None:
        pytest.skip("no C++ compiler")
    num_threads = torch.get_num_threads()
    yield
    use_kernels(False)
    torch.set_num_threads(num_threads)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 7), (5, 4)])
@pytest.mark.parametrize(
    ("channels", "outputs"), [(1, 1), (1, 64), (3, 32), (4, 20), (5, 7), (16, 16), (20, 35), (48, 66), (64, 100)]
)
def test_kernels_convolve_as_pytorchs_operations_do(
    channels: int, outputs: int, size: tuple[int, int], stride: int, dtype: torch.dtype
) -> None:
    x, weight = random(2, 3, *size, channels), random(2, outputs, channels, 3, 3, seed=1)
    grad = random(2, 3, *[math.ceil(length / stride) for length in size], outputs, seed=2)
    expected = convolutions(stride, x, weight, grad)
    use_kernels(True)
    found = convolutions(stride, *(value.to(dtype) for value in (x, weight, grad)))
    for one, other in zip(found, expected, strict=True):
        limit = (1e-5 if dtype == torch.float32 else 1e-14) * other.abs().max().item()
        torch.testing.assert_close(one.double(), other, rtol=0, atol=limit)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4), (0, 1, 3, 4, 2), (0, 3, 4, 2, 1), (0, 3, 4, 1, 2), (2, 1, 0, 4, 3)])
def test_kernels_take_values_in_any_order_in_memory(order: tuple[int, ...]) -> None:
    x, weight, grad = random(3, 2, 5, 4, 6), random(3, 8, 6, 3, 3, seed=1), random(3, 2, 3, 2, 8, seed=2)
    back = [order.index(axis) for axis in range(5)]
    moved = [value.permute(order).contiguous().permute(back) for value in (x, weight, grad)]
    expected = convolutions(2, x, weight, grad)
    use_kernels(True)
    for one, other in zip(convolutions(2, *moved), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-13)
    shared = convolutions(2, x, weight[:1].expand(3, -1, -1, -1, -1), grad)
    use_kernels(False)
    expected = convolutions(2, x, weight[:1].repeat(3, 1, 1, 1, 1), grad)
    for one, other in zip(shared, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-13)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("num_threads", [1, 2, 3])
@pytest.mark.parametrize("shape", [(1, 5, 40, 36, 64), (4, 7, 14, 14, 16), (2, 1, 60, 70, 70), (3, 2, 20, 20, 3)])
def test_threads_and_blocks_of_the_kernels_change_nothing(shape: tuple[int, ...], num_threads: int) -> None:
    """The first image is larger than a block, seven of the second fit into one, and tasks do not divide evenly."""
    x, weight = random(*shape), random(shape[0], 32, shape[-1], 3, 3, seed=1)
    grad = random(*shape[:2], math.ceil(shape[2] / 2), math.ceil(shape[3] / 2), 32, seed=2)
    expected = convolutions(2, x, weight, grad)
    use_kernels(True)
    torch.set_num_threads(num_threads)
    for one, other in zip(convolutions(2, x, weight, grad), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-14 * math.prod(shape[1:4]) * 9)


@pytest.mark.usefixtures("compiled")
def test_kernels_keep_what_is_not_a_number() -> None:
    x, weight = random(1, 1, 3, 3, 2), random(1, 2, 2, 3, 3, seed=1)
    x[0, 0, 0, 0, 0] = torch.nan
    use_kernels(True)
    y = functional._convolve(x, weight, 1)
    assert y[0, 0, :2, :2].isnan().all()
    assert y[0, 0, 2].isfinite().all() and y[0, 0, :, 2].isfinite().all()


def test_kernels_make_task_by_task_pay_for_more_rows_only(monkeypatch: pytest.MonkeyPatch, kernels: bool) -> None:
    convolve = Mock(wraps=F.conv2d)
    monkeypatch.setattr(functional.F, "conv2d", convolve)
    functional.conv3x3(random(2, 10, 5, 5, 16), random(2, 4, 16, 3, 3))  # 250 rows
    assert convolve.call_count == (0 if kernels else 2)
    functional.conv3x3(random(2, 80, 5, 5, 16), random(2, 4, 16, 3, 3))  # 2,000 rows
    assert convolve.call_count == (2 if kernels else 4)
    functional.conv3x3(random(1, 2, 5, 5, 16), random(1, 4, 16, 3, 3))
    assert convolve.call_count == (2 if kernels else 5), "a single task has no windows to batch"


def test_shapes_above_take_all_three_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    convolve, gather = F.conv2d, functional._gather

    def recording(way: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*args: Any) -> Tensor:
            calls.append(way)
            return function(*args)

        return run

    monkeypatch.setattr(functional.F, "conv2d", recording("task", convolve))
    monkeypatch.setattr(functional, "_gather", recording("all", gather))
    for shape, ways in ((ONE_TASK, ["task"]), (TASK_BY_TASK, ["task", "task"]), (ALL_TASKS, ["all"])):
        functional.conv3x3(random(*shape), random(shape[0], 4, shape[-1], 3, 3))
        assert calls == ways
        calls.clear()


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("num_tasks", [1, 2])
def test_convolution_has_the_derivatives_of_finite_differences(num_tasks: int, stride: int) -> None:
    x, weight = with_gradients(random(num_tasks, 1, 3, 4, 2, seed=1), random(num_tasks, 2, 2, 3, 3, seed=2))
    assert gradcheck(partial(functional.conv3x3, stride=stride), (x, weight))
    assert gradgradcheck(partial(functional.conv3x3, stride=stride), (x, weight))


@pytest.mark.parametrize("stride", [1, 2])
def test_convolution_differentiates_one_argument_alone(stride: int) -> None:
    x, weight = random(1, 2, 5, 4, 2, seed=1), random(1, 3, 2, 3, 3, seed=2)

    def reference(x: Tensor, weight: Tensor) -> Tensor:
        return for_each_task(conv_of_one_task(stride), x, weight)

    assert_same_derivatives(lambda x: functional.conv3x3(x, weight, stride), lambda x: reference(x, weight), x)
    assert_same_derivatives(lambda weight: functional.conv3x3(x, weight, stride), partial(reference, x), weight)


def test_gathering_and_adding_back_are_each_others_transpose() -> None:
    """<gather x, y> = <x, fold y>, which makes each the derivative of the other."""
    for stride in (1, 2):
        x = random(2, 3, 5, 4, 2, seed=1)
        windows = functional._gather(x, stride)
        y = random(*windows.shape, seed=2)
        folded = functional._add_up(y, 5, 4, stride)
        assert (windows * y).sum().item() == pytest.approx((x * folded).sum().item(), rel=1e-12)


def test_transposed_convolution_equals_the_librarys_for_each_task_to_second_derivatives() -> None:
    def library(x: Tensor, weight: Tensor) -> Tensor:
        planes = F.conv_transpose2d(x.permute(0, 3, 1, 2), weight.transpose(0, 1), stride=2)
        return planes.permute(0, 2, 3, 1)

    values = random(3, 4, 2, 3, 2, seed=1), random(3, 5, 2, 2, 2, seed=2)
    assert_same_derivatives(functional.conv_transpose2x2, lambda *tasks: for_each_task(library, *tasks), *values)


def test_linear_equals_the_librarys_for_each_task_to_second_derivatives() -> None:
    values = random(3, 4, 2, seed=1), random(3, 5, 2, seed=2), random(3, 5, seed=3)
    assert_same_derivatives(functional.linear, lambda *all_tasks: for_each_task(F.linear, *all_tasks), *values)
    assert gradgradcheck(functional.linear, with_gradients(*(value[:2] for value in values)))


@pytest.mark.parametrize("num_reference", [None, 2])
@pytest.mark.parametrize("shape", [(2, 4, 3), (2, 3, 2, 3, 2)], ids=["vectors", "images"])
def test_statistics_are_mean_and_biased_variance_of_the_leading_examples(
    shape: tuple[int, ...], num_reference: int | None
) -> None:
    x = random(*shape)
    mean, variance = functional.batch_statistics(x, num_reference)
    assert mean.shape == variance.shape == (shape[0], *[1] * (len(shape) - 2), shape[-1])
    for task in range(shape[0]):
        rows = x[task, :num_reference].reshape(-1, shape[-1])
        for feature in range(shape[-1]):
            column = rows[:, feature].tolist()
            average = sum(column) / len(column)
            assert mean[task, ..., feature].item() == pytest.approx(average, rel=1e-12)
            spread = sum((value - average) ** 2 for value in column) / len(column)
            assert variance[task, ..., feature].item() == pytest.approx(spread, rel=1e-12)


@pytest.mark.parametrize("num_reference", [None, 2])
def test_statistics_have_the_derivatives_of_finite_differences(num_reference: int | None) -> None:
    (x,) = with_gradients(random(2, 3, 2, 2, 2))
    assert gradcheck(lambda x: functional.batch_statistics(x, num_reference), (x,))
    assert gradgradcheck(lambda x: functional.batch_statistics(x, num_reference), (x,))


def test_normalisation_equals_the_formula_to_second_derivatives() -> None:
    def formula(x: Tensor, shift: Tensor) -> Tensor:
        mean = x.mean((0, 1, 2))
        variance = ((x - mean) ** 2).mean((0, 1, 2))
        return (x - mean) / torch.sqrt(variance + 1e-3) + shift

    values = random(3, 2, 3, 2, 4, seed=1), random(3, 4, seed=2)

    def batch_norm(x: Tensor, shift: Tensor) -> Tensor:
        return functional.normalize(x, *functional.batch_statistics(x), shift)

    assert_same_derivatives(batch_norm, lambda *both: for_each_task(formula, *both), *values)


def test_normalisation_by_given_statistics_equals_the_librarys() -> None:
    x, mean, variance = random(2, 3, 4, seed=1), random(2, 1, 4, seed=2), random(2, 1, 4, seed=3, low=0.1)
    shift, scale = random(2, 4, seed=4), random(2, 4, seed=5)
    for task in range(2):
        expected = F.batch_norm(
            x[task], mean[task, 0], variance[task, 0], scale[task], shift[task], training=False, eps=1e-3
        )
        given = (value[task : task + 1] for value in (x, mean, variance, shift, scale))
        torch.testing.assert_close(functional.normalize(*given)[0], expected, rtol=1e-12, atol=1e-12)
    assert gradgradcheck(functional.normalize, with_gradients(x[:1], mean[:1], variance[:1], shift[:1], scale[:1]))


@pytest.mark.parametrize("keep_odd", [False, True])
def test_pooling_takes_the_maximum_of_each_window_and_its_gradient_goes_there(keep_odd: bool) -> None:
    (x,) = with_gradients(random(2, 3, 5, 4, 2))
    pooled = functional.max_pool(x, keep_odd)
    rows = 3 if keep_odd else 2
    assert pooled.shape == (2, 3, rows, 2, 2)
    expected = torch.zeros_like(x)
    weights = random(*pooled.shape, seed=1)
    for task in range(2):
        for image in range(3):
            for channel in range(2):
                for i in range(rows):
                    for j in range(2):
                        window = x[task, image, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2, channel].detach()
                        assert pooled[task, image, i, j, channel].item() == window.max().item()
                        row, column = divmod(int(window.argmax()), 2)
                        expected[task, image, 2 * i + row, 2 * j + column, channel] = weights[
                            task, image, i, j, channel
                        ]
    (gradient,) = torch.autograd.grad((pooled * weights).sum(), [x])
    assert torch.equal(gradient, expected)


def test_products_keep_the_type_of_their_inputs() -> None:
    for dtype in (torch.float32, torch.float64):
        x, weight = random(2, 3, 4, 4, 2).to(dtype), random(2, 3, 2, 3, 3).to(dtype)
        assert functional.conv3x3(x, weight).dtype == dtype
        assert functional.matmul(random(2, 3, 4).to(dtype), random(2, 4, 2).to(dtype)).dtype == dtype


@pytest.mark.parametrize(
    ("images", "kernels"),
    [((2, 3, 5, 5, 3), (2, 4, 1, 3, 3)), ((2, 3, 5, 5, 3), (2, 4, 3, 5, 5)), ((2, 3, 0, 5, 3), (2, 4, 3, 3, 3))],
)
def test_kernels_of_another_size_are_an_error(images: tuple[int, ...], kernels: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="cannot be convolved with kernels"):
        functional.conv3x3(torch.zeros(images), torch.zeros(kernels))
