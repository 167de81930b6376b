"""What recurrent models have in common: outputs after every element, and one copy of weights for many tasks."""

from __future__ import annotations

import pytest
import torch

from maml.model.lstm import LSTM
from maml.model.mann import MANN
from maml.model.recurrent import Recurrent
from maml.seeding import Stream
from maml.types import Params

MODELS = [LSTM((5, 2), 3, 4), MANN((5, 2), 3, 4, num_slots=6, slot_size=3, num_heads=2)]


def random_params(model: Recurrent, count: int) -> Params:
    stream = Stream(1)
    return {
        name: value + stream.child(name).uniform((count, *value.shape), -0.5, 0.5)
        for name, value in model.init(Stream(0)).items()
    }


@pytest.mark.parametrize("model", MODELS)
def test_outputs_of_each_element_are_those_of_the_sequence_up_to_it(model: Recurrent) -> None:
    params, x = random_params(model, 2), Stream(2).uniform((2, 3, 5, 2), -1.0, 1.0)
    outputs = model.outputs_of_each(params, x)
    assert outputs.shape == (2, 3, 5, 3)
    assert model.states(params, x).shape == (2, 3, 5, model.num_features)
    for length in range(1, 6):
        torch.testing.assert_close(outputs[:, :, length - 1], model(params, x[:, :, :length]))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("groups", [1, 2])
def test_tasks_can_share_weights(model: Recurrent, groups: int) -> None:
    params, x = random_params(model, groups), Stream(2).uniform((4, 3, 5, 2), -1.0, 1.0)
    copies = {name: value.repeat_interleave(4 // groups, 0) for name, value in params.items()}
    torch.testing.assert_close(model.outputs_of_each(params, x), model.outputs_of_each(copies, x))
