"""Nearest neighbour on raw pixels: what few-shot classification gives without any learning."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import repeat

from torch import Tensor

from maml.algorithm.base import Algorithm, Parts
from maml.algorithm.embedding import Comparison, nearest_image, with_support
from maml.domain.base import Metrics
from maml.domain.classification import FewShotClassification
from maml.errors import MamlError
from maml.model.base import Model
from maml.model.functional import Similarity
from maml.outer.base import Objective
from maml.seeding import Stream
from maml.types import Params, Tasks


class PixelNearestNeighbor(Algorithm):
    """Gives a query image the label of the support image whose pixels are most similar. It has no parameters.

    With several support images per class, the single most similar image counts, and not a vote.

    Args:
        parts: the domain and stream; the model and the optimizers are not used.
        similarity: ``cosine`` of the angle between two images, or ``euclidean``, minus the squared distance.

    Raises:
        MamlError: if the domain is not an image set.
    """

    fixes_ways = False

    def __init__(self, parts: Parts, similarity: Similarity = "cosine") -> None:
        super().__init__(parts)
        if not isinstance(parts.domain, FewShotClassification):
            raise MamlError(
                "algorithm=pixel_nearest_neighbor compares images: choose domain=omniglot, cifar_fs, mini_imagenet or "
                "image_folder"
            )
        self.pixels = _Pixels()
        self.model = Comparison(self.pixels, nearest_image(similarity))
        self.theta, self.outer_state = {}, {}  # nothing to learn, and nothing to store

    def task_losses(self, params: Params, tasks: Tasks) -> tuple[Tensor, Metrics]:
        """The share of query images with a wrong label."""
        adapted = next(self.adapt(params, tasks, num_steps=0))
        query = self.domain.data(tasks, "query")
        _, metrics = self.domain.outer_loss(self.model, adapted, query)
        return 1 - metrics["accuracy"], metrics

    def adapt(
        self, params: Params, tasks: Tasks, num_steps: int, step_sizes: Sequence[float] | None = None
    ) -> Iterator[Params]:
        """Yields the pixels of the support images; gradient steps change nothing."""
        yield from repeat(with_support({}, self.pixels, self.domain.data(tasks, "support")), num_steps + 1)

    def keep_best_of_validation(self) -> None:
        raise MamlError(
            "algorithm=pixel_nearest_neighbor learns nothing, so no theta is the best on validation tasks; set "
            "validate_every=null"
        )

    def meta_update(self, objective: Objective, tasks: Tasks) -> dict[str, Tensor]:
        """Changes nothing."""
        return objective.evaluate(self.theta)


class _Pixels(Model):
    """A model without parameters, whose features are the pixels."""

    def init(self, stream: Stream) -> Params:
        return {}

    def __call__(self, params: Params, x: Tensor, num_reference: int | None = None) -> Tensor:
        return self.features(params, x, num_reference)

    def features(
        self, params: Params, x: Tensor, num_reference: int | None = None, seen: Params | None = None
    ) -> Tensor:
        return x.flatten(2)
