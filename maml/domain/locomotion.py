"""Locomotion (section 5.3): a simulated half-cheetah or ant that is to run at a speed, or forward or backward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import gymnasium
import numpy as np
import torch
from torch import Tensor

from maml.domain.reinforcement import Reinforcement
from maml.environment import locomotion
from maml.environment.base import Environments
from maml.environment.locomotion import Locomotion, Physics
from maml.environment.mujoco_batch import MujocoEnvironments
from maml.seeding import Stream
from maml.types import Interval


@dataclass(kw_only=True, eq=False)
class Running(Reinforcement):
    """A task of running; a subclass says who runs, and what the goal is.

    Class attributes:
        environment: the simulation of the runner.
        goal_name: its keyword for the goal.

    Args:
        physics: the simulation: the ``paper``'s, or that of ``gymnasium``'s v5 environments, which other work uses.
    """

    physics: Physics = "paper"

    environment: ClassVar[type[Locomotion]]
    goal_name: ClassVar[str]

    def make_environments(self) -> Environments:
        return MujocoEnvironments(self.environment, self.physics)

    def make_single(self, goal: Tensor, render_mode: str | None = None) -> gymnasium.Env:
        keywords: dict[str, Any] = {self.goal_name: goal.item(), "physics": self.physics}
        name, horizon = f"maml/{self.environment.__name__}-v0", self.horizon
        return gymnasium.make(name, render_mode=render_mode, max_episode_steps=horizon, **keywords)


@dataclass(kw_only=True, eq=False)
class Velocity(Running):
    """Running forward at a speed; a subclass says who runs.

    Args:
        goal_range: range of the goal speed, in metres per second.
    """

    goal_range: Interval

    goal_name = "goal_velocity"

    def draw_goals(self, count: int, stream: Stream) -> Tensor:
        return stream.uniform((count, 1), *self.goal_range)

    def test_goals(self, count: int) -> Tensor:
        """NumPy's generator with seed 1, as in the authors' test scripts (docs/protocol.md#meta-test-goals)."""
        return torch.from_numpy(np.random.RandomState(1).uniform(*self.goal_range, size=(count, 1))).to(
            torch.get_default_dtype()
        )


class CheetahVelocity(Velocity):
    """`Velocity` of a half-cheetah."""

    environment = locomotion.CheetahVelocity


class AntVelocity(Velocity):
    """`Velocity` of an ant."""

    environment = locomotion.AntVelocity


@dataclass(kw_only=True, eq=False)
class Direction(Running):
    """Running as fast as possible, forward or backward; a subclass says who runs.

    Class attributes:
        test_draw: how the authors' test goals were drawn: NumPy's seed, the lower and upper end of the numbers, and the
            threshold from which on a number means forward.
    """

    goal_name = "goal_direction"
    test_draw: ClassVar[tuple[int, float, float, float]]

    def draw_goals(self, count: int, stream: Stream) -> Tensor:
        return 2.0 * stream.integers((count, 1), 2) - 1

    def test_goals(self, count: int) -> Tensor:
        """The authors' 40: cheetah 18 forward, 22 backward; ant 20 and 20 (docs/protocol.md#meta-test-goals)."""
        seed, low, high, threshold = self.test_draw
        numbers = np.random.RandomState(seed).uniform(low, high, size=(count, 1))
        return torch.from_numpy(np.where(numbers >= threshold, 1.0, -1.0)).to(torch.get_default_dtype())


class CheetahDirection(Direction):
    """`Direction` of a half-cheetah."""

    environment = locomotion.CheetahDirection
    test_draw = (1, 0.0, 2.0, 1.0)


class AntDirection(Direction):
    """`Direction` of an ant."""

    environment = locomotion.AntDirection
    test_draw = (2, 0.1, 0.8, 0.4)
