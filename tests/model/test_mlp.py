"""The fully connected networks against docs/protocol.md#sinusoid-network and docs/protocol.md#omniglot-networks."""

from __future__ import annotations

import pytest
import torch

from maml.model.gaussian_policy import GaussianPolicy
from maml.model.mlp import MLP
from maml.seeding import Stream
from tests import plain_maml


def test_initial_weights_are_a_normal_cut_at_two_deviations() -> None:
    weight = MLP((1,), 1, [200, 200]).init(Stream(0))["linear2.weight"]
    assert weight.abs().max() <= 0.02
    assert abs(weight.std().item() - 0.01 * 0.8796) < 1e-4  # standard deviation of a normal truncated at +-2
    assert not MLP((1,), 1, [4]).init(Stream(0))["linear1.bias"].any()


def test_each_task_uses_its_own_parameters() -> None:
    for normalization in ("none", "batch"):
        model = MLP((3, 2), 4, [7, 5], normalization=normalization)
        tasks = [model.init(Stream(seed)) for seed in range(3)]
        x = Stream(9).normal((3, 6, 3, 2))
        outputs = model({name: torch.stack([task[name] for task in tasks]) for name in tasks[0]}, x)
        for task, params in enumerate(tasks):
            torch.testing.assert_close(outputs[task], plain_maml.mlp(params, x[task]))


def test_the_papers_networks_have_their_sizes() -> None:
    assert sum(value.numel() for value in MLP((1,), 1, [40, 40]).init(Stream(0)).values()) == 1761
    non_conv = MLP((28, 28, 1), 5, [256, 128, 64, 64], normalization="batch").init(Stream(0))
    assert [value.shape[0] for name, value in non_conv.items() if name.endswith("shift")] == [256, 128, 64, 64]


def test_initial_weights_may_be_glorot_uniform() -> None:
    weight = MLP((1,), 1, [400, 400], weight_std=None).init(Stream(0))["linear2.weight"]
    bound = (6 / 800) ** 0.5
    assert 0.99 * bound < weight.abs().max() <= bound
    assert abs(weight.std().item() - bound / 3**0.5) < 0.02 * bound


@pytest.mark.parametrize("hidden_sizes", [[], [4], [4, 3]])
def test_last_layer_is_the_head_and_draws_as_when_it_had_a_number(hidden_sizes: list[int]) -> None:
    params = MLP((2,), 1, hidden_sizes).init(Stream(0))
    number = len(hidden_sizes) + 1
    assert list(params) == [
        *(f"linear{i}.{kind}" for i in range(1, number) for kind in ("weight", "bias")),
        "head.weight",
        "head.bias",
    ]
    draws = Stream(0).child(f"linear{number}").normal(params["head.weight"].shape, std=0.01, bound=2.0)
    assert torch.equal(params["head.weight"], draws)


def test_earlier_name_of_the_head_is_its_number() -> None:
    for model in (MLP((2,), 1, [4, 3]), GaussianPolicy((2,), 2, [4, 3])):
        assert model.renamed("linear3.weight") == "head.weight"
        for name in ("linear1.weight", "linear2.bias", "head.bias", "norm3.shift", "log_std"):
            assert model.renamed(name) == name
