"""Schedules: the factor of the outer step size as a function of the number of updates that were made."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from maml.errors import MamlError
from maml.types import Count, Decay, NonNegativeInt


class Schedule(ABC):
    """A function of the number of updates. It is computed on the device, so that a CUDA graph follows it."""

    @abstractmethod
    def factor(self, done: Tensor) -> Tensor:
        """Returns the factor of the step size.

        Args:
            done: number of updates that were made, float64, 0-dim.
        """


class Cosine(Schedule):
    """Falls from 1 to ``final`` along half a cosine, then stays (Loshchilov and Hutter 2017, without restarts).

    Args:
        num_iterations: number of updates until it has fallen.
        final: the last factor.
        warm_up: number of updates in which the factor first rises linearly, 1 / warm_up at the first update.

    Raises:
        MamlError: if the rise is as long as all updates.
    """

    def __init__(self, num_iterations: NonNegativeInt, final: Decay = 0.0, warm_up: NonNegativeInt = 0) -> None:
        if warm_up and warm_up >= num_iterations:
            raise MamlError(
                f"outer.schedule.warm_up={warm_up}: the step size would rise during all {num_iterations} updates; set "
                "fewer"
            )
        self.num_iterations, self.final, self.warm_up = num_iterations, final, warm_up

    def factor(self, done: Tensor) -> Tensor:
        share = (done / max(1, self.num_iterations)).clamp(max=1)
        factor = self.final + (1 - self.final) * (1 + torch.cos(math.pi * share)) / 2
        return factor * ((done + 1) / self.warm_up).clamp(max=1) if self.warm_up else factor


class Steps(Schedule):
    """Multiplies the step size by ``factor`` after every ``every`` updates.

    Args:
        every: number of updates between two changes.
        factor: what each change multiplies by.
    """

    def __init__(self, every: Count, factor: Decay) -> None:
        self.every, self.change = every, factor

    def factor(self, done: Tensor) -> Tensor:
        return self.change ** torch.floor(done / self.every)
