"""Multi-task averaging (appendix C.1): one regressor is trained per task; theta is the mean of their parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Le
from torch import Tensor

from maml.algorithm.base import Algorithm, Parts
from maml.domain.base import Metrics
from maml.errors import MamlError
from maml.outer.base import Objective, OuterState
from maml.types import (
    Count,
    NonNegativeFloat,
    Params,
    PositiveFloat,
    Tasks,
    concatenate,
    expand,
    num_tasks,
    select_entries,
    take,
)

_CHECK_EVERY = 50  # number of steps between two checks of the errors
_CENTRE, _WEIGHT = "centre.", "weight"  # entries of the tasks that hold the regulariser
_EXAMPLES = "examples"  # entry of the tasks that holds the support examples of a step
_PREVIOUS = "previous."  # the buffers that hold the last regressor, with `initial` = previous


class MultitaskAverage(Algorithm):
    """theta is the mean of the regressors trained so far.

    One iteration trains a regressor on every task of its meta-batch, all in one batched computation. The outer
    optimizer minimises the loss on the task's support data, plus a regulariser, until the error on the query data is
    small enough. The regulariser pulls towards zero or towards the mean of the earlier iterations' regressors. A
    meta-batch of one task trains the regressors one after another, as in the paper.

    A regressor whose error stays too large is kept as it was at its smallest error, and counted. At the end of
    training, `check_result` stops the run if the regressors are not good enough.

    Args:
        parts: the domain, model, optimizers and stream.
        weight: weight of the regulariser, the sum of squared distances between the parameters and the point that they
            are pulled to; 0 does not regularise.
        pull: where the parameters are pulled to: ``zero`` (weight decay), or the ``mean`` of the regressors trained so
            far.
        max_error: training of a regressor ends when its query error is below this. The mean error of all regressors
            has to be below it, too.
        max_share_above: largest share of regressors whose error may stay above ``max_error``.
        num_steps: number of steps per attempt. A regressor that is not trained by then starts again from another
            initialisation, because some initialisations never reach a small error.
        max_attempts: number of attempts per regressor.
        num_examples: number of support examples in each step, in turns; None uses all of them in every step.
        initial: where a regressor starts: at a ``fresh`` initialisation, or where the ``previous`` iteration's (last)
            regressor ended. The state of the outer optimizer is new in both cases. With ``previous``, the first
            iteration starts fresh, with all attempts; later regressors have one attempt.
    """

    sums_over_tasks = False

    def __init__(
        self,
        parts: Parts,
        weight: NonNegativeFloat,
        pull: Literal["zero", "mean"],
        max_error: PositiveFloat,
        max_share_above: Annotated[float, Ge(0), Le(1)],
        num_steps: Count,
        max_attempts: Count,
        num_examples: Count | None = None,
        initial: Literal["fresh", "previous"] = "fresh",
    ) -> None:
        super().__init__(parts)
        if parts.domain.draws_classes:
            raise MamlError(
                f"algorithm=multitask_average averages regressors, but {type(parts.domain).__name__} classifies, with "
                "classes numbered anew in every task, so that a mean of classifiers says nothing; choose "
                "algorithm=finetune, nearest_neighbor or maml"
            )
        if self.outer.mixes_entries:
            raise MamlError(
                "outer.clip_norm would clip the regressors of a meta-batch together, though they are independent; "
                "leave it at null, or clip each entry with outer.clip"
            )
        if self.outer.changes_step_size:
            raise MamlError(
                "algorithm=multitask_average trains each regressor anew, in algorithm.num_steps steps, and a step size "
                "that changes with the number of iterations says nothing about them; set outer.schedule=null, "
                "and with outer=sgd also outer.final_step_size=null"
            )
        if pull == "mean" and not weight:
            raise MamlError(
                "algorithm.pull=mean pulls with algorithm.weight=0.0, which is not at all; set a weight, or pull=zero"
            )
        if num_examples is not None and num_examples > self.domain.num_shots:
            raise MamlError(
                f"algorithm.num_examples={num_examples}, but a task has domain.num_shots={self.domain.num_shots} "
                "support examples, so that some would count twice; lower it, or set null for all"
            )
        self.weight, self.pull, self.initial = weight, pull, initial
        self.max_error, self.max_share_above = max_error, max_share_above
        self.num_steps, self.max_attempts, self.num_examples = num_steps, max_attempts, num_examples
        device = self.stream.device
        buffers: Params = {
            "num_averaged": torch.zeros((), dtype=torch.int64, device=device),
            "num_above": torch.zeros((), dtype=torch.int64, device=device),
            "sum_errors": torch.zeros((), dtype=torch.float64, device=device),
        }
        if initial == "previous":
            buffers |= {_PREVIOUS + name: torch.zeros_like(value) for name, value in self.theta.items()}
        self.set_initial(self.theta, buffers)

    @property
    def adaptation_steps(self) -> int:
        return 0

    def task_losses(self, params: Params, tasks: Tasks) -> tuple[Tensor, Metrics]:
        """The loss of each regressor on its own task, without the regulariser."""
        data = self.domain.data(tasks, "support")
        if _EXAMPLES in tasks:
            entries = torch.arange(num_tasks(tasks), device=data.x.device).unsqueeze(1), tasks[_EXAMPLES]
            data = data._replace(x=data.x[entries], y=data.y[entries])
        return self.domain.outer_loss(self.model, self.theta_of(params), data)

    def meta_update(self, objective: Objective, tasks: Tasks) -> dict[str, Tensor]:
        """Trains one regressor per task and updates the mean."""
        return self.meta_updates([self], objective, tasks)[0]

    @staticmethod
    def meta_updates(
        algorithms: Sequence[MultitaskAverage], objective: Objective, tasks: Tasks
    ) -> list[dict[str, Tensor]]:
        """Trains one regressor per task of every seed, all in one batched computation, and updates the seeds' means."""
        count = num_tasks(tasks) // len(algorithms)
        trained, errors = algorithms[0]._train_regressors(algorithms, objective, tasks)
        return [
            seed._average(take(trained, start, start + count), errors[start : start + count])
            for seed, start in zip(algorithms, range(0, num_tasks(tasks), count), strict=True)
        ]

    def check_result(self) -> None:
        """Checks the errors of all regressors.

        Raises:
            MamlError: if their mean is not below ``max_error``, or too many of them are above.
        """
        count, above = int(self.buffers["num_averaged"]), int(self.buffers["num_above"])
        mean = float(self.buffers["sum_errors"]) / max(count, 1)
        if count and not (mean < self.max_error and above <= self.max_share_above * count):
            raise MamlError(
                f"{above} of {count} regressors have an error above algorithm.max_error={self.max_error}, and the mean "
                f"error is {mean:.4g}. The mean has to be below, and all but a share of algorithm.max_share_above="
                f"{self.max_share_above} of the regressors. Lower algorithm.weight, or raise algorithm.num_steps or "
                "max_attempts; mode=eval evaluates this average nevertheless"
            )

    def _average(self, trained: Params, errors: Tensor) -> dict[str, Tensor]:
        """Adds regressors ``(T, ...)`` with these errors ``(T,)`` to the mean; returns the metrics."""
        count = len(errors)
        self.buffers["num_averaged"] += count
        self.buffers["num_above"] += (errors >= self.max_error).sum()
        self.buffers["sum_errors"] += errors.sum()
        for name, value in self.theta.items():
            value.lerp_(trained[name].mean(0), count / int(self.buffers["num_averaged"]))
            if self.initial == "previous":
                self.buffers[_PREVIOUS + name].copy_(trained[name][-1])
        share_above = self.buffers["num_above"] / self.buffers["num_averaged"]
        return {"loss": errors.mean(), "largest_loss": errors.max(), "share_above": share_above}

    def _train_regressors(
        self, seeds: Sequence[MultitaskAverage], objective: Objective, tasks: Tasks
    ) -> tuple[Params, Tensor]:
        """Trains one regressor per task.

        Args:
            seeds: the algorithms of S seeds, with the same settings as this one.
            objective: computes the gradients.
            tasks: the tasks of all seeds, seed by seed, ``(S T, ...)``.

        Returns:
            Each regressor as it was at its smallest error, ``(S T, ...)``, and this error, ``(S T,)``.
        """
        count = num_tasks(tasks) // len(seeds)
        tasks = tasks | concatenate([seed._pull(count) for seed in seeds])
        trained = {name: value.new_empty((num_tasks(tasks), *value.shape)) for name, value in self.theta.items()}
        errors = next(iter(trained.values())).new_full((num_tasks(tasks),), torch.inf)
        for attempt in range(1 if self._goes_on else self.max_attempts):
            (untrained,) = (errors >= self.max_error).nonzero(as_tuple=True)
            if not len(untrained):
                break
            # Some are trained twice, so that the batch has one of few sizes: a step is compiled for each of them.
            filled = untrained[torch.arange(_next_power_of_two(len(untrained))) % len(untrained)]
            starts = [seeds[index // count]._start(index % count, attempt) for index in filled.tolist()]
            params = {name: torch.stack([start[name] for start in starts]) for name in self.theta}
            fitted, fitted_errors = self._fit(objective, params, select_entries(tasks, filled))
            fitted, fitted_errors = take(fitted, 0, len(untrained)), fitted_errors[: len(untrained)]
            # In the first attempt there is nothing to keep, not even if an error is NaN.
            is_better = (fitted_errors < errors[untrained]) | (attempt == 0)
            _write(trained, untrained[is_better], select_entries(fitted, is_better))
            errors[untrained[is_better]] = fitted_errors[is_better]
        return trained, errors

    def _fit(self, objective: Objective, params: Params, tasks: Tasks) -> tuple[Params, Tensor]:
        """Makes one attempt to train regressors. The batch becomes smaller when half of them are trained.

        Args:
            objective: computes the gradients.
            params: the initial regressors, ``(T, ...)``; changed in place.
            tasks: their T tasks, with what `_pull` adds.

        Returns:
            Each regressor at the check at which its error was smallest, ``(T, ...)``, and this error, ``(T,)``. The
            error is inf if it never was a number.
        """
        state = self.outer.init_state(params)
        num_support = self.domain.data(take(tasks, 0, 1), "support").x.shape[1]
        best = {name: value.clone() for name, value in params.items()}
        errors = next(iter(params.values())).new_full((num_tasks(tasks),), torch.inf)
        active = torch.arange(len(errors), device=errors.device)
        for step in range(1, self.num_steps + 1):
            with_examples = tasks | self._examples(step, num_support, len(active))
            params, state = objective.task_step(self._step, params, state, with_examples)
            if step % _CHECK_EVERY and step < self.num_steps:
                continue
            with torch.no_grad():
                query_errors = self.domain.outer_loss(self.model, params, self.domain.data(tasks, "query"))[0]
            # A regressor whose error is small enough stays as it is, also while the batch still contains it.
            is_better = (query_errors < errors[active]) & ~(errors[active] < self.max_error)
            _write(best, active[is_better], select_entries(params, is_better))
            errors[active[is_better]] = query_errors[is_better]
            is_left = ~(errors[active] < self.max_error)
            num_left = int(is_left.sum())
            if num_left == 0:
                break
            size = _next_power_of_two(num_left)
            if size < len(active):
                kept = is_left.int().argsort(descending=True, stable=True)[:size]
                state = self.outer.select_state(state, params, kept)
                active = active[kept]
                params, tasks = select_entries(params, kept), select_entries(tasks, kept)
        return best, errors

    def _step(self, objective: Objective, params: Params, state: OuterState, tasks: Tasks) -> None:
        """Makes one step on T regressors and their tasks; the tasks hold what `_pull` adds."""
        self.outer.step(_RegressorObjective(objective, tasks), params, state)

    def _examples(self, step: int, num_support: int, count: int) -> Tasks:
        """Returns which of the support examples a step uses, ``(count, num_examples)``; empty if it uses all."""
        if self.num_examples is None:
            return {}
        first = (step - 1) * self.num_examples
        numbers = torch.arange(first, first + self.num_examples, device=self.stream.device) % num_support
        return {_EXAMPLES: numbers.expand(count, -1)}

    def _pull(self, count: int) -> Params:
        """Returns the regulariser of ``count`` regressors: the points that they are pulled to, and its weight.

        It is empty without a regulariser. Before the first regressor there is no mean to pull to.
        """
        if not self.weight:
            return {}
        value = next(iter(self.theta.values()))
        is_pulled = self.pull == "zero" or bool(self.buffers["num_averaged"])
        pull = {
            _CENTRE + name: torch.zeros_like(value) if self.pull == "zero" else value
            for name, value in self.theta.items()
        }
        return expand(pull | {_WEIGHT: value.new_tensor(self.weight if is_pulled else 0.0)}, count)

    def _start(self, number: int, attempt: int) -> Params:
        """Returns the initial parameters of a regressor of this iteration."""
        if self._goes_on:
            # Departure: appendix C.1 starts each regressor from its own random initialisation.
            return {name: self.buffers[_PREVIOUS + name] for name in self.theta}
        stream = self.stream.child("regressors").child(attempt)
        return self.model.init(stream.child(int(self.buffers["num_averaged"]) + number))

    @property
    def _goes_on(self) -> bool:
        """Whether this iteration's regressors start where the last one ended; there is one attempt then."""
        return self.initial == "previous" and bool(self.buffers["num_averaged"])


class _RegressorObjective(Objective):
    """The objective of T independent regressors: each has its own parameters and its own gradient.

    The regulariser of a regressor theta_i is weight |theta_i - centre_i|^2.

    Args:
        objective: computes the gradient of each task's loss.
        tasks: T tasks with the centres and the weight, if there is a regulariser.
    """

    def __init__(self, objective: Objective, tasks: Tasks) -> None:
        self.objective, self.tasks = objective, tasks

    def gradient(self, theta: Params) -> tuple[Params, dict[str, Tensor]]:
        gradients, metrics = self.objective.task_gradients(theta, self.tasks)
        if _WEIGHT not in self.tasks:
            return gradients, metrics
        pulled: Params = {}
        for name, gradient in gradients.items():
            distance = theta[name] - self.tasks[_CENTRE + name]
            weight = self.tasks[_WEIGHT].view(-1, *[1] * (distance.dim() - 1))
            pulled[name] = gradient + 2 * weight * distance
        return pulled, metrics


def _next_power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()


def _write(params: Params, indices: Tensor, values: Params) -> None:
    """Writes values at some positions of the leading axis."""
    for name, value in params.items():
        value[indices] = values[name]
