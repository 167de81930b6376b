"""Clipping, weight decay and momentum of the outer optimizers, against PyTorch's optimizers in float64."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import pytest
import torch

from maml.errors import Interrupted, MamlError
from maml.outer.adam import Adam
from maml.outer.first_order import FirstOrder
from maml.outer.schedule import Cosine
from maml.outer.sgd import SGD
from maml.types import Params
from tests.outer.test_adam import Given
from tests.runs import TinyRuns, assert_same_run, before_iteration

NUM_UPDATES = 12


def gradients() -> list[Params]:
    random = torch.Generator().manual_seed(0)
    draw = torch.randn
    return [
        {"a": draw(3, generator=random, dtype=torch.float64), "b": draw(2, 2, generator=random, dtype=torch.float64)}
        for _ in range(NUM_UPDATES)
    ]


def start() -> Params:
    return {"a": torch.arange(3, dtype=torch.float64), "b": torch.ones(2, 2, dtype=torch.float64)}


def ours(outer: FirstOrder) -> Params:
    theta = start()
    state = outer.init_state(theta)
    for gradient in gradients():
        outer.step(Given(gradient), theta, state)
    return theta


def torchs(
    make: Callable[[list[torch.Tensor]], torch.optim.Optimizer],
    clip_norm: float | None = None,
    factor: Callable[[int], float] = lambda done: 1.0,
) -> Params:
    theta = start()
    optimizer = make(list(theta.values()))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    for gradient in gradients():
        for name, value in theta.items():
            value.grad = gradient[name].clone()
        if clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(theta.values(), clip_norm)
        optimizer.step()
        schedule.step()
    return theta


def assert_close(actual: Params, expected: Params, rtol: float = 1e-9) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=rtol, atol=1e-12)


def test_adam_with_weight_decay_is_adamw() -> None:
    expected = torchs(lambda values: torch.optim.AdamW(values, 0.1, weight_decay=0.3, eps=1e-12))
    assert_close(ours(Adam(0.1, weight_decay=0.3, eps=1e-12)), expected)


def test_sgd_with_momentum_is_torchs() -> None:
    expected = torchs(lambda values: torch.optim.SGD(values, 0.1, momentum=0.9))
    assert_close(ours(SGD(0.1, num_iterations=1, momentum=0.9)), expected)


def test_norm_of_the_whole_gradient_is_bounded() -> None:
    expected = torchs(lambda values: torch.optim.SGD(values, 0.1), clip_norm=1.5)
    assert_close(ours(SGD(0.1, num_iterations=1, clip_norm=1.5)), expected, rtol=1e-5)  # torch adds 1e-6 to the norm
    assert_close(ours(SGD(0.1, num_iterations=1, clip_norm=1e6)), ours(SGD(0.1, num_iterations=1)))


def test_gradient_of_zero_is_not_clipped_to_nan() -> None:
    theta, outer = start(), SGD(0.1, num_iterations=1, clip_norm=1.0)
    outer.step(Given({name: torch.zeros_like(value) for name, value in theta.items()}), theta, outer.init_state(theta))
    assert_close(theta, start())


def test_two_schedules_are_refused() -> None:
    with pytest.raises(MamlError, match=r"outer\.final_step_size=0\.0 both change the step size"):
        SGD(1.0, num_iterations=4, final_step_size=0.0, schedule=Cosine(4))


def test_run_with_a_schedule_resumes_exactly(tiny: TinyRuns, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ("outer=adam_cosine", "outer.weight_decay=0.01", "outer.clip_norm=1.0", "num_iterations=6")
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        before_iteration(patch, 3, lambda _: os.kill(os.getpid(), signal.SIGTERM))
        tiny.run(*settings)
    assert_same_run(tiny.run(*settings), tiny.in_folder("whole").run(*settings))


def test_regressors_that_are_independent_are_not_clipped_together(tiny: TinyRuns) -> None:
    with pytest.raises(MamlError, match=r"outer\.clip_norm would clip the regressors"):
        tiny.run("+experiment=sinusoid_multitask_average", "outer.clip_norm=1.0")
