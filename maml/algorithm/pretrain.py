"""Conventional pretraining on all tasks pooled (section 5.1); with ``domain.oracle=true`` the oracle."""

from __future__ import annotations

from torch import Tensor

from maml.algorithm.base import Algorithm
from maml.domain.base import Metrics
from maml.types import Params, Tasks, expand, num_tasks


class Pretrain(Algorithm):
    """Learns one theta for all tasks, without adapting to any; in meta-test it is fine-tuned as MAML's is.

    It sees the support data of each task only, as the authors' code does (protocol 2).
    """

    def task_losses(self, params: Params, tasks: Tasks) -> tuple[Tensor, Metrics]:
        """L_i(f_theta, D_i): the loss before any update."""
        params = expand(params, num_tasks(tasks))
        return self.domain.outer_loss(self.model, params, self.domain.collect(tasks, "support", self.model, params))
