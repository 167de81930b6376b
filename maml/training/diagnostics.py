"""Numbers about training that only loggers get; ``metrics.jsonl`` does not hold them."""

from __future__ import annotations

from collections.abc import Sequence
from time import monotonic

import torch
from torch import Tensor

from maml.errors import MamlError
from maml.training.iteration import Iteration
from maml.training.learner import Learner
from maml.training.validation import validation_score
from maml.types import Params

# Validation tasks at each checkpoint. They are as many as one or a few iterations have, so they cost next to nothing.
_NUM_VALIDATION_TASKS = 16


class Diagnostics:
    """Measures the iterations whose metrics are logged, and the checkpoints. It changes no number of the training.

    The numbers are ``gradient_norm``, the norm of the meta-gradient before any clipping, if the algorithm has one;
    ``step_norm``, the norm of theta's change; ``learnt_step_size``, the mean of the inner step sizes, if they are
    learnt; and ``iterations_per_second`` since the last measurement. At a checkpoint there is also the headline metric
    on a few validation tasks, always the same, in domains that have a validation split.

    Args:
        learners: the learners, one for each seed. If no logger of theirs wants these numbers, nothing is measured.
        iterate: the iteration that trains them.
        start: number of iterations that were done before.
    """

    def __init__(self, learners: Sequence[Learner], iterate: Iteration, start: int) -> None:
        self.learners, self.iterate = learners, iterate
        learns = bool(learners[0].algorithm.theta)  # nearest neighbours of pixels have nothing to measure
        self.wanted = learns and any(learner.logger.wants_diagnostics for learner in learners)
        self._last = monotonic(), start
        self._before: list[Params] = []

    def before(self) -> None:
        """Keeps a copy of theta; call this before the iteration."""
        if self.wanted:
            self._before = [
                {name: value.clone() for name, value in each.algorithm.theta.items()} for each in self.learners
            ]

    def after(self, number: int) -> list[dict[str, Tensor]]:
        """Returns the numbers of each learner, 0-dim tensors; call this after the iteration ``number``."""
        if not self.wanted:
            return [{} for _ in self.learners]
        now = monotonic()
        (then, done), self._last = self._last, (now, number)
        measured = []
        for index, (learner, before) in enumerate(zip(self.learners, self._before, strict=True)):
            theta = learner.algorithm.theta
            numbers = {}
            if gradient := self.iterate.meta_gradient.latest:
                many = len(self.learners) > 1
                numbers["gradient_norm"] = _norm([value[index] if many else value for value in gradient.values()])
            numbers["step_norm"] = _norm([value - before[name] for name, value in theta.items()])
            if learnt := [value for name, value in theta.items() if name.startswith("inner.step_size.")]:
                numbers["learnt_step_size"] = torch.cat([value.flatten() for value in learnt]).mean()
            if now > then:
                speed = (number - done) / (now - then)
                numbers["iterations_per_second"] = numbers["step_norm"].new_full((), speed)
            measured.append(numbers)
        self._before = []
        return measured

    def validate(self) -> list[dict[str, float]]:
        """Returns the headline metric of each learner on a few validation tasks.

        It returns nothing if the domain has none, or ``validate_every`` measures the metric on more of them.
        """
        domain, stream = self.learners[0].algorithm.domain, self.learners[0].stream
        if not self.wanted or not domain.has_validation or self.learners[0].settings.validate_every:
            return [{} for _ in self.learners]
        try:
            domain.sample_tasks(1, stream.child("validation"), "val")
        except MamlError:  # the validation split is too small for it, which is no reason to stop a run
            return [{} for _ in self.learners]
        return [
            {
                f"validation_{learner.algorithm.domain.headline}": validation_score(
                    learner.algorithm, _NUM_VALIDATION_TASKS, self.iterate.execution.task_chunk
                )
            }
            for learner in self.learners
        ]


def _norm(values: Sequence[Tensor]) -> Tensor:
    """Returns the Euclidean norm of all entries together, a 0-dim tensor."""
    return torch.stack([value.detach().norm() for value in values]).norm()
