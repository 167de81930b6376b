"""Pictures that an algorithm makes of what it has learnt; `maml.record.gallery` draws them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Lines:
    """Lines over a common axis.

    Attributes:
        title: the title.
        x_label: what the horizontal axis shows.
        y_label: what the vertical axis shows.
        lines: the values of each line, by its name; all have the same length.
        x: the positions of the values; None counts them from 0.
    """

    title: str
    x_label: str
    y_label: str
    lines: Mapping[str, Sequence[float]]
    x: Sequence[float] | None = None


@dataclass(frozen=True)
class Images:
    """Rows of images without colour.

    Attributes:
        title: the title.
        rows: the images of each row, by its name, ``(n, H, W)``; 0 is paper and 1 is ink.
    """

    title: str
    rows: Mapping[str, Tensor]


Picture = Lines | Images
