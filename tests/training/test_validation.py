"""Validation during training: the best theta is kept, exactly, and only by validation tasks."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

import maml
from maml.algorithm.base import Algorithm
from maml.errors import Interrupted, MamlError
from maml.experiment import build_algorithm
from maml.hardware.base import Hardware
from maml.seeding import Stream
from maml.training.validation import NUM_TASKS, update_best_on_validation, validation_score
from tests.runs import TinyRuns, assert_same_run, before_iteration, checkpoint_tensors

EVERY = ("validate_every=2", "evaluation.theta=best", "num_iterations=7")


def scores(monkeypatch: pytest.MonkeyPatch, values: list[float]) -> list[dict[str, torch.Tensor]]:
    """Replaces the scores of validation; returns a list that collects theta at each of them."""
    seen: list[dict[str, torch.Tensor]] = []

    def fake(algorithm: Algorithm, count: int, task_chunk: int | None) -> float:
        assert count == NUM_TASKS
        seen.append({name: value.clone() for name, value in algorithm.theta.items()})
        return values[len(seen) - 1]

    monkeypatch.setattr("maml.training.validation.validation_score", fake)
    return seen


def best_of(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name.removeprefix("best."): value
        for name, value in checkpoint_tensors(folder).items()
        if name.startswith("best.")
    }


@pytest.mark.parametrize(("values", "best"), [([3.0, 1.0, 2.0, 1.0], 1), ([float("nan"), 5.0, 4.0, 4.5], 2)])
def test_theta_with_the_lowest_validation_error_is_kept(
    values: list[float], best: int, tiny: TinyRuns, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = scores(monkeypatch, values)
    kept = best_of(tiny.run(*EVERY))
    assert len(seen) == 4, "after iterations 2, 4, 6, and the last one"
    for name, value in seen[best].items():
        torch.testing.assert_close(kept[name], value)
    assert kept["score"].item() == -values[best]


def test_theta_with_the_highest_validation_accuracy_is_kept(
    tiny_images: TinyRuns, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = scores(monkeypatch, [0.3, 0.5, 0.5, 0.4])
    kept = best_of(tiny_images.run(*EVERY))
    for name, value in seen[1].items():
        torch.testing.assert_close(kept[name], value)


def test_score_is_the_headline_after_the_steps_of_training(tiny_images: TinyRuns) -> None:
    algorithm = build_algorithm(tiny_images.config(), Hardware("cpu"))
    domain = algorithm.domain
    tasks = domain.sample_tasks(6, Stream(0).child("validation"), "val")
    support, query = domain.data(tasks, "support"), domain.data(tasks, "query")
    *_, adapted = algorithm.adapt(algorithm.params_per_task(6), tasks, algorithm.inner.num_steps)
    expected = domain.measure(algorithm.model, adapted, support, query, 1)["accuracy_transductive"].mean().item()
    assert validation_score(algorithm, 6, task_chunk=4) == pytest.approx(expected)


def test_training_is_the_same_and_the_best_theta_is_evaluated(tiny: TinyRuns, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = checkpoint_tensors(tiny.in_folder("plain").run("num_iterations=7"))
    scores(monkeypatch, [1.0, 2.0, 3.0, 4.0])  # the first is the best
    folder = tiny.run(*EVERY)
    trained = checkpoint_tensors(folder)
    assert all(torch.equal(trained[name], value) for name, value in plain.items())
    first = tiny.in_folder("first").run("num_iterations=2")
    curves = [(folder / "tasks.csv").read_text(), (first / "tasks.csv").read_text()]
    assert curves[0] == curves[1]


def test_stopped_run_keeps_the_same_best_theta(tiny_images: TinyRuns, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        before_iteration(patch, 5, lambda _: os.kill(os.getpid(), signal.SIGTERM))
        tiny_images.run(*EVERY)
    assert_same_run(tiny_images.run(*EVERY), tiny_images.in_folder("whole").run(*EVERY))


def test_checkpoint_before_the_first_validation_is_saved(tiny: TinyRuns) -> None:
    folder = tiny.run("validate_every=20", "checkpoint_every=2", "evaluation.theta=best", "num_iterations=5")
    assert torch.isfinite(best_of(folder)["score"])


def test_runs_with_and_without_validation_are_different_runs(tiny: TinyRuns) -> None:
    assert tiny.folder("num_iterations=7") != tiny.folder("num_iterations=7", "validate_every=2")
    assert tiny.folder("num_iterations=7") == tiny.folder("num_iterations=7", "validate_every=null")


def test_each_seed_of_a_computation_has_its_own_best_theta(tiny: TinyRuns) -> None:
    together = tiny.run("seeds=2", *EVERY)
    for seed in (0, 1):
        alone = best_of(tiny.in_folder("alone").run(f"seed={seed}", *EVERY))
        kept = best_of(tiny.folder(f"seed={seed}", *EVERY))
        for name, value in alone.items():
            torch.testing.assert_close(kept[name], value)
    assert together


def test_best_theta_that_is_not_kept_is_refused_with_the_remedy(tiny: TinyRuns) -> None:
    with pytest.raises(MamlError, match="or set validate_every"):
        tiny.run("evaluation.theta=best")
    assert not tiny.runs_dir.exists()


def test_best_theta_before_the_first_validation_is_not_evaluated(
    tiny: TinyRuns, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        before_iteration(patch, 3, lambda _: os.kill(os.getpid(), signal.SIGTERM))
        tiny.run("validate_every=5", "evaluation.theta=best", "num_iterations=7")
    with pytest.raises(MamlError, match="has not been measured on validation tasks yet"):
        tiny.run("validate_every=5", "evaluation.theta=best", "num_iterations=7", "mode=eval")


def test_data_without_validation_tasks_are_refused_before_anything_is_written(tiny_images: TinyRuns) -> None:
    with pytest.raises(MamlError, match=r"ways and shots of training: .* 100 classes; .* or set validate_every=null"):
        tiny_images.run(*EVERY, "domain.num_ways=101", "algorithm=prototypical", "evaluation.num_ways=5")
    assert not tiny_images.runs_dir.exists()


def test_policies_keep_their_best_theta_in_their_own_way(tiny: TinyRuns) -> None:
    with pytest.raises(MamlError, match="PointNavigation keeps the theta with the best average training return"):
        tiny.run("+experiment=point_navigation_maml", "evaluation.num_steps=4", "validate_every=2")
    assert not tiny.runs_dir.exists()


def test_record_is_changed_only_by_a_better_score(tiny: TinyRuns, monkeypatch: pytest.MonkeyPatch) -> None:
    algorithm = build_algorithm(tiny.config("validate_every=2"), Hardware("cpu"))
    scores(monkeypatch, [2.0, 3.0])
    assert update_best_on_validation(algorithm, None) == 2.0
    assert update_best_on_validation(algorithm, None) == 3.0
    assert algorithm.best["score"].item() == -2.0


def test_score_of_an_algorithm_that_does_not_adapt_in_training_is_that_of_theta(tiny_images: TinyRuns) -> None:
    config = tiny_images.config("algorithm=prototypical", "inner.step_size=10", "inner.num_steps=0", "validate_every=2")
    algorithm = build_algorithm(config, Hardware("cpu"))
    without = validation_score(algorithm, 6, task_chunk=None)
    algorithm.inner.num_steps = 3  # settings that ask for it are refused
    assert validation_score(algorithm, 6, task_chunk=None) == without


@pytest.mark.parametrize("name", ["pretrain", "oracle", "multitask_average"])
def test_score_of_a_network_that_trains_without_adaptation_is_that_of_theta(name: str, tiny: TinyRuns) -> None:
    own = (f"algorithm={name}", "inner.step_size=10", "validate_every=2")
    without, with_steps = (
        validation_score(build_algorithm(tiny.config(*own, steps), Hardware("cpu")), 6, task_chunk=None)
        for steps in ("inner.num_steps=0", "inner.num_steps=3")
    )
    assert without == with_steps


def test_fine_tuning_has_no_best_theta(tiny_images: TinyRuns) -> None:
    with pytest.raises(MamlError, match=r"draws a new last layer for every task.*; set validate_every=null"):
        tiny_images.run("algorithm=finetune", *EVERY)
    assert not tiny_images.runs_dir.exists()


def test_best_theta_is_evaluated_with_its_own_running_statistics(
    tiny_images: TinyRuns, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores(monkeypatch, [0.9, 0.1, 0.1, 0.1])  # the first is the best
    folder = tiny_images.run("algorithm=prototypical", *EVERY)
    first = tiny_images.in_folder("first").run("algorithm=prototypical", "num_iterations=2")
    curves = [(each / "tasks.csv").read_text() for each in (folder, first)]
    assert curves[0] == curves[1]
    images, labels = Stream(1).uniform((5, 28, 28, 1)), list("abcde")
    adapted = [maml.load(each).adapt(images, labels).params for each in (folder, first)]
    assert adapted[0].keys() == adapted[1].keys() > {"norm1.mean"}
    assert all(torch.equal(adapted[0][name], value) for name, value in adapted[1].items())
