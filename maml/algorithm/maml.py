"""Model-agnostic meta-learning (Algorithms 1-3); with ``inner.order=1`` its first-order approximation (section 5.2)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from maml.algorithm.base import Algorithm, Parts
from maml.domain.base import Metrics, Role
from maml.domain.reinforcement import Reinforcement
from maml.pictures import Picture
from maml.types import MatrixVectorProduct, Params, Tasks


class MAML(Algorithm):
    """Learns a theta from which a few gradient steps on support data give a low loss on each task's query data."""

    differentiates_adaptation = True
    learns_from_rollouts = True
    role: Role = "query"
    """The data on which the meta-objective is computed."""

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        if self.adaptation_steps:
            self.domain.check_adaptation(self.name)

    @property
    def name(self) -> str:
        if type(self) is not MAML:
            return super().name
        return self.inner.method or ("FOMAML" if self.inner.order == 1 else "MAML")

    def collect(self, params: Params, tasks: Tasks) -> None:
        for _ in self.adapt(params, tasks, self.adaptation_steps):
            pass

    def task_losses(self, params: Params, tasks: Tasks) -> tuple[Tensor, Metrics]:
        """L_i(f_theta'_i, D'_i) with theta'_i = theta - alpha * grad L_i(f_theta, D_i) (eq. 1).

        Departure: eq. (1) sums over tasks; the authors' code averages, so beta does not depend on the meta-batch size.
        """
        *_, adapted = self.inner_steps(
            params, tasks, self.adaptation_steps, None, create_graph=self.inner.present_order == 2
        )
        return self.domain.outer_loss(self.model, adapted, self.domain.data(tasks, self.role, self.adaptation_steps))

    def pictures(self, params: Params, tasks: Tasks, num_steps: int) -> dict[str, Picture]:
        """Returns the pictures of the inner optimizer, which may show the course of its state."""

        def steps() -> Iterator[tuple[Params, Params]]:
            taken = self.inner.adapt(self.support_loss(tasks), self.theta_of(params), num_steps, create_graph=False)
            for step, (adapted, state) in enumerate(taken):
                self.domain.collect(tasks, self.model, adapted, step)
                yield adapted, state

        return self.inner.pictures(steps())

    @property
    def _analytic_domain(self) -> Reinforcement | None:
        """The domain, if the derivatives of adaptation in it have a closed form; else None."""
        return self.domain if self.inner.is_plain_sgd and isinstance(self.domain, Reinforcement) else None

    def curvature(self, params: Params, tasks: Tasks) -> MatrixVectorProduct:
        domain, model, theta = self._analytic_domain, self.model, self.theta_of(params)
        if domain is None:
            return self._curvature_by_autograd(params, tasks)
        path = [
            {name: value.detach() for name, value in adapted.items()}
            for adapted in self.inner_steps(params, tasks, self.adaptation_steps, None, create_graph=False)
        ]
        fisher = domain.fisher(model, path[-1], domain.data(tasks, self.role, self.adaptation_steps))
        second_order = path[:-1] if self.inner.present_order == 2 else []
        hessians = [
            domain.inner_hessian(model, before, domain.data(tasks, "support", step))
            for step, before in enumerate(second_order)
        ]
        alpha, names = self.inner.step_size, self.inner.adapted_names(list(theta))
        fixed = {name: torch.zeros_like(path[0][name]) for name in theta if name not in names}

        def product(vector: Params) -> Params:
            """Returns J^T F J v. This is the exact Hessian of the KL divergence, because the KL is zero at theta.

            F is the Fisher matrix. J is the product of I - alpha M H over the steps; H is a step's Hessian and M the
            mask of the parameters that adapt.
            """
            v = vector
            for hessian in hessians:
                curved = hessian(v)
                v = v | {name: v[name] - alpha * curved[name] for name in names}
            return self._pull_back(fisher(v), hessians, fixed)

        return product

    def kl_gradients(self, params: Params, tasks: Tasks) -> Params:
        domain = self._analytic_domain
        if domain is None:
            theta, kl = self._kl(params, tasks)
            gradients = torch.autograd.grad(kl, list(theta.values()), materialize_grads=True)
            return dict(zip(theta, gradients, strict=True))
        v = self.theta_of(params)
        alpha, names = self.inner.step_size, self.inner.adapted_names(list(v))
        hessians = []
        for step in range(self.adaptation_steps):
            gradient, hessian = domain.inner_derivatives(self.model, v, domain.data(tasks, "support", step))
            v = v | {name: v[name] - alpha * gradient[name] for name in names}
            hessians.append(hessian)
        fixed = {name: torch.zeros_like(v[name]) for name in v if name not in names}
        v = domain.kl_gradient(self.model, v, domain.data(tasks, self.role, self.adaptation_steps))
        return self._pull_back(v, hessians if self.inner.present_order == 2 else [], fixed)

    def _pull_back(self, v: Params, hessians: Sequence[MatrixVectorProduct], fixed: Params) -> Params:
        """Returns J^T v, from the last step to the first: a gradient at theta'_i becomes one at theta.

        Args:
            v: name -> ``(T, ...)``.
            hessians: the Hessian of the inner loss at each step that J counts.
            fixed: zeros for the parameters that do not adapt.
        """
        for hessian in reversed(hessians):
            curved = hessian(v | fixed)
            v = {name: value - self.inner.step_size * curved[name] for name, value in v.items()}
        return v

    def _curvature_by_autograd(self, params: Params, tasks: Tasks) -> MatrixVectorProduct:
        """Differentiates the KL divergence twice, through the steps of any inner optimizer, in any domain."""
        theta, kl = self._kl(params, tasks)
        gradients = torch.autograd.grad(kl, list(theta.values()), create_graph=True, materialize_grads=True)

        def product(vector: Params) -> Params:
            curved = torch.autograd.grad(
                gradients, list(theta.values()), list(vector.values()), retain_graph=True, materialize_grads=True
            )
            return dict(zip(theta, curved, strict=True))

        return product

    @torch.enable_grad()
    def _kl(self, params: Params, tasks: Tasks) -> tuple[Params, Tensor]:
        """Returns theta as leaves of a graph, and the sum over tasks of the KL divergences, 0-dim."""
        theta = {name: value.detach().requires_grad_() for name, value in self.theta_of(params).items()}
        return theta, self.task_losses(params | theta, tasks)[1]["kl"].sum()
