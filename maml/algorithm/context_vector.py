"""Adaptation of a context vector alone (appendix C.2): extra inputs z adapt; all tasks share the weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from maml.algorithm.base import MakeModel, Parts
from maml.algorithm.maml import MAML
from maml.model.base import Model, glorot_uniform, zeros
from maml.seeding import Stream
from maml.types import Count, Params, num_elements


class ContextVector(MAML):
    """MAML on a network with extra inputs z, held in the parameter ``context``.

    The meta-update trains the initial value of z and all weights. With ``algorithm=context_vector``, only z adapts.
    z is appended to every input of a task: as further channels of an image, or as further entries of a vector.

    Args:
        parts: the domain, model, optimizers and stream.
        num_channels: size of z: number of channels (images) or entries (vectors).
        init: initial value of z, which the paper does not give. ``glorot`` follows the authors' old supervised code,
            ``zero`` their RL code.
    """

    def __init__(self, parts: Parts, num_channels: Count, init: Literal["glorot", "zero"]) -> None:
        def make_model(in_shape: Sequence[int], out_dim: int) -> Model:
            return _ModelWithContext(parts.make_model, in_shape, out_dim, num_channels, init)

        super().__init__(replace(parts, make_model=make_model))


class _ModelWithContext(Model):
    """A model that appends the parameter ``context``, ``(..., num_channels)``, to its inputs."""

    def __init__(
        self, make_model: MakeModel, in_shape: Sequence[int], out_dim: int, num_channels: int, init: str
    ) -> None:
        *space, channels = in_shape
        self.model = make_model((*space, channels + num_channels), out_dim)
        self.distribution = self.model.distribution
        self.shape = (*space, num_channels)
        self.init_context = init

    def init(self, stream: Stream) -> Params:
        size = num_elements(self.shape)
        context = (
            zeros(stream, *self.shape)
            if self.init_context == "zero"
            else glorot_uniform(stream.child("context"), self.shape, size, size)
        )
        return {"context": context} | self.model.init(stream)

    def renamed(self, name: str) -> str:
        return self.model.renamed(name)

    def check_second_derivative(self) -> None:
        self.model.check_second_derivative()

    def __call__(self, params: Params, x: Tensor, num_reference: int | None = None) -> Tensor:
        weights = dict(params)
        context = weights.pop("context").unsqueeze(1).expand(*x.shape[:-1], -1)
        return self.model(weights, torch.cat([x, context], dim=-1), num_reference)
