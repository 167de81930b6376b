"""What a model is: a function of parameters and inputs, with no state of its own."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from maml.model.linearized import Linearized, LinearizedByAutograd
from maml.seeding import Stream
from maml.types import Params


class Model(ABC):
    """The network f_theta; its parameters are arguments, with a leading task axis.

    A subclass's constructor takes ``in_shape`` (of one input) and ``out_dim`` first: the domain supplies them. The last
    layer's parameters are called ``head.weight`` and ``head.bias``.
    """

    @abstractmethod
    def init(self, stream: Stream) -> Params:
        """Draws initial parameters, name -> tensor without a task axis."""

    @abstractmethod
    def __call__(self, params: Params, x: Tensor, num_reference: int | None = None) -> Tensor:
        """Computes the outputs of T tasks.

        Args:
            params: name -> ``(T, ...)``.
            x: ``(T, S, *in_shape)``.
            num_reference: how many leading examples of each task give the normalisation statistics (None: all).

        Returns:
            ``(T, S, out_dim)``.
        """

    def renamed(self, name: str) -> str:
        """Returns the present name of a parameter that files of earlier versions call ``name``.

        A model that renames a parameter overrides this, so that older checkpoints and exported weights still load.

        Args:
            name: name of a parameter in a file, present or earlier.
        """
        return name

    def linearize(self, params: Params, x: Tensor) -> Linearized:
        """Returns the model at ``params``, name -> ``(T, ...)``, and x, ``(T, N, *in_shape)``, with its derivatives.

        A model may override this by something faster than autograd.
        """
        return LinearizedByAutograd(lambda moved: self(moved, x), params)


def glorot_uniform(stream: Stream, shape: tuple[int, ...], fan_in: int, fan_out: int) -> Tensor:
    """Returns weights uniform on +-sqrt(6 / (fan_in + fan_out)) (Glorot and Bengio 2010)."""
    bound = (6.0 / (fan_in + fan_out)) ** 0.5
    return stream.uniform(shape, -bound, bound)


def zeros(stream: Stream, *shape: int) -> Tensor:
    """Returns zeros on the stream's device."""
    return torch.zeros(shape, device=stream.device)
