"""Makes two steps of an outer optimizer before a run, and refuses one that would leave theta as it is in silence."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from maml.errors import MamlError
from maml.outer.base import Objective, Outer
from maml.outer.first_order import FirstOrder
from maml.types import MatrixVectorProduct, Params, form_of


class _Paraboloid(Objective):
    """Half the squared distance from a point. The KL divergence is half the squared distance from the start.

    Args:
        start: the parameters before the first step, without a task axis.
    """

    def __init__(self, start: Params) -> None:
        self.start = start

    def gradient(self, theta: Params) -> tuple[Params, dict[str, Tensor]]:
        return {name: theta[name] - value - 1 for name, value in self.start.items()}, self.evaluate(theta)

    def evaluate(self, theta: Params) -> dict[str, Tensor]:
        moved = torch.cat([(theta[name] - value).flatten() for name, value in self.start.items()])
        return {"loss": (moved - 1).square().sum() / 2, "kl": torch.zeros(())}

    def kl_gradient(self, theta: Params, every: int = 1) -> Params:
        return {name: theta[name] - value for name, value in self.start.items()}

    def curvature(self, theta: Params, every: int = 1) -> MatrixVectorProduct:
        return lambda vector: vector


@torch.no_grad()
def check_step(outer: Outer, theta: Params, num_iterations: int) -> None:
    """Checks on a made-up objective that an outer optimizer changes theta, and in place.

    There are two steps, because the first may be zero, as with a schedule that rises from zero. An optimizer that asks
    for what the made-up objective lacks is not checked.

    Args:
        outer: the optimizer; it stays as it is.
        theta: the parameters that it will train, without a task axis; they stay as they are.
        num_iterations: length of the training.

    Raises:
        MamlError: if theta does not change or gets new tensors, the step returns no metrics, the state is not what
            `Outer.init_state` made, or the step size has fallen to zero before the last iteration.
    """
    if not theta:  # an algorithm may have nothing to train
        return
    _check_last_rate(outer, num_iterations)
    name, outer = type(outer).__name__, copy.deepcopy(outer)
    tried = {key: value.clone() for key, value in theta.items()}
    tensors, objective = dict(tried), _Paraboloid(theta)
    state = outer.init_state(tried)
    if not _are_tensors(state):
        raise MamlError(f"{name}.init_state has to return a dictionary of tensors, which a checkpoint keeps")
    first_state = _summary(state)
    for _ in range(2):
        try:
            metrics = outer.step(objective, tried, state)
        except Exception:  # training will show whether something is wrong
            return
        if not _are_tensors(metrics) or not metrics or any(value.dim() for value in metrics.values()):
            raise MamlError(
                f"{name}.step returns {_summary(metrics)}, but has to return metrics: tensors of one number each, by "
                "name, such as the second value of objective.gradient(theta)"
            )
    if _summary(state) != first_state:
        raise MamlError(
            f"{name}.step changes the names or shapes of its state from {first_state} to {_summary(state)}, "
            "so that no checkpoint could be resumed; make all of it in init_state"
        )
    if new := [key for key, value in tensors.items() if tried.get(key) is not value]:
        raise MamlError(
            f"{name}.step puts a new tensor into theta[{new[0]!r}], which others that hold the old one do not see; "
            "change its values in place, as in theta[name].sub_(...)"
        )
    if all(torch.equal(tried[key], value) for key, value in theta.items()):
        raise MamlError(
            f"with these settings of outer, {name}.step leaves theta as it is, so nothing would be trained; choose "
            "others. A step of your own changes theta's values in place, as in theta[name].sub_(...)"
        )


def _are_tensors(values: object) -> bool:
    return isinstance(values, dict) and all(isinstance(value, Tensor) for value in values.values())


def _summary(values: object) -> str:
    """Returns the names of a dictionary with what their values are; else the type of a value."""
    if not isinstance(values, dict):
        return f"a {type(values).__name__}"
    return ", ".join(f"{name} of {form_of(value)}" for name, value in sorted(values.items())) or "an empty dictionary"


def _check_last_rate(outer: Outer, num_iterations: int) -> None:
    if isinstance(outer, FirstOrder) and num_iterations:
        # A schedule may reach 0 at the very last iteration.
        last = torch.arange(max(0, num_iterations - 2), num_iterations, dtype=torch.float64)
        if not any(float(outer.rate(done)) for done in last):
            raise MamlError(
                f"the outer step size is 0 before the last of num_iterations={num_iterations}, so the rest would train "
                "nothing; let the schedule last as long as the training, or end above 0"
            )
