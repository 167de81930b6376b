"""Nearest neighbour on raw pixels against a loop over query and support images, and on the real drawings."""

from __future__ import annotations

import pytest
import torch

from maml.algorithm.pixel_nearest_neighbor import PixelNearestNeighbor
from maml.config.compose import compose
from maml.config.schema import build
from maml.errors import MamlError
from maml.experiment import build_algorithm
from maml.hardware.base import Hardware
from maml.record.run_files import read_json
from maml.seeding import Stream
from maml.types import num_tasks
from tests import algorithms
from tests.runs import TinyRuns


def make(tiny: TinyRuns, *overrides: str) -> PixelNearestNeighbor:
    config = tiny.config("algorithm=pixel_nearest_neighbor", *overrides)
    algorithm = build_algorithm(config, Hardware("cpu"))
    assert isinstance(algorithm, PixelNearestNeighbor)
    return algorithm


@pytest.mark.parametrize("similarity", ["cosine", "euclidean"])
@pytest.mark.parametrize(("num_shots", "num_ways"), [(1, 5), (5, 5), (2, 3), (1, 9)])
def test_label_is_that_of_the_most_similar_support_image(
    num_shots: int, num_ways: int, similarity: str, tiny_images: TinyRuns
) -> None:
    algorithm = make(tiny_images, f"algorithm.similarity={similarity}")
    domain, model = algorithm.domain, algorithm.model
    tasks = domain.with_ways(num_ways).sample_tasks(4, Stream(7), "test", num_shots, num_query=3)
    support, query = (domain.data(tasks, role) for role in ("support", "query"))
    (adapted,) = algorithm.adapt(algorithm.params_per_task(num_tasks(tasks)), tasks, 0)
    scores = model(adapted, query.x)
    assert scores.shape == (4, 3 * num_ways, num_ways)
    for task in range(4):
        for i, image in enumerate(query.x[task].double()):
            best = [-torch.inf] * num_ways
            for other, label in zip(support.x[task].double(), support.y[task].tolist(), strict=True):
                if similarity == "cosine":
                    value = (image * other).sum() / (image.norm() * other.norm())
                else:
                    value = -(image - other).square().sum()
                best[label] = max(best[label], float(value))
            assert scores[task, i].tolist() == pytest.approx(best, rel=1e-5, abs=1e-5)


def test_training_changes_nothing_and_there_is_nothing_to_store(tiny_images: TinyRuns) -> None:
    algorithm = make(tiny_images)
    assert algorithm.state_dict() == {}
    metrics = algorithms.step(algorithm, algorithm.sample_tasks(4, Stream(0)))
    assert algorithm.state_dict() == {}
    assert metrics["loss"].item() == pytest.approx(1 - metrics["accuracy"].item())


def test_accuracy_on_the_vinyals_split_is_as_measured_independently(tiny_images: TinyRuns) -> None:
    # An independent program with the same drawings has 46.1 and 25.9 %, with standard errors of 1.2 and 0.5 points.
    for ways, expected, tolerance in ((5, 0.461, 0.04), (20, 0.259, 0.02)):
        config, _ = compose([f"+experiment=omniglot_{ways}way_1shot_pixels", f"cache_dir={tiny_images.cache_dir}"])
        algorithm = build_algorithm(config, Hardware("cpu"))
        evaluation = build(config.evaluation)
        curves = evaluation.curves(algorithm, 1, evaluation.bank(algorithm.domain, 1, num_tasks=300), None)
        assert curves[0].values.mean().item() == pytest.approx(expected, abs=tolerance)


def test_other_domains_and_a_best_theta_are_refused(tiny: TinyRuns, tiny_images: TinyRuns) -> None:
    with pytest.raises(MamlError, match="pixel_nearest_neighbor compares images: choose domain=omniglot"):
        make(tiny.on_domain("sinusoid"))
    with pytest.raises(MamlError, match=r"learns nothing.*validate_every=null"):
        make(tiny_images).keep_best_of_validation()


def test_run_trains_and_is_evaluated_as_any_other(tiny_images: TinyRuns) -> None:
    overrides = ("algorithm=pixel_nearest_neighbor", "num_iterations=4")
    report = read_json(tiny_images.run(*overrides) / "report.json")
    assert report is not None
    assert len({step["mean"] for step in report["curves"][0]["steps"]}) == 1, "gradient steps change nothing"
    assert tiny_images.run(*overrides).exists(), "the finished run is taken up again"
