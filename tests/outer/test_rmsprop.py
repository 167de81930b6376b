"""The outer RMSProp against PyTorch's."""

from __future__ import annotations

import torch

from maml.outer.rmsprop import RMSProp
from tests.outer.test_first_order import assert_close, ours, torchs


def test_rmsprop_is_torchs() -> None:
    expected = torchs(lambda values: torch.optim.RMSprop(values, 0.1, alpha=0.8, eps=1e-4))
    assert_close(ours(RMSProp(0.1, decay=0.8, eps=1e-4)), expected)
