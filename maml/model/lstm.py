"""A recurrent network, the LSTM (Hochreiter and Schmidhuber 1997; forget gate of Gers et al. 2000)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from maml.environment.distribution import Categorical
from maml.model.base import glorot_uniform, zeros
from maml.model.functional import linear, matmul
from maml.model.recurrent import Recurrent
from maml.seeding import Stream
from maml.types import Count, Params


class LSTM(Recurrent):
    """One LSTM layer, then one linear layer on the hidden state.

    PyTorch's own layer is not used, because it has no task axis and, on a GPU, no second derivatives.

    Args:
        in_shape: shape of one input, ``(L, ...)``: a sequence of length L, whose elements are flattened.
        out_dim: number of outputs.
        hidden_size: number of units of the hidden state.
    """

    distribution = Categorical

    def __init__(self, in_shape: Sequence[int], out_dim: int, hidden_size: Count = 40) -> None:
        self.element_size = math.prod(in_shape[1:])
        self.out_dim, self.hidden_size = out_dim, hidden_size
        self.num_features = hidden_size

    def init(self, stream: Stream) -> Params:
        """Draws Glorot-uniform weights. Biases are 0, but 1 for forget gates, so that cells keep their state at first.

        Rows of the weights are input, forget, candidate and output gates, in PyTorch's order.
        """
        size, fan_in = self.hidden_size, self.element_size + self.hidden_size  # a gate sees input and hidden state
        return {
            "input.weight": glorot_uniform(stream.child("input"), (4 * size, self.element_size), fan_in, size),
            "hidden.weight": glorot_uniform(stream.child("hidden"), (4 * size, size), fan_in, size),
            "gates.bias": gate_biases(stream, size),
            "head.weight": glorot_uniform(stream.child("head"), (self.out_dim, size), size, self.out_dim),
            "head.bias": zeros(stream, self.out_dim),
        }

    def states(self, params: Params, x: Tensor) -> Tensor:
        return torch.stack(list(self._hidden_states(params, x)), 2)

    def features(
        self, params: Params, x: Tensor, num_reference: int | None = None, seen: Params | None = None
    ) -> Tensor:
        """Computes the last hidden state, ``(T, S, hidden_size)``; nothing is normalised."""
        *_, last = self._hidden_states(params, x)
        return last

    def _hidden_states(self, params: Params, x: Tensor) -> Iterator[Tensor]:
        """Yields the hidden state after each element, ``(T, S, hidden_size)``."""
        tasks, examples, length = x.shape[:3]
        weight = params["hidden.weight"].transpose(1, 2)
        # The inputs' contribution to the gates, for all elements at once: (T, S, L, 4 * hidden_size).
        inputs = linear(x.reshape(tasks, examples * length, -1), params["input.weight"], params["gates.bias"])
        # The sequences of tasks that share weights are one batch.
        joined = inputs.reshape(len(weight), -1, length, 4 * self.hidden_size)
        hidden = cell = x.new_zeros(*joined.shape[:2], self.hidden_size)
        for gates in joined.unbind(2):
            hidden, cell = lstm_cell(gates + matmul(hidden, weight), cell)
            yield hidden.reshape(tasks, examples, self.hidden_size)


def gate_biases(stream: Stream, size: int) -> Tensor:
    """Returns initial biases, ``(4 * size,)``: 0, but 1 for forget gates, so that cells keep their state at first."""
    biases = zeros(stream, 4 * size)
    biases[size : 2 * size] = 1
    return biases


def lstm_cell(gates: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    """Computes the next hidden state and cell state, both ``(..., hidden_size)``.

    Args:
        gates: values of the gates before their activation, ``(..., 4 * hidden_size)``.
        cell: the cell state.
    """
    admit, keep, candidate, emit = gates.chunk(4, dim=-1)
    cell = torch.sigmoid(keep) * cell + torch.sigmoid(admit) * torch.tanh(candidate)
    return torch.sigmoid(emit) * torch.tanh(cell), cell
