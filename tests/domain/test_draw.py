"""Drawing members of groups that differ in size."""

from __future__ import annotations

import pytest
import torch

from maml.domain.draw import LARGEST_WITH_KEYS, choice_of_each
from maml.seeding import Stream

each_way = pytest.mark.parametrize("largest", [9, LARGEST_WITH_KEYS + 1])


@each_way
def test_members_are_distinct_and_below_the_size_of_their_group(largest: int) -> None:
    sizes = torch.tensor([[3, 4, 9], [9, 5, 3]]).repeat(500, 1)
    drawn = choice_of_each(Stream(0), sizes, largest, count=3)
    assert drawn.shape == (1000, 3, 3)
    assert (drawn < sizes.unsqueeze(-1)).all()
    assert all(len(set(group)) == 3 for row in drawn.tolist() for group in row)


@each_way
def test_every_order_is_equally_likely(largest: int) -> None:
    drawn = choice_of_each(Stream(1), torch.full((12_000,), 4), largest, count=2)
    counts = torch.bincount(drawn[:, 0] * 4 + drawn[:, 1], minlength=16).reshape(4, 4)
    assert counts.diagonal().sum() == 0
    assert (counts[~torch.eye(4, dtype=torch.bool)] - 1000).abs().max() < 160  # five standard deviations


def test_groups_of_the_largest_size_have_the_numbers_of_choice() -> None:
    sizes = torch.tensor([6, 2, 6])
    drawn = choice_of_each(Stream(2), sizes, largest=6, count=2)
    expected = Stream(2).choice((3,), 6, 2)
    assert torch.equal(drawn[[0, 2]], expected[[0, 2]])


@each_way
def test_first_groups_do_not_depend_on_how_many_there_are(largest: int) -> None:
    few, many = (choice_of_each(Stream(3), torch.full((count,), 5), largest, 3) for count in (2, 9))
    assert torch.equal(few, many[:2])
