from __future__ import annotations

import pytest
import torch
from torch import nn

from maml.errors import MamlError
from maml.model.conv_pairs import ConvPairs
from maml.seeding import Stream


@pytest.mark.parametrize("size", [8, 10])  # 10 is halved to 5, and then to 3
def test_outputs_and_gradients_are_those_of_the_library(size: int) -> None:
    model = ConvPairs((size, size, 3), 6, num_filters=4, rep_dim=5)
    theta = {name: value.double() + 0.01 for name, value in model.init(Stream(0)).items()}
    net = nn.Sequential(
        *(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()),
        nn.MaxPool2d(2, ceil_mode=True),
        *(nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()),
        nn.MaxPool2d(2, ceil_mode=True),
    ).double()
    with torch.no_grad():
        for value, (name, own) in zip(net.parameters(), theta.items(), strict=False):
            assert name.startswith("conv")
            value.copy_(own)
    x = Stream(1).uniform((1, 7, size, size, 3), -1.0, 1.0).double()
    maps = net(x[0].permute(0, 3, 1, 2)).permute(0, 2, 3, 1).flatten(1)
    features = maps @ theta["representation.weight"].T + theta["representation.bias"]
    params = {name: value.unsqueeze(0).requires_grad_() for name, value in theta.items()}
    torch.testing.assert_close(model.features(params, x)[0], features)
    outputs = features @ theta["head.weight"].T + theta["head.bias"]
    torch.testing.assert_close(model(params, x)[0], outputs)
    model(params, x).square().sum().backward()
    outputs.square().sum().backward()
    for value, own in zip(net.parameters(), params.values(), strict=False):
        assert own.grad is not None and value.grad is not None
        torch.testing.assert_close(own.grad[0], value.grad)


def test_initial_weights_are_cut_off_at_two_standard_deviations() -> None:
    theta = ConvPairs((28, 28, 1), 5).init(Stream(0))
    weights = theta["representation.weight"]
    assert weights.shape == (256, 49 * 128)
    assert 0.19 < weights.abs().max() <= 0.2
    assert weights.std() == pytest.approx(0.1 * 0.8796, rel=0.01)  # a normal variable within two deviations
    assert not any(value.any() for name, value in theta.items() if name.endswith("bias"))
    with pytest.raises(MamlError, match="model=conv_pairs takes images"):
        ConvPairs((6,), 5)
