"""No meta-learning: theta as it was drawn, fine-tuned in meta-test; the floor that every method must beat."""

from __future__ import annotations

from torch import Tensor

from maml.algorithm.pretrain import Pretrain
from maml.outer.base import Objective


class RandomInit(Pretrain):
    """Leaves theta alone, however many iterations it is given."""

    def update(self, objective: Objective) -> dict[str, Tensor]:
        return objective.evaluate(self.theta)
