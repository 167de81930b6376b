"""Adaptation of a context vector alone (appendix C.2): extra inputs z adapt; all tasks share the weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from maml.algorithm.base import MakeModel, Parts
from maml.algorithm.maml import MAML
from maml.errors import MamlError
from maml.model.base import Model, glorot_uniform, zeros
from maml.model.linearized import Backward, Forward, Linearized
from maml.seeding import Stream
from maml.types import Count, Params


class ContextVector(MAML):
    """MAML on a network with extra inputs z, held in the parameter ``context``.

    The meta-update trains the initial value of z and all weights. With ``algorithm=context_vector``, only z adapts.
    z is appended to every input of a task: as further channels of an image, or as further entries of a vector.

    Paper text: the authors' RL code trains z alone.

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
        self.distribution, self.dropout = self.model.distribution, self.model.dropout
        self.shape = (*space, num_channels)
        self.init_context = init

    def init(self, stream: Stream) -> Params:
        size = math.prod(self.shape)
        context = (
            zeros(stream, *self.shape)
            if self.init_context == "zero"
            else glorot_uniform(stream.child("context"), self.shape, size, size)
        )
        params = self.model.init(stream)
        if "context" in params:
            raise MamlError(
                "the network has a parameter 'context', the name of the context vector; give it another name"
            )
        return {"context": context} | params

    def renamed(self, name: str) -> str:
        return self.model.renamed(name)

    def check_second_derivative(self) -> None:
        self.model.check_second_derivative()

    def __call__(self, params: Params, x: Tensor, num_reference: int | None = None) -> Tensor:
        weights = dict(params)
        context = weights.pop("context").unsqueeze(1).expand(*x.shape[:-1], -1)
        return self.model(weights, torch.cat([x, context], dim=-1), num_reference)

    def linearize(self, params: Params, x: Tensor) -> Linearized:
        if self.model.first_layer is None or len(self.shape) > 1:
            return super().linearize(params, x)
        return _LinearizedWithContext(self.model, params, x)


class _LinearizedWithContext(Linearized):
    """Derivatives of a model that appends z to vectors x and whose first layer is linear.

    W [x, z] + b is W_x x + (W_z z + b): a network without extra inputs, whose first bias depends on z. Its derivatives
    are the model's own; here they are carried over to W, z and b.
    """

    def __init__(self, model: Model, params: Params, x: Tensor) -> None:
        self._weight, self._bias = f"{model.first_layer}.weight", f"{model.first_layer}.bias"
        self._num_inputs = x.shape[-1]
        params = {name: value.detach() for name, value in params.items()}
        self._context = params.pop("context")
        weight_x, self._weight_z = self._split(params[self._weight])
        bias = params[self._bias] + _times(self._weight_z, self._context)
        self._network = model.linearize(params | {self._weight: weight_x, self._bias: bias}, x)
        self.outputs = self._network.outputs

    def jvp(self, v: Params) -> Tensor:
        return self._network.jvp(self._moved(v))

    def vjp(self, delta: Tensor) -> Params:
        return self._carried_over(self._network.vjp(delta))

    def second_order(self, delta: Tensor) -> Forward:
        forward_network = self._network.second_order(delta)
        signal = self._network.vjp(delta)[self._bias]

        def forward(v: Params) -> tuple[Tensor, Backward]:
            dy, backward_network = forward_network(self._moved(v))

            def backward(moved_delta: Tensor) -> Params:
                sums = self._carried_over(backward_network(moved_delta))
                self._split(sums[self._weight])[1].add_(_outer(signal, v["context"]))
                sums["context"] += _times(self._split(v[self._weight])[1].mT, signal)
                return sums

            return dy, backward

        return forward

    def _moved(self, v: Params) -> Params:
        """Returns the direction of the network's parameters, given that of the model's."""
        weight_x, weight_z = self._split(v[self._weight])
        bias = v[self._bias] + _times(weight_z, self._context) + _times(self._weight_z, v["context"])
        return v | {self._weight: weight_x, self._bias: bias}

    def _carried_over(self, gradient: Params) -> Params:
        """Returns the gradient with respect to the model's parameters, given that of the network's."""
        signal = gradient[self._bias]
        weight = torch.cat([gradient[self._weight], _outer(signal, self._context)], dim=2)
        return {"context": _times(self._weight_z.mT, signal)} | gradient | {self._weight: weight}

    def _split(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return weight[..., : self._num_inputs], weight[..., self._num_inputs :]


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    """``(T, O, I)`` times ``(T, I)`` -> ``(T, O)``."""
    return (matrix @ vector.unsqueeze(2)).squeeze(2)


def _outer(left: Tensor, right: Tensor) -> Tensor:
    """``(T, O)`` and ``(T, I)`` -> ``(T, O, I)``."""
    return left.unsqueeze(2) * right.unsqueeze(1)
