"""Point navigation (section 5.3): an agent in the plane moves from the origin to a goal that it does not observe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box
from PIL import Image, ImageDraw
from torch import Tensor

from maml.environment.base import Environments, Transition
from maml.errors import MamlError
from maml.seeding import Stream

_LONGEST_STEP = 0.1  # along each coordinate
_CLOSE_ENOUGH = 0.01  # section 5.3: "within 0.01 of the goal"
_PICTURE = 256  # pixels
_UNBOUNDED = float(np.finfo(np.float32).max)  # the plane has no walls, but Gymnasium's checker warns of infinity

Reward = Literal["distance", "squared_distance"]
Arrival = Literal["box", "disc"]


def move(
    positions: Tensor, actions: Tensor, goals: Tensor, reward: Reward, arrival: Arrival
) -> tuple[Tensor, Tensor, Tensor]:
    """Moves agents. One agent and many agree to the bit, because no operation mixes agents.

    Args:
        positions: the agents' positions, ``(..., 2)``.
        actions: fractions of the longest step, ``(..., 2)``; clipped to ``[-1, 1]``.
        goals: the agents' goals, ``(..., 2)``.
        reward: see `PointNavigation`.
        arrival: see `PointNavigation`.

    Returns:
        The new positions, ``(..., 2)``; the rewards at them, ``(...,)``; and whether the agents have reached their
        goals, ``(...,)``.
    """
    positions = positions + (_LONGEST_STEP * actions).clamp(-_LONGEST_STEP, _LONGEST_STEP)
    offsets = goals - positions
    squared_distances = offsets.square().sum(-1)
    rewards = -(squared_distances if reward == "squared_distance" else squared_distances.sqrt())
    arrived = squared_distances < _CLOSE_ENOUGH**2 if arrival == "disc" else (offsets.abs() < _CLOSE_ENOUGH).all(-1)
    return positions, rewards, arrived


class PointEnvironments(Environments):
    """`PointNavigation` for many goals at once, on the device of the goals.

    Args:
        reward: see `PointNavigation`.
        arrival: see `PointNavigation`.
    """

    observation_dim = 2
    action_dim = 2
    goal_dim = 2

    def __init__(self, reward: Reward = "distance", arrival: Arrival = "box") -> None:
        self.reward: Reward = reward
        self.arrival: Arrival = arrival

    def reset(self, goals: Tensor, stream: Stream) -> Tensor:
        """Puts the agents at the origin; nothing is drawn."""
        self._goals = goals
        self._positions = torch.zeros_like(goals)
        return self._positions

    def step(self, actions: Tensor, living: Tensor) -> Transition:
        moved, rewards, arrived = move(self._positions[living], actions, self._goals[living], self.reward, self.arrival)
        self._positions = self._positions.index_copy(0, living, moved)  # a copy, because callers hold the old positions
        return Transition(moved, rewards, arrived, unstable=torch.zeros_like(arrived))


class PointNavigation(gymnasium.Env[np.ndarray, np.ndarray]):
    """The point robot of section 5.3 of Finn, Abbeel, Levine (2017), with one fixed goal.

    ## Description

    An agent in the plane walks from the origin to a goal that it does not observe: it has to learn from the rewards
    where the goal is. There are no walls and no noise. The paper draws the goals uniformly from [-0.5, 0.5]^2.

    ## Action Space

    `Box(-1, 1, (2,), float32)`. Each coordinate moves by a tenth of its action; larger actions are clipped.

    | Num | Action    | Min | Max |
    | --- | --------- | --- | --- |
    | 0   | step in x | -1  | 1   |
    | 1   | step in y | -1  | 1   |

    ## Observation Space

    `Box(2,)`, float32: the agent's position.

    | Num | Observation | Min      | Max      |
    | --- | ----------- | -------- | -------- |
    | 0   | x           | no limit | no limit |
    | 1   | y           | no limit | no limit |

    ## Rewards

    Minus the distance to the goal after the step (the authors' code), or minus its square (the paper's text).

    ## Starting State

    Exactly (0, 0).

    ## Episode End

    The episode terminates when both coordinates are closer than 0.01 to the goal's (the authors' code), or when the
    distance is below 0.01 (the paper's text). Made by its id, it is truncated after 100 steps.

    ## Arguments

    * `goal`: x and y; `gymnasium.make("maml/PointNavigation-v0", goal=(0.3, -0.2))`.
    * `reward`: `"distance"` or `"squared_distance"`.
    * `arrival`: `"box"` (both coordinates) or `"disc"` (the distance).
    * `render_mode`: `"rgb_array"` draws the goal (green), the path so far and the agent (blue).

    An action that is not two finite numbers, and an unusable goal, reward or arrival, raise a `MamlError`.

    ## Version History

    * v0: first version.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(
        self,
        goal: Sequence[float],
        reward: Reward = "distance",
        render_mode: str | None = None,
        arrival: Arrival = "box",
    ) -> None:
        if np.shape(goal) != (2,) or not np.isfinite(goal).all():
            raise MamlError(f"goal={goal} is no place in the plane; give two finite numbers, x and y")
        if reward not in ("distance", "squared_distance"):
            raise MamlError(f"reward={reward!r} is unknown; give 'distance' or 'squared_distance'")
        if arrival not in ("box", "disc"):
            raise MamlError(f"arrival={arrival!r} is unknown; give 'box' or 'disc'")
        self.reward: Reward = reward
        self.arrival: Arrival = arrival
        self.render_mode = render_mode
        self.action_space = Box(-1.0, 1.0, (2,), np.float32)
        self.observation_space = Box(-_UNBOUNDED, _UNBOUNDED, (2,), np.float32)
        self._goal = torch.tensor([float(coordinate) for coordinate in goal])
        self._path = [torch.zeros(2)]

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self._path = [torch.zeros(2)]
        return self._observation(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        if np.shape(action) != (2,) or not np.isfinite(action).all():
            raise MamlError(f"action {action} is no step in the plane; the policy has to give two finite numbers")
        taken = torch.from_numpy(np.array(action, dtype=np.float32))
        position, reward, arrived = move(self._path[-1], taken, self._goal, self.reward, self.arrival)
        self._path.append(position)
        return self._observation(), reward.item(), bool(arrived), False, {}

    def render(self) -> np.ndarray | None:
        """Returns the picture as ``(256, 256, 3)``, uint8; None without a render mode."""
        if self.render_mode is None:
            return None
        # The square of the paper's goals with a margin, or more where the goal is farther out.
        half_width = 1.2 * max(0.5, *self._goal.abs().tolist())
        picture = Image.new("RGB", (_PICTURE, _PICTURE), "white")
        draw = ImageDraw.Draw(picture)
        centre = torch.tensor([_PICTURE / 2, _PICTURE / 2])
        scale = torch.tensor([1.0, -1.0]) * (centre / half_width)  # a picture's rows run downwards
        pixels = [tuple((centre + scale * place).tolist()) for place in self._path]
        draw.circle(tuple((centre + scale * self._goal).tolist()), 5, fill="green")
        draw.line(pixels, fill="gray")
        draw.circle(pixels[-1], 4, fill="blue")
        return np.array(picture)

    def _observation(self) -> np.ndarray:
        return self._path[-1].numpy().copy()
