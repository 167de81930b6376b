"""Any Gymnasium environment, stepped one by one in Python: it needs no extra code, but it is slow."""

from __future__ import annotations

import logging
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import flatten
from gymnasium.wrappers import PassiveEnvChecker
from torch import Tensor

from maml.environment.base import Environments, Transition
from maml.environment.distribution import Distribution
from maml.environment.spaces import distribution_of, is_vector, with_vectors
from maml.errors import EnvironmentFailed, MamlError, place
from maml.seeding import Stream

_CHECKED_STEPS = 1000  # a longer episode is not gone through to its end before a run

_log = logging.getLogger(__name__)

Goal = tuple[float, ...]
Converted = TypeVar("Converted")


class VectorizedEnvironments(Environments):
    """Environments whose tasks differ in keywords that their constructor takes.

    Observations and actions of an environment are used as vectors (`maml.environment.spaces`). An environment must draw
    all randomness from its own generator (``self.np_random``, seeded by ``reset``). A truncation by the environment
    ends an episode as a termination does. An observation or reward that is not finite also ends it, and is replaced by
    zeros.

    Args:
        environment: an id for ``gymnasium.make`` (``"package:id"`` first imports the package that registers it), or a
            function that makes the environment from keywords.
        goal_names: keywords of the environment, one for each column of the goals.
        example_goal: any task's goal; an environment with it is built, checked and kept.
        horizon: number of steps after which the caller ends an episode. It replaces the limit with which an id is
            registered, so that longer episodes are not cut off; None keeps that limit. The example goes through an
            episode of this length, with random actions; with None, through one step.
        keywords: maps a goal to the keywords; None passes its numbers by name.

    Raises:
        MamlError: if the environment does not take these keywords; if its actions have no distribution, or its
            observations cannot be flattened; if its `reset` or `step` fails, breaks Gymnasium's interface, or gives
            other results for the same seed; or if the first step of an episode gives no finite numbers.
    """

    def __init__(
        self,
        environment: str | Callable[..., gymnasium.Env],
        goal_names: Sequence[str],
        example_goal: Sequence[float],
        horizon: int | None = None,
        keywords: Callable[[Sequence[float]], dict[str, Any]] | None = None,
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
        self._keywords = keywords or (lambda goal: dict(zip(goal_names, goal, strict=True)))
        goal = tuple(float(number) for number in example_goal)
        example = self._build(goal)
        self._example = goal
        self._complaints: set[str] = set()
        self._distribution = self._fitting(distribution_of, getattr(example, "action_space", None))
        viewed = self._fitting(with_vectors, example)
        self._check_interface(example, goal)
        self._under_way = [(goal, viewed)]
        self._times = [0]
        self.observation_dim = _length(viewed.observation_space)
        self.action_dim = self._distribution.action_dim
        self.goal_dim = len(goal_names)
        if not self.observation_dim:
            raise MamlError(
                f"{self._name} has the observation space {example.observation_space}, which holds no number, but a "
                "policy acts on observations; give it one at least, such as a constant 1"
            )
        self._check_episode(goal, min(horizon or 1, _CHECKED_STEPS))
        if not is_vector(example.observation_space):
            _log.warning(
                "%s: its observations, a %s, are flattened to vectors of %d numbers",
                self._name,
                type(example.observation_space).__name__,
                self.observation_dim,
            )
        _log.warning(
            "%s is stepped one by one in Python, which is right but slow; a subclass of "
            "maml.environment.base.Environments can step them all at once",
            self._name,
        )

    @property
    def distribution(self) -> Distribution:
        return self._distribution

    def check(self, goal: Sequence[float]) -> None:
        """Checks another task as the constructor checks the example: its keywords, its spaces and its interface.

        Raises:
            MamlError: if it breaks the interface, or its observations or actions have not the example's length.
        """
        numbers = tuple(float(number) for number in goal)
        environment = self._build(numbers)
        self._viewed(environment, numbers)
        self._check_interface(environment, numbers)
        environment.close()

    def reset(self, goals: Tensor, stream: Stream) -> Tensor:
        # Building an environment may cost more than an episode, so environments with the same goal are used again.
        spare: dict[Goal, list[gymnasium.Env]] = defaultdict(list)
        for goal, environment in self._under_way:
            spare[goal].append(environment)
        self._under_way = []
        for goal in map(tuple, goals.tolist()):
            self._under_way.append((goal, spare[goal].pop() if spare[goal] else self._viewed(self._build(goal), goal)))
        for environments in spare.values():
            for environment in environments:
                environment.close()

        observations = []
        self._times = [0] * len(goals)
        for index, seed in enumerate(stream.integers((), 2**31).tolist()):
            goal, environment = self._under_way[index]
            try:
                observation, _ = environment.reset(seed=seed)
                self._check_shape(observation)
            except Exception as error:  # a user's environment may raise anything
                raise self._named(index, error) from error
            if not np.isfinite(observation).all():
                raise MamlError(f"{self._name} begins at {observation} for {self._keywords(goal)}; mend its reset")
            observations.append(observation)
        return torch.as_tensor(np.stack(observations), dtype=torch.get_default_dtype(), device=goals.device)

    def step(self, actions: Tensor, living: Tensor) -> Transition:
        taken = []
        for index, action in zip(living.tolist(), actions.cpu().numpy(), strict=True):
            self._times[index] += 1
            try:
                observation, reward, terminated, truncated, _ = self._under_way[index][1].step(action)
                self._check_shape(observation)
                taken.append((observation, float(reward), bool(terminated) or bool(truncated)))
            except Exception as error:  # a user's environment may raise anything
                raise self._named(index, error) from error
        seen, received, over = zip(*taken, strict=True)
        observations = torch.as_tensor(np.stack(seen), dtype=torch.get_default_dtype(), device=actions.device)
        rewards = torch.tensor(received, device=actions.device)
        stable = observations.isfinite().all(-1) & rewards.isfinite()
        return Transition(
            observations=observations.where(stable.unsqueeze(-1), 0.0),
            rewards=rewards.where(stable, 0.0),
            terminated=torch.tensor(over, device=actions.device),
            unstable=~stable,
        )

    def _build(self, goal: Goal) -> gymnasium.Env:
        keywords = self._keywords(goal)
        try:
            environment = self._make(**keywords)
        except Exception as error:  # a user's environment may raise anything
            raise MamlError(
                f"{self._name} cannot be made with {keywords} ({_one_line(error)}); check its id, and that its "
                "constructor takes the arguments in which tasks differ (domain.goals)"
            ) from error
        return environment

    def _viewed(self, environment: gymnasium.Env, goal: Goal) -> gymnasium.Env:
        """Returns an environment with vectors, which have to be as long as the example's."""
        distribution = self._fitting(distribution_of, getattr(environment, "action_space", None))
        viewed = self._fitting(with_vectors, environment)
        ours = _length(viewed.observation_space), distribution.num_outputs
        wanted = self.observation_dim, self._distribution.num_outputs
        if ours != wanted or type(distribution) is not type(self._distribution):
            raise MamlError(
                f"{self._name} with {self._keywords(goal)} has observations of length {ours[0]} and actions "
                f"{environment.action_space}, but with {self._keywords(self._example)} other ones, of length "
                f"{wanted[0]}; one policy acts in all tasks, so leave out the values that change the spaces"
            )
        return viewed

    def _check_shape(self, observation: Any) -> None:
        if np.shape(observation) != (self.observation_dim,):
            raise ValueError(
                f"the observation has shape {np.shape(observation)}, its space says {(self.observation_dim,)}"
            )

    def _fitting(self, convert: Callable[[Any], Converted], value: Any) -> Converted:
        """Converts a space, or an environment's spaces, and names the environment in an error."""
        try:
            return convert(value)
        except MamlError as error:
            raise MamlError(f"{self._name} has {error}") from error

    def _named(self, index: int, error: Exception) -> EnvironmentFailed:
        """Returns an error that names the environment, its task and the step in which its code has failed."""
        goal, time = self._under_way[index][0], self._times[index]
        where = f"step {time} of an episode" if time else "reset"
        return EnvironmentFailed(
            f"{self._name} with {self._keywords(goal)} fails in {where}: {type(error).__name__}: {_one_line(error)} "
            f"({place(error)}). Mend the environment, or leave out such tasks"
        )

    def _check_interface(self, environment: gymnasium.Env, goal: Goal) -> None:
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
                    "older API needs reset(seed, options) -> (observation, info) and a step that returns 5 values, of "
                    "which the second, the reward, is one number"
                ) from error
        for text in dict.fromkeys(_one_line(complaint.message) for complaint in complaints):
            if text not in self._complaints:
                _log.warning("%s: Gymnasium's checker says: %s", self._name, text)
            self._complaints.add(text)
        if not all(np.array_equal(one, other, equal_nan=True) for one, other in zip(first, again, strict=True)):
            raise self._unrepeatable(goal)

    def _check_episode(self, goal: Goal, num_steps: int) -> None:
        """Goes through an episode's first steps with random actions, twice: some errors and random draws come late."""
        first, again = (self._episode(goal, num_steps) for _ in range(2))
        if first[0].unstable.any():
            raise MamlError(
                f"{self._name} with {self._keywords(goal)} gives an observation or a reward that is not finite in the "
                "first step of an episode, so nothing could be learnt; mend its step"
            )
        if len(first) != len(again) or not all(
            torch.equal(one, other)
            for step, repeated in zip(first, again, strict=True)
            for one, other in zip(step, repeated, strict=True)
        ):
            raise self._unrepeatable(goal)

    def _episode(self, goal: Goal, num_steps: int) -> list[Transition]:
        """Returns the steps of one episode with random actions, always the same ones."""
        stream = Stream(torch.zeros(1, dtype=torch.int64))
        self.reset(torch.tensor([goal]), stream.child("environment"))
        noise = self._distribution.noise(stream.child("actions"), num_steps).unbind(1)
        outputs = torch.zeros(1, self._distribution.num_outputs)
        steps = []
        for one in noise:
            steps.append(self.step(self._distribution.sample(outputs, one), torch.arange(1)))
            if steps[-1].terminated.item() or steps[-1].unstable.item():
                break
        return steps

    def _unrepeatable(self, goal: Goal) -> MamlError:
        return MamlError(
            f"{self._name} with {self._keywords(goal)} gives other observations or rewards when it is reset with the "
            "same seed, so no run could be repeated. Draw all random numbers from self.np_random, and call "
            "super().reset(seed=seed) in reset"
        )


def _first_step(environment: gymnasium.Env) -> tuple[Any, Any, Any]:
    """Returns the first observation of an episode, and the observation and reward after one step."""
    checked = PassiveEnvChecker(environment)
    space = environment.observation_space
    start = np.array(flatten(space, checked.reset(seed=0)[0]))
    environment.action_space.seed(0)
    observation, reward, *_ = checked.step(environment.action_space.sample())
    return start, np.array(flatten(space, observation)), np.array(float(reward))


def _length(space: gymnasium.Space) -> int:
    return space.shape[0]  # type: ignore[index]


def _one_line(message: object) -> str:
    """Returns a message without line breaks, colours of a terminal and the mark of Gymnasium's log."""
    plain = re.sub(r"\x1b\[\d*m", "", str(message) or type(message).__name__)
    return " ".join(plain.split()).removeprefix("WARN: ").rstrip(".")
