"""The nearest-neighbour baseline against a loop over query and support images."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from maml.algorithm.nearest_neighbor import NearestNeighbor
from maml.seeding import Stream
from maml.types import num_tasks
from tests import algorithms
from tests.algorithm.test_classifier import make
from tests.model.test_conv4 import library_network
from tests.runs import TinyRuns

pytestmark = pytest.mark.usefixtures("float64")


def pretrained(tiny_images: TinyRuns) -> NearestNeighbor:
    algorithm = make(NearestNeighbor, tiny_images)
    for iteration in range(3):
        algorithms.step(algorithm, algorithm.sample_tasks(20, Stream(iteration)))
    return algorithm


@pytest.mark.parametrize(("num_shots", "num_ways"), [(1, 5), (5, 5), (2, 3), (1, 9)])
def test_label_is_that_of_the_most_similar_support_image(num_shots: int, num_ways: int, tiny_images: TinyRuns) -> None:
    algorithm = pretrained(tiny_images)
    domain, model = algorithm.images, algorithm.model
    tasks = domain.with_ways(num_ways).sample_tasks(4, Stream(7), "test", num_shots, num_query=3)
    support, query = (domain.data(tasks, role) for role in ("support", "query"))
    features = library_network(algorithm.theta | algorithm.buffers).eval()
    features.head = nn.Identity()

    def of(image: Tensor) -> Tensor:
        with torch.no_grad():
            return features(image.permute(2, 0, 1).unsqueeze(0))[0]

    for params in algorithm.adapt(algorithm.params_per_task(num_tasks(tasks)), tasks, 1):
        measured = domain.measure(model, params, support, query, 0)
        scores = model(params, query.x)
        for task in range(4):
            known = [(of(image), int(label)) for image, label in zip(support.x[task], support.y[task], strict=True)]
            right = 0
            for i, image in enumerate(query.x[task]):
                asked = of(image)
                similar = [float(asked @ other / (asked.norm() * other.norm())) for other, _ in known]
                label = known[similar.index(max(similar))][1]
                right += label == query.y[task, i]
                assert scores[task, i].argmax() == label
                assert scores[task, i].max().item() == pytest.approx(max(similar), rel=1e-9)
            assert measured["accuracy_transductive"][task].item() == pytest.approx(right / query.y.shape[1])


def test_prediction_of_an_image_depends_on_no_other(tiny_images: TinyRuns) -> None:
    algorithm = pretrained(tiny_images)
    domain, model = algorithm.images, algorithm.model
    tasks = domain.sample_tasks(4, Stream(7), "test", num_shots=1, num_query=5)
    (params,) = algorithm.adapt(algorithm.params_per_task(num_tasks(tasks)), tasks, 0)
    support, query = (domain.data(tasks, role) for role in ("support", "query"))
    alone = torch.cat([model(params, image.unsqueeze(1)) for image in query.x.unbind(1)], dim=1)
    torch.testing.assert_close(model(params, query.x), alone, rtol=1e-9, atol=1e-10)
    measured = domain.measure(model, params, support, query, 0)
    assert torch.equal(measured["accuracy_transductive"], measured["accuracy_inductive"])
