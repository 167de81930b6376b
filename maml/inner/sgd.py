"""Adaptation by gradient descent: theta to theta'_i (Algorithm 2, lines 5-7)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import Tensor

from maml.errors import MamlError
from maml.types import NonNegativeInt, Params, PositiveFloat

Loss = Callable[[Params, int], Tensor]
"""Loss of T tasks, ``(T,)``, as a function of their parameters and of the gradient step."""


class SGD:
    """Full-batch gradient steps from theta, on the parameters that adapt.

    Args:
        step_size: the paper's alpha.
        num_steps: gradient steps in training (evaluation has its own number).
        order: 2 differentiates through the steps; 1 treats the inner gradients as constants (FOMAML).
        adapt: which parameters adapt, as patterns of their names; a pattern behind ``!`` takes names out again.
    """

    def __init__(
        self,
        step_size: PositiveFloat,
        num_steps: NonNegativeInt,
        order: Literal[1, 2],
        adapt: list[str],
    ) -> None:
        self.step_size = step_size
        self.num_steps = num_steps
        self.order = order
        self.patterns = adapt

    def adapted_names(self, names: Sequence[str]) -> list[str]:
        """Returns the names that adapt, in the order given.

        Raises:
            MamlError: if a pattern matches no name, or no name is left.
        """
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
    ) -> Iterator[Params]:
        """Yields theta'_i after 0, 1, ..., ``num_steps`` gradient steps.

        Args:
            loss: loss per task, ``(T,)``; tasks are independent, so the gradient of its sum is each task's own.
            params: theta expanded to one copy per task, name -> ``(T, ...)``.
            num_steps: gradient steps.
            create_graph: whether theta' must be differentiable with respect to ``params`` beyond first order.
            step_sizes: one per step; None is alpha at every step.

        Yields:
            Names and shapes of ``params``.
        """
        names = self.adapted_names(list(params))
        yield params
        for step in range(num_steps):
            step_size = self.step_size if step_sizes is None else step_sizes[step]
            with torch.enable_grad():
                if not params[names[0]].requires_grad:  # evaluation: nothing upstream wants a gradient
                    params = params | {name: params[name].detach().requires_grad_() for name in names}
                gradients = torch.autograd.grad(
                    loss(params, step).sum(), [params[name] for name in names], create_graph=create_graph
                )
                adapted = {
                    name: params[name] - step_size * gradient for name, gradient in zip(names, gradients, strict=True)
                }
            params = params | adapted
            yield params
