"""No meta-learning: the initial theta is fine-tuned in meta-test; every method has to beat this baseline."""

from __future__ import annotations

from torch import Tensor

from maml.algorithm.pretrain import Pretrain
from maml.errors import MamlError
from maml.outer.base import Objective
from maml.types import Tasks


class RandomInit(Pretrain):
    """Never changes theta."""

    def keep_best_of_validation(self) -> None:
        raise MamlError(
            "algorithm=random_init learns nothing, so no theta is the best on validation tasks; set validate_every=null"
        )

    def meta_update(self, objective: Objective, tasks: Tasks) -> dict[str, Tensor]:
        return objective.evaluate(self.theta)
