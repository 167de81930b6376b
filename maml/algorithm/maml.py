"""Model-agnostic meta-learning (Algorithms 1-3); with ``inner.order=1`` its first-order approximation (section 5.2)."""

from __future__ import annotations

from torch import Tensor

from maml.algorithm.base import Algorithm
from maml.domain.base import Metrics
from maml.types import Params, Tasks


class MAML(Algorithm):
    """Learns the theta from which a few gradient steps do best on each task's query data."""

    differentiates_adaptation = True

    def task_losses(self, params: Params, tasks: Tasks) -> tuple[Tensor, Metrics]:
        """L_i(f_theta'_i, D'_i) with theta'_i = theta - alpha * grad L_i(f_theta, D_i) (eq. 1).

        Departure: eq. (1) sums over tasks; the authors' code averages, so beta does not depend on the meta-batch size.
        """
        *_, adapted = self._adapt(params, tasks, self.inner.num_steps, None, create_graph=self.inner.order == 2)
        query = self.domain.collect(tasks, "query", self.model, adapted)
        return self.domain.outer_loss(self.model, adapted, query)
