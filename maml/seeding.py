"""Counter-based random numbers: every draw is a hash of (seed, names, iteration, position); no state is saved.

The hash is the finaliser of SplitMix64 (Steele, Lea, Flood 2014), written in integer tensor operations. It gives the
same numbers on a CPU and a GPU, on any number of processes, before and after a restart.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from maml.hardware.memory import check_memory

_GOLDEN = -0x61C8864680B583EB  # 2^64 / golden ratio, as a signed 64-bit integer
_MIX_1 = -0x40A7B892E31B1A47
_MIX_2 = -0x6B2FB644ECCEEE15

# Draws of more numbers are compared with the machine's memory. Scrambling holds three copies of 8 bytes each.
_MANY, _BYTES_PER_DRAW = 10**8, 24

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
        key: the seed (any integer), or the internal key of a child. An int64 tensor ``(T,)`` makes one stream for each
            of T tasks; the numbers drawn then have a leading task axis.
        device: where the numbers are computed; it does not change them. A tensor key has its own device.
    """

    def __init__(self, key: Key, device: torch.device | str = "cpu") -> None:
        self.key: Any = _signed(key)
        self.device = key.device if isinstance(key, Tensor) else torch.device(device)

    def child(self, name: str | int | Tensor) -> Stream:
        """Returns the child stream of a name, or of a number (an iteration's, for example).

        Args:
            name: the name or number; an int64 tensor ``(T,)`` gives T streams.
        """
        number: Any = name
        if isinstance(name, str):
            number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
        else:
            number = _mix(_signed(number + 1))
        return Stream(_mix(_signed(_signed(self.key * _GOLDEN) + number)), self.device)

    def bits(self, shape: Sequence[int]) -> Tensor:
        """Returns uniform signed 64-bit integers. The first n numbers are the same for every shape.

        Raises:
            TooLarge: if so many numbers do not fit into memory.
        """
        count = math.prod(shape)
        if count > _MANY:
            check_memory(_BYTES_PER_DRAW * count, f"a draw of {count:,} random numbers")
        counters = torch.arange(1, count + 1, device=self.device) * _GOLDEN
        if isinstance(self.key, Tensor):
            return _mix(counters + self.key.unsqueeze(-1)).reshape(*self.key.shape, *shape)
        return _mix(counters + self.key).reshape(tuple(shape))

    def uniform(
        self, shape: Sequence[int], low: float = 0.0, high: float = 1.0, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Returns numbers uniform on ``[low, high)``, with 24 random bits each; with 53 if ``dtype`` is float64.

        Without ``dtype``, the numbers have torch's default type and the same value in every default type: a run in
        float64 has the same tasks as one in float32.
        """
        digits = 53 if dtype == torch.float64 else 24
        unit = (self.bits(shape) >> (64 - digits)) & ((1 << digits) - 1)
        unit = unit.to(dtype or torch.get_default_dtype()) * 2.0**-digits
        return unit * (high - low) + low

    def normal(self, shape: Sequence[int], std: float = 1.0, bound: float | None = None) -> Tensor:
        """Returns normal numbers of mean 0, truncated at ``bound`` standard deviations; None does not truncate."""
        mass = 1.0 if bound is None else math.erf(bound / math.sqrt(2))
        # Half a cell is added, because the inverse error function is infinite at the ends.
        unit = self.uniform(shape, dtype=torch.float64) + 2.0**-54
        return (torch.erfinv((2 * unit - 1) * mass) * math.sqrt(2) * std).to(torch.get_default_dtype())

    def integers(self, shape: Sequence[int], count: int) -> Tensor:
        """Returns integers uniform on ``0, ..., count - 1``."""
        return (self.bits(shape) & 0x7FFFFFFFFFFFFFFF) % count

    def choice(self, shape: Sequence[int], population: int, count: int) -> Tensor:
        """Returns, for each entry of ``shape``, ``count`` distinct integers below ``population`` in random order.

        The result has the shape ``(*shape, count)``.

        Raises:
            ValueError: if ``count`` is larger than ``population``.
        """
        if count > population:
            raise ValueError(f"cannot draw {count} distinct items out of {population}")
        return self.bits((*shape, population)).topk(count, dim=-1).indices
