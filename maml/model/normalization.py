"""Normalisation and activation as one operation: with ReLU and pooling by kernels of our own, with ELU by PyTorch's.

Autograd would differentiate the mean, the variance, the affine function and the ReLU twice, one elementary operation at
a time, which takes a third of the time of an Omniglot meta-gradient.

For each task and feature with R rows, let x = (z - mean(z)) r with r = 1 / sqrt(var(z) + eps), and y = relu(c x + b).
Let e be the cotangent of y where y > 0 and where the row wins its pooling window, otherwise 0. With s1 = mean(e) and
s2 = mean(e x), the gradients are

    dz = c r (e - s1 - x s2),    db = R s1,    dc = R s2.

For the gradient of sum(u dz) + w db + v dc with respect to the cotangent, z and c, see `second`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from maml.hardware.kernels import call, compiled
from maml.model.functional import BATCH_NORM_EPS, batch_statistics, for_tasks, normalize

Windows = Literal["none", "max", "max_keep_odd"]
"""The windows of which the largest value is kept: none; 2x2 pixels; these, and those of an odd last row and column."""
_WINDOWS: list[Windows] = ["none", "max", "max_keep_odd"]


def norm_relu(
    z: Tensor,
    shift: Tensor,
    scale: Tensor | None = None,
    windows: Windows = "none",
    moments: list[Tensor] | None = None,
) -> Tensor:
    """Normalises each feature of each task over all its rows, scales and shifts it, applies ReLU, and pools.

    Derivatives of any order are exact.

    Args:
        z: ``(T, S, ..., C)``; with windows ``(T, S, H, W, C)``.
        shift: ``(T, C)``, or ``(G, C)`` if tasks share it.
        scale: as the shift; None does not scale.
        windows: how to pool.
        moments: a list to which the mean and the biased variance of z are added, both ``(T, C)``, without a gradient.

    Returns:
        ``(T, S, ..., C)``, with windows about half as high and wide.

    Raises:
        ValueError: if the shift or scale has another number of features.
    """
    if any(value.shape[1:] != z.shape[-1:] for value in (shift, scale) if value is not None):
        raise ValueError(f"a shift or scale of {tuple(shift.shape)} does not fit features of {tuple(z.shape)}")
    pixels = z.flatten(1, -2)[:, None, None] if windows == "none" else z
    shift = for_tasks(shift, len(z))
    scale = torch.ones_like(shift) if scale is None else for_tasks(scale, len(z))
    # Here, and not in the functions below: what a function saves has to be an input, or its derivative is lost.
    y = _NormReLU.apply(pixels.contiguous(), shift.contiguous(), scale.contiguous(), windows, moments)
    return y.view_as(z) if windows == "none" else y


def norm_elu(z: Tensor, shift: Tensor, scale: Tensor, moments: list[Tensor] | None = None) -> Tensor:
    """Normalises each feature of each task over all its rows, scales and shifts it, and applies ELU.

    Derivatives of any order are exact; the first one of a single task is the fast one.

    Args:
        z: ``(T, S, ..., C)``.
        shift: ``(T, C)``, or ``(G, C)`` if tasks share it.
        scale: as the shift.
        moments: a list to which the mean and the biased variance of z are added, both ``(T, C)``, without a gradient.
    """
    if len(z) == 1:
        return _NormELU.apply(z, shift, scale, moments)
    mean, variance = batch_statistics(z)
    if moments is not None:
        moments += [mean.detach().flatten(1), variance.detach().flatten(1)]
    return F.elu(normalize(z, mean, variance, shift, scale))


class _NormELU(Function):
    """One task, by PyTorch's batch normalisation, whose first derivative is exact and half as many passes over z."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, shift: Tensor, scale: Tensor, moments: list[Tensor] | None) -> Tensor:
        y, mean, factor = torch.native_batch_norm(_planes(z), scale[0], shift[0], None, None, True, 0.0, BATCH_NORM_EPS)
        F.elu(y, inplace=True)
        ctx.save_for_backward(z, shift, scale, mean, factor, y)
        if moments is not None:
            variance = (factor.square().reciprocal() - BATCH_NORM_EPS).clamp(min=0)
            moments += [mean.unsqueeze(0).clone(), variance.unsqueeze(0)]
        return _rows(y, z)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        z, shift, scale, mean, factor, y = ctx.saved_tensors
        if torch.is_grad_enabled():  # PyTorch's second derivatives are not exact here, so autograd has to see all
            # Views, because z may itself depend on the shift and scale, where a layer is used twice.
            z, shift, scale = inputs = [value.view_as(value) for value in (z, shift, scale)]
            mean, variance = batch_statistics(z)
            again = F.elu(normalize(z, mean, variance, shift, scale))
            needed = [value for value in inputs if value.requires_grad]
            found = iter(torch.autograd.grad(again, needed, grad, create_graph=True))
            return *(next(found) if value.requires_grad else None for value in inputs), None
        slope = torch.ops.aten.elu_backward(_planes(grad), 1, 1, 1, True, y)
        for_z, for_scale, for_shift = torch.ops.aten.native_batch_norm_backward(
            slope, _planes(z), scale[0], None, None, mean, factor, True, BATCH_NORM_EPS, [True, True, True]
        )
        return _rows(for_z, z), for_shift.unsqueeze(0), for_scale.unsqueeze(0), None


def _planes(z: Tensor) -> Tensor:
    """``(1, S, ..., C)`` -> ``(S, C, ...)``, without a copy."""
    return z[0].movedim(-1, 1)


def _rows(planes: Tensor, like: Tensor) -> Tensor:
    """``(S, C, ...)`` -> ``(1, S, ..., C)``, without a copy."""
    return planes.movedim(1, -1).unsqueeze(0).view_as(like)


class _NormReLU(Function):
    @staticmethod
    def forward(
        ctx: Any, z: Tensor, shift: Tensor, scale: Tensor, windows: Windows, moments: list[Tensor] | None
    ) -> Tensor:
        kernel = _value_on_cpu if z.device.type == "cpu" else compiled(value)
        y, mean, factor = kernel(z, shift, scale, windows)
        ctx.save_for_backward(z, shift, scale, mean, factor)
        ctx.windows = windows
        if moments is not None:
            variance = (factor.square().reciprocal() - BATCH_NORM_EPS).clamp(min=0)
            moments += [mean.flatten(1).clone(), variance.flatten(1)]
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *_NormReLUGradient.apply(grad.contiguous(), *ctx.saved_tensors, ctx.windows), None, None


class _NormReLUGradient(Function):
    """The gradients of `_NormReLU` as a function of the cotangent, z and the scale."""

    @staticmethod
    def forward(
        ctx: Any, grad: Tensor, z: Tensor, shift: Tensor, scale: Tensor, mean: Tensor, factor: Tensor, windows: Windows
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(grad, z, shift, scale, mean, factor)
        ctx.windows = windows
        kernel = _gradient_on_cpu if z.device.type == "cpu" else compiled(gradient)
        return kernel(grad, z, shift, scale, mean, factor, windows)

    @staticmethod
    def backward(ctx: Any, u: Tensor, w: Tensor, v: Tensor) -> tuple[Tensor | None, ...]:
        grad, z, shift, scale, mean, factor = ctx.saved_tensors
        if torch.is_grad_enabled():  # for a third derivative, autograd has to see how everything follows from z
            mean, factor = statistics(z)
            for_grad, for_z, for_scale = second(u, w, v, grad, z, shift, scale, mean, factor, ctx.windows)
        else:
            kernel = _second_on_cpu if z.device.type == "cpu" else compiled(second)
            cotangents = u.contiguous(), w.contiguous(), v.contiguous()
            for_grad, for_z, for_scale = kernel(*cotangents, grad, z, shift, scale, mean, factor, ctx.windows)
        return for_grad, for_z, None, for_scale, None, None, None


# On a CPU, the kernels are those of maml/hardware/normalization.cpp.


def _call(name: str, z: Tensor, windows: Windows, values: Sequence[Tensor | float]) -> None:
    call(name, [*z.shape, _WINDOWS.index(windows)], values)


def _value_on_cpu(z: Tensor, shift: Tensor, scale: Tensor, windows: Windows) -> tuple[Tensor, Tensor, Tensor]:
    tasks, examples, *size, channels = z.shape
    if windows != "none":
        size = [(length + (windows == "max_keep_odd")) // 2 for length in size]
    y, mean = z.new_empty(tasks, examples, *size, channels), z.new_empty(tasks, 1, 1, 1, channels)
    factor = torch.empty_like(mean)
    _call("value", z, windows, [BATCH_NORM_EPS, z, shift, scale, y, mean, factor])
    return y, mean, factor


def _gradient_on_cpu(
    grad: Tensor, z: Tensor, shift: Tensor, scale: Tensor, mean: Tensor, factor: Tensor, windows: Windows
) -> tuple[Tensor, Tensor, Tensor]:
    results = torch.empty_like(z), torch.empty_like(shift), torch.empty_like(shift)
    _call("gradient", z, windows, [grad, z, shift, scale, mean, factor, *results])
    return results


def _second_on_cpu(*values: Any) -> tuple[Tensor, Tensor, Tensor]:
    *tensors, windows = values
    grad, z, shift = tensors[3:6]
    results = torch.empty_like(grad), torch.empty_like(z), torch.empty_like(shift)
    _call("second", z, windows, [*tensors, *results])
    return results


# On a GPU, the kernels are these functions, compiled. They are also what the kernels of the CPU are tested against.
# z is (T, S, H, W, C), and sums over rows are (T, 1, 1, 1, C).
_ROWS = (1, 2, 3)


def statistics(z: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the mean and 1 / standard deviation of each feature."""
    mean = z.mean(_ROWS, keepdim=True)
    return mean, torch.rsqrt((z - mean).square().mean(_ROWS, keepdim=True) + BATCH_NORM_EPS)


def value(z: Tensor, shift: Tensor, scale: Tensor, windows: Windows) -> tuple[Tensor, Tensor, Tensor]:
    """Returns y and what `statistics` returns."""
    mean, factor = statistics(z)
    scaled = (z - mean) * factor * _per_row(scale)
    return torch.relu(_pool(scaled, windows)[0] + _per_row(shift)), mean, factor


def gradient(
    grad: Tensor, z: Tensor, shift: Tensor, scale: Tensor, mean: Tensor, factor: Tensor, windows: Windows
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns dz, db and dc, given the cotangent ``grad`` of y."""
    count, c = z[0, ..., 0].numel(), _per_row(scale)
    x = (z - mean) * factor
    largest, wins = _pool(x * c, windows)
    active = torch.where(largest + _per_row(shift) > 0, grad, 0.0)
    db, dc = active.sum(_ROWS), (active * _pick(x, wins, windows)).sum(_ROWS)
    e = _spread(active, wins, z, windows)
    return c * factor * (e - _per_row(db / count) - x * _per_row(dc / count)), db, dc


def second(
    u: Tensor,
    w: Tensor,
    v: Tensor,
    grad: Tensor,
    z: Tensor,
    shift: Tensor,
    scale: Tensor,
    mean: Tensor,
    factor: Tensor,
    windows: Windows,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of sum(u dz) + w db + v dc with respect to the cotangent of y, z and c."""
    count, c, v = z[0, ..., 0].numel(), _per_row(scale), _per_row(v)
    x = (z - mean) * factor
    largest, wins = _pool(x * c, windows)
    is_active, x_won, u_won = largest + _per_row(shift) > 0, _pick(x, wins, windows), _pick(u, wins, windows)
    active = torch.where(is_active, grad, 0.0)
    s1, s2, ue = (values.sum(_ROWS, keepdim=True) / count for values in (active, active * x_won, active * u_won))
    u_mean, u_slope = u.mean(_ROWS, keepdim=True), (u * x).mean(_ROWS, keepdim=True)
    covariance = ue - u_mean * s1
    for_grad = torch.where(is_active, c * factor * (u_won - u_mean - x_won * u_slope) + _per_row(w) + v * x_won, 0.0)
    e = _spread(active, wins, z, windows)
    # A change of z changes x, and with it s2 and the slope of u; it changes the factor, and the mean in both.
    bent = (covariance - 3 * u_slope * s2) * x + s2 * (u - u_mean) + u_slope * (e - s1)
    for_z = v * factor * (e - s1 - x * s2) - c * factor.square() * bent
    return for_grad, for_z, (count * factor * (covariance - u_slope * s2)).flatten(1)


def _per_row(values: Tensor) -> Tensor:
    """``(T, C)`` -> ``(T, 1, 1, 1, C)``."""
    return values.view(values.shape[0], 1, 1, 1, -1)


def _corners(x: Tensor, windows: Windows, fill: float) -> list[Tensor]:
    """Returns the four pixels of each window, in the order in which the first of equal ones wins."""
    height, width = x.shape[2:4]
    if windows == "max_keep_odd":
        x = F.pad(x, (0, 0, 0, width % 2, 0, height % 2), value=fill)
        height, width = x.shape[2:4]
    return [x[:, :, i : height // 2 * 2 : 2, j : width // 2 * 2 : 2] for i in (0, 1) for j in (0, 1)]


def _pool(x: Tensor, windows: Windows) -> tuple[Tensor, Sequence[Tensor]]:
    """Returns the largest value of each window, and for each of its pixels whether it is the one."""
    if windows == "none":
        return x, ()
    corners = _corners(x, windows, fill=-torch.inf)
    largest = torch.maximum(torch.maximum(corners[0], corners[1]), torch.maximum(corners[2], corners[3]))
    wins: list[Tensor] = []
    taken = torch.zeros_like(largest, dtype=torch.bool)
    for corner in corners:
        wins.append((corner == largest) & ~taken)
        taken = taken | wins[-1]
    return largest, wins


def _pick(x: Tensor, wins: Sequence[Tensor], windows: Windows) -> Tensor:
    """Returns each window's value at the pixel that wins."""
    if windows == "none":
        return x
    corners = _corners(x, windows, fill=0.0)
    picked = corners[3]
    for corner, is_winner in zip(corners[:3], wins[:3], strict=True):
        picked = torch.where(is_winner, corner, picked)
    return picked


def _spread(y: Tensor, wins: Sequence[Tensor], like: Tensor, windows: Windows) -> Tensor:
    """Puts each window's value where the pixel that wins is, and 0 elsewhere; the transpose of `_pick`."""
    if windows == "none":
        return y
    a, b, c, d = (torch.where(is_winner, y, 0.0) for is_winner in wins)
    spread = torch.stack([torch.stack([a, b], 4), torch.stack([c, d], 4)], 3).flatten(4, 5).flatten(2, 3)
    height, width = like.shape[2:4]
    spread = spread[:, :, :height, :width]
    return F.pad(spread, (0, 0, 0, width - spread.shape[3], 0, height - spread.shape[2]))
