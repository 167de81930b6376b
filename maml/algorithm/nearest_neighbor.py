"""Nearest-neighbour classification by cosine similarity of features (docs/protocol.md#classifier-baselines)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import repeat

from maml.algorithm.base import Parts
from maml.algorithm.classifier import Classifier
from maml.algorithm.embedding import Comparison, nearest_image, with_support
from maml.types import Params, Tasks


class NearestNeighbor(Classifier):
    """Gives a query image the label of the support image whose features are most similar.

    The features are those of the pretrained classifier.
    """

    trained_as = "maml.algorithm.classifier.Classifier"
    fixes_ways = False

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        self.model = Comparison(self.classifier, nearest_image("cosine"))

    def adapt(
        self, params: Params, tasks: Tasks, num_steps: int, step_sizes: Sequence[float] | None = None
    ) -> Iterator[Params]:
        """Yields the parameters with the features of the support images added; gradient steps change nothing."""
        yield from repeat(with_support(params, self.classifier, self.domain.data(tasks, "support")), num_steps + 1)
