"""Nearest-neighbour classification by cosine similarity of features (docs/protocol.md#classifier-baselines)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from maml.algorithm.base import Parts
from maml.algorithm.classifier import Classifier
from maml.model.base import Model
from maml.model.functional import cosine_similarity
from maml.seeding import Stream
from maml.types import Params, Tasks, without_copies


class NearestNeighbor(Classifier):
    """Gives a query image the label of the support image whose features are most similar.

    The features are those of the pretrained classifier.
    """

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        self.model = _CosineSimilarity(self.classifier, self.images.num_ways)

    def adapt(
        self, params: Params, tasks: Tasks, num_steps: int, step_sizes: Sequence[float] | None = None
    ) -> Iterator[Params]:
        """Yields the parameters with the features of the support images added; gradient steps change nothing."""
        support = self.domain.data(tasks, "support")
        features = self.classifier.features(without_copies(params), support.x)
        params = params | {"support.features": features}
        for _ in range(num_steps + 1):
            yield params


class _CosineSimilarity(Model):
    """Scores a class by the cosine similarity of its most similar support image."""

    def __init__(self, network: Model, num_ways: int) -> None:
        self.network, self.num_ways = network, num_ways

    def init(self, stream: Stream) -> Params:
        return self.network.init(stream)

    def __call__(self, params: Params, x: Tensor, num_reference: int | None = None) -> Tensor:
        features = self.network.features(without_copies(params), x)
        similarity = cosine_similarity(features, params["support.features"])  # (T, Q, K * N): K blocks of N classes
        return similarity.unflatten(-1, (-1, self.num_ways)).amax(-2)
