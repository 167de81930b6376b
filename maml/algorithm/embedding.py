"""Methods that compare embeddings of query and support images (docs/protocol.md#embedding-methods)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from maml.algorithm.base import Algorithm, Parts
from maml.algorithm.classifier import new_statistics
from maml.domain.base import Metrics, Role
from maml.domain.classification import FewShotClassification, accuracy, cross_entropies
from maml.errors import MamlError
from maml.model.base import DROPOUT, Model
from maml.model.functional import SIMILARITIES, Similarity
from maml.seeding import Stream
from maml.types import Examples, Params, Tasks, without_copies

SUPPORT = "support.features"
"""The name under which adapted parameters hold the embeddings of the support images, ``(T, K, N, D)``."""

_ROLES: tuple[Role, ...] = ("support", "query")
"""The images of an episode, in the order in which they make one batch."""

Scores = Callable[[Params, Tensor, Tensor], Tensor]
"""Computes scores of the classes, ``(T, Q, N)``, as `Embedding.scores` does."""


class Embedding(Algorithm):
    """Learns an embedding in which images of a class are alike. A subclass says how embeddings are compared.

    An embedding is the features of the model, the inputs of its last layer, which is left out. Training normalises the
    support and query images of an episode as one batch; meta-test uses the running statistics of these batches. A model
    without running statistics normalises with its batch, as in MAML.

    No gradient steps are needed in a task. If meta-test takes some, the embedding is fine-tuned on the support images,
    which are classified by comparing them with themselves.

    Args:
        parts: the domain, model, optimizers and stream.

    Raises:
        MamlError: if the domain has no classes with support images, or the model has no features; or training
            has gradient steps.
    """

    shares_weights = True
    fixes_ways = False
    draws_dropout = True

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        if not isinstance(parts.domain, FewShotClassification):
            raise MamlError(
                f"{type(self).__name__} compares images with those of other classes: choose domain=omniglot, cifar_fs, "
                "mini_imagenet or image_folder"
            )
        if self.inner.num_steps:
            raise MamlError(
                f"inner.num_steps={self.inner.num_steps}, but {type(self).__name__} adapts nothing in training; set it "
                "to 0. The gradient steps of meta-test are evaluation.num_steps"
            )
        self.network = self.model
        self.network.check_features()
        body = {name: value for name, value in self.theta.items() if not name.startswith("head.")}
        statistics = self.network.running_statistics(body)
        self.set_initial(body | self.init_comparison(self.stream.child("comparison")), statistics)
        self.model = Comparison(self.network, self.scores)

    def init_comparison(self, stream: Stream) -> Params:
        """Draws the parameters of the comparison, without a task axis; none, unless a subclass has some."""
        return {}

    @abstractmethod
    def scores(self, params: Params, support: Tensor, query: Tensor) -> Tensor:
        """Scores the classes; the largest score wins. Unless `loss` is overridden, a softmax of them is trained.

        Args:
            params: theta and the buffers, name -> ``(T, ...)``, or one copy that tasks share.
            support: embeddings, ``(T, K, N, D)``.
            query: embeddings, ``(T, Q, D)``.

        Returns:
            ``(T, Q, N)``.
        """

    def loss(self, params: Params, support: Tensor, query: Tensor, labels: Tensor) -> tuple[Tensor, Metrics]:
        """Returns the mean of -log p(label) over the query images of each task, ``(T,)``, and further metrics.

        Args:
            params: as in `scores`.
            support: as in `scores`.
            query: as in `scores`.
            labels: class numbers of the query images, ``(T, Q)``.
        """
        scores = self.scores(params, support, query)
        return cross_entropies(scores, labels).mean(1), {"accuracy": accuracy(scores, labels)}

    def sample_tasks(self, count: int, stream: Stream) -> Tasks:
        """Draws a meta-batch, and which values dropout keeps in its support and query images."""
        tasks = self.domain.sample_tasks(count, stream)
        size = sum(self.domain.data(tasks, role).x.shape[1] for role in _ROLES) if self.network.dropout else 0
        return tasks | self.network.draw_dropout(size, Stream(stream.child("dropout").bits((count,))))

    def task_losses(self, params: Params, tasks: Tasks) -> tuple[Tensor, Metrics]:
        """The loss of the query images; the metrics hold the new running statistics."""
        support, query = self.domain.data(tasks, "support"), self.domain.data(tasks, "query")
        seen: Params = {}
        kept = {name: value for name, value in tasks.items() if name.startswith(DROPOUT)}
        both = self.network.features(self.theta_of(params) | kept, torch.cat([support.x, query.x], dim=1), seen=seen)
        embedded, asked = both.split([support.x.shape[1], query.x.shape[1]], dim=1)
        losses, metrics = self.loss(params, in_blocks(embedded, support), asked, query.y)
        return losses, metrics | new_statistics(params, seen)

    def adapt(
        self, params: Params, tasks: Tasks, num_steps: int, step_sizes: Sequence[float] | None = None
    ) -> Iterator[Params]:
        """Yields the parameters with the embeddings of the support images added."""
        support = self.domain.data(tasks, "support")
        statistics = {name: params[name] for name in self.buffers}

        def loss(theta: Params, step: int) -> Tensor:
            features = self.network.features(theta | statistics, support.x)
            return self.loss(theta | statistics, in_blocks(features, support), features, support.y)[0]

        for theta, _ in self.inner.adapt(loss, self.theta_of(params), num_steps, False, step_sizes):
            yield with_support(theta | statistics, self.network, support)


class Comparison(Model):
    """Embeds query images, and scores the classes by comparing them with the support images.

    Args:
        network: the model whose features are the embeddings.
        scores: compares embeddings.
    """

    def __init__(self, network: Model, scores: Scores) -> None:
        self.network, self._scores = network, scores

    def init(self, stream: Stream) -> Params:
        return self.network.init(stream)

    def renamed(self, name: str) -> str:
        return self.network.renamed(name)

    def uses_running_statistics(self, params: Params) -> bool:
        return self.network.uses_running_statistics(params)

    def __call__(self, params: Params, x: Tensor, num_reference: int | None = None) -> Tensor:
        """Returns the scores, ``(T, Q, N)``, for parameters that `Embedding.adapt` has yielded."""
        params = without_copies(params)
        return self._scores(params, params[SUPPORT], self.network.features(params, x, num_reference))


def with_support(params: Params, network: Model, support: Examples) -> Params:
    """Returns the parameters with the embeddings of the support images added, as a `Comparison` takes them."""
    features = network.features(without_copies(params), support.x)
    return params | {SUPPORT: in_blocks(features, support)}


def compare_with_images(similarity: Similarity, support: Tensor, query: Tensor) -> Tensor:
    """Returns the similarity of embeddings to those of all support images, ``(T, Q, K, N)``.

    Args:
        similarity: name of the similarity.
        support: embeddings, ``(T, K, N, D)``.
        query: embeddings, ``(T, Q, D)``.
    """
    return SIMILARITIES[similarity](query, support.flatten(1, 2)).unflatten(2, support.shape[1:3])


def nearest_image(similarity: Similarity) -> Scores:
    """Returns scores that give a query image the label of the support image that is most similar."""
    return partial(_score_by_nearest_image, similarity)  # not a closure, which could not be pickled


def _score_by_nearest_image(similarity: Similarity, params: Params, support: Tensor, query: Tensor) -> Tensor:
    return compare_with_images(similarity, support, query).amax(2)


def in_blocks(features: Tensor, support: Examples) -> Tensor:
    """Splits the embeddings of K blocks of N support images: ``(T, K * N, D)`` -> ``(T, K, N, D)``."""
    return features.unflatten(1, (support.num_shots, -1))
