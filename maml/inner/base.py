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
from maml.types import Params

Loss = Callable[[Params, int], Tensor]
"""Loss of T tasks, ``(T,)``, as a function of their parameters and of the gradient step."""

_OWN = "inner."
"""Opens the names of what an inner optimizer itself adds to theta."""


class Inner(ABC):
    """Takes gradient steps from theta on the parameters that adapt; a subclass says what one step does.

    Class attributes:
        is_plain_sgd: whether a step is theta - step_size * gradient and no more.

    Args:
        step_size: of every step, or where it starts.
        num_steps: gradient steps in training (evaluation has its own number).
        order: 2 differentiates through the steps; 1 treats the inner gradients as constants (FOMAML).
        adapt: which parameters adapt, as patterns of their names; a pattern behind ``!`` takes names out again.
    """

    is_plain_sgd = False

    def __init__(self, step_size: float, num_steps: int, order: Literal[1, 2], adapt: list[str]) -> None:
        self.step_size = step_size
        self.num_steps = num_steps
        self.order = order
        self.patterns = adapt

    def init_learned(self, params: Params) -> Params:
        """Returns what of the optimizer is meta-learnt: it joins theta, under names that open with ``inner.``."""
        return {}

    def init_state(self, params: Params) -> Params:
        """Returns the optimizer's state before the first step, by name, in the shapes of ``params``."""
        return {}

    @abstractmethod
    def update(
        self, params: Params, gradients: Params, state: Params, step: int, step_size: float | None
    ) -> tuple[Params, Params]:
        """Returns the new values of the parameters that have a gradient, and the new state.

        Args:
            params: all parameters, and what `init` added, ``(T, ...)``.
            gradients: of the parameters that adapt.
            state: as `start` or the last step left it.
            step: from 0.
            step_size: asked for by the evaluation; None is the optimizer's own.
        """

    def adapted_names(self, names: Sequence[str]) -> list[str]:
        """Returns the names that adapt, in the order given.

        Raises:
            MamlError: if a pattern matches no name, or no name is left.
        """
        names = [name for name in names if not name.startswith(_OWN)]
        chosen: set[str] = set()
        for pattern in self.patterns:
            matched = {name for name in names if fnmatchcase(name, pattern.removeprefix("!"))}
            # The default leaves out normalisation shifts, which not every network has.
            if not matched and not pattern.startswith("!"):
                raise MamlError(
                    f"inner.adapt={self.patterns}: {pattern!r} matches no parameter; there are {', '.join(names)}"
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
            loss: loss per task, ``(T,)``; tasks are independent, so the gradient of its sum is each task's own.
            params: theta expanded to one copy per task, name -> ``(T, ...)``.
            num_steps: gradient steps.
            create_graph: whether theta' must be differentiable with respect to ``params`` beyond first order.
            step_sizes: one per step; None is the optimizer's own.
            state: what an earlier adaptation left; None starts anew.

        Yields:
            Names and shapes of ``params``, and of the state.
        """
        names = self.adapted_names(list(params))
        if state is None:
            state = self.init_state({name: params[name] for name in names})
        yield params, state

        def take_step(params: Params, state: Params, step: int, create_graph: bool) -> tuple[Params, Params]:
            gradients = torch.autograd.grad(
                loss(params, step).sum(), [params[name] for name in names], create_graph=create_graph
            )
            size = None if step_sizes is None else step_sizes[step]
            return self.update(params, dict(zip(names, gradients, strict=True)), state, step, size)

        for step in range(num_steps):
            with torch.enable_grad():
                if not params[names[0]].requires_grad:  # evaluation: nothing upstream wants a gradient
                    params = params | {name: params[name].detach().requires_grad_() for name in names}
                if create_graph and recompute_enabled():
                    adapted, state = _recomputed(partial(take_step, step=step), params, state)
                else:
                    adapted, state = take_step(params, state, step, create_graph)
            params = params | adapted
            yield params, state


class _Step(Protocol):
    def __call__(self, params: Params, state: Params, *, create_graph: bool) -> tuple[Params, Params]: ...


def _recomputed(step: _Step, params: Params, state: Params) -> tuple[Params, Params]:
    """Returns what a step returns, keeping nothing for its derivative but what it started from."""
    names: list[list[str]] = []

    def flat(values: Sequence[Tensor], create_graph: bool) -> tuple[Tensor, ...]:
        inputs = dict(zip(params, values[: len(params)], strict=True))
        kept = dict(zip(state, values[len(params) :], strict=True))
        returned = step(inputs, kept, create_graph=create_graph)
        names[:] = [list(group) for group in returned]
        return tuple(value for group in returned for value in group.values())

    values = _Recomputed.apply(flat, *params.values(), *state.values())
    adapted, new = names
    return dict(zip(adapted, values, strict=False)), dict(zip(new, values[len(adapted) :], strict=True))


class _Recomputed(Function):
    """A function of tensors that is computed once more when its derivative is asked for; once differentiable."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., tuple[Tensor, ...]], *values: Tensor) -> tuple[Tensor, ...]:
        ctx.function = function
        ctx.save_for_backward(*values)
        with torch.enable_grad():
            started = [_leaf(value) for value in values]
            return tuple(value.detach() for value in function(started, create_graph=False))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        with torch.enable_grad():
            started = [_leaf(value) for value in ctx.saved_tensors]
            ended = ctx.function(started, create_graph=True)
            kept = [(value, gradient) for value, gradient in zip(ended, gradients, strict=True) if value.requires_grad]
            wanted = [value for value in started if value.requires_grad]
            outputs, their_gradients = zip(*kept, strict=True)
            found = iter(torch.autograd.grad(outputs, wanted, their_gradients, materialize_grads=True))
        return None, *(next(found) if value.requires_grad else None for value in started)


def _leaf(value: Tensor) -> Tensor:
    return value.detach().requires_grad_(value.is_floating_point())
