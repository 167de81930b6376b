"""The interface of a model: a function of parameters and inputs, without state."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from maml.environment.distribution import Distribution
from maml.model.linearized import Linearized, LinearizedByAutograd
from maml.seeding import Stream
from maml.types import Params


class Model(ABC):
    """The network f_theta; its parameters are arguments, with a leading task axis.

    The first arguments of a subclass's constructor are ``in_shape``, the shape of one input, and ``out_dim``, the
    number of outputs; the domain supplies both. The last layer's parameters are called ``head.weight`` and
    ``head.bias``.

    Class attributes:
        distribution: the distribution of actions whose outputs the model gives, if it acts as a policy; None fits any.
    """

    distribution: type[Distribution] | None = None

    @abstractmethod
    def init(self, stream: Stream) -> Params:
        """Draws initial parameters, name -> tensor without a task axis."""

    @abstractmethod
    def __call__(self, params: Params, x: Tensor, num_reference: int | None = None) -> Tensor:
        """Computes the outputs of T tasks.

        Args:
            params: name -> ``(T, ...)``.
            x: ``(T, S, *in_shape)``.
            num_reference: number of leading examples of each task that give the normalisation statistics; None is all.

        Returns:
            ``(T, S, out_dim)``.
        """

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


def glorot_uniform(stream: Stream, shape: tuple[int, ...], fan_in: int, fan_out: int) -> Tensor:
    """Returns weights uniform on +-sqrt(6 / (fan_in + fan_out)) (Glorot and Bengio 2010)."""
    bound = (6.0 / (fan_in + fan_out)) ** 0.5
    return stream.uniform(shape, -bound, bound)


def zeros(stream: Stream, *shape: int) -> Tensor:
    """Returns zeros on the stream's device."""
    return torch.zeros(shape, device=stream.device)
