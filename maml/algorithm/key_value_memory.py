"""A memory of keys, values and ages, which is asked for nearest neighbours (Kaiser et al. 2017, section 2)."""

from __future__ import annotations

from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from maml.model.functional import matmul

EMPTY = -1
"""The value of a slot that nothing was written to. It is no image's label."""


class Memory(NamedTuple):
    """T memories of M slots each, all of them written to at the same time.

    An empty slot has the key 0 and the value `EMPTY`, so that it is a neighbour with another label than any image's.

    Attributes:
        keys: unit vectors, ``(T, M, D)``.
        values: labels, int64 ``(T, M)``.
        ages: number of steps since a slot was written to, ``(T, M)``.
    """

    keys: Tensor
    values: Tensor
    ages: Tensor

    @classmethod
    def empty(cls, num_memories: int, num_slots: int, size: int, device: torch.device) -> Self:
        """Returns empty memories with keys of D = ``size`` numbers."""
        keys = torch.zeros(num_memories, num_slots, size, device=device)
        values = torch.full((num_memories, num_slots), EMPTY, device=device)
        return cls(keys, values, torch.zeros(num_memories, num_slots, device=device))

    def similarities(self, queries: Tensor) -> Tensor:
        """Returns the inner products of queries, ``(T, B, D)``, with all keys, ``(T, B, M)``; keys are constants."""
        return matmul(queries, self.keys.transpose(1, 2))

    def values_at(self, slots: Tensor) -> Tensor:
        """Returns the values of slots, ``(T, B)`` -> ``(T, B)``."""
        return self.values.gather(1, slots)

    def losses(self, queries: Tensor, labels: Tensor, num_neighbors: int, margin: float) -> tuple[Tensor, Tensor]:
        """Returns max(0, q . wrong - q . right + margin) - margin of each query, and whether its answer is right.

        ``right`` is the best key with the query's label, ``wrong`` the best one with another label, both among the
        nearest neighbours. The slot with the query's label that was written to last is a neighbour, too. A product is 0
        if there is no such key. The answer is the value of the nearest key.

        Departure: the authors' code counts a negative product as 0, so that a query is not drawn to a key of its label
        that points away from it. The formula does not.

        Args:
            queries: unit vectors, ``(T, B, D)``.
            labels: their labels, ``(T, B)``.
            num_neighbors: number of nearest neighbours, k, at most M.
            margin: alpha.

        Returns:
            Losses and booleans, ``(T, B)``. The losses are differentiable with respect to the queries.
        """
        with torch.no_grad():
            similarities = self.similarities(queries)
            near, slots = similarities.topk(num_neighbors, dim=2)
            has_label = self.values.unsqueeze(1) == labels.unsqueeze(2)  # (T, B, M)
            is_right = has_label.gather(2, slots)
            ages = self.ages.unsqueeze(1).masked_fill(~has_label, torch.inf)
            last = ages.argmin(2, keepdim=True)
            # The last slot may be a neighbour already. That changes nothing, because only the best slot counts.
            right_slots, right_near = torch.cat([slots, last], 2), torch.cat([near, similarities.gather(2, last)], 2)
            is_known = torch.cat([is_right, has_label.gather(2, last)], 2)
        right = self._product_with_best(queries, right_slots, right_near, is_known)
        wrong = self._product_with_best(queries, slots, near, ~is_right)
        return F.relu(wrong - right + margin) - margin, is_right[..., 0]

    def write(self, queries: Tensor, labels: Tensor, noise: Tensor) -> None:
        """Writes B images into each memory, in place; one step of time goes by.

        If the nearest key has an image's label, it moves to the normalised sum of itself and the query. Otherwise the
        query becomes the key of the oldest slot. All ages grow by one, and those of slots that were written to are 0.

        Nearest keys are those before this step. A slot whose key moves is not overwritten in the same step, and each
        image that needs a slot takes the oldest one that is left, in the order of the images. So no two images write to
        the same slot, unless they have the same label, which is not allowed.

        Departure: in the authors' code, a slot whose key moves can be overwritten in the same step.

        Args:
            queries: unit vectors, ``(T, B, D)``.
            labels: their labels, ``(T, B)``, all different in a memory.
            noise: added to the ages, by which the oldest slot is chosen, ``(T, M)``.
        """
        with torch.no_grad():
            nearest = self.similarities(queries).argmax(2)  # (T, B)
            is_right = self.values_at(nearest) == labels
            every_slot = torch.arange(self.values.shape[1], device=nearest.device)
            moves = ((nearest.unsqueeze(2) == every_slot) & is_right.unsqueeze(2)).any(1)
            oldest = (self.ages + noise).masked_fill(moves, -torch.inf).topk(labels.shape[1], dim=1).indices
            rank = (~is_right).cumsum(1).sub(1).clamp(min=0)
            slots = torch.where(is_right, nearest, oldest.gather(1, rank))
            moved = F.normalize(queries + self._keys_at(nearest), dim=2)
            written = torch.where(is_right.unsqueeze(2), moved, queries)
            self.keys.scatter_(1, slots.unsqueeze(2).expand_as(written), written)
            self.values.scatter_(1, slots, labels)
            self.ages.add_(1).scatter_(1, slots, 0)

    def _keys_at(self, slots: Tensor) -> Tensor:
        """Returns the keys of slots, ``(T, B)`` -> ``(T, B, D)``."""
        return self.keys.gather(1, slots.unsqueeze(2).expand(-1, -1, self.keys.shape[2]))

    def _product_with_best(self, queries: Tensor, slots: Tensor, near: Tensor, is_candidate: Tensor) -> Tensor:
        """Returns the product of each query with the nearest of the candidates among some slots; 0 if there is none.

        Args:
            queries: ``(T, B, D)``.
            slots: ``(T, B, C)``.
            near: their similarities.
            is_candidate: which of them count.
        """
        with torch.no_grad():
            best = near.masked_fill(~is_candidate, -torch.inf).argmax(2, keepdim=True)
            keys = self._keys_at(slots.gather(2, best).squeeze(2)) * is_candidate.gather(2, best)
        return (queries * keys).sum(2)
