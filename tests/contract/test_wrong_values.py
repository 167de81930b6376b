"""Wrong values for every key of every option: each gives a run that works, or one to three lines that name the key.

The wrong values are listed in `WRONG`; options and keys are found in conf/ and in the constructors, so a new option is
tried too. A try is the whole start of a run up to its first iteration, with made-up images, and it may write nothing.
The slow tests try everything; the fast ones try a part.
"""

from __future__ import annotations

import copy
import itertools
import math
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hydra.errors import HydraException
from torch import nn

from maml.config.compose import compose
from maml.config.names import locate
from maml.config.paths import CONF
from maml.config.reference import reference
from maml.config.schema import PARTS, check
from maml.data.cache import ImageSet
from maml.domain.classification import FewShotClassification
from maml.errors import MamlError
from maml.experiment import run_experiment
from tests.options import options, try_with

Config = dict[str, Any]
Start = Callable[[Config], str]

# A part's class has to fit the others, so an option is tried in the first of these runs that starts with it.
RUNS = {
    "vectors": (),
    "images": ("domain=omniglot", "model=conv4", "evaluation=accuracy", "evaluation.num_steps=1"),
    "rollouts": ("domain=point_navigation", "model=gaussian_policy", "outer=trpo", "evaluation=average_return"),
}
SMALL = ("num_iterations=1", "meta_batch_size=2", "log_every=1", "checkpoint_every=1", "evaluation.num_tasks=2")
WRONG: tuple[Any, ...] = (
    *(None, True, False, "", " ", "nope", "a" * 300, "${nope}", "\0"),
    *(-1, 0, 1, 3, 0.5, -0.5, 1e300, float("nan"), float("inf"), -float("inf")),
    *(10**15, 2**63, 10**30, -(10**15)),
    *([], [None], [1, "a"], [0.5, 0.5], [[1]], [10**15], [True]),
    *({}, {"a": 1}, {"_target_": "builtins.dict"}, {"_target_": "nope.Nope"}, {"_target_": 3}, {"_partial_": True}),
)


class Flat(nn.Module):
    """A network for inputs of any shape."""

    def __init__(self, in_shape: tuple[int, ...], out_dim: int) -> None:
        super().__init__()
        self.head = nn.Linear(math.prod(in_shape), out_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x.flatten(1))


class _Started(Exception):
    """The run has come to its first iteration: nothing was wrong with its settings."""


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Start:
    """Returns a function that starts a run and returns the message with which it is refused; empty if it starts."""

    def begin(*_: object) -> None:
        raise _Started

    def load(domain: FewShotClassification, *_: Path) -> tuple[ImageSet, dict[str, torch.Tensor]]:
        blank = torch.zeros((), dtype=torch.uint8).expand(30, 20, *domain.in_shape)
        return ImageSet(blank, [], ""), {split: torch.arange(30) for split in ("train", "val", "test")}

    for path in CONF.glob("domain/*.yaml"):
        target = yaml.safe_load(path.read_text()).get("_target_")
        if target is None:
            continue  # it has the class of the option that it inherits from
        cls: Any = locate(target)
        if issubclass(cls, FewShotClassification):
            monkeypatch.setattr(cls, "load", load)
    monkeypatch.setattr("maml.experiment._train", begin)
    monkeypatch.chdir(tmp_path)

    def refusal(config: Config) -> str:
        try:
            settings = check(config)
            run_experiment(settings, "custom")
        except _Started:
            return ""
        except MamlError as error:
            return str(error)
        finally:
            assert not list(tmp_path.iterdir()), "it has written something"
        raise AssertionError("it neither starts nor is refused")

    return refusal


def compose_option(part: str, option: str, *overrides: str) -> Config:
    """Composes an option with the overrides from the ``# Try with:`` line of its yaml."""
    settings, _ = compose([*overrides, f"{part}={option}", *try_with(part, option)])
    return settings.as_dict()


@dataclass(frozen=True)
class Try:
    """One wrong value, or a misspelt key, in a run that starts without it."""

    config: Config
    part: str
    key: str
    value: Any

    @property
    def name(self) -> str:
        """The key as it is written on the command line."""
        return f"{self.part}.{self.key}".lstrip(".")

    def settings(self) -> Config:
        """Returns the settings with the wrong value."""
        config = copy.deepcopy(self.config)
        node = config[self.part] if self.part else config
        *parents, last = self.key.split(".")
        for parent in parents:
            node = node[parent]
        node[last] = self.value
        return config

    def fault(self, start: Start) -> str:
        """Returns what is not as it should be; empty if the value is refused clearly, or right."""
        try:
            message = start(self.settings())
        except Exception as error:
            return f"{self.name}={self.value!r}: {type(error).__name__}: {error}"
        if message and len(message.splitlines()) > 3:
            return f"{self.name}={self.value!r}: {len(message.splitlines())} lines"
        if message and self.key.rpartition(".")[2] not in message:
            return f"{self.name}={self.value!r} is not named: {message}"
        return ""


def startable(part: str, option: str, start: Start) -> Config:
    """Returns the settings of a small run with an option."""
    refusals = []
    for run in RUNS.values():
        try:
            config = compose_option(part, option, *run, *SMALL)
        except MamlError as error:
            refusals.append(str(error))
            continue
        if "module" in config["model"]:
            config["model"]["module"]["_target_"] = f"{__name__}.Flat"  # fits every domain
        config["hardware"] |= {"device": "cpu", "num_threads": 1, "min_processes": 1}  # this machine may have no GPU
        message = start(config)
        if not message:
            return config
        refusals.append(message)
    raise AssertionError(f"{part}={option} starts in no run: {refusals}")


def tries(part: str, option: str, config: Config) -> Iterator[Try]:
    """Yields the wrong values and the misspelt name of every key of an option."""
    (found,) = (
        each
        for group in reference()
        if group.name == part
        for each in group.options
        if each.name == (option or "config")
    )
    for name in [key.name.removeprefix(f"{part}.") for key in found.keys]:
        parent = name.rpartition(".")[0]
        if (part or name not in PARTS) and (not parent or config[part].get(parent) is not None):
            yield from (Try(config, part, name, value) for value in WRONG)
            yield Try(config, part, name[:-1] + name[-1] * 2, 1)


def all_options() -> list[tuple[str, str]]:
    """Returns the root and every option of every part."""
    return [("", ""), *((part, option) for part in PARTS for option in options(part))]


def all_pairs() -> list[tuple[str, str]]:
    """Returns all pairs of options of different parts, as words of a command."""
    words = [[f"{part}={option}" for option in options(part)] for part in PARTS]
    return [pair for one, other in itertools.combinations(words, 2) for pair in itertools.product(one, other)]


def pair_fault(first: str, second: str, start: Start) -> str:
    """Returns what is not as it should be with a pair of options; empty if it starts or is refused clearly."""
    chosen = dict(choice.split("=") for choice in (first, second))
    needed = [word for part, option in chosen.items() for word in try_with(part, option)]
    needed = [word for word in needed if word.partition("=")[0] not in chosen]
    try:
        settings, _ = compose([*SMALL, *needed, first, second])
        message = start(settings.as_dict())
    except (MamlError, HydraException) as error:
        message = str(error)
    except Exception as error:
        return f"{first} {second}: {type(error).__name__}: {error}"
    if message and len(message.splitlines()) > 3:
        return f"{first} {second}: {len(message.splitlines())} lines: {message}"
    if message and not re.search(rf"\b({'|'.join(PARTS)})\b", message):
        return f"{first} {second}: no part is named: {message}"
    return ""


def check_tries(chosen: list[tuple[str, str]], start: Start, draw: random.Random | None = None, each: int = 0) -> int:
    """Tries the wrong values of some options, all of them or ``each`` drawn ones; returns how many were tried."""
    faults, count = [], 0
    for part, option in chosen:
        found = list(tries(part, option, startable(part or "domain", option or "sinusoid", start)))
        for one in draw.sample(found, min(each, len(found))) if draw else found:
            faults.append(one.fault(start))
            count += 1
    assert [fault for fault in faults if fault] == []
    return count


def test_some_wrong_values_are_refused_by_name_or_right(start: Start) -> None:
    draw = random.Random(0)
    chosen = [("", ""), *(draw.choice([each for each in all_options() if each[0] == part]) for part in PARTS)]
    assert check_tries(chosen, start, draw, each=30) >= 200


def test_some_pairs_of_options_start_or_are_refused_by_name(start: Start) -> None:
    faults = [pair_fault(*pair, start) for pair in random.Random(0).sample(all_pairs(), 8)]
    assert [fault for fault in faults if fault] == []


@pytest.mark.slow
def test_all_wrong_values_are_refused_by_name_or_right(start: Start) -> None:
    assert check_tries(all_options(), start) >= 10_000


@pytest.mark.slow
def test_all_pairs_of_options_start_or_are_refused_by_name(start: Start) -> None:
    faults = [pair_fault(*pair, start) for pair in all_pairs()]
    assert [fault for fault in faults if fault] == []
