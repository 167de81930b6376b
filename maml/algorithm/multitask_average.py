"""Multi-task averaging (appendix C.1): one regressor is trained per task; theta is the mean of their parameters."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from maml.algorithm.base import Algorithm, Parts
from maml.domain.base import Metrics
from maml.errors import MamlError
from maml.outer.base import Objective
from maml.types import Count, NonNegativeFloat, Params, PositiveFloat, Tasks, expand, num_tasks

_CHECK_EVERY = 100  # number of steps between two checks of the errors


class MultitaskAverage(Algorithm):
    """theta is the mean of the regressors trained so far, each from its own initialisation.

    One iteration trains a regressor on every task of its meta-batch, all in one batched computation. The outer
    optimizer minimises the loss on the task's support data, plus a regulariser, until the error on the query data is
    small enough. The regulariser pulls towards zero or towards the mean of the earlier iterations' regressors. A
    meta-batch of one task trains the regressors one after another, as in the paper.

    Args:
        parts: the domain, model, optimizers and stream.
        weight: weight of the regulariser, the sum of squared distances between the parameters and the point that they
            are pulled to; 0 does not regularise.
        pull: where the parameters are pulled to: ``zero`` (weight decay), or the ``mean`` of the regressors trained so
            far.
        max_error: query error below which a regressor counts as trained.
        num_steps: number of steps per attempt. A regressor that is not trained by then starts again from another
            initialisation, because some initialisations never reach a small error.
        max_attempts: number of attempts per regressor; the run fails after that.
    """

    sums_over_tasks = False

    def __init__(
        self,
        parts: Parts,
        weight: NonNegativeFloat,
        pull: Literal["zero", "mean"],
        max_error: PositiveFloat,
        num_steps: Count,
        max_attempts: Count,
    ) -> None:
        super().__init__(parts)
        self.weight, self.pull = weight, pull
        self.max_error, self.num_steps, self.max_attempts = max_error, num_steps, max_attempts
        self.set_initial(self.theta, {"num_averaged": torch.zeros((), dtype=torch.int64, device=self.stream.device)})

    def task_losses(self, params: Params, tasks: Tasks) -> tuple[Tensor, Metrics]:
        """The loss of each regressor on its own task, plus the regulariser.

        Besides the regressors, ``params`` holds the point that they are pulled to and the regulariser's weight: `_fit`
        adds them.
        """
        regressors = self.theta_of(params)
        data = self.domain.data(tasks, "support")
        losses, metrics = self.domain.outer_loss(self.model, regressors, data)
        distances = [
            (value - params[f"centre.{name}"]).square().flatten(1).sum(1) for name, value in regressors.items()
        ]
        return losses + params["weight"] * torch.stack(distances).sum(0), metrics

    def meta_update(self, objective: Objective, tasks: Tasks) -> dict[str, Tensor]:
        """Trains one regressor per task and updates the mean.

        Raises:
            MamlError: if the error of a regressor stays too large.
        """
        averaged, count = int(self.buffers["num_averaged"]), num_tasks(tasks)
        trained, errors = self._train_regressors(objective, tasks, averaged)
        for name, value in self.theta.items():
            value.lerp_(trained[name].mean(0), count / (averaged + count))
        self.buffers["num_averaged"] += count
        return {"loss": errors.mean(), "largest_loss": errors.max()}

    def _train_regressors(self, objective: Objective, tasks: Tasks, num_before: int) -> tuple[Params, Tensor]:
        """Trains one regressor per task.

        Args:
            objective: computes the gradients.
            tasks: T tasks.
            num_before: number of regressors trained in earlier iterations, which numbers the new ones.

        Returns:
            Each regressor at the first check at which its error was small enough, ``(T, ...)``, and this error,
            ``(T,)``.
        """
        count = num_tasks(tasks)
        trained: Params = {name: value.repeat(count, *[1] * value.dim()) for name, value in self.theta.items()}
        errors = next(iter(trained.values())).new_full((count,), torch.inf)
        for attempt in range(self.max_attempts):
            (untrained,) = errors.isinf().nonzero(as_tuple=True)
            params = self._init_regressors((num_before + untrained).tolist(), attempt)
            remaining = {name: value[untrained.to(value.device)] for name, value in tasks.items()}
            params, errors[untrained] = self._fit(objective, params, remaining)
            for name, value in trained.items():
                value[untrained] = params[name]
            if errors.isfinite().all():
                return trained, errors
        raise MamlError(
            f"{int(errors.isinf().sum())} of {count} regressors have an error above algorithm.max_error="
            f"{self.max_error} in each of algorithm.max_attempts={self.max_attempts} attempts; raise "
            "algorithm.num_steps or max_attempts, or lower algorithm.weight"
        )

    def _fit(self, objective: Objective, params: Params, tasks: Tasks) -> tuple[Params, Tensor]:
        """Makes one attempt to train regressors.

        Args:
            objective: computes the gradients.
            params: the initial regressors, ``(T, ...)``; changed in place.
            tasks: their T tasks.

        Returns:
            Each regressor at the first check at which its error was small enough, ``(T, ...)``, and this error,
            ``(T,)``. The error is inf if it never was.
        """
        without_mean = self.pull == "mean" and not self.buffers["num_averaged"]
        weight = 0.0 if without_mean else self.weight
        centre = {
            f"centre.{name}": torch.zeros_like(value) if self.pull == "zero" else value
            for name, value in self.theta.items()
        }
        fixed = expand(centre | {"weight": next(iter(self.theta.values())).new_tensor(weight)}, num_tasks(tasks))
        regressor_objective = _RegressorObjective(objective, fixed, tasks)
        state = self.outer.init_state(params)
        fitted = {name: value.clone() for name, value in params.items()}
        errors = next(iter(params.values())).new_full((num_tasks(tasks),), torch.inf)
        for step in range(1, self.num_steps + 1):
            self.outer.step(regressor_objective, params, state)
            if step % _CHECK_EVERY == 0 or step == self.num_steps:
                with torch.no_grad():
                    query = self.domain.data(tasks, "query")
                    query_errors = self.domain.outer_loss(self.model, params, query)[0]
                newly_fitted = (query_errors < self.max_error) & errors.isinf()
                errors[newly_fitted] = query_errors[newly_fitted]
                for name, value in fitted.items():
                    value[newly_fitted] = params[name][newly_fitted]
                if errors.isfinite().all():
                    break
        return fitted, errors

    def _init_regressors(self, numbers: list[int], attempt: int) -> Params:
        """Draws the initial parameters of the regressors with these numbers, ``(T, ...)``."""
        stream = self.stream.child("regressors").child(attempt)
        initial = [self.model.init(stream.child(number)) for number in numbers]
        return {name: torch.stack([params[name] for params in initial]) for name in self.theta}


class _RegressorObjective(Objective):
    """The objective of T independent regressors: each has its own parameters and its own gradient.

    Args:
        objective: computes the gradient of each task's loss.
        fixed: further parameters that are not trained, ``(T, ...)``.
        tasks: T tasks.
    """

    def __init__(self, objective: Objective, fixed: Params, tasks: Tasks) -> None:
        self.objective, self.fixed, self.tasks = objective, fixed, tasks

    def gradient(self, theta: Params) -> tuple[Params, dict[str, Tensor]]:
        return self.objective.task_gradients(theta | self.fixed, self.tasks)
