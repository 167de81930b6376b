"""Exact products with a model's Jacobians and Hessians, that is, derivatives along directions of its parameters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from maml.hardware.products import add_outer, linear
from maml.model.functional import ACTIVATIONS, Activation
from maml.types import Params

Backward = Callable[[Tensor], Params]
Forward = Callable[[Params], tuple[Tensor, Backward]]

# Number of rows of one task that a CPU passes through all layers at once. Milliseconds of a Hessian product, float32,
# one core with 1 MB of L2 cache, hidden layers of 100 and 100:
#   rows                                256   512   1024   2048
#   N = 2000, 2 inputs, 2 outputs      3.8   3.4    3.2    3.1
#   N = 4000, 20 inputs, 6 outputs     8.7   7.9    7.5    7.7
BLOCK = 1024


class Linearized(ABC):
    """A model at given parameters and inputs, with its derivatives along directions of the parameters.

    A direction has the names and the shapes, ``(T, ...)``, of the parameters. Tasks are independent.

    Attributes:
        outputs: the model's outputs, ``(T, N, D)``.
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
        """Prepares the derivative of ``vjp(delta)`` for a change of both the parameters and delta.

        Returns:
            A function of a direction ``v``. It returns the derivative of the outputs along v, and a second function,
            which maps the derivative of delta, ``(T, N, D)``, to the derivative of ``vjp(delta)``.
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
    """Derivatives of any model, by differentiating its graph twice.

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
    names = [name for name, value in gradient.items() if value.requires_grad]  # only parameters that are used
    return torch.autograd.grad(
        [gradient[name] for name in names],
        wanted,
        [v[name] for name in names],
        retain_graph=True,
        materialize_grads=True,
    )


# The derivative s of each activation, and the derivative of log s, as functions of the activation's output.
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
    """A block of t tasks and n rows, with the values that its layers computed.

    Attributes:
        at: index of the block in ``(T, N)``.
        inputs: inputs of each layer, ``(t, n, D_i)``.
        slopes: derivatives of the activations before each layer, except for the first layer.
    """

    at: tuple[slice, slice]
    inputs: list[Tensor] = field(default_factory=list)
    slopes: list[Tensor] = field(default_factory=list)


class LinearizedMLP(Linearized):
    """Derivatives of linear layers with an activation between them, without autograd.

    On a GPU, all tasks and rows are one batch. On a CPU, they are computed in blocks that fit its cache.

    Args:
        params: ``<layer>.weight``, ``(T, O, I)``, and ``<layer>.bias``, ``(T, O)``, of each layer.
        x: inputs, ``(T, N, I)``.
        layers: names of the layers, from the first to the last.
        activation: activation function after all layers except the last.
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
                y = linear(y, weight, bias)
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
                add_outer(weight, signal, x)
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
                        add_outer(weight, moved, block.inputs[i])
                        bias += moved.sum(1)
                        if i > 0:
                            add_outer(weight, signals[i], moved_inputs[i - 1])
                            moved = linear(moved, weights[i][0].mT)
                            moved = moved.add_(linear(signals[i], directions[i][0].mT)).mul_(block.slopes[i - 1])
                            if bends:
                                moved.addcmul_(bends[i - 1], moved_inputs[i - 1])
                return sums

            return dy, backward

        return forward

    def _tangents(self, block: _Block, v: Params) -> list[Tensor]:
        """Returns the derivatives along ``v`` of the inputs of all layers except the first, then of the outputs."""
        tangents: list[Tensor] = []
        layers = zip(self._layers(self._params, block), self._layers(v, block), block.inputs, strict=True)
        for i, ((weight, _), (moved_weight, moved_bias), x) in enumerate(layers):
            tangent = linear(x, moved_weight, moved_bias)
            if i > 0:
                tangent += linear(tangents[-1].mul_(block.slopes[i - 1]), weight)
            tangents.append(tangent)
        return tangents

    def _backpropagated(self, block: _Block, delta: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Returns delta at the outputs of each linear layer, and the terms of the activations' second derivatives.

        Each term is a factor of the derivative of a layer's input, for all layers except the first. A ReLU has none.
        """
        signal = delta.detach()[block.at]
        signals, bends = [signal], []
        weights = self._layers(self._params, block)
        for i in reversed(range(1, len(weights))):
            signal = linear(signal, weights[i][0].mT)
            if self._bend is not None:
                bends.append(signal * self._bend(block.inputs[i]))
            signal.mul_(block.slopes[i - 1])
            signals.append(signal)
        return signals[::-1], bends[::-1]

    def _layers(self, params: Params, block: _Block) -> list[tuple[Tensor, Tensor]]:
        """Returns each layer's weight and bias for the block's tasks."""
        tasks = block.at[0]
        return [(params[weight][tasks], params[bias][tasks]) for weight, bias in self._names]

    def _zeros(self) -> Params:
        """Returns zeros to which gradients are added. A weight's longer side is last in memory: 8 times faster."""
        sums: Params = {}
        for weight, bias in self._names:
            tasks, num_out, num_in = self._params[weight].shape
            longer_last = self.outputs.new_zeros(tasks, min(num_in, num_out), max(num_in, num_out))
            sums[weight] = longer_last if num_out <= num_in else longer_last.mT
            sums[bias] = self.outputs.new_zeros(tasks, num_out)
        return sums


def _blocks(x: Tensor) -> Iterator[tuple[slice, slice]]:
    if x.device.type != "cpu":
        yield slice(None), slice(None)
        return
    for task in range(x.shape[0]):
        for start in range(0, x.shape[1], BLOCK):
            yield slice(task, task + 1), slice(start, start + BLOCK)
