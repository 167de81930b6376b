"""The base class of inner optimizers: which parameters adapt, and the loop over steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from maml.algorithm.maml import MAML
from maml.domain.sinusoid import Sinusoid
from maml.errors import MamlError
from maml.hardware.memory import recompute_inner_steps
from maml.inner.base import Inner
from maml.inner.sgd import SGD
from maml.model.mlp import MLP
from maml.seeding import Stream
from maml.types import Params
from tests.algorithms import build_from
from tests.runs import TinyRuns

NAMES = ["conv1.weight", "conv1.bias", "norm1.shift", "head.weight"]


def sgd(adapt: list[str]) -> SGD:
    return SGD(step_size=0.1, num_steps=1, order=2, adapt=adapt)


def test_patterns_choose_what_adapts() -> None:
    assert sgd(["*", "!*.shift"]).adapted_names(NAMES) == ["conv1.weight", "conv1.bias", "head.weight"]
    assert sgd(["head.*"]).adapted_names(NAMES) == ["head.weight"]
    assert sgd(["*", "!conv*", "conv1.bias"]).adapted_names(NAMES) == ["conv1.bias", "norm1.shift", "head.weight"]
    assert sgd(["*", "!*.shift"]).adapted_names(["linear1.weight"]) == ["linear1.weight"]


def test_patterns_that_match_nothing_are_refused() -> None:
    with pytest.raises(MamlError, match=r"'heads\.\*' matches no parameter; there are conv1\.weight"):
        sgd(["*", "heads.*"]).adapted_names(NAMES)
    with pytest.raises(MamlError, match=r"'!hed\.\*' matches no parameter"):
        sgd(["*", "!hed.*"]).adapted_names(NAMES)
    with pytest.raises(MamlError, match=r"'!head\.\*' excludes nothing that the patterns before it choose"):
        sgd(["!head.*", "*"]).adapted_names(NAMES)
    with pytest.raises(MamlError, match="leaves no parameter"):
        sgd(["*", "!*"]).adapted_names(NAMES)


def test_what_an_optimizer_itself_learns_never_adapts() -> None:
    assert sgd(["*"]).adapted_names([*NAMES, "inner.step_size.conv1.weight"]) == NAMES
    with pytest.raises(MamlError, match=r"'inner\.\*' matches no parameter"):
        sgd(["inner.*"]).adapted_names([*NAMES, "inner.step_size.conv1.weight"])


class Counting(Inner):
    """Scales each gradient by the number of steps so far, which it keeps in its state."""

    def init_state(self, params: Params) -> Params:
        return {f"{name}.count": torch.zeros_like(value) for name, value in params.items()}

    def update(
        self, params: Params, losses: Tensor, gradients: Params, state: Params, step: int, step_size: float | None
    ) -> tuple[Params, Params]:
        size = self.step_size if step_size is None else step_size
        counted = {f"{name}.count": state[f"{name}.count"] + 1 for name in gradients}
        moved = {
            name: params[name] - size * counted[f"{name}.count"] * gradient for name, gradient in gradients.items()
        }
        return moved, counted


def slope(params: Params, step: int) -> Tensor:
    """A loss whose gradient with respect to x is 1 in the first step, 2 in the second, and so on."""
    return (step + 1) * params["x"].sum(1) + 0 * params["y"].sum(1)


def test_state_and_step_are_handed_from_step_to_step_and_can_be_handed_over() -> None:
    inner = Counting(step_size=0.5, num_steps=3, order=1, adapt=["x"])
    start = {"x": torch.tensor([[10.0], [20.0]]), "y": torch.zeros(2, 1)}
    steps = list(inner.adapt(slope, start, 3, create_graph=False))
    assert steps[0][0] is start
    # 0.5 * count * gradient = 0.5, 2, 4.5
    assert [params["x"].flatten().tolist() for params, _ in steps] == [[10, 20], [9.5, 19.5], [7.5, 17.5], [3, 13]]
    assert all(params["y"] is start["y"] for params, _ in steps)
    assert [state["x.count"].flatten().tolist() for _, state in steps] == [[0, 0], [1, 1], [2, 2], [3, 3]]
    assert "y.count" not in steps[0][1]
    *_, (later, state) = inner.adapt(slope, start, 1, create_graph=False, state=steps[2][1])
    assert later["x"].flatten().tolist() == [8.5, 18.5], "0.5 * 3 * 1"
    assert state["x.count"].flatten().tolist() == [3, 3]


class FollowingTheLoss(Inner):
    """Moves against the gradient by the loss, with a random factor that is a part of theta."""

    def init_learned(self, params: Params, stream: Stream) -> Params:
        return {"inner.factor": stream.uniform((1,), 1.0, 2.0)}

    def update(
        self, params: Params, losses: Tensor, gradients: Params, state: Params, step: int, step_size: float | None
    ) -> tuple[Params, Params]:
        size = (losses.unsqueeze(1) * params["inner.factor"]).reshape(-1, 1)
        return {name: params[name] - size * gradient for name, gradient in gradients.items()}, state


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("order", [1, 2])
def test_step_sees_the_loss_which_is_a_constant_in_first_order(order: Literal[1, 2], recompute: bool) -> None:
    inner = FollowingTheLoss(step_size=0.1, num_steps=2, order=order, adapt=["x"])
    x, factor = torch.tensor([[0.5], [-0.3]], requires_grad=True), torch.tensor([[1.5], [1.2]], requires_grad=True)

    def loss(params: Params, step: int) -> Tensor:
        return (params["x"] ** 2).sum(1)

    with recompute_inner_steps(recompute):
        *_, (adapted, _) = inner.adapt(loss, {"x": x, "inner.factor": factor}, 1, create_graph=order == 2)
    # theta' = x - c x^2 * 2x
    torch.testing.assert_close(adapted["x"], x - 2 * factor * x**3)
    slopes = torch.autograd.grad(adapted["x"].sum(), [x, factor])
    torch.testing.assert_close(slopes[0], 1 - 6 * factor * x**2 if order == 2 else torch.ones_like(x))
    torch.testing.assert_close(slopes[1], -2 * x**3)


@pytest.mark.parametrize(("inner", "calls"), [(FollowingTheLoss, 4), (SGD, 2)])
def test_first_order_steps_are_recomputed_where_they_have_parameters_to_learn(inner: type[Inner], calls: int) -> None:
    steps: list[int] = []

    def loss(params: Params, step: int) -> Tensor:
        steps.append(step)
        return (params["x"] ** 2).sum(1)

    x, factor = (torch.ones(2, 1, requires_grad=True) for _ in range(2))
    optimizer = inner(step_size=0.1, num_steps=2, order=1, adapt=["x"])
    params = {"x": x, "inner.factor": factor} if inner is FollowingTheLoss else {"x": x}
    with recompute_inner_steps(True):
        *_, (adapted, _) = optimizer.adapt(loss, params, 2, create_graph=False)
    torch.autograd.grad(adapted["x"].sum(), list(params.values()))
    assert len(steps) == calls


def test_initial_values_of_what_is_learnt_are_drawn_from_the_runs_seed() -> None:
    domain, model = Sinusoid(), MLP((1,), 1, [4])
    inner = FollowingTheLoss(step_size=0.1, num_steps=1, order=1, adapt=["*"])
    drawn = [build_from(MAML, domain, model, inner, seed=seed).theta["inner.factor"].item() for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_step_sizes_asked_for_reach_each_step() -> None:
    inner = Counting(step_size=0.5, num_steps=2, order=1, adapt=["x"])
    start = {"x": torch.tensor([[10.0]]), "y": torch.zeros(1, 1)}
    steps = inner.adapt(slope, start, 2, create_graph=False, step_sizes=[1.0, 0.25])
    assert [params["x"].item() for params, _ in steps] == [10.0, 9.0, 8.0]


def test_order_changes_at_its_iteration() -> None:
    inner = SGD(step_size=0.1, num_steps=1, order=2, adapt=["*"], second_order_from=4)
    assert [inner.order_at(number) for number in range(1, 7)] == [1, 1, 1, 2, 2, 2]
    assert inner.present_order == 1
    inner.begin(4)
    assert inner.present_order == 2
    with pytest.raises(MamlError, match=r"inner\.second_order_from=4 needs a second order, .* set inner\.order=2"):
        SGD(step_size=0.1, num_steps=1, order=1, adapt=["*"], second_order_from=4)


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        (("+experiment=sinusoid_reptile", "inner=sgd", "inner.order=2"), "Reptile"),
        (("algorithm=pretrain",), "Pretrain"),
        (("inner.num_steps=0",), "MAML"),
    ],
)
def test_switch_of_the_order_is_refused_where_there_is_no_order(
    overrides: tuple[str, ...], name: str, tiny: TinyRuns
) -> None:
    with pytest.raises(MamlError, match=rf"inner\.second_order_from=4 changes .* that of {name} goes through none"):
        tiny.run(*overrides, "inner.second_order_from=4")
    assert not tiny.runs_dir.exists()


class Returning(SGD):
    """Makes something else of what an update returns."""

    def __init__(self, other: Callable[[Params, Params], object]) -> None:
        super().__init__(step_size=0.1, num_steps=1, order=2, adapt=["*"])
        self.other = other

    def update(self, *arguments: Any) -> Any:
        return self.other(*super().update(*arguments))


@pytest.mark.parametrize(
    "other",
    [
        lambda params, state: params,
        lambda params, state: None,
        lambda params, state: (params, None),
        lambda params, state: ({f"new.{name}": value for name, value in params.items()}, state),
    ],
    ids=["no state", "nothing", "state that is none", "other names"],
)
def test_update_that_returns_something_else_is_refused(other: Callable[[Params, Params], object]) -> None:
    params = {"a": torch.ones(3, 1, requires_grad=True), "b": torch.ones(3, 1, requires_grad=True)}
    with pytest.raises(MamlError, match=r"Returning.update has to return two dictionaries: .* \(a, b\), and"):
        list(
            Returning(other).adapt(
                lambda params, step: (params["a"] * params["b"]).sum(1), params, 1, create_graph=True
            )
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda value: value.mean(0, keepdim=True), r"'a' of shape \(1, 1\), but it is a tensor of shape \(3, 1\)"),
        (lambda value: 1.0, "'a' of type float"),
    ],
    ids=["mean over tasks", "number"],
)
def test_update_without_a_value_for_each_task_is_refused(change: Callable[[Tensor], object], message: str) -> None:
    params = {"a": torch.ones(3, 1, requires_grad=True)}
    inner = Returning(lambda params, state: ({name: change(value) for name, value in params.items()}, state))
    with pytest.raises(MamlError, match=f"Returning.update returns {message}"):
        list(inner.adapt(lambda params, step: params["a"].sum(1), params, 1, create_graph=True))


def test_update_that_leaves_out_a_parameter_is_refused() -> None:
    params = {name: torch.ones(3, 1, requires_grad=True) for name in ("a", "b")}
    inner = Returning(lambda params, state: ({"a": params["a"]}, state))
    with pytest.raises(MamlError, match="has to return two dictionaries"):
        list(inner.adapt(lambda params, step: (params["a"] + params["b"]).sum(1), params, 1, create_graph=True))


class InTurns(SGD):
    """Moves b in even steps and a in odd ones, and returns the other one as it is."""

    def update(
        self, params: Params, losses: Tensor, gradients: Params, state: Params, step: int, step_size: Any
    ) -> tuple[Params, Params]:
        moved = super().update(params, losses, gradients, state, step, step_size)[0]
        return {name: moved[name] if name == "ba"[step % 2] else params[name] for name in gradients}, state


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("training", [True, False])
def test_gradient_is_partial_where_a_step_leaves_a_parameter_as_it_is(
    training: bool, order: Literal[1, 2], recompute: bool
) -> None:
    params = {name: torch.ones(2, 1, requires_grad=training) for name in "ab"}
    inner = InTurns(step_size=0.1, num_steps=2, order=order, adapt=["*"])

    def loss(params: Params, step: int) -> Tensor:
        return ((params["a"] * params["b"]).sum(1) - 3) ** 2

    with torch.set_grad_enabled(training), recompute_inner_steps(recompute):
        *_, (adapted, _) = inner.adapt(loss, params, 2, create_graph=training and order == 2)
    b = 1 - 0.1 * 2 * (1 - 3)
    a = 1 - 0.1 * 2 * (b - 3) * b
    torch.testing.assert_close(torch.stack([adapted["a"], adapted["b"]])[:, 0, 0], torch.tensor([a, b]))
