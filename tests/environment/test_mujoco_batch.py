"""Batched half-cheetahs and ants against single ones, and against published returns of random policies."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from maml.environment.locomotion import (
    AntDirection,
    AntVelocity,
    CheetahDirection,
    CheetahVelocity,
    Locomotion,
    Physics,
)
from maml.environment.mujoco_batch import MujocoEnvironments
from maml.errors import MamlError
from maml.hardware.threads import use_threads
from maml.seeding import Stream

pytest.importorskip("mujoco")
pytestmark = pytest.mark.usefixtures("no_files_are_written")

KINDS = [CheetahVelocity, CheetahDirection, AntVelocity, AntDirection]


def streams(count: int, seed: int = 0) -> Stream:
    return Stream(seed).child(torch.arange(count))


def goals_for(kind: type[Locomotion], count: int) -> Tensor:
    if kind in (CheetahVelocity, AntVelocity):
        return torch.linspace(0.0, 2.0, count)[:, None]
    return torch.tensor([1.0, -1.0]).repeat(count)[:count, None]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("physics", ["paper", "gymnasium"])
def test_many_are_to_the_bit_what_each_is_alone(kind: type[Locomotion], physics: Physics) -> None:
    count = 5
    environments = MujocoEnvironments(kind, physics)
    goals, stream = goals_for(kind, count), streams(count)
    observations = environments.reset(goals, stream)
    assert observations.shape == (count, environments.observation_dim)
    assert observations.dtype == torch.float32

    singles = [kind(goal, physics) for goal in goals[:, 0].double().tolist()]
    for single, noise, observation in zip(singles, environments.draw_noise(stream), observations, strict=True):
        alone, _ = single.reset(options={"noise": noise.numpy()})
        assert np.array_equal(alone.astype(np.float32), observation.numpy())

    actions = streams(count, 1).normal((200, environments.action_dim))
    living, ended = torch.arange(count), 0
    for time in range(200):
        transition = environments.step(actions[living, time], living)
        assert transition.rewards.dtype == torch.float32
        assert not transition.unstable.any()
        for row, index in enumerate(living.tolist()):
            single = singles[index]
            observation, reward, terminated, _, _ = single.step(actions[index, time].numpy())
            assert np.array_equal(observation.astype(np.float32), transition.observations[row].numpy())
            assert np.float32(reward) == transition.rewards[row].item()
            assert terminated == transition.terminated[row].item()
            assert np.array_equal(single.data.qpos, environments._batch.qpos[index])
            assert np.array_equal(single.data.qvel, environments._batch.qvel[index])
        ended += int(transition.terminated.sum())
        living = living[~transition.terminated]
        if len(living) == 0:
            break
    assert ended > 0 or kind in (CheetahVelocity, CheetahDirection)


@pytest.mark.parametrize("kind", [CheetahVelocity, AntVelocity])
def test_neither_threads_nor_neighbours_matter(kind: type[Locomotion]) -> None:
    goals, stream = goals_for(kind, 30), streams(30)
    actions = streams(30, 1).normal((20, 8))
    seen = []
    for threads, chosen in ((1, torch.arange(30)), (2, torch.arange(30)), (1, torch.arange(10, 20))):
        use_threads(threads, thread_chunks=True)
        environments = MujocoEnvironments(kind)
        environments.reset(goals[chosen], Stream(stream.key[chosen]))
        use_threads(1, thread_chunks=False)
        for time in range(20):
            taken = actions[chosen, time, : environments.action_dim]
            transition = environments.step(taken, torch.arange(len(chosen)))
        seen.append(transition.observations)
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0][10:20], seen[2])


@pytest.mark.parametrize("kind", [CheetahVelocity, AntVelocity])
def test_step_leaves_the_others_as_they_are(kind: type[Locomotion]) -> None:
    environments = MujocoEnvironments(kind)
    environments.reset(goals_for(kind, 6), streams(6))
    actions = streams(6).normal((2, environments.action_dim))
    environments.step(actions[:, 0], torch.arange(6))
    before = environments._batch.state.copy()
    living = torch.tensor([1, 4])
    environments.step(actions[living, 1], living)
    changed = (environments._batch.state != before).any(1)
    assert changed.tolist() == [False, True, False, False, True, False]


@pytest.mark.parametrize("kind", KINDS)
def test_blown_up_simulations_are_counted_and_harm_no_other(kind: type[Locomotion]) -> None:
    environments, undisturbed = MujocoEnvironments(kind), MujocoEnvironments(kind)
    goals, stream = goals_for(kind, 4), streams(4)
    actions = streams(4).normal((5, environments.action_dim))
    for each in (environments, undisturbed):
        each.reset(goals, stream)
    environments._batch.qvel[1, 2] = np.nan
    transition = environments.step(actions[:, 0], torch.arange(4))
    assert transition.unstable.tolist() == [False, True, False, False]
    assert transition.terminated.tolist() == [False, True, False, False]
    assert transition.rewards[1] == 0
    assert not transition.observations[1].any()
    undisturbed.step(actions[:, 0], torch.arange(4))
    living = torch.tensor([0, 2, 3])
    for time in range(1, 5):
        ours = environments.step(actions[living, time], living)
        theirs = undisturbed.step(actions[living, time], living)
        for field in ours._fields:
            assert torch.equal(getattr(ours, field), getattr(theirs, field)), field
    environments.reset(goals, stream)
    assert not environments.step(actions[:, 0], torch.arange(4)).unstable.any()


def test_reset_draws_what_the_streams_say() -> None:
    environments = MujocoEnvironments(CheetahVelocity)
    goals = goals_for(CheetahVelocity, 4)
    first = environments.reset(goals, streams(4)).clone()
    assert torch.equal(first, environments.reset(goals, streams(4)))
    assert not torch.equal(first, environments.reset(goals, streams(4, seed=1)))
    assert environments.reset(goals[:2], streams(2)).shape == (2, 20)
    assert torch.equal(first[:2], environments.reset(goals[:2], streams(2)))


def test_noise_is_normal_or_uniform_as_the_physics_has_it() -> None:
    paper = MujocoEnvironments(CheetahVelocity).draw_noise(streams(2000))
    assert paper.shape == (2000, 18)
    assert paper.std(0).allclose(torch.ones(18), atol=0.06)
    gymnasium = MujocoEnvironments(CheetahVelocity, "gymnasium").draw_noise(streams(2000))
    assert gymnasium[:, :9].abs().max() <= 1
    assert gymnasium[:, :9].std(0).allclose(torch.tensor(3**-0.5), atol=0.03)
    assert gymnasium[:, 9:].std(0).allclose(torch.ones(9), atol=0.06)


def test_nan_action_says_so() -> None:
    environments = MujocoEnvironments(CheetahVelocity)
    environments.reset(goals_for(CheetahVelocity, 2), streams(2))
    with pytest.raises(MamlError, match="an action is NaN"):
        environments.step(torch.full((2, 6), torch.nan), torch.arange(2))


VELOCITIES = np.random.RandomState(1).uniform(0, 1, 40)
FORWARD = np.random.RandomState(2).uniform(0.1, 0.8, 40) >= 0.4


@pytest.mark.parametrize(
    ("kind", "goals", "expected", "spread", "tolerance"),
    [
        # Mean and spread over the authors' test goals; the tolerance is four standard errors of our estimate.
        (CheetahVelocity, 2 * VELOCITIES, -244, 121, 8),
        (CheetahDirection, np.where(2 * VELOCITIES >= 1, 1, -1), -29, None, 8),
        (AntVelocity, 3 * VELOCITIES, -71, 129, 20),
        (AntDirection, np.where(FORWARD, 1, -1), 7, None, 16),
    ],
)
def test_random_policy_returns_what_was_published(
    kind: type[Locomotion], goals: np.ndarray, expected: float, spread: float | None, tolerance: float
) -> None:
    rollouts = 5
    count = 40 * rollouts
    environments = MujocoEnvironments(kind)
    stream = streams(count)
    environments.reset(torch.tensor(goals, dtype=torch.float32).repeat_interleave(rollouts)[:, None], stream)
    actions = stream.child("actions").normal((200, environments.action_dim))
    living, returns, steps = torch.arange(count), torch.zeros(count), 0
    for time in range(200):
        transition = environments.step(actions[living, time], living)
        returns[living] += transition.rewards
        steps += len(living)
        living = living[~transition.terminated]
    assert returns.mean().item() == pytest.approx(expected, abs=tolerance)
    if spread is not None:
        assert returns.reshape(40, rollouts).mean(1).std().item() == pytest.approx(spread, rel=0.15)
    if kind in (AntVelocity, AntDirection):
        assert 0.7 < steps / (200 * count) < 0.95  # it often falls, but late in the episode
    else:
        assert steps == 200 * count
