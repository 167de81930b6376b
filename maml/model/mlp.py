"""Fully connected networks: the sinusoid regressor (section 5.1) and Omniglot's non-convolutional net (section 5.2)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from maml.environment.distribution import Categorical
from maml.hardware.kernels import kernels_apply
from maml.model.base import Model, glorot_uniform, zeros
from maml.model.functional import ACTIVATIONS, Activation, linear, normalize_layer
from maml.model.linearized import Linearized, LinearizedMLP
from maml.model.normalization import norm_relu
from maml.seeding import Stream
from maml.types import Count, Params, PositiveFloat


class MLP(Model):
    """Linear layers with an activation between them. Inputs are flattened.

    Args:
        in_shape: shape of one input, which is flattened.
        out_dim: number of outputs.
        hidden_sizes: width of each hidden layer.
        activation: activation function after each hidden layer.
        normalization: ``batch`` puts batch normalisation (shift only) before each activation.
        weight_std: standard deviation of the normal initial weights, truncated at two standard deviations; None is
            Glorot uniform.
    """

    distribution = Categorical

    def __init__(
        self,
        in_shape: Sequence[int],
        out_dim: int,
        hidden_sizes: list[Count],
        activation: Activation = "relu",
        normalization: Literal["none", "batch"] = "none",
        weight_std: PositiveFloat | None = 0.01,
    ) -> None:
        self.sizes = [math.prod(in_shape), *hidden_sizes, out_dim]
        self.num_features = self.sizes[-2]
        self.layers = [f"linear{i}" for i in range(1, len(self.sizes) - 1)] + ["head"]
        self.first_layer = self.layers[0]
        self.activation = activation
        self.normalization = normalization
        self.weight_std = weight_std

    def init(self, stream: Stream) -> Params:
        """Draws the weights; biases and shifts are 0. The authors' code has a standard deviation of 0.01."""
        params: Params = {}
        for i, (layer, num_in, num_out) in enumerate(
            zip(self.layers, self.sizes[:-1], self.sizes[1:], strict=True), start=1
        ):
            # The head's stream has a number too, so that its draws are those of earlier versions.
            draws, shape = stream.child(f"linear{i}"), (num_out, num_in)
            params[f"{layer}.weight"] = (
                glorot_uniform(draws, shape, num_in, num_out)
                if self.weight_std is None
                else draws.normal(shape, std=self.weight_std, bound=2.0)
            )
            params[f"{layer}.bias"] = zeros(stream, num_out)
            if self.normalization == "batch" and layer != "head":
                params[f"norm{i}.shift"] = zeros(stream, num_out)
        return params

    def features(
        self, params: Params, x: Tensor, num_reference: int | None = None, seen: Params | None = None
    ) -> Tensor:
        x = x.flatten(2)
        for i, layer in enumerate(self.layers[:-1], start=1):
            x = linear(x, params[f"{layer}.weight"], params[f"{layer}.bias"])
            if self.normalization == "batch":
                is_plain = num_reference is None and seen is None and f"norm{i}.mean" not in params
                if is_plain and self.activation == "relu" and kernels_apply(x):
                    x = norm_relu(x, params[f"norm{i}.shift"])
                    continue
                x = normalize_layer(params, f"norm{i}", x, num_reference, seen)
            x = ACTIVATIONS[self.activation](x)
        return x

    def renamed(self, name: str) -> str:
        """In earlier versions, the head was called ``linear`` with the last number."""
        layer, _, parameter = name.partition(".")
        return f"head.{parameter}" if layer == f"linear{len(self.layers)}" else name

    def linearize(self, params: Params, x: Tensor) -> Linearized:
        if self.normalization == "batch":
            return super().linearize(params, x)
        return LinearizedMLP(params, x.flatten(2), self.layers, self.activation)
