"""Conventional pretraining on all tasks pooled (section 5.1); with ``domain.oracle=true`` it is the oracle."""

from __future__ import annotations

from maml.algorithm.base import Parts
from maml.algorithm.maml import MAML
from maml.domain.base import Role
from maml.errors import MamlError


class Pretrain(MAML):
    """Learns one theta for all tasks, without adaptation. In meta-test, theta is fine-tuned as MAML's theta is.

    It is MAML with zero inner steps. Its loss is that of theta on the support data, as in the authors' code
    (docs/protocol.md#sinusoid-baselines); it never sees the query data.
    """

    differentiates_adaptation = False
    role: Role = "support"

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        # Where nothing adapts in meta-test either, as with recurrent networks, tasks need no copies of the weights.
        self.shares_weights = parts.domain.measured_by == "showing"
        if self.shares_weights and self.inner.num_steps:
            raise MamlError(
                f"inner.num_steps={self.inner.num_steps}, but {type(parts.domain).__name__} measures by showing, and "
                "nothing adapts by gradient steps; set inner.num_steps=0"
            )

    @property
    def name(self) -> str:
        """``Pretrain``; that of the network if it adapts by its state, because then the network is the method."""
        return type(self.model).__name__ if self.shares_weights else super().name

    @property
    def adaptation_steps(self) -> int:
        return 0
