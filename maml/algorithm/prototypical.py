"""Prototypical networks (Snell et al. 2017): the class whose mean support embedding is nearest wins."""

from __future__ import annotations

from torch import Tensor

from maml.algorithm.base import Parts
from maml.algorithm.embedding import Embedding
from maml.model.functional import SIMILARITIES, Similarity
from maml.types import Params


class Prototypical(Embedding):
    """p(y = c | x) is the softmax over the classes of minus the squared distance of x to the mean of class c.

    Args:
        parts: the domain, model, optimizers and stream.
        similarity: what the softmax is of: ``euclidean``, minus the squared distance, or ``cosine``.
    """

    def __init__(self, parts: Parts, similarity: Similarity = "euclidean") -> None:
        self._similarity = SIMILARITIES[similarity]
        super().__init__(parts)

    def scores(self, params: Params, support: Tensor, query: Tensor) -> Tensor:
        return self._similarity(query, support.mean(1))
