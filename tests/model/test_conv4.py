"""The convolutional network against protocol sections 3 and 4.2."""

from __future__ import annotations

import pytest
import torch

from maml.errors import MamlError
from maml.model.conv4 import Conv4
from maml.seeding import Stream
from tests import plain_maml


def omniglot() -> Conv4:
    return Conv4((28, 28, 1), 5, head_std=1.0)


def mini_imagenet() -> Conv4:
    return Conv4((84, 84, 3), 5, num_filters=32, pooling="max", head="flatten")


def test_parameter_counts_are_the_papers() -> None:
    assert sum(value.numel() for value in mini_imagenet().init(Stream(0)).values()) == 32_773
    sizes = {name: tuple(value.shape) for name, value in omniglot().init(Stream(0)).items()}
    assert sizes["conv1.weight"] == (64, 1, 3, 3)
    assert sizes["conv4.weight"] == (64, 64, 3, 3)
    assert sizes["head.weight"] == (5, 64)
    assert not any("scale" in name for name in sizes)


def test_initial_weights_are_glorot_uniform_and_the_head_has_std_one() -> None:
    params = omniglot().init(Stream(0))
    bound = (6 / (9 * 64 + 9 * 64)) ** 0.5
    assert 0.99 * bound < params["conv3.weight"].abs().max() <= bound
    assert abs(params["head.weight"].std().item() - 1.0) < 0.15
    assert not any(params[name].any() for name in params if name.endswith(("bias", "shift")))


@pytest.mark.parametrize("num_tasks", [1, 3])
@pytest.mark.parametrize(("pooling", "head"), [("stride", "mean"), ("max", "flatten"), ("mean", "flatten")])
def test_each_task_uses_its_own_parameters(num_tasks: int, pooling: str, head: str) -> None:
    model = Conv4((21, 18, 2), 5, num_filters=6, pooling=pooling, head=head)  # type: ignore[arg-type]
    tasks = [model.init(Stream(seed)) for seed in range(num_tasks)]
    x = Stream(9).normal((num_tasks, 4, 21, 18, 2))
    outputs = model({name: torch.stack([task[name] for task in tasks]) for name in tasks[0]}, x)
    for task, params in enumerate(tasks):
        expected = plain_maml.conv4(pooling, head)(params, x[task])
        torch.testing.assert_close(outputs[task], expected, rtol=1e-4, atol=1e-5)


def test_inputs_that_do_not_fit_are_refused() -> None:
    with pytest.raises(MamlError, match="takes images"):
        Conv4((1,), 5)
    with pytest.raises(MamlError, match="too small to be halved 4 times"):
        Conv4((12, 12, 1), 5, pooling="max")
