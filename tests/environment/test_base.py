"""Environments that append the goal to observations, for oracle policies."""

from __future__ import annotations

import torch
from torch import Tensor

from maml.environment.base import Environments, TellGoal, Transition
from maml.seeding import Stream


class Sums(Environments):
    """The observation is the sum of all actions so far, starting at 100."""

    observation_dim, action_dim, goal_dim = 1, 1, 2

    def reset(self, goals: Tensor, stream: Stream) -> Tensor:
        self.sums = torch.full((len(goals), 1), 100.0)
        return self.sums.clone()

    def step(self, actions: Tensor, living: Tensor) -> Transition:
        self.sums[living] += actions
        none = torch.zeros(len(living), dtype=torch.bool)
        return Transition(self.sums[living], actions[:, 0], none, ~none)


def test_goals_stand_behind_the_observations_of_those_that_are_stepped() -> None:
    goals = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    told = TellGoal(Sums())
    assert (told.observation_dim, told.action_dim, told.goal_dim) == (3, 1, 2)
    assert told.reset(goals, Stream(0)).tolist() == [[100, 1, 2], [100, 3, 4], [100, 5, 6]]
    step = told.step(torch.tensor([[7.0], [8.0]]), torch.tensor([0, 2]))
    assert step.observations.tolist() == [[107, 1, 2], [108, 5, 6]]
    assert (step.rewards.tolist(), step.terminated.any(), step.unstable.all()) == ([7, 8], False, True)
    assert told.reset(goals[:1] + 10, Stream(0)).tolist() == [[100, 11, 12]], "a reset forgets the goals before it"
