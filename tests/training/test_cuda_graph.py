"""Running an iteration as a CUDA graph, with a fake graph: when it is used, and when the run continues without it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from maml.algorithm.maml import MAML
from maml.domain.sinusoid import Sinusoid
from maml.errors import MamlError
from maml.hardware.base import Execution
from maml.inner.sgd import SGD
from maml.model.mlp import MLP
from maml.seeding import Stream
from maml.training import cuda_graph, loop
from maml.training.cuda_graph import CudaGraphIteration
from maml.training.iteration import Iteration
from maml.training.learner import Learner
from maml.types import Params, Tasks
from tests.algorithms import build_from
from tests.runs import TinyRuns


def iteration() -> Iteration:
    algorithm = build_from(MAML, Sinusoid(), MLP((1,), 1, [20]), SGD(0.01, 1, 2, ["*"]))
    return Iteration([algorithm], [Stream(0)], 4, Execution(1, None, False, cuda_graph=True))


def fake_capture(iterate: Iteration, distort: Callable[[int], Any] = lambda calls: None) -> Any:
    """Returns a fake `capture`: capturing computes nothing, and every replay writes into the same tensors.

    ``distort`` is called in front of each replay.
    """

    def capture(compute: Callable[[], list[dict[str, Tensor]]]) -> Any:
        (algorithm,) = iterate.algorithms
        before = {name: value.clone() for name, value in _flat(algorithm).items()}
        outputs = [{name: value.clone() for name, value in its.items()} for its in compute()]
        for name, value in _flat(algorithm).items():
            value.copy_(before[name])
        calls = 0

        def replay() -> None:
            nonlocal calls
            calls += 1
            distort(calls)
            for kept, new in zip(outputs, compute(), strict=True):
                for name, value in new.items():
                    kept[name].copy_(value)

        return outputs, replay

    return capture


def _flat(algorithm: Any) -> dict[str, Tensor]:
    return {f"{group}.{name}": value for group, its in algorithm.state_dict().items() for name, value in its.items()}


def test_graph_goes_on_where_the_plain_iterations_were(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, iterate = iteration(), iteration()
    captured = CudaGraphIteration(iterate)
    monkeypatch.setattr(cuda_graph, "capture", fake_capture(iterate))
    for number in range(1, 11):
        expected = {name: value.item() for name, value in plain(number)[0].items()}
        assert {name: value.item() for name, value in captured(number)[0].items()} == expected
    assert captured.replay is not None
    assert captured.execution.cuda_graph
    mine, theirs = _flat(plain.algorithms[0]), _flat(iterate.algorithms[0])
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_best_theta_before_its_first_validation_does_not_end_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    iterate = iteration()
    iterate.algorithms[0].keep_best_of_validation()
    captured = CudaGraphIteration(iterate)
    monkeypatch.setattr(cuda_graph, "capture", fake_capture(iterate))
    for number in range(1, 6):
        captured(number)
    assert captured.replay is not None
    assert not captured.has_failed


@pytest.mark.parametrize("factor", [0.0, -1.0, 3.0])
def test_graph_whose_theta_goes_elsewhere_is_given_up(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    iterate = iteration()
    captured = CudaGraphIteration(iterate)
    theta = iterate.algorithms[0].theta

    def skewed(compute: Callable[[], Any]) -> Any:
        outputs, replay = fake_capture(iterate)(compute)

        def wrong() -> None:
            start = {name: value.clone() for name, value in theta.items()}
            replay()
            for name, value in theta.items():
                value.copy_(start[name] + factor * (value - start[name]))

        return outputs, wrong

    monkeypatch.setattr(cuda_graph, "capture", skewed)
    for number in range(1, 6):
        captured(number)
    assert captured.has_failed


@pytest.mark.parametrize("what", ["tasks", "capture"])
def test_graph_that_does_something_else_is_given_up_and_nothing_is_lost(
    what: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plain, iterate = iteration(), iteration()
    captured = CudaGraphIteration(iterate)

    def refuse(compute: Callable[[], Any]) -> Any:
        try:
            raise RuntimeError("operation not permitted when stream is capturing")
        except RuntimeError:
            raise RuntimeError("the capture has failed")  # noqa: B904 - as torch does

    capture = fake_capture(iterate, lambda calls: captured.number.fill_(99))
    monkeypatch.setattr(cuda_graph, "capture", refuse if what == "capture" else capture)
    with caplog.at_level(logging.WARNING):
        for number in range(1, 8):
            plain(number)
            captured(number)
    assert captured.replay is None
    assert not captured.execution.cuda_graph, "a resumed run does not try again"
    (said,) = caplog.records
    expected = "operation not permitted" if what == "capture" else "its loss is"
    assert expected in said.getMessage()
    mine, theirs = _flat(plain.algorithms[0]), _flat(iterate.algorithms[0])
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize(("most", "expected"), [(2, 2), (0, None)])
def test_graph_without_memory_is_tried_with_smaller_chunks(
    most: int, expected: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, iterate = iteration(), iteration()
    captured = CudaGraphIteration(iterate)

    def limited(compute: Callable[[], Any]) -> Any:
        if (iterate.execution.task_chunk or 4) > most:
            try:
                raise torch.OutOfMemoryError("CUDA out of memory")
            except RuntimeError:
                raise RuntimeError("the capture has failed")  # noqa: B904 - as torch does
        return fake_capture(iterate)(compute)

    sums, warmed_up = iterate.meta_gradient.sums, list[int]()

    def noting_sums(params: Params, tasks: Tasks, chunk: int) -> Any:
        warmed_up.append(chunk)
        return sums(params, tasks, chunk)

    monkeypatch.setattr(cuda_graph, "capture", limited)
    monkeypatch.setattr(iterate.meta_gradient, "sums", noting_sums)
    for number in range(1, 8):
        assert captured(number)[0]["loss"].item() == pytest.approx(plain(number)[0]["loss"].item())
    assert [chunk for chunk in (4, 2, 1) if chunk in warmed_up] == ([4, 2] if expected else [4, 2, 1])
    assert captured.execution.task_chunk == expected
    assert captured.execution.cuda_graph == (expected is not None)


def test_graph_is_given_up_when_training_ends_with_an_error(tiny: TinyRuns, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[CudaGraphIteration] = []

    def with_graph(iterate: Iteration) -> CudaGraphIteration:
        monkeypatch.setattr(cuda_graph, "capture", fake_capture(iterate))
        graphs.append(CudaGraphIteration(iterate))
        return graphs[-1]

    def fail(learner: Learner, *_: object) -> None:
        assert graphs[0].replay is not None
        raise MamlError("the disk is full")

    monkeypatch.setattr(loop, "with_cuda_graph", with_graph)
    monkeypatch.setattr(loop, "_save_checkpoint", fail)
    with pytest.raises(MamlError, match="the disk is full") as caught:
        tiny.run("num_iterations=8")
    assert caught.tb is not None, "the error keeps everything that it saw"
    assert graphs[0].replay is None
