"""Any Gymnasium environment, stepped one by one in Python: it needs no extra code, but it is slow."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box
from torch import Tensor

from maml.environment.base import Environments, Transition
from maml.errors import MamlError
from maml.seeding import Stream

_log = logging.getLogger(__name__)

Goal = tuple[float, ...]


class VectorizedEnvironments(Environments):
    """Environments whose tasks differ in numbers that their constructor takes.

    An environment must draw all randomness from its own generator (``self.np_random``, seeded by ``reset``). A
    truncation by the environment ends an episode as a termination does. An observation or reward that is not finite
    also ends it, and is replaced by zeros.

    Args:
        environment: an id for ``gymnasium.make`` (``"package:id"`` first imports the package that registers it), or a
            function that makes the environment from keywords.
        goal_names: keywords of the environment, one for each column of the goals.
        example_goal: any task's goal; an environment with it is built to read the spaces.

    Raises:
        MamlError: if the environment does not take these keywords, or if its actions are not a vector of real numbers,
            or its observations are not a vector.
    """

    def __init__(
        self, environment: str | Callable[..., gymnasium.Env], goal_names: Sequence[str], example_goal: Sequence[float]
    ) -> None:
        self._name = environment if isinstance(environment, str) else getattr(environment, "__name__", environment)
        self._make: Callable[..., gymnasium.Env] = (
            # The checker checks the first step of each environment; with hundreds of environments this is slow.
            partial(gymnasium.make, environment, disable_env_checker=True)
            if isinstance(environment, str)
            else environment
        )
        if len(goal_names) != len(example_goal):
            raise MamlError(
                f"example_goal={list(example_goal)} does not fit goal_names={list(goal_names)}; give a number for each"
            )
        self._goal_names = list(goal_names)
        goal = tuple(float(number) for number in example_goal)
        example = self._build(goal)
        self._under_way = [(goal, example)]
        self.observation_dim = example.observation_space.shape[0]  # type: ignore[index]
        self.action_dim = example.action_space.shape[0]  # type: ignore[index]
        self.goal_dim = len(goal_names)
        _log.warning(
            "%s is stepped one by one in Python, which is right but slow; a subclass of "
            "maml.environment.base.Environments can step them all at once",
            self._name,
        )

    def reset(self, goals: Tensor, stream: Stream) -> Tensor:
        # Building an environment may cost more than an episode, so environments with the same goal are used again.
        spare: dict[Goal, list[gymnasium.Env]] = defaultdict(list)
        for goal, environment in self._under_way:
            spare[goal].append(environment)
        self._under_way = []
        for goal in map(tuple, goals.tolist()):
            self._under_way.append((goal, spare[goal].pop() if spare[goal] else self._build(goal)))
        for environments in spare.values():
            for environment in environments:
                environment.close()

        observations = []
        for (goal, environment), seed in zip(self._under_way, stream.integers((), 2**31).tolist(), strict=True):
            observation, _ = environment.reset(seed=seed)
            if not np.isfinite(observation).all():
                raise MamlError(f"{self._name} begins at {observation} for {self._keywords(goal)}; mend its reset")
            observations.append(observation)
        return torch.as_tensor(np.stack(observations), dtype=torch.get_default_dtype(), device=goals.device)

    def step(self, actions: Tensor, living: Tensor) -> Transition:
        taken = []
        for index, action in zip(living.tolist(), actions.cpu().numpy(), strict=True):
            environment = self._under_way[index][1]
            space: Any = environment.action_space
            taken.append(environment.step(np.clip(action, space.low, space.high).astype(space.dtype)))
        seen, received, terminated, truncated, _ = zip(*taken, strict=True)
        observations = torch.as_tensor(np.stack(seen), dtype=torch.get_default_dtype(), device=actions.device)
        rewards = torch.tensor([float(reward) for reward in received], device=actions.device)
        over = torch.tensor(np.logical_or(terminated, truncated), device=actions.device)
        stable = observations.isfinite().all(-1) & rewards.isfinite()
        return Transition(
            observations=observations.where(stable.unsqueeze(-1), 0.0),
            rewards=rewards.where(stable, 0.0),
            terminated=over,
            unstable=~stable,
        )

    def _build(self, goal: Goal) -> gymnasium.Env:
        keywords = self._keywords(goal)
        try:
            environment = self._make(**keywords)
        except (TypeError, gymnasium.error.Error) as error:
            raise MamlError(
                f"{self._name} cannot be made with {keywords} ({error}); give the environment's id, and as goal_names "
                "keywords that its constructor takes"
            ) from error
        action_space, observation_space = environment.action_space, environment.observation_space
        if not (_is_vector(action_space) and np.issubdtype(action_space.dtype, np.floating)):
            raise MamlError(
                f"{self._name} has the action space {action_space}, but the policies here give a vector of real "
                "numbers; it needs a Box of one axis and a floating dtype"
            )
        if not _is_vector(observation_space):
            raise MamlError(
                f"{self._name} has the observation space {observation_space}, but the policies here take a vector; it "
                "needs a Box of one axis, which gymnasium.wrappers.FlattenObservation makes of most spaces"
            )
        return environment

    def _keywords(self, goal: Goal) -> dict[str, float]:
        return dict(zip(self._goal_names, goal, strict=True))


def _is_vector(space: gymnasium.Space) -> bool:
    return isinstance(space, Box) and len(space.shape) == 1
