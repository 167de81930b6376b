"""Matrix products of one task on a CPU, by PyTorch's own routine or by oneDNN's."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# The operation that torch's compiler uses for a linear layer on a CPU. On AMD's processors it is up to twice as fast as
# PyTorch's own product, which does not use their vector units fully. On Intel's it is 0.6 to 0.7 times as fast.
_ONEDNN_LINEAR: Any = (
    getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
)
# For sums of outer products, oneDNN is faster only if both sides are this wide.
_WIDE = 64
# How many times as fast oneDNN has to be. Between two equal routines, every run then makes the same choice.
_LEAST_GAIN = 1.2
# Numbers of rows, inputs and outputs of the products that are measured: those of a half-cheetah's hidden layer.
_ROWS, _INPUTS, _OUTPUTS, _REPETITIONS = 1024, 100, 100, 40

_use_onednn = False


def use_onednn(enabled: bool) -> None:
    """Sets whether products of one task use oneDNN; a process-wide switch."""
    global _use_onednn
    _use_onednn = enabled


def onednn_is_faster() -> bool:
    """Returns whether oneDNN is clearly faster on one core of this processor. It measures for a few milliseconds."""
    if _ONEDNN_LINEAR is None:
        return False
    x = torch.ones(1, _ROWS, _INPUTS, dtype=torch.float32)
    weight = torch.ones(1, _OUTPUTS, _INPUTS, dtype=torch.float32)

    def seconds(product: Callable[[Tensor, Tensor, None], Tensor]) -> float:
        start = time.perf_counter()
        product(x, weight, None)
        return time.perf_counter() - start

    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        # In turns, because a burst of other load that fell on one routine alone would choose the other one.
        plain, onednn = zip(
            *((seconds(_plain_linear), seconds(_onednn_linear)) for _ in range(_REPETITIONS)), strict=True
        )
        return min(plain) > _LEAST_GAIN * min(onednn)
    finally:
        torch.set_num_threads(num_threads)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Returns ``x W^T + b`` of each task: ``(T, N, I)``, ``(T, O, I)``, ``(T, O)`` -> ``(T, N, O)``."""
    return (_onednn_linear if _has_onednn(x) else _plain_linear)(x, weight, bias)


def add_outer(total: Tensor, y: Tensor, x: Tensor) -> None:
    """Adds ``y^T x`` of each task to the total: ``(T, O, I)``, ``(T, N, O)``, ``(T, N, I)``."""
    if _has_onednn(x) and min(x.shape[-1], y.shape[-1]) >= _WIDE:
        total[0] += _ONEDNN_LINEAR(y[0].T, x[0].T, None, "none", [], "")
    else:
        total.baddbmm_(y.mT, x)


def _plain_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = torch.bmm(x, weight.mT)
    return y if bias is None else y.add_(bias.unsqueeze(1))


def _onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _ONEDNN_LINEAR(x[0], weight[0], None if bias is None else bias[0], "none", [], "").unsqueeze(0)


def _has_onednn(x: Tensor) -> bool:
    is_possible = x.shape[0] == 1 and x.device.type == "cpu" and x.dtype == torch.float32
    return _use_onednn and _ONEDNN_LINEAR is not None and is_possible
