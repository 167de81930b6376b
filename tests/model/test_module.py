"""The adapter for a user's own torch.nn.Module."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from maml.config.schema import _check_part, build
from maml.errors import MamlError
from maml.model.base import Model
from maml.model.module import ModuleModel
from maml.seeding import Stream

SHAPE = (6, 6, 2)


class Net(nn.Module):
    def __init__(self, num_outputs: int = 3) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
        self.head = nn.Linear(64, num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def stacked(model: ModuleModel, count: int) -> dict[str, Tensor]:
    tasks = [model.init(Stream(seed)) for seed in range(count)]
    return {name: torch.stack([task[name] for task in tasks]) for name in tasks[0]}


@pytest.mark.parametrize("vectorize", [True, False])
def test_outputs_are_those_of_the_module_in_training_mode(vectorize: bool) -> None:
    model = ModuleModel(SHAPE, 3, Net, vectorize)
    params, x = stacked(model, 2), Stream(5).normal((2, 7, *SHAPE))
    outputs = model(params, x)
    for task in range(2):
        net = Net()
        net.load_state_dict({name: value[task] for name, value in params.items()}, strict=False)
        torch.testing.assert_close(outputs[task], net.train()(x[task].permute(0, 3, 1, 2)), rtol=1e-4, atol=1e-5)


def test_buffers_of_batch_normalisation_stay_unchanged() -> None:
    net = Net()
    before = {name: value.clone() for name, value in net.named_buffers()}
    model = ModuleModel(SHAPE, 3, lambda: net)
    model(stacked(model, 2), Stream(5).normal((2, 7, *SHAPE)))
    assert before
    assert all(torch.equal(value, before[name]) for name, value in net.named_buffers())


def test_reference_statistics_make_predictions_inductive() -> None:
    model = ModuleModel(SHAPE, 3, Net)
    params, x = stacked(model, 1), Stream(5).normal((1, 8, *SHAPE))
    joint = model(params, x, num_reference=5)
    alone = model(params, x[:, :6], num_reference=5)
    torch.testing.assert_close(joint[:, 5], alone[:, 5], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(model(params, x)[:, 5], alone[:, 5], rtol=1e-2)


def test_initial_parameters_follow_the_seed_alone() -> None:
    first, again, other = (ModuleModel(SHAPE, 3, Net).init(Stream(seed)) for seed in (1, 1, 2))
    torch.manual_seed(77)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])


def test_frozen_parameters_are_not_trained() -> None:
    class Frozen(Net):
        def __init__(self) -> None:
            super().__init__()
            self.body[0].weight.requires_grad_(False)

    assert "body.0.weight" not in ModuleModel(SHAPE, 3, Frozen).init(Stream(0))
    assert "body.0.bias" in ModuleModel(SHAPE, 3, Frozen).init(Stream(0))


def test_dropout_is_refused_because_no_seed_controls_it() -> None:
    with pytest.raises(MamlError, match=r"has dropout \(1, p=0.5\)"):
        ModuleModel((4,), 3, lambda: nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5)))


def test_modules_that_do_not_fit_the_domain_are_refused() -> None:
    with pytest.raises(MamlError, match=r"outputs of shape \(2,\), but the domain needs \(3,\)"):
        ModuleModel(SHAPE, 3, lambda: Net(2))
    with pytest.raises(MamlError, match="cannot be run on inputs of shape"):
        ModuleModel((9, 9, 2), 3, Net)


class Linear(nn.Module):
    """A linear model whose constructor takes the number of outputs."""

    def __init__(self, out_dim: int, in_shape: tuple[int, ...] = (), width: int = 5) -> None:
        super().__init__()
        self.in_shape = in_shape
        self.net = nn.Sequential(nn.Flatten(), nn.LazyLinear(width), nn.Linear(width, out_dim))
        self.net(torch.zeros(1, *in_shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def test_module_is_told_the_sizes_of_the_domain_that_it_asks_for() -> None:
    model = ModuleModel(SHAPE, 4, Linear)
    assert isinstance(model.net, Linear)
    assert model.net.in_shape == SHAPE
    assert model.init(Stream(0))["net.2.weight"].shape == (4, 5)


def test_sizes_that_the_config_gives_are_kept() -> None:
    model = ModuleModel((6,), 3, partial(Linear, in_shape=(2, 3), width=2))
    assert isinstance(model.net, Linear)
    assert model.net.in_shape == (2, 3)
    with pytest.raises(MamlError, match=r"outputs of shape \(2,\), but the domain needs \(3,\)"):
        ModuleModel(SHAPE, 3, partial(Linear, 2, SHAPE))
    with pytest.raises(MamlError, match=r"outputs of shape \(2,\).*give its constructor a parameter called out_dim"):
        ModuleModel(SHAPE, 3, partial(Linear, out_dim=2))


def test_size_left_open_is_no_missing_key() -> None:
    target = {"_target_": f"{__name__}.Linear", "_partial_": True}
    config = {"_target_": "maml.model.module.ModuleModel", "module": target}
    assert _check_part("model", config, Model) == []
    assert _check_part("model", {**config, "module": {**target, "out_dim": 2}}, Model) == []
    (problem,) = _check_part("model", {**config, "module": {**target, "out_dim": "two"}}, Model)
    assert "model.module.out_dim='two'" in problem
    model = build(config, in_shape=SHAPE, out_dim=4)
    assert model.init(Stream(0))["net.2.weight"].shape == (4, 5)
