"""The interface of environments: many of one kind are stepped at once, each with its own goal."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from maml.environment.distribution import Distribution, Gaussian
from maml.seeding import Stream


class Transition(NamedTuple):
    """The result of one step of L environments.

    Attributes:
        observations: observations after the step, ``(L, O)``, of torch's default type.
        rewards: rewards of the step, ``(L,)``, of torch's default type.
        terminated: whether the environment ended the episode, ``(L,)``. The horizon does not count: the caller ends
            episodes there.
        unstable: whether the simulation became unstable, which ends the episode too, ``(L,)``.
    """

    observations: Tensor
    rewards: Tensor
    terminated: Tensor
    unstable: Tensor


class Environments(ABC):
    """M independent environments, stepped together. Returned tensors are on the device of the goals.

    All randomness comes from the streams that are passed to `reset`. An environment's trajectory does not depend on the
    other environments.

    Attributes:
        observation_dim: O, length of an observation.
        action_dim: A, length of an action.
        goal_dim: G, length of a goal, in which tasks differ.
    """

    observation_dim: int
    action_dim: int
    goal_dim: int

    @property
    def distribution(self) -> Distribution:
        """The distribution of the policy's actions; real numbers, unless a subclass says otherwise."""
        return Gaussian(self.action_dim)

    @abstractmethod
    def reset(self, goals: Tensor, stream: Stream) -> Tensor:
        """Starts M episodes; earlier episodes are dropped.

        Args:
            goals: one goal for each environment, ``(M, G)``.
            stream: one stream for each environment: its key is ``(M,)``.

        Returns:
            The first observations, ``(M, O)``, of torch's default type.
        """

    @abstractmethod
    def step(self, actions: Tensor, living: Tensor) -> Transition:
        """Steps some of the environments; the others do not change.

        Args:
            actions: the policy's finite actions, ``(L, A)``; this method clips real numbers to the allowed range.
            living: numbers of the environments to step, ``(L,)``, int64, ascending.
        """


class TellGoal(Environments):
    """Adds the goal to the end of observations, for an oracle.

    Args:
        environments: environments whose observations do not hold the goal.
    """

    def __init__(self, environments: Environments) -> None:
        self.environments = environments
        self.observation_dim = environments.observation_dim + environments.goal_dim
        self.action_dim, self.goal_dim = environments.action_dim, environments.goal_dim

    @property
    def distribution(self) -> Distribution:
        return self.environments.distribution

    def reset(self, goals: Tensor, stream: Stream) -> Tensor:
        self.goals = goals
        return torch.cat([self.environments.reset(goals, stream), goals], dim=-1)

    def step(self, actions: Tensor, living: Tensor) -> Transition:
        step = self.environments.step(actions, living)
        return step._replace(observations=torch.cat([step.observations, self.goals[living]], dim=-1))
