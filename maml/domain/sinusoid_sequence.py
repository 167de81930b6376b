"""Sinusoids for recurrent networks: as section 5.1, but the input is a sequence that ends before x instead of x."""

from __future__ import annotations

import torch

from maml.domain.base import Role, SupervisedDomain
from maml.domain.sinusoid import Sinusoid
from maml.types import Count, Examples, Tasks

_SPACING = 0.5  # distance of two samples in x; ten samples cover most of a period


class SinusoidSequence(Sinusoid):
    """Regression from L equally spaced samples of sin x to the next sample of the task's sinusoid, A sin(x - phi).

    A task is a gain and a delay, which are learnt from K sequences. The inputs are not samples of the task's own
    sinusoid, because then no adaptation would be needed: for all A and phi, the next sample is 2 cos(spacing) times the
    last sample minus the one before.

    Args:
        num_shots: K, support sequences per task.
        num_query: query sequences per task in training; None is as many as support sequences.
        sequence_length: L, number of samples in a sequence.
    """

    def __init__(self, num_shots: Count = 10, num_query: Count | None = None, sequence_length: Count = 10) -> None:
        super().__init__(num_shots, num_query)
        self.in_shape = (sequence_length, 1)

    def authors_test_tasks(self, num_tasks: int, num_shots: int) -> Tasks:
        """Raises an error: the authors have no sequences."""
        return SupervisedDomain.authors_test_tasks(self, num_tasks, num_shots)

    def data(self, tasks: Tasks, role: Role, step: int = 0) -> Examples:
        """Returns the sequences, ``(T, S, L, 1)``, that end one spacing before the points of section 5.1."""
        data = super().data(tasks, role, step)
        before = _SPACING * torch.arange(self.in_shape[0], 0, -1, device=data.x.device)
        return data._replace(x=torch.sin(data.x.unsqueeze(-1) - before.unsqueeze(-1)))
