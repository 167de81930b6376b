"""Draws members of groups that differ in size: the images of a class, the rows of a task."""

from __future__ import annotations

import torch
from torch import Tensor

from maml.seeding import Stream

# Up to this size, a draw has a random key for each member of a group; for larger groups that takes too long.
LARGEST_WITH_KEYS = 1000


def choice_of_each(stream: Stream, sizes: Tensor, largest: int, count: int) -> Tensor:
    """Returns, for each group, ``count`` distinct integers below its size in random order.

    If no group is larger than `LARGEST_WITH_KEYS`, groups of the largest size get the numbers of `Stream.choice`.

    Args:
        stream: the source of randomness.
        sizes: the size of each group, at least ``count``, int64 of any shape.
        largest: the largest size there is.
        count: number of integers for each group.

    Returns:
        int64 ``(*sizes.shape, count)``.
    """
    if largest > LARGEST_WITH_KEYS:
        return _subset(stream, sizes, count).gather(-1, stream.child("order").choice(sizes.shape, count, count))
    # The largest of random keys, as in Stream.choice. Keys of members that a group does not have lose to all others.
    keys = stream.bits((*sizes.shape, largest))
    exists = torch.arange(largest, device=keys.device) < sizes.unsqueeze(-1)
    return keys.masked_fill(~exists, torch.iinfo(keys.dtype).min).topk(count, dim=-1).indices


def _subset(stream: Stream, sizes: Tensor, count: int) -> Tensor:
    """Draws subsets, not in random order, in time that does not depend on the sizes (Bentley and Floyd 1987)."""
    bits = stream.bits((*sizes.shape, count)) & torch.iinfo(torch.int64).max
    drawn = torch.empty_like(bits)
    for k in range(count):
        last = sizes - count + k
        number = bits[..., k] % (last + 1)
        is_taken = (drawn[..., :k] == number.unsqueeze(-1)).any(-1)
        drawn[..., k] = torch.where(is_taken, last, number)
    return drawn
