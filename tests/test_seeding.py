"""Counter-based random numbers: published values, distributions, independence, and numbers that must never change."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from maml.seeding import Stream, _mix

# The generator's published outputs from seed 0 (Steele, Lea, Flood 2014; the same in every implementation).
SPLITMIX64 = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC, 0x1B39896A51A8749B]


def splitmix64(seed: int, count: int) -> list[int]:
    """The algorithm as published, in Python's unbounded integers."""
    mask, outputs = (1 << 64) - 1, []
    for _ in range(count):
        seed = (seed + 0x9E3779B97F4A7C15) & mask
        z = seed
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        outputs.append(z ^ (z >> 31))
    return outputs


def unsigned(bits: Tensor) -> list[int]:
    return [value % (1 << 64) for value in bits.flatten().tolist()]


def test_bits_are_the_published_generators() -> None:
    assert unsigned(Stream(0).bits((5,))) == SPLITMIX64 == splitmix64(0, 5)


@pytest.mark.parametrize("seed", [0, 1, 42, 2**32, 2**63 - 1, 2**63, 2**64 - 1, -1, 10**30])
def test_bits_equal_the_algorithm_written_in_integers(seed: int) -> None:
    assert unsigned(Stream(seed).bits((100,))) == splitmix64(seed % (1 << 64), 100)


def test_shape_does_not_change_the_numbers() -> None:
    stream = Stream(7)
    assert torch.equal(stream.bits((24,)), stream.bits((2, 3, 4)).flatten())
    assert torch.equal(stream.bits((24,))[:10], stream.bits((10,)))
    assert torch.equal(stream.uniform((2, 3)), stream.uniform((6,)).reshape(2, 3))
    assert stream.bits((0, 3)).shape == (0, 3)
    assert stream.uniform(()).shape == ()


def test_integer_path_equals_tensor_path() -> None:
    """Keys of children are computed in Python and numbers in tensors, with the same hash."""
    values = torch.cat([Stream(3).bits((1000,)), torch.tensor([0, 1, -1, 2**63 - 1, -(2**63)])])
    assert [_mix(value) for value in values.tolist()] == _mix(values).tolist()


def test_numbers_are_those_of_every_process_and_every_release() -> None:
    """All results depend on these numbers: if one changes, every published result changes."""
    assert Stream(0).child("train").key == 1509203605317952691
    stream = Stream(0).child("train").child(1)
    assert stream.key == 2103248566866820002
    assert stream.bits((2,)).tolist() == [-5742554842843644772, 5292925648384681101]
    assert stream.uniform((3,)).tolist() == [0.6886954307556152, 0.28693002462387085, 0.7849345803260803]
    assert stream.uniform((2,), dtype=torch.float64).tolist() == [0.6886954781885882, 0.28693007433914586]
    normal = torch.tensor([0.4921560287475586, -0.5623756051063538, 0.7889679670333862])
    torch.testing.assert_close(stream.normal((3,)), normal, rtol=1e-6, atol=0)  # libraries differ in the last digit
    assert stream.integers((6,), 4).tolist() == [0, 1, 2, 3, 0, 0]
    assert stream.choice((2,), 20, 5).tolist() == [[3, 5, 19, 1, 15], [19, 0, 15, 8, 12]]


def test_uniform_covers_its_range_evenly() -> None:
    x = Stream(1).uniform((200_000,), -5.0, 5.0)
    assert x.dtype == torch.float32
    assert x.min() >= -5 and x.max() < 5
    counts = torch.histc(x, bins=50, min=-5, max=5)
    assert ((counts - 4000) ** 2 / 4000).sum() < 90  # chi-square, 49 degrees of freedom: p = 0.0003
    assert x.double().mean().item() == pytest.approx(0, abs=5 * 10 / math.sqrt(12 * 200_000))
    assert x.double().var().item() == pytest.approx(100 / 12, rel=0.01)


def test_uniform_in_float64_has_more_digits() -> None:
    x = Stream(1).uniform((1000,), dtype=torch.float64)
    assert x.dtype == torch.float64
    assert (x != x.float().double()).float().mean() > 0.99


def test_normal_has_the_moments_of_a_normal() -> None:
    x = Stream(2).normal((400_000,), std=3.0).double() / 3
    assert x.isfinite().all()
    error = 1 / math.sqrt(400_000)
    assert x.mean().item() == pytest.approx(0, abs=5 * error)
    assert x.var().item() == pytest.approx(1, abs=5 * error * math.sqrt(2))
    assert (x**3).mean().item() == pytest.approx(0, abs=5 * error * math.sqrt(15))
    assert (x**4).mean().item() == pytest.approx(3, abs=5 * error * math.sqrt(96))


def test_bounded_normal_is_cut_not_clipped() -> None:
    x = Stream(2).normal((400_000,), std=0.01, bound=2.0).double() / 0.01
    assert x.abs().max() <= 2.0 + 1e-6
    assert (x.abs() > 1.999).float().mean() < 0.001, "nothing piles up at the bound"
    density = math.exp(-2) / math.sqrt(2 * math.pi)
    variance = 1 - 2 * 2 * density / math.erf(2 / math.sqrt(2))  # variance of the truncated normal
    assert x.var().item() == pytest.approx(variance, rel=0.01)


def test_integers_are_even() -> None:
    counts = Stream(3).integers((80_000,), 4).bincount(minlength=4)
    assert len(counts) == 4
    assert ((counts - 20_000) ** 2 / 20_000).sum() < 19  # 3 degrees of freedom: p = 0.0003


def test_choice_is_without_replacement() -> None:
    drawn = Stream(4).choice((500, 3), 20, 7)
    assert drawn.shape == (500, 3, 7)
    assert drawn.min() == 0 and drawn.max() == 19
    assert (drawn.sort(-1).values.diff(dim=-1) > 0).all()


def test_choice_takes_every_item_in_every_place_equally_often() -> None:
    drawn = Stream(5).choice((40_000,), 10, 3)
    for place in range(3):
        counts = drawn[:, place].bincount(minlength=10)
        assert ((counts - 4000) ** 2 / 4000).sum() < 31  # 9 degrees of freedom: p = 0.0003
    pairs = (drawn[:, 0] * 10 + drawn[:, 1]).bincount(minlength=100).reshape(10, 10)
    assert pairs.diagonal().sum() == 0
    off = pairs[~torch.eye(10, dtype=torch.bool)]
    assert ((off - 40_000 / 90) ** 2 / (40_000 / 90)).sum() < 140  # 89 degrees of freedom: p = 0.0005


def test_choice_of_all_is_a_permutation() -> None:
    drawn = Stream(6).choice((), 1623, 1623)
    assert drawn.sort().values.tolist() == list(range(1623))


def test_choice_of_too_many_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot draw 6 distinct items out of 5"):
        Stream(0).choice((2,), 5, 6)


def test_children_differ_from_their_parent_and_from_each_other() -> None:
    root = Stream(0)
    streams = [root, root.child("a"), root.child("b"), root.child("a").child("b"), root.child("b").child("a")]
    streams += [root.child(number) for number in range(1000)] + [Stream(seed) for seed in range(1, 1000)]
    streams += [Stream(seed).child("a") for seed in range(1, 1000)]
    assert len({stream.key for stream in streams}) == len(streams)


def test_name_and_number_of_the_same_look_differ() -> None:
    assert Stream(0).child("1").key != Stream(0).child(1).key


@pytest.mark.parametrize("relation", ["iterations", "names", "seeds", "parent"])
def test_children_are_uncorrelated(relation: str) -> None:
    root, count = Stream(8), 512
    one, other = {
        "iterations": ([root.child(i) for i in range(count)], [root.child(i + 1) for i in range(count)]),
        "names": ([root.child(i).child("x") for i in range(count)], [root.child(i).child("y") for i in range(count)]),
        "seeds": ([Stream(i).child("x") for i in range(count)], [Stream(i + 1).child("x") for i in range(count)]),
        "parent": ([Stream(i) for i in range(count)], [Stream(i).child(0) for i in range(count)]),
    }[relation]
    x, y = (torch.stack([stream.uniform((64,), -1.0, 1.0).double() for stream in streams]) for streams in (one, other))
    bound = 5 / math.sqrt(count * 64)
    for shift in (0, 1):  # at the same position, and at the next
        correlation = 3 * (x[:, : 64 - shift] * y[:, shift:]).mean()
        assert abs(correlation) < bound
    both = 3 * (x * y)
    assert abs(both.mean(0)).max() < 5 / math.sqrt(count), "no single position is special"
    first = torch.stack([x[:, 0], y[:, 0]])
    assert abs(3 * (first[:, :-1] * first[:, 1:]).mean()) < 5 / math.sqrt(2 * count)
