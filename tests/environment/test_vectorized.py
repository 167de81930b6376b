"""Gymnasium environments as batches of tasks, against stepping each environment by hand."""

from __future__ import annotations

import logging
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete, MultiDiscrete
from gymnasium.spaces import Sequence as Words
from torch import Tensor

from maml.environment import vectorized
from maml.environment.distribution import Categorical
from maml.environment.vectorized import VectorizedEnvironments
from maml.errors import MamlError
from maml.hardware.precision import use_precision
from maml.seeding import Stream

GRAVITIES = torch.tensor([[9.5], [1.25], [9.5], [4.0]])


class Counter(gymnasium.Env):
    """Sums up its actions; beyond a limit the sum or the reward becomes infinite or NaN."""

    def __init__(self, limit: float, broken: float = 0.0, start: float = 0.0) -> None:
        self.action_space = Box(-1.0, 1.0, (1,), np.float64)
        self.observation_space = Box(-100.0, 100.0, (2,), np.float64)
        self.limit, self.broken, self.start = limit, broken, start
        self.open = True

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.sum = np.array([self.start, self.np_random.uniform()])
        return self.sum, {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        assert action.dtype == np.float64 and np.abs(action).max() <= 1
        self.sum[0] += action[0]  # returns the same array at every step, as some environments do
        beyond = self.sum[0] > self.limit
        if beyond and self.broken == 1:
            self.sum[1] = np.nan
        reward = np.inf if beyond and self.broken == 2 else self.sum[0]
        return self.sum, reward, bool(beyond), False, {}

    def close(self) -> None:
        assert self.open
        self.open = False


def streams(count: int) -> Stream:
    return Stream(torch.arange(count) + 7)


def all_indices(goals: Tensor) -> Tensor:
    return torch.arange(len(goals))


def test_pendulums_equal_those_stepped_by_hand() -> None:
    many = VectorizedEnvironments("Pendulum-v1", ["g"], [9.5])
    assert (many.observation_dim, many.action_dim, many.goal_dim) == (3, 1, 1)
    ones = [gymnasium.make("Pendulum-v1", g=gravity) for gravity in GRAVITIES[:, 0].tolist()]
    stream = streams(4)
    seeds = stream.integers((), 2**31).tolist()
    first = [one.reset(seed=seed)[0] for one, seed in zip(ones, seeds, strict=True)]
    assert torch.equal(many.reset(GRAVITIES, stream), torch.from_numpy(np.stack(first)))
    actions = Stream(0).normal((200, 4, 1), std=3.0)  # many exceed the limit of 2
    for step in range(200):
        transition = many.step(actions[step], all_indices(GRAVITIES))
        taken = actions[step].clamp(-2.0, 2.0).numpy()
        expected = [one.step(action) for one, action in zip(ones, taken, strict=True)]
        observations, rewards, terminated, truncated, _ = zip(*expected, strict=True)
        assert torch.equal(transition.observations, torch.from_numpy(np.stack(observations)))
        assert torch.equal(transition.rewards, torch.tensor(rewards, dtype=torch.float32))
        assert not any(terminated) and transition.terminated.tolist() == list(truncated)
        assert not transition.unstable.any()
    assert transition.terminated.all()  # Pendulum-v1 is truncated after 200 steps


def test_environments_do_not_depend_on_their_neighbours() -> None:
    many, few = (VectorizedEnvironments("Pendulum-v1", ["g"], [9.5]) for _ in range(2))
    stream, chosen = streams(4), torch.tensor([1, 3])
    many.reset(torch.full_like(GRAVITIES, 9.5), streams(4))  # creates environments that the next reset reuses
    first = many.reset(GRAVITIES, stream)
    assert torch.equal(few.reset(GRAVITIES[chosen], Stream(stream.key[chosen])), first[chosen])
    for _ in range(5):
        expected = many.step(torch.ones(4, 1), torch.arange(4))
        for one, other in zip(few.step(torch.ones(2, 1), torch.arange(2)), expected, strict=True):
            assert torch.equal(one, other[chosen])


def test_only_the_living_are_stepped() -> None:
    environments = VectorizedEnvironments(Counter, ["limit"], [9.0])
    environments.reset(torch.tensor([[9.0], [9.0], [1.5]]), streams(3))
    environments.step(torch.ones(2, 1), torch.tensor([0, 2]))
    transition = environments.step(torch.tensor([[0.5], [0.5], [5.0]]), torch.arange(3))
    assert transition.observations[:, 0].tolist() == [1.5, 0.5, 2.0]
    assert transition.rewards.tolist() == [1.5, 0.5, 2.0]
    assert transition.terminated.tolist() == [False, False, True]


@pytest.mark.parametrize("broken", [1.0, 2.0])
def test_unstable_step_ends_the_episode_with_zeros(broken: float) -> None:
    environments = VectorizedEnvironments(Counter, ["broken", "limit"], [0.0, 9.0])
    environments.reset(torch.tensor([[0.0, 0.5], [broken, 0.5]]), streams(2))
    transition = environments.step(torch.ones(2, 1), torch.arange(2))
    assert transition.unstable.tolist() == [False, True]
    assert transition.observations[0, 0] == 1.0 and transition.observations[1].tolist() == [0.0, 0.0]
    assert transition.rewards.tolist() == [1.0, 0.0]
    assert transition.observations.dtype == transition.rewards.dtype == torch.float32


def test_environments_of_the_same_goals_are_built_once() -> None:
    built: list[Counter] = []

    def build(limit: float) -> Counter:
        built.append(Counter(limit))
        return built[-1]

    environments = VectorizedEnvironments(build, ["limit"], [1.0])
    environments.reset(torch.tensor([[1.0], [2.0], [1.0]]), streams(3))
    assert [one.limit for one in built] == [1.0, 2.0, 1.0]  # the first is the example
    environments.reset(torch.tensor([[1.0], [1.0], [2.0]]), streams(3))
    assert len(built) == 3 and all(one.open for one in built)
    environments.reset(torch.tensor([[3.0], [2.0]]), streams(2))
    assert [(one.limit, one.open) for one in built] == [(1.0, False), (2.0, True), (1.0, False), (3.0, True)]


def test_slowness_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        environments = VectorizedEnvironments("Pendulum-v1", ["g"], [9.5])
        for _ in range(2):
            environments.reset(GRAVITIES, streams(4))
            environments.step(torch.zeros(4, 1), torch.arange(4))
    (message,) = caplog.messages
    assert "Pendulum-v1" in message and "slow" in message


def counter_with_spaces(**spaces: gymnasium.Space | None) -> Any:
    def build(limit: float) -> Counter:
        environment = Counter(limit)
        vars(environment).update(spaces)
        return environment

    return build


@pytest.mark.parametrize(
    ("environment", "goal_names", "example", "message"),
    [
        ("Pendulum-v1", ["gravity"], [9.5], "cannot be made .*gravity.*unexpected keyword.*domain.goals"),
        ("Pendulums-v1", ["g"], [9.5], "cannot be made .*Did you mean"),
        (Counter, ["limits"], [9.5], "Counter cannot be made .*unexpected keyword argument 'limits'"),
        ("Pendulum-v1", ["g"], [9.5, 1.0], "give a number for each"),
        (counter_with_spaces(action_space=MultiDiscrete([2, 3])), ["limit"], [1.0], "the 6 combinations, as Discrete"),
        (counter_with_spaces(action_space=Box(0, 3, (2,), np.int64)), ["limit"], [1.0], "int64.*floating dtype"),
        (counter_with_spaces(action_space=Box(-1, 1, (2, 2))), ["limit"], [1.0], "Box of one axis"),
        (counter_with_spaces(observation_space=None), ["limit"], [1.0], "has the observation space None, which"),
        (counter_with_spaces(observation_space=Box(0, 1, (0,))), ["limit"], [1.0], "holds no number.* a constant 1"),
        (counter_with_spaces(action_space=None), ["limit"], [1.0], "has the action space None, but policies here"),
        (
            counter_with_spaces(observation_space=Words(Box(0, 1))),
            ["limit"],
            [1.0],
            "observation space Seq.* fixed length",
        ),
    ],
)
def test_unsuitable_environment_is_refused(
    environment: Any, goal_names: list[str], example: list[float], message: str
) -> None:
    with pytest.raises(MamlError, match=message):
        VectorizedEnvironments(environment, goal_names, example)


def test_start_that_is_not_finite_is_refused() -> None:
    environments = VectorizedEnvironments(Counter, ["limit", "start"], [1.0, 0.0])
    with pytest.raises(MamlError, match=r"begins at .*nan.*'limit': 1.0.*mend its reset"):
        environments.reset(torch.tensor([[1.0, torch.nan]]), streams(1))


class OldReset(Counter):
    """Returns no info from `reset`, and four values from `step`."""

    def reset(self, **_: Any) -> Any:
        return super().reset(seed=0)[0]

    def step(self, action: np.ndarray) -> Any:
        return super().step(action)[:4]


class Unseeded(Counter):
    """Draws from a generator of its own."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        observation, info = super().reset(seed=seed)
        return observation + np.random.default_rng().uniform(), info


class Failing(Counter):
    def step(self, action: np.ndarray) -> Any:
        raise RuntimeError("the simulator is\nnot installed")


class RewardList(Counter):
    def step(self, action: np.ndarray) -> Any:
        observation, reward, *rest = super().step(action)
        return observation, np.array([reward]), *rest


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (OldReset, r"OldReset with {'limit': 1.0} breaks Gymnasium's interface in reset or step: .* 5 values"),
        (Unseeded, "other observations or rewards when it is reset with the same seed.*self.np_random"),
        (Failing, "in reset or step: the simulator is not installed"),
        (RewardList, "breaks Gymnasium's interface .* the second, the reward, is one number"),
    ],
)
def test_environment_that_breaks_the_interface_is_refused_by_name(environment: Any, message: str) -> None:
    with pytest.raises(MamlError, match=message):
        VectorizedEnvironments(environment, ["limit"], [1.0])


class LateDraw(Counter):
    """Draws from a generator of its own in step 3; ``draws=0`` fails there instead."""

    def __init__(self, draws: float) -> None:
        super().__init__(limit=99.0)
        self.draws = draws

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        self.time = 0
        return super().reset(seed=seed)

    def step(self, action: np.ndarray) -> Any:
        self.time += 1
        if self.time == 3 and not self.draws:
            raise RuntimeError("the motor is hot")
        observation, reward, *rest = super().step(action)
        return observation, reward + np.random.default_rng().uniform() * (self.time == 3), *rest


@pytest.mark.parametrize(("draws", "message"), [(1.0, "same seed.*self.np_random"), (0.0, "fails in step 3 of an")])
def test_episode_of_the_example_shows_what_its_first_step_does_not(draws: float, message: str) -> None:
    VectorizedEnvironments(LateDraw, ["draws"], [draws], horizon=2)
    with pytest.raises(MamlError, match=message):
        VectorizedEnvironments(LateDraw, ["draws"], [draws], horizon=3)


def test_long_episode_is_not_gone_through_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vectorized, "_CHECKED_STEPS", 2)
    VectorizedEnvironments(LateDraw, ["draws"], [0.0], horizon=10**9)


@pytest.mark.parametrize("broken", [1.0, 2.0])
def test_first_step_that_is_not_finite_is_refused(broken: float) -> None:
    with pytest.raises(MamlError, match=r"Counter with {'limit': -9.0.* not finite in the first step .* mend its step"):
        VectorizedEnvironments(Counter, ["limit", "broken"], [-9.0, broken])


def test_what_the_checker_warns_of_is_said(caplog: pytest.LogCaptureFixture) -> None:
    class Outside(Counter):
        def step(self, action: np.ndarray) -> Any:
            observation, *rest = super().step(action)
            return observation + 1e6, *rest

    with caplog.at_level(logging.WARNING):
        VectorizedEnvironments(Outside, ["limit"], [9.0])
    assert "Outside: Gymnasium's checker says: The obs returned by the `step()` method is not within" in caplog.text


def test_horizon_replaces_the_limit_of_an_id() -> None:
    environments = VectorizedEnvironments("Pendulum-v1", ["g"], [9.5], horizon=3)
    environments.reset(torch.tensor([[9.5]]), streams(1))
    ended = [bool(environments.step(torch.zeros(1, 1), torch.arange(1)).terminated) for _ in range(3)]
    assert ended == [False, False, True]


class Chain(gymnasium.Env):
    """Places from 0 to ``length`` - 1; the three actions go left, stay and go right. It fails at a place."""

    def __init__(self, length: int = 5, fails_at: int = -1, fails_in: str = "step") -> None:
        assert isinstance(length, int), "an integer"
        self.observation_space, self.action_space = Discrete(length), Discrete(3, start=-1)
        self.length, self.fails_at, self.fails_in = length, fails_at, fails_in

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[int, dict]:
        super().reset(seed=seed)
        if self.fails_in == "reset":
            raise RuntimeError("the simulator\nhas crashed")
        self.place = 0
        return self.place, {}

    def step(self, action: int) -> tuple[int, float, bool, bool, dict]:
        assert self.action_space.contains(action)
        self.place = int(np.clip(self.place + action, 0, self.length - 1))
        if self.place == self.fails_at:
            raise RuntimeError("the simulator\nhas crashed")
        return self.place, float(self.place), False, False, {}


def test_discrete_actions_and_observations_are_numbers_and_one_hot() -> None:
    environments = VectorizedEnvironments(Chain, [], [])
    distribution = environments.distribution
    assert isinstance(distribution, Categorical) and distribution.num_outputs == 3
    assert (environments.observation_dim, environments.action_dim) == (5, 1)
    first = environments.reset(torch.zeros(2, 0), streams(2))
    assert first.dtype == torch.float32 and first.tolist() == [[1.0, 0.0, 0.0, 0.0, 0.0]] * 2
    transition = environments.step(torch.tensor([[2.0], [0.0]]), torch.arange(2))
    assert transition.observations.argmax(1).tolist() == transition.rewards.tolist() == [1, 0]


def test_flattened_observations_are_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        VectorizedEnvironments(Chain, [], [])
    assert "Chain: its observations, a Discrete, are flattened to vectors of 5 numbers" in caplog.messages


def crashing(goal: float) -> Chain:
    """An environment whose task decides where it fails; -2 is in reset."""
    return Chain(fails_at=round(goal), fails_in="reset" if goal == -2 else "step")


def test_failing_step_is_named_with_its_task() -> None:
    environments = VectorizedEnvironments(crashing, ["goal"], [-1.0])
    environments.reset(torch.tensor([[-1.0], [2.0]]), streams(2))
    right = torch.full((2, 1), 2.0)
    environments.step(right, torch.arange(2))
    message = (
        r"^crashing with {'goal': 2.0} fails in step 2 of an episode: RuntimeError: the simulator has crashed "
        r"\(test_vectorized\.py, line \d+\)"
    )
    with pytest.raises(MamlError, match=message):
        environments.step(right, torch.arange(2))


def test_failing_reset_is_named_with_its_task() -> None:
    environments = VectorizedEnvironments(crashing, ["goal"], [-1.0])
    with pytest.raises(MamlError, match=r"^crashing with {'goal': -2.0} fails in reset: RuntimeError: the simulator"):
        environments.reset(torch.tensor([[-1.0], [-2.0]]), streams(2))


def test_failing_constructor_is_named_with_its_task() -> None:
    def make(limit: float) -> Chain:
        raise KeyError("no such map")

    with pytest.raises(MamlError, match=r"^make cannot be made with {'limit': 1.0} \('no such map'\)"):
        VectorizedEnvironments(make, ["limit"], [1.0])


def test_tasks_whose_spaces_differ_are_refused() -> None:
    environments = VectorizedEnvironments(Chain, ["length"], [5.0], keywords=lambda goal: {"length": round(goal[0])})
    environments.check([5.0])
    message = r"Chain with {'length': 7} has observations of length 7 .*but with {'length': 5} other ones, of length 5"
    with pytest.raises(MamlError, match=message):
        environments.check([7.0])
    with pytest.raises(MamlError, match=message):
        environments.reset(torch.tensor([[5.0], [7.0]]), streams(2))


def test_tasks_whose_actions_are_of_another_kind_are_refused() -> None:
    def build(choices: float) -> Counter:
        environment = Counter(9.0)
        environment.action_space = Discrete(2) if choices else Box(-1.0, 1.0, (1,), np.float64)  # both take 2 outputs
        return environment

    environments = VectorizedEnvironments(build, ["choices"], [0.0])
    with pytest.raises(MamlError, match=r"build with {'choices': 1.0} .* actions Discrete\(2\), but with"):
        environments.check([1.0])


def test_observation_of_another_shape_than_its_space_is_named() -> None:
    class Grows(Counter):
        def step(self, action: np.ndarray) -> Any:
            observation, *rest = super().step(action)
            return np.append(observation, 0.0) if self.sum[0] > 2 else observation, *rest

    environments = VectorizedEnvironments(Grows, ["limit"], [9.0])
    environments.reset(torch.tensor([[9.0]]), streams(1))
    with pytest.raises(MamlError, match=r"Grows .* in step 3 .* shape \(3,\), its space says \(2,\)"):
        for _ in range(3):
            environments.step(torch.ones(1, 1), torch.arange(1))


def test_observations_and_rewards_have_the_default_type() -> None:
    with use_precision("float64"):
        environments = VectorizedEnvironments("Pendulum-v1", ["g"], [9.5])
        first = environments.reset(torch.tensor([[9.5]]), streams(1))
        transition = environments.step(torch.ones(1, 1), torch.arange(1))
    assert first.dtype == transition.observations.dtype == transition.rewards.dtype == torch.float64
    assert transition.rewards.float().double() != transition.rewards, "not rounded to float32 on the way"
