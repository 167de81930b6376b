"""The network of Koch et al.: its sizes, its formula, and images that are too small for it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from maml.errors import MamlError
from maml.model.koch import Koch


def test_sizes_are_those_of_the_source() -> None:
    with torch.device("meta"):
        net = Koch((105, 105, 1), 1)
    assert net.linear.in_features == 9216 and net.linear.out_features == 4096
    count = sum(value.numel() for name, value in net.named_parameters() if not name.startswith("head."))
    assert count + 4096 + 1 == 38_951_745, "with the weights of the L1 distance and a bias"


def test_features_follow_the_formula() -> None:
    torch.manual_seed(0)
    net = Koch((65, 65, 1), 2, widths=(2, 3, 3, 4), num_features=5).double()
    x = torch.rand(3, 1, 65, 65, dtype=torch.float64)
    y, convolutions = x, [layer for layer in net.convolutions if isinstance(layer, torch.nn.Conv2d)]
    for i, layer in enumerate(convolutions):
        y = F.relu(F.conv2d(y, layer.weight, layer.bias))
        y = F.max_pool2d(y, 2) if i < 3 else y
    features = torch.sigmoid(y.flatten(1) @ net.linear.weight.T + net.linear.bias)
    expected = features @ net.head.weight.T + net.head.bias
    torch.testing.assert_close(net(x), expected)


def test_images_that_are_too_small_are_refused_with_the_remedy() -> None:
    with pytest.raises(MamlError, match=r"28x28 are too small .* choose domain=omniglot_alphabets"):
        Koch((28, 28, 1), 5)
