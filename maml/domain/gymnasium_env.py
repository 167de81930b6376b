"""Any Gymnasium environment as a domain: tasks differ in numbers that its constructor takes."""

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
from maml.errors import MamlError
from maml.seeding import Stream
from maml.types import Interval, Text


@dataclass(kw_only=True, eq=False)
class GymnasiumEnv(Reinforcement):
    """Tasks that differ in keywords of an environment, each uniform in a range. Environments are stepped one by one.

    Args:
        env_id: id for ``gymnasium.make``; ``module:id`` first imports the module that registers it.
        goals: the keywords in which tasks differ, with the range of each. ``oracle`` tells these numbers to the policy.

    Raises:
        MamlError: if the environment does not take these keywords, or if its actions or observations are not real
            vectors.
    """

    env_id: Text
    goals: Annotated[dict[str, Interval], MinLen(1)]

    def make_environments(self) -> Environments:
        self.goal_names = list(self.goals)
        self.low, self.high = (torch.tensor(ends) for ends in zip(*self.goals.values(), strict=True))
        try:
            return VectorizedEnvironments(self.env_id, self.goal_names, self.low.tolist(), self.horizon)
        except MamlError as error:
            raise MamlError(f"domain.env_id={self.env_id!r}, domain.goals={dict(self.goals)}: {error}") from error

    def draw_goals(self, count: int, stream: Stream) -> Tensor:
        low, high = self.low.to(stream.device), self.high.to(stream.device)
        return stream.uniform((count, len(low))) * (high - low) + low

    def test_goals(self, count: int) -> Tensor:
        """Draws the same goals every time."""
        return self.draw_goals(count, Stream(0).child("test goals"))

    def make_single(self, goal: Tensor, render_mode: str | None = None) -> gymnasium.Env:
        keywords = dict(zip(self.goal_names, goal.tolist(), strict=True))
        environment = gymnasium.make(self.env_id, render_mode=render_mode, max_episode_steps=self.horizon, **keywords)
        return gymnasium.wrappers.ClipAction(environment)
