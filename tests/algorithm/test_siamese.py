"""Siamese networks against loops over pairs of images."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from maml.algorithm.embedding import SUPPORT
from maml.algorithm.siamese import Siamese
from maml.seeding import Stream
from maml.types import Params, expand
from tests.algorithm.test_embedding import make
from tests.algorithm.test_prototypical import cosine
from tests.runs import TinyRuns

pytestmark = pytest.mark.usefixtures("float64")


def built(tiny_images: TinyRuns) -> tuple[Siamese, Params]:
    """Returns the algorithm and other weights of the comparison for each of two tasks."""
    algorithm = make(tiny_images, "siamese", num_updates=2)
    assert isinstance(algorithm, Siamese)
    shapes = {name: value.shape for name, value in algorithm.theta.items() if name.startswith("comparison")}
    return algorithm, {name: Stream(4).child(name).uniform((2, *shape), -1.0, 1.0) for name, shape in shapes.items()}


def logit(params: Params, task: int, one: Tensor, other: Tensor) -> Tensor:
    terms = [w * (a - b).abs() for w, a, b in zip(params["comparison.weight"][task], one, other, strict=True)]
    return torch.stack(terms).sum() + params["comparison.bias"][task, 0]


@pytest.mark.parametrize(("num_shots", "num_query"), [(1, 1), (1, 2), (3, 3)])
def test_loss_is_that_of_an_equal_and_a_different_pair_for_each_query_image(
    num_shots: int, num_query: int, tiny_images: TinyRuns
) -> None:
    algorithm, params = built(tiny_images)
    support = Stream(1).uniform((2, num_shots, 3, 4), 0.0, 2.0).requires_grad_()
    query = Stream(2).uniform((2, num_query * 3, 4), 0.0, 2.0).requires_grad_()
    losses, metrics = algorithm.loss(params, support, query, torch.arange(3).repeat(2, num_query))
    for task in range(2):
        total, right = torch.zeros(()), 0
        for i in range(3 * num_query):
            block, way = divmod(i, 3)
            shot = (block + 1) % num_shots
            same = torch.sigmoid(logit(params, task, query[task, i], support[task, shot, way]))
            other = torch.sigmoid(logit(params, task, query[task, i], support[task, shot, (way + 1) % 3]))
            total = total - torch.log(same) - torch.log(1 - other)
            right += int(same > 0.5) + int(other < 0.5)
        count = 6 * num_query
        torch.testing.assert_close(losses[task], total / count, rtol=1e-9, atol=1e-12)
        assert metrics["accuracy"][task].item() == pytest.approx(right / count)
        ours = torch.autograd.grad(losses[task], (support, query), retain_graph=True)
        loops = torch.autograd.grad(total / count, (support, query))
        for value, expected in zip(ours, loops, strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-8, atol=1e-12)


def test_pairs_that_tie_are_not_told_right(tiny_images: TinyRuns) -> None:
    algorithm, params = built(tiny_images)
    nothing = {name: torch.zeros_like(value) for name, value in params.items()}
    images = torch.ones(2, 1, 3, 4)
    _, metrics = algorithm.loss(nothing, images, images.flatten(1, 2), torch.arange(3).expand(2, 3))
    assert metrics["accuracy"].tolist() == [0.0, 0.0]


def test_pairs_without_a_number_are_no_answer(tiny_images: TinyRuns) -> None:
    algorithm, params = built(tiny_images)
    images = torch.full((2, 1, 3, 4), torch.nan)
    _, metrics = algorithm.loss(params, images, images.flatten(1, 2), torch.arange(3).expand(2, 3))
    assert metrics["accuracy"].isnan().all()


def test_neighbours_are_found_by_both_similarities_and_both_rules(tiny_images: TinyRuns) -> None:
    algorithm, comparison = built(tiny_images)
    tasks = algorithm.domain.sample_tasks(2, Stream(7), "test", 3, 4)
    (params,) = algorithm.adapt(expand(algorithm.theta | algorithm.buffers, 2) | comparison, tasks, 0)
    query = algorithm.domain.data(tasks, "query")
    features = algorithm.network.features(params, query.x)
    measured = algorithm.measure(params, tasks, 0)
    for task in range(2):
        right = dict.fromkeys(("transductive", "inductive", "mean", "cosine", "cosine_mean"), 0)
        for asked, label in zip(features[task], query.y[task].tolist(), strict=True):
            known = params[SUPPORT][task]
            learnt = [
                [torch.sigmoid(logit(comparison, task, asked, other)) for other in way] for way in known.unbind(1)
            ]
            angles = [[cosine(asked, other) for other in way] for way in known.unbind(1)]
            scores: dict[str, list[Tensor]] = {
                "transductive": [torch.stack(way).max() for way in learnt],
                "inductive": [torch.stack(way).max() for way in learnt],
                "mean": [torch.stack(way).mean() for way in learnt],
                "cosine": [torch.stack(way).max() for way in angles],
                "cosine_mean": [torch.stack(way).mean() for way in angles],
            }
            for name, values in scores.items():
                right[name] += int(torch.stack(values).argmax()) == label
        for name, count in right.items():
            assert measured[f"accuracy_{name}"][task].item() == pytest.approx(count / 24), name
