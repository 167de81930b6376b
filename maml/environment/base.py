"""What the sampler steps: many environments of one kind at once, each with a goal of its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from maml.seeding import Stream


class Transition(NamedTuple):
    """The result of one step of L environments.

    Attributes:
        observations: observations after the step, ``(L, O)``, float32.
        rewards: rewards of the step, ``(L,)``, float32.
        terminated: whether the episode is over for a reason of its own (the horizon is the sampler's), ``(L,)``.
        unstable: whether it is over because the simulation blew up; such a step ends the episode too, ``(L,)``.
    """

    observations: Tensor
    rewards: Tensor
    terminated: Tensor
    unstable: Tensor


class Environments(ABC):
    """M independent environments, stepped together; what they return lies on the device of the goals.

    They draw from the streams that a reset is given and from nothing else, and an environment's trajectory does not
    depend on the others beside it.

    Attributes:
        observation_dim: O, numbers in an observation.
        action_dim: A, numbers in an action.
        goal_dim: G, numbers that tell one task from another.
    """

    observation_dim: int
    action_dim: int
    goal_dim: int

    @abstractmethod
    def reset(self, goals: Tensor, stream: Stream) -> Tensor:
        """Starts M new episodes; unfinished ones are dropped.

        Args:
            goals: the goal of each environment, ``(M, G)``.
            stream: the source of randomness, one stream per environment (its key is ``(M,)``).

        Returns:
            The first observations, ``(M, O)``, float32.
        """

    @abstractmethod
    def step(self, actions: Tensor, living: Tensor) -> Transition:
        """Steps some of the environments; the others stay as they are.

        Args:
            actions: the policy's actions, ``(L, A)``, finite; this method clips them to the actuators' range.
            living: which environments, ``(L,)``, int64, ascending.
        """


class TellGoal(Environments):
    """Environments whose observations end with the goal: what an oracle sees.

    Args:
        environments: without it.
    """

    def __init__(self, environments: Environments) -> None:
        self.environments = environments
        self.observation_dim = environments.observation_dim + environments.goal_dim
        self.action_dim, self.goal_dim = environments.action_dim, environments.goal_dim

    def reset(self, goals: Tensor, stream: Stream) -> Tensor:
        self.goals = goals
        return torch.cat([self.environments.reset(goals, stream), goals], dim=-1)

    def step(self, actions: Tensor, living: Tensor) -> Transition:
        step = self.environments.step(actions, living)
        return step._replace(observations=torch.cat([step.observations, self.goals[living]], dim=-1))
