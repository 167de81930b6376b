"""Multi-task averaging (appendix C.1): regressors trained each on a task of its own, averaged in parameter space."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from maml.algorithm.base import Algorithm, Parts
from maml.domain.base import Metrics
from maml.errors import MamlError
from maml.outer.base import Objective
from maml.types import Count, NonNegativeFloat, Params, PositiveFloat, Tasks, expand, num_tasks

_CHECK_EVERY = 100  # steps between two looks at the errors


class MultitaskAverage(Algorithm):
    """theta is the mean of the regressors trained so far, each from a fresh initialisation.

    One iteration trains a regressor on every task of its meta-batch, side by side, with the outer optimizer on the
    task's support data, until its error on the query data is small enough. The pull is towards the mean of the earlier
    iterations' regressors, so that a meta-batch of one trains them one after another, as the paper has it.

    Args:
        parts: of every algorithm.
        weight: of the sum of squared distances from what the parameters are pulled to; 0 does not regularise.
        pull: to ``zero`` (weight decay), or to the ``mean`` of the regressors trained so far.
        max_error: below which a regressor is trained.
        num_steps: after which a regressor that is not starts anew: some initialisations never get there.
        max_attempts: how often; then it is an error.
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
        """Loss of each regressor on its own task, plus the pull.

        Beside the regressors, ``params`` hold what they are pulled to and the pull's weight (`_fit`).
        """
        regressors = self.theta_of(params)
        data = self.domain.data(tasks, "support")
        losses, metrics = self.domain.outer_loss(self.model, regressors, data)
        distances = [
            (value - params[f"centre.{name}"]).square().flatten(1).sum(1) for name, value in regressors.items()
        ]
        return losses + params["weight"] * torch.stack(distances).sum(0), metrics

    def meta_update(self, objective: Objective, tasks: Tasks) -> dict[str, Tensor]:
        """Trains one regressor per task and takes them into the average.

        Raises:
            MamlError: if some error stays too large.
        """
        averaged, count = int(self.buffers["num_averaged"]), num_tasks(tasks)
        trained, errors = self._train(objective, tasks, averaged)
        for name, value in self.theta.items():
            value.lerp_(trained[name].mean(0), count / (averaged + count))
        self.buffers["num_averaged"] += count
        return {"loss": errors.mean(), "largest_loss": errors.max()}

    def _train(self, objective: Objective, tasks: Tasks, first: int) -> tuple[Params, Tensor]:
        """Returns a regressor of each task, as it was when its error was small enough, and that error, ``(T,)``.

        ``first`` is the number of the first of them, of all regressors.
        """
        count = num_tasks(tasks)
        trained: Params = {name: value.repeat(count, *[1] * value.dim()) for name, value in self.theta.items()}
        errors = next(iter(trained.values())).new_full((count,), torch.inf)
        for attempt in range(self.max_attempts):
            (left,) = errors.isinf().nonzero(as_tuple=True)
            params = self._draw((first + left).tolist(), attempt)
            some = {name: value[left.to(value.device)] for name, value in tasks.items()}
            params, errors[left] = self._fit(objective, params, some)
            for name, value in trained.items():
                value[left] = params[name]
            if errors.isfinite().all():
                return trained, errors
        raise MamlError(
            f"{int(errors.isinf().sum())} of {count} regressors have an error above algorithm.max_error="
            f"{self.max_error} in each of algorithm.max_attempts={self.max_attempts} attempts; raise "
            "algorithm.num_steps or max_attempts, or lower algorithm.weight"
        )

    def _fit(self, objective: Objective, params: Params, tasks: Tasks) -> tuple[Params, Tensor]:
        """Returns regressors as they were when their errors were small enough, and these; inf where they never were."""
        without_mean = self.pull == "mean" and not self.buffers["num_averaged"]
        weight = 0.0 if without_mean else self.weight
        centre = {
            f"centre.{name}": torch.zeros_like(value) if self.pull == "zero" else value
            for name, value in self.theta.items()
        }
        fixed = expand(centre | {"weight": next(iter(self.theta.values())).new_tensor(weight)}, num_tasks(tasks))
        fit = _RegressorObjective(objective, fixed, tasks)
        state = self.outer.init_state(params)
        fitted = {name: value.clone() for name, value in params.items()}
        errors = next(iter(params.values())).new_full((num_tasks(tasks),), torch.inf)
        for step in range(1, self.num_steps + 1):
            self.outer.step(fit, params, state)
            if step % _CHECK_EVERY == 0 or step == self.num_steps:
                with torch.no_grad():
                    query = self.domain.data(tasks, "query")
                    now = self.domain.outer_loss(self.model, params, query)[0]
                reached = (now < self.max_error) & errors.isinf()
                errors[reached] = now[reached]
                for name, value in fitted.items():
                    value[reached] = params[name][reached]
                if errors.isfinite().all():
                    break
        return fitted, errors

    def _draw(self, numbers: list[int], attempt: int) -> Params:
        """Draws fresh regressors, ``(T, ...)``."""
        stream = self.stream.child("regressors").child(attempt)
        drawn = [self.model.init(stream.child(number)) for number in numbers]
        return {name: torch.stack([params[name] for params in drawn]) for name in self.theta}


class _RegressorObjective(Objective):
    """The objective of regressors that share nothing: each has its own gradient."""

    def __init__(self, objective: Objective, fixed: Params, tasks: Tasks) -> None:
        self.objective, self.fixed, self.tasks = objective, fixed, tasks

    def gradient(self, theta: Params) -> tuple[Params, dict[str, Tensor]]:
        return self.objective.task_gradients(theta | self.fixed, self.tasks)
