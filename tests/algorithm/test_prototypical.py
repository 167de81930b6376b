"""Prototypical networks against loops over query and support images."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from maml.algorithm.prototypical import Prototypical
from maml.seeding import Stream
from tests.algorithm.test_embedding import make
from tests.runs import TinyRuns

pytestmark = pytest.mark.usefixtures("float64")


def embeddings(num_shots: int, *sizes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns support ``(T, K, N, D)`` and query embeddings ``(T, Q, D)`` with gradients, and labels in any order."""
    tasks, ways, asked, size = sizes or (2, 3, 7, 4)
    support = Stream(1).uniform((tasks, num_shots, ways, size), 0.0, 2.0).requires_grad_()
    query = Stream(2).uniform((tasks, asked, size), 0.0, 2.0).requires_grad_()
    return support, query, Stream(3).integers((tasks, asked), ways)


def cosine(x: Tensor, y: Tensor) -> Tensor:
    return x @ y / (x.square().sum().sqrt() * y.square().sum().sqrt())


def minus_squared_distance(x: Tensor, y: Tensor) -> Tensor:
    return -(x - y).square().sum()


SLOW = {"euclidean": minus_squared_distance, "cosine": cosine}


@pytest.mark.parametrize("num_shots", [1, 5])
@pytest.mark.parametrize("similarity", SLOW)
def test_loss_and_gradients_equal_the_loop(similarity: str, num_shots: int, tiny_images: TinyRuns) -> None:
    algorithm = make(tiny_images, "prototypical", f"algorithm.similarity={similarity}")
    assert isinstance(algorithm, Prototypical)
    support, query, labels = embeddings(num_shots)
    losses, metrics = algorithm.loss({}, support, query, labels)
    for task in range(2):
        total, right = torch.zeros(()), 0
        for asked, label in zip(query[task], labels[task].tolist(), strict=True):
            scores = []
            for way in range(3):
                mean = torch.stack([support[task, shot, way] for shot in range(num_shots)]).sum(0) / num_shots
                scores.append(SLOW[similarity](asked, mean))
            p = torch.exp(scores[label]) / torch.stack(scores).exp().sum()
            total = total - torch.log(p)
            right += int(torch.stack(scores).argmax()) == label
        torch.testing.assert_close(losses[task], total / 7, rtol=1e-10, atol=1e-12)
        assert metrics["accuracy"][task].item() == pytest.approx(right / 7)
        ours = torch.autograd.grad(losses[task], (support, query), retain_graph=True)
        loops = torch.autograd.grad(total / 7, (support, query))
        for value, expected in zip(ours, loops, strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-8, atol=1e-12)


def test_cosine_normalises_both_sides(tiny_images: TinyRuns) -> None:
    algorithm = make(tiny_images, "prototypical", "algorithm.similarity=cosine")
    support, query, _ = embeddings(1)
    scores = algorithm.scores({}, support, query)
    torch.testing.assert_close(algorithm.scores({}, 7 * support, query), scores)
    torch.testing.assert_close(algorithm.scores({}, support, 0.1 * query), scores)
    assert scores.abs().max() <= 1 + 1e-12
