"""Model-agnostic meta-learning (Algorithms 1-3); with ``inner.order=1`` its first-order approximation (section 5.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from maml.algorithm.base import Algorithm
from maml.domain.base import Metrics, Role
from maml.domain.reinforcement import Reinforcement
from maml.types import Params, Product, Tasks, expand, num_tasks


class MAML(Algorithm):
    """Learns the theta from which a few gradient steps do best on each task's query data."""

    differentiates_adaptation = True
    learns_from_rollouts = True
    role: Role = "query"
    """Of the data on which the meta-objective is measured."""

    @property
    def num_steps(self) -> int:
        """Gradient steps in front of the meta-objective."""
        return self.inner.num_steps

    def collect(self, tasks: Tasks) -> None:
        for _ in self.adapt(self.theta, tasks, self.num_steps):
            pass

    def task_losses(self, params: Params, tasks: Tasks) -> tuple[Tensor, Metrics]:
        """L_i(f_theta'_i, D'_i) with theta'_i = theta - alpha * grad L_i(f_theta, D_i) (eq. 1).

        Departure: eq. (1) sums over tasks; the authors' code averages, so beta does not depend on the meta-batch size.
        """
        *_, adapted = self._adapt(params, tasks, self.num_steps, None, create_graph=self.inner.order == 2)
        return self.domain.outer_loss(self.model, adapted, self.domain.data(tasks, self.role, self.num_steps))

    def chunk_curvature(self, theta: Params, tasks: Tasks) -> Product:
        if not self.inner.is_plain:
            return self._chunk_curvature_of_any_inner(theta, tasks)
        assert isinstance(self.domain, Reinforcement)
        domain, model, count = self.domain, self.model, num_tasks(tasks)
        path = [
            {name: value.detach() for name, value in params.items()}
            for params in self._adapt(theta, tasks, self.num_steps, None, create_graph=False)
        ]
        fisher = domain.fisher(model, path[-1], domain.data(tasks, self.role, self.num_steps))
        second_order = path[:-1] if self.inner.order == 2 else []
        hessians = [
            domain.inner_hessian(model, params, domain.data(tasks, "support", step))
            for step, params in enumerate(second_order)
        ]
        alpha, adapted = self.inner.step_size, self.inner.adapted_names(list(theta))
        fixed = {name: torch.zeros_like(path[0][name]) for name in theta if name not in adapted}

        def product(vector: Params) -> Params:
            """J^T F J v with J = I - alpha M H of each step, M the mask of what adapts: exact where the KL is zero."""
            v = expand(vector, count)
            for hessian in hessians:
                curved = hessian(v)
                v = v | {name: v[name] - alpha * curved[name] for name in adapted}
            v = fisher(v)
            for hessian in reversed(hessians):
                curved = hessian(v | fixed)
                v = {name: value - alpha * curved[name] for name, value in v.items()}
            return {name: value.sum(0) for name, value in v.items()}

        return product

    def _chunk_curvature_of_any_inner(self, theta: Params, tasks: Tasks) -> Product:
        """Differentiates the KL twice, through whatever the inner optimizer does."""
        theta = {name: value.detach().requires_grad_() for name, value in theta.items()}
        with torch.enable_grad():
            kl = self.task_losses(theta, tasks)[1]["kl"].sum()
            gradients = torch.autograd.grad(kl, list(theta.values()), create_graph=True, materialize_grads=True)

        def product(vector: Params) -> Params:
            curved = torch.autograd.grad(
                gradients, list(theta.values()), list(vector.values()), retain_graph=True, materialize_grads=True
            )
            return dict(zip(theta, curved, strict=True))

        return product
