"""Adaptation of a context vector alone (appendix C.2): free inputs z are adapted, all other weights are shared."""

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
    """MAML on a network with extra inputs z, the parameter ``context``; ``algorithm=context_vector`` adapts no other.

    The outer step trains z's initial value and all weights. z stands beside every input of a task: as channels of an
    image, as entries of a vector.

    Args:
        parts: of every algorithm.
        num_channels: of z: channels or entries.
        init: of z; the paper says nothing. ``glorot`` is the authors' old supervised code, ``zero`` their RL code.
    """

    def __init__(self, parts: Parts, num_channels: Count, init: Literal["glorot", "zero"]) -> None:
        def make_model(in_shape: Sequence[int], out_dim: int) -> Model:
            return _ModelWithContext(parts.make_model, in_shape, out_dim, num_channels, init)

        super().__init__(replace(parts, make_model=make_model))


class _ModelWithContext(Model):
    """A model whose inputs are widened by the parameter ``context``, ``(..., num_channels)``."""

    def __init__(
        self, make_model: MakeModel, in_shape: Sequence[int], out_dim: int, num_channels: int, init: str
    ) -> None:
        *space, channels = in_shape
        self.model = make_model((*space, channels + num_channels), out_dim)
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

    def __call__(self, params: Params, x: Tensor, num_reference: int | None = None) -> Tensor:
        rest = dict(params)
        context = rest.pop("context").unsqueeze(1).expand(*x.shape[:-1], -1)
        return self.model(rest, torch.cat([x, context], dim=-1), num_reference)
