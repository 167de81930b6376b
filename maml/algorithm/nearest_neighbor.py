"""Nearest-neighbour classification by cosine similarity of features (docs/protocol.md#classifier-baselines)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch.nn.functional as F
from torch import Tensor

from maml.algorithm.base import Parts
from maml.algorithm.classifier import Classifier
from maml.model.base import Model
from maml.model.conv4 import Conv4
from maml.seeding import Stream
from maml.types import Params, Tasks


class NearestNeighbor(Classifier):
    """Gives a query image the label of the support image whose features are most similar.

    The features are those of the pretrained classifier.
    """

    fixes_ways = False

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        self.model = _CosineSimilarity(self.classifier)

    def adapt(
        self, params: Params, tasks: Tasks, num_steps: int, step_sizes: Sequence[float] | None = None
    ) -> Iterator[Params]:
        """Yields the parameters with the features of the support images added; gradient steps change nothing."""
        support = self.domain.data(tasks, "support")
        features = self.classifier.features(params, support.x)
        params = params | {"support.features": features.unflatten(1, (support.num_shots, -1))}
        for _ in range(num_steps + 1):
            yield params


class _CosineSimilarity(Model):
    """Scores a class by the cosine similarity of its most similar support image.

    The parameter ``support.features``, ``(T, K, N, D)``, holds the features of the support images.
    """

    def __init__(self, network: Conv4) -> None:
        self.network = network

    def init(self, stream: Stream) -> Params:
        return self.network.init(stream)

    def __call__(self, params: Params, x: Tensor, num_reference: int | None = None) -> Tensor:
        features = F.normalize(self.network.features(params, x), dim=-1)
        support = F.normalize(params["support.features"], dim=-1)
        similarity = features @ support.flatten(1, 2).transpose(1, 2)  # (T, Q, K * N)
        return similarity.unflatten(-1, support.shape[1:3]).amax(-2)
