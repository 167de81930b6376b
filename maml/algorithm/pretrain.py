"""Conventional pretraining on all tasks pooled (section 5.1); with ``domain.oracle=true`` the oracle."""

from __future__ import annotations

from maml.algorithm.maml import MAML
from maml.domain.base import Role


class Pretrain(MAML):
    """Learns one theta for all tasks, without adapting to any; in meta-test it is fine-tuned as MAML's is.

    It is MAML whose objective stands before the first gradient step: the loss on the support data of each task, the
    only data it sees, as in the authors' code (docs/protocol.md#sinusoid-baselines).
    """

    differentiates_adaptation = False
    role: Role = "support"

    @property
    def num_steps(self) -> int:
        return 0
