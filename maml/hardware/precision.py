"""The numerical precision of a run; it changes the results, so it is one of the settings that identify a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from maml.errors import MamlError, Unavailable

Precision = Literal["float64", "float32", "tf32", "bf16"]
"""``float64`` and ``float32``: everything has this type. ``tf32``: float32, but on a GPU matrix products and
convolutions round their inputs to TF32. ``bf16``: float32, but matrix products and convolutions round their inputs and
results to bfloat16, which also saves memory.
"""

_use_bfloat16 = False


def check_precision(precision: Precision, on_policy: bool, device: torch.device) -> None:
    """Checks that a precision is possible for a domain on a device.

    Args:
        precision: the run's precision.
        on_policy: whether the domain is on-policy.
        device: where the run computes.

    Raises:
        MamlError: if it is not possible.
    """
    if precision == "bf16" and on_policy:
        raise MamlError(
            "precision=bf16 is for supervised domains: its rounding is larger than a step within the trust region; "
            "choose precision=float32"
        )
    if precision == "tf32" and device.type != "cuda":
        raise Unavailable("precision=tf32 needs a GPU; on a CPU it is the same as float32; choose precision=float32")


@contextmanager
def use_precision(precision: Precision) -> Iterator[None]:
    """Sets the process-wide switches for a precision, and restores them at the end."""
    # Without this, some CUDA kernels round float32 inputs to TF32.
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    try:
        with use_dtype(precision):
            yield
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False


@contextmanager
def use_dtype(precision: Precision) -> Iterator[None]:
    """Sets the type of new tensors and the rounding to bfloat16 alone; the switches of TF32 stay the caller's."""
    global _use_bfloat16
    dtype, bfloat16 = torch.get_default_dtype(), _use_bfloat16
    torch.set_default_dtype(torch.float64 if precision == "float64" else torch.float32)
    _use_bfloat16 = precision == "bf16"
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)
        _use_bfloat16 = bfloat16


def autocast(device: torch.device) -> torch.autocast:
    """Returns a context in which torch itself rounds the factors of products. A user's own module needs it."""
    return torch.autocast(device.type, torch.bfloat16, enabled=_use_bfloat16, cache_enabled=False)


def round_factors(*factors: Tensor) -> tuple[Tensor, ...]:
    """Returns the factors of a product, rounded to bfloat16 if the precision is ``bf16``."""
    return tuple(factor.bfloat16() for factor in factors) if _use_bfloat16 else factors
