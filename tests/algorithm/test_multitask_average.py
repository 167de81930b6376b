"""Multi-task averaging against regressors that are trained one at a time."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from maml.algorithm.multitask_average import MultitaskAverage
from maml.domain.base import SupervisedDomain, without_data
from maml.domain.omniglot import Omniglot
from maml.domain.omniglot_sequence import OmniglotSequence
from maml.domain.sinusoid import Sinusoid
from maml.errors import MamlError
from maml.hardware.base import Execution
from maml.inner.sgd import SGD
from maml.model.base import Model
from maml.model.lstm import LSTM
from maml.model.mlp import MLP
from maml.outer.adam import Adam
from maml.seeding import Stream
from maml.training.iteration import Iteration, check_parallelism
from maml.types import Params, Tasks, take
from tests import algorithms, plain_adam, plain_maml
from tests.algorithms import build_from

pytestmark = pytest.mark.usefixtures("float64")

STEP_SIZE, CHECK_EVERY = 0.02, 50
MAX_ERROR = 4.8  # the first regressor reaches it at the second check, the others at the first


class Float64MLP(MLP):
    """Initial parameters in float64, so that hundreds of steps stay comparable."""

    def init(self, stream: Stream) -> Params:
        return {name: value.double() for name, value in super().init(stream).items()}


MODEL = Float64MLP((1,), 1, [6], activation="relu")
DOMAIN = Sinusoid(num_shots=12, num_query=7)
TASKS = {name: value.double() for name, value in DOMAIN.sample_tasks(4, Stream(8)).items()}


def make(seed: int = 0, domain: SupervisedDomain = DOMAIN, model: Model = MODEL, **options: Any) -> MultitaskAverage:
    inner = SGD(step_size=0.1, num_steps=1, order=2, adapt=["*"])
    settings: dict[str, Any] = {
        "weight": 0.0,
        "pull": "zero",
        "max_error": MAX_ERROR,
        "max_share_above": 0.05,
        "num_steps": 300,
        "max_attempts": 20,
    } | options
    return build_from(MultitaskAverage, domain, model, inner, Adam(step_size=STEP_SIZE), seed, **settings)


@pytest.mark.parametrize(
    ("kind", "options", "model"),
    [
        (Omniglot, {"num_shots": 1}, MODEL),
        (OmniglotSequence, {"sequence_length": 10}, LSTM((10, 405), 5, hidden_size=3)),
    ],
)
def test_classes_that_every_task_numbers_anew_are_refused(kind: Any, options: dict[str, int], model: Model) -> None:
    with without_data():
        domain = kind(num_ways=5, data_dir="", cache_dir="", **options)
    with pytest.raises(MamlError, match=f"but {kind.__name__} classifies, with classes numbered anew"):
        make(domain=domain, model=model)


def error(params: Params, task: Tasks, role: str) -> Tensor:
    x = task[f"{role}_x"][0]
    return F.mse_loss(plain_maml.mlp(params, x), (task["amplitude"] * torch.sin(x - task["phase"]))[0])


def trained_alone(
    number: int,
    attempt: int,
    max_error: float = MAX_ERROR,
    num_steps: int = 300,
    weight: float = 0.0,
    centre: Params | None = None,
    task: Tasks | None = None,
    start: Params | None = None,
    seed: int = 0,
) -> tuple[Params, float]:
    """Trains regressor ``number``, on the task of that number if none is given; returns it and its last error."""
    task = task or take(TASKS, number, number + 1)
    params = dict(start or MODEL.init(Stream(seed).child("regressors").child(attempt).child(number)))
    states = dict.fromkeys(params, plain_adam.NEW)
    now = float("inf")
    for step in range(1, num_steps + 1):
        leaves = {name: value.clone().requires_grad_() for name, value in params.items()}
        gradients = torch.autograd.grad(error(leaves, task, "support"), list(leaves.values()))
        for name, gradient in zip(params, gradients, strict=True):
            pull = 2 * weight * (params[name] - (centre[name] if centre else 0.0))  # from weight * |theta_i - centre|^2
            params[name], states[name] = plain_adam.step(params[name], gradient + pull, states[name], STEP_SIZE)
        if step % CHECK_EVERY == 0 or step == num_steps:
            now = error(params, task, "query").item()
            if now < max_error:
                break
    return params, now


def mean(regressors: list[Params]) -> Params:
    return {name: torch.stack([params[name] for params in regressors]).mean(0) for name in regressors[0]}


def assert_equal(theta: Params, expected: Params) -> None:
    assert theta.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(theta[name], value, rtol=1e-8, atol=1e-9)


def trained_until_good(number: int, **options: Any) -> tuple[Params, float]:
    """Trains a regressor with as many attempts as it needs."""
    for attempt in range(20):
        params, now = trained_alone(number, attempt, **options)
        if now < MAX_ERROR:
            return params, now
    raise AssertionError("the test's own settings let no regressor get there")


def test_theta_is_the_mean_of_regressors_trained_alone() -> None:
    algorithm = make()
    metrics = [algorithms.step(algorithm, take(TASKS, start, start + 2)) for start in (0, 2)]
    alone = [trained_until_good(number) for number in range(4)]
    assert_equal(algorithm.theta, mean([params for params, _ in alone]))
    assert algorithm.buffers["num_averaged"] == 4
    for two, (first, second) in zip(metrics, (alone[:2], alone[2:]), strict=True):
        assert two["loss"].item() == pytest.approx((first[1] + second[1]) / 2)
        assert two["largest_loss"].item() == pytest.approx(max(first[1], second[1]))


@pytest.mark.parametrize("pull", ["zero", "mean"])
def test_average_does_not_depend_on_the_chunk(pull: str) -> None:
    whole, cut = make(weight=0.02, pull=pull), make(weight=0.02, pull=pull)
    for algorithm, task_chunk in ((whole, None), (cut, 3)):
        for _ in range(2):  # in the second iteration there is a mean to pull to
            algorithms.step(algorithm, TASKS, task_chunk)
    for name, value in whole.theta.items():
        torch.testing.assert_close(cut.theta[name], value, rtol=1e-8, atol=1e-10)


def test_one_after_another_is_the_same_as_side_by_side() -> None:
    together, apart = make(), make()
    algorithms.step(together, TASKS)
    for number in range(4):
        algorithms.step(apart, take(TASKS, number, number + 1))
    assert_equal(apart.theta, together.theta)


@pytest.mark.parametrize("pull", ["zero", "mean"])
def test_regressors_are_pulled_to_zero_or_to_the_mean_of_those_before(pull: str) -> None:
    algorithm = make(weight=0.02, pull=pull)
    regressors: list[Params] = []
    for number in range(3):
        algorithms.step(algorithm, take(TASKS, number, number + 1))
        # Before the first regressor there is no mean, so nothing pulls it.
        weight = 0.0 if pull == "mean" and number == 0 else 0.02
        centre = mean(regressors) if pull == "mean" and regressors else None
        regressors.append(trained_until_good(number, weight=weight, centre=centre)[0])
        assert_equal(algorithm.theta, mean(regressors))
    free = make()
    algorithms.step(free, take(TASKS, 0, 1))
    algorithms.step(free, take(TASKS, 1, 2))
    assert any((free.theta[name] - value).abs().max() > 1e-3 for name, value in mean(regressors[:2]).items())


def test_training_with_a_pull_minimises_the_loss_plus_the_squared_distance() -> None:
    algorithm = make(weight=0.3, pull="mean", max_error=1e-9, num_steps=1, max_attempts=1)
    algorithm.buffers["num_averaged"] += 1
    centre = {name: value.clone() for name, value in algorithm.theta.items()}
    task, start = take(TASKS, 0, 1), MODEL.init(Stream(0).child("regressors").child(0).child(1))
    leaves = {name: value.clone().requires_grad_() for name, value in start.items()}
    distance = sum((leaves[name] - centre[name]).square().sum() for name in leaves)
    gradients = torch.autograd.grad(error(leaves, task, "support") + 0.3 * distance, list(leaves.values()))
    algorithms.step(algorithm, task)
    for (name, value), gradient in zip(start.items(), gradients, strict=True):
        expected = plain_adam.step(value, gradient, plain_adam.NEW, STEP_SIZE)[0]
        torch.testing.assert_close(algorithm.theta[name], (centre[name] + expected) / 2, rtol=1e-8, atol=1e-10)


def test_regressor_that_starts_at_the_previous_one_has_a_new_optimizer() -> None:
    algorithm = make(initial="previous", num_steps=200, weight=0.01)
    start, regressors = None, []
    for number in range(4):
        algorithms.step(algorithm, take(TASKS, number, number + 1))
        start, _ = trained_alone(number, 0, num_steps=200, weight=0.01, start=start)
        regressors.append(start)
        assert_equal(algorithm.theta, mean(regressors))


def test_only_the_first_regressor_of_a_chain_has_several_attempts() -> None:
    algorithm = make(initial="previous", max_error=1e-9, num_steps=1, max_attempts=3)
    algorithms.step(algorithm, take(TASKS, 0, 1))
    first, _ = min((trained_alone(0, attempt, 0.0, 1) for attempt in range(3)), key=lambda found: found[1])
    assert_equal(algorithm.theta, first)
    algorithms.step(algorithm, take(TASKS, 1, 2))
    second, _ = trained_alone(1, 0, 0.0, 1, start=first)
    assert_equal(algorithm.theta, mean([first, second]))


def test_steps_use_the_support_examples_in_turns() -> None:
    algorithm = make(num_examples=5, max_error=1e-9, num_steps=3, max_attempts=1)
    algorithms.step(algorithm, take(TASKS, 0, 2))
    regressors = []
    for number in range(2):
        params = MODEL.init(Stream(0).child("regressors").child(0).child(number))
        states, task = dict.fromkeys(params, plain_adam.NEW), take(TASKS, number, number + 1)
        for examples in ([0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11, 0, 1, 2]):
            leaves = {name: value.clone().requires_grad_() for name, value in params.items()}
            part = task | {"support_x": task["support_x"][:, examples]}
            gradients = torch.autograd.grad(error(leaves, part, "support"), list(leaves.values()))
            for name, gradient in zip(params, gradients, strict=True):
                params[name], states[name] = plain_adam.step(params[name], gradient, states[name], STEP_SIZE)
        regressors.append(params)
    assert_equal(algorithm.theta, mean(regressors))


def test_chain_goes_on_from_a_saved_state_with_the_same_bits() -> None:
    whole, first, second = (make(initial="previous", pull="mean", weight=0.02) for _ in range(3))
    for number in range(4):
        algorithms.step(whole, take(TASKS, number, number + 1))
    for number in range(2):
        algorithms.step(first, take(TASKS, number, number + 1))
    second.load_state_dict({group: dict(tensors) for group, tensors in first.state_dict().items()})
    for number in range(2, 4):
        algorithms.step(second, take(TASKS, number, number + 1))
    for group, tensors in whole.state_dict().items():
        assert all(torch.equal(value, second.state_dict()[group][name]) for name, value in tensors.items())


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("initial", ["fresh", "previous"])
def test_seeds_side_by_side_equal_separate_runs(initial: str, batch: int) -> None:
    options: dict[str, Any] = {"initial": initial, "max_attempts": 3, "pull": "mean", "weight": 0.01, "num_steps": 200}
    together, apart = ([make(seed, **options) for seed in range(3)] for _ in range(2))
    streams = [Stream(seed) for seed in range(3)]
    execution = Execution(num_threads=1, task_chunk=None, compile=False)
    joint = Iteration(together, streams, batch, execution)
    single = [Iteration([seed], [stream], batch, execution) for seed, stream in zip(apart, streams, strict=True)]
    for number in (1, 2, 3):
        metrics = joint(number)
        alone = [iterate(number)[0] for iterate in single]
        for here, there in zip(metrics, alone, strict=True):
            assert {name: value.item() for name, value in here.items()} == pytest.approx(
                {name: value.item() for name, value in there.items()}
            )
    check_parallelism(together[0], len(together), batch)
    for joined, separate in zip(together, apart, strict=True):
        assert_equal(joined.theta, separate.theta)
        assert_equal(joined.buffers, separate.buffers)


def test_attempt_that_fails_is_drawn_anew_and_no_other() -> None:
    same = {name: value[:1].expand(4, -1, -1) for name, value in TASKS.items()}
    errors = [[trained_alone(number, attempt, 0.0, 1, task=same)[1] for attempt in range(8)] for number in range(4)]
    _, below, above, _ = sorted(first for first, *_ in errors)
    max_error = (below + above) / 2
    attempts = [[each < max_error for each in row].index(True) for row in errors]
    assert attempts.count(0) == 2
    algorithm = make(max_error=max_error, num_steps=1, max_attempts=8)
    metrics = algorithms.step(algorithm, same)
    alone = [trained_alone(number, attempt, 0.0, 1, task=same)[0] for number, attempt in enumerate(attempts)]
    assert_equal(algorithm.theta, mean(alone))
    assert metrics["largest_loss"].item() == pytest.approx(
        max(row[attempt] for row, attempt in zip(errors, attempts, strict=True))
    )


def test_regressor_that_never_gets_there_is_kept_at_its_smallest_error_and_counted() -> None:
    algorithm = make(max_error=1e-9, num_steps=1, max_attempts=3)
    metrics = algorithms.step(algorithm, take(TASKS, 0, 2))
    best = [
        min((trained_alone(number, attempt, 0.0, 1) for attempt in range(3)), key=lambda found: found[1])
        for number in range(2)
    ]
    assert_equal(algorithm.theta, mean([params for params, _ in best]))
    assert metrics["loss"].item() == pytest.approx(sum(now for _, now in best) / 2)
    assert metrics["share_above"].item() == 1.0
    with pytest.raises(
        MamlError, match=r"2 of 2 regressors .* algorithm\.max_error=1e-09, and the mean error is 9\.61"
    ):
        algorithm.check_result()


@pytest.mark.parametrize(
    ("num_above", "sum_errors", "passes"),
    [(5, 1.9, True), (6, 1.9, False), (5, 2.1, False), (0, float("nan"), False)],
)
def test_rule_is_a_small_mean_error_and_at_most_a_share_of_regressors_above(
    num_above: int, sum_errors: float, passes: bool
) -> None:
    algorithm = make(max_error=0.02)
    algorithm.check_result()  # before the first regressor there is nothing to refuse
    for name, value in (("num_averaged", 100), ("num_above", num_above), ("sum_errors", sum_errors)):
        algorithm.buffers[name].fill_(value)
    with nullcontext() if passes else pytest.raises(MamlError, match=f"{num_above} of 100 regressors"):
        algorithm.check_result()
