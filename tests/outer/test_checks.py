"""The steps that are tried before a run: an optimizer that would train nothing is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from maml.config.paths import CONF
from maml.config.schema import build
from maml.errors import MamlError
from maml.outer.adam import Adam
from maml.outer.base import Objective, Outer, OuterState
from maml.outer.checks import check_step
from maml.outer.schedule import Cosine, Steps
from maml.outer.sgd import SGD
from maml.types import Params
from tests.contract.test_options import compose_option, for_every_option_of
from tests.runs import TinyRuns


class Own(Outer):
    """An own outer optimizer without a state."""

    def init_state(self, theta: Params) -> OuterState:
        return {}


class Rebinding(Own):
    """Changes a dictionary of its own."""

    def step(self, objective: Objective, theta: Params, state: OuterState) -> dict[str, Tensor]:
        gradients, metrics = objective.gradient(theta)
        theta = {name: value - gradients[name] for name, value in theta.items()}
        return metrics


class Replacing(Own):
    """Puts new tensors into theta."""

    def step(self, objective: Objective, theta: Params, state: OuterState) -> dict[str, Tensor]:
        gradients, metrics = objective.gradient(theta)
        theta |= {name: value - gradients[name] for name, value in theta.items()}
        return metrics


class Silent(Own):
    """Returns nothing."""

    def step(self, objective: Objective, theta: Params, state: OuterState) -> dict[str, Tensor]:
        for name, value in objective.gradient(theta)[0].items():
            theta[name].sub_(value)
        return None  # type: ignore[return-value]


class Demanding(Own):
    """Asks for a metric that only its own algorithm has."""

    def step(self, objective: Objective, theta: Params, state: OuterState) -> dict[str, Tensor]:
        return {"loss": objective.gradient(theta)[1]["mine"]}


class Waiting(Own):
    """Has a first step of zero, and counts its steps in itself."""

    steps = 0

    def step(self, objective: Objective, theta: Params, state: OuterState) -> dict[str, Tensor]:
        gradients, metrics = objective.gradient(theta)
        theta["w"].sub_(gradients["w"] * self.steps)
        self.steps += 1
        return metrics


class Growing(Own):
    """Adds to its state when it is used first."""

    def step(self, objective: Objective, theta: Params, state: OuterState) -> dict[str, Tensor]:
        gradients, metrics = objective.gradient(theta)
        for name, value in gradients.items():
            theta[name].sub_(value)
            state.setdefault(f"sum.{name}", torch.zeros_like(value)).add_(value)
        return metrics


class Talking(Silent):
    """Returns metrics that are no single numbers."""

    def step(self, objective: Objective, theta: Params, state: OuterState) -> dict[str, Tensor]:
        super().step(objective, theta, state)
        return {"loss": torch.zeros(2)}


class Stateless(Silent):
    """Makes no dictionary of tensors."""

    def init_state(self, theta: Params) -> OuterState:
        return {"count": 0}  # type: ignore[dict-item]


@pytest.fixture
def theta() -> Params:
    return {"w": torch.tensor([[1.0, -2.0]]), "b": torch.tensor([0.5])}


@for_every_option_of("outer")
def test_every_outer_optimizer_passes(option: str, theta: Params) -> None:
    before = {name: value.clone() for name, value in theta.items()}
    check_step(build(compose_option(CONF, "outer", option).outer), theta, 10)
    assert all(torch.equal(theta[name], value) for name, value in before.items())


@pytest.mark.parametrize(
    ("outer", "said"),
    [
        (Rebinding(), "Rebinding.step leaves theta as it is, so nothing would be trained"),
        (Replacing(), r"Replacing.step puts a new tensor into theta\['w'\]"),
        (Silent(), "Silent.step returns a NoneType, but has to return metrics"),
        (Talking(), r"Talking.step returns loss of shape \(2,\), but has to return metrics"),
        (Stateless(), "Stateless.init_state has to return a dictionary of tensors"),
        (
            Growing(),
            r"Growing.step changes .* an empty dictionary to sum\.b of shape \(1,\), sum\.w of shape",
        ),
    ],
)
def test_optimizer_that_would_train_nothing_is_refused(outer: Outer, said: str, theta: Params) -> None:
    with pytest.raises(MamlError, match=said):
        check_step(outer, theta, 10)


def test_settings_that_would_train_nothing_are_refused_by_their_part(theta: Params) -> None:
    outer = build(compose_option(CONF, "outer", "trpo", "outer.max_kl=1e9").outer)
    with pytest.raises(MamlError, match=r"with these settings of outer, TRPO\.step leaves theta as it is"):
        check_step(outer, theta, 10)


def test_optimizer_is_left_as_it_was_and_may_wait(theta: Params) -> None:
    outer = Waiting()
    check_step(outer, theta, 10)
    assert outer.steps == 0


@pytest.mark.parametrize(
    "outer",
    [
        Adam(0.1, schedule=Cosine(9)),
        Adam(0.1, schedule=Steps(9, 0.0)),
        SGD(0.1, num_iterations=9, final_step_size=0.0),
    ],
)
def test_step_size_that_falls_to_zero_too_early_is_refused(outer: Outer, theta: Params) -> None:
    check_step(outer, theta, 10)
    with pytest.raises(MamlError, match=r"is 0 before the last of num_iterations=11, so the rest would train nothing"):
        check_step(outer, theta, 11)


def test_run_that_was_trained_with_such_a_step_size_is_still_found(
    tiny: TinyRuns, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("outer=adam_cosine", "outer.schedule.num_iterations=2", "num_iterations=5")
    with pytest.raises(MamlError, match="is 0 before the last"):
        tiny.run(*words)
    with monkeypatch.context() as patch:  # as before this was refused
        patch.setattr("maml.outer.checks._check_last_rate", lambda *_: None)
        tiny.run(*words)
    tiny.run(*words)
    assert "already finished" in capsys.readouterr().out


def test_step_size_may_stay_at_a_final_value(theta: Params) -> None:
    check_step(Adam(0.1, schedule=Cosine(5, final=0.1)), theta, 10)


def test_without_parameters_there_is_nothing_to_check() -> None:
    check_step(Rebinding(), {}, 10)


def test_optimizer_that_asks_for_more_is_not_checked(theta: Params) -> None:
    check_step(Demanding(), theta, 10)


def test_run_is_refused_before_its_folder_is_made(tiny: TinyRuns) -> None:
    with pytest.raises(MamlError, match="leaves theta as it is"):
        tiny.run("~outer", "+outer._target_=tests.outer.test_checks.Rebinding")
    assert not tiny.runs_dir.exists()
