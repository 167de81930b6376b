"""The meta-learner LSTM against its formulas, number by number, and its meta-gradient against finite differences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import pytest
import torch
from torch import Tensor

from maml.algorithm.maml import MAML
from maml.api import load
from maml.errors import MamlError
from maml.inner.meta_lstm import MetaLSTM, _join, _split, preprocess
from maml.model.mlp import MLP
from maml.pictures import Lines
from maml.record.gallery import drawn_pictures
from maml.seeding import Stream
from maml.types import Params, Tasks
from tests import algorithms
from tests.algorithms import build_from
from tests.runs import TinyRuns
from tests.training.test_meta_gradient import NUM_TASKS, FixedExamples, as_list

SIZE, SCALE, DIVISOR = 3, 0.4, 2.5
ADAPTED = ["linear1.weight", "linear1.bias", "head.weight"]


def meta_lstm(num_steps: int = 3, order: Literal[1, 2] = 1, adapt: Sequence[str] = ("*",)) -> MetaLSTM:
    return MetaLSTM(num_steps, order, list(adapt), SIZE, SCALE, DIVISOR)


def scattered(theta: Params, width: float) -> Params:
    """Returns theta in float64 with every entry moved, so that no weight is too small to be seen."""
    return {
        name: value.double() + Stream(1).child(name).uniform(value.shape, -width, width, dtype=torch.float64)
        for name, value in theta.items()
    }


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def preprocessed(v: float) -> list[float]:
    return [math.log(abs(v)) / 10, math.copysign(1, v)] if abs(v) >= math.exp(-10) else [-1, math.exp(10) * v]


class Number:
    """One number of one task's parameters with its state, in plain Python."""

    def __init__(self, own: dict[str, list], start: float) -> None:
        self.own, self.theta = own, start
        self.hidden, self.cell = [0.0] * SIZE, [0.0] * SIZE
        self.last = {"forget": 0.0, "input": 0.0}

    def step(self, loss: float, gradient: float) -> float:
        loss, gradient = SCALE * loss, SCALE * gradient / DIVISOR
        seen = preprocessed(loss) + preprocessed(gradient) + self.hidden
        rows = zip(self.own["inner.lstm.weight"], self.own["inner.lstm.bias"], strict=True)
        sums = [sum(w * x for w, x in zip(row, seen, strict=True)) + b for row, b in rows]
        admit, keep, emit, candidate = (sums[i * SIZE : (i + 1) * SIZE] for i in range(4))
        for i in range(SIZE):
            self.cell[i] = sigmoid(keep[i]) * self.cell[i] + sigmoid(admit[i]) * math.tanh(candidate[i])
            self.hidden[i] = sigmoid(emit[i]) * math.tanh(self.cell[i])
        for gate, last in self.last.items():
            seen = [*self.hidden, self.theta, last]
            weights, (bias,) = self.own[f"inner.{gate}.weight"], self.own[f"inner.{gate}.bias"]
            self.last[gate] = sum(w * x for w, x in zip(weights, seen, strict=True)) + bias
        self.theta = sigmoid(self.last["forget"]) * self.theta - sigmoid(self.last["input"]) * gradient
        return self.theta


def two_tasks() -> Params:
    """Parameters of two tasks, and weights of the LSTM that differ between them."""
    start = {"m": torch.tensor([[[1.0, 0.1]], [[-2.0, 1e-3]]]), "x": torch.tensor([[3.0], [-0.5]])}
    one = {name: value[0] for name, value in start.items()}
    learnt = [scattered(meta_lstm().init_learned(one, Stream(seed)), 0.5) for seed in (0, 1)]
    own = {name: torch.stack([each[name] for each in learnt]) for name in learnt[0]}
    return {name: value.double() for name, value in start.items()} | own


def loss(params: Params, step: int) -> Tensor:
    return (step + 1) * params["m"].square().sum((1, 2)) + (params["x"] ** 3).sum(1).abs()


def test_steps_equal_the_formulas_number_by_number() -> None:
    start = two_tasks()
    steps = list(meta_lstm().adapt(loss, start, 3, create_graph=False))
    for task in range(2):
        own = {name: value[task].tolist() for name, value in start.items() if name.startswith("inner.")}
        numbers = [Number(own, value) for value in (*start["m"][task].flatten().tolist(), start["x"][task].item())]
        for step in range(3):
            m, x = [number.theta for number in numbers[:2]], numbers[2].theta
            value = (step + 1) * sum(v * v for v in m) + abs(x**3)
            gradients = [*(2 * (step + 1) * v for v in m), math.copysign(3 * x * x, x)]
            found = [number.step(value, gradient) for number, gradient in zip(numbers, gradients, strict=True)]
            params, state = steps[step + 1]
            assert [*params["m"][task].flatten().tolist(), params["x"][task].item()] == pytest.approx(found, rel=1e-12)
            for gate in ("forget", "input"):
                assert state[gate][task].tolist() == pytest.approx([n.last[gate] for n in numbers], rel=1e-12)
            assert state["hidden"][task].T.tolist() == [pytest.approx(n.hidden, rel=1e-11) for n in numbers]


def test_preprocessing_has_two_ranges_and_finite_derivatives_everywhere() -> None:
    edge = math.exp(-10)
    values = torch.tensor([[0.0, edge / 2, -edge / 2, edge * 1.001, -edge * 1.001, -3.0, 1e30, 1e-40]]).double()
    values.requires_grad_()
    found = preprocess(values)
    for value, pair in zip(values[0].tolist(), found[0].T.tolist(), strict=True):
        assert pair == pytest.approx(preprocessed(value), rel=1e-12, abs=1e-12)
    (slopes,) = torch.autograd.grad(found.sum(), values)
    assert slopes.isfinite().all()
    assert slopes[0, 0] == pytest.approx(math.exp(10)), "at zero, only the second of the two has a slope"


def make(order: Literal[1, 2], num_steps: int = 3) -> tuple[MAML, Params, Tasks]:
    """Builds MAML and a theta in float64; the head's bias does not adapt."""
    domain = FixedExamples((2,), classes=False)
    inner = meta_lstm(num_steps, order, ("*", "!head.bias"))
    algorithm = build_from(MAML, domain, MLP((2,), 1, [4], "tanh"), inner)
    return algorithm, scattered(algorithm.theta, 0.3), domain.sample_tasks(NUM_TASKS, Stream(2))


Seen = list[tuple[float, list[float]]]
"""The loss and the gradient in each step of a task."""


def forward(params: Params, x: Tensor) -> Tensor:
    hidden = torch.tanh(x @ params["linear1.weight"].T + params["linear1.bias"])
    return hidden @ params["head.weight"].T + params["head.bias"]


def plain_outer_loss(theta: Params, tasks: Tasks, num_steps: int, held: list[Seen] | None) -> tuple[float, list[Seen]]:
    """Computes the mean query loss one number at a time.

    Args:
        theta: parameters without a task axis.
        tasks: the tasks.
        num_steps: number of steps.
        held: for each task, the losses and gradients that the LSTM gets. None takes those of the parameters.

    Returns:
        The loss, and for each task the losses and gradients that the LSTM got.
    """
    own = {name: value.tolist() for name, value in theta.items() if name.startswith("inner.")}
    total, all_seen = 0.0, []
    for task, (x, y, query_x, query_y) in enumerate(as_list(tasks)):
        params = {name: value for name, value in theta.items() if not name.startswith("inner.")}
        numbers = [Number(own, value) for name in ADAPTED for value in params[name].flatten().tolist()]
        seen: Seen = []
        for step in range(num_steps):
            if held is None:
                leaves = {name: params[name].detach().requires_grad_() for name in ADAPTED}
                value = ((forward(params | leaves, x) - y) ** 2).mean()
                gradients = torch.autograd.grad(value, list(leaves.values()))
                seen.append((value.item(), torch.cat([each.flatten() for each in gradients]).tolist()))
            else:
                seen.append(held[task][step])
            found = [number.step(seen[-1][0], slope) for number, slope in zip(numbers, seen[-1][1], strict=True)]
            parts = torch.tensor(found, dtype=torch.float64).split([params[name].numel() for name in ADAPTED])
            params |= {name: part.view_as(params[name]) for name, part in zip(ADAPTED, parts, strict=True)}
        total += ((forward(params, query_x) - query_y) ** 2).mean().item()
        all_seen.append(seen)
    return total / NUM_TASKS, all_seen


@pytest.mark.parametrize("order", [1, 2])
def test_meta_gradient_equals_finite_differences(order: Literal[1, 2]) -> None:
    algorithm, theta, tasks = make(order)
    gradient, metrics = algorithms.gradient(algorithm, theta, tasks)
    value, seen = plain_outer_loss(theta, tasks, 3, held=None)
    assert metrics["loss"].item() == pytest.approx(value, rel=1e-12)
    held = seen if order == 1 else None  # in first order, what the LSTM reads does not move with theta
    for name, middle in theta.items():
        direction = Stream(3).child(name).uniform(middle.shape, -1.0, 1.0, dtype=torch.float64)
        behind, ahead = (
            plain_outer_loss(theta | {name: middle + offset * direction}, tasks, 3, held)[0] for offset in (-1e-5, 1e-5)
        )
        assert (gradient[name] * direction).sum().item() == pytest.approx((ahead - behind) / 2e-5, rel=1e-5), name
        assert gradient[name].all(), "the meta-gradient reaches every number"


def test_orders_differ_and_recomputation_and_chunks_change_nothing() -> None:
    first, second = (algorithms.gradient(*make(order))[0] for order in (1, 2))
    assert not torch.allclose(first["linear1.weight"], second["linear1.weight"], rtol=1e-3)
    for order, expected in ((1, first), (2, second)):
        for options in ({"recompute": True}, {"task_chunk": 3}):
            again, _ = algorithms.gradient(*make(order), **options)  # type: ignore[arg-type]
            for name, value in expected.items():
                torch.testing.assert_close(again[name], value, rtol=1e-10, atol=1e-13)


def test_training_starts_near_gradient_descent_with_a_small_rate() -> None:
    inner = MetaLSTM(num_steps=1, order=1, adapt=["*"])
    theta = {"x": torch.tensor([0.5, -1.0, 0.0]), "m": torch.tensor([[2.0]])}
    learnt = inner.init_learned(theta, Stream(5))
    assert {name: tuple(value.shape) for name, value in learnt.items()} == {
        "inner.lstm.weight": (80, 24),
        "inner.lstm.bias": (80,),
        "inner.forget.weight": (22,),
        "inner.forget.bias": (1,),
        "inner.input.weight": (22,),
        "inner.input.bias": (1,),
    }
    assert 4 <= learnt["inner.forget.bias"] < 5
    assert -5 <= learnt["inner.input.bias"] < -4
    small = torch.cat([value.flatten() for name, value in learnt.items() if name.endswith("weight")])
    assert small.abs().max() <= 0.01
    assert small.std().item() == pytest.approx(0.01 / math.sqrt(3), rel=0.05), "uniform"
    params = {name: value.expand(2, *value.shape) for name, value in (theta | learnt).items()}
    slopes = {"x": torch.tensor([1.0, -2.0, 3.0]), "m": torch.tensor([[0.0]])}
    *_, (adapted, _) = inner.adapt(
        lambda params, step: sum((params[name] * slope).flatten(1).sum(1) for name, slope in slopes.items()),  # type: ignore[arg-type, return-value]
        params,
        1,
        create_graph=False,
    )
    keep, rate = (torch.sigmoid(learnt[f"inner.{gate}.bias"]).item() for gate in ("forget", "input"))
    for name, slope in slopes.items():
        torch.testing.assert_close(adapted[name][0], keep * theta[name] - rate * slope, rtol=0, atol=2e-3)
    assert rate < 0.018


def test_initial_weights_follow_the_seed_and_leave_the_networks_own_alone() -> None:
    domain, model = FixedExamples((2,), classes=False), MLP((2,), 1, [4])
    one, again, other = (build_from(MAML, domain, model, meta_lstm(), seed=seed).theta for seed in (0, 0, 1))
    assert all(torch.equal(one[name], value) for name, value in again.items())
    learnt = [name for name in one if name.startswith("inner.")]
    assert not any(torch.equal(one[name], other[name]) for name in learnt)
    assert all(torch.equal(one[name], value) for name, value in model.init(Stream(0)).items())


def test_only_chosen_parameters_adapt_and_its_own_never_do() -> None:
    algorithm, theta, tasks = make(order=1)
    *_, last = algorithm.adapt(algorithm.params_per_task(NUM_TASKS, theta), tasks, 2)
    moved = {name for name, value in last.items() if not torch.equal(value, theta[name].expand_as(value))}
    assert moved == set(ADAPTED)
    with pytest.raises(MamlError, match=r"'inner\.\*' matches no parameter; there are linear1\.weight"):
        meta_lstm(adapt=["inner.*"]).adapted_names(list(theta))


def test_evaluation_keeps_no_graph_of_its_steps() -> None:
    start = two_tasks()
    with torch.no_grad():
        *_, (params, state) = meta_lstm().adapt(loss, start, 3, create_graph=False)
    assert not any(value.requires_grad for value in (params | state).values())


def test_pictures_show_the_mean_gates_of_each_layer() -> None:
    algorithm, theta, tasks = make(order=1)
    params = algorithm.params_per_task(NUM_TASKS, theta)
    states = [state for _, state in algorithm.inner.adapt(algorithm.support_loss(tasks), params, 3, False)]
    pictures = algorithm.pictures(params, tasks, 3)
    assert list(pictures) == ["forget_gate", "input_gate"]
    for name, picture in pictures.items():
        assert isinstance(picture, Lines)
        assert list(picture.x or ()) == [1, 2, 3]
        gates = [torch.sigmoid(state[name.removesuffix("_gate")]) for state in states[1:]]
        # 8 weights and 4 biases of the first layer, then 4 weights of the last.
        assert picture.lines["linear1"] == pytest.approx([gate[:, :12].mean().item() for gate in gates])
        assert picture.lines["head"] == pytest.approx([gate[:, 12:].mean().item() for gate in gates])
    assert algorithm.pictures(params, tasks, 0) == {}


def test_run_has_its_name_and_its_pictures_and_can_be_loaded(tiny: TinyRuns) -> None:
    folder = tiny.run("inner=meta_lstm", "num_iterations=4")
    assert set(drawn_pictures(folder)) == {"forget_gate", "input_gate"}
    network = load(folder)
    x, y = torch.linspace(-1, 1, 5).unsqueeze(1), torch.ones(5, 1)
    assert network.adapt(x, y, num_steps=2)(x).shape == (5, 1)
    assert network.algorithm.name == "meta-learner LSTM"


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (("evaluation.step_size=0.1",), r"evaluation\.step_size sets the size of steps, .* set evaluation\.step_size="),
        (
            ("evaluation.search={_target_: maml.evaluation.StepSizeSearch, step_sizes: [0.1], num_tasks: 2}",),
            r"evaluation\.search sets the size of steps, but this inner optimizer .* set evaluation\.search=null",
        ),
        (("algorithm=pretrain",), r"it cannot learn inner\.lstm\.weight, as MetaLSTM does; choose inner=sgd"),
        (("+inner.step_size=0.1",), r"inner\.step_size"),
        (("inner.order=3",), r"inner\.order=3"),
        (("inner.hidden_size=0",), r"inner\.hidden_size=0"),
        (("inner.gradient_divisor=0",), r"inner\.gradient_divisor=0"),
        (("inner.loss_scale=-1",), r"inner\.loss_scale=-1"),
    ],
)
def test_wrong_settings_are_named_before_anything_is_written(
    overrides: tuple[str, ...], reason: str, tiny: TinyRuns
) -> None:
    with pytest.raises(MamlError, match=reason):
        tiny.run("inner=meta_lstm", *overrides)
    assert not tiny.runs_dir.exists()


def test_single_numbers_adapt_as_well() -> None:
    params = {"scale": torch.tensor([1.0, 2.0]), "weight": torch.arange(6.0).view(2, 3)}
    joined = _join(params)
    assert joined.tolist() == [[1, 0, 1, 2], [2, 3, 4, 5]]
    assert all(torch.equal(value, params[name]) for name, value in _split(joined, params).items())
