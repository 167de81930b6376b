"""Matching networks (Vinyals et al. 2016): labels of the support images, weighted by attention."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from maml.algorithm.base import Parts
from maml.algorithm.embedding import Embedding
from maml.model.base import glorot_uniform, zeros
from maml.model.functional import SIMILARITIES, Similarity, for_tasks, linear, matmul
from maml.model.lstm import gate_biases, lstm_cell
from maml.seeding import Stream
from maml.types import Count, Params, PositiveFloat

_TEMPERATURE = "comparison.log_temperature"


class Matching(Embedding):
    """p(y = c | x) is the attention that x pays to the support images of class c; attention is a softmax over all.

    Args:
        parts: the domain, model, optimizers and stream.
        similarity: what the attention is a softmax of: ``cosine``, or ``euclidean``, minus the squared distance.
        score: ``attention`` sums the attention to the images of a class, as in the paper. ``sum`` sums the similarities
            instead, and takes one softmax over the classes, as in Ravi and Larochelle's code. With one shot they are
            equal.
        temperature: similarities are divided by it; 1 is the paper. If it is learnt, its initial value.
        learn_temperature: whether the temperature is learnt.
        context: full context embeddings, in which an embedding depends on the whole support set. ``none`` has none.
            ``state`` gives the attention LSTM what it read as a part of its recurrent state, as in the paper's
            equations; ``input`` as a part of its input, as in Ravi and Larochelle's code.
        num_context_steps: number of steps of the attention LSTM.
    """

    def __init__(
        self,
        parts: Parts,
        similarity: Similarity = "cosine",
        score: Literal["attention", "sum"] = "attention",
        temperature: PositiveFloat = 1.0,
        learn_temperature: bool = False,
        context: Literal["none", "state", "input"] = "none",
        num_context_steps: Count = 3,
    ) -> None:
        self._similarity = SIMILARITIES[similarity]
        self._sum_over_shots = torch.logsumexp if score == "attention" else torch.sum
        self.temperature, self.learn_temperature = temperature, learn_temperature
        self._has_context = context != "none"
        self._reads_as_input = context == "input"
        self.num_context_steps = num_context_steps
        super().__init__(parts)

    def init_comparison(self, stream: Stream) -> Params:
        """Returns the logarithm of the temperature if it is learnt, and the weights of the LSTMs if there are any."""
        params: Params = {}
        if self.learn_temperature:
            params[_TEMPERATURE] = zeros(stream, 1) + math.log(self.temperature)
        if self._has_context:
            size, attention = self.network.num_features, stream.child("attention")
            params |= _init_lstm("forward", stream.child("forward"), size, size, size)
            params |= _init_lstm("backward", stream.child("backward"), size, size, size)
            sizes = (2 * size, size) if self._reads_as_input else (size, 2 * size)
            params |= _init_lstm("attention", attention, *sizes, size)
        return params

    def scores(self, params: Params, support: Tensor, query: Tensor) -> Tensor:
        """Returns log p(y) up to a constant: a log-softmax over the classes gives log p(y)."""
        shots = support.shape[1:3]
        support = support.flatten(1, 2)
        if self._has_context:
            support = _read_in_both_directions(params, support)
            query = self._attend(params, support, query)
        similarity = self._similarity(query, support) / self._temperature(params, len(query))
        # The logsumexp of similarities is the log of the class's attention, plus a term that all classes share.
        return self._sum_over_shots(similarity.unflatten(2, shots), 2)

    def _temperature(self, params: Params, num_tasks: int) -> Tensor | float:
        if not self.learn_temperature:
            return self.temperature
        return for_tasks(params[_TEMPERATURE], num_tasks).exp().unsqueeze(2)

    def _attend(self, params: Params, support: Tensor, query: Tensor) -> Tensor:
        """Returns f(x, S), what the attention LSTM makes of query embeddings, ``(T, Q, D)`` (the paper's appendix A.2).

        Args:
            params: the weights of the LSTM.
            support: embeddings with their context, ``(T, S, D)``.
            query: embeddings without context, ``(T, Q, D)``.
        """
        cell = torch.zeros_like(query)
        # The sources do not say what the first step reads. Ravi and Larochelle's code takes the mean.
        hidden = cell if self._reads_as_input else query
        read = support.mean(1, keepdim=True).expand_as(query) if self._reads_as_input else _read(hidden, support)
        for _ in range(self.num_context_steps):
            if self._reads_as_input:
                gates = _gates(params, "attention", torch.cat([query, read], 2), hidden)
            else:
                gates = _gates(params, "attention", query, torch.cat([hidden, read], 2))
            hidden, cell = lstm_cell(gates, cell)
            hidden = hidden + query
            read = _read(hidden, support)
        return hidden


def _read(hidden: Tensor, support: Tensor) -> Tensor:
    """Returns the mean of support embeddings ``(T, S, D)``, weighted by attention, for each ``(T, Q, D)``."""
    return matmul(matmul(hidden, support.transpose(1, 2)).softmax(2), support)


def _read_in_both_directions(params: Params, support: Tensor) -> Tensor:
    """Returns g(x_i, S): the sum of an embedding and the hidden states of two LSTMs at it, ``(T, S, D)``."""
    outputs = support
    for name, images in (("forward", support), ("backward", support.flip(1))):
        hidden = cell = torch.zeros_like(support[:, :1])
        states = []
        for image in images.split(1, dim=1):
            hidden, cell = lstm_cell(_gates(params, name, image, hidden), cell)
            states.append(hidden)
        in_order = states if name == "forward" else states[::-1]
        outputs = outputs + torch.cat(in_order, 1)
    return outputs


def _init_lstm(name: str, stream: Stream, num_inputs: int, state_size: int, hidden_size: int) -> Params:
    """Draws the weights of an LSTM as those of `maml.model.lstm.LSTM`."""
    fan_in = num_inputs + state_size
    shapes = {"input": (4 * hidden_size, num_inputs), "state": (4 * hidden_size, state_size)}
    weights = {
        f"comparison.{name}.{kind}": glorot_uniform(stream.child(kind), shape, fan_in, hidden_size)
        for kind, shape in shapes.items()
    }
    return weights | {f"comparison.{name}.bias": gate_biases(stream, hidden_size)}


def _gates(params: Params, name: str, inputs: Tensor, state: Tensor) -> Tensor:
    """Returns the gates of an LSTM from its inputs, ``(T, Q, num_inputs)``, and state, ``(T, Q, state_size)``."""
    weights = torch.cat([params[f"comparison.{name}.{kind}"] for kind in ("input", "state")], dim=2)
    return linear(torch.cat([inputs, state], 2), weights, params[f"comparison.{name}.bias"])
