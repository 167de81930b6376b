"""A memory-augmented neural network (Santoro et al. 2016): an LSTM with a memory of least-recently-used access."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from maml.errors import MamlError
from maml.model.base import glorot_uniform, zeros
from maml.model.functional import linear, matmul
from maml.model.lstm import gate_biases, lstm_cell
from maml.model.recurrent import Recurrent
from maml.seeding import Stream
from maml.types import Count, Decay, Params

_FIRST_MEMORY = 1e-6  # content of every slot at the start of a sequence
_EPS = 1e-8  # added to the product of lengths in a cosine: an empty slot has none


class _State(NamedTuple):
    """The state after an element, for P sequences of each of G copies of the weights.

    Attributes:
        hidden: hidden state of the LSTM, ``(G, P, hidden_size)``.
        cell: cell state of the LSTM, the same shape.
        memory: ``(G * P, num_slots, slot_size)``.
        read_weights: ``(G * P, num_heads, num_slots)``.
        usage: how much and how recently each slot was read or written, ``(G * P, num_slots)``.
        reads: what was read, head by head, ``(G, P, num_heads * slot_size)``.
    """

    hidden: Tensor
    cell: Tensor
    memory: Tensor
    read_weights: Tensor
    usage: Tensor
    reads: Tensor


class MANN(Recurrent):
    """An LSTM that writes to and reads from a memory at each element of a sequence (docs/protocol.md#mann).

    The memory starts empty for each sequence, and a write goes to the slots that were read last or to those that were
    used least. The last layer sees the hidden state and what was read.

    Args:
        in_shape: shape of one input, ``(L, ...)``: a sequence of length L, whose elements are flattened.
        out_dim: number of outputs.
        hidden_size: number of units of the LSTM.
        num_slots: number of slots of the memory.
        slot_size: numbers in a slot.
        num_heads: number of read heads, and of write heads.
        usage_decay: gamma, by which usage fades at each element.
        writes: what is written: the ``key`` itself that is then looked for, as in the paper, or a ``vector`` of its
            own, as in two known re-implementations.
        reads: the memory in which a key is looked for: that ``after_write``, as in the paper, or that
            ``before_write``, as in one re-implementation. Reads always return the content after the write.

    Raises:
        MamlError: if there are more heads than slots.
    """

    def __init__(
        self,
        in_shape: Sequence[int],
        out_dim: int,
        hidden_size: Count = 200,
        num_slots: Count = 128,
        slot_size: Count = 40,
        num_heads: Count = 4,
        usage_decay: Decay = 0.95,
        writes: Literal["key", "vector"] = "key",
        reads: Literal["after_write", "before_write"] = "after_write",
    ) -> None:
        if num_heads > num_slots:
            raise MamlError(
                f"model.num_heads={num_heads}, but model.num_slots={num_slots}: each head needs a slot of its own to "
                "write to; lower num_heads"
            )
        self.element_size, self.out_dim = math.prod(in_shape[1:]), out_dim
        self.hidden_size, self.num_slots, self.slot_size = hidden_size, num_slots, slot_size
        self.num_heads, self.usage_decay = num_heads, usage_decay
        self.writes, self.reads = writes, reads
        self.num_features = hidden_size + num_heads * slot_size

    def init(self, stream: Stream) -> Params:
        """Draws Glorot-uniform weights. Biases are 0, but 1 for forget gates, as in the project's LSTM.

        Departure: how Santoro et al. drew the initial weights is not published.
        """
        size, read_size = self.hidden_size, self.num_heads * self.slot_size
        fan_in = self.element_size + size + read_size  # a gate sees all of these
        shapes = {
            "input.weight": (4 * size, self.element_size, fan_in, size),
            "hidden.weight": (4 * size, size, fan_in, size),
            "reads.weight": (4 * size, read_size, fan_in, size),
            "key.weight": (read_size, size, size, read_size),
            "vector.weight": (read_size, size, size, read_size),
            "gate.weight": (self.num_heads, size, size, self.num_heads),
            "head.weight": (self.out_dim, self.num_features, self.num_features, self.out_dim),
        }
        if self.writes == "key":
            del shapes["vector.weight"]
        params = {"gates.bias": gate_biases(stream, size)}
        for name, (rows, columns, fan_in, fan_out) in shapes.items():
            layer = name.removesuffix(".weight")
            params[name] = glorot_uniform(stream.child(layer), (rows, columns), fan_in, fan_out)
            if layer not in ("input", "hidden", "reads"):
                params[f"{layer}.bias"] = zeros(stream, rows)
        return params

    def states(self, params: Params, x: Tensor) -> Tensor:
        tasks, examples, length = x.shape[:3]
        # The inputs' contribution to the gates, for all elements at once.
        inputs = linear(x.reshape(tasks, examples * length, -1), params["input.weight"], params["gates.bias"])
        # The sequences of tasks that share weights are one batch: (G, P, L, 4 * hidden_size).
        joined = inputs.reshape(params["gates.bias"].shape[0], -1, length, 4 * self.hidden_size)
        # One product of hidden state and reads gives all gates, and one product gives all that the heads need.
        recurrent = torch.cat([params["hidden.weight"], params["reads.weight"]], 2).transpose(1, 2)
        layers = ["key", "gate"] + (["vector"] if self.writes == "vector" else [])
        weight, bias = (torch.cat([params[f"{layer}.{kind}"] for layer in layers], 1) for kind in ("weight", "bias"))
        state, states = self._first_state(joined), []
        for gates in joined.unbind(2):
            gates = gates + matmul(torch.cat([state.hidden, state.reads], 2), recurrent)
            hidden, cell = lstm_cell(gates, state.cell)
            state = self._access(state, hidden, cell, linear(hidden, weight, bias))
            states.append(torch.cat([state.hidden, state.reads], 2))
        return torch.stack(states, 2).reshape(tasks, examples, length, -1)

    def _first_state(self, inputs: Tensor) -> _State:
        """Returns the state before the first element, given the inputs of `states`, ``(G, P, ...)``."""
        groups, count = inputs.shape[:2]
        hidden = inputs.new_zeros(groups, count, self.hidden_size)
        at_first = inputs.new_zeros(groups * count, self.num_slots)
        at_first[:, 0] = 1
        return _State(
            hidden,
            hidden,
            inputs.new_full((groups * count, self.num_slots, self.slot_size), _FIRST_MEMORY),
            at_first.unsqueeze(1).expand(-1, self.num_heads, -1),
            at_first,
            inputs.new_zeros(groups, count, self.num_heads * self.slot_size),
        )

    def _access(self, before: _State, hidden: Tensor, cell: Tensor, interface: Tensor) -> _State:
        """Writes to the memory and reads from it.

        Args:
            before: the state of t - 1.
            hidden: the hidden state h_t, ``(G, P, hidden_size)``.
            cell: the cell state, the same shape.
            interface: what linear layers on h_t tell the heads: keys, gates and perhaps vectors.

        Returns:
            The state of t.
        """
        size = self.num_heads * self.slot_size
        told = interface.flatten(0, 1)
        keys = torch.tanh(told[:, :size]).unflatten(1, (self.num_heads, -1))  # k_t
        gate = torch.sigmoid(told[:, size : size + self.num_heads]).unsqueeze(2)  # sigma(alpha)
        written = keys if self.writes == "key" else torch.tanh(told[:, -size:]).unflatten(1, (self.num_heads, -1))

        # The slots of the lowest usage, as many as heads; of equal ones, the first. A head may write to all of them.
        # The order is fixed so that it is the same on all devices.
        least = before.usage.argsort(dim=1, stable=True)[:, : self.num_heads]
        slots = torch.arange(self.num_slots, device=least.device)
        is_least_used = (least.unsqueeze(2) == slots).any(1).to(keys.dtype).unsqueeze(1)  # w^lu, (G * P, 1, num_slots)
        write_weights = gate * before.read_weights + (1 - gate) * is_least_used
        is_kept = (least[:, :1] != slots).to(keys.dtype).unsqueeze(2)  # the least used slot is erased first
        memory = torch.baddbmm(before.memory * is_kept, write_weights.transpose(1, 2), written)

        searched = memory if self.reads == "after_write" else before.memory
        lengths = torch.linalg.vector_norm(keys, dim=2).unsqueeze(2)
        lengths = lengths * torch.linalg.vector_norm(searched, dim=2).unsqueeze(1)
        cosines = torch.bmm(keys, searched.transpose(1, 2)) / (lengths + _EPS)
        read_weights = cosines.softmax(2)
        reads = torch.bmm(read_weights, memory).reshape(*hidden.shape[:2], size)

        # Usage only ranks the slots, so it needs no gradient.
        usage = self.usage_decay * before.usage + (read_weights + write_weights).detach().sum(1)
        return _State(hidden, cell, memory, read_weights, usage, reads)
