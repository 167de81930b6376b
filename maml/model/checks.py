"""Calls a user's module a few times before a run, and refuses one that would give wrong numbers in silence."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from maml.errors import MamlError, first_line
from maml.seeding import Stream
from maml.types import Params

# Outputs that must be equal may differ by rounding. The bounds are relative to the largest output. Two calls of one
# module do the same operations; two copies of it may have their parameters elsewhere in memory.
_TOLERANCE_OF_CALLS, _TOLERANCE_OF_COPIES = 1e-5, 1e-3


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds the global generators of torch, NumPy and Python, and restores their states at the end."""
    states = random.getstate(), np.random.get_state()
    # Without `devices`, the generators of all GPUs are read, which initialises CUDA also for a run on the CPU.
    with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_initialized() else []):
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed % 2**64)  # it takes a negative seed for the positive one
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def places(net: nn.Module) -> dict[str, list[str]]:
    """Returns where each parameter and buffer of a module is registered.

    Returns:
        A tensor's first name, as in ``named_parameters()`` and ``named_buffers()``, and the names of all its places. A
        place of a layer that is registered twice has one name, so that replacing each name replaces each place once.
    """
    found: dict[Tensor, list[str]] = {}
    for prefix, layer in net.named_modules():
        own = layer.named_parameters(prefix, recurse=False, remove_duplicate=False)
        buffers = layer.named_buffers(prefix, recurse=False, remove_duplicate=False)
        for name, value in (*own, *buffers):
            found.setdefault(value, []).append(name)
    return {names[0]: names for names in found.values()}


def check_equal_constructions(first: nn.Module, second: nn.Module) -> None:
    """Refuses a module whose initial values differ between two constructions under the same seed.

    Raises:
        MamlError: if they differ.
    """
    other = dict(_tensors(second))
    for name, value in _tensors(first):
        if name not in other or value.shape != other[name].shape or not _equal(value, other[name], tolerance=0.0):
            raise MamlError(
                f"model.module gives {name} another initial value each time it is built, though the seed is the same; "
                "draw it from the global generator of torch, NumPy or Python, which have the run's seed then"
            )


def moved(params: Params, number: int) -> Params:
    """Returns parameters that differ clearly from the given ones: the values of an imagined task of this number."""
    stream = Stream(number)
    factors = {name: stream.child(name).uniform(value.shape, -0.3, 0.3) for name, value in params.items()}
    return {name: value + (factors[name] * (value.abs() + 0.1)).to(value) for name, value in params.items()}


def check_outputs(outputs: Any, count: int, out_dim: int) -> None:
    """Checks what a module returned for ``count`` inputs.

    Raises:
        MamlError: if it is not one tensor ``(count, out_dim)``.
    """
    if not isinstance(outputs, Tensor):
        raise MamlError(
            f"model.module returns a {type(outputs).__name__}, but one tensor of shape (S, {out_dim}) is needed; wrap "
            "it in a module whose forward returns the outputs alone"
        )
    if outputs.shape != (count, out_dim):
        shape = tuple(outputs.shape[1:]) if outputs.shape[:1] == (count,) else f"{tuple(outputs.shape)} in all"
        raise MamlError(
            f"model.module gives outputs of shape {shape}, but the domain needs ({out_dim},): "
            "change the module's last layer, or give its constructor a parameter called out_dim to be told"
        )


def check_draws(net: nn.Module, call: Callable[[], Any]) -> Any:
    """Refuses a module that draws random numbers in forward.

    Args:
        net: the module.
        call: calls the module.

    Returns:
        The call's result.

    Raises:
        MamlError: names the layer that draws.
    """
    before = _random_states()
    outputs = call()
    if before == _random_states():
        return outputs
    names, states, drawing = {layer: name for name, layer in net.named_modules()}, [], []

    def enter(layer: nn.Module, inputs: Any) -> None:
        states.append(_random_states())

    def leave(layer: nn.Module, inputs: Any, outputs: Any) -> None:
        if states.pop() != _random_states():
            drawing.append(layer)  # the innermost layer first

    hooks = [layer.register_forward_pre_hook(enter) for layer in names]
    hooks += [layer.register_forward_hook(leave) for layer in names]
    try:
        call()
    finally:
        for hook in hooks:
            hook.remove()
    layer = drawing[0] if drawing else net
    raise MamlError(
        f"model.module draws random numbers in forward ({_title(names[layer], layer)}), and no seed of a run controls "
        "them, so two runs of one seed would differ; set its dropout to 0, or leave the draw out"
    )


class BufferValues:
    """The present values of a module's buffers.

    Args:
        net: the module.
    """

    def __init__(self, net: nn.Module) -> None:
        self._saved = {
            f"{prefix}.{name}" if prefix else name: (layer, name, value, value.clone())
            for prefix, layer in net.named_modules()
            for name, value in layer.named_buffers(recurse=False)
        }

    def changed(self) -> Params:
        """Returns the saved values of the buffers that have others now, by name."""
        return {
            full: copy
            for full, (layer, name, value, copy) in self._saved.items()
            if getattr(layer, name) is not value or not _equal(value, copy, tolerance=0.0)
        }

    def restore(self) -> None:
        """Gives the buffers their saved values."""
        for layer, name, value, copy in self._saved.values():
            value.copy_(copy)
            setattr(layer, name, value)


@contextmanager
def refusing_changes(tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Refuses a module that changes inputs or parameters in place, also if it writes the values that were there.

    Args:
        tensors: what the module gets while the context lasts, by name.

    Raises:
        MamlError: names what is changed.
    """
    versions = {name: value._version for name, value in tensors.items()}
    yield
    for name, value in tensors.items():
        if value._version != versions[name]:
            raise MamlError(
                f"model.module changes {name} in place in forward, as nn.ReLU(inplace=True) does as the first layer, "
                "or nn.Embedding with max_norm; they belong to the run, so let it change a copy"
            )


def check_reference(outputs: Tensor, expected: Tensor) -> None:
    """Refuses a module whose batch normalisation cannot take its statistics from the first examples alone.

    Args:
        outputs: of some examples, of a batch with others behind them, with the statistics of these examples.
        expected: the outputs of a batch that has these examples only.

    Raises:
        MamlError: if the two differ.
    """
    if not _equal(outputs, expected, _TOLERANCE_OF_COPIES):
        raise MamlError(
            "model.module has batch normalisation that sees the rows of several examples in turns, so their statistics "
            "cannot be told apart; let each example's rows follow one another, (S * L, D) and not (L * S, D)"
        )


def check_independence(before: Tensor, after: Tensor, buffers: BufferValues) -> None:
    """Refuses a module whose outputs depend on its earlier calls, which would mix tasks.

    Args:
        before: what the module gave first.
        after: what it gave for the same parameters and inputs, after a call with others.
        buffers: the values before the calls.

    Raises:
        MamlError: names the buffers that forward changes, if there are any.
    """
    if _equal(before, after, _TOLERANCE_OF_CALLS):
        return
    changed = ", ".join(buffers.changed())
    raise MamlError(
        f"model.module changes {f'its buffers {changed}' if changed else 'values that it keeps'} in forward, and later "
        "outputs depend on that, so tasks would leak into each other; let forward depend on parameters and inputs alone"
    )


def check_parameters_are_registered(
    outputs: Tensor, twin: nn.Module, params: Params, call_twin: Callable[[], Tensor]
) -> None:
    """Refuses a module that reaches a parameter by another way than as an attribute of its layer.

    Args:
        outputs: what the module gives for ``params``.
        twin: another copy of the module; gets ``params`` in place.
        params: values of the trained parameters.
        call_twin: calls the copy with the inputs that gave ``outputs``.

    Raises:
        MamlError: if the two give different outputs.
    """
    with torch.no_grad():
        for name, value in twin.named_parameters():
            if name in params:
                value.data = params[name].clone()  # not in place: the module may share the tensor with its maker
        expected = call_twin()
    if not _equal(outputs, expected, _TOLERANCE_OF_COPIES):
        raise MamlError(
            "model.module does not follow all changes of its parameters: forward reads one from a list, a function or "
            "a stored result; let it read each parameter as an attribute of the layer that owns it, such as self.weight"
        )


def check_derivative(outputs: Tensor, params: Params) -> list[str]:
    """Checks that the outputs can be differentiated with respect to the parameters.

    Args:
        outputs: computed from ``params`` with a graph.
        params: the trained parameters.

    Returns:
        Names of the parameters that the outputs do not depend on.

    Raises:
        MamlError: if not.
    """
    if not params:
        return []
    if not outputs.requires_grad:
        raise MamlError(
            "model.module has outputs without a gradient: they do not depend on a trained parameter, or only through "
            "argmax, rounding, detach, NumPy or torch.no_grad"
        )
    try:
        gradients = torch.autograd.grad(outputs.sum(), list(params.values()), allow_unused=True)
    except RuntimeError as error:
        raise MamlError(f"model.module cannot be differentiated: {first_line(error)}") from error
    return [name for name, gradient in zip(params, gradients, strict=True) if gradient is None]


def check_gradient(found: tuple[Tensor, Params], expected: tuple[Tensor, Params]) -> None:
    """Refuses a module whose gradient is not the one that it has by itself at the same values.

    Args:
        found: outputs that were computed from given parameters, and these.
        expected: outputs of a copy that holds the same values, and its parameters.
    """
    if not found[0].requires_grad:  # `check_derivative` says why
        return
    one, other = (
        torch.autograd.grad(outputs.square().sum(), [params[name] for name in found[1]], materialize_grads=True)
        for outputs, params in (found, expected)
    )
    for name, own, plain in zip(found[1], one, other, strict=True):
        if not _equal(own, plain, _TOLERANCE_OF_COPIES):
            raise MamlError(
                f"model.module has a wrong gradient of {name} here: its backward pass computes parts of forward again "
                "(torch.utils.checkpoint), or a hook of a parameter changes gradients; leave that out"
            )


def check_second_derivative(outputs: Tensor, params: Params) -> None:
    """Checks that the outputs can be differentiated twice; the arguments are those of `check_derivative`.

    Raises:
        MamlError: if not.
    """
    values = list(params.values())
    reason = ""
    try:
        gradients = torch.autograd.grad(outputs.square().sum(), values, create_graph=True, materialize_grads=True)
        total = torch.stack([gradient.square().sum() for gradient in gradients]).sum()
        torch.autograd.grad(total, values, allow_unused=True)
    except RuntimeError as error:
        reason = first_line(error)
    else:
        # The error of such a function is not on the way to the parameters, so autograd leaves its part out in silence.
        if any(node.name().endswith("::Error") for node in _nodes(total)):
            reason = "it has a function that is marked as once_differentiable"
    if reason:
        raise MamlError(f"model.module has no second derivative: {reason}; choose inner.order=1, or another layer")


def _nodes(value: Tensor) -> Iterator[Any]:
    """Yields the nodes of the graph that has computed a tensor."""
    waiting, seen = [value.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [before for before, _ in node.next_functions]
            yield node


def _random_states() -> tuple[Any, ...]:
    _, keys, position, *_ = np.random.get_state()
    return torch.get_rng_state().numpy().tobytes(), np.asarray(keys).tobytes(), position, random.getstate()


def _tensors(net: nn.Module) -> list[tuple[str, Tensor]]:
    return [*net.named_parameters(), *net.named_buffers()]


def _title(name: str, layer: nn.Module) -> str:
    return f"{name}, {type(layer).__name__}" if name else type(layer).__name__


def _equal(one: Tensor, other: Tensor, tolerance: float) -> bool:
    """Whether two tensors are equal up to rounding; NaN equals NaN."""
    bound = tolerance * float(other.detach().abs().nan_to_num(0, 0, 0).max()) if tolerance and other.numel() else 0.0
    return torch.allclose(one, other, rtol=0.0, atol=bound, equal_nan=True)
