"""No meta-learning: the initial theta is fine-tuned in meta-test; every method has to beat this baseline."""

from __future__ import annotations

from torch import Tensor

from maml.algorithm.pretrain import Pretrain
from maml.outer.base import Objective
from maml.types import Tasks


class RandomInit(Pretrain):
    """Never changes theta."""

    def meta_update(self, objective: Objective, tasks: Tasks) -> dict[str, Tensor]:
        return objective.evaluate(self.theta)
