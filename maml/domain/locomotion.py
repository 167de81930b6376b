"""Locomotion (section 5.3): a simulated half-cheetah or ant that is to run at a speed, or forward or backward."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import torch
from torch import Tensor

from maml.domain.reinforcement import Reinforcement
from maml.environment import locomotion
from maml.environment.locomotion import Locomotion, Physics
from maml.environment.mujoco_batch import MujocoEnvironments
from maml.seeding import Stream
from maml.types import Count, Discount, Interval


class Running(Reinforcement):
    """Some task of running; a subclass says who runs, and what the goal is.

    Class attributes:
        environment: of the runner.
        goal_name: its keyword for the goal.

    Args:
        physics: of the environment.
        options: of every RL domain.
    """

    environment: type[Locomotion]
    goal_name: str

    def __init__(self, physics: Physics, **options: Any) -> None:
        super().__init__(MujocoEnvironments(self.environment, physics), **options)
        self.physics = physics

    def make_single(self, goal: Tensor, render_mode: str | None = None) -> gymnasium.Env:
        keywords: dict[str, Any] = {self.goal_name: goal.item(), "physics": self.physics}
        name, horizon = f"maml/{self.environment.__name__}-v0", self.horizon
        return gymnasium.make(name, render_mode=render_mode, max_episode_steps=horizon, **keywords)


class Velocity(Running):
    """Running forward at a speed; a subclass says who runs.

    Args:
        goal_range: of the speed, in metres per second.
        num_shots: K, rollouts per task and gradient step.
        horizon: H, timesteps of an episode.
        discount: of the rewards, in what is learnt from.
        physics: the ``paper``'s, or that of ``gymnasium``'s v5 environments, which other work uses.
        oracle: tells the policy the speed.
        pooled: in training, one baseline and one standardisation for all tasks of a meta-batch.
        num_goals: in training, so many goals drawn once; None draws fresh ones.
    """

    goal_name = "goal_velocity"

    def __init__(
        self,
        goal_range: Interval,
        num_shots: Count = 20,
        horizon: Count = 200,
        discount: Discount = 0.99,
        physics: Physics = "paper",
        oracle: bool = False,
        pooled: bool = False,
        num_goals: Count | None = None,
    ) -> None:
        super().__init__(
            physics,
            num_shots=num_shots,
            horizon=horizon,
            discount=discount,
            oracle=oracle,
            pooled=pooled,
            num_goals=num_goals,
        )
        self.goal_range = goal_range

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


class Direction(Running):
    """Running as fast as possible, forward or backward; a subclass says who runs.

    Class attributes:
        test_draw: seed, lower and upper end, and threshold, from which on it is forward, of the authors' test goals.

    Args:
        num_shots: K, rollouts per task and gradient step.
        horizon: H, timesteps of an episode.
        discount: of the rewards, in what is learnt from.
        physics: the ``paper``'s, or that of ``gymnasium``'s v5 environments, which other work uses.
        oracle: tells the policy the direction.
        pooled: in training, one baseline and one standardisation for all tasks of a meta-batch.
        num_goals: in training, so many goals drawn once; None draws fresh ones.
    """

    goal_name = "goal_direction"
    test_draw: tuple[int, float, float, float]

    def __init__(
        self,
        num_shots: Count = 20,
        horizon: Count = 200,
        discount: Discount = 0.99,
        physics: Physics = "paper",
        oracle: bool = False,
        pooled: bool = False,
        num_goals: Count | None = None,
    ) -> None:
        super().__init__(
            physics,
            num_shots=num_shots,
            horizon=horizon,
            discount=discount,
            oracle=oracle,
            pooled=pooled,
            num_goals=num_goals,
        )

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
