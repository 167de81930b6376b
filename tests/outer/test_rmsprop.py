"""The outer RMSProp against PyTorch's."""

from __future__ import annotations

import pytest
import torch

from maml.outer.rmsprop import RMSProp
from tests.outer.test_first_order import assert_close, ours, torchs


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_rmsprop_is_torchs(momentum: float) -> None:
    expected = torchs(lambda values: torch.optim.RMSprop(values, 0.1, alpha=0.8, eps=1e-4, momentum=momentum))
    assert_close(ours(RMSProp(0.1, decay=0.8, eps=1e-4, momentum=momentum)), expected)
