"""Reptile against a plain loop over tasks, and the order of its mini-batches."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor

from maml.algorithm.reptile import Reptile
from maml.domain.base import Role
from maml.errors import MamlError
from maml.hardware.base import Execution
from maml.inner.adam import Adam
from maml.inner.base import Inner
from maml.inner.sgd import SGD
from maml.model.base import Model
from maml.model.mlp import MLP
from maml.outer.sgd import SGD as OuterSGD
from maml.seeding import Stream
from maml.training.meta_gradient import MetaGradient
from maml.types import Examples, Params, Tasks, expand, num_tasks
from tests import algorithms, plain_adam, plain_maml
from tests.algorithms import build_from
from tests.training.test_meta_gradient import NUM_SUPPORT, NUM_TASKS, FixedExamples

STEP_SIZE, NUM_STEPS, NUM_EXAMPLES, BETAS, EPS = 0.1, 7, 2, (0.0, 0.999), 1e-3
Kind = Literal["adam", "sgd"]
State = dict[str, plain_adam.State]


class Float64MLP(MLP):
    """Initial parameters in float64; larger than usual, because the usual ones' gradients are rounding noise."""

    def init(self, stream: Stream) -> Params:
        return {
            name: Stream(1).child(name).uniform(value.shape, -0.5, 0.5, dtype=torch.float64)
            for name, value in super().init(stream).items()
        }


class Watched(FixedExamples):
    """A domain that notes the inputs of every inner step."""

    def __init__(self) -> None:
        super().__init__((1,), classes=False)
        self.seen: list[Tensor] = []

    def data(self, tasks: Tasks, role: Role, step: int = 0) -> Examples:
        return super().data(tasks, role, step)._replace(num_shots=7)

    def inner_loss(self, model: Model, params: Params, data: Examples) -> Tensor:
        assert data.num_shots == 1, "an example has the same weight for every K"
        self.seen.append(data.x[:, :, 0])
        return super().inner_loss(model, params, data)


def make(kind: Kind = "adam", num_test_examples: int = 3) -> tuple[Reptile, Watched]:
    domain = Watched()
    adapt = ["*", "!head.bias"]
    inner: Inner = (
        Adam(STEP_SIZE, NUM_STEPS, order=1, adapt=adapt, betas=BETAS, eps=EPS)
        if kind == "adam"
        else SGD(STEP_SIZE, NUM_STEPS, order=1, adapt=adapt)
    )
    algorithm = build_from(
        Reptile,
        domain,
        Float64MLP((1,), 1, [6]),
        inner,
        OuterSGD(step_size=1.0, num_iterations=4, final_step_size=0.0),
        num_examples=NUM_EXAMPLES,
        num_test_examples=num_test_examples,
    )
    return algorithm, domain


class Named(MLP):
    """A network with a parameter that is called step."""

    def init(self, stream: Stream) -> Params:
        return super().init(stream) | {"step": torch.ones(2)}


def test_parameter_with_a_name_of_the_inner_state_is_refused() -> None:
    inner = Adam(step_size=0.1, num_steps=1, order=1, adapt=["*"])
    with pytest.raises(MamlError, match="a parameter 'step', a name that Reptile has for a value of its own"):
        build_from(Reptile, FixedExamples((1,), False), Named((1,), 1, [8]), inner, num_examples=2, num_test_examples=2)


def test_without_inner_steps_nothing_would_be_trained() -> None:
    with pytest.raises(MamlError, match=r"inner\.num_steps=0 takes none; set a number of steps"):
        build_from(
            Reptile,
            Watched(),
            Float64MLP((1,), 1, [6]),
            SGD(STEP_SIZE, 0, order=1, adapt=["*"]),
            OuterSGD(step_size=1.0, num_iterations=4),
            num_examples=1,
            num_test_examples=1,
        )


def plain_steps(
    theta: Params, state: State, x: Tensor, y: Tensor, key: int, num_examples: int, num_steps: int, kind: Kind
) -> tuple[Params, State]:
    """Takes steps on one task: shuffled passes over its support set, cut into mini-batches."""
    order: list[int] = []
    for number in range(num_examples * num_steps // len(x) + 1):
        order += Stream(key).child(number).choice((), len(x), len(x)).tolist()
    params, state = dict(theta), dict(state)
    for step in range(num_steps):
        # A mini-batch that is larger than the support set has an example more than once.
        chosen = order[step * num_examples : (step + 1) * num_examples]
        names = [name for name in params if name != "head.bias"]
        leaves = {name: value.clone().requires_grad_() for name, value in params.items()}
        loss = ((plain_maml.mlp(leaves, x[chosen]) - y[chosen]) ** 2).mean()
        for name, gradient in zip(names, torch.autograd.grad(loss, [leaves[name] for name in names]), strict=True):
            if kind == "adam":
                params[name], state[name] = plain_adam.step(params[name], gradient, state[name], STEP_SIZE, BETAS, EPS)
            else:
                params[name] = params[name] - STEP_SIZE * gradient
    return params, state


def mean_state(states: list[State], name: str) -> plain_adam.State:
    means, squares, counts = zip(*(state[name] for state in states), strict=True)
    return sum(means) / len(states), sum(squares) / len(states), sum(counts) / len(states)


def start(algorithm: Reptile, count: int) -> Params:
    return expand(algorithm.theta | algorithm.buffers, count)


def assert_close(values: Params, expected: Params) -> None:
    assert values.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(values[name], value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("chunk", [None, 1, 3])
@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_meta_update_equals_the_plain_loop(kind: Kind, chunk: int | None) -> None:
    algorithm, _ = make(kind)
    theta = {name: value.clone() for name, value in algorithm.theta.items()}
    state = dict.fromkeys(theta, plain_adam.NEW)
    for iteration, rate in enumerate([1.0, 0.75, 0.5]):
        tasks = algorithm.sample_tasks(NUM_TASKS, Stream(iteration))
        metrics = algorithms.step(algorithm, tasks, chunk)
        ends, losses = [], []
        for task in range(NUM_TASKS):
            x, y, query_x, query_y = (tasks[name][task] for name in ("support_x", "support_y", "query_x", "query_y"))
            key = int(Stream(iteration).child("minibatches").bits((NUM_TASKS,))[task])
            ends.append(plain_steps(theta, state, x, y, key, NUM_EXAMPLES, NUM_STEPS, kind))
            losses.append(((plain_maml.mlp(ends[-1][0], query_x) - query_y) ** 2).mean())
        theta = {
            name: value + rate * (torch.stack([params[name] for params, _ in ends]).mean(0) - value)
            for name, value in theta.items()
        }
        assert_close(algorithm.theta, theta)
        assert list(metrics) == ["loss"]
        torch.testing.assert_close(metrics["loss"], torch.stack(losses).mean())
        if kind == "adam":  # the next meta-update starts from the mean of the tasks' states
            state = {name: mean_state([each for _, each in ends], name) for name in theta}
            adapted = [name for name in theta if name != "head.bias"]
            assert_close(
                {name: value for name, value in algorithm.buffers.items() if name != "step"},
                {f"mean.{name}": torch.as_tensor(state[name][0]) for name in adapted}
                | {f"square.{name}": torch.as_tensor(state[name][1]) for name in adapted},
            )
            assert algorithm.buffers["step"] == NUM_STEPS * (iteration + 1)
        else:
            assert algorithm.buffers == {}


def test_passes_cover_the_support_set_without_a_gap_each_in_an_order_of_its_own() -> None:
    algorithm, domain = make()
    algorithm.inner.num_steps = 10  # mini-batches of 2 out of 5: four passes
    tasks = algorithm.sample_tasks(NUM_TASKS, Stream(0))
    algorithms.step(algorithm, tasks)
    assert {tuple(seen.shape) for seen in domain.seen} == {(NUM_TASKS, NUM_EXAMPLES)}
    passes = torch.cat(domain.seen, dim=1).unflatten(1, (4, NUM_SUPPORT))
    everything = tasks["support_x"].squeeze(-1).sort(dim=1).values
    for number in range(4):
        assert torch.equal(passes[:, number].sort(dim=1).values, everything)
    ranks = passes.argsort(dim=2).flatten(0, 1).tolist()
    assert len({tuple(order) for order in ranks}) > NUM_TASKS, "passes differ, and tasks do"


@pytest.mark.parametrize("num_test_examples", [3, 50])
@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_meta_test_starts_from_the_buffers_state_and_leaves_it_alone(kind: Kind, num_test_examples: int) -> None:
    algorithm, _ = make(kind, num_test_examples=num_test_examples)
    algorithms.step(algorithm, algorithm.sample_tasks(NUM_TASKS, Stream(0)))
    before = {name: value.clone() for name, value in algorithm.buffers.items()}
    state: State = {
        name: (before[f"mean.{name}"], before[f"square.{name}"], before["step"].item())
        if f"mean.{name}" in before
        else plain_adam.NEW
        for name in algorithm.theta
    }
    tasks: Tasks = algorithm.domain.sample_tasks(NUM_TASKS, Stream(9), "test")
    assert "minibatches" not in tasks
    key = int(Stream(0).child("minibatches").key)
    steps = list(algorithm.adapt(start(algorithm, NUM_TASKS), tasks, 6))
    assert len(steps) == 7
    for task in range(num_tasks(tasks)):
        x, y = tasks["support_x"][task], tasks["support_y"][task]
        expected, _ = plain_steps(algorithm.theta, state, x, y, key, num_test_examples, 6, kind)
        assert_close({name: value[task].detach() for name, value in steps[-1].items()}, expected)
    assert all(torch.equal(algorithm.buffers[name], value) for name, value in before.items())
    assert algorithm.buffers.keys() == before.keys()


def test_adaptation_of_a_task_depends_on_no_other() -> None:
    algorithm, _ = make()
    algorithms.step(algorithm, algorithm.sample_tasks(NUM_TASKS, Stream(0)))
    tasks = algorithm.domain.sample_tasks(NUM_TASKS, Stream(9), "test")
    *_, together = algorithm.adapt(start(algorithm, NUM_TASKS), tasks, 4)
    for task in range(NUM_TASKS):
        only = {name: value[task : task + 1] for name, value in tasks.items()}
        *_, alone = algorithm.adapt(start(algorithm, 1), only, 4)
        assert_close({name: value[task : task + 1] for name, value in together.items()}, alone)


@pytest.mark.slow  # it compiles, as tests/hardware/test_compile.py does
@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # the compiler would give up at it
def test_compiled_gradient_equals_eager_on_new_tasks() -> None:
    algorithm, _ = make()
    algorithm.inner.num_steps = 2  # a shorter program is compiled sooner
    compiled = MetaGradient(algorithm, Execution(1, None, compile=True))
    for seed in (1, 2):
        tasks = algorithm.sample_tasks(NUM_TASKS, Stream(seed))
        params = algorithm.theta | algorithm.buffers
        for ours, expected in zip(
            compiled.gradient(params, tasks), algorithms.gradient(algorithm, algorithm.theta, tasks), strict=True
        ):
            assert_close(ours, expected)
    assert compiled.execution.compile, "it was not given up"
