"""Adaptation by gradient steps: theta to theta'_i (Algorithm 2, lines 5-7); one file per inner optimizer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from maml.errors import MamlError
from maml.hardware.memory import recompute_enabled
from maml.pictures import Picture
from maml.seeding import Stream
from maml.types import Params, form_of

Loss = Callable[[Params, int], Tensor]
"""Loss of T tasks, ``(T,)``, as a function of their parameters and of the gradient step."""

_WITHOUT_SHIFTS = "!*.shift"
"""The pattern of the defaults, which may match nothing: some networks have no shifts of normalisation."""

_LEARNED_PREFIX = "inner."
"""Names of parameters that an inner optimizer adds to theta start with this."""


class Inner(ABC):
    """An inner optimizer: takes gradient steps from theta. A subclass defines one step, `update`.

    Class attributes:
        is_plain_sgd: whether a step is exactly theta - step_size * gradient.
        has_step_size: whether a step has a size, so that the evaluation can ask for another one.
        method: what MAML with this inner optimizer is called; None is MAML or, in first order, FOMAML.

    Args:
        step_size: step size of every step; the initial one, if step sizes are learnt. NaN if steps have none.
        num_steps: number of gradient steps in training (evaluation has its own number).
        order: 2 differentiates through the steps; 1 treats the inner gradients as constants (FOMAML).
        adapt: which parameters adapt: patterns of parameter names. ``head.*`` is the last layer; a pattern that
            opens with ``!`` excludes names again.
        second_order_from: the first iteration of second order; those before it are of first order, which is cheaper
            (derivative-order annealing, Antoniou et al. 2019). None: all have ``order``.

    Attributes:
        present_order: the order of the present iterations, which `begin` sets.

    Raises:
        MamlError: if ``second_order_from`` is set and ``order`` is 1.
    """

    is_plain_sgd = False
    has_step_size = True
    method: str | None = None

    def __init__(
        self,
        step_size: float,
        num_steps: int,
        order: Literal[1, 2],
        adapt: list[str],
        second_order_from: int | None = None,
    ) -> None:
        if second_order_from is not None and order == 1:
            raise MamlError(
                f"inner.second_order_from={second_order_from} needs a second order, but inner.order=1 has none; set "
                "inner.order=2, or second_order_from=null"
            )
        self.step_size = step_size
        self.num_steps = num_steps
        self.order = order
        self.patterns = adapt
        self.second_order_from = second_order_from
        self.begin(1)

    def order_at(self, iteration: int) -> int:
        """Returns the order of the meta-gradient of an iteration, counted from 1."""
        return 1 if self.second_order_from is not None and iteration < self.second_order_from else self.order

    def begin(self, iteration: int) -> None:
        """Sets the order for the iterations from this one on, up to the next one with another order."""
        self.present_order = self.order_at(iteration)

    def init_learned(self, params: Params, stream: Stream) -> Params:
        """Returns the optimizer's own meta-learnt parameters, such as step sizes. They become part of theta.

        Args:
            params: the model's initial parameters, without a task axis.
            stream: draws initial values, if they are random.

        Returns:
            Parameters without a task axis; every name starts with ``inner.``.
        """
        return {}

    def init_state(self, params: Params) -> Params:
        """Returns the optimizer's state before the first step, name -> ``(T, ...)``.

        Args:
            params: the parameters that adapt, name -> ``(T, ...)``.
        """
        return {}

    @abstractmethod
    def update(
        self, params: Params, losses: Tensor, gradients: Params, state: Params, step: int, step_size: float | None
    ) -> tuple[Params, Params]:
        """Takes one step; returns the new values of the parameters that adapt, and the new state.

        In second order, the losses and gradients are functions of ``params``; in first order, they are constants.

        Args:
            params: all parameters, those of `init_learned` included, name -> ``(T, ...)``.
            losses: the loss of each task at ``params``, ``(T,)``.
            gradients: the gradients of the parameters that adapt, name -> ``(T, ...)``.
            state: the state after the last step, or that of `init_state`.
            step: number of the step, from 0.
            step_size: step size that the evaluation asks for; None uses the optimizer's own.
        """

    def pictures(self, steps: Iterator[tuple[Params, Params]]) -> dict[str, Picture]:
        """Returns pictures of the optimizer's steps in meta-test, by name; none, unless a subclass has some.

        Args:
            steps: what `adapt` yields on a few tasks. Nothing is computed if it is not read.
        """
        return {}

    def adapted_names(self, names: Sequence[str]) -> list[str]:
        """Returns those of ``names`` that adapt, in the same order.

        Raises:
            MamlError: if a pattern matches no name, or no name is left.
        """
        names = [name for name in names if not name.startswith(_LEARNED_PREFIX)]
        chosen: set[str] = set()
        for pattern in self.patterns:
            matched = {name for name in names if fnmatchcase(name, pattern.removeprefix("!"))}
            if not matched and pattern != _WITHOUT_SHIFTS:
                raise MamlError(
                    f"inner.adapt={self.patterns}: {pattern!r} matches no parameter; there are {', '.join(names)}"
                )
            if matched and pattern.startswith("!") and not chosen & matched:
                raise MamlError(
                    f"inner.adapt={self.patterns}: {pattern!r} excludes nothing that the patterns before it choose; "
                    "put it after them, as in inner.adapt=['*','!head.*']"
                )
            chosen = chosen - matched if pattern.startswith("!") else chosen | matched
        if not chosen:
            raise MamlError(f"inner.adapt={self.patterns} leaves no parameter to adapt; there are {', '.join(names)}")
        return [name for name in names if name in chosen]

    def adapt(
        self,
        loss: Loss,
        params: Params,
        num_steps: int,
        create_graph: bool,
        step_sizes: Sequence[float] | None = None,
        state: Params | None = None,
    ) -> Iterator[tuple[Params, Params]]:
        """Yields theta'_i and the optimizer's state after 0, 1, ..., ``num_steps`` gradient steps.

        Args:
            loss: loss per task, ``(T,)``. Tasks are independent, so the gradient of the sum holds each task's gradient.
            params: theta expanded to one copy per task, name -> ``(T, ...)``.
            num_steps: number of gradient steps.
            create_graph: whether second derivatives with respect to ``params`` are needed.
            step_sizes: one step size per step; None uses the optimizer's own.
            state: the optimizer's state to continue from; None starts with `init_state`.

        Yields:
            Parameters with the names and shapes of ``params``, and the state.
        """
        names = self.adapted_names(list(params))
        if state is None:
            state = self.init_state({name: params[name] for name in names})
        yield params, state

        def take_step(params: Params, state: Params, step: int, create_graph: bool) -> tuple[Params, Params]:
            with torch.enable_grad():
                losses = loss(params, step)
                total = losses.sum()
                if not total.requires_grad:  # evaluation, and the network uses none of the parameters that adapt
                    total = total + 0 * params[names[0]].sum()
                gradients = torch.autograd.grad(
                    total,
                    [params[name] for name in names],
                    create_graph=create_graph,
                    materialize_grads=True,  # a bias that normalisation cancels is no part of the graph
                )
            if not create_graph:  # the graph of the losses is gone
                losses = losses.detach()
            size = None if step_sizes is None else step_sizes[step]
            # In evaluation, which has no meta-gradient, this makes no graph.
            updated = self.update(params, losses, dict(zip(names, gradients, strict=True)), state, step, size)
            self._check_updated(updated, {name: params[name] for name in names})
            return updated

        # In first order, only an optimizer with parameters of its own makes a graph that takes memory.
        has_graph = create_graph or any(name.startswith(_LEARNED_PREFIX) for name in params)
        for step in range(num_steps):
            if not all(params[name].requires_grad for name in names):  # evaluation: there is no meta-gradient
                params = params | {name: params[name].detach().requires_grad_() for name in names}
            if has_graph and recompute_enabled():
                adapted, state = _recompute_in_backward(partial(take_step, step=step), params, state, create_graph)
            else:
                adapted, state = take_step(params, state, step, create_graph)
            moved = params | adapted
            # A value that the step left as it is gets a node of its own. Other values depend on the old node, and the
            # next gradient must not be taken through them.
            same = {name: value.view_as(value) for name, value in moved.items() if value is params[name]}
            params = moved | {name: same[name] for name in names if name in same}
            yield params, state

    def _check_updated(self, updated: Any, before: Params) -> None:
        """Checks what `update` returned for parameters that adapt.

        Raises:
            MamlError: if it is not their new values and a state.
        """
        is_pair = isinstance(updated, tuple) and [type(part) for part in updated] == [dict, dict]
        if not is_pair or updated[0].keys() != before.keys():
            raise MamlError(
                f"{type(self).__name__}.update has to return two dictionaries: new values of the parameters that "
                f"adapt ({', '.join(before)}), and the new state, which may be empty"
            )
        for name, value in updated[0].items():
            if not isinstance(value, Tensor) or value.shape != before[name].shape:
                raise MamlError(
                    f"{type(self).__name__}.update returns {name!r} of {form_of(value)}, but it is a tensor of shape "
                    f"{tuple(before[name].shape)}, with a value for each task"
                )


class _Step(Protocol):
    def __call__(self, params: Params, state: Params, *, create_graph: bool) -> tuple[Params, Params]: ...


def _recompute_in_backward(step: _Step, params: Params, state: Params, create_graph: bool) -> tuple[Params, Params]:
    """Takes a step and keeps only its inputs in memory; the backward pass takes it once more, with ``create_graph``."""
    output_names: list[list[str]] = []

    def flat_step(values: Sequence[Tensor], create_graph: bool) -> tuple[Tensor, ...]:
        step_params = dict(zip(params, values[: len(params)], strict=True))
        step_state = dict(zip(state, values[len(params) :], strict=True))
        outputs = step(step_params, step_state, create_graph=create_graph)
        output_names[:] = [list(group) for group in outputs]
        return tuple(value for group in outputs for value in group.values())

    values = _RecomputeInBackward.apply(flat_step, create_graph, *params.values(), *state.values())
    param_names, state_names = output_names
    new_state = values[len(param_names) :]
    return dict(zip(param_names, values, strict=False)), dict(zip(state_names, new_state, strict=True))


class _RecomputeInBackward(Function):
    """Computes a function of tensors without a graph, and again with one in the backward pass. Once differentiable."""

    @staticmethod
    def forward(
        ctx: Any, function: Callable[..., tuple[Tensor, ...]], create_graph: bool, *values: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.function, ctx.create_graph = function, create_graph
        ctx.save_for_backward(*values)
        with torch.enable_grad():
            inputs = [_as_leaf(value) for value in values]
            return tuple(value.detach() for value in function(inputs, create_graph=False))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        with torch.enable_grad():
            inputs = [_as_leaf(value) for value in ctx.saved_tensors]
            outputs = ctx.function(inputs, create_graph=ctx.create_graph)
            pairs = [pair for pair in zip(outputs, gradients, strict=True) if pair[0].requires_grad]
            differentiable_inputs = [value for value in inputs if value.requires_grad]
            differentiable_outputs, output_gradients = zip(*pairs, strict=True)
            input_gradients = iter(
                torch.autograd.grad(
                    differentiable_outputs, differentiable_inputs, output_gradients, materialize_grads=True
                )
            )
        return None, None, *(next(input_gradients) if value.requires_grad else None for value in inputs)


def _as_leaf(value: Tensor) -> Tensor:
    """Returns the tensor without its history; its gradient can be taken if it holds real numbers."""
    return value.detach().requires_grad_(value.is_floating_point())
