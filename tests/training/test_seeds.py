"""Several seeds trained at once: each gives the result that it gives alone, in its own run folder."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from maml.algorithm.base import Algorithm
from maml.errors import Interrupted, MamlError
from maml.outer.base import Objective
from maml.record import checkpoint
from maml.record.run_files import read_json
from maml.record.run_folder import RunFolder
from maml.training.meta_gradient import PrecomputedGradient
from maml.types import Tasks
from tests.hardware.test_distributed import assert_alike
from tests.runs import TinyRuns, assert_same_run, checkpoint_tensors, file_contents

MANY = ("precision=float64", "num_iterations=50", "log_every=10", "evaluation.num_tasks=5", "hardware.task_chunk=4")
CHAIN = (
    "+experiment=sinusoid_multitask_chain",
    "algorithm.num_examples=3",
    "algorithm.max_error=100",
    "algorithm.num_steps=2",
    "domain.num_shots=4",
    "domain.num_query=5",
    "evaluation.search=null",
)
IMAGES = (
    "domain=omniglot",
    "model=conv4",
    "model.num_filters=4",
    "evaluation=accuracy",
    "inner.step_size=0.4",
    "evaluation.num_shots=null",
)


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param((), id="sinusoid"),
        pytest.param(("inner=learned_sgd", "algorithm=fomaml"), id="learned_step_sizes"),
        pytest.param(
            ("inner=meta_lstm", "inner.num_steps=2", "inner.hidden_size=2", "model.hidden_sizes=[8]"),
            id="meta_lstm",
            marks=pytest.mark.slow,
        ),
        pytest.param(("inner.second_order_from=20",), id="order_switches"),
        pytest.param(("+experiment=sinusoid_reptile", "meta_batch_size=4"), id="reptile"),
        pytest.param((*IMAGES, "meta_batch_size=3"), id="images"),
        pytest.param((*CHAIN, "algorithm.pull=mean", "algorithm.weight=0.1"), id="chain"),
    ],
)
def test_seeds_side_by_side_equal_separate_runs(tiny: TinyRuns, overrides: tuple[str, ...]) -> None:
    together = tiny.in_folder("together")
    together.run(*overrides, *MANY, "seed=4", "seeds=3")
    for seed in (4, 5, 6):
        own = (*overrides, *MANY, f"seed={seed}")
        alone = tiny.run(*own)
        folder = together.folder(*own)
        assert folder.name == alone.name, "the id that the separate run has"
        assert sorted(file_contents(folder)) == sorted(file_contents(alone))
        assert_alike(alone, folder)
    first, second = (checkpoint_tensors(together.folder(*overrides, *MANY, f"seed={seed}")) for seed in (4, 5))
    assert not all(torch.equal(first[name], second[name]) for name in first)


def _stop_after(updates: int, monkeypatch: pytest.MonkeyPatch) -> None:
    meta_update, done = Algorithm.meta_update, 0

    def counting(self: Algorithm, objective: Objective, tasks: Tasks) -> dict[str, torch.Tensor]:
        nonlocal done
        done += 1
        if done == updates:
            os.kill(os.getpid(), signal.SIGTERM)
        return meta_update(self, objective, tasks)

    monkeypatch.setattr(Algorithm, "meta_update", counting)


def test_stopped_seeds_resume_bit_exactly(tiny: TinyRuns, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tiny.in_folder("whole")
    whole.run("seeds=2", "num_iterations=30")
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        _stop_after(25, patch)
        tiny.run("seeds=2", "num_iterations=30")
    folders = [tiny.folder("num_iterations=30", f"seed={seed}") for seed in (0, 1)]
    assert [_record(folder)["iteration"] for folder in folders] == [13, 13]
    assert [_record(folder)["status"] for folder in folders] == ["interrupted"] * 2
    tiny.run("seeds=2", "num_iterations=30")
    for folder in folders:
        assert_same_run(folder, whole.runs_dir / folder.relative_to(tiny.runs_dir))


def test_seed_that_was_left_behind_catches_up_and_a_finished_one_is_not_run_again(
    tiny: TinyRuns, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ("precision=float64", "num_iterations=20")
    finished = tiny.run(*few, "seed=2")
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        _stop_after(8, patch)
        tiny.run(*few, "seed=1")
    before = file_contents(finished)
    tiny.run(*few, "seeds=3")
    assert "already finished" in capsys.readouterr().out
    assert file_contents(finished) == before
    whole = tiny.in_folder("whole")
    for seed in (0, 1):
        assert_alike(whole.run(*few, f"seed={seed}"), tiny.folder(*few, f"seed={seed}"))


def test_seed_that_is_being_trained_elsewhere_stops_the_others_before_they_begin(tiny: TinyRuns) -> None:
    busy = RunFolder(tiny.config("seed=1"), "custom")
    busy.open({"cpu": "Abacus"}, "", "MAML")
    try:
        with pytest.raises(MamlError, match="is training in"):
            tiny.run("seeds=3")
        assert not tiny.folder("seed=0").exists()
    finally:
        busy.close("interrupted")


def test_seed_killed_before_its_checkpoint_catches_up_bit_exactly(
    tiny: TinyRuns, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seeds are saved one after another, so a kill may leave some of them behind."""
    settings = ("seeds=2", "num_iterations=20", "hardware.task_chunk=2")
    whole = tiny.in_folder("whole")
    whole.run(*settings)
    save = RunFolder.save_checkpoint

    def killed(self: RunFolder, iteration: int, *rest: Any) -> None:
        if iteration == 14 and self.settings.seed == 1:
            raise ZeroDivisionError
        save(self, iteration, *rest)

    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(RunFolder, "save_checkpoint", killed)
        tiny.run(*settings)
    folders = [tiny.folder("num_iterations=20", f"seed={seed}") for seed in (0, 1)]
    assert [checkpoint.load(folder / "checkpoint.pt")["iteration"] for folder in folders] == [14, 7]
    tiny.run(*settings)
    for folder in folders:
        assert_same_run(folder, whole.runs_dir / folder.relative_to(tiny.runs_dir))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("run_dir=here",), "run_dir= and checkpoint= are for one run"),
        ((*IMAGES, "algorithm=finetune"), "seeds=2: FineTune cannot train several seeds"),
        (
            ("+experiment=point_navigation_maml", "evaluation.num_steps=4"),
            "seeds=2: PointNavigation cannot train several seeds as one computation; sweep instead, with -m seed=",
        ),
    ],
)
def test_what_cannot_run_side_by_side_is_refused(tiny: TinyRuns, overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(MamlError, match=message):
        tiny.run(*overrides, "seeds=2")
    assert not tiny.runs_dir.exists()


def _record(folder: Path) -> dict:
    record = read_json(folder / "run.json")
    assert record is not None
    return record


def test_gradient_of_all_seeds_is_refused_at_another_theta() -> None:
    theta = {"w": torch.zeros(2)}
    objective = PrecomputedGradient(theta, {"w": torch.ones(2)}, {"loss": torch.tensor(3.0)})
    gradient, metrics = objective.gradient(theta)
    assert gradient["w"].sum() == 2 and objective.evaluate(theta) == metrics
    with pytest.raises(MamlError, match="at another one; train the seeds one by one"):
        objective.gradient({"w": torch.ones(2)})
    theta["w"] -= gradient["w"]
    with pytest.raises(MamlError, match="at another one; train the seeds one by one"):
        objective.evaluate(theta)


def test_what_the_objective_of_several_seeds_lacks_is_named() -> None:
    objective = PrecomputedGradient({"w": torch.zeros(2)}, {"w": torch.ones(2)}, {})
    with pytest.raises(MamlError, match="has no curvature, but the outer optimizer or the algorithm asks for it"):
        objective.curvature({"w": torch.zeros(2)})
    with pytest.raises(MamlError, match="has no gradients of single tasks"):
        objective.task_gradients({"w": torch.zeros(2)}, {})
