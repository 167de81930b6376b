"""Point navigation (section 5.3): a point robot in the plane, a goal in the square around its start."""

from __future__ import annotations

from typing import Literal

import gymnasium
import numpy as np
import torch
from torch import Tensor

from maml.domain.reinforcement import Reinforcement
from maml.environment.point import PointEnvironments
from maml.seeding import Stream
from maml.types import Count, Discount, Interval

_TEST_SEED = 1  # of NumPy's generator, as in the authors' test script (docs/protocol.md#meta-test-goals)


class PointNavigation(Reinforcement):
    """Reaching a goal that both coordinates are drawn for.

    Args:
        num_shots: K, rollouts per task and gradient step.
        horizon: H, timesteps of an episode.
        discount: of the rewards, in what is learnt from.
        goal_range: of both coordinates.
        reward: minus the ``distance``, as the authors' code has it, or the ``squared_distance`` of the paper's text.
        oracle: tells the policy the goal.
        pooled: in training, one baseline and one standardisation for all tasks of a meta-batch.
        num_goals: in training, so many goals drawn once; None draws fresh ones.
    """

    def __init__(
        self,
        num_shots: Count = 20,
        horizon: Count = 100,
        discount: Discount = 0.99,
        goal_range: Interval = (-0.5, 0.5),
        reward: Literal["distance", "squared_distance"] = "distance",
        oracle: bool = False,
        pooled: bool = False,
        num_goals: Count | None = None,
    ) -> None:
        super().__init__(PointEnvironments(reward), num_shots, horizon, discount, oracle, pooled, num_goals)
        self.goal_range, self.reward = goal_range, reward

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
            render_mode=render_mode,
            max_episode_steps=self.horizon,
        )
