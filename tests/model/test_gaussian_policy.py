"""The Gaussian policy against docs/protocol.md#policy."""

from __future__ import annotations

import pytest
import torch

from maml.errors import MamlError
from maml.model.gaussian_policy import GaussianPolicy
from maml.seeding import Stream
from tests import plain_maml


def test_initial_policy_is_glorot_uniform_with_unit_deviations() -> None:
    params = GaussianPolicy((20,), 12, [100, 100]).init(Stream(0))
    assert sum(value.numel() for value in params.values()) == 20 * 100 + 100 + 100 * 100 + 100 + 100 * 6 + 6 + 6
    for name, value in params.items():
        if name.endswith("weight"):
            bound = (6 / sum(value.shape)) ** 0.5
            assert 0.95 * bound < value.abs().max() <= bound
        else:
            assert not value.any()
    assert params["log_std"].shape == (6,)


def test_outputs_are_means_then_log_deviations_above_the_floor() -> None:
    model = GaussianPolicy((3,), 4, [7, 5])
    tasks = [model.init(Stream(seed)) for seed in range(2)]
    tasks[0]["log_std"] = torch.tensor([0.5, -20.0])
    x = Stream(9).normal((2, 6, 3))
    outputs = model({name: torch.stack([task[name] for task in tasks]) for name in tasks[0]}, x)
    assert outputs.shape == (2, 6, 4)
    for task, params in enumerate(tasks):
        means = plain_maml.mlp({name: value for name, value in params.items() if name != "log_std"}, x[task])
        torch.testing.assert_close(outputs[task, :, :2], means)
    floor = torch.tensor(1e-6).log()
    torch.testing.assert_close(outputs[:, :, 2:], torch.tensor([[0.5, floor], [0.0, 0.0]]).unsqueeze(1).expand(2, 6, 2))


def test_an_odd_number_of_outputs_is_refused() -> None:
    with pytest.raises(MamlError, match="5 outputs"):
        GaussianPolicy((3,), 5, [7])
