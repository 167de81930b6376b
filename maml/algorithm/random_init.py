"""No meta-learning: theta as it was drawn, fine-tuned in meta-test; the floor that every method must beat."""

from __future__ import annotations

from torch import Tensor

from maml.algorithm.pretrain import Pretrain
from maml.outer.base import Objective
from maml.types import Tasks


class RandomInit(Pretrain):
    """Leaves theta alone, however many iterations it is given."""

    def meta_update(self, objective: Objective, tasks: Tasks) -> dict[str, Tensor]:
        return objective.evaluate(self.theta)
