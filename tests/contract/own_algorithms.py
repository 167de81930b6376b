"""Algorithms as a user might write them, using only the documented interface."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from maml.algorithm.base import Algorithm, Parts
from maml.domain.base import Metrics
from maml.model.base import Model
from maml.seeding import Stream
from maml.types import Count, Params, Tasks


class ANIL(Algorithm):
    """Almost no inner loop (Raghu et al. 2020): only the last layer adapts; meta-training learns the features below it.

    Args:
        parts: the parts that every algorithm gets.
        step_size: step size of the inner steps.
        num_steps: number of inner steps in training.
    """

    differentiates_adaptation = True

    def __init__(self, parts: Parts, step_size: float = 0.1, num_steps: Count = 2) -> None:
        super().__init__(parts)
        self.step_size, self.num_steps = step_size, num_steps

    def task_losses(self, params: Params, tasks: Tasks) -> tuple[Tensor, Metrics]:
        *_, adapted = self.adapt(params, tasks, self.num_steps)
        return self.domain.outer_loss(self.model, adapted, self.domain.data(tasks, "query"))

    def adapt(
        self, params: Params, tasks: Tasks, num_steps: int, step_sizes: Sequence[float] | None = None
    ) -> Iterator[Params]:
        yield params
        support = self.domain.data(tasks, "support")
        for _ in range(num_steps):
            with torch.enable_grad():
                head = {name: value.requires_grad_() for name, value in params.items() if name.startswith("head.")}
                losses = self.domain.inner_loss(self.model, params | head, support)
                gradients = torch.autograd.grad(losses.sum(), list(head.values()), create_graph=True)
            steps = zip(head.items(), gradients, strict=True)
            params = params | {name: value - self.step_size * gradient for (name, value), gradient in steps}
            yield params


class Prototypical(Algorithm):
    """Prototypical networks (Snell et al. 2017): predicts the class with the nearest mean support embedding.

    Args:
        parts: the parts that every algorithm gets.
        num_features: length of an embedding.
    """

    fixes_ways = False

    def __init__(self, parts: Parts, num_features: Count = 8) -> None:
        super().__init__(parts)
        self.embed = parts.make_model(parts.domain.in_shape, num_features)
        self.model = _NearestMean(self.embed)
        self.set_initial(self.model.init(parts.stream))

    def task_losses(self, params: Params, tasks: Tasks) -> tuple[Tensor, Metrics]:
        query = self.domain.data(tasks, "query")
        return self.domain.outer_loss(self.model, self._with_means(params, tasks), query)

    def adapt(
        self, params: Params, tasks: Tasks, num_steps: int, step_sizes: Sequence[float] | None = None
    ) -> Iterator[Params]:
        for _ in range(num_steps + 1):
            yield self._with_means(params, tasks)

    def _with_means(self, params: Params, tasks: Tasks) -> Params:
        support = self.domain.data(tasks, "support")
        features = self.embed(params, support.x)
        return params | {"means": features.unflatten(1, (support.num_shots, -1)).mean(1)}


class InputNoise(Algorithm):
    """Learns from inputs with noise: a loss with random draws, as in docs/extending.md."""

    def sample_tasks(self, count: int, stream: Stream) -> Tasks:
        tasks = super().sample_tasks(count, stream)
        shape = self.domain.data(tasks, "support").x.shape
        return tasks | {"noise": stream.child("noise").normal(shape, std=0.1)}

    def task_losses(self, params: Params, tasks: Tasks) -> tuple[Tensor, Metrics]:
        support = self.domain.data(tasks, "support")
        return self.domain.outer_loss(self.model, params, support._replace(x=support.x + tasks["noise"]))


class _NearestMean(Model):
    def __init__(self, embed: Model) -> None:
        self.embed = embed

    def init(self, stream: Stream) -> Params:
        return self.embed.init(stream)

    def __call__(self, params: Params, x: Tensor, num_reference: int | None = None) -> Tensor:
        features = self.embed(params, x, num_reference)
        return -(features.unsqueeze(2) - params["means"].unsqueeze(1)).square().sum(-1)
