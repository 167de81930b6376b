"""Goals of point navigation: the authors' goals in meta-test, new goals in training."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from maml.domain.point_navigation import PointNavigation
from maml.seeding import Stream
from maml.types import Split

# From the authors' result files, to six digits: the first three goals, and the goal of Figure 4, bottom.
PUBLISHED = {0: (-0.082978, 0.220324), 1: (-0.499886, -0.197667), 2: (-0.353244, -0.407661), 6: (-0.295548, 0.378117)}


@pytest.mark.parametrize("stream", [Stream(0), Stream(7)])
def test_test_goals_are_the_authors(stream: Stream) -> None:
    goals = PointNavigation().sample_tasks(40, stream, "test")["goals"]
    assert goals.shape == (40, 2)
    for index, expected in PUBLISHED.items():
        assert goals[index].tolist() == pytest.approx(expected, abs=1e-6)
    assert torch.equal(PointNavigation().sample_tasks(7, stream, "test")["goals"], goals[:7])


@pytest.mark.parametrize("split", ["train", "val"])
def test_goals_are_uniform_in_their_square(split: Split) -> None:
    for goal_range in ((-0.5, 0.5), (1.0, 4.0)):
        low, high = goal_range
        goals = PointNavigation(goal_range=goal_range).sample_tasks(4000, Stream(0), split)["goals"]
        assert low <= goals.min() < low + 0.01 * (high - low)
        assert high - 0.01 * (high - low) < goals.max() <= high
        assert (goals.mean(0) - (low + high) / 2).abs().max() < 0.02 * (high - low)
        assert abs(torch.corrcoef(goals.T)[0, 1]) < 0.06


def test_every_iteration_has_goals_of_its_own_and_every_split_too() -> None:
    domain = PointNavigation()
    draws = [domain.sample_tasks(20, Stream(0).child(iteration))["goals"] for iteration in range(3)]
    draws.append(domain.sample_tasks(20, Stream(0), "val")["goals"])
    draws.append(domain.sample_tasks(20, Stream(0), "test")["goals"])
    assert len(torch.cat(draws).unique(dim=0)) == 100


def test_fixed_goals_are_drawn_once_and_for_all() -> None:
    domain = PointNavigation(num_goals=3)
    first, later = (domain.sample_tasks(8, Stream(seed)) for seed in (0, 1))
    assert torch.equal(first["goals"].unique(dim=0), later["goals"].unique(dim=0))
    assert not torch.equal(first["keys"], later["keys"])
    assert torch.equal(first["goals"][3:6], first["goals"][:3])
    assert len(first["goals"].unique(dim=0)) == 3
    assert torch.equal(domain.sample_tasks(2, Stream(0))["goals"], first["goals"][:2])
    # Meta-batches with fewer tasks than goals have others in every iteration, so that all are used.
    few = torch.cat([domain.sample_tasks(1, Stream(seed))["goals"] for seed in range(20)])
    assert torch.equal(few.unique(dim=0), first["goals"].unique(dim=0))
    # Only training has fixed goals: meta-test has the authors' goals, validation new ones.
    splits: tuple[Split, ...] = ("test", "val")
    for split in splits:
        without_fixed_goals = PointNavigation().sample_tasks(8, Stream(0), split)["goals"]
        assert torch.equal(domain.sample_tasks(8, Stream(0), split)["goals"], without_fixed_goals)


def test_shapes_are_the_papers() -> None:
    domain, oracle = PointNavigation(), PointNavigation(oracle=True)
    assert (domain.in_shape, oracle.in_shape, domain.out_dim, oracle.out_dim) == ((2,), (4,), 4, 4)
    assert (domain.num_shots, domain.horizon, domain.discount) == (20, 100, 0.99)


def test_arrival_is_that_of_the_environments() -> None:
    for domain, arrived in ((PointNavigation(), True), (PointNavigation(arrival="disc"), False)):
        domain.environments.reset(torch.zeros(1, 2), Stream(torch.arange(1)))
        transition = domain.environments.step(torch.tensor([[0.095, -0.095]]), torch.arange(1))
        assert transition.terminated.tolist() == [arrived]
        single = domain.make_single(torch.zeros(2))
        single.reset(seed=0)
        assert single.step(np.array([0.095, -0.095], dtype=np.float32))[2] == arrived
