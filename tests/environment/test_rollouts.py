"""Batched rollouts of many tasks against a single environment stepped episode by episode."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from maml.environment.base import Environments, Transition
from maml.environment.point import PointEnvironments
from maml.environment.rollouts import Episodes, Policy, collect_episodes, collect_single_episodes
from maml.errors import MamlError
from maml.hardware import distributed
from maml.model.gaussian_policy import GaussianPolicy
from maml.seeding import Stream

DISCOUNT = 0.9


class RandomLengthWalks(Environments):
    """Walks in the plane that end after a random number of steps; one end in three is a blow-up."""

    observation_dim = 3
    action_dim = 2
    goal_dim = 1

    def __init__(self, longest: int = 10) -> None:
        self.longest = longest
        self.started: list[int] = []

    def reset(self, goals: Tensor, stream: Stream) -> Tensor:
        self.goals = goals[:, 0]
        self.ends = stream.child("ends").integers((), self.longest) + 1
        self.blows_up = stream.child("blows up").integers((), 3) == 0
        self.state = torch.cat([stream.child("place").normal((2,)), torch.zeros_like(goals)], dim=-1)
        self.started.append(len(goals))
        return self.state

    def step(self, actions: Tensor, living: Tensor) -> Transition:
        before = self.state[living]
        moved = torch.cat([before[:, :2] + 0.125 * actions.clamp(-1.0, 1.0), before[:, 2:] + 1.0], dim=-1)
        self.state = self.state.index_copy(0, living, moved)
        over, unstable = moved[:, 2] >= self.ends[living], self.blows_up[living]
        rewards = self.goals[living] * moved[:, 0] - moved[:, 1]
        return Transition(moved, rewards, over & ~unstable, over & unstable)


def streams(count: int) -> Stream:
    return Stream(5).child(torch.arange(count))


def pull_policy(goals: Tensor) -> Policy:
    """Returns a policy that pulls each task's agents to its goal; its operations round alike for any batch size."""

    def policy(observations: Tensor) -> Tensor:
        means = 0.5 * (goals[:, :1].unsqueeze(1) - observations[..., :2])
        return torch.cat([means, torch.zeros_like(means)], dim=-1)

    return policy


def network_policies(count: int, observation_dim: int) -> tuple[GaussianPolicy, dict[str, Tensor]]:
    """Returns a model and its parameters for ``count`` tasks, different for each task."""
    model = GaussianPolicy((observation_dim,), 4, hidden_sizes=[8])
    inits = [model.init(Stream(task)) | {"log_std": torch.full((2,), 0.1 * task)} for task in range(count)]
    return model, {name: torch.stack([init[name] for init in inits]) for name in inits[0]}


def roll_out_one_task(
    environments: Environments,
    policy: Policy,
    goal: Tensor,
    stream: Stream,
    num_rollouts: int,
    horizon: int,
    most_episodes: int = 10**9,
) -> dict[str, Any]:
    """Collects one task in one environment, episode by episode, until there are enough timesteps or episodes."""
    recorded: dict[str, list[Tensor]] = {"observations": [], "actions": [], "outputs": []}
    returns: list[float] = []
    times: list[int] = []
    total, episode, unstable, steps = 0.0, 0, 0, 0
    while steps < num_rollouts * horizon and episode < most_episodes:
        own = stream.child(torch.tensor([episode]))
        noise = own.child("actions").normal((horizon, environments.action_dim))
        observation = environments.reset(goal, own.child("reset"))
        rewards: list[float] = []
        for time in range(horizon):
            output = policy(observation.unsqueeze(1))[:, 0]
            mean, log_std = output.chunk(2, dim=-1)
            action = mean + log_std.exp() * noise[:, time]
            for name, value in zip(recorded, (observation, action, output), strict=True):
                recorded[name].append(value[0])
            transition = environments.step(action, torch.zeros(1, dtype=torch.int64))
            rewards.append(transition.rewards.item())
            times.append(time)
            observation = transition.observations
            unstable += int(transition.unstable)
            if transition.terminated or transition.unstable:
                break
        for start in range(len(rewards)):
            returns.append(sum(DISCOUNT**ahead * reward for ahead, reward in enumerate(rewards[start:])))
        total += sum(rewards)
        steps += len(rewards)
        episode += 1
    return {name: torch.stack(values) for name, values in recorded.items()} | {
        "returns_to_go": torch.tensor(returns),
        "times": torch.tensor(times),
        "lengths": steps,
        "total_reward": total,
        "num_episodes": episode,
        "num_unstable": unstable,
    }


def assert_same_rollouts(episodes: Episodes, task: int, expected: dict[str, Any], tolerance: float) -> None:
    """Asserts that a task's rollouts are as expected and followed by zeros only."""
    steps = expected["lengths"]
    for name in ("lengths", "num_episodes", "num_unstable"):
        assert getattr(episodes, name)[task] == expected[name], name
    assert episodes.total_reward[task].item() == pytest.approx(expected["total_reward"], rel=1e-5, abs=1e-5)
    for name in ("observations", "actions", "outputs", "returns_to_go", "times"):
        value = getattr(episodes, name)[task]
        assert not value[steps:].any(), f"{name} behind the last episode"
        loose = max(tolerance, 1e-5) if name == "returns_to_go" else tolerance
        torch.testing.assert_close(value[:steps], expected[name], rtol=loose, atol=loose)


GOALS = {
    "strolls": torch.tensor([[0.5], [-1.0], [2.0], [0.0], [1.0]]),
    "point": torch.tensor([[0.0, 0.0], [0.4, 0.4], [0.0, 0.01], [-0.05, 0.0], [0.02, 0.0]]),
}


def make_environments(kind: str) -> Environments:
    return RandomLengthWalks() if kind == "strolls" else PointEnvironments()


@pytest.mark.parametrize(("num_rollouts", "horizon"), [(1, 1), (1, 12), (4, 7), (3, 30)])
@pytest.mark.parametrize("kind", list(GOALS))
def test_rollouts_are_to_the_bit_those_of_one_environment(kind: str, num_rollouts: int, horizon: int) -> None:
    goals, stream = GOALS[kind], streams(5)
    episodes = collect_episodes(
        make_environments(kind), pull_policy(goals), goals, stream, num_rollouts, horizon, DISCOUNT
    )
    for task in range(5):
        one_task = slice(task, task + 1)
        own = Stream(stream.key[one_task])
        expected = roll_out_one_task(
            make_environments(kind), pull_policy(goals[one_task]), goals[one_task], own, num_rollouts, horizon
        )
        assert_same_rollouts(episodes, task, expected, tolerance=0.0)
    assert episodes.observations.shape[1] == episodes.lengths.max()
    assert (episodes.lengths >= num_rollouts * horizon).all()
    assert (episodes.lengths < (num_rollouts + 1) * horizon).all()
    if horizon == 30:
        assert len(episodes.num_episodes.unique()) > 1, "episodes end early, here more and there less often"
        assert (episodes.num_unstable > 0).any() == (kind == "strolls")


@pytest.mark.parametrize("kind", list(GOALS))
def test_rollouts_of_networks_are_those_of_each_alone(kind: str) -> None:
    goals, stream = GOALS[kind], streams(5)
    environments = make_environments(kind)
    model, params = network_policies(5, environments.observation_dim)
    episodes = collect_episodes(environments, lambda x: model(params, x), goals, stream, 3, 12, DISCOUNT)
    for task in range(5):
        own = {name: value[task : task + 1] for name, value in params.items()}

        def policy(x: Tensor, own: dict[str, Tensor] = own) -> Tensor:
            return model(own, x)

        one_task = slice(task, task + 1)
        expected = roll_out_one_task(
            make_environments(kind), policy, goals[one_task], Stream(stream.key[one_task]), 3, 12
        )
        assert_same_rollouts(episodes, task, expected, tolerance=1e-4)


@pytest.mark.parametrize("kind", list(GOALS))
@pytest.mark.parametrize("chosen", [[2], [3, 4], [4, 0, 2]])
def test_neighbours_do_not_matter(kind: str, chosen: list[int]) -> None:
    goals, stream = GOALS[kind], streams(5)
    together = collect_episodes(make_environments(kind), pull_policy(goals), goals, stream, 3, 12, DISCOUNT)
    chosen_goals = goals[chosen]
    apart = collect_episodes(
        make_environments(kind), pull_policy(chosen_goals), chosen_goals, Stream(stream.key[chosen]), 3, 12, DISCOUNT
    )
    for name, value in apart._asdict().items():
        expected = getattr(together, name)[chosen]
        assert torch.equal(value, expected[:, : value.shape[1]] if value.dim() > 1 else expected), name


def test_rollouts_that_run_to_the_horizon_are_all_collected_at_once() -> None:
    environments = RandomLengthWalks(longest=1)
    environments.longest = 10**9
    goals = GOALS["strolls"]
    episodes = collect_episodes(environments, pull_policy(goals), goals, streams(5), 4, 6, DISCOUNT)
    assert environments.started == [20]
    assert episodes.lengths.tolist() == [24] * 5
    assert episodes.num_episodes.tolist() == [4] * 5
    assert torch.equal(episodes.times, torch.arange(6).repeat(4).expand(5, -1))


def test_episodes_that_end_at_once_are_collected_until_there_are_enough() -> None:
    goals = GOALS["strolls"]
    episodes = collect_episodes(RandomLengthWalks(longest=1), pull_policy(goals), goals, streams(5), 2, 6, DISCOUNT)
    assert episodes.lengths.tolist() == episodes.num_episodes.tolist() == [12] * 5
    assert not episodes.times.any()
    assert (episodes.observations[:, :, 2] == 0).all()
    assert 0 < episodes.num_unstable.sum() < 60


@pytest.mark.parametrize("broken", ["mean", "log_std", "both of one task"])
def test_policy_that_is_not_finite_is_refused(broken: str) -> None:
    goals = GOALS["strolls"]

    def policy(observations: Tensor) -> Tensor:
        outputs = torch.zeros(*observations.shape[:2], 4)
        if broken == "mean":
            outputs[..., 0] = torch.where(observations[..., 2] == 2, torch.nan, 0.0)
        elif broken == "log_std":
            outputs[..., 3] = 200.0  # its exponential is infinite in float32
        else:
            outputs[1] = torch.nan
        return outputs

    affected = {"mean": r"\d+ of \d+", "log_std": "10 of 10", "both of one task": "2 of 10"}[broken]
    with pytest.raises(MamlError, match=rf"action is not finite in {affected} environments.*Lower inner\.step_size"):
        collect_episodes(RandomLengthWalks(), policy, goals, streams(5), 2, 6, DISCOUNT)


def test_stream_decides_what_happens() -> None:
    goals = GOALS["strolls"]
    first, again, other = (
        collect_episodes(
            RandomLengthWalks(), pull_policy(goals), goals, Stream(seed).child(torch.arange(5)), 2, 8, DISCOUNT
        )
        for seed in (1, 1, 2)
    )
    assert all(torch.equal(value, same) for value, same in zip(first, again, strict=True))
    assert not torch.equal(first.total_reward, other.total_reward)


def draw_single(start: int, end: int) -> tuple[Tensor, Stream]:
    """Draws goals and streams of episodes; each has its own, whatever is drawn with it."""
    return Stream(3).uniform((end, 1), -1.0, 1.0)[start:], Stream(streams(end).key[start:])


def roll_out_with_a_goal_per_reset(environments: Environments, policy: Policy, num_timesteps: int, horizon: int) -> Any:
    """Collects episode after episode in one environment, each with the next goal, until there are enough timesteps."""
    episodes, steps = list[dict[str, Any]](), 0
    while steps < num_timesteps:
        goal, stream = draw_single(len(episodes), len(episodes) + 1)
        episodes.append(roll_out_one_task(environments, policy, goal, stream, 1, horizon, most_episodes=1))
        steps += episodes[-1]["lengths"]
    return episodes


@pytest.mark.parametrize(("num_timesteps", "horizon"), [(1, 12), (60, 12), (61, 7), (300, 30)])
def test_single_episodes_are_to_the_bit_those_of_one_environment_with_a_new_goal_at_every_reset(
    num_timesteps: int, horizon: int
) -> None:
    policy = pull_policy(torch.tensor([[0.3]]))
    environments = RandomLengthWalks()
    episodes = collect_single_episodes(environments, policy, draw_single, num_timesteps, horizon, DISCOUNT)
    expected = roll_out_with_a_goal_per_reset(RandomLengthWalks(), policy, num_timesteps, horizon)
    assert len(episodes.lengths) == len(expected)
    for number, episode in enumerate(expected):
        assert_same_rollouts(episodes, number, episode, tolerance=0.0)
    assert num_timesteps <= episodes.lengths.sum() < num_timesteps + horizon
    assert (episodes.num_episodes == 1).all()
    assert environments.started[0] == -(-num_timesteps // horizon), "those that are needed in any case start at once"


@pytest.mark.parametrize("size", [2, 3])
def test_processes_share_the_single_episodes_of_one(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = pull_policy(torch.tensor([[0.3]]))
    alone = collect_single_episodes(RandomLengthWalks(), policy, draw_single, 61, 7, DISCOUNT)
    # The waves of one process, whose lengths the other processes would report.
    environments = RandomLengthWalks()
    collect_single_episodes(environments, policy, draw_single, 61, 7, DISCOUNT)
    ends = torch.tensor(environments.started).cumsum(0).tolist()
    waves = [alone.lengths[start:end].sum() for start, end in zip([0, *ends], ends, strict=False)]
    monkeypatch.setattr(distributed, "world_size", lambda: size)
    found: dict[int, Tensor] = {}
    for rank in range(size):
        sums = iter(waves)
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(distributed, "all_reduce_sum", lambda _, sums=sums: [next(sums)])
        numbers: list[int] = []

        def draw(start: int, end: int, numbers: list[int] = numbers) -> tuple[Tensor, Stream]:
            numbers += range(start, end)
            return draw_single(start, end)

        own = collect_single_episodes(RandomLengthWalks(), policy, draw, 61, 7, DISCOUNT)
        found |= dict(zip(numbers, own.total_reward, strict=True))
    assert sorted(found) == list(range(len(alone.lengths)))
    assert torch.equal(torch.stack([found[number] for number in sorted(found)]), alone.total_reward)


class InPlace(PointEnvironments):
    """Moves and clips in place, and marks ends with the numbers 0 and 1."""

    def reset(self, goals: Tensor, stream: Stream) -> Tensor:
        self.seen = super().reset(goals, stream).clone()
        return self.seen

    def step(self, actions: Tensor, living: Tensor) -> Transition:
        step = super().step(actions, living)
        actions.clamp_(-0.1, 0.1)
        observations = self.seen.copy_(step.observations) if len(living) == len(self.seen) else step.observations
        return step._replace(
            observations=observations, terminated=step.terminated.long(), unstable=step.unstable.to(torch.uint8)
        )


def test_environments_may_work_in_place_and_mark_ends_with_numbers() -> None:
    goals = 0.05 * Stream(2).normal((3, 2))

    def policy(observations: Tensor) -> Tensor:
        means = 10 * (goals.unsqueeze(1) - observations)
        return torch.cat([means, torch.full_like(means, -4.0)], -1)

    expected, found = (
        collect_episodes(environments, policy, goals, streams(3), 4, 12, DISCOUNT)
        for environments in (PointEnvironments(), InPlace())
    )
    assert (expected.num_episodes > 4).any(), "some episodes have to end early"
    assert all(torch.equal(value, same) for value, same in zip(expected, found, strict=True))
