"""Classes or tasks are shared out always in the same way."""

from __future__ import annotations

import pytest

from maml.data.splits import SPLITS, share_out
from maml.errors import MamlError

NAMES = [f"n{number:02d}" for number in range(20)]


@pytest.mark.parametrize(
    ("shares", "counts"),
    [
        ((0.6, 0.2, 0.2), (12, 4, 4)),
        ((0.5, 0.0, 0.5), (10, 0, 10)),
        ((0.64, 0.16, 0.2), (13, 3, 4)),
        ((1, 0, 0), (20, 0, 0)),
    ],
)
def test_shares_give_each_name_to_one_split(shares: tuple[float, ...], counts: tuple[int, ...]) -> None:
    found = share_out(shares, NAMES)
    assert tuple(len(found[split]) for split in SPLITS) == counts
    assert sorted(name for chosen in found.values() for name in chosen) == NAMES
    assert share_out(shares, NAMES) == found


def test_names_are_shuffled_as_they_have_always_been() -> None:
    found = share_out((0.5, 0.0, 0.5), NAMES)
    assert sorted(found["train"]) != NAMES[:10]
    # Another order would change the tasks of every run with shares, but not its id.
    assert found["test"] == ["n14", "n12", "n00", "n06", "n05", "n07", "n08", "n03", "n09", "n11"]


@pytest.mark.parametrize("shares", [(0.6, 0.2, 0.1), (0.5, 0.5), (0.25, 0.25, 0.25, 0.25)])
def test_shares_that_are_not_three_and_1_together_are_refused(shares: tuple[float, ...]) -> None:
    with pytest.raises(
        MamlError, match=r"domain\.split=\[.*\] should be three shares, of train, val and test, that add up"
    ):
        share_out(shares, NAMES)
