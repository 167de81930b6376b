"""The pretrained classifier of the image baselines, on real images, against torch's own layers."""

from __future__ import annotations

from typing import TypeVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from maml.algorithm.classifier import Classifier
from maml.algorithm.nearest_neighbor import NearestNeighbor
from maml.config.schema import build
from maml.errors import MamlError
from maml.experiment import build_algorithm
from maml.seeding import Stream
from tests import algorithms
from tests.model.test_conv4 import library_network, library_values
from tests.runs import TinyRuns

pytestmark = pytest.mark.usefixtures("float64")

AnyClassifier = TypeVar("AnyClassifier", bound=Classifier)


def make(kind: type[AnyClassifier], tiny_images: TinyRuns, *overrides: str) -> AnyClassifier:
    """Builds a small network for Omniglot in float64."""
    config = tiny_images.config(
        f"algorithm={'finetune' if kind.__name__ == 'FineTune' else 'nearest_neighbor'}",
        "model.num_filters=4",
        "model.pooling=max",
        "model.head=flatten",
        "model.head_std=null",
        "model.norm_scale=true",
        "inner.adapt=['*']",
        *overrides,
    )
    algorithm = build_algorithm(config, build(config.hardware))
    assert isinstance(algorithm, kind)
    algorithm.theta = {name: value.double() for name, value in algorithm.theta.items()}
    algorithm.buffers = {name: value.double() for name, value in algorithm.buffers.items()}
    algorithm.outer_state = algorithm.outer.init_state(algorithm.theta)
    return algorithm


def images_of(algorithm: Classifier, tasks: dict[str, Tensor]) -> Tensor:
    """Returns a batch in torch's layout, ``(images, C, H, W)``, built one drawing at a time."""
    drawings = []
    for cls, number, turns in zip(
        tasks["classes"][0], tasks["support_images"][0, :, 0], tasks["rotations"][0], strict=True
    ):
        drawings.append(torch.rot90(algorithm.images.images[cls, number].reshape(28, 28), int(turns)))
    return torch.stack(drawings).unsqueeze(1).double()


def test_batch_holds_no_image_twice_and_at_most_five_of_a_class(tiny_images: TinyRuns) -> None:
    algorithm = make(NearestNeighbor, tiny_images)
    tasks = algorithm.sample_tasks(4000, Stream(0))
    labels = tasks["labels"][0]
    images = list(zip(labels.tolist(), tasks["support_images"].flatten().tolist(), strict=True))
    assert len(set(images)) == 4000
    assert torch.bincount(labels).max() == 5  # among 1100 * 5 images
    assert set(labels.tolist()) == set(range(1100)), "all training classes, numbered within their split"
    assert torch.equal(tasks["classes"][0], algorithm.images.splits["train"][labels])
    assert algorithm.theta["head.weight"].shape[0] == 1100


def test_gradient_equals_the_librarys_in_training_mode(tiny_images: TinyRuns) -> None:
    algorithm = make(NearestNeighbor, tiny_images)
    tasks = algorithm.sample_tasks(12, Stream(0))
    gradient, metrics = algorithms.gradient(algorithm, algorithm.theta, tasks)
    net = library_network(algorithm.theta)
    outputs = net(images_of(algorithm, tasks))
    loss = F.cross_entropy(outputs, tasks["labels"][0])
    loss.backward()
    torch.testing.assert_close(metrics["loss"], loss.detach(), rtol=1e-10, atol=0.0)
    assert metrics["accuracy"].item() == (outputs.argmax(1) == tasks["labels"][0]).double().mean()
    for name, value in library_values(net, list(gradient)).items():
        torch.testing.assert_close(gradient[name], value.grad, rtol=1e-8, atol=1e-10)


def test_running_statistics_follow_the_librarys(tiny_images: TinyRuns) -> None:
    algorithm = make(NearestNeighbor, tiny_images)
    net = library_network(algorithm.theta | algorithm.buffers)
    for iteration in range(4):
        tasks = algorithm.sample_tasks(6, Stream(iteration))
        with torch.no_grad():
            for name, value in library_values(net, list(algorithm.theta)).items():
                value.copy_(algorithm.theta[name])
            net(images_of(algorithm, tasks))
        assert set(algorithms.step(algorithm, tasks)) == {"loss", "accuracy"}
        for name, value in library_values(net, list(algorithm.buffers)).items():
            torch.testing.assert_close(algorithm.buffers[name], value, rtol=1e-9, atol=1e-10)


def test_parts_that_do_not_fit_are_refused(tiny: TinyRuns, tiny_images: TinyRuns) -> None:
    policy = ("domain=omniglot", "domain.num_ways=6", "model=gaussian_policy")  # a model without features
    for config, reason in (
        (tiny.config("algorithm=finetune"), "classifies images: choose domain="),
        (tiny_images.on_domain("sinusoid").config("algorithm=finetune", *policy), "choose model=conv4"),
    ):
        with pytest.raises(MamlError, match=reason):
            build_algorithm(config, build(config.hardware))
