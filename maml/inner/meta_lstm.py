"""Adaptation by a meta-learnt LSTM whose cell state is the parameters (Ravi and Larochelle 2017, section 3)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from maml.inner.base import Inner
from maml.pictures import Lines, Picture
from maml.seeding import Stream
from maml.types import Count, Params, PositiveFloat

_P = 10  # the scale of `preprocess`
_GATES = ("forget", "input")


class MetaLSTM(Inner):
    """theta' = f theta - i gradient, with gates f and i that an LSTM computes for each number in theta.

    The first layer is an LSTM that reads the loss and the number's gradient. The second computes the gates from its
    hidden state h, the number, and the gate's own last value before the sigmoid:

        f~' = w_f [h, theta, f~] + b_f,    f = sigmoid(f~'),    and so for i.

    All numbers share the weights, but each has a state of its own. The weights are part of theta, as
    ``inner.lstm.weight`` and so on. At first f is about 0.99 and i about 0.01, which is nearly gradient descent.

    Args:
        num_steps: number of steps in training (evaluation has its own number).
        order: 1 treats the loss and the gradient that the LSTM reads as constants, as in the source, and differentiates
            through the LSTM and its gates; 2 differentiates through all.
        hidden_size: number of units of the first layer.
        loss_scale: factor of the domain's loss. The source has the mean over the support examples; the loss of
            classification is N times that.
        gradient_divisor: the gradient is divided by this after the loss was scaled. 1 is the paper; the source's code
            divides the gradient of the mean by the number of support examples once more.
    """

    has_step_size = False
    method = "meta-learner LSTM"

    def __init__(
        self,
        num_steps: Count,
        order: Literal[1, 2],
        adapt: list[str],
        hidden_size: Count = 20,
        loss_scale: PositiveFloat = 1.0,
        gradient_divisor: PositiveFloat = 1.0,
    ) -> None:
        super().__init__(math.nan, num_steps, order, adapt)
        self.hidden_size, self.loss_scale = hidden_size, loss_scale
        self.gradient_scale = loss_scale / gradient_divisor

    def init_learned(self, params: Params, stream: Stream) -> Params:
        size = self.hidden_size
        # Rows: input, forget and output gate, candidate. Columns: two of the loss, two of the gradient, hidden state.
        shapes = {"lstm.weight": (4 * size, 4 + size), "lstm.bias": (4 * size,)}
        ranges = {name: (-0.01, 0.01) for name in shapes}
        for gate, bias_range in (("forget", (4.0, 5.0)), ("input", (-5.0, -4.0))):
            shapes |= {f"{gate}.weight": (size + 2,), f"{gate}.bias": (1,)}  # columns: hidden state, theta, last value
            ranges |= {f"{gate}.weight": (-0.01, 0.01), f"{gate}.bias": bias_range}
        return {f"inner.{name}": stream.child(name).uniform(shape, *ranges[name]) for name, shape in shapes.items()}

    def init_state(self, params: Params) -> Params:
        """Returns zeros. P is the number of numbers of a task that adapt, in the order of `_join`.

        The state is ``hidden`` and ``cell``, ``(T, hidden_size, P)``, and the values of the gates before the sigmoid,
        ``forget`` and ``input``, ``(T, P)``.
        """
        first = next(iter(params.values()))
        count, size = len(first), sum(value[0].numel() for value in params.values())
        state = {name: first.new_zeros(count, self.hidden_size, size) for name in ("hidden", "cell")}
        return state | {name: first.new_zeros(count, size) for name in _GATES}

    def update(
        self, params: Params, losses: Tensor, gradients: Params, state: Params, step: int, step_size: float | None
    ) -> tuple[Params, Params]:
        # One matrix for all parameters: the numbers are last, so that a gate of all of them is one block of memory.
        theta, gradient = _join({name: params[name] for name in gradients}), _join(gradients) * self.gradient_scale
        hidden, cell = self._read(params, losses * self.loss_scale, gradient, state)
        new, gates = {"hidden": hidden, "cell": cell}, {}
        # The share of the hidden state in both gates, (T, 2, P).
        weights = torch.stack([params[f"inner.{gate}.weight"] for gate in _GATES], 1)
        shares = weights[:, :, : self.hidden_size] @ hidden
        for gate, share, weight in zip(_GATES, shares.unbind(1), weights.unbind(1), strict=True):
            of_theta, of_last = weight[:, -2:].split(1, dim=1)
            new[gate] = share + params[f"inner.{gate}.bias"] + of_theta * theta + of_last * state[gate]
            gates[gate] = new[gate].sigmoid()
        return _split(gates["forget"] * theta - gates["input"] * gradient, gradients), new

    def pictures(self, steps: Iterator[tuple[Params, Params]]) -> dict[str, Picture]:
        """Returns the mean of each gate over the numbers of a layer and over the tasks, step by step."""
        next(steps, None)  # theta, for which there are no gates
        lines: dict[str, dict[str, list[float]]] = {gate: {} for gate in _GATES}
        num_steps = 0
        for num_steps, (params, state) in enumerate(steps, start=1):  # noqa: B007, the last number is used
            adapted = {name: params[name] for name in self.adapted_names(list(params))}
            for gate in _GATES:
                for layer, mean in _layer_means(_split(state[gate].sigmoid(), adapted)).items():
                    lines[gate].setdefault(layer, []).append(mean)
        return {
            f"{gate}_gate": Lines(
                f"{gate} gate, mean of each layer", "step", gate, lines[gate], range(1, 1 + num_steps)
            )
            for gate in _GATES
            if num_steps
        }

    def _read(self, params: Params, losses: Tensor, gradient: Tensor, state: Params) -> tuple[Tensor, Tensor]:
        """Returns the next hidden state and cell state of the first layer, ``(T, hidden_size, P)``."""
        weight = params["inner.lstm.weight"]
        # The loss of a task is the same for all numbers.
        of_loss = weight[:, :, :2] @ preprocess(losses.unsqueeze(1)) + params["inner.lstm.bias"].unsqueeze(2)
        inputs = torch.cat([preprocess(gradient), state["hidden"]], 1)
        admit, keep, emit, candidate = torch.baddbmm(of_loss, weight[:, :, 2:], inputs).chunk(4, dim=1)
        cell = keep.sigmoid() * state["cell"] + admit.sigmoid() * candidate.tanh()
        return emit.sigmoid() * cell.tanh(), cell


def preprocess(values: Tensor) -> Tensor:
    """Returns the size and the sign of numbers of any scale, both of about 1: ``(T, P)`` -> ``(T, 2, P)``.

    With p = 10: (log|v| / p, sign v) if |v| >= e^-p, else (-1, e^p v) (Andrychowicz et al. 2016, appendix A).
    """
    # Bounded in this way, neither has an infinite derivative.
    sizes = values.abs().clamp(min=math.exp(-_P)).log() / _P
    return torch.stack([sizes, (values * math.exp(_P)).clamp(-1, 1)], 1)


def _join(params: Params) -> Tensor:
    """Returns all numbers of each task, ``(T, P)``."""
    return torch.cat([value.reshape(len(value), -1) for value in params.values()], 1)


def _split(joined: Tensor, like: Params) -> Params:
    """Splits what `_join` has joined, with the names and shapes of ``like``."""
    parts = joined.split([value[0].numel() for value in like.values()], dim=1)
    return {name: part.view_as(value) for (name, value), part in zip(like.items(), parts, strict=True)}


def _layer_means(params: Params) -> dict[str, float]:
    """Returns the mean of all numbers of each layer. A layer's parameters have its name before the last dot."""
    layers: dict[str, list[Tensor]] = {}
    for name, value in params.items():
        layers.setdefault(name.rpartition(".")[0] or name, []).append(value.flatten())
    return {layer: torch.cat(values).mean().item() for layer, values in layers.items()}
