"""Layers whose weights have a leading task axis, so that the whole meta-batch is one computation.

Images are channels-last, ``(T, S, H, W, C)``. All functions have exact derivatives of any order: the inner loop
differentiates once, and the meta-gradient differentiates the result again.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from maml.hardware.kernels import call, kernels_apply
from maml.hardware.precision import round_factors

BATCH_NORM_EPS = 1e-3  # as in the authors' TensorFlow code

# Least number of output pixels of a task, and of input channels, with which a CPU convolves one task at a time. Above
# them, one batched product of all tasks costs more for gathering windows than it saves. Gathering is cheaper with our
# kernels. Five Omniglot images have 245 pixels in the second layer, 25 have 1,225.
_WIDE_ROWS, _WIDE_ROWS_WITH_KERNELS, _WIDE_CHANNELS = 200, 500, 16

ACTIVATIONS = {"relu": torch.relu, "softplus": F.softplus, "tanh": torch.tanh}
Activation = Literal["relu", "softplus", "tanh"]


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Applies one linear layer per task: ``(T, S, D)``, ``(T, O, D)``, ``(T, O)`` -> ``(T, S, O)``."""
    return matmul(x, weight.transpose(1, 2)) + bias.unsqueeze(1)


def matmul(x: Tensor, y: Tensor) -> Tensor:
    """Multiplies a matrix by another per task, in the precision of the run."""
    return torch.bmm(*round_factors(x, y)).to(x.dtype)


def batch_statistics(x: Tensor, num_reference: int | None = None) -> tuple[Tensor, Tensor]:
    """Returns mean and (biased) variance of each feature of each task, ``(T, 1, ..., C)``, of x ``(T, S, ..., C)``.

    ``num_reference`` is the number of leading examples that count; None is all of them.
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
        factor = factor * scale.reshape(mean.shape)
    return torch.addcmul(shift.reshape(mean.shape) - mean * factor, x, factor)


def batch_norm(x: Tensor, shift: Tensor, num_reference: int | None = None) -> Tensor:
    """Normalises ``(T, S, ..., C)`` with the statistics of the batch, or of its ``num_reference`` leading examples."""
    return normalize(x, *batch_statistics(x, num_reference), shift)


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
    """
    dtype, (x, weight) = x.dtype, round_factors(x, weight)
    return _conv3x3(x, weight, stride).to(dtype)


def _conv3x3(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    tasks, num_out = weight.shape[:2]
    if tasks == 1:
        return _convolve(x[0], weight[0], stride).unsqueeze(0)
    rows = x.shape[1] * _out_size(x.shape[2], stride) * _out_size(x.shape[3], stride)
    wide_rows = _WIDE_ROWS_WITH_KERNELS if kernels_apply(x) else _WIDE_ROWS
    if x.device.type == "cpu" and rows >= wide_rows and x.shape[4] >= _WIDE_CHANNELS:
        return torch.stack([_convolve(images, kernels, stride) for images, kernels in zip(x, weight, strict=True)])
    columns = _Columns.apply(x, stride)
    kernels = weight.permute(0, 3, 4, 2, 1).reshape(tasks, -1, num_out)
    y = torch.bmm(columns.reshape(tasks, -1, columns.shape[-1]), kernels)
    return y.reshape(*columns.shape[:4], num_out)


def _convolve(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """Convolves the images of one task, ``(S, H, W, C)``: for one set of kernels, the library's convolution is fast."""
    y = _Conv.apply(x.permute(0, 3, 1, 2), weight.contiguous(memory_format=torch.channels_last), stride)
    return y.permute(0, 2, 3, 1)


def _out_size(size: int, stride: int) -> int:
    return (size - 1) // stride + 1


class _Columns(Function):
    """Gathers each output position's 3x3xC window. `_Fold` is its transpose; each is the other's derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stride: int) -> Tensor:
        ctx.size, ctx.stride = x.shape[2:4], stride
        tasks, examples, height, width, channels = x.shape
        if x.device.type == "cpu" and kernels_apply(x):
            size = _out_size(height, stride), _out_size(width, stride)
            columns = x.new_empty(tasks, examples, *size, 9 * channels)
            call("gather", [tasks * examples, height, width, channels, stride], [x.contiguous(), columns])
            return columns
        padded = F.pad(x, (0, 0, 1, 1, 1, 1))
        t, s, h, w, c = padded.stride()
        windows = padded.as_strided(
            (tasks, examples, _out_size(height, stride), _out_size(width, stride), 3, 3, channels),
            (t, s, h * stride, w * stride, h, w, c),
        )
        return windows.reshape(*windows.shape[:4], 9 * channels)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Fold.apply(grad, *ctx.size, ctx.stride), None


class _Fold(Function):
    """Adds windows to the pixels from which they were gathered."""

    @staticmethod
    def forward(ctx: Any, columns: Tensor, height: int, width: int, stride: int) -> Tensor:
        ctx.stride = stride
        tasks, examples, rows, cols, size = columns.shape
        if columns.device.type == "cpu" and kernels_apply(columns):
            x = columns.new_empty(tasks, examples, height, width, size // 9)
            call("add_up", [tasks * examples, height, width, size // 9, stride], [columns.contiguous(), x])
            return x
        windows = columns.reshape(tasks, examples, rows, cols, 3, 3, size // 9)
        padded = columns.new_zeros(tasks, examples, height + 2, width + 2, size // 9)
        for i in range(3):
            for j in range(3):
                pixels = padded[
                    :, :, i : i + stride * (rows - 1) + 1 : stride, j : j + stride * (cols - 1) + 1 : stride
                ]
                pixels += windows[:, :, :, :, i, j]
        return padded[:, :, 1:-1, 1:-1].contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _Columns.apply(grad, ctx.stride), None, None, None


# A convolution, its data gradient and its weight gradient are bilinear, and the derivative of each consists of the
# other two. PyTorch's own double backward is slower.


def _convolution_backward(grad: Tensor, x: Tensor, weight: Tensor, stride: int, mask: list[bool]) -> list[Tensor]:
    return torch.ops.aten.convolution_backward(
        grad, x, weight, None, [stride, stride], [1, 1], [1, 1], False, [0, 0], 1, mask
    )


class _Conv(Function):
    """y = x * w."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride = stride
        return F.conv2d(x, weight, None, stride, 1)

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
        x = torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=torch.channels_last)
        return _convolution_backward(grad, x, weight, stride, [True, False, False])[0]

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
        weight = torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=torch.channels_last)
        return _convolution_backward(grad, x, weight, stride, [False, True, False])[1]

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        grad, x = ctx.saved_tensors
        return (
            _Conv.apply(x, u, ctx.stride) if ctx.needs_input_grad[0] else None,
            _ConvData.apply(grad, u, x.shape, ctx.stride) if ctx.needs_input_grad[1] else None,
            None,
            None,
        )
