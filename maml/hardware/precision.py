"""The numbers that a run computes with: part of what it is, since they change what comes out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from maml.errors import MamlError, Unavailable

Precision = Literal["float64", "float32", "tf32", "bf16"]
"""Of parameters and of all else float32 (or float64); products of matrices, and convolutions, may round their inputs to
TF32, on GPUs that have it; or inputs and results to bfloat16, which saves memory besides.
"""

_rounds = False


def check(precision: Precision, on_policy: bool, device: torch.device) -> None:
    """Makes sure that a domain, on-policy or supervised, can be trained so on a device.

    Raises:
        MamlError: if it cannot.
    """
    if precision == "bf16" and on_policy:
        raise MamlError(
            "precision=bf16 is for supervised domains: a trust region is narrower than its rounding; choose float32"
        )
    if precision == "tf32" and device.type != "cuda":
        raise Unavailable("precision=tf32 needs a GPU, and would be float32 here; choose precision=float32")


@contextmanager
def use_precision(precision: Precision) -> Iterator[None]:
    """Sets the process-wide switches, and sets them back."""
    global _rounds
    before = torch.get_default_dtype(), _rounds
    torch.set_default_dtype(torch.float64 if precision == "float64" else torch.float32)
    # Float32 means float32: by default some CUDA kernels would round their inputs to TF32.
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    _rounds = precision == "bf16"
    try:
        yield
    finally:
        torch.set_default_dtype(before[0])
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        _rounds = before[1]


def autocast(device: torch.device) -> torch.autocast:
    """Returns a context in which torch rounds the factors of products by itself, as a user's own module needs it."""
    return torch.autocast(device.type, torch.bfloat16, enabled=_rounds, cache_enabled=False)


def round_factors(*factors: Tensor) -> tuple[Tensor, ...]:
    """Returns the factors of a product as they are to enter it."""
    return tuple(factor.bfloat16() for factor in factors) if _rounds else factors
