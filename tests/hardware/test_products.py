"""Matrix products: both routines compute the same, and the faster one is chosen."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from maml.domain.point_navigation import PointNavigation
from maml.domain.sinusoid import Sinusoid
from maml.hardware import base, products
from maml.hardware.base import Execution, Hardware


@pytest.fixture(autouse=True)
def _switch() -> Iterator[None]:
    yield
    products.use_onednn(False)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
@pytest.mark.parametrize("num_tasks", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("num_in", "num_out"), [(70, 80), (5, 80)])
def test_both_routines_compute_the_same(num_tasks: int, dtype: torch.dtype, num_in: int, num_out: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y, weight, bias = (
        torch.randn(num_tasks, *shape, generator=generator, dtype=dtype)
        for shape in ((33, num_in), (33, num_out), (num_out, num_in), (num_out,))
    )
    found: dict[bool, list[Tensor]] = {}
    for enabled in (False, True):
        products.use_onednn(enabled)
        total = torch.ones(num_tasks, num_out, num_in, dtype=dtype)
        products.add_outer(total, y, x)
        found[enabled] = [products.linear(x, weight), products.linear(x, weight, bias), total]
    expected = [x @ weight.mT, x @ weight.mT + bias.unsqueeze(1), 1 + y.mT @ x]
    for enabled in found:
        torch.testing.assert_close(found[enabled], expected)


@pytest.mark.parametrize(("slow", "expected"), [("_plain_linear", True), ("_onednn_linear", False)])
def test_the_faster_routine_is_chosen(monkeypatch: pytest.MonkeyPatch, slow: str, expected: bool) -> None:
    product: Callable[..., Tensor] = products._plain_linear

    def slow_product(*values: Any) -> Tensor:
        time.sleep(0.01)
        return product(*values)

    monkeypatch.setattr(products, "_ONEDNN_LINEAR", object())
    monkeypatch.setattr(products, "_REPETITIONS", 3)
    for name in ("_plain_linear", "_onednn_linear"):
        monkeypatch.setattr(products, name, slow_product if name == slow else product)
    num_threads = torch.get_num_threads()
    assert products.onednn_is_faster() is expected
    assert torch.get_num_threads() == num_threads
    monkeypatch.setattr(products, "_ONEDNN_LINEAR", None)
    assert not products.onednn_is_faster()


def test_burst_of_other_load_chooses_no_routine(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, now = 0, 0.0

    def product(*values: Any) -> None:
        nonlocal calls, now
        calls += 1
        now += 5.0 if calls <= products._REPETITIONS else 1.0  # the first half of the time is under load

    monkeypatch.setattr(products, "_ONEDNN_LINEAR", object())
    monkeypatch.setattr(products.time, "perf_counter", lambda: now)
    monkeypatch.setattr(products, "_plain_linear", product)
    monkeypatch.setattr(products, "_onednn_linear", product)
    assert not products.onednn_is_faster()


def test_the_choice_is_measured_for_rollouts_on_a_cpu_and_kept_by_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "onednn_is_faster", lambda: True)
    rollouts, hardware = PointNavigation().workload, Hardware("cpu")
    chosen = hardware.choose(rollouts, 100, {})
    assert chosen.onednn
    assert not hardware.choose(Sinusoid().workload, 100, {}).onednn
    assert not Hardware("cpu", onednn=False).choose(rollouts, 100, {}).onednn
    monkeypatch.setattr(base, "onednn_is_faster", lambda: False)
    assert hardware.choose(rollouts, 100, chosen.as_dict()).onednn
    assert Hardware("cpu", onednn=True).choose(rollouts, 100, {}).onednn


def test_a_run_applies_its_choice() -> None:
    for enabled in (True, False):
        Hardware("cpu").apply(Execution(1, None, False, onednn=enabled))
        assert products._use_onednn is enabled
