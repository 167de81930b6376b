"""Any Gymnasium environment as one that policies here can use: observations and actions are vectors of numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeGuard

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Tuple
from gymnasium.wrappers import FlattenObservation, TransformAction, TransformObservation

from maml.environment.distribution import Categorical, Distribution, Gaussian
from maml.errors import MamlError


def distribution_of(space: gymnasium.Space | None) -> Distribution:
    """Returns the distribution of actions in a space.

    Raises:
        MamlError: if no policy here gives such actions. The message begins with the space.
    """
    if isinstance(space, Discrete):
        return Categorical(int(space.n))
    if is_vector(space) and np.issubdtype(space.dtype, np.floating):
        return Gaussian(space.shape[0])
    if isinstance(space, MultiDiscrete | MultiBinary):
        count = int(np.prod(space.nvec)) if isinstance(space, MultiDiscrete) else 2 ** int(np.prod(space.shape))
        remedy = f"number the {count} combinations, as Discrete({count}), and take them apart with np.unravel_index"
    elif isinstance(space, Box):
        remedy = "make it a Box of one axis and a floating dtype, and reshape or round the numbers in step"
    else:
        remedy = "make it a Discrete, or a Box of one axis and a floating dtype, and convert it in step"
    raise MamlError(
        f"the action space {space}, but policies here give a vector of real numbers (Box) or one choice (Discrete); "
        + remedy
    )


def with_vectors(environment: gymnasium.Env) -> gymnasium.Env:
    """Returns the environment with observations ``(O,)`` and actions ``(A,)`` of numbers.

    Gymnasium flattens observations of other shapes: the entries of a Dict or a Tuple follow each other, and a number of
    a Discrete is one-hot. Pixels, 8-bit numbers with more than one axis, become numbers from 0 to 1 before that, also
    within a Dict or a Tuple.
    Actions are those of `distribution_of`: real numbers are clipped to the action space, choices are counted from 0.

    Args:
        environment: an environment whose actions have a distribution.

    Raises:
        MamlError: if observations cannot be flattened. The message begins with the space.
    """
    space: Any = environment.action_space
    if isinstance(space, Discrete):
        environment = TransformAction(environment, lambda action: space.dtype.type(space.start + int(action[0])), None)
    else:
        environment = TransformAction(
            environment, lambda action: np.clip(action, space.low, space.high).astype(space.dtype), None
        )
    observed = getattr(environment, "observation_space", None)
    if is_vector(observed):
        return environment
    if not (isinstance(observed, gymnasium.Space) and observed.is_np_flattenable):
        raise MamlError(
            f"the observation space {observed}, which Gymnasium cannot flatten to a vector of fixed length, but "
            "policies here take one; make it a Box, and pad what is shorter"
        )
    converted, convert = _with_unit_pixels(observed)
    return FlattenObservation(TransformObservation(environment, convert, converted))


def _with_unit_pixels(space: gymnasium.Space) -> tuple[gymnasium.Space, Callable[[Any], Any]]:
    """Returns a space whose pixels go from 0 to 1, and the conversion of an observation to it."""
    if isinstance(space, Box) and space.dtype == np.uint8 and len(space.shape) != 1:
        largest = float(space.high.max())
        return Box(0.0, 1.0, space.shape, np.float32), lambda seen: np.divide(seen, largest, dtype=np.float32)
    if isinstance(space, Dict):
        named = {name: _with_unit_pixels(part) for name, part in space.spaces.items()}
        parts = [(name, part) for name, (part, _) in named.items()]  # a list, whose order Gymnasium keeps
        return Dict(parts), lambda seen: {name: convert(seen[name]) for name, (_, convert) in named.items()}
    if isinstance(space, Tuple):
        listed = [_with_unit_pixels(part) for part in space.spaces]
        return Tuple([part for part, _ in listed]), lambda seen: tuple(
            convert(part) for part, (_, convert) in zip(seen, listed, strict=True)
        )
    return space, lambda seen: seen


def is_vector(space: gymnasium.Space | None) -> TypeGuard[Box]:
    """Returns whether a space holds vectors of numbers, which are used as they are."""
    return isinstance(space, Box) and len(space.shape) == 1
