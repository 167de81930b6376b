"""The Gaussian policy of section 5.3: a network gives the mean action; the standard deviation is a parameter."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from maml.environment.distribution import Gaussian
from maml.errors import MamlError
from maml.model.base import Model, zeros
from maml.model.functional import Activation
from maml.model.linearized import Backward, Forward, Linearized
from maml.model.mlp import MLP
from maml.seeding import Stream
from maml.types import Count, Params

_MIN_LOG_STD = math.log(1e-6)  # as in the authors' code


class GaussianPolicy(Model):
    """Outputs the means of A actions, then the logarithms of their standard deviations.

    Args:
        in_shape: shape of one observation, which is flattened.
        out_dim: number of outputs, 2A.
        hidden_sizes: width of each hidden layer of the network that gives the means.
        activation: activation function after each hidden layer.

    Raises:
        MamlError: if ``out_dim`` is odd.
    """

    distribution = Gaussian

    def __init__(
        self, in_shape: Sequence[int], out_dim: int, hidden_sizes: list[Count], activation: Activation = "relu"
    ) -> None:
        if out_dim % 2:
            raise MamlError(
                f"model=gaussian_policy outputs a mean and a standard deviation per action, so it cannot have the "
                f"{out_dim} outputs of this domain; choose a domain of reinforcement learning whose actions are real "
                "numbers, or another model (for discrete actions model=categorical_policy)"
            )
        self.num_actions = out_dim // 2
        self.means = MLP(in_shape, self.num_actions, hidden_sizes, activation, weight_std=None)
        self.first_layer = self.means.first_layer

    def init(self, stream: Stream) -> Params:
        """Draws Glorot-uniform weights; biases are 0 and standard deviations 1."""
        return self.means.init(stream) | {"log_std": zeros(stream, self.num_actions)}

    def __call__(self, params: Params, x: Tensor, num_reference: int | None = None) -> Tensor:
        return _joined(self.means(params, x), params["log_std"].clamp(min=_MIN_LOG_STD))

    def renamed(self, name: str) -> str:
        return self.means.renamed(name)

    def linearize(self, params: Params, x: Tensor) -> Linearized:
        return _LinearizedPolicy(self.means.linearize(params, x), params["log_std"].detach())


def _joined(means: Tensor, log_std: Tensor) -> Tensor:
    """``(T, N, A)`` and ``(T, A)`` -> ``(T, N, 2A)``."""
    return torch.cat([means, log_std.unsqueeze(1).expand_as(means)], dim=2)


class _LinearizedPolicy(Linearized):
    def __init__(self, means: Linearized, log_std: Tensor) -> None:
        self.means = means
        self.outputs = _joined(means.outputs, log_std.clamp(min=_MIN_LOG_STD))
        self.slope = (log_std >= _MIN_LOG_STD).to(log_std.dtype)  # no derivative below the smallest standard deviation

    def jvp(self, v: Params) -> Tensor:
        return _joined(self.means.jvp(v), v["log_std"] * self.slope)

    def vjp(self, delta: Tensor) -> Params:
        means, log_std = delta.chunk(2, dim=2)
        return self.means.vjp(means) | {"log_std": log_std.sum(1) * self.slope}

    def second_order(self, delta: Tensor) -> Forward:
        forward_means = self.means.second_order(delta.chunk(2, dim=2)[0])

        def forward(v: Params) -> tuple[Tensor, Backward]:
            dy, backward_means = forward_means(v)

            def backward(moved_delta: Tensor) -> Params:
                means, log_std = moved_delta.chunk(2, dim=2)
                return backward_means(means) | {"log_std": log_std.sum(1) * self.slope}

            return _joined(dy, v["log_std"] * self.slope), backward

        return forward
