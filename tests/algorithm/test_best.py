"""The best theta: it is chosen by the mean of the last ten values."""

from __future__ import annotations

import math

import pytest
import torch

from maml.algorithm.best import init_best, update_best
from maml.errors import MamlError
from maml.types import Params

WINDOW = 10


def recorded(values: list[float]) -> tuple[Params, list[float]]:
    """Gives one value per iteration, whose theta is its number; returns the record and the best theta after each."""
    best, kept = init_best({"w": torch.tensor([-1.0])}, WINDOW), []
    for number, value in enumerate(values):
        update_best(best, {"w": torch.tensor([float(number)])}, torch.tensor(value))
        kept.append(best["w"].item())
    return best, kept


def by_hand(values: list[float]) -> list[float]:
    """The same in plain numbers; before the first iteration, its value is assumed."""
    kept, highest, current = [], -math.inf, -1.0
    for number in range(len(values)):
        window = [values[max(0, past)] for past in range(number - WINDOW + 1, number + 1)]
        if sum(window) / WINDOW > highest:
            highest, current = sum(window) / WINDOW, float(number)
        kept.append(current)
    return kept


@pytest.mark.parametrize(
    "values",
    [
        [float(number) for number in range(25)],
        [-float(number) for number in range(25)],
        [1.0] * 5 + [3.0] * 7 + [2.0] * 20,
        [math.sin(number) * 10 + number / 4 for number in range(60)],
    ],
    ids=["rising", "falling", "plateau", "noisy"],
)
def test_theta_kept_is_that_of_the_highest_average(values: list[float]) -> None:
    _, kept = recorded(values)
    assert kept == by_hand(values)


def test_one_lucky_iteration_outweighs_no_lasting_gain() -> None:
    _, kept = recorded([0.0] * 12 + [5.0] + [0.0] * 12 + [1.0] * 12)
    assert kept[24] == 12.0
    assert kept[-1] == 36.0 - 2, "once nine of the last ten or all are 1, the average is above the lucky 0.5"


@pytest.mark.parametrize("name", ["score", "recent"])
def test_parameter_with_a_name_of_the_record_is_refused(name: str) -> None:
    with pytest.raises(MamlError, match=f"a parameter '{name}', a name that the record of the best theta has"):
        init_best({"weight": torch.zeros(2), name: torch.zeros(())}, WINDOW)


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_value_that_is_no_number_is_never_the_best(value: float) -> None:
    best, kept = recorded([1.0, 2.0, value, 3.0])
    assert kept == [0.0, 1.0, 1.0, 1.0]
    assert best["score"].item() == pytest.approx((9 * 1.0 + 2.0) / WINDOW)


def test_record_is_a_copy_and_is_changed_in_place() -> None:
    theta = {"w": torch.zeros(1)}
    best = init_best(theta, WINDOW)
    kept = best["w"]
    theta["w"].fill_(7.0)
    assert kept.item() == 0.0
    update_best(best, theta, torch.tensor(1.0))
    assert best["w"] is kept and kept.item() == 7.0
