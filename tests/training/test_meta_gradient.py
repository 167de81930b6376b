"""The meta-gradient against a plain loop over tasks and against finite differences, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakSet

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maml.algorithm.maml import MAML
from maml.config.compose import compose
from maml.config.schema import build
from maml.domain.base import Metrics, Role, SupervisedDomain
from maml.domain.sinusoid import Sinusoid
from maml.errors import MamlError
from maml.hardware.base import Execution
from maml.hardware.memory import recompute_inner_steps
from maml.inner.sgd import SGD
from maml.model.base import Model
from maml.model.conv4 import Conv4
from maml.model.mlp import MLP
from maml.model.module import ModuleModel
from maml.outer.adam import Adam
from maml.outer.base import Objective, OuterState
from maml.seeding import Stream
from maml.training.meta_gradient import BatchObjective, MetaGradient
from maml.types import Examples, Params, Split, Tasks, expand
from tests import algorithms, plain_maml
from tests.algorithms import build_from

pytestmark = pytest.mark.usefixtures("float64")

NUM_TASKS, NUM_SUPPORT, NUM_QUERY, NUM_WAYS = 4, 5, 6, 5


class FixedExamples(SupervisedDomain):
    """Random inputs of a given shape with random targets; classification if ``classes`` is set."""

    headline = "loss"
    larger_is_better = False
    num_shots = 1

    def __init__(self, in_shape: tuple[int, ...], classes: bool) -> None:
        self.in_shape, self.classes = in_shape, classes
        self.out_dim = NUM_WAYS if classes else 1

    def draw_tasks(self, num_tasks: int, stream: Stream, split: Split, num_shots: int, num_query: int) -> Tasks:
        def data(role: str, size: int) -> Tasks:
            child = stream.child(role)
            x = child.child("x").uniform((num_tasks, size, *self.in_shape), -1.0, 1.0, dtype=torch.float64)
            y = child.child("y").uniform((num_tasks, size, 1), -1.0, 1.0, dtype=torch.float64)
            labels = torch.arange(size, device=stream.device).remainder(NUM_WAYS).expand(num_tasks, size)
            return {f"{role}_x": x, f"{role}_y": labels if self.classes else y}

        return data("support", NUM_SUPPORT) | data("query", NUM_QUERY)

    def data(self, tasks: Tasks, role: Role, step: int = 0) -> Examples:
        return Examples(tasks[f"{role}_x"], tasks[f"{role}_y"], num_shots=1)

    def loss(self, outputs: Tensor, data: Examples) -> tuple[Tensor, Metrics]:
        return torch.stack([plain_loss(self.classes)(o, y) for o, y in zip(outputs, data.y, strict=True)]), {}

    def measure(self, model: Model, params: Params, support: Examples, query: Examples, step: int) -> Metrics:
        return {"loss": self.inner_loss(model, params, query)}


def plain_loss(classes: bool) -> Callable[[Tensor, Tensor], Tensor]:
    if classes:
        return lambda outputs, y: F.cross_entropy(outputs, y, reduction="sum")
    return lambda outputs, y: ((outputs - y) ** 2).mean()


class SmallNet(nn.Module):
    """A user's network with the library's own batch normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 3, 3, stride=2)
        self.head = nn.Linear(3 * 7 * 7, NUM_WAYS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.softplus(self.conv2(F.softplus(self.norm(self.conv1(x))))).flatten(1))


def module_reference(params: Params, x: Tensor) -> Tensor:
    net = SmallNet().double()  # fresh running statistics, which training mode never reads
    return torch.func.functional_call(net, params, (x.permute(0, 3, 1, 2),))


SMALL, WIDE = (16, 16, 2), (26, 28, 1)
CASES: dict[str, tuple[tuple[int, ...], bool, Callable[[], Model], plain_maml.Forward]] = {
    "mlp": ((1,), False, lambda: MLP((1,), 1, [12, 12]), plain_maml.mlp),
    "mlp-batch-norm": (
        SMALL,
        True,
        lambda: MLP(SMALL, NUM_WAYS, [12, 8], normalization="batch"),
        plain_maml.mlp,
    ),
    "conv4-stride": (SMALL, True, lambda: Conv4(SMALL, NUM_WAYS, 6, "stride"), plain_maml.conv4("stride", "mean")),
    # With this many channels, tasks are convolved one by one.
    "conv4-stride-wide": (WIDE, True, lambda: Conv4(WIDE, NUM_WAYS, 16, "stride"), plain_maml.conv4("stride", "mean")),
    "conv4-max-pool": (
        SMALL,
        True,
        lambda: Conv4(SMALL, NUM_WAYS, 6, "max", "flatten"),
        plain_maml.conv4("max", "flatten"),
    ),
    "module-batch-norm": (SMALL, True, lambda: ModuleModel(SMALL, NUM_WAYS, SmallNet), module_reference),
    "module-one-by-one": (
        SMALL,
        True,
        lambda: ModuleModel(SMALL, NUM_WAYS, SmallNet, vectorize=False),
        module_reference,
    ),
}


def make(
    in_shape: tuple[int, ...], classes: bool, model: Model, num_steps: int, order: int
) -> tuple[MAML, Params, Tasks]:
    domain = FixedExamples(in_shape, classes)
    inner = SGD(step_size=0.3, num_steps=num_steps, order=order, adapt=["*", "!*.shift"])  # type: ignore[arg-type]
    algorithm = build_from(MAML, domain, model, inner)
    # Larger than the initial weights of 0.01, for which second derivatives would be lost in rounding.
    theta = {
        name: value.double() + Stream(1).child(name).uniform(value.shape, -0.4, 0.4, dtype=torch.float64)
        for name, value in algorithm.theta.items()
    }
    return algorithm, theta, domain.sample_tasks(NUM_TASKS, Stream(2))


def as_list(tasks: Tasks) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    return list(zip(tasks["support_x"], tasks["support_y"], tasks["query_x"], tasks["query_y"], strict=True))


@pytest.mark.parametrize("chunk", [None, 1, 3])
@pytest.mark.parametrize("num_steps", [1, 5])
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_meta_gradient_equals_the_plain_loop(case: str, order: int, num_steps: int, chunk: int | None) -> None:
    in_shape, classes, make_model, forward = CASES[case]
    algorithm, theta, tasks = make(in_shape, classes, make_model(), num_steps, order)
    gradient, metrics = algorithms.gradient(algorithm, theta, tasks, chunk)

    leaves = {name: value.clone().requires_grad_() for name, value in theta.items()}
    loss = plain_maml.outer_loss(
        forward,
        plain_loss(classes),
        leaves,
        as_list(tasks),
        algorithm.inner.step_size,
        num_steps,
        order,
        algorithm.inner.adapted_names(list(theta)),
    )
    expected = torch.autograd.grad(loss, list(leaves.values()))
    assert metrics["loss"].item() == pytest.approx(loss.item(), rel=1e-9)
    for name, value in zip(leaves, expected, strict=True):
        torch.testing.assert_close(gradient[name], value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("chunk", [None, 1, 2])
def test_evaluation_without_a_gradient_has_the_same_metrics(chunk: int | None) -> None:
    in_shape, classes, make_model, _ = CASES["mlp"]
    algorithm, theta, tasks = make(in_shape, classes, make_model(), num_steps=1, order=2)
    _, expected = algorithms.gradient(algorithm, theta, tasks)
    found = algorithms.meta_gradient(algorithm, chunk).evaluate(theta, tasks)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


@pytest.mark.parametrize("case", CASES)
def test_recomputed_steps_give_the_same_meta_gradient(case: str) -> None:
    in_shape, classes, make_model, _ = CASES[case]
    algorithm, theta, tasks = make(in_shape, classes, make_model(), num_steps=3, order=2)
    expected, _ = algorithms.gradient(algorithm, theta, tasks)
    gradient, _ = algorithms.gradient(algorithm, theta, tasks, recompute=True)
    for name, value in expected.items():
        torch.testing.assert_close(gradient[name], value, rtol=1e-10, atol=1e-12)


class Held:
    """A number that autograd keeps; counted for as long as autograd keeps it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def test_recomputed_steps_keep_no_more_of_five_steps_than_of_one() -> None:
    """Counts the numbers that autograd keeps for the meta-gradient."""
    held = {}
    for recompute in (False, True):
        for num_steps in (1, 5):
            model = Conv4(SMALL, NUM_WAYS, 6, "stride")
            algorithm, theta, tasks = make(SMALL, True, model, num_steps, order=2)
            alive: WeakSet[Held] = WeakSet()

            def pack(tensor: Tensor, alive: WeakSet[Held] = alive) -> Held:
                alive.add(held_tensor := Held(tensor))
                return held_tensor

            leaves = {name: value.requires_grad_() for name, value in theta.items()}
            hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda held_tensor: held_tensor.tensor)
            with recompute_inner_steps(recompute), hooks:
                losses, _ = algorithm.task_losses(expand(leaves, NUM_TASKS), tasks)
            held[recompute, num_steps] = sum({each.tensor.data_ptr(): each.tensor.numel() for each in alive}.values())
            del losses
    parameters = NUM_TASKS * sum(value.numel() for value in theta.values())
    assert held[True, 5] <= held[True, 1] + 5 * parameters
    assert held[True, 5] < 0.5 * held[False, 5]


@pytest.mark.parametrize("chunk", [None, 1])
@pytest.mark.parametrize("num_steps", [1, 5])
def test_meta_gradient_equals_finite_differences(num_steps: int, chunk: int | None) -> None:
    model = Conv4(SMALL, NUM_WAYS, 4, "mean", "flatten", activation="softplus")
    algorithm, theta, tasks = make(SMALL, True, model, num_steps, order=2)
    gradient, _ = algorithms.gradient(algorithm, theta, tasks, chunk)
    first_order, *_ = make(SMALL, True, model, num_steps, order=1)  # has the same loss and is cheaper
    for name, value in theta.items():
        direction = Stream(3).child(name).uniform(value.shape, -1.0, 1.0, dtype=torch.float64)

        def loss_at(offset: float, name: str = name, direction: Tensor = direction) -> float:
            moved = theta | {name: theta[name] + offset * direction}
            return first_order.task_losses(expand(moved, NUM_TASKS), tasks)[0].mean().item()

        step = 1e-4
        # A fourth-order difference, which is exact enough for the tolerance.
        slope = (8 * (loss_at(step) - loss_at(-step)) - (loss_at(2 * step) - loss_at(-2 * step))) / (12 * step)
        if name.startswith("conv") and name.endswith("bias"):  # has no effect, because normalisation follows
            assert abs((gradient[name] * direction).sum().item()) < 1e-9
        else:
            assert (gradient[name] * direction).sum().item() == pytest.approx(slope, rel=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_first_order_differs_measurably_from_second(case: str) -> None:
    in_shape, classes, make_model, _ = CASES[case]
    flat = []
    for order in (1, 2):
        algorithm, theta, tasks = make(in_shape, classes, make_model(), num_steps=1, order=order)
        gradient, _ = algorithms.gradient(algorithm, theta, tasks)
        flat.append(torch.cat([value.flatten() for value in gradient.values()]))
    assert (flat[0] - flat[1]).norm() > 0.01 * flat[1].norm()


@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # the compiler would give up at it
def test_compiled_step_on_single_tasks_equals_eager() -> None:
    def step(objective: Objective, params: Params, state: OuterState, tasks: Tasks) -> None:
        adam.step(OfTasks(objective, tasks), params, state)

    class OfTasks(Objective):
        def __init__(self, objective: Objective, tasks: Tasks) -> None:
            self.objective, self.tasks = objective, tasks

        def gradient(self, theta: Params) -> tuple[Params, dict[str, Tensor]]:
            return self.objective.task_gradients(theta, self.tasks)

    adam, inner = Adam(step_size=0.1), SGD(step_size=0.01, num_steps=1, order=2, adapt=["*"])
    algorithm = build_from(MAML, Sinusoid(num_shots=4), MLP((1,), 1, [6]), inner)
    tasks = algorithm.domain.sample_tasks(3, Stream(1))
    results = []
    for compiles in (False, True):
        objective = BatchObjective(MetaGradient(algorithm, Execution(1, None, compile=compiles)), tasks)
        params = {name: value.clone() for name, value in expand(algorithm.theta, 3).items()}
        state = adam.init_state(params)
        for _ in range(3):
            params, state = objective.task_step(step, params, state, tasks)
        assert objective.meta_gradient.execution.compile == compiles, "compiling has not failed"
        results.append((params, state))
    (eager, eager_state), (compiled, compiled_state) = results
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(compiled_state, eager_state, rtol=1e-4, atol=1e-6)


class MeanOverTasks(FixedExamples):
    """A domain of a user who averages over tasks."""

    def loss(self, outputs: Tensor, data: Examples) -> tuple[Tensor, Metrics]:
        losses, metrics = super().loss(outputs, data)
        return losses.mean(), metrics


def test_mean_over_tasks_is_refused() -> None:
    domain = MeanOverTasks((1,), classes=False)
    inner = SGD(step_size=0.3, num_steps=1, order=2, adapt=["*"])
    algorithm = build_from(MAML, domain, MLP((1,), 1, [6]), inner)
    with pytest.raises(MamlError, match=r"MAML on MeanOverTasks has losses of shape \(\) for 4 tasks"):
        algorithms.gradient(algorithm, algorithm.theta, domain.sample_tasks(NUM_TASKS, Stream(2)))


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (torch.tensor(1.0), r"'mine' of shape \(\), but a metric is a tensor with an entry for each of 4 tasks"),
        (torch.zeros(1), r"'mine' of shape \(1,\)"),
        (1.0, "'mine' of type float"),
    ],
)
def test_metric_without_an_entry_for_each_task_is_refused(metric: Any, message: str) -> None:
    class Measuring(FixedExamples):
        """A domain of a user whose metric has a mistake."""

        def loss(self, outputs: Tensor, data: Examples) -> tuple[Tensor, Metrics]:
            return super().loss(outputs, data)[0], {"mine": metric}

    domain = Measuring((1,), classes=False)
    algorithm = build_from(MAML, domain, MLP((1,), 1, [6]), SGD(step_size=0.3, num_steps=1, order=2, adapt=["*"]))
    with pytest.raises(MamlError, match=f"MAML on Measuring has a metric {message}"):
        algorithms.gradient(algorithm, algorithm.theta, domain.sample_tasks(NUM_TASKS, Stream(2)))


def test_losses_that_do_not_depend_on_theta_are_refused() -> None:
    class Detached(FixedExamples):
        """A domain of a user whose loss is detached."""

        def outer_loss(self, model: Any, params: Params, data: Examples) -> tuple[Tensor, Metrics]:
            return super().outer_loss(model, params, data)[0].detach(), {}

        def inner_loss(self, model: Any, params: Params, data: Examples) -> Tensor:
            return super().outer_loss(model, params, data)[0]

    domain = Detached((1,), classes=False)
    algorithm = build_from(MAML, domain, MLP((1,), 1, [6]), SGD(step_size=0.3, num_steps=1, order=2, adapt=["*"]))
    with pytest.raises(MamlError, match="the losses of MAML on Detached do not depend on theta"):
        algorithms.gradient(algorithm, algorithm.theta, domain.sample_tasks(NUM_TASKS, Stream(2)))


@pytest.mark.parametrize("returned", [None, torch.zeros(NUM_TASKS), (torch.zeros(NUM_TASKS),), (torch.zeros(2), None)])
def test_losses_without_metrics_are_refused(returned: object) -> None:
    class Own(MAML):
        """An algorithm of a user, with a mistake."""

        def task_losses(self, params: Params, tasks: Tasks) -> Any:
            return returned

    domain = FixedExamples((1,), classes=False)
    algorithm = build_from(Own, domain, MLP((1,), 1, [6]), SGD(step_size=0.3, num_steps=1, order=2, adapt=["*"]))
    with pytest.raises(MamlError, match=r"Own.task_losses returns a \w+, but has to return two values: the losses"):
        algorithms.gradient(algorithm, algorithm.theta, domain.sample_tasks(NUM_TASKS, Stream(2)))


def test_metric_that_hides_the_loss_from_trpo_is_refused() -> None:
    class Own(MAML):
        """An algorithm of a user, which logs another number as the loss."""

        def task_losses(self, params: Params, tasks: Tasks) -> tuple[Tensor, Metrics]:
            losses, metrics = super().task_losses(params, tasks)
            return losses, metrics | {"loss": 0 * losses}

    settings = compose(["+experiment=point_navigation_maml", "domain.num_shots=2", "domain.horizon=5"])[0]
    domain = build(settings.domain)
    policy = build(settings.model, in_shape=domain.in_shape, out_dim=domain.out_dim)
    algorithm = build_from(Own, domain, policy, build(settings.inner), outer=build(settings.outer))
    with pytest.raises(MamlError, match=r"Own\.task_losses returns a metric named loss.* TRPO lowers; give it another"):
        algorithms.step(algorithm, algorithm.sample_tasks(2, Stream(0)))
