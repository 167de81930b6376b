"""Normalisation and activation as one operation: its derivatives against autograd's and finite differences."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from maml.hardware.kernels import library, use_kernels
from maml.model.conv4 import Conv4
from maml.model.functional import batch_statistics, max_pool, normalize
from maml.model.mlp import MLP
from maml.model.normalization import Windows, gradient, norm_elu, norm_relu, second, value
from maml.seeding import Stream
from maml.types import expand

pytestmark = pytest.mark.skipif(library() is None, reason="no C++ compiler")
SHAPES: list[tuple[Windows, tuple[int, ...]]] = [
    ("none", (2, 5, 3, 3, 4)),
    ("none", (3, 7, 6)),
    ("none", (1, 2, 70)),  # more channels than the kernels compute together
    ("max", (2, 3, 4, 6, 3)),
    ("max", (2, 3, 5, 7, 65)),
    ("max_keep_odd", (2, 3, 5, 4, 3)),
    ("max_keep_odd", (1, 2, 3, 3, 2)),
]


@pytest.fixture(autouse=True)
def _kernels() -> Iterator[None]:
    use_kernels(True)
    yield
    use_kernels(False)


def plain(z: Tensor, shift: Tensor, scale: Tensor, windows: Windows) -> Tensor:
    """The same, operation by operation."""
    y = torch.relu(normalize(z, *batch_statistics(z), shift, scale))
    return y if windows == "none" else max_pool(y, keep_odd=windows == "max_keep_odd")


def draw(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Returns z, shift and scale; scales have either sign."""
    generator = torch.Generator().manual_seed(0)
    shapes = shape, (shape[0], shape[-1]), (shape[0], shape[-1])
    return [torch.randn(size, generator=generator, dtype=dtype).requires_grad_() for size in shapes]


def derivatives(function: Callable[..., Tensor], inputs: list[Tensor], windows: Windows, order: int) -> list[Tensor]:
    """Returns the value and the derivatives up to an order, each of a random sum of the ones before it."""
    generator = torch.Generator().manual_seed(1)
    # The memory of the tensors that the function gets is not contiguous, as that of parameters that tasks share.
    strided = [torch.stack([leaf, leaf], -1)[..., 0] for leaf in inputs]
    outputs: list[Tensor] = [function(*strided, windows)]
    found, leaves = list(outputs), list(inputs)
    for step in range(1, order + 1):
        cotangents = [
            torch.randn(output.shape, generator=generator, dtype=output.dtype).requires_grad_() for output in outputs
        ]
        strided = [torch.stack([leaf, leaf], -1)[..., 0] for leaf in cotangents]
        outputs = list(torch.autograd.grad(outputs, leaves, strided, create_graph=step < order, materialize_grads=True))
        found += outputs
        leaves += cotangents
    return found


@pytest.mark.parametrize(("windows", "shape"), SHAPES)
def test_derivatives_to_the_third_are_those_of_the_single_operations(windows: Windows, shape: tuple[int, ...]) -> None:
    inputs = draw(shape)
    expected = derivatives(plain, inputs, windows, order=3)
    for found, wanted in zip(derivatives(norm_relu, inputs, windows, order=3), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("windows", "shape"), [("none", (2, 3, 2, 2, 2)), ("max", (1, 2, 3, 2, 2))])
def test_first_and_second_derivatives_are_finite_differences(windows: Windows, shape: tuple[int, ...]) -> None:
    inputs = draw(shape)
    assert torch.autograd.gradcheck(lambda z, shift, scale: norm_relu(z, shift, scale, windows), inputs)
    assert torch.autograd.gradgradcheck(lambda z, shift, scale: norm_relu(z, shift, scale, windows), inputs)


@pytest.mark.parametrize(("windows", "shape"), SHAPES)
@pytest.mark.parametrize("num_threads", [1, 3])
def test_float32_is_as_exact_as_the_single_operations(
    windows: Windows, shape: tuple[int, ...], num_threads: int
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        found = derivatives(norm_relu, draw(shape, torch.float32), windows, order=2)
    finally:
        torch.set_num_threads(before)
    inputs = [value.detach().requires_grad_() for value in draw(shape, torch.float32)]
    expected = derivatives(plain, inputs, windows, order=2)
    for one, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(one, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("windows", ["none", "max"])
def test_functions_that_a_gpu_compiles_are_the_kernels(windows: Windows) -> None:
    z, shift, scale = (tensor.detach() for tensor in draw((2, 3, 5, 6, 3)))
    y, mean, factor = value(z, shift, scale, windows)
    grad, u, w, v = torch.randn_like(y), torch.randn_like(z), torch.randn_like(shift), torch.randn_like(shift)
    leaves = [tensor.clone().requires_grad_() for tensor in (grad, z, shift, scale)]
    outputs = norm_relu(leaves[1], leaves[2], leaves[3], windows)
    torch.testing.assert_close(y, outputs)
    first = torch.autograd.grad(outputs, leaves[1:], leaves[0], create_graph=True)
    then = torch.autograd.grad(first, [leaves[0], leaves[1], leaves[3]], [u, w, v])
    flat = windows == "none"
    rows = [tensor.flatten(1, 3)[:, None, None] if flat else tensor for tensor in (grad, z, u)]
    mean, factor = value(rows[1], shift, scale, windows)[1:]
    mine = gradient(rows[0], rows[1], shift, scale, mean, factor, windows)
    again = second(rows[2], w, v, rows[0], rows[1], shift, scale, mean, factor, windows)
    for found, expected in zip((*mine, *again), (*first, *then), strict=True):
        torch.testing.assert_close(found.view_as(expected), expected)


def test_the_first_of_equal_pixels_wins_and_a_nan_stays() -> None:
    z = torch.zeros(1, 1, 2, 4, 1, dtype=torch.float64)
    z[0, 0, :, 2:] = 1.0
    z.requires_grad_()
    shift, scale = torch.full((1, 1), 5.0, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    found, expected = (
        torch.autograd.grad(function(z, shift, scale, "max")[..., 0, 0, 0].sum(), z)[0]
        for function in (norm_relu, plain)
    )
    torch.testing.assert_close(found, expected)
    with torch.no_grad():
        y, mean, factor = value(z, shift, scale, "max")
        grad = torch.tensor([1.0, 0.0], dtype=torch.float64).view_as(y)
        torch.testing.assert_close(gradient(grad, z, shift, scale, mean, factor, "max")[0], expected)
        z[0, 0, 0, 0] = torch.nan
    assert norm_relu(z, shift, scale, "max").isnan().all()


@pytest.mark.parametrize("pooling", ["stride", "max", "max_keep_odd", "mean"])
@pytest.mark.parametrize("norm_scale", [False, True])
def test_network_is_the_same_with_and_without_kernels(pooling: str, norm_scale: bool) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        model = Conv4((17, 18, 2), 3, 4, pooling=pooling, norm_scale=norm_scale)  # type: ignore[arg-type]
        params = {name: value.requires_grad_() for name, value in expand(model.init(Stream(0)), 2).items()}
        x = Stream(1).normal((2, 3, 17, 18, 2))
    finally:
        torch.set_default_dtype(torch.float32)
    found = []
    for enabled in (True, False):
        use_kernels(enabled)
        loss = model(params, x).square().sum()
        first = torch.autograd.grad(loss, list(params.values()), create_graph=True, materialize_grads=True)
        squares = torch.stack([value.square().sum() for value in first]).sum()
        found.append([loss, *torch.autograd.grad(squares, list(params.values()), materialize_grads=True)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_fully_connected_network_is_the_same_with_and_without_kernels() -> None:
    model = MLP((3,), 2, hidden_sizes=[5, 4], normalization="batch")
    params = expand(model.init(Stream(0)), 2)
    x = Stream(1).normal((2, 6, 3))
    found = model(params, x)
    use_kernels(False)
    torch.testing.assert_close(found, model(params, x))


@pytest.mark.parametrize("windows", ["none", "max"])
def test_moments_are_the_mean_and_the_variance_of_each_task(windows: Windows) -> None:
    z = Stream(0).uniform((2, 3, 4, 4, 5), -1.0, 3.0, dtype=torch.float64)
    shift, moments = torch.zeros(1, 5, dtype=torch.float64), list[Tensor]()
    plain = norm_relu(z, shift, None, windows)
    assert torch.equal(norm_relu(z, shift, None, windows, moments), plain)
    for task in range(2):
        for feature in range(5):
            values = z[task, ..., feature]
            torch.testing.assert_close(moments[0][task, feature], values.mean(), rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(moments[1][task, feature], values.var(correction=0), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shape", [(1, 5, 3, 4, 6), (1, 7, 6), (3, 5, 4, 4, 2)])
def test_norm_elu_equals_the_plain_operations_to_second_derivatives(shape: tuple[int, ...]) -> None:
    def plain_elu(z: Tensor, shift: Tensor, scale: Tensor, _: Windows) -> Tensor:
        return F.elu(normalize(z, *batch_statistics(z), shift, scale))

    def fused(z: Tensor, shift: Tensor, scale: Tensor, _: Windows) -> Tensor:
        moments: list[Tensor] = []
        y = norm_elu(z, shift, scale, moments)
        for found, expected in zip(moments, batch_statistics(z), strict=True):
            torch.testing.assert_close(found, expected.flatten(1))
        return y

    for function, order in ((fused, 2), (norm_elu_first, 1)):
        found = derivatives(function, draw(shape), "none", order)
        for one, expected in zip(found, derivatives(plain_elu, draw(shape), "none", order), strict=True):
            torch.testing.assert_close(one, expected, rtol=1e-9, atol=1e-11)


def norm_elu_first(z: Tensor, shift: Tensor, scale: Tensor, _: Windows) -> Tensor:
    return norm_elu(z, shift, scale)


def test_norm_elu_that_is_used_twice_or_on_constants_has_exact_gradients() -> None:
    z, shift, scale = draw((1, 6, 3))

    def gradients(function: Callable[[Tensor, Tensor, Tensor], Tensor], z: Tensor, create_graph: bool) -> list[Tensor]:
        y = function(function(z, shift, scale).square(), shift, scale)
        return list(torch.autograd.grad(y.square().sum(), (shift, scale), create_graph=create_graph))

    for create_graph in (False, True):
        for start in (z, z.detach()):
            expected = gradients(
                lambda z, shift, scale: F.elu(normalize(z, *batch_statistics(z), shift, scale)), start, create_graph
            )
            torch.testing.assert_close(gradients(norm_elu, start, create_graph), expected, rtol=1e-11, atol=1e-11)


def test_shift_or_scale_of_other_features_is_an_error() -> None:
    z, shift = torch.zeros(2, 3, 5), torch.zeros(2, 5)
    for wrong in ((torch.zeros(2, 4), None), (shift, torch.zeros(2, 1))):
        with pytest.raises(ValueError, match="does not fit features of"):
            norm_relu(z, *wrong)
