"""Nearest-neighbour classification by cosine similarity of features (docs/protocol.md#classifier-baselines)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from maml.algorithm.base import Parts
from maml.algorithm.classifier import Classifier
from maml.algorithm.embedding import SUPPORT, Comparison, in_blocks
from maml.model.functional import cosine_similarity
from maml.types import Params, Tasks, without_copies


class NearestNeighbor(Classifier):
    """Gives a query image the label of the support image whose features are most similar.

    The features are those of the pretrained classifier.
    """

    fixes_ways = False

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        self.model = Comparison(self.classifier, _best_cosine)

    def adapt(
        self, params: Params, tasks: Tasks, num_steps: int, step_sizes: Sequence[float] | None = None
    ) -> Iterator[Params]:
        """Yields the parameters with the features of the support images added; gradient steps change nothing."""
        support = self.domain.data(tasks, "support")
        features = self.classifier.features(without_copies(params), support.x)
        params = params | {SUPPORT: in_blocks(features, support)}
        for _ in range(num_steps + 1):
            yield params


def _best_cosine(params: Params, support: Tensor, query: Tensor) -> Tensor:
    """Scores a class by the cosine similarity of its most similar support image (`Embedding.scores`)."""
    similarity = cosine_similarity(query, support.flatten(1, 2))
    return similarity.unflatten(2, support.shape[1:3]).amax(2)
