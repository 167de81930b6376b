"""No meta-learning: theta as it was drawn, fine-tuned in meta-test; the floor that every method must beat."""

from __future__ import annotations

from torch import Tensor

from maml.algorithm.pretrain import Pretrain
from maml.types import Tasks


class RandomInit(Pretrain):
    """Leaves theta alone, however many iterations it is given."""

    def _update(self, tasks: Tasks) -> dict[str, Tensor]:
        return self.evaluate(self.theta, tasks)
