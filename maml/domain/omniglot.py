"""Omniglot (Lake et al. 2011): 1623 handwritten characters, 20 drawings each (section 5.2)."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from maml.data.omniglot import load_omniglot
from maml.domain.base import Split
from maml.domain.classification import FewShotClassification
from maml.seeding import Stream
from maml.types import Count

_NUM_TRAIN, _NUM_VAL = 1100, 100  # Departure: the paper says 1200 for training; its code held 100 of them out


class Omniglot(FewShotClassification):
    """N characters, K drawings of each, every character turned by its own multiple of 90 degrees, ink = 1.

    Departure: the authors shuffled an unsorted folder listing, so which characters they tested on is not recoverable;
    ours is one fixed shuffle of the sorted list.

    Args:
        num_ways: N.
        num_shots: K.
        num_query: query drawings per character in training; None is K.
        data_dir: where the original files are.
        cache_dir: where the tensor built from them is kept.

    Raises:
        MamlError: if files are missing or damaged, or a character has fewer drawings than a task needs.
    """

    def __init__(
        self, num_ways: Count, num_shots: Count, data_dir: str, cache_dir: str, num_query: Count | None = None
    ) -> None:
        data = load_omniglot(Path(data_dir), Path(cache_dir))
        order = Stream(1).child("omniglot split").choice((), len(data.classes), len(data.classes))
        train, val, test = order.tensor_split([_NUM_TRAIN, _NUM_TRAIN + _NUM_VAL])
        splits: dict[Split, Tensor] = {"train": train, "val": val, "test": test}
        super().__init__(data, splits, num_ways, num_shots, num_query, scale=1.0, rotate=True)
