"""Any Gymnasium environment as vectors: observations against Gymnasium's own flattening, actions as they arrive."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Space, Text, Tuple, flatten

from maml.environment.distribution import Categorical, Gaussian
from maml.environment.spaces import distribution_of, is_vector, with_vectors
from maml.errors import MamlError

PIXELS = Box(0, 255, (4, 3, 3), np.uint8)


class Echo(gymnasium.Env):
    """Observes samples of a space, and keeps the last action."""

    def __init__(self, observed: Space, actions: Space) -> None:
        self.observation_space, self.action_space = observed, actions

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict]:
        self.observation_space.seed(seed)
        self.seen = self.observation_space.sample()
        return self.seen, {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        assert self.action_space.contains(action)
        self.action, self.seen = action, self.observation_space.sample()
        return self.seen, 0.0, False, False, {}


@pytest.mark.parametrize(
    "observed",
    [
        Dict(place=Box(-1, 1, (2, 2)), kind=Discrete(3, start=-1)),
        Tuple([Discrete(2), Box(-1.0, 1.0, (3,))]),
        Discrete(5),
        MultiDiscrete([2, 3]),
        MultiBinary(4),
        Box(-1, 1, (2, 3)),
        Box(-1, 1, ()),
        Box(0, 9, (2, 3), np.int64),
    ],
)
def test_observations_are_flattened_by_gymnasium(observed: Space) -> None:
    environment = Echo(observed, Discrete(2))
    viewed = with_vectors(environment)
    for act in (lambda: viewed.reset(seed=0), lambda: viewed.step(np.array([1.0]))):
        seen = act()[0]
        assert is_vector(viewed.observation_space) and seen.shape == viewed.observation_space.shape
        np.testing.assert_array_equal(seen, flatten(observed, environment.seen))


def test_vectors_stay_as_they_are() -> None:
    environment = Echo(Box(0, 255, (3,), np.uint8), Discrete(2))
    assert with_vectors(environment).reset(seed=0)[0] is environment.seen


def test_pixels_become_numbers_from_0_to_1() -> None:
    environment = Echo(PIXELS, Discrete(2))
    seen, _ = with_vectors(environment).reset(seed=0)
    np.testing.assert_array_equal(seen, environment.seen.flatten() / np.float32(255))
    assert (seen.dtype, seen.shape) == (np.float32, (36,))


def test_pixels_within_other_spaces_become_numbers_from_0_to_1() -> None:
    space = Dict(view=PIXELS, both=Tuple([Discrete(2), PIXELS]), memory=Box(0, 255, (2,), np.uint8))
    environment = Echo(space, Discrete(2))
    seen, _ = with_vectors(environment).reset(seed=0)
    number, picture = environment.seen["both"]
    parts = (environment.seen["view"] / 255, number == np.arange(2), picture / 255, environment.seen["memory"])
    np.testing.assert_allclose(seen, np.concatenate([np.ravel(part) for part in parts]), rtol=1e-6)


def test_pictures_of_two_colours_stay_0_and_1() -> None:
    environment = Echo(Box(0, 1, (4, 3), np.uint8), Discrete(2))
    seen, _ = with_vectors(environment).reset(seed=0)
    np.testing.assert_array_equal(seen, environment.seen.flatten())


@pytest.mark.parametrize("start", [0, -3, 5])
def test_choices_are_counted_from_zero(start: int) -> None:
    space = Discrete(4, start=start)
    environment = Echo(Discrete(2), space)
    distribution = distribution_of(space)
    assert isinstance(distribution, Categorical) and distribution.num_outputs == 4
    viewed = with_vectors(environment)
    viewed.reset(seed=0)
    viewed.step(np.array([2.0], np.float32))
    assert environment.action == start + 2 and environment.action.dtype == space.dtype


def test_real_numbers_are_clipped() -> None:
    space = Box(np.array([-1.0, 0.0]), np.array([1.0, np.inf]), dtype=np.float64)
    environment = Echo(Discrete(2), space)
    distribution = distribution_of(space)
    assert isinstance(distribution, Gaussian) and distribution.action_dim == 2
    viewed = with_vectors(environment)
    viewed.reset(seed=0)
    viewed.step(np.array([-7.0, 99.0], np.float32))
    assert environment.action.tolist() == [-1.0, 99.0] and environment.action.dtype == np.float64


@pytest.mark.parametrize(
    ("space", "remedy"),
    [
        (MultiDiscrete([2, 3, 4]), r"Discrete\(24\), and take them apart with np.unravel_index"),
        (MultiBinary(3), r"Discrete\(8\)"),
        (Box(-1, 1, (2, 2)), "Box of one axis"),
        (Box(0, 3, (2,), np.int64), "int64.* floating dtype"),
        (Dict(a=Discrete(2)), "make it a Discrete, or a Box"),
        (Tuple([Discrete(2)]), "make it a Discrete, or a Box"),
    ],
)
def test_actions_without_a_distribution_are_refused_with_the_remedy(space: Space, remedy: str) -> None:
    with pytest.raises(MamlError, match=rf"^the action space .*{remedy}"):
        distribution_of(space)


def test_observations_of_changing_length_are_refused_with_the_remedy() -> None:
    with pytest.raises(
        MamlError, match=r"^the observation space Sequence.* of fixed length, .* make it a Box, and pad"
    ):
        with_vectors(Echo(gymnasium.spaces.Sequence(Discrete(2)), Discrete(2)))


def test_texts_are_flattened_to_the_numbers_of_their_letters() -> None:
    assert with_vectors(Echo(Text(3), Discrete(2))).reset(seed=0)[0].shape == (3,)
