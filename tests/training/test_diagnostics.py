"""The numbers that only loggers get, and that they change nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch

from maml.errors import MamlError
from maml.experiment import build_algorithm
from maml.hardware.base import Execution, Hardware
from maml.logger.base import Logger
from maml.training.diagnostics import Diagnostics
from maml.training.iteration import Iteration
from maml.training.learner import Learner
from tests.runs import TinyRuns, assert_same_run


class Curious(Logger):
    """A logger that wants all numbers and keeps them."""

    wants_diagnostics = True
    lines: list[dict[str, float]] = []
    alerts: list[tuple[str, str]] = []

    def log(self, metrics: Mapping[str, float], iteration: int) -> None:
        self.lines.append({"iteration": iteration, **metrics})

    def alert(self, title: str, text: str) -> None:
        self.alerts.append((title, text))


CURIOUS = f"logger._target_={__name__}.Curious"


@pytest.fixture(autouse=True)
def _no_lines() -> Iterator[None]:
    Curious.lines.clear()
    Curious.alerts.clear()
    yield


def test_training_is_bit_identical_with_and_without_them(each_domain: TinyRuns) -> None:
    folder = each_domain.run(CURIOUS, "num_iterations=20")
    assert_same_run(folder, each_domain.in_folder("plain").run("num_iterations=20"))
    recorded = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    logged = [line for line in Curious.lines if "loss" in line]
    more = {"gradient_norm", "step_norm", "iterations_per_second"}
    assert [{key: line[key] for key in line.keys() - more} for line in logged] == recorded
    assert all(more <= line.keys() for line in logged)


@pytest.mark.parametrize(("own", "iterations"), [((), [7, 14, 20]), (("validate_every=8",), [8, 16, 20])])
def test_validation_accuracy_comes_with_each_checkpoint_or_as_often_as_asked_for(
    own: tuple[str, ...], iterations: list[int], tiny_images: TinyRuns
) -> None:
    tiny_images.run(CURIOUS, "num_iterations=20", *own)
    validated = {line["iteration"]: line for line in Curious.lines if "validation_accuracy_transductive" in line}
    assert list(validated) == iterations
    assert all(0 <= line["validation_accuracy_transductive"] <= 1 for line in validated.values())


def learners(tiny: TinyRuns, count: int, *overrides: str) -> list[Learner]:
    all_settings = [tiny.config(CURIOUS, f"seed={seed}", *overrides) for seed in range(count)]
    return [Learner(each, "custom", build_algorithm(each, Hardware("cpu"))) for each in all_settings]


@pytest.mark.parametrize("count", [1, 2])
def test_norms_are_those_of_gradient_and_step(tiny: TinyRuns, count: int) -> None:
    step_size = 0.5
    mine = learners(tiny, count, "outer=sgd", f"outer.step_size={step_size}", "outer.final_step_size=null")
    algorithms, streams = [each.algorithm for each in mine], [each.stream for each in mine]
    iterate = Iteration(algorithms, streams, 4, Execution(1, None, False))
    diagnostics = Diagnostics(mine, iterate, start=0)
    for number in (1, 2):
        before = [torch.cat([value.flatten() for value in each.theta.values()]) for each in algorithms]
        diagnostics.before()
        iterate(number)
        measured: list[Any] = diagnostics.after(number)
        for each, old, numbers in zip(algorithms, before, measured, strict=True):
            change = torch.cat([value.flatten() for value in each.theta.values()]) - old
            torch.testing.assert_close(numbers["step_norm"], change.norm())
            torch.testing.assert_close(step_size * numbers["gradient_norm"], numbers["step_norm"], rtol=1e-4, atol=0)
            assert numbers["iterations_per_second"] > 0


def test_learnt_step_sizes_are_averaged(tiny: TinyRuns) -> None:
    mine = learners(tiny, 1, "inner=learned_sgd", "inner.step_size=0.25")
    iterate = Iteration([mine[0].algorithm], [mine[0].stream], 4, Execution(1, None, False))
    diagnostics = Diagnostics(mine, iterate, start=0)
    diagnostics.before()
    (numbers,) = diagnostics.after(1)
    assert numbers["learnt_step_size"].item() == pytest.approx(0.25)
    assert "gradient_norm" not in numbers, "nothing was computed yet"


def test_nothing_is_measured_for_a_logger_that_does_not_ask(tiny: TinyRuns) -> None:
    mine = learners(tiny, 1)
    mine[0].logger = Logger()
    iterate = Iteration([mine[0].algorithm], [mine[0].stream], 4, Execution(1, None, False))
    diagnostics = Diagnostics(mine, iterate, start=0)
    diagnostics.before()
    assert (diagnostics.after(1), diagnostics.validate()) == ([{}], [{}])


def test_divergence_is_an_alert_of_the_seed_that_diverged(tiny: TinyRuns) -> None:
    with pytest.raises(MamlError, match="training has diverged") as caught:
        tiny.run(CURIOUS, "outer=sgd", "outer.step_size=1e30")
    assert Curious.alerts == [("Training diverged", str(caught.value))]
