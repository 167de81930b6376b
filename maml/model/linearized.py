"""Exact derivatives of a model along directions of its parameters: products with Jacobians and Hessians."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from maml.model.functional import ACTIVATIONS, Activation
from maml.types import Params

Backward = Callable[[Tensor], Params]
Forward = Callable[[Params], tuple[Tensor, Backward]]

# Rows of one task that a CPU takes through all layers before the next ones. Milliseconds of a Hessian product, float32,
# one core with 1 MB of L2 cache, hidden layers of 100 and 100:
#   rows                                256   512   1024   2048
#   N = 2000, 2 inputs, 2 outputs      3.8   3.4    3.2    3.1
#   N = 4000, 20 inputs, 6 outputs     8.7   7.9    7.5    7.7
BLOCK = 1024

# What torch's compiler makes of a linear layer on a CPU: up to twice as fast as `torch.bmm` on AMD's processors, whose
# vector units that does not use in full; a whole product of curvature and vector takes a fifth less time. Sums of outer
# products gain only where both sides are wide.
_ONEDNN_LINEAR: Any = (
    getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
)
_WIDE = 64


class Linearized(ABC):
    """A model at given parameters and inputs, whose parameters then move along directions.

    A direction has the names and the shapes ``(T, ...)`` of the parameters. Tasks are independent.

    Attributes:
        outputs: ``(T, N, D)``.
    """

    outputs: Tensor

    @abstractmethod
    def jvp(self, v: Params) -> Tensor:
        """Returns the directional derivative of the outputs along ``v``, ``(T, N, D)``."""

    @abstractmethod
    def vjp(self, delta: Tensor) -> Params:
        """Returns the gradient of each task's sum of ``delta * outputs``, delta ``(T, N, D)``."""

    @abstractmethod
    def second_order(self, delta: Tensor) -> Forward:
        """Prepares the derivative of ``vjp(delta)`` where the parameters and delta move together.

        Returns:
            A function of a direction ``v``; it returns the outputs' derivative dy along v, and a function that takes
            how delta moves, ``(T, N, D)``, and returns how ``vjp(delta)`` does.
        """

    def hessian(self, delta: Tensor, output_hessian: Callable[[Tensor], Tensor]) -> Callable[[Params], Params]:
        """Returns the product of a direction with the Hessian of each task's loss l(outputs) (Pearlmutter 1994).

        Args:
            delta: dl/dy at the outputs, ``(T, N, D)``.
            output_hessian: dy -> (d^2 l / dy^2) dy, both ``(T, N, D)``.
        """
        forward = self.second_order(delta)

        def product(v: Params) -> Params:
            dy, backward = forward(v)
            return backward(output_hessian(dy))

        return product


class LinearizedByAutograd(Linearized):
    """Any model, by differentiating its graph again.

    Args:
        model: the outputs ``(T, N, D)`` as a function of the parameters.
        params: name -> ``(T, ...)``.
    """

    def __init__(self, model: Callable[[Params], Tensor], params: Params) -> None:
        self._params = {name: value.detach().requires_grad_() for name, value in params.items()}
        with torch.enable_grad():
            self._outputs = model(self._params)
        self.outputs = self._outputs.detach()

    def jvp(self, v: Params) -> Tensor:
        delta, gradient = self._at_zero
        return _again(gradient, [delta], v)[0]

    def vjp(self, delta: Tensor) -> Params:
        return self._vjp(delta, create_graph=False)

    def second_order(self, delta: Tensor) -> Forward:
        delta = delta.detach().requires_grad_()
        gradient = self._vjp(delta, create_graph=True)

        def forward(v: Params) -> tuple[Tensor, Backward]:
            dy, *moved = _again(gradient, [delta, *self._params.values()], v)

            def backward(moved_delta: Tensor) -> Params:
                direct = self.vjp(moved_delta)
                return {name: direct[name] + part for name, part in zip(direct, moved, strict=True)}

            return dy, backward

        return forward

    @cached_property
    def _at_zero(self) -> tuple[Tensor, Params]:
        """J^T delta is linear in delta, so its derivative, J, may be taken at 0."""
        delta = torch.zeros_like(self.outputs).requires_grad_()
        return delta, self._vjp(delta, create_graph=True)

    def _vjp(self, delta: Tensor, create_graph: bool) -> Params:
        gradient = torch.autograd.grad(
            self._outputs,
            list(self._params.values()),
            delta,
            retain_graph=True,
            create_graph=create_graph,
            materialize_grads=True,
        )
        return dict(zip(self._params, gradient, strict=True))


def _again(gradient: Params, wanted: list[Tensor], v: Params) -> tuple[Tensor, ...]:
    """Differentiates the sum of ``gradient * v``."""
    names = [name for name, value in gradient.items() if value.requires_grad]  # not of what the outputs do not use
    return torch.autograd.grad(
        [gradient[name] for name in names],
        wanted,
        [v[name] for name in names],
        retain_graph=True,
        materialize_grads=True,
    )


# The derivative s of each activation, and the derivative of log s, as functions of what the activation returned.
_SLOPES: dict[Activation, Callable[[Tensor], Tensor]] = {
    "relu": torch.sign,
    "softplus": lambda y: -torch.expm1(-y),
    "tanh": lambda y: 1 - y.square(),
}
_BENDS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "softplus": lambda y: torch.exp(-y),
    "tanh": lambda y: -2 * y,
}


@dataclass
class _Block:
    """Some rows of some tasks on their way through the layers.

    Attributes:
        at: index of the block in ``(T, N)``.
        inputs: the inputs of each layer, ``(t, n, D_i)``.
        slopes: derivatives of the activations that made them, but for the first.
    """

    at: tuple[slice, slice]
    inputs: list[Tensor] = field(default_factory=list)
    slopes: list[Tensor] = field(default_factory=list)


class LinearizedMLP(Linearized):
    """Linear layers with an activation between them, by hand.

    On a GPU all tasks and rows are batched; a CPU takes blocks that stay in its cache.

    Args:
        params: ``<layer>.weight``, ``(T, O, I)``, and ``<layer>.bias``, ``(T, O)``, of each layer.
        x: ``(T, N, I)``.
        layers: their names, from the first to the last.
        activation: after all layers but the last.
    """

    def __init__(self, params: Params, x: Tensor, layers: Sequence[str], activation: Activation) -> None:
        self._names = [(f"{layer}.weight", f"{layer}.bias") for layer in layers]
        params = {name: params[name].detach() for names in self._names for name in names}
        self._params, self._bend = params, _BENDS.get(activation)
        self._blocks = [_Block(at) for at in _blocks(x)]
        self.outputs = x.new_empty(*x.shape[:2], params[self._names[-1][0]].shape[1])
        for block in self._blocks:
            y = x.detach()[block.at]
            for i, (weight, bias) in enumerate(self._layers(params, block)):
                if i > 0:
                    y = ACTIVATIONS[activation](y)
                    block.slopes.append(_SLOPES[activation](y))
                block.inputs.append(y)
                y = _linear(y, weight, bias)
            self.outputs[block.at] = y

    def jvp(self, v: Params) -> Tensor:
        dy = torch.empty_like(self.outputs)
        for block in self._blocks:
            dy[block.at] = self._tangents(block, v)[-1]
        return dy

    def vjp(self, delta: Tensor) -> Params:
        sums = self._zeros()
        for block in self._blocks:
            for (weight, bias), x, signal in zip(
                self._layers(sums, block), block.inputs, self._backpropagated(block, delta)[0], strict=True
            ):
                _add_outer(weight, signal, x)
                bias += signal.sum(1)
        return sums

    def second_order(self, delta: Tensor) -> Forward:
        backpropagated = [self._backpropagated(block, delta) for block in self._blocks]

        def forward(v: Params) -> tuple[Tensor, Backward]:
            tangents = [self._tangents(block, v) for block in self._blocks]
            dy = torch.empty_like(self.outputs)
            for block, (*_, last) in zip(self._blocks, tangents, strict=True):
                dy[block.at] = last

            def backward(moved_delta: Tensor) -> Params:
                sums = self._zeros()
                for block, moved_inputs, (signals, bends) in zip(self._blocks, tangents, backpropagated, strict=True):
                    weights, directions = self._layers(self._params, block), self._layers(v, block)
                    moved = moved_delta[block.at]
                    for i, (weight, bias) in reversed(list(enumerate(self._layers(sums, block)))):
                        _add_outer(weight, moved, block.inputs[i])
                        bias += moved.sum(1)
                        if i > 0:
                            _add_outer(weight, signals[i], moved_inputs[i - 1])
                            moved = _linear(moved, weights[i][0].mT)
                            moved = moved.add_(_linear(signals[i], directions[i][0].mT)).mul_(block.slopes[i - 1])
                            if bends:
                                moved.addcmul_(bends[i - 1], moved_inputs[i - 1])
                return sums

            return dy, backward

        return forward

    def _tangents(self, block: _Block, v: Params) -> list[Tensor]:
        """Returns the derivatives along ``v`` of the inputs of all layers but the first, then of the outputs."""
        tangents: list[Tensor] = []
        layers = zip(self._layers(self._params, block), self._layers(v, block), block.inputs, strict=True)
        for i, ((weight, _), (moved_weight, moved_bias), x) in enumerate(layers):
            tangent = _linear(x, moved_weight, moved_bias)
            if i > 0:
                tangent += _linear(tangents[-1].mul_(block.slopes[i - 1]), weight)
            tangents.append(tangent)
        return tangents

    def _backpropagated(self, block: _Block, delta: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Returns delta at the outputs of each linear layer, and what a bent activation adds to its derivative.

        The latter are factors of the derivatives of the inputs of all layers but the first; none for a ReLU.
        """
        signal = delta.detach()[block.at]
        signals, bends = [signal], []
        weights = self._layers(self._params, block)
        for i in reversed(range(1, len(weights))):
            signal = _linear(signal, weights[i][0].mT)
            if self._bend is not None:
                bends.append(signal * self._bend(block.inputs[i]))
            signal.mul_(block.slopes[i - 1])
            signals.append(signal)
        return signals[::-1], bends[::-1]

    def _layers(self, params: Params, block: _Block) -> list[tuple[Tensor, Tensor]]:
        """Returns weight and bias of each layer, of the block's tasks."""
        tasks = block.at[0]
        return [(params[weight][tasks], params[bias][tasks]) for weight, bias in self._names]

    def _zeros(self) -> Params:
        """Returns what gradients are summed in, with the longer side of a weight last in memory: 8 times faster."""
        sums: Params = {}
        for weight, bias in self._names:
            tasks, num_out, num_in = self._params[weight].shape
            longer_last = self.outputs.new_zeros(tasks, min(num_in, num_out), max(num_in, num_out))
            sums[weight] = longer_last if num_out <= num_in else longer_last.mT
            sums[bias] = self.outputs.new_zeros(tasks, num_out)
        return sums


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Returns ``x W^T + b`` of each task: ``(T, N, I)``, ``(T, O, I)``, ``(T, O)`` -> ``(T, N, O)``."""
    if _has_onednn(x):
        return _ONEDNN_LINEAR(x[0], weight[0], None if bias is None else bias[0], "none", [], "").unsqueeze(0)
    y = torch.bmm(x, weight.mT)
    return y if bias is None else y.add_(bias.unsqueeze(1))


def _add_outer(total: Tensor, y: Tensor, x: Tensor) -> None:
    """Adds ``y^T x`` of each task to the total: ``(T, O, I)``, ``(T, N, O)``, ``(T, N, I)``."""
    if _has_onednn(x) and min(x.shape[-1], y.shape[-1]) >= _WIDE:
        total[0] += _ONEDNN_LINEAR(y[0].T, x[0].T, None, "none", [], "")
    else:
        total.baddbmm_(y.mT, x)


def _has_onednn(x: Tensor) -> bool:
    return _ONEDNN_LINEAR is not None and x.shape[0] == 1 and x.device.type == "cpu" and x.dtype == torch.float32


def _blocks(x: Tensor) -> Iterator[tuple[slice, slice]]:
    if x.device.type != "cpu":
        yield slice(None), slice(None)
        return
    for task in range(x.shape[0]):
        for start in range(0, x.shape[1], BLOCK):
            yield slice(task, task + 1), slice(start, start + BLOCK)
