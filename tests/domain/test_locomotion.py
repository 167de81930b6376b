"""Goals of the half-cheetah and the ant: the authors' goals in meta-test, new goals in training."""

from __future__ import annotations

import pytest
import torch

from maml.domain.locomotion import AntDirection, AntVelocity, CheetahDirection, CheetahVelocity, Direction, Velocity
from maml.seeding import Stream

pytest.importorskip("mujoco")

VELOCITIES = [
    (CheetahVelocity(goal_range=(0.0, 2.0)), [0.834044, 1.440649, 0.000229]),
    (AntVelocity(goal_range=(0.0, 3.0)), [1.251066, 2.160973, 0.000343]),
]
# The first ten goals in the authors' result files, and the number of forward goals among all 40.
DIRECTIONS = [
    (CheetahDirection(), [-1, 1, -1, -1, -1, -1, -1, -1, -1, 1], 18),
    (AntDirection(), [1, -1, 1, 1, -1, -1, -1, 1, -1, -1], 20),
]


@pytest.mark.parametrize(("domain", "first"), VELOCITIES)
def test_test_velocities_are_the_authors(domain: Velocity, first: list[float]) -> None:
    goals = domain.sample_tasks(40, Stream(3), "test")["goals"]
    assert goals.shape == (40, 1)
    assert goals[:3, 0].tolist() == pytest.approx(first, abs=1e-6)
    assert torch.equal(domain.sample_tasks(5, Stream(4), "test")["goals"], goals[:5])


@pytest.mark.parametrize(("domain", "first", "forward"), DIRECTIONS)
def test_test_directions_are_the_authors(domain: Direction, first: list[int], forward: int) -> None:
    goals = domain.sample_tasks(40, Stream(3), "test")["goals"]
    assert goals.shape == (40, 1)
    assert goals[:10, 0].tolist() == first
    assert ((goals == 1).sum(), (goals == -1).sum()) == (forward, 40 - forward)


@pytest.mark.parametrize("domain", [domain for domain, _ in VELOCITIES])
def test_training_velocities_are_uniform_and_fresh(domain: Velocity) -> None:
    low, high = domain.goal_range
    goals, others = (domain.sample_tasks(3000, Stream(seed))["goals"] for seed in (0, 1))
    assert low <= goals.min() < low + 0.01 * high
    assert 0.99 * high < goals.max() <= high
    assert abs(goals.mean() - high / 2) < 0.02 * high
    assert not torch.isin(goals[:20], others[:20]).any()


@pytest.mark.parametrize("domain", [domain for domain, *_ in DIRECTIONS])
def test_training_directions_are_forward_or_backward_with_equal_chances(domain: Direction) -> None:
    goals, others = (domain.sample_tasks(3000, Stream(seed))["goals"] for seed in (0, 1))
    assert goals.dtype == torch.float32
    assert set(goals.flatten().tolist()) == {-1.0, 1.0}
    assert abs(goals.mean()) < 0.08
    assert not torch.equal(goals, others)


def test_fixed_goals_are_drawn_once_and_for_all() -> None:
    for domain in (AntVelocity(goal_range=(0.0, 3.0), num_goals=8), CheetahDirection(num_goals=1)):
        first, later = (domain.sample_tasks(20, Stream(seed))["goals"] for seed in (0, 1))
        assert torch.equal(first.unique(), later.unique())
        assert len(first.unique()) == domain.num_goals


@pytest.mark.parametrize(
    ("domain", "observation_dim", "action_dim"),
    [
        (CheetahVelocity(goal_range=(0.0, 2.0)), 20, 6),
        (CheetahVelocity(goal_range=(0.0, 2.0), oracle=True), 21, 6),
        (CheetahDirection(oracle=True), 21, 6),
        (AntVelocity(goal_range=(0.0, 3.0)), 125, 8),
        (AntVelocity(goal_range=(0.0, 3.0), oracle=True), 126, 8),
        (AntDirection(oracle=True), 126, 8),
    ],
)
def test_shapes_are_the_papers(domain: Velocity | Direction, observation_dim: int, action_dim: int) -> None:
    assert (domain.in_shape, domain.out_dim) == ((observation_dim,), 2 * action_dim)
    assert (domain.num_shots, domain.horizon, domain.discount) == (20, 200, 0.99)
