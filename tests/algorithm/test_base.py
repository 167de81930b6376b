"""Every algorithm: a run that is interrupted and resumed ends with the same bits."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from typing import Any

import pytest
import torch
from hydra.utils import get_class
from torch import Tensor

from maml.algorithm.base import Algorithm
from maml.errors import Interrupted, MamlError
from maml.experiment import build_algorithm
from maml.hardware.base import Hardware
from maml.inner.sgd import SGD
from maml.outer.base import Objective
from maml.record import checkpoint
from maml.types import Tasks
from tests.options import options, try_with
from tests.runs import TinyRuns, assert_same_run

CASES = [(option, *try_with("algorithm", option)) for option in options("algorithm")]
CASES += [
    ("maml", "inner=learned_sgd"),
    ("maml", "inner=meta_lstm", "inner.num_steps=2", "inner.hidden_size=2", "model.hidden_sizes=[8]"),
    ("maml", "outer=sgd"),
    ("multitask_average", *try_with("algorithm", "multitask_average"), "algorithm.pull=mean", "algorithm.weight=0.1"),
]
POLICY = (
    "model=gaussian_policy",
    "model.hidden_sizes=[8]",
    "evaluation=average_return",
    "evaluation.num_shots=[2]",
    "domain.num_shots=2",
)
NAVIGATION = ("domain=point_navigation", "domain.horizon=10", *POLICY)
CHEETAH = ("domain=cheetah_velocity", "domain.horizon=8", *POLICY)
CASES += [
    ("maml", "outer=trpo", *NAVIGATION),
    ("maml", "outer=trpo", *CHEETAH),
    ("pretrain", "outer=adam", *NAVIGATION),
    ("oracle", "outer=trpo", "domain.pooled=true", *CHEETAH),
]


def stop_at(monkeypatch: pytest.MonkeyPatch, algorithm: type[Algorithm], iteration: int) -> None:
    """Sends SIGTERM before a meta-update of this process, which is given by its number, from 1."""
    meta_update, count = algorithm.meta_update, 0

    def stopping(self: Algorithm, objective: Objective, tasks: Tasks) -> dict[str, Tensor]:
        nonlocal count
        count += 1
        if count == iteration:
            os.kill(os.getpid(), signal.SIGTERM)
        return meta_update(self, objective, tasks)

    monkeypatch.setattr(algorithm, "meta_update", stopping)


@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join(case[:4]))
def test_stopped_run_resumes_bit_exactly(
    case: tuple[str, ...], tiny: TinyRuns, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_images = "domain=omniglot" in case or case[0] in ("context_vector", "reptile")
    runs = request.getfixturevalue("tiny_images") if on_images else tiny
    small = ("model.num_filters=4", "meta_batch_size=2") if on_images else ()
    overrides = (f"algorithm={case[0]}", *case[1:], *small, "num_iterations=8")
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        stop_at(patch, get_class(runs.config(*overrides).algorithm["_target_"]), 5)
        runs.run(*overrides)
    folder = runs.folder(*overrides)
    assert checkpoint.load(folder / "checkpoint.pt")["iteration"] == 5
    runs.run(*overrides)
    assert_same_run(folder, runs.in_folder("whole").run(*overrides))


@pytest.mark.parametrize("learnt", [None, {"step_size": torch.zeros(1)}])
def test_wrong_return_of_init_learned_is_an_error_before_training(
    tiny: TinyRuns, monkeypatch: pytest.MonkeyPatch, learnt: Any
) -> None:
    monkeypatch.setattr(SGD, "init_learned", lambda *arguments: learnt)
    with pytest.raises(MamlError, match=r"SGD\.init_learned has to return a dictionary .* start with 'inner\.'"):
        tiny.run()


def with_numbered_head(value: Any, number: int) -> Any:
    """Returns a state under the names of earlier versions."""
    if not isinstance(value, dict):
        return value
    return {name.replace("head.", f"linear{number}."): with_numbered_head(item, number) for name, item in value.items()}


@pytest.mark.parametrize(
    "case",
    [
        ("algorithm=maml", "inner=learned_sgd"),
        ("algorithm=reptile", "inner=adam"),
        (
            "algorithm=multitask_average",
            *try_with("algorithm", "multitask_average"),
            "algorithm.pull=mean",
            "algorithm.weight=0.1",
        ),
        ("algorithm=context_vector", "algorithm.num_channels=2"),
        ("algorithm=maml", "outer=trpo", *NAVIGATION),
    ],
    ids=" ".join,
)
def test_checkpoint_in_which_the_head_has_a_number_loads(case: tuple[str, ...], tiny: TinyRuns) -> None:
    config = tiny.config(*case)
    saved, loaded = (build_algorithm(replace(config, seed=seed), Hardware("cpu")) for seed in (0, 1))
    state = saved.state_dict()
    names = [f"{group}.{name}" for group, tensors in state.items() for name in tensors]
    assert any("head." in name for name in names)
    number = len(config.model["hidden_sizes"]) + 1
    earlier = with_numbered_head(state, number)
    assert not any("head." in name for tensors in earlier.values() for name in tensors)
    loaded.load_state_dict(earlier)
    for group, tensors in loaded.state_dict().items():
        for name, value in tensors.items():
            assert torch.equal(value, state[group][name]), f"{group}.{name}"
