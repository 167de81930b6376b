"""Any Gymnasium environment as a domain: tasks differ in arguments that its constructor takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import gymnasium
import torch
from annotated_types import MinLen
from pydantic import AfterValidator
from torch import Tensor

from maml.domain.reinforcement import Reinforcement
from maml.environment.base import Environments
from maml.environment.spaces import with_vectors
from maml.environment.vectorized import VectorizedEnvironments
from maml.errors import MamlError
from maml.seeding import Stream
from maml.types import Tasks, Text

_FORMS = "[low, high], {integers: [low, high]} or {values: [a, b, ...]}"
_LARGEST_INTEGER = 2**24  # goals are float32, which holds all integers up to this one

Value = bool | int | float | str
Choice = Sequence[Value] | Mapping[str, Sequence[Value]]


def _checked(goals: Mapping[str, Choice]) -> dict[str, Any]:
    """Each [low, high], {integers: [low, high]} or {values: [a, b, ...]}."""
    return {name: _checked_choice(name, choice) for name, choice in goals.items()}


def _checked_choice(name: str, choice: Choice) -> Any:
    kind, given = next(iter(choice.items()), ("", [])) if isinstance(choice, Mapping) else ("range", choice)
    if kind not in ("range", "integers", "values") or (isinstance(choice, Mapping) and len(choice) != 1):
        raise ValueError(f"{name} has to be {_FORMS}")
    if kind == "values":
        if not given:
            raise ValueError(f"the list of values of {name} is empty; name one at least")
        return {kind: list(given)}
    wanted = int if kind == "integers" else (int, float)
    if len(given) != 2 or not all(isinstance(end, wanted) and not isinstance(end, bool) for end in given):
        ends = "two integers, {integers: [low, high]}" if kind == "integers" else f"two numbers, or else {_FORMS}"
        raise ValueError(f"{name} has to be {ends}")
    low, high = (float(end) for end in given)
    if not low < high:
        raise ValueError(
            f"a range goes from its lower to its upper end, but of {name} {given[0]} is not below {given[1]}; swap "
            "them, or give one value as {values: [a]}"
        )
    if kind == "range":
        return low, high
    if max(abs(low), abs(high)) > _LARGEST_INTEGER:
        raise ValueError(f"integers of {name} may go from {-_LARGEST_INTEGER:,} to {_LARGEST_INTEGER:,}")
    return {kind: list(given)}


class _Range:
    """Real numbers, uniform from ``low`` to ``high``."""

    def __init__(self, low: float, high: float) -> None:
        self.low, self.high = torch.tensor(float(low)), torch.tensor(float(high))

    def draw(self, unit: Tensor) -> Tensor:
        """Maps numbers uniform on [0, 1) to numbers of goals; both have the same shape."""
        return unit * (self.high - self.low).to(unit.device) + self.low.to(unit.device)

    def tried(self) -> list[float]:
        """Returns numbers of goals that are tried before a run; the upper end is never drawn."""
        return [self.low.item()]

    def value(self, number: float) -> Value:
        """Returns what the constructor gets for a number of a goal."""
        return number


class _Listed:
    """Values that are equally likely.

    A goal holds the value. It holds the value's position if one is no number, or two are one number in float32.
    """

    def __init__(self, values: Sequence[Value]) -> None:
        self.values = list(values)
        numeric = all(isinstance(value, int | float) for value in values)
        numbers = torch.tensor([float(value) if numeric else 0.0 for value in values])
        is_told_apart = len(numbers.unique()) == len(values)  # 2**24 and 2**24 + 1 are one number in float32
        self.numbers = numbers if is_told_apart else torch.arange(len(values), dtype=numbers.dtype)

    def draw(self, unit: Tensor) -> Tensor:
        """Maps numbers uniform on [0, 1) to numbers of goals; both have the same shape."""
        count = len(self.values)
        return self.numbers.to(unit.device)[(unit * count).long().clamp(max=count - 1)]

    def tried(self) -> list[float]:
        """Returns numbers of goals that are tried before a run."""
        return self.numbers.tolist()

    def value(self, number: float) -> Value:
        """Returns what the constructor gets for a number of a goal."""
        return self.values[int((self.numbers - number).abs().argmin())]


class _Integers(_Range):
    """Integers, uniform from ``low`` to ``high``, both included."""

    def draw(self, unit: Tensor) -> Tensor:
        low, high = self.low.to(unit.device), self.high.to(unit.device)
        return (low + (unit * (high - low + 1)).floor()).minimum(high)

    def tried(self) -> list[float]:
        return [self.low.item(), self.high.item()]

    def value(self, number: float) -> Value:
        return round(number)


def _made(choice: Any) -> _Range | _Listed:
    if isinstance(choice, Mapping):
        return _Listed(choice["values"]) if "values" in choice else _Integers(*choice["integers"])
    return _Range(*choice)


@dataclass(kw_only=True, eq=False)
class GymnasiumEnv(Reinforcement):
    """Tasks that differ in keywords of an environment, drawn independently. Environments are stepped one by one.

    Args:
        env_id: id for ``gymnasium.make``; ``module:id`` first imports the module that registers it.
        goals: the keywords in which tasks differ. ``[low, high]`` draws real numbers, ``{integers: [low, high]}`` draws
            integers from low to high, ``{values: [a, b]}`` draws one of a list of numbers, texts or booleans.
            ``oracle`` tells these numbers to the policy; of texts, and of numbers that are equal in the precision of
            the run, the position in the list.

    Raises:
        MamlError: if the environment does not take these keywords; if it has no distribution of actions, or its
            observations cannot be flattened; or if it breaks Gymnasium's interface.
    """

    env_id: Text
    goals: Annotated[dict[str, Choice], MinLen(1), AfterValidator(_checked)]

    def make_environments(self) -> Environments:
        try:
            self.choices = {name: _made(choice) for name, choice in _checked(self.goals).items()}
            tried = [choice.tried() for choice in self.choices.values()]
            first = [numbers[0] for numbers in tried]
            made = VectorizedEnvironments(self.env_id, list(self.goals), first, self.horizon, self.keywords)
            for column, numbers in enumerate(tried):  # each keyword may change the spaces, or be refused
                for number in numbers[1:]:
                    made.check([*first[:column], number, *first[column + 1 :]])
        except ValueError as error:
            raise self._failed(error) from error
        self._made, self._passed = made, set[tuple[float, ...]]()
        return made

    def check_tasks(self, tasks: Tasks) -> None:
        """Builds and resets the environment of each goal, because one inside a range may be refused too."""
        try:
            for goal in sorted(set(map(tuple, tasks["goals"].tolist())) - self._passed):
                self._made.check(goal)
                self._passed.add(goal)
        except ValueError as error:
            raise self._failed(error) from error

    def _failed(self, error: ValueError) -> MamlError:
        return MamlError(f"domain.env_id={self.env_id!r}, domain.goals={dict(self.goals)}: {error}")

    def keywords(self, goal: Sequence[float]) -> dict[str, Any]:
        """Returns the constructor's keywords for a goal, ``(G,)``."""
        return {name: choice.value(number) for (name, choice), number in zip(self.choices.items(), goal, strict=True)}

    def draw_goals(self, count: int, stream: Stream) -> Tensor:
        units = stream.uniform((count, len(self.choices))).unbind(-1)
        return torch.stack([choice.draw(unit) for choice, unit in zip(self.choices.values(), units, strict=True)], -1)

    def test_goals(self, count: int) -> Tensor:
        """Draws the same goals every time."""
        return self.draw_goals(count, Stream(0).child("test goals"))

    def make_single(self, goal: Tensor, render_mode: str | None = None) -> gymnasium.Env:
        keywords = self.keywords(goal.tolist()) | ({"render_mode": render_mode} if render_mode else {})
        try:
            made = gymnasium.make(self.env_id, max_episode_steps=self.horizon, **keywords)
        except Exception as error:  # a user's environment may raise anything
            raise MamlError(
                f"{self.env_id} cannot be made with {keywords} ({error}); to be drawn, its constructor has to take "
                "render_mode, and metadata['render_modes'] to have rgb_array"
            ) from error
        return with_vectors(made)
