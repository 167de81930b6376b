"""How tests build an algorithm from parts of their own."""

from __future__ import annotations

from typing import Any, TypeVar

from maml.algorithm.base import Algorithm, Parts
from maml.domain.base import Domain
from maml.inner.base import Inner
from maml.model.base import Model
from maml.outer.adam import Adam
from maml.outer.base import Outer
from maml.seeding import Stream

AnyAlgorithm = TypeVar("AnyAlgorithm", bound=Algorithm)


def build_from(
    algorithm: type[AnyAlgorithm],
    domain: Domain[Any],
    model: Model,
    inner: Inner,
    outer: Outer | None = None,
    seed: int = 0,
    task_chunk: int | None = None,
    **options: Any,
) -> AnyAlgorithm:
    """Builds an algorithm around a model that takes the domain's inputs."""
    parts = Parts(domain, lambda in_shape, out_dim: model, inner, outer or Adam(), Stream(seed), task_chunk)
    return algorithm(parts, **options)
