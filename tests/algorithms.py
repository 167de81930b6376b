"""Helpers of tests: build an algorithm from given parts, and compute with it."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import Tensor

from maml.algorithm.base import Algorithm, Parts
from maml.domain.base import Domain
from maml.hardware.base import Execution
from maml.inner.base import Inner
from maml.model.base import Model
from maml.outer.adam import Adam
from maml.outer.base import Outer
from maml.seeding import Stream
from maml.training.iteration import meta_update
from maml.training.meta_gradient import MetaGradient
from maml.types import Params, Tasks

AnyAlgorithm = TypeVar("AnyAlgorithm", bound=Algorithm)


def build_from(
    algorithm: type[AnyAlgorithm],
    domain: Domain[Any],
    model: Model,
    inner: Inner,
    outer: Outer | None = None,
    seed: int = 0,
    **options: Any,
) -> AnyAlgorithm:
    """Builds an algorithm around a model that takes the domain's inputs."""
    parts = Parts(domain, lambda in_shape, out_dim: model, inner, outer or Adam(), Stream(seed))
    return algorithm(parts, **options)


def meta_gradient(algorithm: Algorithm, task_chunk: int | None = None, recompute: bool = False) -> MetaGradient:
    """Returns the object that computes an algorithm's meta-gradient, in chunks of tasks."""
    return MetaGradient(algorithm, Execution(1, task_chunk, compile=False, recompute=recompute))


def gradient(
    algorithm: Algorithm, theta: Params, tasks: Tasks, task_chunk: int | None = None, recompute: bool = False
) -> tuple[Params, dict[str, Tensor]]:
    """Returns the meta-gradient at theta, and the mean metrics."""
    return meta_gradient(algorithm, task_chunk, recompute).gradient(theta | algorithm.buffers, tasks)


def evaluate(algorithm: Algorithm, theta: Params, tasks: Tasks) -> dict[str, Tensor]:
    """Returns the mean metrics at theta."""
    return meta_gradient(algorithm).evaluate(theta | algorithm.buffers, tasks)


def step(algorithm: Algorithm, tasks: Tasks, task_chunk: int | None = None) -> dict[str, Tensor]:
    """Makes one meta-update and returns its metrics."""
    return meta_update(algorithm, meta_gradient(algorithm, task_chunk), tasks)
