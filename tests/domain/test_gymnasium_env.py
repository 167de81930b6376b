"""Gymnasium environments as domains: tasks are constructor arguments drawn from the configured ranges."""

from __future__ import annotations

import pytest
import torch

from maml.domain.gymnasium_env import GymnasiumEnv
from maml.errors import MamlError
from maml.seeding import Stream


def pendulum(horizon: int = 10) -> GymnasiumEnv:
    return GymnasiumEnv(env_id="Pendulum-v1", goals={"g": (5.0, 15.0)}, num_shots=2, horizon=horizon)


def test_goals_are_uniform_in_their_ranges() -> None:
    goals = pendulum().draw_goals(4000, Stream(0))
    assert goals.shape == (4000, 1)
    assert 5.0 <= goals.min() < 5.05 and 14.95 < goals.max() <= 15.0
    counts = torch.histc(goals, 10, 5.0, 15.0)
    assert (counts - 400).abs().max() < 5 * 400**0.5


def test_test_goals_are_drawn_once_and_for_all() -> None:
    first, again = (pendulum().test_goals(5) for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(pendulum().test_goals(3), first[:3])


def test_shapes_are_those_of_the_environment_and_of_the_policys_distribution() -> None:
    domain = pendulum()
    assert (domain.in_shape, domain.out_dim) == ((3,), 2), "mean and log standard deviation of one action"


def test_single_environment_has_its_goal_its_horizon_and_clipped_actions() -> None:
    environment = pendulum(horizon=7).make_single(torch.tensor([6.5]))
    assert environment.unwrapped.g == pytest.approx(6.5)  # type: ignore[attr-defined]
    environment.reset(seed=0)
    steps = [environment.step([1e6]) for _ in range(7)]
    assert [truncated for *_, truncated, _ in steps] == [False] * 6 + [True]


def test_keyword_that_the_environment_does_not_take_is_refused() -> None:
    with pytest.raises(MamlError, match=r"Pendulum-v1 cannot be made .*gravity"):
        GymnasiumEnv(env_id="Pendulum-v1", goals={"gravity": (5.0, 15.0)})


def test_horizon_replaces_the_registered_limit() -> None:
    domain = pendulum(horizon=205)  # Pendulum-v1 is registered with 200
    domain.environments.reset(torch.tensor([[9.5]]), Stream(torch.arange(1)))
    ended = [bool(domain.environments.step(torch.zeros(1, 1), torch.arange(1)).terminated) for _ in range(205)]
    assert ended.index(True) == 204, "the last step of the horizon"
