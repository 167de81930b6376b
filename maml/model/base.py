"""The interface of a model: a function of parameters and inputs, without state."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from maml.environment.distribution import Distribution
from maml.errors import MamlError
from maml.model.functional import linear
from maml.model.linearized import Linearized, LinearizedByAutograd
from maml.seeding import Stream
from maml.types import Params

DROPOUT = "dropout."
"""Names of tensors that say which values are kept start with this."""


class Model(ABC):
    """The network f_theta; its parameters are arguments, with a leading task axis.

    The first arguments of a subclass's constructor are ``in_shape``, the shape of one input, and ``out_dim``, the
    number of outputs; the domain supplies both. The last layer's parameters are called ``head.weight`` and
    ``head.bias``.

    Tasks may share weights: the leading axis of a parameter then has G entries, a divisor of T, and each entry belongs
    to T / G consecutive tasks (`maml.model.functional`).

    Class attributes:
        dropout: the share of values that training drops, by masks of `draw_dropout`; 0 drops none.
        distribution: the distribution of actions whose outputs the model gives, if it acts as a policy; None fits any.

    Attributes:
        num_features: D, the number of inputs of the last layer, which are called features; 0 if the model has none.
        first_layer: name of the linear layer, with a bias, that flattened inputs enter first; None if there is none.
    """

    dropout: float = 0.0
    distribution: type[Distribution] | None = None
    num_features: int = 0
    first_layer: str | None = None

    @abstractmethod
    def init(self, stream: Stream) -> Params:
        """Draws initial parameters, name -> tensor without a task axis."""

    def __call__(self, params: Params, x: Tensor, num_reference: int | None = None) -> Tensor:
        """Computes the outputs of T tasks.

        Args:
            params: name -> ``(T, ...)``.
            x: ``(T, S, *in_shape)``.
            num_reference: number of leading examples of each task that give the normalisation statistics; None is all.

        Returns:
            ``(T, S, out_dim)``.
        """
        return self.outputs(params, self.features(params, x, num_reference))

    def features(
        self, params: Params, x: Tensor, num_reference: int | None = None, seen: Params | None = None
    ) -> Tensor:
        """Computes the inputs of the last layer, ``(T, S, num_features)``. They do not need the last layer's weights.

        Args:
            params: name -> ``(T, ...)``. If they hold running statistics, under the names of `running_statistics`,
                these are used for normalisation instead of the batch's statistics. If they hold what `draw_dropout`
                has drawn for x, other values are dropped, and those that are kept are scaled by 1 / (1 - dropout).
            x: ``(T, S, *in_shape)``.
            num_reference: number of leading examples of each task that give the batch's statistics; None is all.
            seen: a dict to which the mean and unbiased variance of each layer's batch are added, ``(T, ...)``, by the
                names of `running_statistics`.
        """
        raise NotImplementedError(f"{type(self).__name__} has to define `features` or `__call__`")

    def outputs(self, params: Params, features: Tensor) -> Tensor:
        """Computes the last layer from its inputs, ``(T, S, num_features)`` -> ``(T, S, out_dim)``."""
        return linear(features, params["head.weight"], params["head.bias"])

    def draw_dropout(self, num_examples: int, stream: Stream) -> Params:
        """Draws which values training keeps, for `features`; nothing without dropout.

        Args:
            num_examples: S, number of examples of a task.
            stream: T streams, one for each task.

        Returns:
            Bool tensors ``(T, S, ...)``; every name starts with `DROPOUT`.
        """
        return {}

    def running_statistics(self, params: Params) -> Params:
        """Returns running statistics of normalisation before the first batch: mean 0 and variance 1.

        Args:
            params: initial parameters, without a task axis. A layer with a ``shift`` normalises.

        Returns:
            ``norm1.mean`` and ``norm1.variance``, and so on; empty if the model only normalises with its batch.
        """
        statistics = {}
        for name, value in params.items():
            if name.endswith(".shift"):
                layer = name.removesuffix(".shift")
                statistics[f"{layer}.mean"] = torch.zeros_like(value)
                statistics[f"{layer}.variance"] = torch.ones_like(value)
        return statistics

    def uses_running_statistics(self, params: Params) -> bool:
        """Returns whether parameters hold running statistics, so that an output depends on no other example."""
        statistics = self.running_statistics(params)
        return bool(statistics) and statistics.keys() <= params.keys()

    def check_features(self) -> None:
        """Checks, before a run, that the model has features.

        Raises:
            MamlError: if not.
        """
        if not self.num_features:
            raise MamlError(
                f"{type(self).__name__} has no features, which this algorithm compares or classifies: choose "
                "model=conv4; a module has features if its last layer is called head"
            )

    def renamed(self, name: str) -> str:
        """Returns the present name of a parameter that files of earlier versions call ``name``.

        A model that renames a parameter overrides this, so that older checkpoints and exported weights still load.

        Args:
            name: a parameter's name in a file, present or earlier.
        """
        return name

    def check_second_derivative(self) -> None:  # noqa: B027, most models are smooth by construction
        """Checks, before a run, that the outputs can be differentiated twice with respect to the parameters.

        Raises:
            MamlError: if not.
        """

    def linearize(self, params: Params, x: Tensor) -> Linearized:
        """Returns the model at ``params``, name -> ``(T, ...)``, and x, ``(T, N, *in_shape)``, with its derivatives.

        A model may override this with a method that is faster than autograd.
        """
        return LinearizedByAutograd(lambda moved: self(moved, x), params)


def image_shape(model: str, in_shape: Sequence[int], domain: str = "omniglot") -> tuple[int, int, int]:
    """Returns the height, width and channels of the images that a model takes.

    Args:
        model: the model's name in the config.
        in_shape: shape of one input.
        domain: a domain that fits the model, for the message.

    Raises:
        MamlError: if the inputs are not images.
    """
    if len(in_shape) != 3:
        raise MamlError(
            f"model={model} takes images (height, width, channels), but the domain's inputs are {tuple(in_shape)}; "
            f"choose domain={domain}"
        )
    height, width, channels = in_shape
    return height, width, channels


def glorot_uniform(stream: Stream, shape: tuple[int, ...], fan_in: int, fan_out: int) -> Tensor:
    """Returns weights uniform on +-sqrt(6 / (fan_in + fan_out)) (Glorot and Bengio 2010)."""
    bound = (6.0 / (fan_in + fan_out)) ** 0.5
    return stream.uniform(shape, -bound, bound)


def zeros(stream: Stream, *shape: int) -> Tensor:
    """Returns zeros on the stream's device."""
    return torch.zeros(shape, device=stream.device)


def ones(stream: Stream, *shape: int) -> Tensor:
    """Returns ones on the stream's device."""
    return torch.ones(shape, device=stream.device)
