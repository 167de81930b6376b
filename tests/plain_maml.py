"""MAML written as plainly as possible, one task at a time with public torch functions: a reference for the tests."""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
import torch.nn.functional as F
from torch import Tensor

Params = dict[str, Tensor]
Forward = Callable[[Params, Tensor], Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]


def batch_norm(x: Tensor, shift: Tensor) -> Tensor:
    """Normalises over all axes except axis 1, the features."""
    dims = [0, *range(2, x.dim())]
    mean = x.mean(dims, keepdim=True)
    variance = ((x - mean) ** 2).mean(dims, keepdim=True)
    return (x - mean) / torch.sqrt(variance + 1e-3) + shift.reshape(1, -1, *[1] * (x.dim() - 2))


def mlp(params: Params, x: Tensor) -> Tensor:
    """A fully connected network for one task; ``x`` is ``(S, ...)``."""
    depth = sum(name.endswith("weight") for name in params)
    x = x.flatten(1)
    for i in range(1, depth):
        x = F.linear(x, params[f"linear{i}.weight"], params[f"linear{i}.bias"])
        if f"norm{i}.shift" in params:
            x = batch_norm(x, params[f"norm{i}.shift"])
        x = torch.relu(x)
    return F.linear(x, params["head.weight"], params["head.bias"])


def conv4(pooling: str, head: str, activation: Callable[[Tensor], Tensor] = torch.relu) -> Forward:
    """Returns the four-block convolutional network for one task's images, ``(S, H, W, C)``."""

    def forward(params: Params, x: Tensor) -> Tensor:
        x = x.permute(0, 3, 1, 2)
        for i in range(1, 5):
            stride = 2 if pooling == "stride" else 1
            x = F.conv2d(x, params[f"conv{i}.weight"], params[f"conv{i}.bias"], stride=stride, padding=1)
            x = activation(batch_norm(x, params[f"norm{i}.shift"]))
            if pooling == "max":
                x = F.max_pool2d(x, 2)
            elif pooling == "mean":
                x = F.avg_pool2d(x, 2)
        x = x.mean((2, 3)) if head == "mean" else x.permute(0, 2, 3, 1).flatten(1)
        return F.linear(x, params["head.weight"], params["head.bias"])

    return forward


def outer_loss(
    forward: Forward,
    loss: Loss,
    theta: Params,
    tasks: list[tuple[Tensor, Tensor, Tensor, Tensor]],
    step_size: float,
    num_steps: int,
    order: int,
    adapt: Collection[str],
) -> Tensor:
    """Returns the mean over tasks of the query loss at the adapted parameters.

    Args:
        forward: the network for one task.
        loss: loss of outputs and targets.
        theta: the initial parameters.
        tasks: (support x, support y, query x, query y) of each task.
        step_size: the paper's alpha.
        num_steps: number of inner gradient steps.
        order: 2 differentiates through the inner gradients, 1 treats them as constants.
        adapt: names of the parameters that adapt.
    """
    total = torch.zeros((), dtype=next(iter(theta.values())).dtype)
    for x, y, query_x, query_y in tasks:
        params = dict(theta)
        for _ in range(num_steps):
            names = [name for name in params if name in adapt]
            gradients = torch.autograd.grad(
                loss(forward(params, x), y), [params[name] for name in names], create_graph=order == 2
            )
            for name, gradient in zip(names, gradients, strict=True):
                params[name] = params[name] - step_size * gradient
        total = total + loss(forward(params, query_x), query_y)
    return total / len(tasks)
