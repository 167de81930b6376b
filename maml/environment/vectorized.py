"""Any Gymnasium environment, stepped one by one in Python: it needs no extra code, but it is slow."""

from __future__ import annotations

import logging
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box
from gymnasium.wrappers import PassiveEnvChecker
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
        example_goal: any task's goal; an environment with it is built, checked and kept.
        horizon: number of steps after which the caller ends an episode. It replaces the limit with which an id is
            registered, so that longer episodes are not cut off; None keeps that limit.

    Raises:
        MamlError: if the environment does not take these keywords; if its actions are not a vector of real numbers, or
            its observations are not a vector; if its `reset` or `step` breaks Gymnasium's interface, or gives other
            results for the same seed.
    """

    def __init__(
        self,
        environment: str | Callable[..., gymnasium.Env],
        goal_names: Sequence[str],
        example_goal: Sequence[float],
        horizon: int | None = None,
    ) -> None:
        self._name = environment if isinstance(environment, str) else getattr(environment, "__name__", environment)
        self._make: Callable[..., gymnasium.Env] = (
            # The checker checks the first step of each environment; with hundreds of environments this is slow. So
            # only the example is checked.
            partial(gymnasium.make, environment, max_episode_steps=horizon, disable_env_checker=True)
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
        self._check(example, goal)
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
        except (ImportError, TypeError, ValueError, gymnasium.error.Error) as error:
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

    def _check(self, environment: gymnasium.Env, goal: Goal) -> None:
        """Resets and steps an environment under Gymnasium's checker, first without and then with its wrappers."""
        where = f"{self._name} with {self._keywords(goal)}"
        with warnings.catch_warnings(record=True) as complaints:
            warnings.simplefilter("always")
            try:
                for checked in dict.fromkeys((environment.unwrapped, environment)):
                    first, again = (_first_step(checked) for _ in range(2))
            except Exception as error:  # a user's environment may raise anything
                raise MamlError(
                    f"{where} breaks Gymnasium's interface in reset or step: {_one_line(error)}. An environment of an "
                    "older API needs reset(seed, options) -> (observation, info) and a step that returns 5 values"
                ) from error
        for text in dict.fromkeys(_one_line(complaint.message) for complaint in complaints):
            _log.warning("%s: Gymnasium's checker says: %s", self._name, text)
        if not all(np.array_equal(one, other, equal_nan=True) for one, other in zip(first, again, strict=True)):
            raise MamlError(
                f"{where} gives other observations or rewards when it is reset with the same seed, so no run could be "
                "repeated. Draw all random numbers from self.np_random, and call super().reset(seed=seed) in reset"
            )

    def _keywords(self, goal: Goal) -> dict[str, float]:
        return dict(zip(self._goal_names, goal, strict=True))


def _first_step(environment: gymnasium.Env) -> tuple[Any, Any, Any]:
    """Returns the first observation of an episode, and the observation and reward after one step."""
    checked = PassiveEnvChecker(environment)
    start = np.array(checked.reset(seed=0)[0])
    environment.action_space.seed(0)
    observation, reward, *_ = checked.step(environment.action_space.sample())
    return start, np.array(observation), np.array(reward)


def _one_line(message: object) -> str:
    """Returns a message without line breaks, colours of a terminal and the mark of Gymnasium's log."""
    plain = re.sub(r"\x1b\[\d*m", "", str(message) or type(message).__name__)
    return " ".join(plain.split()).removeprefix("WARN: ").rstrip(".")


def _is_vector(space: gymnasium.Space) -> bool:
    return isinstance(space, Box) and len(space.shape) == 1
