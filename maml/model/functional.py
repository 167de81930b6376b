"""Layers whose weights have a leading task axis, so that the whole meta-batch is one computation.

Weights may have G entries instead of T, where G divides T. Each entry then serves T / G consecutive tasks, whose
examples are computed as one batch. No weight is copied for a task.

Images are channels-last, ``(T, S, H, W, C)``. All functions have exact derivatives of any order: the inner loop
differentiates once, and the meta-gradient differentiates the result again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from maml.hardware.kernels import call, kernels_apply
from maml.hardware.precision import round_factors
from maml.types import Params

BATCH_NORM_EPS = 1e-3  # as in the authors' TensorFlow code

# From this many output pixels per task and this many input channels on, a CPU convolves one task at a time with the
# library. There, one batched product of all tasks costs more for gathering windows than it saves. Our kernels copy no
# windows, so their limit is higher. Five Omniglot images have 245 output pixels in the second layer, 25 have 1,225.
_WIDE_ROWS, _WIDE_ROWS_WITH_KERNELS, _WIDE_CHANNELS = 200, 2000, 16

ACTIVATIONS = {"relu": torch.relu, "softplus": F.softplus, "tanh": torch.tanh}
Activation = Literal["relu", "softplus", "tanh"]


def for_tasks(value: Tensor, num_tasks: int) -> Tensor:
    """Repeats values that tasks share, so that each task has an entry: ``(G, ...)`` -> ``(T, ...)``."""
    groups = value.shape[0]
    if groups == num_tasks:
        return value
    return value.unsqueeze(1).expand(groups, num_tasks // groups, *value.shape[1:]).flatten(0, 1)


def _as_shared(x: Tensor, groups: int) -> Tensor:
    """Joins the examples of tasks that share weights: ``(T, S, ...)`` -> ``(G, T / G * S, ...)``."""
    return x if x.shape[0] == groups else x.reshape(groups, -1, *x.shape[2:])


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Applies one linear layer per task: ``(T, S, D)``, ``(T, O, D)``, ``(T, O)`` -> ``(T, S, O)``."""
    joined = _as_shared(x, weight.shape[0])
    y = matmul(joined, weight.transpose(1, 2)) + bias.unsqueeze(1)
    return y.reshape(*x.shape[:2], y.shape[-1])


def matmul(x: Tensor, y: Tensor) -> Tensor:
    """Multiplies a matrix by another per task, in the precision of the run."""
    return torch.bmm(*round_factors(x, y)).to(x.dtype)


def batch_statistics(x: Tensor, num_reference: int | None = None) -> tuple[Tensor, Tensor]:
    """Returns mean and (biased) variance of each feature of each task, ``(T, 1, ..., C)``, of x ``(T, S, ..., C)``.

    They are computed from the first ``num_reference`` examples; None is all of them.
    """
    return _Moments.apply(x if num_reference is None else x[:, :num_reference])


class _Moments(Function):
    """Mean and variance. The gradient is an affine function of x: one pass over memory, and differentiable again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        dims = tuple(range(1, x.dim() - 1))
        mean = x.mean(dims, keepdim=True)
        ctx.save_for_backward(x, mean)
        return mean, (x - mean).square_().mean(dims, keepdim=True)

    @staticmethod
    def backward(ctx: Any, grad_mean: Tensor, grad_variance: Tensor) -> Tensor:
        x, mean = ctx.saved_tensors
        count = x[0, ..., 0].numel()
        slope = grad_variance * (2 / count)
        return torch.addcmul(grad_mean / count - slope * mean, x, slope)


def normalize(x: Tensor, mean: Tensor, variance: Tensor, shift: Tensor, scale: Tensor | None = None) -> Tensor:
    """Normalises each feature of each task (docs/protocol.md#normalisation).

    ``F.batch_norm`` is not used, because its second derivatives are wrong or missing here. An affine function of x is
    one pass over memory.

    Args:
        x: ``(T, S, ..., C)``.
        mean: ``(T, 1, ..., C)``.
        variance: ``(T, 1, ..., C)``.
        shift: the learnt beta, ``(T, C)``.
        scale: the learnt gamma, ``(T, C)``; None, as in the authors' code, does not scale.
    """
    factor = torch.rsqrt(variance + BATCH_NORM_EPS)
    if scale is not None:
        factor = factor * for_tasks(scale, len(mean)).reshape(mean.shape)
    return torch.addcmul(for_tasks(shift, len(mean)).reshape(mean.shape) - mean * factor, x, factor)


def running_or_batch_statistics(
    params: Params, layer: str, x: Tensor, num_reference: int | None
) -> tuple[Tensor, Tensor]:
    """Returns a layer's running mean and variance, ``(T, 1, ..., C)``; those of the batch if there are none.

    Args:
        params: may hold ``{layer}.mean`` and ``{layer}.variance``.
        layer: the layer's name.
        x: the layer's inputs, ``(T, S, ..., C)``.
        num_reference: number of leading examples from which the batch's statistics are computed; None is all.
    """
    if f"{layer}.mean" not in params:
        return batch_statistics(x, num_reference)
    shape = (len(x), *[1] * (x.dim() - 2), x.shape[-1])
    mean, variance = (for_tasks(params[f"{layer}.{name}"], len(x)) for name in ("mean", "variance"))
    return mean.reshape(shape), variance.reshape(shape)


def normalize_layer(params: Params, layer: str, x: Tensor, num_reference: int | None, seen: Params | None) -> Tensor:
    """Normalises with a layer's running statistics or those of the batch, its shift, and its scale if it has one.

    Args:
        params: hold ``{layer}.shift``, and may hold ``{layer}.scale``, ``{layer}.mean`` and ``{layer}.variance``.
        layer: the layer's name.
        x: the layer's inputs, ``(T, S, ..., C)``.
        num_reference: as in `running_or_batch_statistics`.
        seen: the statistics of the layers so far; those of this layer are added. None adds nothing.
    """
    mean, variance = running_or_batch_statistics(params, layer, x, num_reference)
    if seen is not None:
        add_seen(seen, layer, mean, variance, x)
    return normalize(x, mean, variance, params[f"{layer}.shift"], params.get(f"{layer}.scale"))


def add_seen(seen: Params, layer: str, mean: Tensor, variance: Tensor, x: Tensor) -> None:
    """Adds a batch's mean and unbiased variance, ``(T, C)``, to the statistics that were seen.

    Args:
        seen: the statistics of the layers so far, by name; changed in place.
        layer: the layer's name.
        mean: ``(T, 1, ..., C)`` or ``(T, C)``.
        variance: the biased variance, as the mean.
        x: the layer's inputs, ``(T, S, ..., C)``.
    """
    count = x[0, ..., 0].numel()
    seen[f"{layer}.mean"] = mean.flatten(1).detach()
    seen[f"{layer}.variance"] = variance.flatten(1).detach() * (count / max(1, count - 1))


def cosine_similarity(x: Tensor, y: Tensor) -> Tensor:
    """Returns the cosine of the angle between vectors of each task: ``(T, Q, D)``, ``(T, M, D)`` -> ``(T, Q, M)``."""
    return F.normalize(x, dim=-1) @ F.normalize(y, dim=-1).transpose(1, 2)


def minus_squared_distance(x: Tensor, y: Tensor) -> Tensor:
    """Returns minus the squared Euclidean distance: ``(T, Q, D)``, ``(T, M, D)`` -> ``(T, Q, M)``."""
    # Computed as a product of matrices, because the differences would take D times the memory.
    products = torch.baddbmm(y.square().sum(-1).unsqueeze(1), x, y.transpose(1, 2), beta=-1, alpha=2)
    return products - x.square().sum(-1, keepdim=True)


SIMILARITIES = {"cosine": cosine_similarity, "euclidean": minus_squared_distance}
Similarity = Literal["cosine", "euclidean"]


def max_pool(x: Tensor, keep_odd: bool = False) -> Tensor:
    """Takes the maximum of 2x2 windows, stride 2: ``(T, S, H, W, C)`` -> ``(T, S, H // 2, W // 2, C)``.

    With ``keep_odd``, the last row and column of an odd size form windows of their own; otherwise they are dropped.
    """
    y = F.max_pool2d(x.flatten(0, 1).permute(0, 3, 1, 2), 2, ceil_mode=keep_odd).permute(0, 2, 3, 1)
    return y.unflatten(0, x.shape[:2])


def conv3x3(x: Tensor, weight: Tensor, stride: int = 1) -> Tensor:
    """Convolves each task's images with its own 3x3 kernels, zero padding of one pixel; there is no bias.

    Args:
        x: ``(T, S, H, W, C)``.
        weight: ``(T, O, C, 3, 3)``.
        stride: 1 or 2.

    Returns:
        ``(T, S, ceil(H / stride), ceil(W / stride), O)``.

    Raises:
        ValueError: if the kernels are of another size, or the images have no pixels.
    """
    if weight.shape[2:] != (x.shape[-1], 3, 3) or 0 in x.shape[2:4]:  # our own code would read beyond them
        raise ValueError(f"images {tuple(x.shape)} cannot be convolved with kernels {tuple(weight.shape)}")
    dtype, axes = x.dtype, x.shape[:2]
    x, weight = round_factors(_as_shared(x, weight.shape[0]), weight)
    y = _Conv.apply(x, weight, stride).to(dtype)
    return y.reshape(*axes, *y.shape[2:])


def conv1x1(x: Tensor, weight: Tensor) -> Tensor:
    """Applies each task's own 1x1 kernels to its images; there is no bias.

    Args:
        x: ``(T, S, H, W, C)``.
        weight: ``(T, O, C, 1, 1)``.

    Returns:
        ``(T, S, H, W, O)``.
    """
    joined = _as_shared(x, weight.shape[0])
    y = matmul(joined.flatten(1, 3), weight.flatten(2).transpose(1, 2))
    return y.reshape(*x.shape[:4], -1)


def conv_transpose2x2(x: Tensor, weight: Tensor) -> Tensor:
    """Doubles each task's images with its own 2x2 kernels: a transposed convolution with stride 2; there is no bias.

    Args:
        x: ``(T, S, H, W, C)``.
        weight: ``(T, O, C, 2, 2)``.

    Returns:
        ``(T, S, 2 * H, 2 * W, O)``.
    """
    # Output pixels do not overlap, so each corner of the kernel is a 1x1 convolution.
    corners = weight.permute(0, 3, 4, 1, 2).flatten(1, 3)[..., None, None]
    y = conv1x1(x, corners).unflatten(4, (2, 2, -1))  # (T, S, H, W, 2, 2, O)
    return y.permute(0, 1, 2, 4, 3, 5, 6).flatten(4, 5).flatten(2, 3)


# A convolution, its data gradient and its weight gradient are bilinear, and the derivative of each consists of the
# other two. PyTorch's own double backward is slower. Without kernels, windows are gathered again instead of being kept,
# because they are nine times as large as the images.


class _Conv(Function):
    """y = x * w."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride = stride
        return _convolve(x, weight, stride)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        return (
            _ConvData.apply(grad, weight, x.shape, ctx.stride) if ctx.needs_input_grad[0] else None,
            _ConvWeight.apply(grad, x, weight.shape, ctx.stride) if ctx.needs_input_grad[1] else None,
            None,
        )


class _ConvData(Function):
    """dL/dx from dL/dy and w."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, weight: Tensor, shape: torch.Size, stride: int) -> Tensor:
        ctx.save_for_backward(grad, weight)
        ctx.stride = stride
        return _data_gradient(grad, weight, shape, stride)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        grad, weight = ctx.saved_tensors
        return (
            _Conv.apply(v, weight, ctx.stride) if ctx.needs_input_grad[0] else None,
            _ConvWeight.apply(grad, v, weight.shape, ctx.stride) if ctx.needs_input_grad[1] else None,
            None,
            None,
        )


class _ConvWeight(Function):
    """dL/dw from dL/dy and x."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, x: Tensor, shape: torch.Size, stride: int) -> Tensor:
        ctx.save_for_backward(grad, x)
        ctx.stride = stride
        return _weight_gradient(grad, x, shape, stride)

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        grad, x = ctx.saved_tensors
        return (
            _Conv.apply(x, u, ctx.stride) if ctx.needs_input_grad[0] else None,
            _ConvData.apply(grad, u, x.shape, ctx.stride) if ctx.needs_input_grad[1] else None,
            None,
            None,
        )


def _convolve(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    if _goes_task_by_task(x, x.shape, stride):
        return _for_each_task(lambda x, weight: F.conv2d(x, weight, None, stride, 1), _channels_first(x), weight)
    if _has_kernel(x):
        y = x.new_empty(*x.shape[:2], *_out_sizes(x.shape, stride), weight.shape[1])
        taps = weight.flatten(3)
        _call("convolve", x.shape, stride, taps, [x.contiguous(), taps, y])
        return y
    windows = _gather(x, stride)
    return torch.bmm(windows.flatten(1, 3), _flat(weight).mT).view(*windows.shape[:4], -1)


def _data_gradient(grad: Tensor, weight: Tensor, shape: torch.Size, stride: int) -> Tensor:
    if _goes_task_by_task(grad, shape, stride):
        images = torch.empty(shape[1:], dtype=grad.dtype, device=grad.device).permute(0, 3, 1, 2)
        return _for_each_task(
            lambda grad, weight: _convolution_backward(grad, images, weight, stride, [True, False, False])[0],
            _channels_first(grad),
            weight,
        )
    if _has_kernel(grad):
        x, taps = grad.new_empty(shape), weight.flatten(3)
        _call("data_gradient", shape, stride, taps, [grad.contiguous(), taps, x])
        return x
    windows = torch.bmm(grad.flatten(1, 3), _flat(weight)).view(*grad.shape[:4], -1)
    return _add_up(windows, shape[2], shape[3], stride)


def _weight_gradient(grad: Tensor, x: Tensor, shape: torch.Size, stride: int) -> Tensor:
    if _goes_task_by_task(x, x.shape, stride):
        kernels = torch.empty(shape[1:], dtype=grad.dtype, device=grad.device, memory_format=torch.channels_last)
        found = [
            _convolution_backward(grad, images, kernels, stride, [False, True, False])[1]
            for grad, images in zip(_channels_first(grad), _channels_first(x), strict=True)
        ]
        return torch.stack(found)
    tasks, outputs, channels = shape[:3]
    # With the longer side last in memory, the first layer is up to 5 times as fast on a CPU.
    outputs_last = 9 * channels < outputs
    if _has_kernel(x):
        order = (0, 3, 2, 1) if outputs_last else (0, 1, 3, 2)
        taps = x.new_empty([(tasks, outputs, channels, 9)[axis] for axis in order]).permute(order)
        _call("weight_gradient", x.shape, stride, taps, [grad.contiguous(), x.contiguous(), taps])
        return taps.unflatten(3, (3, 3))
    grad, windows = grad.flatten(1, 3), _gather(x, stride).flatten(1, 3)
    kernels = torch.bmm(windows.mT, grad).mT if outputs_last else torch.bmm(grad.mT, windows)
    return kernels.unflatten(2, (3, 3, channels)).permute(0, 1, 4, 2, 3)


def _goes_task_by_task(values: Tensor, shape: torch.Size, stride: int) -> bool:
    """Returns whether the library's convolution of single tasks is faster for images of this shape."""
    has_kernel = _has_kernel(values)
    if shape[0] == 1 and not has_kernel:
        return True
    rows = shape[1] * math.prod(_out_sizes(shape, stride))
    is_wide = rows >= (_WIDE_ROWS_WITH_KERNELS if has_kernel else _WIDE_ROWS) and shape[4] >= _WIDE_CHANNELS
    return values.device.type == "cpu" and is_wide


def _has_kernel(x: Tensor) -> bool:
    return x.device.type == "cpu" and kernels_apply(x)


def _call(name: str, shape: torch.Size, stride: int, taps: Tensor, values: list[Tensor]) -> None:
    """Calls a kernel of convolution.cpp.

    Args:
        name: its name.
        shape: shape of the images, ``(T, S, H, W, C)``.
        stride: 1 or 2.
        taps: the weights, ``(T, O, C, 9)``, in any order in memory; one of the values.
        values: its arguments; the others are contiguous.
    """
    call(name, [*shape, taps.shape[1], stride, *taps.stride()], values)


def _for_each_task(function: Callable[[Tensor, Tensor], Tensor], images: Tensor, weight: Tensor) -> Tensor:
    """Applies a function of images ``(S, C, H, W)`` and kernels to each task; returns images ``(T, S, H, W, C)``."""
    found = [
        function(own, kernels.contiguous(memory_format=torch.channels_last)).permute(0, 2, 3, 1)
        for own, kernels in zip(images, weight, strict=True)
    ]
    return torch.stack(found) if len(found) > 1 else found[0].unsqueeze(0)


def _channels_first(x: Tensor) -> Tensor:
    return x.permute(0, 1, 4, 2, 3)


def _convolution_backward(grad: Tensor, x: Tensor, weight: Tensor, stride: int, mask: list[bool]) -> list[Tensor]:
    return torch.ops.aten.convolution_backward(
        grad, x, weight, None, [stride, stride], [1, 1], [1, 1], False, [0, 0], 1, mask
    )


def _flat(weight: Tensor) -> Tensor:
    """``(T, O, C, 3, 3)`` -> ``(T, O, 9 C)`` in the order of `_gather`; no copy if the channels are last in memory."""
    return weight.permute(0, 1, 3, 4, 2).flatten(2)


def _out_sizes(shape: torch.Size, stride: int) -> tuple[int, int]:
    """Returns height and width of a convolution's results, for images ``(T, S, H, W, C)``."""
    return (shape[2] - 1) // stride + 1, (shape[3] - 1) // stride + 1


def _gather(x: Tensor, stride: int) -> Tensor:
    """Gathers the 3x3 window of each output position: ``(T, S, H, W, C)`` -> ``(T, S, H', W', 9 C)``."""
    tasks, examples, _, _, channels = x.shape
    rows, cols = _out_sizes(x.shape, stride)
    padded = F.pad(x, (0, 0, 1, 1, 1, 1))
    t, s, h, w, c = padded.stride()
    view = padded.as_strided((tasks, examples, rows, cols, 3, 3, channels), (t, s, h * stride, w * stride, h, w, c))
    return view.reshape(tasks, examples, rows, cols, 9 * channels)


def _add_up(windows: Tensor, height: int, width: int, stride: int) -> Tensor:
    """Adds windows to the pixels from which `_gather` takes them: its transpose."""
    tasks, examples, rows, cols, size = windows.shape
    parts = windows.reshape(tasks, examples, rows, cols, 3, 3, size // 9)
    padded = windows.new_zeros(tasks, examples, height + 2, width + 2, size // 9)
    for i in range(3):
        for j in range(3):
            pixels = padded[:, :, i : i + stride * (rows - 1) + 1 : stride, j : j + stride * (cols - 1) + 1 : stride]
            pixels += parts[:, :, :, :, i, j]
    return padded[:, :, 1:-1, 1:-1].contiguous()
