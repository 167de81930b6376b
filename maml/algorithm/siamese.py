"""Siamese networks (Koch et al. 2015): a learnt similarity of two images, and nearest neighbours by it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from maml.algorithm.embedding import SUPPORT, Embedding, compare_with_images
from maml.domain.base import Metrics
from maml.domain.classification import accuracy
from maml.model.base import glorot_uniform, zeros
from maml.model.functional import for_tasks
from maml.seeding import Stream
from maml.types import Params, Tasks, without_copies

_WEIGHT, _BIAS = "comparison.weight", "comparison.bias"


class Siamese(Embedding):
    """Learns whether two images are of the same class: sigmoid(sum_j w_j |h1_j - h2_j| + b), with binary cross-entropy.

    In training, a query image makes two pairs: with a support image of its class, and with one of the next class. The
    label is that of the support image that is most similar. `measure` also reports the accuracy with the mean over the
    support images of a class instead of the largest, and with the cosine instead of the learnt similarity.

    Departure: the similarity of Koch et al. has no b. Without it, equal images would have the probability 1/2.
    """

    def init_comparison(self, stream: Stream) -> Params:
        """Draws w, Glorot uniform; b is 0."""
        size = self.network.num_features
        weight = glorot_uniform(stream.child("weight"), (size,), size, 1)
        return {_WEIGHT: weight, _BIAS: zeros(stream, 1)}

    def scores(self, params: Params, support: Tensor, query: Tensor) -> Tensor:
        return self._similarity(params, support, query).amax(2)

    def loss(self, params: Params, support: Tensor, query: Tensor, labels: Tensor) -> tuple[Tensor, Metrics]:
        """Returns the mean binary cross-entropy of the pairs of each task, and the share of pairs that are told right.

        Query images are blocks with one image of each class, in the order of the support images.
        """
        num_blocks = query.shape[1] // support.shape[2]
        blocks = query.unflatten(1, (num_blocks, -1))
        # In fine-tuning the query images are the support images. With several shots, each is paired with another image.
        shots = torch.arange(1, num_blocks + 1, device=query.device) % support.shape[1]
        partners = support[:, shots]
        logits = torch.cat(
            [self._logits(params, blocks, partners), self._logits(params, blocks, partners.roll(-1, 2))], dim=1
        ).flatten(1)
        is_same = (torch.arange(logits.shape[1], device=query.device) < logits.shape[1] // 2).to(logits.dtype)
        losses = F.binary_cross_entropy_with_logits(logits, is_same.expand_as(logits), reduction="none").mean(1)
        is_right = ((logits > 0) == (is_same > 0)) & (logits != 0)
        return losses, {"accuracy": is_right.to(logits.dtype).masked_fill(logits.isnan(), torch.nan).mean(1)}

    def measure(self, params: Params, tasks: Tasks, step: int) -> Metrics:
        """Returns the domain's metrics, and the accuracies ``_mean``, ``_cosine`` and ``_cosine_mean``."""
        metrics = super().measure(params, tasks, step)
        query, params = self.domain.data(tasks, "query", step), without_copies(params)
        support, features = params[SUPPORT], self.network.features(params, query.x)
        learnt = self._similarity(params, support, features).sigmoid()
        cosine = compare_with_images("cosine", support, features)
        scores = {"mean": learnt.mean(2), "cosine": cosine.amax(2), "cosine_mean": cosine.mean(2)}
        return metrics | {f"accuracy_{name}": accuracy(value, query.y) for name, value in scores.items()}

    def _similarity(self, params: Params, support: Tensor, query: Tensor) -> Tensor:
        """Returns the learnt similarity to every support image, as a logit, ``(T, Q, K, N)``."""
        # One shot at a time, because the differences are D times as many numbers.
        shots = [self._logits(params, query.unsqueeze(2), block.unsqueeze(1)) for block in support.unbind(1)]
        return torch.stack(shots, 2)

    def _logits(self, params: Params, one: Tensor, other: Tensor) -> Tensor:
        """Returns the logits of pairs, ``(T, A, B)``, of embeddings ``(T, A, B, D)``."""
        distance = (one - other).abs()
        weight, bias = (for_tasks(params[name], len(distance)) for name in (_WEIGHT, _BIAS))
        return torch.einsum("tabd,td->tab", distance, weight) + bias.unsqueeze(2)
