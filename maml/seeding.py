"""Counter-based randomness: every draw is a hash of (seed, names, iteration, position), so there is no state to save.

The hash is the finaliser of SplitMix64 (Steele, Lea, Flood 2014), written in integer tensor operations: the same
numbers on a CPU and a GPU, on one rank or eight, before and after a restart.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

_GOLDEN = -0x61C8864680B583EB  # 2^64 / golden ratio, as a signed 64-bit integer
_MIX_1 = -0x40A7B892E31B1A47
_MIX_2 = -0x6B2FB644ECCEEE15

Key = TypeVar("Key", int, Tensor)


def _signed(value: Key) -> Key:
    """Wraps an integer to 64 bits, as tensor arithmetic does by itself."""
    return value if isinstance(value, Tensor) else (value + (1 << 63)) % (1 << 64) - (1 << 63)


def _mix(bits: Key) -> Key:
    """Scrambles 64-bit counters; a bijection, so distinct counters never collide."""
    bits = _signed((bits ^ ((bits >> 30) & 0x3FFFFFFFF)) * _MIX_1)
    bits = _signed((bits ^ ((bits >> 27) & 0x1FFFFFFFFF)) * _MIX_2)
    return bits ^ ((bits >> 31) & 0x1FFFFFFFF)


class Stream:
    """A named source of random numbers; ``child`` streams are independent of it and of each other.

    Args:
        key: the seed (any integer), or the internal key of a child; an int64 tensor ``(T,)`` is a stream for each of T
            tasks, and what they draw has a leading task axis.
        device: where the numbers are made (a tensor's own); it does not change them.
    """

    def __init__(self, key: Key, device: torch.device | str = "cpu") -> None:
        self.key: Any = _signed(key)
        self.device = key.device if isinstance(key, Tensor) else torch.device(device)

    def child(self, name: str | int | Tensor) -> Stream:
        """Returns the stream under this one of a name, or of a number as iterations have; of T numbers, T streams."""
        number: Any = name
        if isinstance(name, str):
            number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
        else:
            number = _mix(_signed(number + 1))
        return Stream(_mix(_signed(_signed(self.key * _GOLDEN) + number)), self.device)

    def bits(self, shape: Sequence[int]) -> Tensor:
        """Returns uniform signed 64-bit integers; equal positions give equal numbers whatever follows them."""
        counters = torch.arange(1, math.prod(shape) + 1, device=self.device) * _GOLDEN
        if isinstance(self.key, Tensor):
            return _mix(counters + self.key.unsqueeze(-1)).reshape(*self.key.shape, *shape)
        return _mix(counters + self.key).reshape(tuple(shape))

    def uniform(
        self, shape: Sequence[int], low: float = 0.0, high: float = 1.0, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Returns numbers uniform on ``[low, high)``, of 24 random bits each; of 53, where float64 is asked for.

        Without ``dtype`` they are of the default type, and the same draws in any: a run in float64 sees the same tasks.
        """
        digits = 53 if dtype == torch.float64 else 24
        unit = (self.bits(shape) >> (64 - digits)) & ((1 << digits) - 1)
        unit = unit.to(dtype or torch.get_default_dtype()) * 2.0**-digits
        return unit * (high - low) + low

    def normal(self, shape: Sequence[int], std: float = 1.0, bound: float | None = None) -> Tensor:
        """Returns normal numbers of mean 0, cut (redrawn, in effect) at ``bound`` standard deviations."""
        mass = 1.0 if bound is None else math.erf(bound / math.sqrt(2))
        # Centres of the cells, so that neither end of the inverse error function is reached.
        unit = self.uniform(shape, dtype=torch.float64) + 2.0**-54
        return (torch.erfinv((2 * unit - 1) * mass) * math.sqrt(2) * std).to(torch.get_default_dtype())

    def integers(self, shape: Sequence[int], count: int) -> Tensor:
        """Returns integers uniform on ``0 .. count - 1``."""
        return (self.bits(shape) & 0x7FFFFFFFFFFFFFFF) % count

    def choice(self, shape: Sequence[int], population: int, count: int) -> Tensor:
        """Returns ``count`` distinct integers below ``population`` in random order, ``(*shape, count)``, per entry.

        Raises:
            ValueError: if ``count`` is larger than ``population``.
        """
        if count > population:
            raise ValueError(f"cannot draw {count} distinct items out of {population}")
        return self.bits((*shape, population)).topk(count, dim=-1).indices
