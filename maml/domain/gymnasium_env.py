"""Any Gymnasium environment as a domain: a task is a choice of its constructor's numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import gymnasium
import torch
from annotated_types import MinLen
from torch import Tensor

from maml.domain.reinforcement import Reinforcement
from maml.environment.base import Environments
from maml.environment.vectorized import VectorizedEnvironments
from maml.seeding import Stream
from maml.types import Interval


@dataclass(kw_only=True, eq=False)
class GymnasiumEnv(Reinforcement):
    """Tasks that differ in keywords of an environment, each uniform in a range. It is stepped the slow, plain way.

    Args:
        env_id: the id that ``gymnasium.make`` takes; ``module:id`` imports the module that registers it.
        goals: keywords of the environment that tell tasks apart, and their ranges. They are what ``oracle`` tells.

    Raises:
        MamlError: if the environment does not take these keywords, or has other than real vectors as actions and
            observations.
    """

    env_id: str
    goals: Annotated[dict[str, Interval], MinLen(1)]

    def make_environments(self) -> Environments:
        self.goal_names = list(self.goals)
        self.low, self.high = (torch.tensor(ends) for ends in zip(*self.goals.values(), strict=True))
        return VectorizedEnvironments(self.env_id, self.goal_names, self.low.tolist())

    def draw_goals(self, count: int, stream: Stream) -> Tensor:
        low, high = self.low.to(stream.device), self.high.to(stream.device)
        return stream.uniform((count, len(low))) * (high - low) + low

    def test_goals(self, count: int) -> Tensor:
        """Drawn once and for all."""
        return self.draw_goals(count, Stream(0).child("test goals"))

    def make_single(self, goal: Tensor, render_mode: str | None = None) -> gymnasium.Env:
        keywords = dict(zip(self.goal_names, goal.tolist(), strict=True))
        environment = gymnasium.make(self.env_id, render_mode=render_mode, max_episode_steps=self.horizon, **keywords)
        return gymnasium.wrappers.ClipAction(environment)
