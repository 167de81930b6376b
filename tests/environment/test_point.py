"""Point navigation against the authors' recorded rollouts, and one environment against many."""

from __future__ import annotations

import csv
import math
import pickle
import warnings
from itertools import pairwise
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

import maml.environment  # noqa: F401  (registers the environment)
from maml.environment.point import Arrival, PointEnvironments, PointNavigation, Reward
from maml.errors import MamlError
from maml.seeding import Stream

PAPER = Path(__file__).parents[2] / "results" / "paper"
RECORDED_GOAL = (-0.29555, 0.37812)  # Figure 4, bottom
ID = "maml/PointNavigation-v0"


def read_rows(name: str) -> list[dict[str, str]]:
    with open(PAPER / f"{name}.csv", newline="") as file:
        return list(csv.DictReader(file))


def recorded_paths() -> dict[tuple[str, str], np.ndarray]:
    """Returns the positions of each first rollout, ``(H, 2)``; the end of the last step is not recorded."""
    paths: dict[tuple[str, str], list[list[float]]] = {}
    for row in read_rows("fig4_paths_trajectories"):
        paths.setdefault((row["method"], row["grad_step"]), []).append([float(row["x"]), float(row["y"])])
    return {name: np.array(path) for name, path in paths.items()}


def replay(path: np.ndarray, reward: Reward = "distance") -> tuple[np.ndarray, list[float], list[bool]]:
    """Repeats the steps of a path in the environment; returns its observations, rewards and ends."""
    environment = PointNavigation(RECORDED_GOAL, reward)
    seen, rewards, ended = [environment.reset()[0]], [], []
    for here, there in pairwise(path):
        observation, received, terminated, _, _ = environment.step((there - here) / 0.1)
        seen.append(observation)
        rewards.append(received)
        ended.append(terminated)
    return np.array(seen), rewards, ended


def test_recorded_actions_lead_where_they_led() -> None:
    paths = recorded_paths()
    assert len(paths) == 4
    for path in paths.values():
        assert np.abs(np.diff(path, axis=0)).max() == pytest.approx(0.1, abs=2e-6), "the largest move allowed"
        assert np.allclose(replay(path)[0], path, atol=2e-6)


def test_recorded_episodes_went_on_for_as_long_as_ours() -> None:
    lengths = []
    for path in recorded_paths().values():
        _, _, ended = replay(path)
        assert not any(ended)
        lengths.append(len(path))
        if len(path) < 100:  # the unrecorded last step reached the goal
            path_to_goal = [*path, np.array(RECORDED_GOAL)]
            assert replay(np.array(path_to_goal))[2][-1]
    assert lengths == [100, 50, 100, 100]


def test_recorded_returns_are_of_distances_not_of_their_squares() -> None:
    summary = {(row["method"], row["grad_step"]): row for row in read_rows("fig4_paths_summary")}
    for name, path in recorded_paths().items():
        row = summary[name]
        mean, deviation = float(row["mean_return"]), float(row["std_return_over_rollouts"])
        assert abs(sum(replay(path)[1]) - mean) < 2 * deviation
        assert math.isclose(sum(replay(path)[1]), -np.linalg.norm(path[1:] - RECORDED_GOAL, axis=1).sum(), rel_tol=1e-5)
        squares = sum(replay(path, "squared_distance")[1])
        assert math.isclose(squares, -np.square(path[1:] - RECORDED_GOAL).sum(), rel_tol=1e-4)
        if name == ("MAML", "0"):
            assert abs(squares - mean) > 50 * deviation


@pytest.mark.parametrize("reward", ["distance", "squared_distance"])
def test_goal_is_a_box_not_a_disc(reward: Reward) -> None:
    environment = PointNavigation((0.0, 0.0), reward)
    environment.reset()
    assert environment.step(np.array([0.095, -0.095]))[2]  # 0.0134 away
    environment.reset()
    assert not environment.step(np.array([0.105, 0.0]))[2]


def test_goal_of_the_papers_text_is_a_disc() -> None:
    environment = PointNavigation((0.0, 0.0), arrival="disc")
    for action, arrived in (([0.095, -0.095], False), ([0.07, -0.07], True), ([0.105, 0.0], False)):
        environment.reset()
        assert environment.step(np.array(action))[2] == arrived


def test_actions_are_clipped_and_start_is_the_origin() -> None:
    environment = gymnasium.make(ID, goal=(0.3, 0.4))
    assert environment.reset(seed=0)[0].tolist() == [0.0, 0.0]
    observation, reward, *_ = environment.step(np.array([7.0, -7.0]))
    assert observation.tolist() == pytest.approx([0.1, -0.1])
    assert reward == pytest.approx(-math.hypot(0.2, 0.5))


def test_made_by_id_is_truncated_after_100_steps() -> None:
    environment = gymnasium.make(ID, goal=(5.0, 5.0))
    environment.reset(seed=0)
    ends = [environment.step(np.zeros(2, np.float32))[2:4] for _ in range(100)]
    assert ends == [(False, False)] * 99 + [(False, True)]


@pytest.mark.parametrize("reward", ["distance", "squared_distance"])
def test_environment_passes_gymnasiums_checker(reward: Reward) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(gymnasium.make(ID, goal=(0.1, 0.2), reward=reward, render_mode="rgb_array").unwrapped)


def test_picture_shows_goal_path_and_agent() -> None:
    environment = PointNavigation((0.3, 0.0), render_mode="rgb_array")
    environment.reset()
    for _ in range(4):
        environment.step(np.array([0.0, 1.0]))
    picture = environment.render()
    assert picture is not None and picture.shape == (256, 256, 3)
    # The picture shows 0.6 to each side of the origin; positive y is up.
    middle, right, up = 128, round(128 * (1 + 0.3 / 0.6)), round(128 * (1 - 0.4 / 0.6))
    assert picture[middle, right].tolist() == [0, 128, 0]
    assert picture[up, middle].tolist() == [0, 0, 255]
    assert picture[(middle + up) // 2, middle].tolist() == [128, 128, 128]
    assert PointNavigation((0.3, 0.0)).render() is None


def test_pickled_environment_goes_on_alike() -> None:
    environment = gymnasium.make(ID, goal=(0.1, 0.2)).unwrapped
    environment.reset(seed=0)
    environment.step(np.array([1.0, 0.3]))
    copy = pickle.loads(pickle.dumps(environment))
    for one, other in zip(environment.step(np.ones(2)), copy.step(np.ones(2)), strict=True):
        assert np.array_equal(one, other)


def test_observation_is_the_callers_own() -> None:
    environment = PointNavigation((0.1, 0.2))
    observation, _ = environment.reset()
    observation += 1
    assert environment.step(np.zeros(2))[0].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("action", [[math.nan, 0.0], [math.inf, 0.0], [0.5], 0.5])
def test_impossible_action_is_refused(action: object) -> None:
    environment = PointNavigation((0.1, 0.2))
    environment.reset()
    with pytest.raises(MamlError, match="two finite numbers"):
        environment.step(np.array(action))


def test_impossible_settings_are_refused() -> None:
    for goal in [(0.1,), (0.1, math.nan), 0.1]:
        with pytest.raises(MamlError, match="give two finite numbers"):
            PointNavigation(goal)  # type: ignore[arg-type]
    with pytest.raises(MamlError, match="'squared' is unknown"):
        PointNavigation((0.1, 0.2), reward="squared")  # type: ignore[arg-type]
    with pytest.raises(MamlError, match="arrival='circle' is unknown; give 'box' or 'disc'"):
        PointNavigation((0.1, 0.2), arrival="circle")  # type: ignore[arg-type]


@pytest.mark.parametrize(("reward", "arrival"), [("distance", "box"), ("squared_distance", "disc")])
def test_many_equal_one_to_the_bit(reward: Reward, arrival: Arrival) -> None:
    stream = Stream(0)
    goals = stream.child("goals").uniform((13, 2), -0.5, 0.5)
    actions = stream.child("actions").normal((200, len(goals), 2), std=1.5)
    many = PointEnvironments(reward, arrival)
    ones = [PointNavigation(goal, reward, arrival=arrival) for goal in goals.tolist()]
    everyone = torch.arange(len(goals))
    first = many.reset(goals, Stream(everyone))
    assert torch.equal(first, torch.from_numpy(np.stack([one.reset()[0] for one in ones])))
    for step in range(200):
        transition = many.step(actions[step], everyone)
        expected = [one.step(action) for one, action in zip(ones, actions[step].numpy(), strict=True)]
        observations, rewards, terminated, _, _ = zip(*expected, strict=True)
        assert torch.equal(transition.observations, torch.from_numpy(np.stack(observations)))
        assert transition.rewards.tolist() == list(rewards)
        assert transition.terminated.tolist() == list(terminated)
        assert transition.rewards.dtype == torch.float32 and not transition.unstable.any()


def test_only_the_living_are_stepped() -> None:
    stream = Stream(1)
    goals = stream.uniform((5, 2), -0.5, 0.5)
    environments = PointEnvironments()
    start = environments.reset(goals, Stream(torch.arange(5)))
    kept = start.clone()
    living = torch.tensor([0, 3])
    moved = environments.step(torch.ones(2, 2), living).observations
    assert torch.equal(start, kept)
    after = environments.step(torch.zeros(5, 2), torch.arange(5)).observations
    assert torch.equal(after[living], moved)
    assert after[[1, 2, 4]].abs().max() == 0
    again = environments.reset(goals[:2], Stream(torch.arange(2)))
    assert torch.equal(again, torch.zeros(2, 2))


def test_400_agents_that_know_their_goals_arrive_in_six_steps() -> None:
    stream = Stream(2)
    goals = stream.uniform((400, 2), -0.5, 0.5)
    environments = PointEnvironments()
    positions = environments.reset(goals, Stream(torch.arange(400)))
    living = torch.arange(400)
    for _ in range(6):
        transition = environments.step((goals[living] - positions) * 10, living)
        on = ~transition.terminated
        positions, living = transition.observations[on], living[on]
    assert len(living) == 0
