"""Sinusoid regression (section 5.1): y = A sin(x - phi); every task has a new amplitude and phase."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from maml.domain.base import Metrics, Role, SupervisedDomain
from maml.errors import MamlError
from maml.model.base import Model
from maml.seeding import Stream
from maml.types import Count, Examples, Params, Split, Tasks

_AMPLITUDE = (0.1, 5.0)
_PHASE = (0.0, math.pi)
_INPUT = (-5.0, 5.0)
_NUM_AUTHORS_TASKS = 600


class Sinusoid(SupervisedDomain):
    """Regression to sinusoids of random amplitude and phase, without noise.

    Args:
        num_shots: K, support points per task.
        num_query: query points per task in training; None is as many as support points.
        oracle: gives the network the amplitude and phase as two more inputs.
    """

    out_dim = 1
    headline = "mse"
    larger_is_better = False

    def __init__(self, num_shots: Count = 10, num_query: Count | None = None, oracle: bool = False) -> None:
        self.in_shape = (3,) if oracle else (1,)
        self.oracle = oracle
        self.num_shots = num_shots
        self.num_query = num_query

    def draw_tasks(self, num_tasks: int, stream: Stream, split: Split, num_shots: int, num_query: int) -> Tasks:
        """Draws sinusoids and their inputs. Splits differ in their streams only, because every task is new."""
        # One draw for the whole batch: on a CPU, several draws would cost as much as the gradient.
        drawn = stream.uniform((num_tasks, 2 + num_shots + num_query, 1))
        ranges = {"amplitude": _AMPLITUDE, "phase": _PHASE, "support_x": _INPUT, "query_x": _INPUT}
        parts = drawn.split([1, 1, num_shots, num_query], dim=1)
        return {
            name: part * (high - low) + low for (name, (low, high)), part in zip(ranges.items(), parts, strict=True)
        }

    def authors_test_tasks(self, num_tasks: int, num_shots: int) -> Tasks:
        """Returns the authors' test sinusoids and points. Their code draws them anew for each K, with seed 1."""
        if num_tasks > _NUM_AUTHORS_TASKS:
            raise MamlError(
                f"the authors' bank has {_NUM_AUTHORS_TASKS} sinusoids, but evaluation.num_tasks={num_tasks}; lower "
                "it, or set evaluation.bank=seeded"
            )
        random = np.random.RandomState(1)
        drawn = []
        for _ in range(num_tasks):
            # In the order of the authors' code: the amplitude, the phase, then support and query points.
            ranges = (*_AMPLITUDE, 1), (*_PHASE, 1), (*_INPUT, 2 * num_shots)
            drawn.append(np.concatenate([random.uniform(low, high, count) for low, high, count in ranges]))
        values = torch.from_numpy(np.stack(drawn)).to(torch.get_default_dtype()).unsqueeze(-1)
        names = ("amplitude", "phase", "support_x", "query_x")
        return dict(zip(names, values.split([1, 1, num_shots, num_shots], dim=1), strict=True))

    def data(self, tasks: Tasks, role: Role, step: int = 0) -> Examples:
        x = tasks[f"{role}_x"]
        y = tasks["amplitude"] * torch.sin(x - tasks["phase"])
        if self.oracle:
            x = torch.cat([x, tasks["amplitude"].expand_as(x), tasks["phase"].expand_as(x)], dim=-1)
        return Examples(x, y, num_shots=tasks["support_x"].shape[1])

    def loss(self, outputs: Tensor, data: Examples) -> tuple[Tensor, Metrics]:
        """Mean squared error. Departure: eq. (2) sums the squares; text and code take the mean."""
        return (outputs - data.y).square().mean((1, 2)), {}

    def measure(self, model: Model, params: Params, support: Examples, query: Examples, step: int) -> Metrics:
        """Mean squared error on the query points; at step 0 on the support points, as in the authors' code."""
        data = query if step else support
        return {"mse": self.loss(model(params, data.x), data)[0]}
