"""The fine-tuning baseline against a plain loop over episodes with torch's own layers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from maml.algorithm.finetune import FineTune
from maml.seeding import Stream
from maml.types import num_tasks
from tests import algorithms
from tests.algorithm.test_classifier import make
from tests.model.test_conv4 import library_network
from tests.runs import TinyRuns

pytestmark = pytest.mark.usefixtures("float64")


def pretrained(tiny_images: TinyRuns) -> FineTune:
    """Returns the baseline after some batches, so that the running statistics have changed."""
    algorithm = make(FineTune, tiny_images)
    algorithm.head = {name: value.double() for name, value in algorithm.head.items()}
    for iteration in range(3):
        algorithms.step(algorithm, algorithm.sample_tasks(20, Stream(iteration)))
    return algorithm


@pytest.mark.parametrize("num_shots", [1, 5])
def test_adaptation_equals_the_plain_loop(num_shots: int, tiny_images: TinyRuns) -> None:
    algorithm = pretrained(tiny_images)
    before = {name: value.clone() for name, value in (algorithm.theta | algorithm.buffers).items()}
    domain = algorithm.images
    tasks = domain.sample_tasks(3, Stream(7), "test", num_shots, num_query=4)
    step_sizes = [0.5, 0.25, 0.1]
    steps = list(algorithm.adapt(algorithm.params_per_task(num_tasks(tasks)), tasks, 3, step_sizes))
    predicted = [algorithm.model(params, domain.data(tasks, "query").x) for params in steps]
    support, query = (domain.data(tasks, role) for role in ("support", "query"))
    for task in range(3):
        net = library_network(algorithm.theta | algorithm.buffers | algorithm.head)
        for step in range(4):
            with torch.no_grad():
                outputs = net.eval()(query.x[task].permute(0, 3, 1, 2))
            torch.testing.assert_close(predicted[step][task], outputs, rtol=1e-8, atol=1e-10)
            if step < 3:
                descent = torch.optim.SGD(net.train().parameters(), lr=step_sizes[step])
                descent.zero_grad()
                F.cross_entropy(net(support.x[task].permute(0, 3, 1, 2)), support.y[task]).backward()
                descent.step()
    assert (predicted[3] - predicted[0]).abs().max() > 0.1
    now = algorithm.theta | algorithm.buffers
    assert all(torch.equal(now[name], value) for name, value in before.items())


@pytest.mark.parametrize("num_ways", [2, 8])
def test_new_head_has_the_ways_of_the_task(num_ways: int, tiny_images: TinyRuns) -> None:
    algorithm = make(FineTune, tiny_images)
    tasks = algorithm.images.with_ways(num_ways).sample_tasks(2, Stream(7), "test", 1)
    query = algorithm.images.data(tasks, "query")
    for params in algorithm.adapt(algorithm.params_per_task(2), tasks, 1, [0.1]):
        assert algorithm.model(params, query.x).shape == (2, num_ways, num_ways)


def test_new_head_is_one_draw_for_all(tiny_images: TinyRuns) -> None:
    first, again = (make(FineTune, tiny_images).head for _ in range(2))
    assert first["head.weight"].shape == (5, 4)
    assert all(torch.equal(first[name], value) for name, value in again.items())
    other = make(FineTune, tiny_images, "seed=1").head
    assert not torch.equal(first["head.weight"], other["head.weight"])


def test_prediction_of_an_image_depends_on_no_other(tiny_images: TinyRuns) -> None:
    algorithm = pretrained(tiny_images)
    domain, model = algorithm.images, algorithm.model
    tasks = domain.sample_tasks(4, Stream(7), "test", num_shots=1, num_query=5)
    *_, params = algorithm.adapt(algorithm.params_per_task(num_tasks(tasks)), tasks, 2)
    support, query = (domain.data(tasks, role) for role in ("support", "query"))
    alone = torch.cat([model(params, image.unsqueeze(1)) for image in query.x.unbind(1)], dim=1)
    torch.testing.assert_close(model(params, query.x), alone, rtol=1e-9, atol=1e-10)
    measured = domain.measure(model, params, support, query, 2)
    assert torch.equal(measured["accuracy_transductive"], measured["accuracy_inductive"])
