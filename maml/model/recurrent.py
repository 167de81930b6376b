"""The interface of a recurrent network, which reads a sequence and has outputs after each of its elements."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor

from maml.model.base import Model
from maml.types import Params


class Recurrent(Model):
    """Reads sequences element by element, and carries a state from one to the next.

    An input is a sequence, ``(L, ...)``, whose elements are flattened. The model's outputs are those after the last
    element, as those of any `Model`; `outputs_of_each` has those after every element.
    """

    @abstractmethod
    def states(self, params: Params, x: Tensor) -> Tensor:
        """Computes the inputs of the last layer after every element of a sequence.

        Args:
            params: name -> ``(T, ...)``, or one copy that tasks share.
            x: sequences, ``(T, S, L, ...)``.

        Returns:
            ``(T, S, L, num_features)``.
        """

    def outputs_of_each(self, params: Params, x: Tensor) -> Tensor:
        """Computes the outputs after every element, ``(T, S, L, out_dim)``; arguments as in `states`."""
        states = self.states(params, x)
        return self.outputs(params, states.flatten(1, 2)).unflatten(1, states.shape[1:3])

    def features(
        self, params: Params, x: Tensor, num_reference: int | None = None, seen: Params | None = None
    ) -> Tensor:
        """Computes the inputs of the last layer after the last element, ``(T, S, num_features)``.

        Nothing is normalised.
        """
        return self.states(params, x)[:, :, -1]
