"""Point navigation (section 5.3): a point robot in the plane moves to a goal in the square around its start."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import gymnasium
import numpy as np
import torch
from torch import Tensor

from maml.domain.reinforcement import Reinforcement
from maml.environment.base import Environments
from maml.environment.point import PointEnvironments
from maml.seeding import Stream
from maml.types import Count, Interval

_TEST_SEED = 1  # seed of NumPy's generator, as in the authors' test script (docs/protocol.md#meta-test-goals)


@dataclass(kw_only=True, eq=False)
class PointNavigation(Reinforcement):
    """Moving a point to a goal, whose two coordinates are uniform in a range.

    Args:
        goal_range: range of both coordinates of the goal.
        reward: minus the ``distance``, as in the authors' code, or minus the ``squared_distance`` of the paper's text.
        arrival: where an episode ends: in the ``box`` where both coordinates are closer than 0.01 to the goal's, as in
            the authors' code, or in the ``disc`` of radius 0.01 around the goal, as in the paper's text.
    """

    horizon: Count = 100
    goal_range: Interval = (-0.5, 0.5)
    reward: Literal["distance", "squared_distance"] = "distance"
    arrival: Literal["box", "disc"] = "box"

    def make_environments(self) -> Environments:
        return PointEnvironments(self.reward, self.arrival)

    def draw_goals(self, count: int, stream: Stream) -> Tensor:
        return stream.uniform((count, 2), *self.goal_range)

    def test_goals(self, count: int) -> Tensor:
        goals = np.random.RandomState(_TEST_SEED).uniform(*self.goal_range, size=(count, 2))
        return torch.from_numpy(goals).to(torch.get_default_dtype())

    def make_single(self, goal: Tensor, render_mode: str | None = None) -> gymnasium.Env:
        return gymnasium.make(
            "maml/PointNavigation-v0",
            goal=goal.tolist(),
            reward=self.reward,
            arrival=self.arrival,
            render_mode=render_mode,
            max_episode_steps=self.horizon,
        )
