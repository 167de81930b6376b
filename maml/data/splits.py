"""Shares classes or tasks out to the three splits."""

from __future__ import annotations

from collections.abc import Sequence

from maml.errors import MamlError
from maml.seeding import Stream
from maml.types import Split

SPLITS: tuple[Split, ...] = ("train", "val", "test")


def share_out(shares: Sequence[float], names: Sequence[str]) -> dict[Split, list[str]]:
    """Shuffles names, always in the same way, and cuts them by the shares of training, validation and test.

    Raises:
        MamlError: if there are not three shares that add up to 1.
    """
    if len(shares) != len(SPLITS) or abs(sum(shares) - 1) > 1e-6:
        raise MamlError(
            f"domain.split={[*shares]} should be three shares, of train, val and test, that add up to 1, such as "
            "[0.6,0.2,0.2]"
        )
    order = Stream(1).child("shares").choice((), len(names), len(names)).tolist()
    stops = [0, *(round(sum(shares[: k + 1]) * len(names)) for k in range(len(SPLITS)))]
    return {split: [names[i] for i in order[stops[k] : stops[k + 1]]] for k, split in enumerate(SPLITS)}
