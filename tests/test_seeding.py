"""Counter-based randomness: reference values, moments, independence."""

from __future__ import annotations

import pytest
import torch

from maml.seeding import Stream, _mix, _mix_int, _signed

GOLDEN = 0x9E3779B97F4A7C15


def test_hash_is_splitmix64() -> None:
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]  # seed 0, first three outputs
    assert [_mix_int(_signed(GOLDEN * i)) % 2**64 for i in (1, 2, 3)] == published
    assert [value % 2**64 for value in Stream(0).bits((3,)).tolist()] == published


def test_integers_and_tensors_hash_alike() -> None:
    values = [0, 1, -1, 2**62 + 12345, -(2**63), 2**63 - 1]
    assert _mix(torch.tensor(values)).tolist() == [_mix_int(value) for value in values]


def test_numbers_are_the_same_for_ever() -> None:
    stream = Stream(7).child("train").child(123).child("classes")
    assert stream.bits((2,)).tolist() == [-5752473229349995687, 8107357628969391554]


def test_earlier_positions_do_not_depend_on_how_many_follow() -> None:
    assert torch.equal(Stream(1).uniform((3, 4)), Stream(1).uniform((5, 4))[:3])


def test_children_differ_from_each_other_and_from_their_parent() -> None:
    stream = Stream(0)
    keys = {stream.key, *(stream.child(i).key for i in range(10_000)), stream.child("a").key, stream.child("b").key}
    assert len(keys) == 10_003
    drawn = torch.stack([stream.child(i).uniform((200,)) for i in range(200)])
    correlations = torch.corrcoef(drawn).fill_diagonal_(0)
    assert correlations.abs().max() < 0.4
    assert stream.child("a").child("b").key != stream.child("b").child("a").key


def test_uniform_and_normal_have_their_moments() -> None:
    uniform = Stream(2).uniform((200_000,), -5.0, 5.0)
    assert -5 <= uniform.min() < -4.999
    assert 4.999 < uniform.max() <= 5
    assert abs(uniform.mean()) < 0.03
    assert abs(uniform.std() - 10 / 12**0.5) < 0.02
    normal = Stream(3).normal((200_000,), std=2.0)
    assert normal.isfinite().all()
    assert abs(normal.mean()) < 0.02
    assert abs(normal.std() - 2) < 0.02
    assert Stream(4).normal((200_000,), std=2.0, bound=2.0).abs().max() <= 4.0


def test_choice_is_uniform_and_without_replacement() -> None:
    chosen = Stream(5).choice((20_000,), 6, 3)
    assert all(len(set(row)) == 3 for row in chosen[:2000].tolist())
    for position in range(3):
        shares = torch.bincount(chosen[:, position], minlength=6) / 20_000
        assert (shares - 1 / 6).abs().max() < 0.012
    with pytest.raises(ValueError, match="cannot draw 7 distinct items out of 6"):
        Stream(5).choice((1,), 6, 7)


def test_integers_cover_their_range() -> None:
    drawn = Stream(6).integers((4000,), 4)
    assert (torch.bincount(drawn, minlength=4) / 4000 - 0.25).abs().max() < 0.03
